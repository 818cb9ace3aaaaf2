"""Measured on this machine: a GRPO step of random weights by some processes, and an exchange between them.

`benchmarks/scaling.py` compares them with what it predicts.
"""

import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from costs import Setting, recipe_of, state_bytes
from memory import random_model

from data import Problem
from model import generate
from lab.device import held_memory, return_freed_blocks
from model.memory import free_memory
from lab.device import peak_memory
from rl.grpo import group_samples, grpo_update
from rl.learner import Learner
from lab.memory_plan import plan_memory, work_of
from rl.optimizer import Optimizer
from rl.rollout import Rollout
from lab.sharding import sampling_model, shard
from rl.workers import Workers, workers_of_torchrun
from data.task import Score

CPU = torch.device("cpu")
EXCHANGED = (2**10, 2**24)  # float32 numbers that are added up to measure latency and rate


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable, workers: Workers, clock: str) -> tuple[float, object]:
    """Seconds of the process that took longest; and what `work` gave here."""
    workers.gather(None)
    start = CLOCKS[clock]()
    result = work()
    return max(workers.gather(CLOCKS[clock]() - start)), result


def in_processes(count: int, measure: Callable[..., dict], *arguments) -> dict:
    """What `measure(workers, *arguments)` gives the first of `count` processes, a thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=be_one_of, args=(rank, count, port, sender, measure, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    sender.close()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("error: a measuring process failed, see above")
    return receiver.recv()


def be_one_of(rank: int, count: int, port: int, sender, measure: Callable[..., dict], arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with workers_of_torchrun() as workers:
        found = measure(workers, *arguments)
        if workers.leads:
            sender.send(found)


def step_measured(workers: Workers, setting: Setting, repeats: int, clock: str) -> dict:
    """Median seconds of rollout, of update, and of an optimizer step alone; a process's peak, plan, and optimizer's bytes."""
    return_freed_blocks()
    step, recipe = setting.step, recipe_of(setting)
    free, process = free_memory(CPU), held_memory(CPU)
    model = random_model(setting.config, setting.dtype, "cpu")
    if setting.kind == "shard":
        shard(model, workers, CPU)
        model.sharding = replace(model.sharding, whole_to_sample=setting.sampling != "layers")
    plan = plan_memory(model, setting.optimizer, work_of(recipe, step.prompt_length, workers.size), free, process)
    learner = Learner(model, Optimizer(model), recipe, plan.micro_batch_tokens, workers)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, setting.config.vocab_size, (step.prompts, step.prompt_length), generator=generator).tolist()
    times = [one_step(setting, learner, prompts, seed, clock) for seed in range(repeats + 1)]
    rollout, update, optimizer = map(statistics.median, zip(*times[1:], strict=True))
    return {
        "rollout": rollout,
        "update": update,
        "optimizer": optimizer,
        "planned": plan.peak,
        "peak": peak_memory(CPU),
        "state": state_bytes(plan),
    }


def one_step(setting: Setting, learner: Learner, prompts: list, seed: int, clock: str) -> tuple[float, float, float]:
    """Seconds of a rollout, of an update, and of one more optimizer step alone; no updates of single completions."""
    step, workers = setting.step, learner.workers
    # Of random weights each id is about as likely as any other: so many of them as stops make the lengths.
    stops = range(round(setting.config.vocab_size / step.mean)) if step.mean else ()

    def rollouts() -> list:
        with sampling_model(learner.model) as sampler:
            return generate(
                sampler, prompts, num_samples=step.samples, max_new_tokens=step.limit, stop_token_ids=stops, seed=seed,
                only=slice(workers.rank, None, workers.size),
            )  # fmt: skip

    rollout, completions = timed(rollouts, workers, clock)
    if step.samples == 1:
        return rollout, 0.0, 0.0
    groups = [
        [Rollout(Problem((1, 2), 3), prompt, c, "", Score(n % 2, "")) for n, c in enumerate(group)]
        for prompt, group in zip(prompts, workers.join(completions), strict=True)
    ]
    update, _ = timed(lambda: grpo_update(learner, group_samples(groups), learner.recipe.stages[0], 1e-6), workers, clock)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer, _ = timed(lambda: learner.optimizer.step(1e-6, 1.0), workers, clock)
    return rollout, update, optimizer


def exchange_measured(workers: Workers, repeats: int, clock: str) -> dict:
    """Median seconds of adding up few and many gradients."""
    found = {}
    for count in EXCHANGED:
        parameter = torch.nn.Parameter(torch.zeros(count))
        parameter.grad = torch.ones(count)
        times = [timed(lambda p=parameter: workers.add_gradients([p]), workers, clock)[0] for _ in range(2 * repeats + 1)]
        found[str(count)] = statistics.median(times[1:])
    return found
