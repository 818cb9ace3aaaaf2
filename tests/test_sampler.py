"""The sampler against transformers and written-out probability: what comes out, how likely, and when it stops."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_model, same_weights
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import model.sampler
from model import generate
from model.sampler import sample
from rl.batch import Sample, completion_logprobs, make_batch

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4, 4, 25], [19, 6, 40], [8, 1, 77, 50, 3, 9, 13]]
ALMOST_ONE = 1 - 2**-24  # the largest float32 below one, and the largest number that a stream can hold


def soft_reference(seed: int = 0, **shape):
    """A random model whose next token is far from certain, so that sampling has choices to get wrong."""
    reference = reference_model(seed, **shape)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    return reference


@pytest.fixture(scope="module")
def reference():
    return soft_reference()


@pytest.fixture(scope="module")
def decoder(reference):
    return same_weights(reference)


@torch.no_grad()
def teacher_forced(reference, prompt, token_ids, temperature=1.0, num_tokens=None) -> torch.Tensor:
    """Log-probabilities of `token_ids` after `prompt` by one uncached pass of transformers: [len(token_ids)]."""
    logits = reference(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1, :num_tokens]
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def flat(groups):
    return [completion for group in groups for completion in group]


def ids_of(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def assert_same(ours, theirs):
    """Equal ids and endings, and equal log-probabilities up to the rounding of products of other sizes."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert (one.token_ids, one.finished) == (other.token_ids, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Probability of counts at least this far from `expected`; cells expecting fewer than 8 are put together."""
    small = expected < 8
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    half = torch.tensor([(len(wanted) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


# What is sampled


@torch.no_grad()
def test_greedy_equals_transformers_greedy_token_for_token_on_ragged_prompts(reference, decoder):
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = reference.generate(
        padded, attention_mask=attention_mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, longest:]
    groups = generate(decoder, PROMPTS, max_new_tokens=24, temperature=0)
    assert [group[0].token_ids for group in groups] == expected.tolist()
    assert len({tuple(row) for row in expected.tolist()}) == len(PROMPTS)
    for prompt, [completion] in zip(PROMPTS, groups):  # greedy reports log-probabilities at temperature 1
        exact = teacher_forced(reference, prompt, completion.token_ids).tolist()
        assert completion.logprobs == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_captured_logprobs_equal_a_teacher_forced_pass_of_transformers(temperature, reference, decoder):
    groups = generate(decoder, PROMPTS, num_samples=3, max_new_tokens=12, temperature=temperature, seed=3)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            exact = teacher_forced(reference, prompt, completion.token_ids, temperature).tolist()
            assert completion.logprobs == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_captured_logprobs_are_those_that_training_computes(temperature, decoder):
    options = dict(num_samples=2, max_new_tokens=9, temperature=temperature)
    groups = generate(decoder, PROMPTS, stop_token_ids=[7, 30], **options)
    samples = [
        Sample(prompt, completion.token_ids, completion.logprobs)
        for prompt, group in zip(PROMPTS, groups)
        for completion in group
    ]
    batch = make_batch(samples)
    torch.testing.assert_close(completion_logprobs(decoder, batch, temperature), batch.old_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@torch.no_grad()
def test_sampled_pairs_of_tokens_come_as_often_as_the_softmax_says(temperature):
    reference = soft_reference(vocab_size=9)
    prompt, draws = [3, 8, 1], 12_000
    groups = generate(same_weights(reference), [prompt], num_samples=draws, max_new_tokens=2, temperature=temperature, seed=5)
    first = (reference(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    following = reference(torch.tensor([prompt + [token] for token in range(9)])).logits[:, -1].double()
    joint = first[:, None] * (following / temperature).softmax(-1)  # [first token, second token]
    counts = np.zeros((9, 9))
    for completion in groups[0]:
        counts[tuple(completion.token_ids)] += 1
    assert chi_square_p(counts.sum(1), draws * first.numpy()) > 1e-3
    assert chi_square_p(counts.flatten(), draws * joint.numpy().flatten()) > 1e-3


def warped(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The distribution that transformers would sample from, in float64: [rows, vocab]."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None), (0.5, None, None), (2.0, None, None), (1.0, 1, None), (1.3, 4, None), (1.0, 500, None),
        (1.0, None, 0.3), (0.7, None, 0.9), (1.0, None, 1.0), (0.6, 20, 0.95), (1.5, 3, 0.6), (1.0, None, 1e-6),
    ],
)  # fmt: skip
def test_one_uniform_number_picks_the_token_that_the_inverse_cdf_says(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 31, generator=generator)
    uniforms = torch.rand(4000, generator=generator)
    sampled, logprobs = sample(logits, uniforms, 31, temperature, top_k, top_p)
    probabilities = warped(logits, temperature, top_k, top_p)
    cumulative = probabilities.cumsum(-1)
    expected = (cumulative <= uniforms.double().numpy()[:, None]).sum(-1)
    clear = np.abs(cumulative - uniforms.numpy()[:, None]).min(-1) > 1e-5  # rounding cannot decide these rows
    assert clear.mean() > 0.99
    assert (sampled.numpy() == expected)[clear].all()
    assert (probabilities[np.arange(4000), sampled] > 0).all()  # nothing outside the allowed set, unclear rows included
    full = torch.log_softmax(logits.double() / temperature, -1)  # the reported one is the full distribution's
    torch.testing.assert_close(logprobs.double(), full.gather(-1, sampled[:, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.5), (5, 0.8)])
@torch.no_grad()
def test_generate_keeps_to_the_allowed_set_at_every_step(top_k, top_p, reference, decoder):
    groups = generate(decoder, PROMPTS[:3], num_samples=40, max_new_tokens=5, temperature=0.9, top_k=top_k, top_p=top_p)
    seen = set()
    for prompt, group in zip(PROMPTS, groups):
        logits = reference(torch.tensor([prompt + completion.token_ids for completion in group])).logits
        allowed = warped(logits[:, len(prompt) - 1 : -1].flatten(0, 1), 0.9, top_k, top_p) > 0
        token_ids = [token for completion in group for token in completion.token_ids]
        assert allowed[np.arange(len(token_ids)), token_ids].all()
        seen |= set(token_ids)
    assert len(seen) > 10


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 31, 40_000])
def test_the_largest_and_the_smallest_uniform_pick_a_possible_token(vocab, dtype, top_k):
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[8:16, vocab // 2 :] = -3e4  # probability zero at the end of the vocabulary
    logits[16:, : vocab // 2] = -3e4  # and at its start
    for uniform in (ALMOST_ONE, 0.0):
        uniforms = torch.full((24,), uniform, dtype=torch.float32)
        sampled, logprobs = sample(logits.to(dtype), uniforms, vocab, 1.0, top_k, None)
        assert (sampled >= 0).all() and (sampled < vocab).all()
        assert (logprobs > -50).all()
        allowed = warped(logits.to(dtype), 1.0, top_k, None) > 0
        possible = [np.flatnonzero(row) for row in allowed]
        if vocab == 31:  # few enough that no rounding blurs the ends
            assert sampled.tolist() == [row[-1] if uniform else row[0] for row in possible]
        assert all(token in row for token, row in zip(sampled.tolist(), possible))


def test_a_long_tail_of_rare_tokens_keeps_its_share_of_a_vocabulary_as_large_as_qwen3s():
    vocab = 151_669
    probabilities = torch.full((vocab,), 2e-8, dtype=torch.float64)  # too small to be added to 0.997 in float32
    probabilities[0] = 1 - probabilities[1:].sum()
    uniforms = torch.linspace(0.9975, 0.9999, 12)
    sampled, _ = sample(probabilities.log().float().expand(12, vocab), uniforms, vocab, 1.0)
    expected = torch.searchsorted(probabilities.cumsum(0), uniforms.double(), right=True)
    assert (sampled - expected).abs().max() < 0.002 * vocab
    assert sampled.min() > 0 and len(set(sampled.tolist())) == 12


def test_greedy_takes_the_likeliest_and_a_tie_does_not_depend_on_chance():
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0, 9.0]])
    picks = set()
    for uniform in (0.0, 0.3, 0.99, ALMOST_ONE):
        sampled, logprobs = sample(logits, torch.full((3,), uniform), 5, 0)
        assert logits.gather(1, sampled[:, None])[:, 0].tolist() == logits.max(1).values.tolist()
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0])
        picks.add(tuple(sampled.tolist()))
    assert len(picks) == 1


