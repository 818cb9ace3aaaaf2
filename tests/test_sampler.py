"""The sampler against transformers and probabilities written out: which tokens, how likely, and ends."""

import contextlib
import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_close
from reference import reference_model, same_weights
from torch.utils._pytree import tree_map_only
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import model.sampler
from model import Completion, generate
from model.sampler import DecodeBatch, GraphedStep, TokenChoice, random_uniforms, sample_tokens
from rl.batch import Sample, completion_logprobs, make_batch

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4, 4, 25], [19, 6, 40], [8, 1, 77, 50, 3, 9, 13]]
ALMOST_ONE = 1 - 2**-24  # the largest float32 below one, and the largest random number


@pytest.fixture(scope="module")
def reference():
    """A random model whose next token is far from certain, so that sampling has choices to get wrong."""
    reference = reference_model()
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    return reference


@pytest.fixture(scope="module")
def decoder(reference):
    return same_weights(reference)


@torch.no_grad()
def teacher_forced(reference, prompt, token_ids, temperature=1.0) -> list[float]:
    """Log-probabilities of `token_ids` after `prompt` by one uncached forward of transformers."""
    logits = reference(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


def flat(groups):
    return [completion for group in groups for completion in group]


def assert_same(ours, theirs):
    """Equal ids and endings, and equal log-probabilities up to the rounding of products of other sizes."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, one.finished) == (other.token_ids, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@torch.no_grad()
def test_greedy_decoding_equals_that_of_transformers(reference, decoder):
    """The prompts have unequal lengths."""
    groups = generate(decoder, PROMPTS, max_new_tokens=24, temperature=0)
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    for prompt, [completion] in zip(PROMPTS, groups):
        assert (
            completion.token_ids
            == reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        )
        # Greedy decoding reports log-probabilities at temperature 1.
        assert completion.logprobs == pytest.approx(
            teacher_forced(reference, prompt, completion.token_ids), abs=1e-4
        )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_reported_logprobs_are_transformers_and_trainings_own(temperature, reference, decoder):
    options = dict(num_samples=3, max_new_tokens=12, temperature=temperature, seed=3)
    groups = generate(decoder, PROMPTS, stop_token_ids=[7, 30], **options)
    samples = [
        Sample(prompt, c.token_ids, c.logprobs) for prompt, group in zip(PROMPTS, groups) for c in group
    ]
    for item in samples:
        exact = teacher_forced(reference, item.prompt_ids, item.completion_ids, temperature)
        assert item.old_logprobs == pytest.approx(exact, abs=1e-4)
    batch = make_batch(samples)
    assert_close(completion_logprobs(decoder, batch, temperature), batch.old_logprobs, atol=1e-5)


def warped(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The distribution that transformers would sample from, in float64: [rows, vocab]."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [
        (1.0, None, None), (0.5, None, None), (1.0, 1, None), (1.3, 4, None), (1.0, 500, None),
        (1.0, None, 0.3), (0.7, None, 0.9), (1.0, None, 1.0), (0.6, 20, 0.95), (1.5, 3, 0.6),
        (1.0, None, 1e-6),
    ],
)  # fmt: skip
def test_a_uniform_number_picks_the_token_of_the_inverse_cdf(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 31, generator=generator)
    uniforms = torch.rand(4000, generator=generator)
    sampled, logprobs = sample_tokens(logits, uniforms, 31, TokenChoice(temperature, top_k, top_p))
    probabilities = warped(logits, temperature, top_k, top_p)
    cumulative = probabilities.cumsum(-1)
    expected = (cumulative <= uniforms.double().numpy()[:, None]).sum(-1)
    clear = np.abs(cumulative - uniforms.numpy()[:, None]).min(-1) > 1e-5  # rounding cannot decide these rows
    assert clear.mean() > 0.99
    assert (sampled.numpy() == expected)[clear].all()
    assert (
        probabilities[np.arange(4000), sampled] > 0
    ).all()  # nothing outside the allowed set, unclear rows included
    full = torch.log_softmax(
        logits.double() / temperature, -1
    )  # log-probabilities are those before top-k and top-p
    assert_close(logprobs.double(), full.gather(-1, sampled[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 31, 40_000])
def test_extreme_uniforms_pick_a_possible_token(vocab, dtype, top_k):
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[8:16, vocab // 2 :] = -3e4  # probability zero at the end of the vocabulary
    logits[16:, : vocab // 2] = -3e4  # and at its start
    possible = [np.flatnonzero(row) for row in warped(logits, 1.0, top_k, None)]
    padded = torch.cat(
        (logits, torch.full((24, 3), 1e4, dtype=dtype)), dim=1
    )  # ids past the vocabulary are likeliest
    for uniform in (ALMOST_ONE, 0.0):
        sampled, logprobs = sample_tokens(padded, torch.full((24,), uniform), vocab, TokenChoice(top_k=top_k))
        assert (logprobs > -50).all()
        assert all(token in row for token, row in zip(sampled.tolist(), possible))
        if vocab == 31:  # few enough that no rounding blurs the ends
            assert sampled.tolist() == [row[-1] if uniform else row[0] for row in possible]


def test_a_long_tail_of_rare_tokens_keeps_its_share():
    """The vocabulary is as large as Qwen3's."""
    vocab = 151_669
    probabilities = torch.full(
        (vocab,), 2e-8, dtype=torch.float64
    )  # too small to be added to 0.997 in float32
    probabilities[0] = 1 - probabilities[1:].sum()
    uniforms = torch.linspace(0.9975, 0.9999, 12)
    sampled, _ = sample_tokens(probabilities.log().float().expand(12, vocab), uniforms, vocab, TokenChoice())
    expected = torch.searchsorted(probabilities.cumsum(0), uniforms.double(), right=True)
    assert (sampled - expected).abs().max() < 0.002 * vocab
    assert sampled.min() > 0
    assert len(set(sampled.tolist())) == 12


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}], ids=str)
def test_an_id_past_the_vocabulary_is_never_sampled(options):
    """Its logit may be the largest."""
    reference = reference_model(seed=2)
    with (
        torch.no_grad()
    ):  # of 83 ids the last 20 are padding of the embedding, with by far the largest logits
        reference.lm_head.weight[63:] = 60 * torch.randn(20, 44, generator=torch.Generator().manual_seed(0))
    decoder = same_weights(reference)
    decoder.num_tokens = 63
    groups = generate(decoder, PROMPTS, num_samples=6, max_new_tokens=10, **options)
    assert max(max(completion.token_ids) for completion in flat(groups)) < 63


