"""Groups that share a prompt decode as every row would alone, whatever rows leave and however the cache grows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SHAPES, random_ids, reference_model, same_weights

import model.cache
import model.sampler
from model.cache import GroupCache
from model.qwen3 import Linear

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4]]


@pytest.fixture(scope="module")
def decoder():
    return same_weights(reference_model(seed=7))


def grouped(decoder, prompts, num_samples, max_new_tokens, static) -> GroupCache:
    _, cache = model.sampler.prefill(decoder, prompts)
    return GroupCache(cache, num_samples, max_new_tokens, static)


def alone(decoder, prompts, prompt_of, own) -> torch.Tensor:
    """Logits after each row's prompt and own tokens, every row by itself and without a cache: [rows, vocab]."""
    rows = [torch.tensor([prompts[number] + ids.tolist()]) for number, ids in zip(prompt_of.tolist(), own, strict=True)]
    return torch.cat([decoder(row)[:, -1] for row in rows])


def decode(decoder, cache, own, steps) -> torch.Tensor:
    """Feed the own tokens [rows, time] of `steps` and give the last logits."""
    for step in steps:
        cache.reserve(step + 1)
        logits = decoder(own[:, step : step + 1], cache)[:, -1]
    return logits


@pytest.mark.parametrize("static_block", [None, 1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_step_gives_the_logits_of_an_uncached_forward(shape, static_block, monkeypatch):
    if static_block:
        monkeypatch.setitem(model.cache.BLOCK, "cpu", static_block)
    decoder = same_weights(reference_model(seed=3, **SHAPES[shape]))
    cache, own = grouped(decoder, PROMPTS, 3, 7, static=bool(static_block)), random_ids(9, 7, seed=4)
    for step in range(7):
        logits = decode(decoder, cache, own, [step])
        expected = alone(decoder, PROMPTS, cache.prompt_of, own[:, : step + 1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 4), st.booleans(), st.integers(1, 4), st.data())
@torch.no_grad()
def test_rows_that_stay_go_on_as_if_nobody_had_left(decoder, lengths, num_samples, static, block, data):
    prompts = [random_ids(length, seed=number).tolist() for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.cache.BLOCK, "cpu", block)
        cache = grouped(decoder, prompts, num_samples, 9, static)
        belongs = cache.prompt_of.clone()
        own = random_ids(len(belongs), 9, seed=11)
        decode(decoder, cache, own, range(2))
        for start in (2, 5):
            subsets = st.sets(st.integers(0, len(belongs) - 1), min_size=1)
            rows = torch.tensor(sorted(data.draw(subsets)))
            cache.select(rows)
            own, belongs = own[rows], belongs[rows]
            logits = decode(decoder, cache, own, range(start, start + 3))
            expected = alone(decoder, prompts, belongs, own[:, : start + 3])
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_rows_may_leave_before_the_first_own_token_is_stored(decoder, static):
    cache, own, rows = grouped(decoder, PROMPTS, 2, 5, static), random_ids(3, 5, seed=6), torch.tensor([1, 4, 5])
    cache.select(rows)
    logits = decode(decoder, cache, own, range(2))
    torch.testing.assert_close(logits, alone(decoder, PROMPTS, rows // 2, own[:, :2]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_what_is_not_stored_has_no_influence(decoder, static):
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
def test_a_prompt_is_stored_once_and_blocks_follow_the_tokens(decoder, monkeypatch):
    monkeypatch.setitem(model.cache.BLOCK, "cpu", 4)
    token = 2 * decoder.config.num_hidden_layers * decoder.config.num_key_value_heads * decoder.config.head_dim
    for num_samples in (1, 5):
        cache = grouped(decoder, PROMPTS, num_samples, 10, static=True)
        assert size(cache.prompt_keys + cache.prompt_values) == 3 * 7 * token
        rows, own, places = 3 * num_samples, random_ids(3 * num_samples, 10), []
        for step in range(10):
            decode(decoder, cache, own, [step])
            blocks = [block for blocks in cache.keys + cache.values for block in blocks]
            assert size(blocks) == rows * min(10, 4 * (step // 4 + 1)) * token
            places.append([block.data_ptr() for block in cache.keys[0]])
        assert places[9][:2] == places[4] and places[9][:1] == places[0]  # no block has moved
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
    wanted = decode(exact, grouped(exact, PROMPTS, 2, 20, static), own, range(5))
    plain = alone(decoder, PROMPTS, torch.arange(3).repeat_interleave(2), own)
    assert (logits - wanted).abs().mean() < 1.5 * (plain - wanted).abs().mean()


@pytest.mark.parametrize("rows", [1, 5, 128, 129])
def test_the_products_of_bfloat16_rows_are_those_of_any_linear_layer(rows):
    layer = Linear(24, 40, bias=False).bfloat16()
    x = torch.randn(rows, 1, 24, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    exact = F.linear(x.float(), layer.weight.float())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), exact, rtol=2**-7, atol=1e-3)
    layer(x).sum().backward()
    expected = layer.weight.detach().float().sum(0).expand(x.shape)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2**-6, atol=1e-2)