def test_a_vocabulary_of_one_token_has_probability_one():
    decoder = same_weights(reference_model(vocab_size=1))
    for temperature in (0, 1.0):
        groups = generate(decoder, [[0], [0, 0]], num_samples=2, max_new_tokens=3, temperature=temperature)
        for completion in flat(groups):
            assert (completion.token_ids, completion.logprobs) == ([0, 0, 0], [0.0, 0.0, 0.0])


# Ids that have no text


@pytest.fixture(scope="module")
def tailed():
    """A model whose last 20 ids have no text and by far the largest logits."""
    reference = soft_reference(seed=2)
    with torch.no_grad():
        reference.lm_head.weight[63:] = 60 * torch.randn(20, 44, generator=torch.Generator().manual_seed(0))
    decoder = same_weights(reference)
    decoder.num_tokens = 63
    return reference, decoder


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_an_id_without_a_text_is_never_sampled_however_large_its_logit(options, tailed):
    reference, decoder = tailed
    groups = generate(decoder, PROMPTS, num_samples=6, max_new_tokens=10, **options)
    assert max(token for completion in flat(groups) for token in completion.token_ids) < 63
    temperature = options["temperature"] or 1.0
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            exact = teacher_forced(reference, prompt, completion.token_ids, temperature, num_tokens=63).tolist()
            assert completion.logprobs == pytest.approx(exact, abs=1e-4)
    unlimited = generate(same_weights(reference), PROMPTS, num_samples=6, max_new_tokens=10, **options)
    assert min(token for completion in flat(unlimited) for token in completion.token_ids) >= 63


