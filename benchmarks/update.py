"""Measure the update with and without each of its parts, in turns, in one process.

    python benchmarks/update.py                    # about three minutes on two cores

Time is that of forward and backward over the same samples. Memory is what autograd keeps for backward: the
bytes of all tensors it saves, without the weights. Weights and samples are random.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from common import (
    LARGE_VOCABULARY,
    MIDDLE,
    TINY,
    in_turns,
    print_table,
    random_model,
    random_prompts,
    seconds_of,
)

from model import Qwen3, token_logprobs
from rl.batch import Batch, Sample, completion_logprobs, make_batch

SIZES = {"hidden 128": TINY, "hidden 512": MIDDLE}


@dataclass(frozen=True)
class Settings:
    """Measure shared prompts, chunked logits and activation checkpointing."""

    repeats: int = 5
    """Turns; the table shows medians."""


def random_batch(vocab_size: int, prompts: int, samples: int, prompt_length: int, length: int) -> Batch:
    """Completions of random ids: `samples` of each of `prompts` prompts."""
    prompt_ids = random_prompts(vocab_size, prompts, prompt_length)
    made = []
    for number, completion_ids in enumerate(random_prompts(vocab_size, prompts * samples, length)):
        prompt = prompt_ids[number // samples]
        made.append(Sample(prompt, completion_ids, old_logprobs=[-5.0] * length, advantage=1.0))
    return make_batch(made)


def plain_logprobs(model: Qwen3, batch: Batch) -> torch.Tensor:
    """The log-probabilities of `completion_logprobs`, from all logits at once."""
    hidden = model.model(batch.input_ids, batch.layout)[0]  # [tokens, hidden]
    hidden = hidden.index_select(0, batch.logit_positions[batch.mask])  # [completion tokens, hidden]
    logprobs = token_logprobs(model.lm_head(hidden), temperature=1.0, num_tokens=model.num_tokens)
    return logprobs.gather(-1, batch.target_ids[batch.mask][:, None])


@dataclass(frozen=True)
class Way:
    """One way to make forward and backward."""

    model: Qwen3
    batch: Batch
    logprobs: Callable[[Qwen3, Batch], torch.Tensor] = completion_logprobs
    checkpointing: bool = False

    def run(self) -> None:
        self.model.model.checkpoint_activations = self.checkpointing
        self.logprobs(self.model, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        return seconds_of(self.run)

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps for backward."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.run()
        return sum(kept.values())


def pairs() -> dict[str, tuple[Way, Way]]:
    """(with, without) each part."""
    found = {}
    for name, config in SIZES.items():
        model = random_model(config, torch.float32, "cpu")
        shared = random_batch(config.vocab_size, prompts=1, samples=16, prompt_length=140, length=60)
        apart = random_batch(config.vocab_size, prompts=16, samples=1, prompt_length=140, length=60)
        found[f"shared prompts (140 + 16 x 60), {name}"] = Way(model, shared), Way(model, apart)
    config = LARGE_VOCABULARY
    model = random_model(config, torch.float32, "cpu")
    batch = random_batch(config.vocab_size, prompts=4, samples=8, prompt_length=140, length=64)
    found["chunked logits, vocabulary 151,936"] = Way(model, batch), Way(model, batch, plain_logprobs)
    for name, config in SIZES.items():
        model = random_model(config, torch.float32, "cpu")
        batch = random_batch(config.vocab_size, prompts=1, samples=16, prompt_length=140, length=60)
        found[f"activation checkpointing, {name}"] = Way(model, batch, checkpointing=True), Way(model, batch)
    return found


def main(settings: Settings) -> None:
    rows = []
    for name, (with_it, without) in pairs().items():
        times = in_turns({"with": with_it.seconds, "without": without.seconds}, settings.repeats)
        with_seconds = statistics.median(times["with"])
        without_seconds = statistics.median(times["without"])
        row = [
            name,
            f"{with_seconds:.3f}",
            f"{without_seconds:.3f}",
            f"{without_seconds / with_seconds:.2f}",
            f"{with_it.kept_bytes() / 1e6:,.0f}",
            f"{without.kept_bytes() / 1e6:,.0f}",
        ]
        rows.append(row)
    columns = ["part", "with, s", "without, s", "time without / with", "kept with, MB", "kept without, MB"]
    print_table(f"forward and backward, medians of {settings.repeats}", columns, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
