"""How much is sampled at once: batches that fit a budget and are as large as it allows."""

import itertools
import json
import math
import re
import resource
import shutil
import weakref
from unittest import mock

import pytest
import torch
from helpers import PROMPTS, evaluated, exit_code, fails, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lab.evaluate
import model.cache
import model.memory
import model.sampler
from model import ModelError, generate
from model.cache import GroupCache
from model.memory import CACHE_SHARE, LOGITS_COPIES, cache_tokens_that_fit, free_memory, token_bytes
from model.sampler import plan_batches
from model.weights import TINY

OPTIONS = dict(num_samples=5, max_new_tokens=13, stop_token_ids=[7, 30], seed=3)
GIB = 2**30


@pytest.fixture(scope="module")
def decoder():
    return random_model(std=0.2)


@st.composite
def cases(draw):
    """(lengths, num_samples, max_new_tokens, budget), with room for a sample of each prompt at the least."""
    lengths = draw(st.lists(st.integers(1, 30), max_size=9))
    num_samples, max_new_tokens = draw(st.integers(1, 8)), draw(st.integers(1, 13))
    least = max(lengths, default=0) + max_new_tokens
    most = len(lengths) * max(lengths, default=0) + len(lengths) * num_samples * max_new_tokens
    return lengths, num_samples, max_new_tokens, draw(st.integers(least, max(least, most + 2)))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(cases())