@pytest.mark.parametrize("uniform", [0.5, ALMOST_ONE])
def test_the_end_of_the_distribution_is_the_last_id_with_a_text(uniform):
    logits = torch.zeros(2, 50)
    logits[:, 30:] = 1e4
    sampled, logprobs = sample(logits, torch.full((2,), uniform), 30, 1.0)
    assert sampled.tolist() == ([15, 15] if uniform == 0.5 else [29, 29])
    assert logprobs.tolist() == pytest.approx([-np.log(30)] * 2, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_an_id_without_a_text_has_no_part_in_the_softmax_of_training(temperature, tailed):
    reference, decoder = tailed
    samples = [Sample([5, 17, 3], [44, 9]), Sample([8], [62, 0, 2, 30]), Sample([70, 82], [1])]
    logprobs = completion_logprobs(decoder, make_batch(samples), temperature)
    for row, item in zip(logprobs, samples):
        exact = teacher_forced(reference, item.prompt_ids, item.completion_ids, temperature, num_tokens=63)
        expected = torch.zeros(len(row), dtype=torch.float64)
        expected[: len(item.completion_ids)] = exact
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-4)
    decoder.zero_grad()
    logprobs.sum().backward()
    gradient = decoder.lm_head.weight.grad
    assert gradient[63:].abs().max() == 0 < gradient[:63].abs().amax(1).min()


# Streams


