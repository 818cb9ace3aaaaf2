# Every target sets itself up first: a virtual environment in .venv, made once and again when the requirements change.

PYTHON ?= python3
TORCH ?= own
# Where the torch of PYTHON lies, if it is recent enough
SYSTEM_TORCH := import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11); print(torch.__path__[0][:-6])
BIN := .venv/bin
OR_SAY := || { echo "error: that failed. It needs a network and up to 6 GB of disk; free here: $$(df -h . | awk 'NR == 2 {print $$4}')"; exit 2; }
ARGS ?=
TESTS ?= tests

.PHONY: help setup setup-test train-256 train-512 baseline eval report play check study study-quick test tiny-base tiny-256 lint clean

help:
	@echo "make train-256          GRPO -> SFT -> GRPO with 256 new tokens (ARGS='--out runs/x' adds options)"
	@echo "make train-512          GRPO with 512 new tokens"
	@echo "make baseline           zero-shot evaluation with 1024 new tokens"
	@echo "make eval CKPT=folder   evaluate a checkpoint, tiny, or a hub id"
	@echo "make report RUNS=folder  a page about one or more runs, to look at in a browser"
	@echo "make play               watch the model before and after training think side by side (CKPT=\"tiny folder\": others)"
	@echo "make check              does this machine's GPU, or CPU, calculate what it should? (ARGS='--model Qwen/Qwen3-1.7B')"
	@echo "make study              the runs of the study in docs/study that have no result yet; goes on when stopped"
	@echo "make study-quick        two of its runs again, in ten minutes, beside their results in docs/study"
	@echo "make test               run the tests (TESTS=tests/test_loss.py: some of them)"
	@echo "make lint               check style and format (ruff)"
	@echo "make tiny-base          train the bundled model again from random weights, over model/tiny (an hour; TASK=calculus: the other one)"
	@echo "make tiny-256           train-256, and keep the result as model/tiny-256"
	@echo "make setup              only install what the above needs (setup-test: what test and lint need too);"
	@echo "                        TORCH=system uses the torch that PYTHON has, 2.11 or newer, instead of installing one"
	@echo "make clean              remove the environment and the caches; runs/ stays"

.venv/ready: requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON): install Python 3.11 or newer, or make PYTHON=..."; exit 2; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $$($(PYTHON) -V) is too old, 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c "import ensurepip, venv" 2> /dev/null \
		|| { echo "error: $(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@echo "setting up .venv, once: some minutes, up to 3 GB to download (most of it torch with CUDA)"
	@$(PYTHON) -m venv .venv $(OR_SAY)
ifeq ($(TORCH),system)
	@$(PYTHON) -c "$(SYSTEM_TORCH)" > .venv/torch.pth 2> /dev/null \
		|| { echo "error: $(PYTHON) has no torch 2.11 or newer; name one that has: make setup TORCH=system PYTHON=..."; exit 2; }
	@mv .venv/torch.pth .venv/lib/python*/site-packages
	@grep -v '^torch==' requirements.txt | $(BIN)/pip install --quiet --disable-pip-version-check -r /dev/stdin $(OR_SAY)
else
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt $(OR_SAY)
endif
	@touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	@echo "setting up the tests, once: about a minute, some 20 MB to download"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt $(OR_SAY)
	@touch $@

setup: .venv/ready

setup-test: .venv/ready-test

train-256: setup
	$(BIN)/python train.py 256 $(ARGS)

train-512: setup
	$(BIN)/python train.py 512 $(ARGS)

baseline: setup
	$(BIN)/python train.py baseline $(ARGS)

eval: setup
	@test -n "$(CKPT)" || { echo "error: say which checkpoint: make eval CKPT=runs/256-tiny/checkpoints/step_0080"; exit 2; }
	$(BIN)/python eval.py $(CKPT) $(ARGS)

report: setup
	@test -n "$(RUNS)" || { echo "error: say which runs: make report RUNS='runs/256-tiny runs/other'"; exit 2; }
	$(BIN)/python -m lab.report $(RUNS) $(ARGS)

play: setup
	@$(BIN)/python play.py $(CKPT) $(ARGS)

check: setup
	@$(BIN)/python -m lab.check $(ARGS)

study: setup
	$(BIN)/python -m experiments.study.run $(ARGS)

study-quick: setup
	$(BIN)/python -m experiments.study.run --arms grpo staged --seeds 1 --out runs/study-quick --results runs/study-quick $(ARGS)

test: setup-test
	PYTHONUTF8=1 $(BIN)/python -m pytest -q -n 2 $(TESTS) $(ARGS)

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tiny-base: TASK ?= countdown
tiny-base: setup
	$(BIN)/python -m experiments.bases.train --task $(TASK) $(ARGS)

tiny-256: train-256
	$(BIN)/python -m experiments.bases.keep

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