@pytest.mark.parametrize("stops", [[], [7, 30]], ids=str)
def test_a_completion_does_not_depend_on_its_batch(stops, decoder):
    """Without a stop it has max_new_tokens."""
    prompts = PROMPTS + PROMPTS[:1]  # copies count as groups of their own
    options = dict(num_samples=3, max_new_tokens=14, seed=11, stop_token_ids=stops)
    whole = generate(decoder, prompts, **options)
    for number, group in enumerate(whole):
        assert_same(group, generate(decoder, prompts if number == 5 else [prompts[number]], **options)[-1])
        assert all(len(c.token_ids) == len(c.logprobs) == 14 or c.finished for c in group)
    assert any(completion.finished for completion in flat(whole)) == bool(stops)
    assert_same(flat(generate(decoder, prompts[4::-1], **options)[::-1]), flat(whole[:5]))
    assert_same(flat(generate(decoder, prompts, **options, only=slice(1, None, 2))), flat(whole[1::2]))
    assert_same(
        flat(group[:3] for group in generate(decoder, prompts, **options | {"num_samples": 5})), flat(whole)
    )
    longer = flat(generate(decoder, prompts, **options | {"max_new_tokens": 20}))
    assert [completion.token_ids[:14] for completion in longer] == [
        completion.token_ids for completion in flat(whole)
    ]


