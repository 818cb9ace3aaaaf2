"""Train a bundled model from random weights: `make tiny-base`, or `make tiny-base TASK=calculus`.

Each is a small Qwen3 with its own tokenizer, trained on the documents of its task's `Corpus`. `model/tiny/`
learns from `attempts`: correct arithmetic that does not try to reach the target, and rambling.
`model/tiny-calculus/` learns from `derivations`: right and wrong rules side by side.
"""

import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import tyro

from data.calculus import Calculus, Derivative
from data.countdown import Countdown, Problem
from experiments.bases.attempts import (
    LARGEST_VALUE,
    VERDICTS,
    attempts_document,
    comparison_document,
    comparison_prompt,
    hopeless_problem,
)
from experiments.bases.derivations import derivation_document
from experiments.bases.weights import init_weights
from lab.errors import user_errors
from model import Qwen3, Qwen3Config, Tokenizer, prompt_ids, save_model
from model.chat import CHATML
from model.weights import TINY
from rl.batch import Sample
from rl.optimizer import Optimizer
from rl.sft import sft_step
from rl.trainer import Trainer

TINY_PROBLEMS = Countdown(max_number=20, max_target=50, four_number_share=1 / 3)
TINY_CALCULUS = Calculus(min_terms=2, max_terms=4, max_exponent=5, max_coefficient=9, max_order=2)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXERCISE_SHARE = 0.2  # of the documents that do not ramble
RAMBLING_SHARE, RAMBLING_AT_END = 0.03, 0.99
MAX_TOKENS = 1024  # tokens of a document; longer ones are cut off
MICRO_BATCH_TOKENS = 4096
WEIGHT_DECAY = 0.1
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Corpus:
    """The documents of a base, and the texts that its tokenizer makes a single token.

    Attributes:
        document: (rng, whether in the last steps) -> (prompt, text after it to the end of the turn).
        phrases: texts that are one token each, beside bytes, tags and the chat format.
        largest_number: each number up to this one is one token too.
        layers: of the model.
        steps: of the optimizer.
        last_steps: after these, at a fifth of the learning rate, with half the documents in each.
    """

    document: Callable[[random.Random, bool], tuple[str, str]]
    phrases: list[str]
    largest_number: int
    layers: int
    steps: int
    last_steps: int = 0


def countdown_document(rng: random.Random, last: bool) -> tuple[str, str]:
    rambling = rng.random() < (RAMBLING_AT_END if last else RAMBLING_SHARE)
    if not rambling and rng.random() < EXERCISE_SHARE:
        number, text = comparison_document(rng, TINY_PROBLEMS)
        return comparison_prompt(number), text
    problem = hopeless_problem(rng, TINY_PROBLEMS)
    return Countdown().prompt(problem), attempts_document(problem, rng, rambling)


def calculus_document(rng: random.Random, last: bool) -> tuple[str, str]:
    problem = TINY_CALCULUS.draw(rng)
    return TINY_CALCULUS.prompt(problem), derivation_document(problem.polynomial, problem.order, rng)


def fixed_phrases(prompts: list[str], variable: str) -> list[str]:
    """The constant parts of prompts: the pieces between matches of `variable`, if longer than a character."""
    return [piece for prompt in prompts for piece in re.split(variable, prompt) if len(piece) > 1]


COUNTDOWN_PROMPTS = [Countdown().prompt(Problem((1, 2, 3), 10)), comparison_prompt(10)]
CALCULUS_PROMPTS = [TINY_CALCULUS.prompt(Derivative((0, 1), order)) for order in (1, 2)]
CORPORA = {
    "countdown": Corpus(
        countdown_document,
        [*fixed_phrases(COUNTDOWN_PROMPTS, r"\d+(?:, \d+)*"), "user\n", "assistant\n", *VERDICTS],
        largest_number=LARGEST_VALUE,
        layers=4,
        steps=6000,
        last_steps=150,
    ),
    "calculus": Corpus(
        calculus_document,
        [
            *fixed_phrases(CALCULUS_PROMPTS, r"x(?= with)"),
            *("user\n", "assistant\n", " -> ", " + ", " - "),
            *(f"x^{exponent}" for exponent in range(2, TINY_CALCULUS.max_exponent + 3)),
        ],
        largest_number=299,
        layers=2,
        steps=2500,
    ),
}


