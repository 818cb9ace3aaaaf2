"""The sampler against transformers' `generate`: the same weights and work, in turns, in one process.

    python benchmarks/sampler.py                       # all cases; about ten minutes on two cores
    python benchmarks/sampler.py --case tiny spread    # some of them
    python benchmarks/sampler.py --case drop           # how much time early endings save

Weights are random, because the time of a token does not depend on them. The length of each completion is
planned. A logits processor ends those of transformers; random numbers that fall on the stop token end ours.

It prints for each case the median tokens per second of both, their ratio, the share of the roofline that
ours reaches, and the peak memory of a call beyond what the process held before it. The roofline is the time
of matrix products and memory traffic alone. A decoding step takes at least its operations / the rate of this
machine for a product of so many rows, and at least its bytes of weights and cache / its rate of copying.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from common import (
    QWEN3_06B,
    TINY,
    Workload,
    best_seconds,
    copy_rate,
    in_turns,
    median_of,
    print_table,
    random_model,
    random_prompts,
    seconds_of,
)

import model.sampler
from model import Qwen3, Qwen3Config, generate

STOP = 0  # the first token of the vocabulary, so the random number 0 picks it


@dataclass(frozen=True)
class Case:
    config: Qwen3Config
    dtype: torch.dtype
    work: Workload
    lengths: np.ndarray  # planned length of each completion, [prompts * samples]


def full(work: Workload) -> np.ndarray:
    return np.full(work.prompts * work.samples, work.new_tokens)


def spread(work: Workload) -> np.ndarray:
    """A tenth of the rows run to the limit; the mean length of the others is 0.15 of it."""
    random = np.random.default_rng(0)
    lengths = random.gamma(shape=4.0, scale=0.15 * work.new_tokens / 4, size=work.prompts * work.samples)
    early = np.clip(lengths.astype(int), 1, work.new_tokens)
    return np.where(random.random(len(early)) < 0.1, work.new_tokens, early)


def mostly_by_32(work: Workload) -> np.ndarray:
    """90 % end at a random token from 1 to 32, the rest at the limit."""
    random = np.random.default_rng(0)
    to_the_limit = random.random(work.prompts * work.samples) < 0.1
    return np.where(to_the_limit, work.new_tokens, random.integers(1, 33, len(to_the_limit)))


SHORT = Workload(prompts=16, samples=16, prompt_length=48, new_tokens=128)
LONG = Workload(prompts=16, samples=16, prompt_length=48, new_tokens=256)
LARGE = Workload(prompts=4, samples=8, prompt_length=140, new_tokens=32)
CASES = {
    "tiny": Case(TINY, torch.float32, SHORT, full(SHORT)),
    "spread": Case(TINY, torch.float32, SHORT, spread(SHORT)),
    "0.6B": Case(QWEN3_06B, torch.bfloat16, LARGE, full(LARGE)),
    "full 256": Case(TINY, torch.float32, LONG, full(LONG)),
    "drop": Case(TINY, torch.float32, LONG, mostly_by_32(LONG)),
}


@dataclass(frozen=True)
class Settings:
    """Measure the sampler against transformers' generate."""

    case: tuple[str, ...] = tuple(CASES)
    """Cases to run: tiny, spread, 0.6B, "full 256", drop."""
    repeats: int = 5
    """Runs of each side; the median counts."""
    ours_only: bool = False
    """Leave transformers out."""


def planned_uniforms(case: Case) -> torch.Tensor:
    """Random numbers that make each completion as long as planned: [prompts, samples, new_tokens]."""
    work = case.work
    random = np.random.default_rng(1)
    uniforms = random.uniform(0.3, 1 - 2**-24, size=(len(case.lengths), work.new_tokens))
    ended = np.flatnonzero(case.lengths < work.new_tokens)
    uniforms[ended, case.lengths[ended] - 1] = 0.0
    return torch.tensor(uniforms, dtype=torch.float32).view(work.prompts, work.samples, work.new_tokens)


def our_generation(case: Case, decoder: Qwen3, prompts: list[list[int]]) -> Callable[[], None]:
    uniforms = planned_uniforms(case)

    def run() -> None:
        with mock.patch.object(model.sampler, "random_uniforms", lambda *_: uniforms):
            groups = generate(
                decoder,
                prompts,
                num_samples=case.work.samples,
                max_new_tokens=case.work.new_tokens,
                stop_token_ids=[STOP],
            )
        found = [len(completion.token_ids) for group in groups for completion in group]
        assert found == case.lengths.tolist(), "ours did not generate what was planned"

    return run


