"""What several tests need: a small random Qwen3, samples, a task and a step of it, a hub, the commands."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch

import eval as eval_command
import train as train_command
from data import Countdown, Problem
from data.task import Score
from experiments.bases.weights import init_weights
from experiments.study.results import Run
from lab.errors import user_errors
from lab.recipe import Recipe, build_recipe
from lab.runfolder import RunFolder, flatten
from model import Completion, Qwen3, Qwen3Config, Tokenizer
from model.chat import CHATML, ChatTemplate
from rl import score
from rl.batch import Sample
from rl.grpo import GRPOStage, grpo_step
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import Rollout, SamplingSettings, collect_rollouts
from rl.trainer import Trainer

ROOT = Path(__file__).parent.parent
TIMES = {
    "rollout_seconds",
    "update_seconds",
    "checkpoint_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "eval_seconds",
}
SHAPE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
PROBLEM = Problem((79, 60, 17), 36)
PROMPTS = [[5, 17, 3, 44, 9], [8, 2], [40, 2, 2, 30, 31, 12, 4, 4, 25], [19, 6, 40], [8, 1, 37, 20, 3, 9, 13]]


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.25, **changes) -> Qwen3:
    """A Qwen3 of some 5,000 parameters, random enough that its distributions are far from uniform."""
    return init_weights(Qwen3(Qwen3Config(**SHAPE | changes)).to(dtype), seed, std)


def optimizer_for(model: Qwen3, **settings) -> Optimizer:
    """An optimizer for `model` with these settings."""
    return Optimizer(model, OptimizerSettings(**settings))


def trainer_for(model: Qwen3, budget: int = 1000, **settings) -> Trainer:
    """A trainer of `model` in micro-batches of `budget` tokens, with these settings of the optimizer."""
    return Trainer(model, optimizer_for(model, **settings), budget)


def ragged_samples(count: int, seed: int = 0, longest: int = 9, vocab: int = 48) -> list[Sample]:
    """Samples of many lengths, for whose log-probabilities and advantages both sides of the clip matter."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        prompt, completion = rng.integers(1, longest, 2)
        ids = rng.integers(0, vocab, prompt + completion).tolist()
        old_logprobs = rng.normal(-4, 1, completion).tolist()
        samples.append(Sample(ids[:prompt], ids[prompt:], old_logprobs, float(rng.normal())))
    return samples


class FakeTokenizer:
    """48 ids; a prompt is encoded as the user's text alone; a completion is decoded to its ids as numbers."""

    stop_token_ids = (0, 1, 2)
    knows_thinking = True
    template = ChatTemplate(CHATML, {})

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(character) % 48 for character in text.split("user\n")[1].split("<|im_end|>")[0]]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


@dataclass
class FakeTask:
    """Problems of any kind, scored by `reward(problem, text)`; a reward of 1 is a correct answer."""

    reward: Callable[[object, str], float]

    def prompt(self, problem, thinking: bool = True) -> str:
        return str(problem)

    def score(self, text: str, problem, thinking: bool) -> Score:
        reward = self.reward(problem, text)
        return Score(reward, "correct" if reward == 1 else "wrong")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that a model holds, which are cleared; parameters without one give zeros."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of tensors of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    """The two differ by at most `atol` in every place, and agree in shape and dtype."""
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def largest(tensors: dict[str, torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


class Hub:
    """A hub that holds one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.downloads = []  # (repository, options) of each call

    def snapshot_download(self, repo_id, **options):
        self.downloads.append((repo_id, options))
        return str(self.folder)

    def put_in_place(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)


# A step of GRPO

