"""The benchmarks run, at tiny sizes, and compare what they say they compare."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def test_ours_and_theirs_sample_the_planned_lengths():
    from common import TINY, Workload, random_model, random_prompts
    from sampler import Case, our_generation, their_generation

    work = Workload(prompts=2, samples=3, prompt_length=5, new_tokens=12)
    case = Case(TINY, torch.float32, work, lengths=np.array([1, 12, 7, 12, 2, 3]))
    model = random_model(TINY, torch.float32, "cpu")
    prompts = random_prompts(TINY.vocab_size, count=2, length=5)
    our_generation(case, model, prompts)()  # each of them asserts its lengths
    their_generation(case, model, prompts)()


def test_both_ways_of_an_update_give_the_same_logprobs():
    from common import TINY, random_model
    from update import Way, completion_logprobs, plain_logprobs, random_batch

    model = random_model(TINY, torch.float32, "cpu")
    batch = random_batch(TINY.vocab_size, prompts=2, samples=3, prompt_length=5, length=4)
    plain = plain_logprobs(model, batch).view(6, 4)
    torch.testing.assert_close(completion_logprobs(model, batch), plain)
    assert 0 < Way(model, batch, checkpointing=True).kept_bytes() < Way(model, batch).kept_bytes()


def test_the_gpu_benchmark_writes_json_and_a_table(tmp_path):
    import gpu

    parts = ("decoding", "whole_step")
    update = "adamw8bit, stochastic, checkpointing"
    gpu.main(gpu.Settings(out=tmp_path, small=True, parts=parts, updates=(update,)))
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found["decoding"]["small x 4 rows"]["tokens per second"] > 0
    assert found["whole_step"][update]["peak_memory_bytes"] > 0, found["whole_step"]
    assert "## whole step" in (tmp_path / "gpu.md").read_text()
