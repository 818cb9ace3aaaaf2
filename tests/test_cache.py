"""Both caches against uncached forwards, whatever the prompts, the growth and the rows dropped."""

import pytest
import torch
from helpers import random_model
from reference import random_ids

from model import KVCache
from model.cache import BLOCK, GroupCache
from model.sampler import prefill

PROMPTS = [[5, 17, 3, 44, 9], [8], [41, 2, 2, 30, 7, 12, 4]]
IN_BLOCKS = pytest.mark.parametrize("block", [1, 16])
HEADS = [
    {},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 14, "num_hidden_layers": 3},
    {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 2},
]


@pytest.fixture(scope="module")
def decoder():
    return random_model()


@torch.no_grad()
def test_the_last_slot_can_be_used_and_one_token_more_is_refused(decoder):
    cache = KVCache(decoder.config, 2, 8)
    decoder(random_ids(2, 8, high=48), cache)
    assert cache.length == cache.max_length == 8
    with pytest.raises(ValueError, match="the cache holds 8 tokens per row; 9 are needed"):
        decoder(random_ids(2, 1, high=48), cache)


def grouped(decoder, num_samples, max_new_tokens) -> GroupCache:
    _, cache, lengths = prefill(decoder, PROMPTS)
    return GroupCache(cache, lengths, num_samples, max_new_tokens)


def alone(decoder, prompt_index, own):
    """Logits after each row's prompt and own tokens, each by itself and without a cache: [rows, vocab]."""
    logits = []
    for number, ids in zip(prompt_index.tolist(), own.tolist(), strict=True):
        logits.append(decoder(torch.tensor([PROMPTS[number] + ids]))[:, -1])
    return torch.cat(logits)


def decode(decoder, cache, own, steps):
    """Feed the own tokens [rows, time] of `steps` and return the last logits."""
    for step in steps:
        cache.reserve(step + 1)
        logits = decoder(own[:, step : step + 1], cache)[:, -1]
    return logits


KEPT = {0: [0, 1, 2, 3, 6, 7, 8], 2: [0, 1, 2, 4, 6], 5: [3, 4]}  # step -> rows kept before it


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_every_step_gives_the_logits_of_an_uncached_forward(heads, block, monkeypatch):
    """Rows are dropped on the way, until one prompt is left."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    decoder = random_model(**heads)
    cache = grouped(decoder, 3, 7)
    own = random_ids(9, 7, high=48)
    prompt_index = cache.prompt_index.clone()
    for step in range(7):
        if step in KEPT:
            rows = torch.tensor(KEPT[step])
            cache.select(rows)
            own = own[rows]
            prompt_index = prompt_index[rows]
        logits = decode(decoder, cache, own, [step])
        expected = alone(decoder, prompt_index, own[:, : step + 1])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@IN_BLOCKS
@torch.no_grad()
def test_unused_slots_have_no_influence(decoder, block, monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", block)
    own = random_ids(6, 4, high=48)
    clean = grouped(decoder, 2, 20)
    dirty = grouped(decoder, 2, 20)
    decode(decoder, clean, own, range(3))
    decode(decoder, dirty, own, range(3))
    for tensor in dirty.prompt_keys + dirty.prompt_values:
        for number, prompt in enumerate(PROMPTS):
            tensor[number, :, len(prompt) :] = 1e4
    for storage in dirty.keys + dirty.values:
        storage[:, 3:] = 1e4 if block > 1 else torch.nan
    assert torch.equal(decode(decoder, dirty, own, [3]), decode(decoder, clean, own, [3]))


@torch.no_grad()
def test_own_tokens_are_never_copied(decoder):
    cache = grouped(decoder, 2, 10)
    storage = cache.keys[0].data_ptr()
    decode(decoder, cache, random_ids(6, 10, high=48), range(10))
    assert cache.keys[0].data_ptr() == storage
    assert cache.keys[0].shape[1] == 10


@torch.no_grad()
def test_bfloat16_differs_from_float32_by_its_rounding_only():
    decoder = random_model(dtype=torch.bfloat16)
    exact = random_model()
    exact.load_state_dict(decoder.state_dict())  # the rounded weights, in float32 arithmetic
    own = random_ids(6, 5, high=48)
    logits = decode(decoder, grouped(decoder, 2, 20), own, range(5))
    expected = decode(exact, grouped(exact, 2, 20), own, range(5))
    plain = alone(decoder, torch.arange(3).repeat_interleave(2), own)
    assert (logits - expected).abs().mean() < 1.5 * (plain - expected).abs().mean()
