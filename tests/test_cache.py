"""The cache alone knows where each row stands: what lies beyond a row's length can never be seen."""

import pytest
import torch
from reference import random_ids, reference_model, same_weights

from model import KVCache


@pytest.fixture(scope="module")
def model():
    return same_weights(reference_model(seed=7))


@torch.no_grad()
def filled(model, lengths: list[int], spare: int, token_ids=None) -> KVCache:
    """A cache that holds `lengths` tokens of ragged rows and has room for `spare` more than the longest."""
    token_ids = random_ids(len(lengths), max(lengths)) if token_ids is None else token_ids
    cache = KVCache(model.config, len(lengths), max(lengths) + spare)
    model(token_ids, cache)
    cache.set_lengths(torch.tensor(lengths))
    return cache


def poison(cache: KVCache, value: float) -> None:
    """Overwrite every slot beyond its row's length."""
    for tensor in cache.keys + cache.values:
        for row, length in enumerate(cache.lengths.tolist()):
            tensor[row, :, length:] = value


@pytest.mark.parametrize("garbage", [1e4, -1e4])
@torch.no_grad()
def test_what_lies_beyond_a_rows_length_has_no_influence(model, garbage):
    lengths, token_ids = [2, 7, 4], random_ids(3, 7)
    clean, dirty = (filled(model, lengths, spare=5, token_ids=token_ids) for _ in range(2))
    poison(dirty, garbage)
    for step in range(5):
        following = random_ids(3, 1, seed=10 + step)
        assert torch.equal(model(following, dirty), model(following, clean)), step


@torch.no_grad()
def test_forgetting_tokens_takes_a_row_back_to_where_it_was(model):
    token_ids = random_ids(2, 8)
    cache = filled(model, [8, 8], spare=0, token_ids=token_ids)  # the forgotten slots are room again
    cache.set_lengths(torch.tensor([3, 6]))
    logits = model(token_ids[:, :2], cache)
    for row, length in enumerate([3, 6]):
        text = torch.cat((token_ids[row, :length], token_ids[row, :2]))
        torch.testing.assert_close(logits[row], model(text[None])[0, length:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_callers_lengths_stay_the_callers(model):
    cache = KVCache(model.config, 2, 9)
    model(random_ids(2, 5), cache)
    lengths = torch.tensor([5, 3])
    cache.set_lengths(lengths)
    model(random_ids(2, 1), cache)
    assert lengths.tolist() == [5, 3]
    assert cache.lengths.tolist() == [6, 4]


@torch.no_grad()
def test_positions_and_masks_follow_each_rows_own_length(model):
    cache = filled(model, [1, 3], spare=4)
    assert cache.start(2).tolist() == [[1, 2], [3, 4]]
    mask = cache.mask[:, 0].int().tolist()  # [batch, time, longest + time]
    assert mask == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


@torch.no_grad()
def test_a_part_of_the_rows_is_filled_as_if_the_others_were_not_there(model):
    token_ids, following = random_ids(5, 6), random_ids(5, 1, seed=9)
    whole, parts = KVCache(model.config, 5, 8), KVCache(model.config, 5, 8)
    model(token_ids, whole)
    for rows in (slice(0, 2), slice(2, 5)):
        model(token_ids[rows], parts.part(rows))
    parts.set_lengths(torch.full((5,), 6))
    torch.testing.assert_close(model(following, parts), model(following, whole), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_last_slot_can_be_used_and_one_token_more_is_refused(model):
    cache = filled(model, [2, 6], spare=2)
    model(random_ids(2, 2), cache)
    assert cache.longest == cache.max_length == 8
    with pytest.raises(ValueError, match="the cache holds 8 tokens a row; 9 are needed"):
        model(random_ids(2, 1), cache)


@torch.no_grad()
def test_a_first_pass_larger_than_the_cache_is_refused(model):
    with pytest.raises(ValueError, match="the cache holds 3 tokens a row; 4 are needed"):
        model(random_ids(1, 4), KVCache(model.config, 1, 3))


@torch.no_grad()
def test_a_cache_has_the_shape_and_dtype_that_it_was_asked_for(model):
    cache = KVCache(model.config, 3, 11, dtype=torch.bfloat16)
    shape = (3, model.config.num_key_value_heads, 11, model.config.head_dim)
    assert len(cache.keys) == len(cache.values) == model.config.num_hidden_layers
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in cache.keys + cache.values} == {(shape, torch.bfloat16)}
    assert (cache.lengths.tolist(), cache.longest) == ([0, 0, 0], 0)