def test_a_completion_does_not_depend_on_the_batch_that_it_is_sampled_in(decoder):
    options = dict(max_new_tokens=14, temperature=1.0, seed=11, stop_token_ids=[7, 30])
    whole = generate(decoder, PROMPTS, num_samples=3, **options)
    backwards = generate(decoder, PROMPTS[::-1], num_samples=3, **options)[::-1]
    assert_same(flat(backwards), flat(whole))
    assert_same(flat(generate(decoder, PROMPTS[1:4:2], num_samples=3, **options)), flat(whole[1:4:2]))
    more = generate(decoder, PROMPTS, num_samples=5, **options)
    assert_same(flat([group[:3] for group in more]), flat(whole))
    assert_same(flat(generate(decoder, PROMPTS[2:3], num_samples=1, **options)), whole[2][:1])
    longer = generate(decoder, PROMPTS, num_samples=3, **options | {"max_new_tokens": 20})
    assert [[ids[:14] for ids in group] for group in ids_of(longer)] == ids_of(whole)


def test_every_sample_prompt_copy_and_seed_has_a_stream_of_its_own(decoder):
    prompt = PROMPTS[0]
    first, second, third = ids_of(generate(decoder, [prompt] * 3, num_samples=4, max_new_tokens=10))
    assert len({tuple(ids) for ids in first + second + third}) == 12
    mixed = ids_of(generate(decoder, [PROMPTS[1], prompt, PROMPTS[2], prompt], num_samples=4, max_new_tokens=10))
    assert mixed[1::2] == [first, second]
    assert ids_of(generate(decoder, [prompt], num_samples=4, max_new_tokens=10)) == [first]
    [other] = ids_of(generate(decoder, [prompt], num_samples=4, max_new_tokens=10, seed=1))
    assert len({tuple(ids) for ids in first + other}) == 8


def test_two_prompts_do_not_share_their_random_numbers():
    decoder = same_weights(reference_model())
    with torch.no_grad():
        decoder.lm_head.weight.zero_()  # every token equally likely, so that ids show the uniform numbers themselves
    groups = generate(decoder, [[1, 2, 3], [1, 23], [12, 3], [3, 2, 1]], num_samples=4, max_new_tokens=80)
    rows = np.array(flat(ids_of(groups)))
    same = (rows[:, None] == rows[None]).mean(-1)[~np.eye(len(rows), dtype=bool)]
    assert same.max() < 0.2  # 1 in 83 by chance
    assert chi_square_p(np.bincount(rows.flatten(), minlength=83), np.full(83, rows.size / 83)) > 1e-3


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 82), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 9))
def test_a_ragged_batch_equals_each_row_alone_and_every_row_gets_all_its_tokens(prompts, max_new_tokens):
    decoder = same_weights(soft_reference(seed=6))
    groups = generate(decoder, prompts, num_samples=2, max_new_tokens=max_new_tokens)
    for number, (prompt, group) in enumerate(zip(prompts, groups)):
        before = prompts[:number].count(prompt)  # copies count as groups of their own
        assert_same(group, generate(decoder, [prompt] * (before + 1), num_samples=2, max_new_tokens=max_new_tokens)[-1])
        for completion in group:
            assert len(completion.token_ids) == len(completion.logprobs) == max_new_tokens
            assert not completion.finished


# Stopping


def cut(completion, stops):
    """(ids, logprobs, finished) of an endless completion, ended at its first stop id."""
    for length, token in enumerate(completion.token_ids, start=1):
        if token in stops:
            return completion.token_ids[:length], completion.logprobs[:length], True
    return completion.token_ids, completion.logprobs, False


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_stop_id_ends_a_row_and_is_its_last(temperature, count, decoder):
    options = dict(num_samples=4, max_new_tokens=30, temperature=temperature, seed=2)
    endless = flat(generate(decoder, PROMPTS, **options))
    frequent = Counter(token for completion in endless for token in completion.token_ids).most_common(count)
    stops = [token for token, _ in frequent]
    stopped = flat(generate(decoder, PROMPTS, stop_token_ids=stops, **options))
    for completion, free in zip(stopped, endless):
        token_ids, logprobs, finished = cut(free, stops)
        assert (completion.token_ids, completion.finished) == (token_ids, finished)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
    if temperature:  # every stop id stopped some row
        assert {completion.token_ids[-1] for completion in stopped if completion.finished} == set(stops)