def test_every_completion_has_random_numbers_of_its_own():
    prompts = [[1, 2, 3], [1, 23], [12, 3], [3, 2, 1], [1, 2, 3]]
    uniforms = torch.stack(
        [random_uniforms(prompts, 4, 80, seed) for seed in (0, 1)]
    )  # [seeds, prompts, samples, tokens]
    assert len(set(uniforms.flatten().tolist())) == uniforms.numel()
    assert torch.equal(random_uniforms([[1, 2, 3]] * 3, 5, 90, 0)[:2, :4, :80], uniforms[0, [0, 4]])
    counts = torch.histc(uniforms, 20, 0, 1)  # of about 160
    assert counts.min() > 110
    assert counts.max() < 210


def forwards(decoder, call):
    """The result of `call()` and the [rows, time] of every forward meanwhile."""
    shapes = []

    def note(module, arguments, output):
        shapes.append(tuple(arguments[0].shape))

    with decoder.model.embed_tokens.register_forward_hook(note):
        return call(), shapes


def test_a_prompt_is_prefilled_once_and_forwards_are_few(decoder):
    for length in (6, 1):  # one new token needs the prefill alone
        call = partial(generate, decoder, PROMPTS, num_samples=7, max_new_tokens=length)
        assert forwards(decoder, call)[1] == [(len(PROMPTS), 9)] + [(len(PROMPTS) * 7, 1)] * (length - 1)
    assert forwards(decoder, partial(generate, decoder, [], max_new_tokens=6)) == ([], [])
    all_stop = partial(generate, decoder, PROMPTS, max_new_tokens=500, stop_token_ids=range(83))
    # Decoding ends soon after the last row has finished.
    assert len(forwards(decoder, all_stop)[1]) <= 1 + model.sampler.CHECK_EVERY["cpu"]


BAD = [
    ("num_samples", {"num_samples": 0}), ("max_new_tokens", {"max_new_tokens": 0}), ("top_k", {"top_k": 0}),
    ("temperature .*-0.1", {"temperature": -0.1}), ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}), ("top_p .*1.01", {"top_p": 1.01}),
    ("top_p", {"top_p": 0}), ("at least one id", {"prompts": [[1], []]}), ("83", {"prompts": [[1, 83]]}),
    ("-1", {"prompts": [[4], [-1, 3]]}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD, ids=str)
def test_an_argument_out_of_its_range_is_refused_by_name(message, change, decoder):
    with pytest.raises(ValueError, match=message):
        generate(decoder, **{"prompts": [[1, 2]], "max_new_tokens": 2} | change)


STOPS = (7, 30, 51, 12)
COPIES = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4], [5, 17, 3, 44, 9]]
UNIFORMS = random_uniforms(COPIES, 5, 40, seed=3)


@torch.inference_mode()
def one_by_one(decoder, choice) -> list[Completion]:
    """Without a cache: every token comes from a forward over all tokens before it."""
    completions = []
    for prompt, uniforms in (
        (prompt, uniforms) for prompt, group in zip(COPIES, UNIFORMS) for uniforms in group
    ):
        ids, logprobs = [], []
        while len(ids) < len(uniforms) and not set(ids[-1:]) & set(STOPS):
            logits = decoder(torch.tensor([prompt + ids]))[:, -1]
            token, logprob = sample_tokens(logits, uniforms[len(ids), None], decoder.num_tokens, choice)
            ids.append(token.item())
            logprobs.append(logprob.item())
        completions.append(Completion(ids, logprobs, ids[-1] in STOPS))
    return completions


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(
    "choice", [TokenChoice(), TokenChoice(0.7), TokenChoice(0), TokenChoice(1.2, 4, 0.8)], ids=str
)
@torch.inference_mode()
def test_a_batch_gives_what_the_plain_sampler_gives(choice, block, decoder, monkeypatch):
    monkeypatch.setitem(model.cache.BLOCK, "cpu", block)
    batch = DecodeBatch(decoder, COPIES, UNIFORMS, torch.tensor(STOPS), choice)
    for _ in batch.run():
        pass
    assert_same(flat(batch.completions()), one_by_one(decoder, choice))


