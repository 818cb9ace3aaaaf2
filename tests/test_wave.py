"""A wave decodes as the plain sampler does, in steps that a CUDA graph could record."""

import contextlib
import copy

import pytest
import torch
from reference import random_ids, reference_model, same_weights

import model.sampler
from model.sampler import GraphedStep
from model.sampler import random_streams
from model.sampler import generate, plain_completion
from model.sampler import DecodeBatch, prefill

PROMPTS = [[5, 17, 3, 44, 9], [8], [61, 2, 2, 30, 71, 12, 4], [5, 17, 3, 44, 9]]
STOPS = [7, 30, 51, 12]


@pytest.fixture(scope="module")
def decoder():
    reference = reference_model(seed=7)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    return same_weights(reference)


def wave_of(decoder, static, distribution=(1.0, None, None), num_samples=5, max_new_tokens=40):
    uniforms = random_streams(PROMPTS, num_samples, max_new_tokens, seed=3)
    return DecodeBatch(decoder, PROMPTS, uniforms, torch.tensor(STOPS), distribution, static), uniforms


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("distribution", [(1.0, None, None), (0.7, None, None), (0, None, None), (1.2, 4, 0.8)], ids=str)
@torch.inference_mode()
def test_a_wave_gives_what_the_plain_sampler_gives(distribution, static, decoder):
    wave, uniforms = wave_of(decoder, static, distribution)
    for _ in wave.run():
        pass
    for prompt, streams, group in zip(PROMPTS, uniforms, wave.groups(), strict=True):
        for stream, completion in zip(streams, group, strict=True):
            plain = plain_completion(decoder, prompt, stream, STOPS, distribution)
            assert (completion.token_ids, completion.finished) == (plain.token_ids, plain.finished)
            assert completion.logprobs == pytest.approx(plain.logprobs, abs=2e-5)


def test_generate_gives_what_the_plain_sampler_gives(decoder):
    """Over several waves, one of them a part of a group."""
    options = dict(num_samples=5, max_new_tokens=40, stop_token_ids=STOPS, seed=3)
    with torch.inference_mode():
        uniforms = random_streams(PROMPTS, 5, 40, seed=3)
        plain = [
            plain_completion(decoder, prompt, stream, STOPS, (1.0, None, None))
            for prompt, streams in zip(PROMPTS, uniforms, strict=True)
            for stream in streams
        ]
    for room in (None, 450, 130):
        found = [completion for group in generate(decoder, PROMPTS, **options, max_cache_tokens=room) for completion in group]
        assert [(c.token_ids, c.finished) for c in found] == [(c.token_ids, c.finished) for c in plain]


def without_data(wave: DecodeBatch) -> DecodeBatch:
    """The same wave with shapes and no numbers: whatever asks for a number fails on it."""
    wave = copy.copy(wave)
    wave.model, wave.cache = copy.deepcopy(wave.model).to("meta"), copy.copy(wave.cache)
    for holder in (wave, wave.cache):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.to("meta"))
    for name in ("prompt_keys", "prompt_values"):
        setattr(wave.cache, name, [tensor.to("meta") for tensor in getattr(wave.cache, name)])
    for name in ("keys", "values"):
        setattr(wave.cache, name, [[b.to("meta") for b in blocks] for blocks in getattr(wave.cache, name)])
    return wave


@pytest.mark.parametrize("distribution", [(1.0, None, None), (0, None, None), (0.8, 5, 0.9)], ids=str)
@pytest.mark.parametrize("rows_have_left", [False, True])
@torch.inference_mode()
def test_a_step_asks_the_device_for_nothing(rows_have_left, distribution, decoder):
    wave, _ = wave_of(decoder, True, distribution)
    wave.cache.reserve(1)
    wave.step()
    if rows_have_left:
        wave.retire(2, leave_below=1.0)
        wave.cache.select(torch.arange(1, len(wave.samples), 2))
        for name in ("samples", "uniforms", "token_ids", "logprobs"):
            setattr(wave, name, getattr(wave, name)[1::2])
    ghost = without_data(wave)
    ghost.cache.reserve(2)
    ghost.step()
    assert ghost.token_ids.is_meta and ghost.cache.stored.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        ghost.retire(3, leave_below=0.5)  # which has to ask


def test_a_graph_is_recorded_on_the_second_call_with_a_shape_and_replayed_from_then_on(monkeypatch):
    effects, log, recording = [], [], []

    class Graph:
        def replay(self):
            log.append("replay")
            effects.append(self.recorded)

    @contextlib.contextmanager
    def record(graph, pool):
        assert pool == "pool"
        log.append("record")
        recording.append(graph)
        yield
        recording.pop()

    def function():
        if recording:  # nothing runs while a graph is recorded
            recording[-1].recorded = current
        else:
            log.append("run")
            effects.append(current)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    step = GraphedStep(function)
    for current in [(4, 64)] * 4 + [(4, 128)] * 2 + [(2, 128)] + [(1, 128)] * 3:
        step(current)
    assert effects == [(4, 64)] * 4 + [(4, 128)] * 2 + [(2, 128)] + [(1, 128)] * 3
    assert log == (
        ["run", "record", "replay", "replay", "replay"] + ["run", "record", "replay"] + ["run"]
        + ["run", "record", "replay", "replay"]
    )  # fmt: skip


@torch.inference_mode()
def test_rows_leave_when_few_enough_go_on(decoder):
    wave, _ = wave_of(decoder, False)
    for count in range(1, 25):
        wave.cache.reserve(count)
        wave.step()
    stopped = torch.isin(wave.token_ids[:, :25], torch.tensor(STOPS)).any(1)
    share = 1 - float(stopped.float().mean())
    assert 0.2 < share < 0.9
    tokens = wave.retire(25, leave_below=share - 0.01)
    assert len(wave.samples) == 20 and not any(wave.completions)
    assert wave.retire(25, leave_below=share + 0.01) == tokens  # what is done does not depend on who has left
    assert wave.samples.tolist() == [row for row in range(20) if not stopped[row]]
    assert [completion is not None for completion in wave.completions] == stopped.tolist()
    assert len(wave.cache.prompt_of) == len(wave.token_ids) == len(wave.uniforms) == len(wave.samples)


@pytest.mark.parametrize("at_once", [1, 8, 15])
@torch.inference_mode()
def test_a_prefill_in_parts_is_a_prefill(at_once, decoder, monkeypatch):
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 7, 1, 5, 6)]
    logits, cache = prefill(decoder, prompts)
    monkeypatch.setattr(model.sampler, "PREFILL_TOKENS", at_once)
    parts, filled = prefill(decoder, prompts)
    torch.testing.assert_close(parts, logits, rtol=0, atol=1e-5)
    assert filled.lengths.tolist() == cache.lengths.tolist() == [3, 7, 1, 5, 6]
    for ours, whole in zip(filled.keys + filled.values, cache.keys + cache.values, strict=True):
        for row, length in enumerate((3, 7, 1, 5, 6)):
            torch.testing.assert_close(ours[row, :, :length], whole[row, :, :length], rtol=0, atol=1e-5)
