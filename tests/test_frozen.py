"""What the code computes, pinned: a change of structure must leave these numbers as they are.

`python tests/test_frozen.py` writes tests/frozen.json anew. Do that only for a change that is meant to alter what is
sampled or learned, and say so in its commit.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Problem  # noqa: E402
from model import generate, load_model  # noqa: E402
from rl import grpo_loss, score  # noqa: E402
from rl.batch import Sample, make_batch, score_completions  # noqa: E402

STORED = Path(__file__).with_name("frozen.json")
UNSTABLE = ("seconds", "memory", "tokens_per_second", "micro_batch_tokens")  # of the machine, not of the code
PROBLEM = Problem((79, 60, 17), 36)
TEXTS = [
    "79-60</think><answer>79 - 60 + 17</answer>",
    "</think>\n<answer>(79 - 60) + 17 = 36</answer> and more",
    "</think>79 - 60 + 17 = 36 <answer>36</answer>",
    "</think><answer>36</answer>",
    "</think><answer>79 - 60 + 17 + 0</answer>",
    "</think><answer>79 + 60 - 17</answer>",
    "</think><answer>(79 + 17) / (60 / 20)</answer>",
    "</think><answer>60 - 79 + 17</answer>",
    "</think><answer>-(60 - 79) + 17</answer>",
    "</think><answer>79 - 60 + 17</answer><answer>79 - 60 + 17</answer>",
    "<answer>79 - 60 + 17</answer></think><answer>79 - 60 + 17</answer>",
    "<answer>79 - 60 + 17</answer>",
    "</think>79 - 60 + 17",
    "</think><answer>2 ** 5</answer>",
    "</think><answer>79 - 60 + 1 7</answer>",
    "<think>a</think><answer>79 - 60 + 17</answer>",
    "",
]
TARGETS = [36, 37, 46, 47, 26, 25]


def verdicts() -> list:
    """[outcome, reward] of each text, for each target and both kinds of prompt."""
    found = []
    for thinking in (True, False):
        for target in TARGETS:
            for text in TEXTS:
                verdict = score(text, Problem(PROBLEM.numbers, target), thinking=thinking)
                found.append([verdict.outcome, verdict.reward])
    return found


def ragged_samples() -> list[Sample]:
    """Unequal lengths, prompts shared by three, by two and by nobody; ratios on both sides of the clip."""
    rng = random.Random(7)
    prompts = [[rng.randrange(360) for _ in range(length)] for length in (9, 4, 1, 6)]
    samples = []
    for prompt, count in zip(prompts, (3, 2, 1, 1), strict=True):
        for _ in range(count):
            completion = [rng.randrange(360) for _ in range(rng.randint(1, 14))]
            old_logprobs = [rng.gauss(-12.0, 4.0) for _ in completion]
            samples.append(Sample(prompt, completion, old_logprobs, rng.gauss(0.0, 1.0)))
    return samples


def gradients() -> dict:
    """Loss, entropy and, for each weight matrix, the norm of its gradient and its product with fixed random numbers."""
    model, _ = load_model("tiny-256", dtype=torch.float64)
    batch = make_batch(ragged_samples())
    found = {}
    for aggregation, kl_coef in (("token", 0.0), ("sequence", 0.3), ("constant", 0.0)):
        logprobs, entropy = score_completions(model, batch, temperature=0.8)
        reference = logprobs.detach() - 0.1
        loss = grpo_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, 0.2, 0.3,
            aggregation=aggregation, ref_logprobs=reference, kl_coef=kl_coef,
        )  # fmt: skip
        loss.backward()
        values = {"loss": loss.item(), "entropy": entropy.sum().item()}
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values[name] = [parameter.grad.norm().item(), (parameter.grad * direction).sum().item()]
            parameter.grad = None
        found[aggregation] = values
    return found


def completions() -> list:
    """[ids, log-probabilities] of every completion, for several ways of sampling."""
    model, tokenizer = load_model("tiny-256")
    problems = [Problem((5, 16, 11), 32), Problem((1, 2, 3, 20), 47), Problem((20, 19, 18), 10)]
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    ways = [
        dict(num_samples=3, temperature=1.0),
        dict(num_samples=2, temperature=0.7, top_k=20, top_p=0.9),
        dict(num_samples=1, temperature=0.0),
        dict(num_samples=3, temperature=1.0, max_cache_tokens=260),
    ]
    found = []
    for way in ways:
        options = dict(max_new_tokens=70, stop_token_ids=tokenizer.stop_token_ids, seed=11) | way
        for group in generate(model, prompts, **options):
            found += [[c.token_ids, [round(x, 5) for x in c.logprobs], c.finished] for c in group]
    return found


def prompt_ids(tokenizer, problem: Problem) -> list[int]:
    numbers = ", ".join(map(str, problem.numbers))
    text = (
        f"<|im_start|>user\nUse each of the numbers {numbers} exactly once to make {problem.target}. "
        "Only + - * / and parentheses are allowed. Work it out inside <think> </think>, "
        "then put the final expression inside <answer> </answer>.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    return tokenizer.encode(text)


def command(*arguments) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def smoke_run(folder: Path) -> list[dict]:
    """The metrics of GRPO, SFT and GRPO, two steps each, without what depends on the machine."""
    command("smoke", "--model", "tiny-256", "--out", folder, "--plain", "--keep-checkpoints", "99")
    return steady_metrics(folder)


def steady_metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if not any(part in name for part in UNSTABLE)} for row in rows]


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(STORED.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen") / "run"
    smoke_run(folder)
    return folder


def test_verdicts_are_what_they_were(stored):
    assert verdicts() == stored["verdicts"]


def test_gradients_of_ragged_samples_are_what_they_were(stored):
    found = gradients()
    assert found.keys() == stored["gradients"].keys()
    for aggregation, values in stored["gradients"].items():
        assert found[aggregation].keys() == values.keys()
        for name, value in values.items():
            assert found[aggregation][name] == pytest.approx(value, rel=1e-7, abs=1e-9), (aggregation, name)


def test_completions_of_fixed_prompts_are_what_they_were(stored):
    for found, expected in zip(completions(), stored["completions"], strict=True):
        assert found[0] == expected[0] and found[2] == expected[2]
        assert found[1] == pytest.approx(expected[1], abs=1e-3)


def test_the_metrics_of_a_run_are_what_they_were(stored, finished):
    found = steady_metrics(finished)
    assert [row["kind"] for row in found] == [row["kind"] for row in stored["metrics"]]
    for row, expected in zip(found, stored["metrics"], strict=True):
        for name, value in expected.items():
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=2e-4)), name


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_resumed_after_any_step_ends_in_the_same_bits(finished, tmp_path, step):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    command(
        "smoke", "--model", "tiny-256", "--out", folder, "--plain", "--keep-checkpoints", "99", "--resume",
    )  # fmt: skip
    assert steady_metrics(folder) == steady_metrics(finished)
    newest = sorted((finished / "checkpoints").iterdir())[-1].name
    weights = [safetensors.torch.load_file(run / "checkpoints" / newest / "model.safetensors") for run in (finished, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        numbers = {
            "verdicts": verdicts(),
            "gradients": gradients(),
            "completions": completions(),
            "metrics": smoke_run(Path(made) / "run"),
        }
    STORED.write_text(json.dumps(numbers) + "\n")
