"""How much is sampled at once: batches that fit a budget, are as large as it allows, and change no completion."""

import itertools
import json
import math
import re
import runpy
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lab.evaluate
import model.cache
import model.memory
import model.sampler
from model import KVCache, ModelError, generate
from model.cache import GroupCache
from model.memory import CACHE_SHARE, LOGITS_COPIES, cache_tokens_that_fit, free_memory, token_bytes
from model.sampler import plain_completion, plan_batches, random_streams
from model.weights import TINY

ROOT = Path(__file__).parent.parent
PROMPTS = [[5, 17, 3, 44, 9], [8, 2], [40, 2, 2, 30, 31, 12, 4, 4, 25], [19, 6, 40], [8, 1, 37, 20, 3, 9, 13]]
OPTIONS = dict(num_samples=5, max_new_tokens=13, stop_token_ids=[7, 30], seed=3)
ROOMS = [22, 35, 73, 140, 296, 10**6]  # 22, 35: one, two rows of the longest prompt; 140, 296: two, four groups
GIB = 2**30


@pytest.fixture(scope="module")
def decoder():
    return random_model(std=0.2)


# Plans


def cost(lengths: list[int], rows: int, max_new_tokens: int) -> int:
    """Tokens that `rows` completions of prompts of these lengths hold at their longest."""
    return len(lengths) * max(lengths) + rows * max_new_tokens


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
def test_batches_hold_every_sample_once_in_order_fit_their_budget_and_could_not_be_larger(case):
    lengths, num_samples, max_new_tokens, budget = case
    found = [(range(len(lengths))[p], range(num_samples)[s]) for p, s in plan_batches(*case)]
    pairs = [pair for batch in found for pair in itertools.product(*batch)]
    assert pairs == list(itertools.product(range(len(lengths)), range(num_samples)))
    parts = dict.fromkeys(range(len(lengths)), 0)
    for prompts, samples in found:
        assert cost([lengths[p] for p in prompts], len(prompts) * len(samples), max_new_tokens) <= budget
        for prompt in prompts:
            parts[prompt] += 1
        if len(samples) == num_samples and prompts.stop < len(lengths):
            with_next = [lengths[p] for p in prompts] + [lengths[prompts.stop]]
            assert cost(with_next, len(with_next) * num_samples, max_new_tokens) > budget
    for length, times in zip(lengths, parts.values(), strict=True):
        at_once = (budget - length) // max_new_tokens
        fits = cost([length], num_samples, max_new_tokens) <= budget
        assert times == (1 if fits else math.ceil(num_samples / at_once))


def test_a_prompt_without_room_for_one_sample_is_refused_before_any_is_sampled_with_its_numbers_and_the_way_out(decoder):
    plan_batches(list(map(len, PROMPTS)), 5, 13, 22)
    message = (
        "room for 21 tokens of keys and values; a prompt of 9 and 13 new ones need 22: "
        "lower max_new_tokens, raise max_cache_tokens if memory allows, or take a smaller model"
    )
    with pytest.raises(ModelError, match=message):
        plan_batches(list(map(len, PROMPTS)), 5, 13, 21)
    with pytest.raises(ModelError, match=message):  # the prompts before it have room
        generate(decoder, PROMPTS, **OPTIONS, max_cache_tokens=21, on_progress=lambda *report: pytest.fail("sampled"))


@pytest.fixture
def error_of(monkeypatch, capsys):
    """What `python command arguments` prints on standard error, one line, when it ends with exit code 2."""

    def run(command: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / command), run_name="__main__")
        shown = capsys.readouterr()
        if "--help" in arguments:
            return shown.out
        assert ended.value.code == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err

    return run


def test_eval_py_has_the_room_of_the_recipe_of_the_option_or_of_memory(tmp_path, monkeypatch, error_of):
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    recipe = {"problems": "generated", "generated_problems": 30, "sampling": {"max_cache_tokens": 50}}
    (checkpoint / "recipe.json").write_text(json.dumps(recipe | {"evaluation": {"problems": 4}}))
    monkeypatch.setattr(model.memory, "read", machine({"/proc/meminfo": "MemAvailable: 2 kB\n"}))
    for arguments, room in (((checkpoint,), 50), ((checkpoint, "--max-cache-tokens", 60), 60), (("tiny",), 0)):
        message = error_of("eval.py", *arguments, "--count", 4)
        assert f"room for {room} tokens" in message and "and 256 new ones" in message and "raise max_cache_tokens" in message


@pytest.mark.parametrize("command", [("train.py", "smoke", "--model", "tiny"), ("eval.py", "tiny")])
def test_out_of_memory_advises_options_that_the_command_has(command, tmp_path, monkeypatch, error_of):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lab.evaluate, "collect_rollouts", full)
    message = error_of(*command, *(("--out", tmp_path) if command[0] == "train.py" else ()))
    options = re.findall(r"--[\w.-]*\w", message)
    shown = error_of(*command[:2], "--help")
    assert "out of GPU memory" in message and options and all(option in shown for option in options)


# What generate does with a budget


def test_completions_are_the_same_in_any_budget(decoder):
    streams = random_streams(PROMPTS, 5, 13, seed=3)
    expected = [
        [plain_completion(decoder, prompt, uniforms, [7, 30], (1.0, None, None)) for uniforms in group]
        for prompt, group in zip(PROMPTS, streams, strict=True)
    ]
    lengths = {len(completion.token_ids) for group in expected for completion in group}
    assert len(lengths) > 4 and max(lengths) == 13  # some stop early, some never
    for room in ROOMS:
        groups = generate(decoder, PROMPTS, **OPTIONS, max_cache_tokens=room)
        for group, plain in zip(groups, expected, strict=True):
            for completion, alone in zip(group, plain, strict=True):
                assert (completion.token_ids, completion.finished) == (alone.token_ids, alone.finished), room
                assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("stops", [(), (7, 30)], ids=["to the end", "rows leave"])