def their_generation(case: Case, decoder: Qwen3, prompts: list[list[int]]) -> Callable[[], None]:
    """transformers' generate with sdpa and a dynamic cache, at its defaults otherwise."""
    import transformers

    # 1. Their model. It has the same tensors, not copies.
    dtype_name = str(case.dtype).removeprefix("torch.")
    config = transformers.Qwen3Config(**decoder.config.to_hf(dtype_name, STOP))
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(config)
    theirs.load_state_dict(decoder.state_dict(), assign=True, strict=False)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    theirs.tie_weights()
    theirs.eval()

    # 2. Their completions end where ours do.
    lengths = torch.from_numpy(case.lengths)
    work = case.work

    class PlannedEnd(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends_now = lengths == input_ids.shape[1] - work.prompt_length + 1
            scores[:, STOP] = torch.where(ends_now, 1e4, -torch.inf).to(scores)
            return scores

    all_full = bool((case.lengths == work.new_tokens).all())
    processors = transformers.LogitsProcessorList([] if all_full else [PlannedEnd()])
    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=work.samples,
        max_new_tokens=work.new_tokens,
        eos_token_id=None if all_full else STOP,
        pad_token_id=STOP,
    )
    ids = torch.tensor(prompts)

    def run() -> None:
        with torch.inference_mode():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=processors,
            )
        assert out.shape == (len(lengths), work.prompt_length + int(lengths.max()))

    return run


def timed(run: Callable[[], None]) -> Callable[[], dict]:
    """`run` with its seconds, and the bytes that the process grew by at its peak."""

    def call() -> dict:
        before = reset_peak_memory()
        seconds = seconds_of(run)
        return {"seconds": seconds, "bytes": status_bytes("VmHWM") - before}

    return call


def reset_peak_memory() -> int:
    """Make the current use the new peak, and return it in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls have freed
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def num_parameters(config: Qwen3Config) -> int:
    with torch.device("meta"):
        return Qwen3(config).num_parameters()


def product_rate(case: Case, rows: int) -> float:
    """Operations per second of products of `rows` rows with matrices of the model's size.

    They are as many as the model's weights make, so no cache of the processor holds them until the next.
    """
    inputs = torch.randn(rows, case.config.hidden_size, dtype=case.dtype)
    shape = (case.config.intermediate_size, case.config.hidden_size)
    count = num_parameters(case.config) // math.prod(shape)
    weights = [torch.randn(shape, dtype=case.dtype) for _ in range(count)]

    def multiply() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)

    with torch.inference_mode():
        return 2 * rows * count * math.prod(shape) / best_seconds(multiply)


def roofline_seconds(case: Case) -> float:
    """The least time that this machine could take for a case: see the top of the file."""
    # 1. Sizes. Embeddings are tied: the rows of the embedding are looked up, those of the head multiplied.
    config = case.config
    head = config.vocab_size * config.hidden_size
    layers = num_parameters(config) - head
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers per token
    attended = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # operations
    itemsize = case.dtype.itemsize
    prompt_tokens = case.work.prompts * case.work.prompt_length

    # 2. The prefill, by its operations.
    operations = 2 * prompt_tokens * layers + 2 * case.work.prompts * head
    seconds = operations / product_rate(case, prompt_tokens)

    # 3. Each decoding step, by its operations or by what it reads. A rate per power of two is enough.
    numbers = layers + head + int(case.lengths.sum()) * cached
    copied = copy_rate(itemsize * numbers, "cpu")
    rates: dict[int, float] = {}
    for step in range(1, case.lengths.max()):
        rows = int((case.lengths > step).sum())
        measured_rows = 2 ** round(math.log2(rows))
        if measured_rows not in rates:
            rates[measured_rows] = product_rate(case, measured_rows)
        operations = rows * (2 * (layers + head) + attended * (case.work.prompt_length + step))
        read = itemsize * (layers + head + cached * (prompt_tokens + rows * step))
        seconds += max(operations / rates[measured_rows], read / copied)
    return seconds


def measure(case: Case, settings: Settings) -> dict[str, float]:
    decoder = random_model(case.config, case.dtype, "cpu")
    prompts = random_prompts(case.config.vocab_size, case.work.prompts, case.work.prompt_length)
    runs = {"ours": timed(our_generation(case, decoder, prompts))}
    if not settings.ours_only:
        runs["theirs"] = timed(their_generation(case, decoder, prompts))
    found = {"roofline": roofline_seconds(case), "theirs": math.nan, "theirs bytes": math.nan}
    for name, calls in in_turns(runs, settings.repeats).items():
        found[name] = median_of(calls, "seconds")
        found[f"{name} bytes"] = median_of(calls, "bytes")
    return found


def main(settings: Settings) -> None:
    seconds = {}
    rows = []
    for name in settings.case:
        found = measure(CASES[name], settings)
        tokens = CASES[name].lengths.sum()
        seconds[name] = found["ours"]
        row = [
            name,
            f"{tokens / found['ours']:,.0f}",
            f"{tokens / found['theirs']:,.0f}",
            f"{found['theirs'] / found['ours']:.2f}",
            f"{100 * found['roofline'] / found['ours']:.0f} %",
            f"{found['ours bytes'] / 1e6:,.0f}",
            f"{found['theirs bytes'] / 1e6:,.0f}",
        ]
        rows.append(row)
    columns = [
        "case",
        "ours tok/s",
        "transformers tok/s",
        "ratio",
        "of roofline",
        "ours MB",
        "transformers MB",
    ]
    print_table(f"sampling, medians of {settings.repeats}", columns, rows)
    if "drop" in seconds and "full 256" in seconds:
        share = seconds["drop"] / seconds["full 256"]
        print(f"90 % ended by token 32 of 256: {100 * share:.0f} % of the full batch's time")


if __name__ == "__main__":
    main(tyro.cli(Settings))
