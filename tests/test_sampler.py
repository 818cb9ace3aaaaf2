"""The sampler against transformers and probabilities written out: which tokens, how likely, and ends."""

import contextlib
import copy
import functools
from dataclasses import replace

import pytest
import torch
from helpers import PROMPTS, assert_close
from reference import logprobs_after, reference_model, same_weights
from torch.utils._pytree import tree_map_only
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import model.sampler
from model import Completion, generate
from model.sampler import DecodeBatch, GraphedStep, TokenChoice, random_uniforms, sample_tokens
from rl.batch import Sample, completion_logprobs, make_batch

REPEATED = [*PROMPTS[:3], PROMPTS[0]]
STOPS = (7, 30, 51, 12)
OPTIONS = {"num_samples": 3, "max_new_tokens": 24, "stop_token_ids": STOPS, "seed": 3}
UNIFORMS = random_uniforms(REPEATED, 3, 24, seed=3)
ALMOST_ONE = 1 - 2**-24  # the largest float32 below one, and the largest random number
TRUNCATED = TokenChoice(1.2, top_k=4, top_p=0.8)


@pytest.fixture(scope="module")
def reference():
    """A random model whose next token is far from certain, so that sampling has choices to get wrong."""
    reference = reference_model()
    reference.lm_head.weight.data *= 0.5
    return reference


@pytest.fixture(scope="module")
def decoder(reference):
    return same_weights(reference)


