"""Several processes on one run: the completions, losses, gradients and weights of one, whatever becomes of one of them."""

import functools
import json
import multiprocessing
import operator
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import learner, random_model, rollouts
from test_commands import ROOT, smoke, timeless
from torch.utils._python_dispatch import TorchDispatchMode

from model import Completion, generate
from lab.checkpoint import checkpoints
from rl.grpo import accumulate_gradient, group_samples
from lab.memory_plan import plan_memory, work_of
from lab.recipe import GRPOStage, OptimizerSettings, Recipe, RecipeError
from lab.runfolder import RunFolder
from lab.sharding import is_divided, sampling_model, shard
from lab.stages import train
from rl.workers import Workers, workers_of_torchrun
from train import Arguments

OPTIONS = [  # three prompts for two or four processes, in two updates: uneven, and some have nothing to do
    "--generated-problems", 60, "--sampling.max-new-tokens", 40, "--evaluation.problems", 5, "--evaluation.final-problems", 0,
    "--keep-checkpoints", 99, "--stages.0.steps", 3, "--stages.0.prompts-per-step", 3, "--stages.0.samples-per-prompt", 12,
    "--stages.0.learning-rate", 1e-4, "--stages.0.kl-coef", 0.05, "--stages.0.importance-cap", 2, "--stages.1.learning-rate", 1e-5,
    "--stages.1.batch-size", 2, "--stages.2.steps", 1, "--stages.2.samples-per-prompt", 4, "--stages.2.prompts-per-step", 3, "--stages.2.learning-rate", 1e-4,
]  # fmt: skip
MODES = {
    "replicate": [],
    "whole": ["--parallel.kind", "shard", "--parallel.sampling", "whole"],
    "layers": ["--parallel.kind", "shard", "--parallel.sampling", "layers"],
}


def arguments(out: Path, mode: str = "replicate") -> Arguments:
    return smoke("--out", out, *OPTIONS, *MODES[mode])


def run_training(out: Path, mode: str = "replicate", resume: bool = False) -> None:
    train(arguments(out, mode).recipe, resume=resume, quiet=True)


def be_one_of(rank: int, size: int, port: int, work, *arguments) -> None:
    """What torchrun does for a process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)


def in_processes(size: int, work, *arguments) -> None:
    """Run `work` in `size` processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_parallel"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=be_one_of, args=(rank, size, port, work, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            for other in processes:
                other.kill()
            pytest.fail("the processes wait for each other")
    assert [process.exitcode for process in processes] == [0] * size


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run by one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_training(out)
    assert [row["kind"] for row in RunFolder(out).metrics()[1:]].count("sft") > 1
    return out


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """The run by two processes with a divided model."""
    out = tmp_path_factory.mktemp("runs") / "divided"
    in_processes(2, run_training, out, "whole")
    return out


def same_runs(run: Path, other: Path) -> None:
    """Equal completions, traces and verdicts; metrics and losses to 1e-6; weights to 1e-5."""
    first, second = ([path.read_text() for path in RunFolder(folder).rollout_files()] for folder in (run, other))
    for a, b in zip(map(rows, first), map(rows, second), strict=True):
        for row, twin in zip(a, b, strict=True):
            assert {**row, "logprobs": 0} == {**twin, "logprobs": 0}
            torch.testing.assert_close(torch.tensor(row["logprobs"]), torch.tensor(twin["logprobs"]), rtol=0, atol=2e-3)
    assert (run / "traces.jsonl").read_text() == (other / "traces.jsonl").read_text()
    for row, twin in zip(timeless(run), timeless(other), strict=True):
        assert row.pop("kind") == twin.pop("kind") and row.keys() == twin.keys()
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-6)
    assert [folder.name for folder in checkpoints(run)] == [folder.name for folder in checkpoints(other)]
    for folder, twin in zip(checkpoints(run), checkpoints(other), strict=True):
        same_weights(folder, twin)


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def same_weights(folder: Path, other: Path, atol: float = 1e-5) -> None:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        first, second = safetensors.torch.load_file(folder / name), safetensors.torch.load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=atol, msg=f"{name} {key}")


@pytest.mark.parametrize(("mode", "size"), [("replicate", 2), ("replicate", 4), ("layers", 2)])
def test_several_processes_do_what_one_does(mode, size, alone, tmp_path):
    in_processes(size, run_training, tmp_path / "run", mode)
    same_runs(alone, tmp_path / "run")