@example(([30, 1, 1], 2, 5, 40))  # the first fits to the token, the others together with it do not
@example(([3, 20, 3, 3], 7, 4, 43))  # one in the middle is divided
@example(([4, 4], 6, 5, 16))  # 2 of 6 at a time: parts come out even
def test_batches_hold_every_sample_and_are_as_large_as_fits(case):
    """Each sample comes once, in order."""
    lengths, num_samples, max_new_tokens, budget = case

    def cost(lengths: list[int], rows: int) -> int:
        """Tokens that `rows` completions of prompts of these lengths hold at their longest."""
        return len(lengths) * max(lengths) + rows * max_new_tokens

    found = [(range(len(lengths))[p], range(num_samples)[s]) for p, s in plan_batches(*case)]
    pairs = [pair for batch in found for pair in itertools.product(*batch)]
    assert pairs == list(itertools.product(range(len(lengths)), range(num_samples)))
    for prompts, samples in found:
        assert cost([lengths[p] for p in prompts], len(prompts) * len(samples)) <= budget
        if len(samples) == num_samples and prompts.stop < len(lengths):
            with_next = [lengths[p] for p in prompts] + [lengths[prompts.stop]]
            assert cost(with_next, len(with_next) * num_samples) > budget
    for number, length in enumerate(lengths):
        fits = cost([length], num_samples) <= budget
        parts = 1 if fits else math.ceil(num_samples / ((budget - length) // max_new_tokens))
        assert sum(number in prompts for prompts, _ in found) == parts


def test_a_prompt_without_room_is_refused_before_any_sampling(decoder):
    """The error has the numbers and the way out."""
    plan_batches(list(map(len, PROMPTS)), 5, 13, 22)
    message = "room for 21 tokens .* a prompt of 9 and 13 new .* lower max_new_tokens, raise max_cache_tokens"
    with pytest.raises(ModelError, match=message):  # the prompts before it have room
        generate(
            decoder,
            PROMPTS,
            **OPTIONS,
            max_cache_tokens=21,
            on_progress=mock.Mock(side_effect=AssertionError("sampled")),
        )


def test_eval_has_the_room_of_recipe_option_or_memory(tmp_path, monkeypatch, capsys):
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    recipe = {"problems": "generated", "generated_problems": 30, "sampling": {"max_cache_tokens": 50}}
    (checkpoint / "recipe.json").write_text(json.dumps(recipe | {"evaluation": {"problems": 4}}))
    (checkpoint / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(model.memory, "read", machine(2))
    for source, options, room in (
        (checkpoint, {}, 50),
        (checkpoint, {"max_cache_tokens": 60}, 60),
        ("tiny", {}, 0),
    ):
        message = fails(capsys, lambda: evaluated(capsys, source, count=4, **options))  # noqa: B023
        assert f"room for {room} tokens" in message
        assert "and 256 new" in message
        assert "raise max_cache_tokens" in message


@pytest.mark.parametrize("command", ["train.py smoke --model tiny-256 --out {}", "eval.py tiny"])
def test_out_of_memory_advises_options_that_the_command_has(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.evaluate, "collect_rollouts", mock.Mock(side_effect=torch.OutOfMemoryError))
    assert exit_code(monkeypatch, command.format(tmp_path)) == 2
    message = capsys.readouterr().err
    assert exit_code(monkeypatch, f"{command.format(tmp_path)} --help") == 0
    shown = capsys.readouterr().out
    options = re.findall(r"--[\w.-]*\w", message)
    assert "out of GPU memory" in message
    assert options
    assert all(option in shown for option in options)


@pytest.mark.parametrize("stops", [(), (7, 30)], ids=["to the end", "rows leave"])
@pytest.mark.parametrize("room", [22, 140, 296])
def test_keys_and_values_never_take_more_memory_than_the_budget(room, stops, decoder, monkeypatch):
    """All that is alive counts, the batch before too."""
    alive, seen = weakref.WeakSet(), []

    def look(*report):
        seen.append(0)
        for cache in alive:
            tensors = itertools.chain(cache.prompt_keys, cache.prompt_values, cache.keys, cache.values)
            held = sum(tensor.nbytes for tensor in tensors)
            prompts, _, longest, _ = cache.prompt_keys[0].shape
            assert held <= (prompts * longest + len(cache.prompt_index) * 13) * token_bytes(
                decoder
            )  # no row that left
            seen[-1] += held

    def looked_at(method):
        def call(cache, *arguments):
            alive.add(cache)
            method(cache, *arguments)
            look()

        return call

    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", 3)
    for name in ("__init__", "reserve", "select"):
        monkeypatch.setattr(GroupCache, name, looked_at(getattr(GroupCache, name)))
    generate(decoder, PROMPTS, **OPTIONS | {"stop_token_ids": stops}, max_cache_tokens=room, on_progress=look)
    assert max(seen) <= room * token_bytes(decoder)
    if not stops:  # the costliest batch fills each of these budgets to the last token
        assert max(seen) >= 0.95 * room * token_bytes(decoder)


def test_without_a_budget_generate_takes_what_fits_into_memory(decoder, monkeypatch):
    fitting, planning = mock.Mock(return_value=74), mock.Mock(wraps=plan_batches)
    monkeypatch.setattr(model.sampler, "cache_tokens_that_fit", fitting)
    monkeypatch.setattr(model.sampler, "plan_batches", planning)
    by_memory = generate(decoder, PROMPTS, **OPTIONS)
    by_budget = generate(decoder, PROMPTS, **OPTIONS, max_cache_tokens=74)
    fitting.assert_called_once_with(decoder, 13)
    assert [call.args[-1] for call in planning.call_args_list] == [74, 74]
    assert by_memory == by_budget


def machine(available: int | None = None, limit="", used="", cached=0):
    """In the place of `read`: a machine with so many kB available, and a container with a limit and a use."""
    files = {
        "/proc/meminfo": f"MemFree:    77 kB\nMemAvailable:   {available} kB\n" if available else "",
        "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": f"{used}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 7777\nactive_file {cached}\ninactive_file {cached}\n",
    }
    return lambda path: files.get(path, "")


def test_free_memory_is_the_smaller_of_machine_and_container(monkeypatch, tmp_path):
    assert 0 < free_memory(torch.device("cpu")) < 2**50  # of this machine
    assert model.memory.read(tmp_path / "missing") == model.memory.read(tmp_path) == ""
    for numbers, expected in (
        ((123_457,), 123_457 * 1024),
        ((9_000_000, 5 * GIB, 3 * GIB), 2 * GIB),
        ((1_000_001, 5 * GIB, 3 * GIB), 1_000_001 * 1024),
        ((1_000_001, "max", 1000), 1_000_001 * 1024),
        ((1_000_001, 1000, 1700), 0),
        ((None, 1700, 1000), 700),
        ((None, 1700, 1000, 50), 800),  # what files hold in the cache is freed on demand
        ((), 8 * GIB),
    ):
        monkeypatch.setattr(model.memory, "read", machine(*numbers))
        assert free_memory(torch.device("cpu")) == expected, numbers


@pytest.mark.parametrize(
    "groups, folder, names, total", [
        ("0::/slurm/job_7/step_0\n", "/sys/fs/cgroup/slurm", ("max", "current"), ""),
        ("5:cpu:/\n4:memory:/slurm/job_7/step_0\n0::/\n", "/sys/fs/cgroup/memory/slurm",
        ("limit_in_bytes", "usage_in_bytes"), "total_"),
    ], ids=["version 2", "version 1"],
)  # fmt: skip
def test_a_job_has_what_the_tightest_group_around_it_leaves(groups, folder, names, total, monkeypatch):
    def group(path, limit, used, cached):
        values = zip(names, (limit, used))
        stat = f"inactive_file 9999\nactive_file 9999\n{total}inactive_file {cached}\n"
        stat += f"{total}active_file {cached}\n"
        return {f"{folder}{path}/memory.{name}": f"{value}\n" for name, value in values} | {
            f"{folder}{path}/memory.stat": stat
        }

    files = {"/proc/meminfo": "MemAvailable: 250000000 kB\n", "/proc/self/cgroup": groups}
    files |= group("", 90 * GIB, 80 * GIB, 0) | group("/job_7", 15 * GIB, 6 * GIB, GIB // 2)
    files |= group("/job_7/step_0", 2**63 - 4096, GIB, 0)
    monkeypatch.setattr(model.memory, "read", lambda path: files.get(path, ""))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 10 * GIB // 2
    files |= group("", 90 * GIB, 86 * GIB, 0)  # others have filled the group above
    assert free_memory(torch.device("cpu")) == 4 * GIB // 2


@pytest.mark.parametrize("limit, used", [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_process_has_what_its_own_limit_leaves(limit, used, monkeypatch):
    """The number of processes does not matter."""
    files = {
        "/proc/meminfo": "MemAvailable: 250000000 kB\n",
        "/proc/self/status": f"Name:\ta\n{used}:\t 1048576 kB\n",
    }
    limits = {getattr(resource, limit): (3 * GIB, 5 * GIB)}
    monkeypatch.setattr(model.memory, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(resource, "getrlimit", lambda name: limits.get(name, (resource.RLIM_INFINITY,) * 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_memory(torch.device("cpu")) == 2 * GIB


def test_a_gpu_has_what_the_driver_and_the_allocator_have_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 if device.index == 1 else 1, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500 if device.index == 1 else 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 420 if device.index == 1 else 2)
    assert free_memory(torch.device("cuda", 1)) == 780
    assert free_memory(torch.device("cuda")) == 1


@pytest.mark.parametrize(
    ("vocab", "max_new_tokens", "dtype"),
    [(48, 4096, torch.float32), (5003, 1, torch.float32), (5003, 17, torch.bfloat16)],
)
def test_cache_and_logits_fill_their_share_of_free_memory(vocab, max_new_tokens, dtype, monkeypatch):
    decoder, free = random_model(dtype=dtype, vocab_size=vocab), 3 * GIB + 12_345
    asked = mock.Mock(return_value=free)
    monkeypatch.setattr(model.memory, "free_memory", asked)
    tokens = cache_tokens_that_fit(decoder, max_new_tokens)
    logits = tokens / max_new_tokens * LOGITS_COPIES * 4 * vocab  # of every row, float32
    taken = tokens * token_bytes(decoder) + logits
    assert 0.99 * CACHE_SHARE * free < taken <= CACHE_SHARE * free
    assert isinstance(tokens, int)
    assert asked.call_args_list == [mock.call(decoder.device)]
    assert (
        token_bytes(decoder) == 2 * 2 * 2 * 8 * dtype.itemsize
    )  # keys and values, two layers, two heads of 8
