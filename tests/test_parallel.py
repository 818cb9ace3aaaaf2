"""Several processes on one run: the completions, gradients and weights of one, also when a process dies."""

import json
import multiprocessing
import os
import shutil
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers
from helpers import optimizer_for, ragged_samples, random_model
from test_commands import ROOT, run_command, smoke, timeless
from torch.utils._python_dispatch import TorchDispatchMode

import rl.grpo
from lab.checkpoint import checkpoints
from lab.device import processes
from lab.errors import user_errors
from lab.memory_plan import plan_memory, work_of
from lab.recipe import Recipe, RecipeError
from lab.runfolder import RunFolder
from lab.sharding import shard
from lab.stages import train
from model import generate
from rl.distributed import full_model, gather, is_sharded, rank, world_size
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.sft import sft_step
from train import main

OPTIONS = [  # three prompts for two or four processes, in two updates: uneven, and some have nothing to do
    "--generated-problems", 60, "--sampling.max-new-tokens", 40, "--evaluation.problems", 5, "--evaluation.final-problems", 0,
    "--keep-checkpoints", 99, "--stages.0.steps", 3, "--stages.0.prompts-per-step", 3, "--stages.0.samples-per-prompt", 12,
    "--stages.0.learning-rate", 1e-4, "--stages.0.kl-coef", 0.05, "--stages.1.learning-rate", 1e-5, "--stages.1.batch-size", 2, "--stages.1.epochs", 2,
    "--stages.2.steps", 1, "--stages.2.samples-per-prompt", 4, "--stages.2.prompts-per-step", 3, "--stages.2.learning-rate", 1e-4,
]  # fmt: skip


def run_training(out: Path, mode: str = "replicate", resume: bool = False) -> None:
    """A small run; `mode` is replicate or shard."""
    kind = ["--parallel.kind", mode]
    with mock.patch("lab.stages.write_curve"):  # drawing takes two thirds of the time of so small a run
        train(smoke("--out", out, *OPTIONS, *kind).recipe, resume=resume, quiet=True)


def be_rank(number: int, size: int, port: int, work, *arguments) -> None:
    """What torchrun does for a process."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)


def in_processes(size: int, work, *arguments) -> None:
    """Run `work` in `size` processes that have everything imported when they start."""
    multiprocessing.set_forkserver_preload(["test_parallel", "torch.distributed.fsdp", "torch.distributed.tensor"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = dict(nprocs=size, join=False, daemon=True, start_method="forkserver")
    ranks = torch.multiprocessing.start_processes(be_rank, (size, port, work, *arguments), **options)
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
    for paths in zip(*files, strict=True):
        for lines in zip(*(path.read_text().splitlines() for path in paths), strict=True):
            row, twin = map(json.loads, lines)
            torch.testing.assert_close(torch.tensor(row["logprobs"]), torch.tensor(twin["logprobs"]), rtol=0, atol=2e-3)
            assert row | {"logprobs": 0} == twin | {"logprobs": 0}
    assert (run / "traces.jsonl").read_text() == (other / "traces.jsonl").read_text()
    for row, twin in zip(timeless(run), timeless(other), strict=True):
        assert row.pop("kind") == twin.pop("kind") and row.keys() == twin.keys()
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-6)
    stored, twins = (sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in (run, other))
    assert stored == twins and len(stored) > 5
    for name in stored:  # weights and optimizer states of every checkpoint
        first, second = (safetensors.torch.load_file(folder / name) for folder in (run, other))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_four_processes_do_what_one_does(alone, tmp_path):
    """Two processes that replicate the model are in the test in which one of them dies."""
    in_processes(4, run_training, tmp_path / "run")
    same_runs(alone, tmp_path / "run")


def test_a_sharded_run_does_what_one_process_does_is_saved_in_full_and_resumed_by_another_number(alone, tmp_path):
    sharded = tmp_path / "sharded"
    in_processes(2, run_training, sharded, "shard")
    same_runs(alone, sharded)
    transformers.AutoModelForCausalLM.from_pretrained(checkpoints(sharded)[-1])
    for run, name in ((sharded, "fewer"), (alone, "more")):
        shutil.copytree(run, tmp_path / name)
        for folder in checkpoints(tmp_path / name)[2:]:
            shutil.rmtree(folder)
    run_training(tmp_path / "fewer", resume=True)
    in_processes(2, run_training, tmp_path / "more", "shard", True)
    same_runs(alone, tmp_path / "fewer")
    same_runs(alone, tmp_path / "more")


class Gathers(TorchDispatchMode):
    """Counts how often tensors are gathered from all ranks."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("allgather", "all_gather_into_tensor"))
        return function(*args, **kwargs or {})