def test_a_stop_on_the_last_slot_is_finished_and_one_slot_later_is_truncated(decoder):
    [[endless]] = generate(decoder, PROMPTS[:1], max_new_tokens=12, seed=4)
    place = next(i for i in range(5, 12) if endless.token_ids[i] not in endless.token_ids[:i])
    options = dict(stop_token_ids=[endless.token_ids[place]], seed=4)
    [[last]] = generate(decoder, PROMPTS[:1], max_new_tokens=place + 1, **options)
    assert (last.token_ids, last.finished) == (endless.token_ids[: place + 1], True)
    [[short]] = generate(decoder, PROMPTS[:1], max_new_tokens=place, **options)
    assert (short.token_ids, short.finished) == (endless.token_ids[:place], False)


def rows_through(decoder, call):
    """The result of `call()` and the [rows, time] of every pass through the embedding meanwhile."""
    shapes = []
    hook = decoder.model.embed_tokens.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    try:
        return call(), shapes
    finally:
        hook.remove()


def test_rows_that_leave_change_no_result(decoder, monkeypatch):
    def call():
        return generate(decoder, PROMPTS, num_samples=6, max_new_tokens=60, stop_token_ids=[7, 30, 51], seed=8)

    left, shapes = rows_through(decoder, call)
    assert len({rows for rows, _ in shapes[1:]}) > 2  # rows left, more than once
    assert len({len(completion.token_ids) for completion in flat(left)}) > 8
    for name, value in (("LEAVE_BELOW", 0), ("LEAVE_BELOW", 1), ("CHECK_EVERY", 1)):
        with monkeypatch.context() as patch:
            patch.setitem(getattr(model.sampler, name), "cpu", value)
            kept, shapes = rows_through(decoder, call)
        assert_same(flat(kept), flat(left))
        if (name, value) == ("LEAVE_BELOW", 0):
            assert {rows for rows, _ in shapes[1:]} == {30}


def test_decoding_ends_soon_after_the_last_row_has_stopped(decoder):
    def call():
        return generate(decoder, PROMPTS, max_new_tokens=500, stop_token_ids=range(83))

    groups, shapes = rows_through(decoder, call)
    assert [len(completion.token_ids) for completion in flat(groups)] == [1] * len(PROMPTS)
    assert len(shapes) <= 1 + model.sampler.CHECK_EVERY["cpu"]


# The work it does, and what it refuses


@pytest.mark.parametrize("num_samples", [1, 7])
def test_each_prompt_is_prefilled_once_whatever_the_number_of_samples(num_samples, decoder):
    _, shapes = rows_through(decoder, lambda: generate(decoder, PROMPTS, num_samples=num_samples, max_new_tokens=6))
    assert shapes == [(len(PROMPTS), 9)] + [(len(PROMPTS) * num_samples, 1)] * 5


def test_one_new_token_needs_the_prefill_alone(decoder):
    groups, shapes = rows_through(decoder, lambda: generate(decoder, PROMPTS, num_samples=3, max_new_tokens=1))
    assert shapes == [(len(PROMPTS), 9)]
    assert [len(completion.token_ids) for completion in flat(groups)] == [1] * 15


def test_no_prompts_give_no_completions_and_the_callers_prompts_stay_as_they_were(decoder):
    assert generate(decoder, [], max_new_tokens=3) == []
    prompts = [list(prompt) for prompt in PROMPTS]
    groups = generate(decoder, prompts, num_samples=2, max_new_tokens=3)
    assert prompts == PROMPTS
    assert [len(group) for group in groups] == [2] * len(PROMPTS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"num_samples": -2}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature .* not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p must lie in .*, not 1.01"),
        ({"top_p": float("nan")}, "top_p"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1, 83]]}, "83"),
        ({"prompts": [[4], [-1, 3]]}, "-1"),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused_with_its_value(change, named, decoder):
    options = dict(prompts=[[1, 2]], max_new_tokens=2) | change
    with pytest.raises(ValueError, match=named):
        generate(decoder, **options)
