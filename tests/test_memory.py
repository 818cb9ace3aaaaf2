"""How much is sampled at once: batches that fit a budget and are as large as it allows."""

import itertools
import json
import re
import resource
import shutil
import weakref
from functools import partial
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

OPTIONS = {"num_samples": 5, "max_new_tokens": 13, "seed": 3}
CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def decoder():
    return random_model(std=0.2)


@st.composite
def cases(draw):
    """(lengths, num_samples, max_new_tokens, budget), with room for a sample of each prompt at the least."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    num_samples, max_new_tokens = draw(st.integers(1, 8)), draw(st.integers(1, 13))
    least = max(lengths) + max_new_tokens
    most = len(lengths) * (max(lengths) + num_samples * max_new_tokens)
    return lengths, num_samples, max_new_tokens, draw(st.integers(least, most + 2))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(cases())
@example(([30, 1, 1], 2, 5, 40))  # the first fits to the token, the others together with it do not
@example(([3, 20, 3, 3], 7, 4, 43))  # one in the middle is divided
@example(([4, 4], 6, 5, 16))  # 2 of 6 at a time: parts come out even
def test_batches_hold_every_sample_and_are_as_large_as_fits(case):
    """Each sample comes once, in order."""
    lengths, num_samples, max_new_tokens, budget = case

    def cost(prompts: range, samples: int) -> int:
        """Tokens that so many completions of each prompt hold at their longest."""
        longest = max(lengths[prompts.start : prompts.stop])
        return len(prompts) * (longest + samples * max_new_tokens)

    pairs = []
    for prompt_slice, sample_slice in plan_batches(*case):
        prompts = range(len(lengths))[prompt_slice]
        samples = range(num_samples)[sample_slice]
        pairs += itertools.product(prompts, samples)
        assert cost(prompts, len(samples)) <= budget
        if samples.stop < num_samples:  # a group is divided only if it must be, and as little as that
            assert cost(prompts, len(samples) + 1) > budget
        elif samples.start == 0 and prompts.stop < len(lengths):
            assert cost(range(prompts.start, prompts.stop + 1), num_samples) > budget
    assert pairs == list(itertools.product(range(len(lengths)), range(num_samples)))


def test_a_prompt_without_room_is_refused_before_any_sampling(decoder, monkeypatch):
    """The error has the numbers and the way out. The prompts before it have room."""
    plan_batches(list(map(len, PROMPTS)), 5, 13, 22)
    monkeypatch.setattr(model.sampler, "DecodeBatch", None)
    message = "room for 21 tokens .* a prompt of 9 and 13 new .* lower max_new_tokens, raise max_cache_tokens"
    with pytest.raises(ModelError, match=message):
        generate(decoder, PROMPTS, **OPTIONS, max_cache_tokens=21)


def put_in_place(monkeypatch, files):
    """System files with these texts, and no others."""
    monkeypatch.setattr(model.memory, "read", lambda path: files.get(path, ""))


def machine(monkeypatch, available=None, limit="", used="", cached=0):
    """A machine with so many kB available, and a container with a limit and a use in bytes."""
    files = {
        "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": f"{used}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 7777\nactive_file {cached}\ninactive_file {cached}\n",
    }
    if available:
        files["/proc/meminfo"] = f"MemFree:    77 kB\nMemAvailable:   {available} kB\n"
    put_in_place(monkeypatch, files)


def test_eval_has_the_room_of_option_recipe_or_memory(tmp_path, monkeypatch, capsys):
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    recipe = {"problems": "generated", "generated_problems": 30, "sampling": {"max_cache_tokens": 50}}
    (checkpoint / "recipe.json").write_text(json.dumps(recipe | {"evaluation": {"problems": 4}}))
    (checkpoint / "trainer_state.json").write_text("{}")
    machine(monkeypatch, 2)
    for source, option, room in ((checkpoint, None, 50), (checkpoint, 60, 60), ("tiny", None, 0)):
        message = fails(capsys, partial(evaluated, capsys, source, count=4, max_cache_tokens=option))
        assert f"room for {room} tokens" in message


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


@pytest.mark.parametrize(("room", "stops"), [(22, []), (140, []), (296, []), (140, [7, 30]), (296, [7, 30])])
def test_keys_and_values_never_take_more_memory_than_the_budget(room, stops, decoder, monkeypatch):
    """All that is alive counts, the batch before too."""
    alive, seen = weakref.WeakSet(), []
    start = GroupCache.start

    def watched_start(self, time):
        alive.add(self)
        total = 0
        for cache in alive:
            tensors = itertools.chain(cache.prompt_keys, cache.prompt_values, cache.keys, cache.values)
            held = sum(tensor.nbytes for tensor in tensors) / token_bytes(decoder)
            prompts, _, longest, _ = cache.prompt_keys[0].shape
            assert held <= prompts * longest + len(cache.prompt_index) * 13  # no row that left
            total += held
        seen.append(total)
        return start(self, time)

    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", 3)
    monkeypatch.setattr(GroupCache, "start", watched_start)
    generate(decoder, PROMPTS, **OPTIONS, stop_token_ids=stops, max_cache_tokens=room)
    # Without stops, the costliest batch fills each of these budgets to the last token.
    assert (0 if stops else 0.95 * room) <= max(seen) <= room


def test_without_a_budget_generate_takes_what_fits_into_memory(decoder, monkeypatch):
    monkeypatch.setattr(model.sampler, "cache_tokens_that_fit", mock.Mock(return_value=21))
    with pytest.raises(ModelError, match="room for 21 tokens"):
        generate(decoder, PROMPTS, **OPTIONS)
    model.sampler.cache_tokens_that_fit.assert_called_once_with(decoder, 13)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((123_457,), 123_457 * 1024),
        ((9_000_000, 5 * GIB, 3 * GIB), 2 * GIB),
        ((1_000_001, 5 * GIB, 3 * GIB), 1_000_001 * 1024),
        ((1_000_001, "max", 1000), 1_000_001 * 1024),
        ((1_000_001, 1000, 1700), 0),
        ((None, 1700, 1000, 50), 800),  # what files hold in the cache is freed on demand
        ((), 8 * GIB),
    ],
)
def test_free_memory_is_the_smaller_of_machine_and_container(numbers, expected, monkeypatch):
    machine(monkeypatch, *numbers)
    assert free_memory(CPU) == expected


def test_free_memory_of_this_machine(tmp_path):
    assert 0 < free_memory(CPU) < 2**50
    assert model.memory.read(tmp_path / "missing") == model.memory.read(tmp_path) == ""


VERSION_1 = ("/sys/fs/cgroup/memory/slurm", "limit_in_bytes", "usage_in_bytes", "total_")


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("0::/slurm/job_7/step_0\n", ("/sys/fs/cgroup/slurm", "max", "current", "")),
        ("5:cpu:/\n4:memory:/slurm/job_7/step_0\n0::/\n", VERSION_1),
    ],
    ids=["version 2", "version 1"],
)
def test_a_job_has_what_the_tightest_group_around_it_leaves(groups, names, monkeypatch):
    files = {"/proc/meminfo": "MemAvailable: 250000000 kB\n", "/proc/self/cgroup": groups}
    folder, most, current, total = names

    def add_group(path, limit, used, cached=0):
        prefix = f"{folder}{path}/memory."
        files[prefix + most] = f"{limit}\n"
        files[prefix + current] = f"{used}\n"
        own = "inactive_file 9999\n" if total else ""  # version 1 has the group's alone beside its total
        files[prefix + "stat"] = f"{own}{total}inactive_file 0\n{total}active_file {cached}\n"

    add_group("", 90 * GIB, 80 * GIB)
    add_group("/job_7", 15 * GIB, 6 * GIB, cached=GIB)
    add_group("/job_7/step_0", 2**63 - 4096, GIB)
    put_in_place(monkeypatch, files)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(CPU) == 10 * GIB // 2
    add_group("", 90 * GIB, 86 * GIB)  # others have filled the group above
    assert free_memory(CPU) == 4 * GIB // 2


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_process_has_what_its_own_limit_leaves(limit, used, monkeypatch):
    """The number of processes does not matter."""
    files = {
        "/proc/meminfo": "MemAvailable: 250000000 kB\n",
        "/proc/self/status": f"Name:\ta\n{used}:\t 1048576 kB\n",
    }
    limits = {getattr(resource, limit): (3 * GIB, 5 * GIB)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    put_in_place(monkeypatch, files)
    monkeypatch.setattr(resource, "getrlimit", lambda name: limits.get(name, unlimited))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_memory(CPU) == 2 * GIB


def test_a_gpu_has_what_the_driver_and_the_allocator_have_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 + device.index, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 420)
    assert free_memory(torch.device("cuda", 1)) == 781


@pytest.mark.parametrize(
    ("vocab", "max_new_tokens", "dtype"),
    [(48, 4096, torch.float32), (5003, 1, torch.float32), (5003, 17, torch.bfloat16)],
)
def test_cache_and_logits_fill_their_share_of_free_memory(vocab, max_new_tokens, dtype, monkeypatch):
    decoder = random_model(dtype=dtype, vocab_size=vocab)
    monkeypatch.setattr(model.memory, "free_memory", {CPU: 3 * GIB}.get)
    assert token_bytes(decoder) == 2 * 2 * 2 * 8 * dtype.itemsize  # keys and values, layers, heads, size
    tokens = cache_tokens_that_fit(decoder, max_new_tokens)
    logits = tokens / max_new_tokens * LOGITS_COPIES * 4 * vocab  # of every row, float32
    taken = tokens * token_bytes(decoder) + logits
    assert isinstance(tokens, int)
    assert 0.99 * CACHE_SHARE * 3 * GIB < taken <= CACHE_SHARE * 3 * GIB
