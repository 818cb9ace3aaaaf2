"""What several tests need: a small random Qwen3, ragged samples, a task with rewards given by hand, a hub."""

from collections.abc import Callable
from dataclasses import dataclass

import huggingface_hub
import numpy as np
import torch

from data import Problem
from data.task import Score
from experiments.bases.weights import init_weights
from model import Qwen3, Qwen3Config
from model.chat import CHATML, ChatTemplate
from rl.batch import Sample
from rl.optimizer import Optimizer, OptimizerSettings
from rl.trainer import Trainer

SHAPE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
PROBLEM = Problem((79, 60, 17), 36)


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
    """Samples of many lengths, with log-probabilities and advantages for which both sides of the clip matter."""
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