REWARDS = [[1.0, 0.0, 0.1, 0.1], [0.3] * 4, [0.7, 0.3, 0.1, 0.0], [0.0, 0.1, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
PROBLEMS = ["ab", "c", "defgh", "c", "ij"]


def take_step(
    trainer, rewards=REWARDS, learning_rate=0.01, temperature=1.0, reference=None, cancel=None, **stage
):
    """A step on PROBLEMS with `rewards` given by hand: [problem][sample], in the order of scoring."""
    given_rewards = mock.Mock(side_effect=[reward for row in rewards for reward in row])
    return grpo_step(
        trainer, FakeTokenizer(), FakeTask(given_rewards), PROBLEMS[: len(rewards)],
        settings=GRPOStage(samples_per_prompt=len(rewards[0]), **stage), seed=1, reference=reference,
        sampling=SamplingSettings(max_new_tokens=8, temperature=temperature), learning_rate=learning_rate,
        cancel=cancel,
    )  # fmt: skip


def sampler_that_is_off(shift):
    """`collect_rollouts` whose log-probabilities are too low by `shift(place)` at each place."""

    def collect(*arguments, **options):
        groups = collect_rollouts(*arguments, **options)
        for logprobs in (rollout.completion.logprobs for group in groups for rollout in group):
            logprobs[:] = [logprob - shift(place) for place, logprob in enumerate(logprobs)]
        return groups

    return collect


# An evaluation


def rollout(outcome: str, text: str, problem: object = PROBLEM, reward: float = 0.5) -> Rollout:
    """A completion of one token, as if its text had been sampled and judged."""
    return Rollout(problem, [1], Completion([5], [-0.5], True), text, outcome, reward)


def answered(problem: Problem, *answers: str) -> list[Rollout]:
    """A group of completions with these answers, scored as usual; an empty one gives no answer at all."""
    group = []
    for answer in answers:
        text = f"</think>\n<answer>{answer}</answer>" if answer else "</think>\n"
        verdict = score(text, problem)
        group.append(rollout(verdict.outcome, text, problem, verdict.reward))
    return group


GROUPS = [
    answered(
        Problem((1, 2, 7), 10), "1+2+7", "7+1+2", "7+1+2", "7-1-2"
    ),  # 3 of 4 correct, 3 different answers
    answered(Problem((2, 5, 10), 100), "2*5*10", "", "", "2+5+10"),  # 1 of 4, 2 different
    answered(Problem((3, 5, 4), 12), "3+5+4", "3+5+4", "3+4+5", "5+4+3"),  # 4 of 4, 3 different
    answered(Problem((3, 3, 8, 8), 24), "", "", "", ""),  # only 8 / (3 - 8 / 3): none, none
]


# A study


def made_up(arm: str, seed: int, accuracies: dict[int, float], step_tokens=100, final=None) -> Run:
    """A run of GRPO with these accuracies in %, by step; greedy ones are twice as high at the end."""
    evaluations = []
    for step, accuracy in accuracies.items():
        row = {"stage": 0, "kind": "grpo", "step": step, "grpo_steps": step}
        row |= {"eval_accuracy": accuracy / 100, "generated_tokens": step_tokens * step}
        evaluations.append(row)
    ends = {} if final is None else {"final_accuracy": final / 100, "final_greedy_accuracy": final / 50}
    return Run(arm, seed, evaluations, ends, {}, 60)


def changed_fields(arms: Iterable, path: Path, base_name: str) -> tuple[dict, dict[str, set[str]]]:
    """The flat recipe of the arm `base_name`, and for each other arm the names of the fields that differ."""
    recipes = {arm.name: flatten(asdict(build_recipe(arm.tables, path))) for arm in arms}
    base, changed = recipes.pop(base_name), {}
    for name, recipe in recipes.items():
        changed[name] = {field.split(".")[-1] for field in base if base[field] != recipe[field]}
    return base, changed


# The commands


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    """`python arguments` in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


QUICK = """
--evaluation.problems 2 --evaluation.final-problems 0 --sampling.max-new-tokens 4
--stages.0.steps 1 --stages.0.prompts-per-step 2 --stages.0.samples-per-prompt 2
"""
# For `terse` runs: GRPO and SFT and GRPO, a few steps each, with some completions that are correct
SMALL = """
--evaluation.problems 2 --evaluation.final-problems 2 --sampling.max-new-tokens 8 --keep-checkpoints 2
--stages.0.prompts-per-step 2 --stages.0.samples-per-prompt 4 --stages.1.batch-size 1 --stages.1.max-traces 3
--stages.2.prompts-per-step 2 --stages.2.samples-per-prompt 4
"""
SMOKE = f"{SMALL} --keep-checkpoints 99 --stages.0.samples-per-prompt 8 --evaluation.final-problems 32"


def terse(patch: pytest.MonkeyPatch) -> None:
    """Completions may end with some digits, after few tokens, and a third of them is correct."""
    init = Tokenizer.__init__

    def init_with_more_ends(tokenizer, folder) -> None:
        init(tokenizer, folder)
        tokenizer.stop_token_ids = (16, 19, 22, 256, 258)

    def score(task, text: str, problem, thinking: bool) -> Score:
        correct = sum(map(ord, text)) % 3 == 0
        return Score(float(correct), "correct" if correct else "wrong")

    patch.setattr(Tokenizer, "__init__", init_with_more_ends)
    patch.setattr(Countdown, "score", score)


def smoke(*options) -> Recipe:
    """The smoke recipe with these options, which are separated by blanks, as on a command line."""
    return parsed("smoke --model tiny-256", *options).recipe


def one_step(*options) -> Recipe:
    """The smoke recipe with only its first stage, of a step: almost nothing, unless the options say more."""
    recipe = smoke(QUICK, *options)
    return replace(recipe, stages=recipe.stages[:1])


def parsed(*words) -> train_command.Arguments:
    """What train.py makes of a command line."""
    return train_command.parse(" ".join(map(str, words)).split())


def timeless(run: Path) -> list[dict]:
    """A run's metrics without those that measure time or memory."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in RunFolder(run).metrics()]


def fails(capsys, action) -> str:
    """The one line of an action that a user's mistake ends, with exit code 2."""
    with pytest.raises(SystemExit) as exit_, user_errors():
        action()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    return message


def evaluated(capsys, *models, **options) -> dict:
    """What `python eval.py` prints with `--json -`."""
    eval_command.main(eval_command.Arguments(tuple(map(str, models)), json="-", **options))
    return json.loads(capsys.readouterr().out)


def exit_code(monkeypatch, command: str) -> int:
    """How `python command` ends, in this process."""
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    return ended.value.code


def write_jsonl(path: Path, rows) -> str:
    """Write a file of one JSON text per line; return its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Memory


def kept_for_backward(forward: Callable) -> dict[int, int]:
    """Bytes of each storage that autograd keeps during `forward()`, by its address."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return kept