def sample_sharded() -> None:
    """For two lengths, completions of two prompts, of which a third rank has none; the gathers that they take."""
    options = dict(prompts=[[5, 17, 3, 44, 9], [8, 2]], num_samples=3, stop_token_ids=range(0, 48, 12), seed=5)
    expected = {length: generate(random_model(std=0.2), max_new_tokens=length, **options) for length in (4, 16)}
    with processes():
        model = shard(random_model(std=0.2), torch.device("cpu"))
        matrices = sum(".layers." in name for name, _ in model.named_parameters())
        for length in (4, 16):
            with Gathers() as gathers:
                groups = generate(full_model(model), max_new_tokens=length, only=slice(rank(), None, world_size()), **options)
            for group, twin in zip(gather(groups), expected[length], strict=True):
                assert [completion.token_ids for completion in group] == [completion.token_ids for completion in twin]
            assert gathers.count == matrices


def test_a_sharded_model_is_gathered_once_a_rollout_phase_and_an_idle_rank_waits():
    in_processes(3, sample_sharded)


def gradient_of_a_step(model) -> dict[str, torch.Tensor]:
    """The gradient of two samples, of which a third rank has none."""
    optimizer = optimizer_for(model)
    with mock.patch.object(optimizer, "step", return_value=1.0):
        sft_step(model, optimizer, ragged_samples(2), learning_rate=0.0)
    grads = {name: parameter.grad for name, parameter in optimizer.parameters.items()}
    return {name: grad.full_tensor() if is_sharded(grad) else grad for name, grad in grads.items()}


def compare_gradients() -> None:
    expected = gradient_of_a_step(random_model())
    with processes():
        sharded = gradient_of_a_step(shard(random_model(), torch.device("cpu")))
        torch.testing.assert_close(sharded, expected, rtol=1e-5, atol=1e-6)
        results = gradient_of_a_step(shard(random_model(dtype=torch.bfloat16), torch.device("cpu")))
        layers = [grad for name, grad in results.items() if ".layers." in name]
        assert {grad.dtype for grad in layers} == {torch.float32}
        assert any((grad != grad.bfloat16()).any() for grad in layers)  # a sum that bfloat16 has no room for


def test_the_gradient_of_a_sharded_model_is_that_of_one_process_and_summed_in_float32():
    """On three ranks, among which nothing divides evenly."""
    in_processes(3, compare_gradients)


def plan_sharded() -> None:
    sizes = {name: parameter.numel() for name, parameter in random_model().named_parameters()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    others = sum(sizes.values()) - layers
    with processes():
        model = shard(random_model(dtype=torch.bfloat16), torch.device("cpu"))
        work = work_of(Recipe(stages=(GRPOStage(prompts_per_step=5),)), 10, world_size())
        plan = plan_memory(model, OptimizerSettings(), work, free=10**9)
        assert plan.weights == plan.gradients == 2 * layers + 2 * others and plan.masters == 4 * others
        assert plan.moments == 8 * (layers // 2 + others) and work.rows == 512 // 2
        copied = {name: parameter for name, parameter in full_model(model).named_parameters() if not is_sharded(parameter)}
        assert plan.full_copy == 2 * sum(copied[name].numel() for name in sizes if ".layers." in name) == 2 * layers


def test_the_memory_plan_counts_what_one_process_holds():
    in_processes(2, plan_sharded)


def train_and_die(out: str) -> None:
    """A run whose rank 1 dies in its third step, unless torchrun has restarted it."""
    advantages, steps = rl.grpo.group_advantages, []

    def dying(*arguments, **options):
        steps.append(0)
        if os.environ["RANK"] == "1" and len(steps) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
        return advantages(*arguments, **options)

    with user_errors(), mock.patch("rl.grpo.group_advantages", dying), mock.patch("lab.stages.write_curve"):
        main(smoke("--out", out, *OPTIONS))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_dies_ends_the_run_or_torchrun_restarts_it(restarts, alone, tmp_path):
    script, run, start = tmp_path / "dying.py", tmp_path / "run", time.perf_counter()
    script.write_text("import sys, test_parallel\ntest_parallel.train_and_die(sys.argv[1])")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", restarts, script, run]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = run_command(*command, env=environment)
    if restarts:
        assert ended.returncode == 0, ended.stderr[-3000:]
        same_runs(alone, run)
    else:
        assert ended.returncode != 0 and "exitcode  : 9" in ended.stderr and time.perf_counter() - start < 60
        assert "error: another process of this run" in ended.stderr
        assert [folder.name for folder in checkpoints(run)] == ["step_0001", "step_0002"]


def test_a_sharded_model_refuses_what_cannot_be_sharded():
    for options in (["--optimizer.kind", "adamw8bit"], ["--optimizer.rounding", "stochastic"], ["--adapters.rank", 4]):
        with pytest.raises(RecipeError, match="parallel.kind shard"):
            smoke("--parallel.kind", "shard", *options)
