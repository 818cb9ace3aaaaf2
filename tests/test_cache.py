"""Both caches against uncached forwards: whatever the prompts' lengths, the growth of the cache and the rows dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SHAPES, random_ids, reference_model, same_weights

from model import KVCache
from model.cache import BLOCK, GroupCache
from model.sampler import prefill

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4]]


@pytest.fixture(scope="module")
def decoder():
    return same_weights(reference_model(seed=7))


# KVCache


@torch.no_grad()
def filled(decoder, lengths: list[int], spare: int, token_ids=None) -> KVCache:
    """A cache that holds `lengths` tokens of ragged rows and has room for `spare` more than the longest."""
    token_ids = random_ids(len(lengths), max(lengths)) if token_ids is None else token_ids
    cache = KVCache(decoder.config, len(lengths), max(lengths) + spare)
    decoder(token_ids, cache)
    cache.set_lengths(torch.tensor(lengths))
    return cache


@torch.no_grad()
def test_slots_beyond_a_rows_length_have_no_influence(decoder):
    clean, dirty = (filled(decoder, [2, 7, 4], spare=5) for _ in range(2))
    for tensor in dirty.keys + dirty.values:
        for row, length in enumerate(dirty.lengths.tolist()):
            tensor[row, :, length:] = 1e4
    for step in range(5):
        following = random_ids(3, 1, seed=10 + step)
        assert torch.equal(decoder(following, dirty), decoder(following, clean)), step


@torch.no_grad()
def test_after_set_lengths_rows_continue_from_the_tokens_that_are_left(decoder):
    token_ids = random_ids(2, 8)
    cache = filled(decoder, [8, 8], spare=0, token_ids=token_ids)  # the forgotten slots are room again
    lengths = torch.tensor([3, 6])
    cache.set_lengths(lengths)
    logits = decoder(token_ids[:, :2], cache)
    assert lengths.tolist() == [3, 6] and cache.lengths.tolist() == [5, 8]  # the caller's tensor is not changed
    for row, length in enumerate([3, 6]):
        text = torch.cat((token_ids[row, :length], token_ids[row, :2]))
        torch.testing.assert_close(logits[row], decoder(text[None])[0, length:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_last_slot_can_be_used_and_one_token_more_is_refused(decoder):
    cache = filled(decoder, [2, 6], spare=2)
    decoder(random_ids(2, 2), cache)
    assert cache.longest == cache.max_length == 8
    with pytest.raises(ValueError, match="the cache holds 8 tokens a row; 9 are needed"):
        decoder(random_ids(2, 1), cache)
    with pytest.raises(ValueError, match="the cache holds 3 tokens a row; 4 are needed"):
        decoder(random_ids(1, 4), KVCache(decoder.config, 1, 3))


# GroupCache


def grouped(decoder, prompts, num_samples, max_new_tokens, static) -> GroupCache:
    _, cache = prefill(decoder, prompts)
    return GroupCache(cache, num_samples, max_new_tokens, static)


def alone(decoder, prompts, prompt_of, own) -> torch.Tensor:
    """Logits after each row's prompt and own tokens, each row by itself and without a cache: [rows, vocab]."""
    rows = [torch.tensor([prompts[number] + ids.tolist()]) for number, ids in zip(prompt_of.tolist(), own, strict=True)]
    return torch.cat([decoder(row)[:, -1] for row in rows])


def decode(decoder, cache, own, steps) -> torch.Tensor:
    """Feed the own tokens [rows, time] of `steps` and return the last logits."""
    for step in steps:
        cache.reserve(step + 1)
        logits = decoder(own[:, step : step + 1], cache)[:, -1]
    return logits