def test_a_divided_model_does_what_a_whole_one_does_and_is_saved_whole(alone, divided):
    same_runs(alone, divided)
    transformers.AutoModelForCausalLM.from_pretrained(checkpoints(divided)[-1])


def cut_back(run: Path, out: Path, step: int) -> Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(run, out)
    for folder in checkpoints(out):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return out


def test_a_run_goes_on_with_another_number_of_processes(alone, divided, tmp_path):
    fewer, more = cut_back(divided, tmp_path / "fewer", 2), cut_back(alone, tmp_path / "more", 2)
    run_training(fewer, resume=True)
    in_processes(2, run_training, more, "whole", True)
    same_runs(alone, fewer)
    same_runs(alone, more)


# Sampling


class Gathers(TorchDispatchMode):
    """Counts how often tensors are gathered from all processes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("allgather", "all_gather_into_tensor"))
        return function(*args, **kwargs or {})


def sampled(out: Path | None, whole: bool) -> list:
    """For two lengths: completions of two prompts, in which a third process has no part, and how often it took gathering."""
    found = []
    with workers_of_torchrun() as workers:
        model = random_model(std=0.2)
        if workers.size > 1:
            shard(model, workers, torch.device("cpu"))
            model.sharding = replace(model.sharding, whole_to_sample=whole)
        options = {"num_samples": 3, "stop_token_ids": range(0, 48, 12), "seed": 5}
        for length in (4, 16):
            with Gathers() as gathers, sampling_model(model) as sampler:
                only = slice(workers.rank, None, workers.size)
                groups = generate(sampler, [[5, 17, 3, 44, 9], [8, 2]], max_new_tokens=length, only=only, **options)
            ids = [[completion.token_ids for completion in group] for group in workers.join(groups)]
            found.append([ids, gathers.count])
        if out and workers.leads:
            out.write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("way", ["whole", "layers"])
def test_a_divided_model_is_gathered_once_a_rollout_phase_or_for_every_token_and_a_process_without_work_waits(way, tmp_path):
    in_processes(3, sampled, tmp_path / "sampled", way == "whole")
    found = json.loads((tmp_path / "sampled").read_text())
    assert [ids for ids, _ in found] == [ids for ids, _ in sampled(None, False)]
    matrices = sum(".layers." in name for name, _ in random_model().named_parameters())
    layers = random_model().config.num_hidden_layers
    assert [count for _, count in found] == ([matrices, matrices] if way == "whole" else [4 * layers, 16 * layers])


# Gradients


def some_groups():
    """Five groups of three rollouts, of unequal length; one teaches nothing."""
    generator = torch.Generator().manual_seed(0)
    completions, rewards = [], []
    for group in range(5):
        completions.append([])
        rewards.append([0.3] * 3 if group == 2 else torch.rand(3, generator=generator).tolist())
        for length in torch.randint(1, 8, (3,), generator=generator).tolist():
            ids = torch.randint(0, 48, (length,), generator=generator).tolist()
            completions[-1].append(Completion(ids, [-2.0 - 0.1 * place for place in range(length)], True))
    return rollouts(completions, rewards, [[1, 2, 3 + group] for group in range(5)])


def gradient(out: Path | None, divide: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gradient of one update from all processes' shares of the groups; the first writes it to `out`."""
    with workers_of_torchrun() as workers:
        model = random_model(dtype=dtype)
        if divide:
            shard(model, workers, torch.device("cpu"))
        pupil = replace(learner(model, budget=40), workers=workers)
        groups = group_samples(some_groups())
        mine = [sample for group in workers.share(groups) for sample in group]
        stage, denominator = GRPOStage(), sum(len(sample.completion_ids) for group in groups for sample in group)
        sums = accumulate_gradient(pupil, mine, stage, denominator)
        workers.add_gradients(p for p in model.parameters() if not is_divided(p))
        found = {name: p.grad.full_tensor() if is_divided(p) else p.grad for name, p in model.named_parameters()}
        found |= {key: torch.tensor(float(sums[key])) for key in ("loss", "tokens", "entropy", "log_ratio_squared")}
        if out and workers.leads:
            safetensors.torch.save_file(found, out)
        return found