@dataclass(frozen=True)
class TinyBase:
    """Train a bundled model from random weights."""

    task: Literal["countdown", "calculus"] = "countdown"
    """Whose documents to learn from."""
    out: Path | None = None
    """Folder for the checkpoint; default: over the bundled model of the task."""
    steps: int | None = None
    """Optimizer steps; default: 6000, for calculus 2500."""
    documents_per_step: int = 32
    """Documents in a step; each has about 125 tokens, in calculus 39."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    seed: int = 0
    """For the weights and the documents."""


def train_tokenizer(folder: Path, corpus: Corpus) -> Tokenizer:
    """A byte-level tokenizer in which each fixed phrase of the prompt and each small number is one token.

    Everything else is bytes, so any text can be encoded. Qwen3 has a token for each digit; whole numbers make
    completions a third shorter, and one token is enough to compare a value with the target.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    numbers = map(str, range(10, corpus.largest_number + 1))  # digits are bytes already
    special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS]
    texts = dict.fromkeys((*TAGS, *corpus.phrases, *numbers))
    plain = [tokenizers.AddedToken(text, special=False, normalized=False) for text in texts]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder)


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that stand for bytes in a byte-level BPE, with their ids."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {character: number for number, character in enumerate(alphabet)}


def tiny_config(num_tokens: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=math.ceil(num_tokens / 32) * 32,  # as in the published models, more rows than tokens
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )


def document_sample(tokenizer: Tokenizer, corpus: Corpus, rng: random.Random, last: bool) -> Sample:
    prompt, text = corpus.document(rng, last)
    return Sample(prompt_ids(tokenizer, prompt, thinking=True), tokenizer.encode(text)[:MAX_TOKENS])


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Fraction of the peak learning rate at `step`: a linear warm-up, then half a cosine down to 0.01."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main(settings: TinyBase) -> None:
    corpus = CORPORA[settings.task]
    steps = settings.steps or corpus.steps
    out = settings.out or (TINY if settings.task == "countdown" else TINY.with_name(f"tiny-{settings.task}"))
    tokenizer = train_tokenizer(out, corpus)
    model = init_weights(Qwen3(tiny_config(len(tokenizer), corpus.layers)), settings.seed)
    model.num_tokens = len(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    trainer = Trainer(model, Optimizer(model), MICRO_BATCH_TOKENS)
    for piece in itertools.chain(*trainer.optimizer.pieces.values()):
        piece.adamw.param_groups[0]["weight_decay"] = WEIGHT_DECAY
    rng = random.Random(settings.seed)
    start = time.perf_counter()
    tokens = 0
    phases = [(steps, settings.documents_per_step, settings.learning_rate, False)]
    phases += [(corpus.last_steps, settings.documents_per_step // 2, settings.learning_rate / 5, True)]
    for steps, count, rate, last in phases:
        for step in range(steps):
            samples = [document_sample(tokenizer, corpus, rng, last) for _ in range(count)]
            result = sft_step(trainer, samples, rate * cosine(step, steps))
            tokens += result["tokens"]
            if step % 50 == 0 or step + 1 == steps:
                speed = tokens / (time.perf_counter() - start)
                done = f"{tokens / 1e6:5.1f} M tokens  {speed:,.0f} tokens/s"
                print(f"step {step:5d}  loss {result['loss']:.4f}  {done}", flush=True)
    save_model(out, model, tokenizer)
    print(f"wrote {out}")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(TinyBase))