@pytest.mark.parametrize("static_block", [None, 1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_step_gives_the_logits_of_an_uncached_forward(shape, static_block, monkeypatch):
    if static_block:
        monkeypatch.setitem(BLOCK, "cpu", static_block)
    decoder = same_weights(reference_model(seed=3, **SHAPES[shape]))
    cache, own = grouped(decoder, PROMPTS, 3, 7, static=bool(static_block)), random_ids(9, 7, seed=4)
    for step in range(7):
        logits = decode(decoder, cache, own, [step])
        expected = alone(decoder, PROMPTS, cache.prompt_of, own[:, : step + 1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 4), st.booleans(), st.integers(1, 4), st.data())
@torch.no_grad()
def test_dropped_rows_leave_the_others_as_they_were(decoder, lengths, num_samples, static, block, data):
    """Rows are dropped at any time, before the first own token too."""
    prompts = [random_ids(length, seed=number).tolist() for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCK, "cpu", block)
        cache = grouped(decoder, prompts, num_samples, 9, static)
        prompt_of = cache.prompt_of.clone()
        own = random_ids(len(prompt_of), 9, seed=11)
        start = 0
        for steps in (data.draw(st.integers(0, 2)), 3, 3):
            if steps:
                logits = decode(decoder, cache, own, range(start, start + steps))
                start += steps
                expected = alone(decoder, prompts, prompt_of, own[:, :start])
                torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
            rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(prompt_of) - 1), min_size=1))))
            cache.select(rows)
            own = own[rows]
            prompt_of = prompt_of[rows]


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_unused_slots_have_no_influence(decoder, static):
    own = random_ids(6, 4, seed=2)
    clean, dirty = (grouped(decoder, PROMPTS, 2, 20, static) for _ in range(2))
    decode(decoder, clean, own, range(3))
    decode(decoder, dirty, own, range(3))
    for number, prompt in enumerate(PROMPTS):
        for tensor in dirty.prompt_keys + dirty.prompt_values:
            tensor[number, :, len(prompt) :] = 1e4
    for [block] in dirty.keys + dirty.values:
        block[:, 3:] = 1e4 if static else torch.nan
    assert torch.equal(decode(decoder, dirty, own, [3]), decode(decoder, clean, own, [3]))


def size(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


@torch.no_grad()
def test_a_prompt_is_stored_once_and_blocks_are_added_without_copying(decoder, monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", 4)
    token = 2 * decoder.config.num_hidden_layers * decoder.config.num_key_value_heads * decoder.config.head_dim
    for num_samples in (1, 5):
        rows = 3 * num_samples
        cache, own, addresses = grouped(decoder, PROMPTS, num_samples, 10, static=True), random_ids(rows, 10), []
        assert size(cache.prompt_keys + cache.prompt_values) == 3 * 7 * token
        for step in range(10):
            decode(decoder, cache, own, [step])
            assert (
                size(block for blocks in cache.keys + cache.values for block in blocks)
                == rows * min(10, 4 * (step // 4 + 1)) * token
            )
            addresses.append([block.data_ptr() for block in cache.keys[0]])
        assert addresses[9][:2] == addresses[4] and addresses[9][:1] == addresses[0]
        cache.select(torch.arange(0, rows, 3))
        assert size(block for blocks in cache.keys + cache.values for block in blocks) == -(-rows // 3) * 10 * token


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_bfloat16_differs_from_float32_by_its_rounding_only(static):
    exact = same_weights(reference_model(seed=7))
    decoder = same_weights(reference_model(seed=7)).to(torch.bfloat16)
    exact.load_state_dict(decoder.state_dict())  # the rounded weights, in float32 arithmetic
    own = random_ids(6, 5, seed=2)
    logits = decode(decoder, grouped(decoder, PROMPTS, 2, 20, static), own, range(5))
    expected = decode(exact, grouped(exact, PROMPTS, 2, 20, static), own, range(5))
    plain = alone(decoder, PROMPTS, torch.arange(3).repeat_interleave(2), own)
    assert (logits - expected).abs().mean() < 1.5 * (plain - expected).abs().mean()