@pytest.mark.parametrize("divide", [False, True], ids=["replicate", "shard"])
@pytest.mark.parametrize("size", [2, 3])
def test_loss_and_gradient_are_those_of_one_process(size, divide, tmp_path):
    in_processes(size, gradient, tmp_path / "gradient", divide, torch.float32)
    expected, found = gradient(None, False, torch.float32), safetensors.torch.load_file(tmp_path / "gradient")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6 * max(1e-3, tensor.abs().max().item()), msg=name)


def test_bfloat16_gradients_of_a_divided_model_are_added_up_in_float32(tmp_path):
    in_processes(2, gradient, tmp_path / "gradient", True, torch.bfloat16)
    found = safetensors.torch.load_file(tmp_path / "gradient")
    layer = {name: tensor for name, tensor in found.items() if ".layers." in name}
    assert {tensor.dtype for tensor in layer.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in layer.values())  # a sum that bfloat16 has no room for


# Memory


def divided_plan(out: Path) -> None:
    with workers_of_torchrun() as workers:
        model = shard(random_model(dtype=torch.bfloat16), workers, torch.device("cpu"))
        work = work_of(Recipe(stages=(GRPOStage(prompts_per_step=5),)), 10, workers.size)
        plan = plan_memory(model, OptimizerSettings(), work, free=10**9)
        with sampling_model(model) as whole:
            assert not any(map(is_divided, whole.parameters())) and whole.dtype == torch.bfloat16
            copy = sum(p.numel() * 2 for name, p in whole.named_parameters() if ".layers." in name)
        cramped = plan_memory(model, OptimizerSettings(), work, free=plan.lasting + 2 * plan.whole_copy - 1)
        assert plan.whole_copy and not cramped.whole_copy  # then it is sampled layer by layer, see `lab.lab.set_up`
        if workers.leads:
            out.write_text(
                json.dumps([plan.weights, plan.masters, plan.moments, plan.gradients, plan.whole_copy, copy, work.rows])
            )


def test_the_memory_plan_knows_what_one_process_holds(tmp_path):
    in_processes(2, divided_plan, tmp_path / "plan")
    counts = {True: 0, False: 0}
    for name, parameter in random_model().named_parameters():
        counts[".layers." in name] += parameter.numel()
    layers, others = counts[True], counts[False]
    expected = [
        2 * layers + 2 * others,
        4 * others,
        8 * (layers // 2 + others),
        2 * layers + 2 * others,
        2 * layers,
        2 * layers,
    ]
    found = json.loads((tmp_path / "plan").read_text())
    assert found == [*expected, 512 // 2 if 512 // 2 > 3 * 8 else 24]


# What goes wrong


DYING = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import lab.steps
from test_parallel import arguments
from train import main
from pathlib import Path

update, steps = lab.steps.grpo_update, []
def dying(*arguments):
    steps.append(0)
    if os.environ["RANK"] == "1" and len(steps) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
    return update(*arguments)
lab.steps.grpo_update = dying
main(arguments(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_dies_ends_the_run_or_torchrun_begins_it_again(restarts, alone, tmp_path):
    script, run, start = tmp_path / "dying.py", tmp_path / "run", time.perf_counter()
    script.write_text(DYING.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    ended = subprocess.run(
        [*command, script, run], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if restarts:
        assert ended.returncode == 0, ended.stderr[-3000:]
        same_runs(alone, run)
    else:
        assert ended.returncode != 0 and "exitcode  : 9" in ended.stderr and time.perf_counter() - start < 60
        assert "error: another process of this run has ended" in ended.stderr
        assert [folder.name for folder in checkpoints(run)] == ["step_0001", "step_0002"]


def test_shares_join_to_the_whole():
    items = list(range(7))
    parts = [Workers(rank, 3).share(items) for rank in range(3)]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == items and max(map(len, parts)) - min(map(len, parts)) <= 1

    class Gathered(Workers):
        def gather(self, value):
            return parts

    assert Gathered(0, 3).join(parts[0]) == items
    assert Workers().join(items) == items


def test_a_divided_model_refuses_what_cannot_be_divided():
    for options in (["--optimizer.kind", "adamw8bit"], ["--optimizer.rounding", "stochastic"], ["--adapters.rank", 4]):
        with pytest.raises(RecipeError, match="parallel.kind shard"):
            smoke("--parallel.kind", "shard", *options)