def test_a_stop_on_the_last_slot_counts_as_finished(decoder):
    """With one token less it does not."""
    options = dict(num_samples=5, stop_token_ids=STOPS, seed=3)
    free = flat(generate(decoder, COPIES, max_new_tokens=40, **options))
    last = max(len(completion.token_ids) for completion in free if completion.finished)
    for length in (last, last - 1):
        for ours, other in zip(
            flat(generate(decoder, COPIES, max_new_tokens=length, **options)), free, strict=True
        ):
            assert ours.token_ids == other.token_ids[:length]
            assert ours.finished == (other.finished and len(other.token_ids) <= length)


@pytest.mark.parametrize(("compact_below", "check_every", "prefilled"), [(0.9, 8, 99), (0, 8, 1), (1, 1, 15)])
def test_generate_gives_what_the_plain_sampler_gives(
    compact_below, check_every, prefilled, decoder, monkeypatch
):
    """The work may be cut into any parts."""
    monkeypatch.setattr(model.sampler, "PREFILL_TOKENS", prefilled)
    monkeypatch.setitem(model.sampler.COMPACT_BELOW, "cpu", compact_below)
    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", check_every)
    expected = one_by_one(decoder, TokenChoice())
    for room in (None, 450, 130, 49):  # one batch; several; parts of groups; one sample at a time
        options = dict(num_samples=5, max_new_tokens=40, stop_token_ids=STOPS, seed=3, max_cache_tokens=room)
        groups, shapes = forwards(decoder, lambda: generate(decoder, COPIES, **options))  # noqa: B023
        assert_same(flat(groups), expected)
        if room is None:
            prompts, rows = ([rows for rows, time in shapes if (time == 1) == own] for own in (False, True))
            assert prompts == {99: [4], 1: [1] * 4, 15: [2, 2]}[prefilled]
            assert set(rows) == {20} if compact_below == 0 else len(set(rows)) > 2


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(0), TokenChoice(0.8, 5, 0.9)], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@torch.inference_mode()
def test_a_step_never_waits_for_the_device(dropped, choice, decoder):
    batch = DecodeBatch(decoder, COPIES, UNIFORMS, torch.tensor(STOPS), choice)
    batch.start()
    count = 12 if dropped else 2
    for stored in range(1, count):
        batch.cache.reserve(stored)
        batch.step()
    finished, _ = batch.endings(count)
    if dropped:
        batch.drop(finished, below=1.0)
        assert 0 < len(batch.active) < 20
    batch.model = copy.deepcopy(decoder).to("meta")
    for holder in (batch, batch.cache):  # a tensor on the meta device has no numbers: reading one is an error
        vars(holder).update(tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), vars(holder)))
    batch.cache.reserve(count)
    batch.step()
    assert batch.token_ids.is_meta
    assert batch.cache.stored_on_device.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.drop(finished.to("meta"), below=0.5)  # which has to wait


def test_a_graph_is_recorded_on_a_second_call_and_replayed(monkeypatch):
    log, recording = [], []

    class Graph:
        def replay(self):
            log.append(("replay", self.recorded))

    @contextlib.contextmanager
    def record(graph):
        recording.append(graph)
        yield
        recording.pop()

    def function():
        if recording:  # nothing runs while a graph is recorded
            recording[-1].recorded = current
        log.append(("record" if recording else "run", current))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = GraphedStep(function)
    for current in ["a"] * 4 + ["b"] * 2 + ["c"] + ["a"] * 2:  # shapes
        step(current)
    words = [
        "run",
        "record",
        "replay",
        "replay",
        "replay",
        "run",
        "record",
        "replay",
        "run",
        "run",
        "record",
        "replay",
    ]
    assert log == list(zip(words, "aaaaabbbcaaa"))
