"""What each part of the update saves, against an update without it: in turns, in one process.

    python benchmarks/update.py                    # about three minutes on two cores

Time is that of forward and backward over the same samples. Memory is what autograd keeps for backward: the
bytes of all tensors it saves, without the weights. Weights and samples are random.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from memory import random_model
from rich.console import Console
from rich.table import Table

from model import Qwen3, Qwen3Config, token_logprobs
from rl.batch import Batch, Sample, completion_logprobs, make_batch

SMALL = Qwen3Config(384, 128, 384, 4, 4, 2, 32)
MIDDLE = Qwen3Config(384, 512, 1536, 8, 8, 4, 64)
LARGE_VOCABULARY = Qwen3Config(151936, 256, 768, 4, 4, 2, 64)


@dataclass(frozen=True)
class Settings:
    """Measure shared prompts, chunked logits and activation checkpointing."""

    repeats: int = 5
    """Turns; the table shows medians."""


def samples(config: Qwen3Config, prompts: int, count: int, prompt_length: int, length: int) -> list[Sample]:
    """`count` completions of each of `prompts` prompts; all ids random."""
    generator = torch.Generator().manual_seed(0)

    def ids(number: int) -> list[int]:
        return torch.randint(config.vocab_size, (number,), generator=generator).tolist()

    made = []
    for _ in range(prompts):
        prompt = ids(prompt_length)
        made += [Sample(prompt, ids(length), [-5.0] * length, 1.0) for _ in range(count)]
    return made


def plain_logprobs(model: Qwen3, batch: Batch) -> torch.Tensor:
    """The same from all logits at once."""
    hidden = model.model(batch.input_ids, batch.layout)[0].index_select(0, batch.logit_positions[batch.mask])
    logprobs = token_logprobs(model.lm_head(hidden), 1.0, model.num_tokens)
    return logprobs.gather(-1, batch.target_ids[batch.mask][:, None])


@dataclass(frozen=True)
class Way:
    model: Qwen3
    batch: Batch
    logprobs: Callable[[Qwen3, Batch], torch.Tensor] = completion_logprobs
    checkpointing: bool = False

    def run(self) -> None:
        self.model.model.checkpoint_activations = self.checkpointing
        self.logprobs(self.model, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def kept(self) -> int:
        """Bytes that autograd keeps."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        alive = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        self.model.model.checkpoint_activations = self.checkpointing
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.logprobs(self.model, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)
        return sum(size for at, size in alive.items() if at not in weights)


def cases() -> dict[str, tuple[Way, Way]]:
    """(with, without) of each part."""
    pairs = {}
    for name, config in (("hidden 128", SMALL), ("hidden 512", MIDDLE)):
        model = random_model(config, torch.float32, "cpu")
        shared = make_batch(samples(config, 1, 16, 140, 60))
        apart = make_batch(samples(config, 16, 1, 140, 60))  # as many tokens, but no two prompts alike
        pairs[f"shared prompts (140 + 16 x 60), {name}"] = Way(model, shared), Way(model, apart)
    model = random_model(LARGE_VOCABULARY, torch.float32, "cpu")
    batch = make_batch(samples(LARGE_VOCABULARY, 4, 8, 140, 64))
    pairs["chunked logits, vocabulary 151,936"] = Way(model, batch), Way(model, batch, plain_logprobs)
    for name, config in (("hidden 128", SMALL), ("hidden 512", MIDDLE)):
        model = random_model(config, torch.float32, "cpu")
        batch = make_batch(samples(config, 1, 16, 140, 60))
        pairs[f"activation checkpointing, {name}"] = Way(model, batch, checkpointing=True), Way(model, batch)
    return pairs


def main(settings: Settings) -> None:
    table = Table(title=f"forward and backward, medians of {settings.repeats}")
    for column in (
        "part",
        "with, s",
        "without, s",
        "time without / with",
        "kept with, MB",
        "kept without, MB",
    ):
        table.add_column(column)
    for name, ways in cases().items():
        for way in ways:
            way.run()
        turns = [[way.seconds() for way in ways] for _ in range(settings.repeats)]
        times = [statistics.median(column) for column in zip(*turns, strict=True)]
        kept = [way.kept() / 1e6 for way in ways]
        ratio = f"{times[1] / times[0]:.2f}"
        table.add_row(name, *(f"{x:.3f}" for x in times), ratio, *(f"{x:,.0f}" for x in kept))
    Console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))