@pytest.fixture(scope="module")
def one_by_one(decoder):
    """The completions without a cache: every token comes from a forward over all tokens before it."""

    @functools.cache
    @torch.inference_mode()
    def completions(choice):
        found = []
        for row, uniforms in enumerate(UNIFORMS.flatten(0, 1)):
            completion = Completion([], [], False)
            for uniform in uniforms:
                ids = REPEATED[row // 3] + completion.token_ids
                logits = decoder(torch.tensor([ids]))[:, -1]
                token, logprob = sample_tokens(logits, uniform[None], decoder.num_tokens, choice)
                completion.token_ids.append(token.item())
                completion.logprobs.append(logprob.item())
                if token in STOPS:
                    completion = replace(completion, finished=True)
                    break
            found.append(completion)
        return found

    return completions


def flat(groups):
    return [completion for group in groups for completion in group]


def assert_same(ours, theirs):
    """Equal ids and endings, and equal log-probabilities up to the rounding of products of other sizes."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@torch.no_grad()
def test_reported_logprobs_are_transformers_and_trainings_own(temperature, reference, decoder):
    """Those of greedy decoding are at temperature 1. The prompts have unequal lengths."""
    samples = []
    for prompt, group in zip(REPEATED, generate(decoder, REPEATED, **OPTIONS, temperature=temperature)):
        for completion in group:
            ids = completion.token_ids
            exact = logprobs_after(reference, prompt, ids, temperature or 1)
            assert completion.logprobs == pytest.approx(exact.tolist(), abs=1e-4)
            samples.append(Sample(prompt, ids, completion.logprobs))
            if temperature == 0:
                logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                assert ids == logits.argmax(-1).tolist()
    batch = make_batch(samples)
    assert_close(completion_logprobs(decoder, batch, temperature), batch.old_logprobs, atol=1e-5)


def warped(logits, choice):
    """The distribution that transformers would sample from, in float64: [rows, vocab]."""
    scores = TemperatureLogitsWarper(float(choice.temperature))(None, logits.double())
    if choice.top_k is not None:
        scores = TopKLogitsWarper(choice.top_k)(None, scores)
    if choice.top_p is not None:
        scores = TopPLogitsWarper(choice.top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "choice",
    [
        TokenChoice(0.5),
        TokenChoice(top_k=1),
        TokenChoice(1.3, top_k=4),
        TokenChoice(top_k=500),
        TokenChoice(0.7, top_p=0.9),
        TokenChoice(top_p=1e-6),
        TokenChoice(1.5, top_k=3, top_p=0.6),
    ],
    ids=str,
)
def test_a_uniform_number_picks_the_token_of_the_inverse_cdf(choice):
    """Log-probabilities are those before top-k and top-p."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 31, generator=generator)
    uniforms = torch.rand(4000, generator=generator)
    sampled, logprobs = sample_tokens(logits, uniforms, 31, choice)
    probabilities = warped(logits, choice)
    distances = probabilities.cumsum(-1) - uniforms.double()[:, None]
    expected = (distances <= 0).sum(-1)
    clear = distances.abs().amin(-1) > 1e-5  # rounding cannot decide these rows
    assert clear.double().mean() > 0.99
    assert torch.equal(sampled[clear], expected[clear])
    assert (probabilities.gather(-1, sampled[:, None]) > 0).all()  # unclear rows included
    full = torch.log_softmax(logits.double() / choice.temperature, -1)
    assert_close(logprobs.double(), full.gather(-1, sampled[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2, torch.float32), (31, torch.bfloat16), (40_000, torch.float32)]
)
def test_extreme_uniforms_pick_a_possible_token(vocab, dtype, uniform, top_k):
    """Ids past the vocabulary are the likeliest."""
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[8:16, vocab // 2 :] = -3e4  # probability zero at the end of the vocabulary
    logits[16:, : vocab // 2] = -3e4  # and at its start
    padded = torch.nn.functional.pad(logits, (0, 3), value=1e4)
    choice = TokenChoice(top_k=top_k)
    sampled, _ = sample_tokens(padded, torch.full((24,), uniform), vocab, choice)
    assert sampled.max() < vocab
    assert (warped(logits, choice).gather(-1, sampled[:, None]) > 0).all()


def test_a_long_tail_of_rare_tokens_keeps_its_share():
    """The vocabulary is as large as Qwen3's."""
    vocab = 151_669
    tail = torch.full((vocab - 1,), 2e-8, dtype=torch.float64)  # too small to be added to 0.997 in float32
    probabilities = torch.cat((1 - tail.sum(0, keepdim=True), tail))
    uniforms = torch.linspace(0.9975, 0.9999, 12)
    sampled, _ = sample_tokens(probabilities.log().float().expand(12, vocab), uniforms, vocab, TokenChoice())
    expected = torch.searchsorted(probabilities.cumsum(0), uniforms.double(), right=True)
    assert (sampled - expected).abs().max() < 0.002 * vocab


def test_an_id_past_the_vocabulary_is_never_sampled(decoder):
    """Its logit may be the largest."""
    decoder = copy.deepcopy(decoder)
    decoder.num_tokens = 63
    decoder.lm_head.weight.data[63:] *= 100
    groups = generate(decoder, REPEATED, num_samples=6, max_new_tokens=10)
    assert max(max(completion.token_ids) for completion in flat(groups)) < 63


def test_a_completion_does_not_depend_on_its_batch(decoder):
    whole = flat(generate(decoder, REPEATED, **OPTIONS))
    alone = [generate(decoder, [prompt], **OPTIONS)[0] for prompt in PROMPTS[:3]]
    assert_same(flat(alone), whole[:9])
    every_second = generate(decoder, REPEATED, **OPTIONS, only=slice(1, None, 2))
    assert_same(flat(every_second), whole[3:6] + whole[9:])
    more = generate(decoder, REPEATED, **OPTIONS | {"num_samples": 5})
    assert_same(flat(group[:3] for group in more), whole)


def test_a_shorter_limit_cuts_completions(decoder):
    """A stop on the last slot counts as finished."""
    whole = flat(generate(decoder, REPEATED, **OPTIONS))
    last = max(len(completion.token_ids) for completion in whole if completion.finished)
    for limit in (last, last - 1):
        shorter = flat(generate(decoder, REPEATED, **OPTIONS | {"max_new_tokens": limit}))
        for ours, other in zip(shorter, whole, strict=True):
            assert ours.token_ids == other.token_ids[:limit]
            assert ours.finished == (other.finished and len(other.token_ids) <= limit)


def test_every_completion_has_random_numbers_of_its_own():
    prompts = [[1, 2, 3], [1, 23], [12, 3], [3, 2, 1], [1, 2, 3]]
    uniforms = random_uniforms(prompts, 4, 80, 0)
    other_seed = random_uniforms(prompts, 4, 80, 1)
    drawn = torch.stack((uniforms, other_seed))
    assert len(drawn.unique()) == drawn.numel()
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    more = random_uniforms([[1, 2, 3]] * 3, 5, 90, 0)
    assert torch.equal(more[:2, :4, :80], uniforms[[0, 4]])


def forwards(decoder, *arguments, **options):
    """What `generate` returns, and the [rows, time] of every forward meanwhile."""
    shapes = []

    def note(module, inputs, output):
        shapes.append(tuple(inputs[0].shape))

    with decoder.model.embed_tokens.register_forward_hook(note):
        return generate(decoder, *arguments, **options), shapes


def test_a_prompt_is_prefilled_once_and_forwards_are_few(decoder):
    """One new token needs the prefill alone, and decoding ends soon after the last row has finished."""
    for length in (6, 1):
        _, shapes = forwards(decoder, REPEATED, num_samples=7, max_new_tokens=length)
        assert shapes == [(4, 9)] + [(4 * 7, 1)] * (length - 1)
    assert forwards(decoder, [], max_new_tokens=6) == ([], [])
    _, shapes = forwards(decoder, REPEATED, max_new_tokens=500, stop_token_ids=range(83))
    assert len(shapes) <= 1 + model.sampler.CHECK_EVERY["cpu"]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("num_samples 0", {"num_samples": 0}),
        ("max_new_tokens 0", {"max_new_tokens": 0}),
        ("top_k", {"top_k": 0}),
        ("temperature .*-0.1", {"temperature": -0.1}),
        ("temperature .*nan", {"temperature": float("nan")}),
        ("top_p .*1.01", {"top_p": 1.01}),
        ("at least one id", {"prompts": [[1], []]}),
        ("83", {"prompts": [[1, 83]]}),
        ("-1", {"prompts": [[4], [-1, 3]]}),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused_by_name(message, change, decoder):
    with pytest.raises(ValueError, match=message):
        generate(decoder, **{"prompts": [[1, 2]], "max_new_tokens": 2} | change)


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(0), TRUNCATED], ids=str)
@torch.inference_mode()
def test_a_batch_gives_what_the_plain_sampler_gives(choice, decoder, one_by_one, monkeypatch):
    for block in (1, 16):
        monkeypatch.setitem(model.cache.BLOCK, "cpu", block)
        batch = DecodeBatch(decoder, REPEATED, UNIFORMS, torch.tensor(STOPS), choice)
        list(batch.run())
        assert_same(flat(batch.completions()), one_by_one(choice))


@pytest.mark.parametrize(
    ("compact_below", "check_every", "prefilled", "prompts", "room"),
    [(0.9, 8, 99, [4], 130), (0, 8, 1, [1] * 4, 70), (1, 1, 18, [2, 2], 33)],
)
def test_generate_gives_what_the_plain_sampler_gives(
    compact_below, check_every, prefilled, prompts, room, decoder, one_by_one, monkeypatch
):
    """The work may be cut into any parts: one batch; a batch per group; two samples or one at a time."""
    expected = one_by_one(TokenChoice())
    monkeypatch.setattr(model.sampler, "PREFILL_TOKENS", prefilled)
    monkeypatch.setitem(model.sampler.COMPACT_BELOW, "cpu", compact_below)
    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", check_every)
    assert_same(flat(generate(decoder, REPEATED, **OPTIONS, max_cache_tokens=room)), expected)
    groups, shapes = forwards(decoder, REPEATED, **OPTIONS)
    assert_same(flat(groups), expected)
    assert [rows for rows, time in shapes if time > 1] == prompts
    fewest = min(rows for rows, time in shapes if time == 1)
    assert (fewest < 12) == (compact_below > 0)  # rows that have finished are dropped


@pytest.mark.parametrize(("count", "choice"), [(2, TokenChoice(0)), (12, TRUNCATED)])
@torch.inference_mode()
def test_a_step_never_waits_for_the_device(count, choice, decoder):
    """A tensor on the meta device has no numbers: reading one is an error."""
    batch = DecodeBatch(decoder, REPEATED, UNIFORMS, torch.tensor(STOPS), choice)
    batch.start()
    for stored in range(1, count):
        batch.cache.reserve(stored)
        batch.step()
    finished, _ = batch.endings(count)
    batch.drop(finished, below=1.0)
    batch.model = copy.deepcopy(decoder).to("meta")
    for holder in (batch, batch.cache):
        vars(holder).update(tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), vars(holder)))
    batch.cache.reserve(count)
    batch.step()
    assert batch.token_ids.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.drop(finished.to("meta"), below=0.5)  # which has to wait


def test_a_graph_is_recorded_on_a_second_call_and_replayed(monkeypatch):
    log, recording = [], []

    class Graph:
        def replay(self):
            log.append("replay " + self.recorded)

    @contextlib.contextmanager
    def record(graph):
        recording.append(graph)
        yield
        recording.pop()

    def function():
        if recording:  # nothing runs while a graph is recorded
            recording[-1].recorded = shape
        else:
            log.append("run " + shape)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = GraphedStep(function)
    for shape in "aaabba":
        step(shape)
    assert log == ["run a", "replay a", "replay a", "run b", "replay b", "run a"]
