"""Both caches against uncached forwards, whatever the prompts, the growth and the rows dropped."""

import pytest
import torch
from reference import SHAPES, random_ids, reference_model, same_weights

from model import KVCache
from model.cache import BLOCK, GroupCache
from model.sampler import prefill

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4]]


@pytest.fixture(scope="module")
def decoder():
    return same_weights(reference_model(seed=7))


@torch.no_grad()
def test_the_last_slot_can_be_used_and_one_token_more_is_refused(decoder):
    cache = KVCache(decoder.config, 2, 8)
    decoder(random_ids(2, 8), cache)
    assert cache.length == cache.max_length == 8
    with pytest.raises(ValueError, match="the cache holds 8 tokens per row; 9 are needed"):
        decoder(random_ids(2, 1), cache)
    with pytest.raises(ValueError, match="the cache holds 3 tokens per row; 4 are needed"):
        decoder(random_ids(1, 4), KVCache(decoder.config, 1, 3))


def grouped(decoder, prompts, num_samples, max_new_tokens) -> GroupCache:
    _, cache, lengths = prefill(decoder, prompts)
    return GroupCache(cache, lengths, num_samples, max_new_tokens)


def alone(decoder, prompts, prompt_index, own) -> torch.Tensor:
    """Logits after each row's prompt and own tokens, each by itself and without a cache: [rows, vocab]."""
    rows = [
        torch.tensor([prompts[number] + ids.tolist()])
        for number, ids in zip(prompt_index.tolist(), own, strict=True)
    ]
    return torch.cat([decoder(row)[:, -1] for row in rows])


def decode(decoder, cache, own, steps) -> torch.Tensor:
    """Feed the own tokens [rows, time] of `steps` and return the last logits."""
    for step in steps:
        cache.reserve(step + 1)
        logits = decoder(own[:, step : step + 1], cache)[:, -1]
    return logits


KEPT = {
    0: [0, 1, 2, 3, 6, 7, 8],
    2: [0, 1, 2, 4, 6],
    5: [3, 4],
}  # step -> rows kept before it; at the end one prompt is left


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_step_gives_the_logits_of_an_uncached_forward(shape, block, monkeypatch):
    """Rows may be dropped on the way."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    decoder = same_weights(reference_model(seed=3, **SHAPES[shape]))
    cache, own = grouped(decoder, PROMPTS, 3, 7), random_ids(9, 7, seed=4)
    prompt_index = cache.prompt_index.clone()
    for step in range(7):
        if step in KEPT:
            rows = torch.tensor(KEPT[step])
            cache.select(rows)
            own = own[rows]
            prompt_index = prompt_index[rows]
        logits = decode(decoder, cache, own, [step])
        expected = alone(decoder, PROMPTS, prompt_index, own[:, : step + 1])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("block", [1, 16])
@torch.no_grad()
def test_unused_slots_have_no_influence(decoder, block, monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", block)
    own = random_ids(6, 4, seed=2)
    clean, dirty = (grouped(decoder, PROMPTS, 2, 20) for _ in range(2))
    decode(decoder, clean, own, range(3))
    decode(decoder, dirty, own, range(3))
    for number, prompt in enumerate(PROMPTS):
        for tensor in dirty.prompt_keys + dirty.prompt_values:
            tensor[number, :, len(prompt) :] = 1e4
    for storage in dirty.keys + dirty.values:
        storage[:, 3:] = 1e4 if block > 1 else torch.nan
    assert torch.equal(decode(decoder, dirty, own, [3]), decode(decoder, clean, own, [3]))


@pytest.mark.parametrize("num_samples", [1, 5])
@torch.no_grad()
def test_a_prompt_is_stored_once_and_own_tokens_are_never_copied(num_samples, decoder):
    token = (
        2 * decoder.config.num_hidden_layers * decoder.config.num_key_value_heads * decoder.config.head_dim
    )
    rows = 3 * num_samples
    cache, own = grouped(decoder, PROMPTS, num_samples, 10), random_ids(rows, 10)
    addresses = [storage.data_ptr() for storage in cache.keys + cache.values]

    def stored() -> int:
        return sum(storage.numel() for storage in cache.keys + cache.values)

    assert sum(tensor.numel() for tensor in cache.prompt_keys + cache.prompt_values) == 3 * 7 * token
    decode(decoder, cache, own, range(10))
    assert stored() == rows * 10 * token
    assert addresses == [storage.data_ptr() for storage in cache.keys + cache.values]
    cache.select(torch.arange(0, rows, 3))
    assert stored() == -(-rows // 3) * 10 * token


@torch.no_grad()
def test_bfloat16_differs_from_float32_by_its_rounding_only():
    exact = same_weights(reference_model(seed=7))
    decoder = same_weights(reference_model(seed=7)).to(torch.bfloat16)
    exact.load_state_dict(decoder.state_dict())  # the rounded weights, in float32 arithmetic
    own = random_ids(6, 5, seed=2)
    logits = decode(decoder, grouped(decoder, PROMPTS, 2, 20), own, range(5))
    expected = decode(exact, grouped(exact, PROMPTS, 2, 20), own, range(5))
    plain = alone(decoder, PROMPTS, torch.arange(3).repeat_interleave(2), own)
    assert (logits - expected).abs().mean() < 1.5 * (plain - expected).abs().mean()
