"""Several processes on one run: the completions, gradients and weights of one, also when a process dies."""

import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from helpers import (
    ROOT,
    assert_close,
    parsed,
    ragged_samples,
    random_model,
    run_command,
    smoke,
    timeless,
    trainer_for,
)

import rl.grpo
import rl.rollout
from data.load import read_jsonl
from lab.checkpoint import checkpoints
from lab.device import processes
from lab.errors import Stopped, user_errors
from lab.runfolder import RunFolder
from lab.stages import train
from rl.sft import sft_step
from train import main

# Three prompts for two or four processes, in two updates: uneven, and some have nothing to do.
OPTIONS = """
--generated-problems 60 --sampling.max-new-tokens 40 --evaluation.problems 5 --evaluation.final-problems 0
--keep-checkpoints 99 --stages.0.steps 3 --stages.0.prompts-per-step 3 --stages.0.samples-per-prompt 12
--stages.0.learning-rate 1e-4 --stages.0.kl-coef 0.05 --stages.1.learning-rate 1e-5 --stages.1.batch-size 2
--stages.1.epochs 2 --stages.2.steps 1 --stages.2.samples-per-prompt 4 --stages.2.prompts-per-step 3
--stages.2.learning-rate 1e-4
"""
IMPORTABLE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def run_training(out: Path, resume: bool = False) -> None:
    """A small run."""
    with mock.patch("lab.run.write_curve"):  # drawing takes two thirds of the time of so small a run
        train(smoke("--out", out, OPTIONS), resume=resume, quiet=True)


def be_rank(number: int, size: int, port: int, work, *arguments) -> None:
    """What torchrun does for a process."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)


def in_processes(size: int, work, *arguments) -> None:
    """Run `work` in `size` processes that have everything imported when they start."""
    multiprocessing.set_forkserver_preload(["test_parallel"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mock.patch.dict(os.environ, IMPORTABLE):  # where the server of forks looks for this file
        ranks = torch.multiprocessing.start_processes(
            be_rank,
            (size, port, work, *arguments),
            nprocs=size,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
    deadline = time.monotonic() + 120
    while not ranks.join(deadline - time.monotonic()):
        assert time.monotonic() < deadline, "the processes wait for each other"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run by one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_training(out)
    assert [row["kind"] for row in RunFolder(out).metrics()[1:]].count("sft") > 1
    return out


def same_runs(run: Path, other: Path) -> None:
    """Equal completions, traces and verdicts; metrics and losses to 1e-6; weights to 1e-5."""
    files = (RunFolder(folder).rollout_files() for folder in (run, other))
    for path, twin_path in zip(*files, strict=True):
        for (_, row), (_, twin) in zip(read_jsonl(path, ""), read_jsonl(twin_path, ""), strict=True):
            assert row.pop("logprobs") == pytest.approx(twin.pop("logprobs"), abs=2e-3)
            assert row == twin
    assert (run / "traces.jsonl").read_text() == (other / "traces.jsonl").read_text()
    for row, twin in zip(timeless(run), timeless(other), strict=True):
        for text in ("kind", "common_form"):
            assert row.pop(text, None) == twin.pop(text, None)
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-6)
    stored, twins = (sorted(folder.rglob("*.safetensors")) for folder in (run, other))
    assert len(stored) > 5
    for path, twin in zip(stored, twins, strict=True):  # weights and optimizer states of every checkpoint
        assert path.relative_to(run) == twin.relative_to(other)
        first, second = map(safetensors.torch.load_file, (path, twin))
        assert_close(first, second, atol=1e-5)


def test_four_processes_do_what_one_does(alone, tmp_path):
    """Two processes are in the test in which one of them dies."""
    in_processes(4, run_training, tmp_path / "run")
    same_runs(alone, tmp_path / "run")


def test_a_run_is_resumed_by_more_processes(alone, tmp_path):
    """A run of several processes that one resumes is in the test in which one of them dies."""
    run = shutil.copytree(alone, tmp_path / "run")
    for folder in checkpoints(run)[2:]:
        shutil.rmtree(folder)
    in_processes(2, run_training, run, True)
    same_runs(alone, run)


def gradient_of_a_step(model) -> dict[str, torch.Tensor]:
    """The gradient of two samples, of which a third rank has none."""
    trainer = trainer_for(model)
    with mock.patch.object(trainer.optimizer, "step", return_value=1.0):
        sft_step(trainer, ragged_samples(2), learning_rate=0.0)
    return {name: parameter.grad for name, parameter in trainer.optimizer.parameters.items()}


def compare_gradients() -> None:
    expected = [gradient_of_a_step(random_model(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    with processes():
        shared = [gradient_of_a_step(random_model(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    torch.testing.assert_close(shared[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared[1], expected[1], rtol=0.02, atol=2e-3)


def test_several_processes_have_the_gradient_of_one():
    """One of them may have nothing to do."""
    in_processes(3, compare_gradients)


def train_until_rank_1_stops(out: Path, call: int) -> None:
    """A run of which rank 1 alone gets SIGTERM, in this call of `generate`; every rank must stop."""
    generate, calls = rl.rollout.generate, itertools.count(1)

    def signalled(*arguments, **options):
        if os.environ["RANK"] == "1" and next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return generate(*arguments, **options)

    with mock.patch("rl.rollout.generate", signalled), pytest.raises(Stopped):
        run_training(out)


@pytest.mark.parametrize("call, step", [(3, 1), (4, 2)], ids=["sampling", "evaluating"])
def test_a_signal_to_one_process_cuts_off_the_work_of_all(call, step, alone, tmp_path):
    """The first call of `generate` is the evaluation before any step."""
    run = tmp_path / "run"
    in_processes(2, train_until_rank_1_stops, run, call)
    last = RunFolder(run).metrics()[-1]
    assert last["step"] == step
    assert "eval_accuracy" not in last
    run_training(run, resume=True)
    same_runs(alone, run)


def train_and_die(out: str) -> None:
    """A run whose rank 1 dies in its third step, unless torchrun has restarted it."""
    advantages, steps = rl.grpo.group_advantages, []

    def dying(*arguments, **options):
        steps.append(0)
        if os.environ["RANK"] == "1" and len(steps) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
        return advantages(*arguments, **options)

    with user_errors(), mock.patch("rl.grpo.group_advantages", dying), mock.patch("lab.run.write_curve"):
        main(parsed("smoke --model tiny-256 --out", out, OPTIONS))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_death_ends_the_run_or_torchrun_restarts_it(restarts, alone, tmp_path):
    script, run, start = tmp_path / "dying.py", tmp_path / "run", time.perf_counter()
    script.write_text("import sys, test_parallel\ntest_parallel.train_and_die(sys.argv[1])")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", restarts, script, run]
    environment = os.environ | IMPORTABLE | {"OMP_NUM_THREADS": "1"}
    ended = run_command(*command, env=environment)
    if restarts:
        assert ended.returncode == 0, ended.stderr[-3000:]
    else:
        assert ended.returncode != 0
        assert "exitcode  : 9" in ended.stderr
        assert time.perf_counter() - start < 60
        assert "error: another process of this run" in ended.stderr
        assert [folder.name for folder in checkpoints(run)] == ["step_0001", "step_0002"]
        run_training(run, resume=True)
    same_runs(alone, run)
