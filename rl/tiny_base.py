"""How the embedded model of `model/tiny/` was made: `make tiny-base` runs this file.

A Qwen3 of 0.8 M parameters and a tokenizer of its own, trained from random weights on the attempts of
`data.attempts`: arithmetic that is right, aimed at nothing.
"""

import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import tyro

from data.attempts import VERDICTS, attempts_document, comparison_document, comparison_prompt, hopeless_problem
from data.countdown import Problem, ProblemSettings, prompt_text
from model import Qwen3, Qwen3Config, Tokenizer, prompt_ids, save_model
from model.weights import TINY
from rl.batch import Sample
from rl.learner import Learner
from rl.optimizer import Optimizer
from rl.recipe import Recipe
from rl.sft import sft_step

TINY_PROBLEMS = ProblemSettings(min_number=1, max_number=20, min_target=10, max_target=50, four_number_share=1 / 3)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXERCISE_SHARE = 0.2
MAX_TOKENS = 256  # of a document; longer ones are cut off
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class TinyBase:
    """Train the embedded model from random weights."""

    out: Path = TINY
    """Folder to write the checkpoint to."""
    steps: int = 6000
    """Optimizer steps."""
    documents_per_step: int = 32
    """Documents a step; each is about 95 tokens."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    seed: int = 0
    """Of the weights and the documents."""


def train_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer in which each of the prompt's fixed phrases, and each number below 200, is one token.

    Everything else is bytes, so any text can be encoded. Qwen3 has one token a digit; whole numbers make completions a
    third shorter, and whether a value is the target a question of one token.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    prompts = prompt_text(Problem((1, 2, 3), 10)), comparison_prompt(10)
    pieces = [piece for prompt in prompts for piece in re.split(r"\d+(?:, \d+)*", prompt)]
    phrases = [piece for piece in pieces if len(piece) > 1] + ["user\n", "assistant\n", *VERDICTS]
    numbers = map(str, range(10, 200))  # those of one digit are bytes already
    special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS]
    plain = [tokenizers.AddedToken(token, special=False, normalized=False) for token in (*TAGS, *phrases, *numbers)]
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
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder)


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that stand for bytes in a byte-level BPE, numbered."""
    return {character: number for number, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def tiny_config(num_tokens: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=math.ceil(num_tokens / 32) * 32,  # a few rows more than tokens, as in the published models
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )


def document_sample(tokenizer: Tokenizer, rng: random.Random) -> Sample:
    if rng.random() < EXERCISE_SHARE:
        number, text = comparison_document(rng, TINY_PROBLEMS)
        prompt = comparison_prompt(number)
    else:
        problem = hopeless_problem(rng, TINY_PROBLEMS)
        prompt, text = prompt_text(problem), attempts_document(problem, rng)
    return Sample(prompt_ids(tokenizer, prompt, thinking=True), tokenizer.encode(text)[:MAX_TOKENS])


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate at `step`: a linear rise, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main(settings: TinyBase) -> None:
    tokenizer = train_tokenizer(settings.out)
    model = Qwen3(tiny_config(len(tokenizer))).init_weights(settings.seed)
    model.num_tokens = len(tokenizer)
    print(f"{model.config.num_parameters():,} parameters, {len(tokenizer)} tokens")
    learner = Learner(model, Optimizer(model, weight_decay=0.1), Recipe(), micro_batch_tokens=4096)
    rng = random.Random(settings.seed)
    start, tokens = time.perf_counter(), 0
    for step in range(settings.steps):
        samples = [document_sample(tokenizer, rng) for _ in range(settings.documents_per_step)]
        rate = settings.learning_rate * cosine(step, settings.steps)
        result = sft_step(learner, samples, rate)
        tokens += result["tokens"]
        if step % 50 == 0 or step + 1 == settings.steps:
            speed = tokens / (time.perf_counter() - start)
            print(f"step {step:5d}  loss {result['loss']:.4f}  {tokens / 1e6:5.1f} M tokens  {speed:,.0f} tokens/s", flush=True)
    save_model(settings.out, model, tokenizer)
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(TinyBase))