@pytest.mark.parametrize("room", [22, 140, 296])
def test_keys_and_values_never_take_more_memory_than_the_budget(room, stops, static, decoder, monkeypatch):
    """All that is alive counts, the batch before included; with blocks of 5 tokens the last one is shorter."""
    alive, seen = weakref.WeakSet(), []

    def look():
        seen.append(0)
        for cache in alive:
            tensors = itertools.chain(cache.prompt_keys, cache.prompt_values, *cache.keys, *cache.values)
            held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            prompts, _, longest, _ = cache.prompt_keys[0].shape
            assert held <= (prompts * longest + len(cache.prompt_of) * 13) * token_bytes(decoder)  # no row that left
            seen[-1] += held

    def looked_at(method):
        def call(cache, *arguments):
            alive.add(cache)
            method(cache, *arguments)
            look()

        return call

    monkeypatch.setitem(model.cache.BLOCK, "cpu", 5)
    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", 3)
    monkeypatch.setattr(model.sampler, "DecodeBatch", partial(model.sampler.DecodeBatch, static=static))
    for name in ("__init__", "reserve", "select"):
        monkeypatch.setattr(GroupCache, name, looked_at(getattr(GroupCache, name)))
    options = OPTIONS | {"stop_token_ids": stops, "max_cache_tokens": room}
    generate(decoder, PROMPTS, **options, on_progress=lambda done, tokens: look())
    assert max(seen) <= room * token_bytes(decoder)
    if not stops:  # the costliest batch fills each of these budgets to the last token
        assert max(seen) >= 0.95 * room * token_bytes(decoder)


def test_without_a_budget_generate_takes_what_fits_into_memory(decoder, monkeypatch):
    calls, rooms = [], []
    monkeypatch.setattr(model.sampler, "cache_tokens_that_fit", lambda *arguments: calls.append(arguments) or 74)
    monkeypatch.setattr(model.sampler, "plan_batches", lambda *case: rooms.append(case[-1]) or plan_batches(*case))
    by_memory = generate(decoder, PROMPTS, **OPTIONS)
    by_budget = generate(decoder, PROMPTS, **OPTIONS, max_cache_tokens=74)
    assert calls == [(decoder, 13)] and rooms == [74, 74] and by_memory == by_budget


# Memory


def machine(files: dict[str, str]):
    """In the place of `read`: a machine that has these files and no others."""
    return lambda path: files.get(str(path), "")


def meminfo(available: int) -> dict[str, str]:
    lines = f"MemTotal:  99999999 kB\nMemFree:    77 kB\nMemAvailable:   {available} kB\nSwapFree:  88888888 kB\n"
    return {"/proc/meminfo": lines}


def container(limit, use) -> dict[str, str]:
    return {"/sys/fs/cgroup/memory.max": f"{limit}\n", "/sys/fs/cgroup/memory.current": f"{use}\n"}


def test_free_memory_is_the_smaller_of_what_machine_and_container_have_left(monkeypatch, tmp_path):
    assert 0 < free_memory(torch.device("cpu")) < 2**50  # of this machine
    assert model.memory.read(tmp_path / "missing") == model.memory.read(tmp_path) == ""
    for files, expected in (
        (meminfo(123_457), 123_457 * 1024),
        (meminfo(9_000_000) | container(5 * GIB, 3 * GIB), 2 * GIB),
        (meminfo(1_000_001) | container(5 * GIB, 3 * GIB), 1_000_001 * 1024),
        (meminfo(1_000_001) | container("max", 1000), 1_000_001 * 1024),
        (meminfo(1_000_001) | container(1000, ""), 1_000_001 * 1024),
        (meminfo(1_000_001) | container(1000, 1700), 0),
        (container(1700, 1000), 700),
        ({}, 8 * GIB),
    ):
        monkeypatch.setattr(model.memory, "read", machine(files))
        assert free_memory(torch.device("cpu")) == expected, files


def test_a_gpu_has_what_the_driver_and_the_allocator_have_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 if device.index == 1 else 1, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500 if device.index == 1 else 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 420 if device.index == 1 else 2)
    assert free_memory(torch.device("cuda", 1)) == 780
    assert free_memory(torch.device("cuda")) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 10}], ids=str)
def test_token_bytes_are_those_of_a_cache(shape, dtype):
    decoder = random_model(dtype=dtype, **shape)
    cache = KVCache(decoder.config, 3, 7, dtype=dtype)
    total = sum(tensor.untyped_storage().nbytes() for tensor in cache.keys + cache.values)
    assert token_bytes(decoder) == total / (3 * 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_new_tokens", [1, 17, 4096])
@pytest.mark.parametrize("vocab", [48, 5003])
def test_cache_and_logits_fill_their_share_of_free_memory_and_no_more(vocab, max_new_tokens, dtype, monkeypatch):
    decoder, free = random_model(dtype=dtype, vocab_size=vocab), 3 * GIB + 12_345
    asked = []
    monkeypatch.setattr(model.memory, "free_memory", lambda device: asked.append(device) or free)
    tokens = cache_tokens_that_fit(decoder, max_new_tokens)
    logits = tokens / max_new_tokens * LOGITS_COPIES * 4 * vocab  # of every row, float32
    taken = tokens * token_bytes(decoder) + logits
    assert 0.99 * CACHE_SHARE * free < taken <= CACHE_SHARE * free
    assert isinstance(tokens, int) and asked == [decoder.device]
