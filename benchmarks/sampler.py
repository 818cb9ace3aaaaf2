"""The sampler against transformers' `generate`: the same weights and work, in turns, in one process.

    python benchmarks/sampler.py                       # all cases; about ten minutes on two cores
    python benchmarks/sampler.py --case tiny spread    # some of them
    python benchmarks/sampler.py --case drop           # ours alone: what early endings save

Weights are random: the time of a token does not depend on them. The length of each completion is planned: a
logits processor ends those of transformers, and random numbers that fall on the stop token end ours.

Prints for each case the median tokens a second of both, their ratio, the share of the roofline that ours
reaches, and the peak memory of a call beyond what the process held before it. The roofline is the time of
matrix products and memory traffic alone: each prefill and each decoding step at the larger of (operations /
this machine's rate for a product of that many rows) and (bytes of weights and cache / its rate of copying as
many).
"""

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import model.sampler
from experiments.bases.weights import init_weights
from model import Qwen3, Qwen3Config, generate

STOP = 0  # the first token of the vocabulary, so the random number 0 picks it


@dataclass(frozen=True)
class Case:
    config: Qwen3Config
    dtype: torch.dtype
    prompts: int
    samples: int
    prompt_length: int
    max_new_tokens: int
    lengths: Callable[[int, int], np.ndarray] | None = None
    """(rows, max_new_tokens) -> planned length of each completion; None: all of them full."""


def spread(rows: int, limit: int) -> np.ndarray:
    """Most end early, some run to the limit: a tenth of the rows do, the others have mean length 0.15 x
    limit."""
    rng = np.random.default_rng(0)
    early = np.clip(rng.gamma(4.0, 0.15 * limit / 4, rows).astype(int), 1, limit)
    return np.where(rng.random(rows) < 0.1, limit, early)


def mostly_by_32(rows: int, limit: int) -> np.ndarray:
    """90 % end at tokens 1 to 32, at random, the rest at the limit."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(rows) < 0.1, limit, rng.integers(1, 33, rows))


TINY = Qwen3Config(384, 128, 384, 4, 4, 2, 32)
QWEN3_06B = Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128)
CASES = {
    "tiny": Case(TINY, torch.float32, 16, 16, 48, 128),
    "spread": Case(TINY, torch.float32, 16, 16, 48, 128, spread),
    "0.6B": Case(QWEN3_06B, torch.bfloat16, 4, 8, 140, 32),
    "full 256": Case(TINY, torch.float32, 16, 16, 48, 256),
    "drop": Case(TINY, torch.float32, 16, 16, 48, 256, mostly_by_32),
}


@dataclass(frozen=True)
class Settings:
    """Measure the sampler against transformers' generate."""

    case: tuple[str, ...] = ("tiny", "spread", "0.6B", "full 256", "drop")
    """Cases to run: tiny, spread, 0.6B, "full 256", drop."""
    repeats: int = 5
    """Runs of each side; the median counts."""
    ours_only: bool = False
    """Leave transformers out."""


def planned_lengths(case: Case) -> np.ndarray:
    rows = case.prompts * case.samples
    return (
        np.full(rows, case.max_new_tokens)
        if case.lengths is None
        else case.lengths(rows, case.max_new_tokens)
    )


def planned_uniforms(case: Case) -> torch.Tensor:
    """Random numbers that make each completion as long as planned: [prompts, samples, max_new_tokens]."""
    lengths = planned_lengths(case)
    uniforms = np.random.default_rng(1).uniform(0.3, 1 - 2**-24, (len(lengths), case.max_new_tokens))
    ends = np.flatnonzero(lengths < case.max_new_tokens)
    uniforms[ends, lengths[ends] - 1] = 0.0
    return torch.tensor(uniforms, dtype=torch.float32).view(case.prompts, case.samples, case.max_new_tokens)


def our_run(case: Case, decoder: Qwen3, prompts: list[list[int]]) -> Callable[[], int]:
    uniforms = planned_uniforms(case)

    def run() -> int:
        with mock.patch.object(model.sampler, "random_uniforms", lambda *_: uniforms):
            groups = generate(
                decoder,
                prompts,
                num_samples=case.samples,
                max_new_tokens=case.max_new_tokens,
                stop_token_ids=[STOP],
            )
        found = [len(completion.token_ids) for group in groups for completion in group]
        assert found == planned_lengths(case).tolist(), "ours did not generate what was planned"
        return sum(found)

    return run


def their_run(case: Case, decoder: Qwen3, prompts: list[list[int]]) -> Callable[[], int]:
    """transformers' generate with sdpa and a dynamic cache, at its defaults otherwise."""
    import transformers

    config = transformers.Qwen3Config(**decoder.config.to_hf(str(case.dtype).removeprefix("torch."), STOP))
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(config)
    theirs.load_state_dict(decoder.state_dict(), assign=True, strict=False)  # the same tensors, not copies
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    theirs.tie_weights()
    theirs.eval()
    lengths = torch.from_numpy(planned_lengths(case))

    class PlannedEnd(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            due = lengths == input_ids.shape[1] - case.prompt_length + 1
            scores[:, STOP] = torch.where(due, 1e4, -torch.inf).to(scores)
            return scores

    ids = torch.tensor(prompts)
    full = case.lengths is None
    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=case.samples,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=None if full else STOP,
        pad_token_id=STOP,
    )
    processors = transformers.LogitsProcessorList([] if full else [PlannedEnd()])

    def run() -> int:
        with torch.inference_mode():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=processors,
            )
        assert out.shape == (len(lengths), case.prompt_length + int(lengths.max()))
        return int(lengths.sum())

    return run


def call(run: Callable[[], int]) -> tuple[float, int]:
    """Tokens a second of one call, and the bytes that the process grew by at its peak."""
    before = reset_peak_memory()
    start = time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - start
    return tokens / seconds, status_bytes("VmHWM") - before


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


def best_seconds(function: Callable[[], object], budget: float = 0.3) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(case: Case, rows: int) -> float:
    """Operations a second of products of `rows` rows with layers of the model's size, all its layers in
    turn."""
    x = torch.randn(rows, case.config.hidden_size, dtype=case.dtype)
    shape = (case.config.intermediate_size, case.config.hidden_size)
    count = case.config.num_parameters() // (
        shape[0] * shape[1]
    )  # as many as the model's weights make: no cache holds them
    weights = [torch.randn(shape, dtype=case.dtype) for _ in range(count)]

    def multiply() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        return 2 * rows * count * shape[0] * shape[1] / best_seconds(multiply)


def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def roofline_seconds(case: Case) -> float:
    """The least time that this machine could take for a case: see the top of the file."""
    config, item = case.config, case.dtype.itemsize
    lengths = planned_lengths(case)
    head = config.vocab_size * config.hidden_size
    below = (
        config.num_parameters() - head
    )  # tied: the embedding's rows are looked up, the head's are multiplied
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    attention = (
        4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    )  # operations a cached token
    copy = copy_rate(item * (below + head + int(lengths.sum()) * token))
    prompt_tokens = case.prompts * case.prompt_length
    seconds = (2 * prompt_tokens * below + 2 * case.prompts * head) / matmul_rate(case, prompt_tokens)
    rates: dict[int, float] = {}
    for step in range(1, lengths.max()):
        alive = int((lengths > step).sum())
        measured = 2 ** round(math.log2(max(1, alive)))  # a rate for each power of two is enough
        if measured not in rates:
            rates[measured] = matmul_rate(case, measured)
        operations = alive * (2 * (below + head) + attention * (case.prompt_length + step))
        read = item * (below + head + token * (prompt_tokens + alive * step))
        seconds += max(operations / rates[measured], read / copy)
    return seconds


def measure(case: Case, settings: Settings) -> dict[str, float]:
    decoder = init_weights(Qwen3(case.config).to(case.dtype), 0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        1, case.config.vocab_size, (case.prompts, case.prompt_length), generator=generator
    ).tolist()
    runs = {"ours": our_run(case, decoder, prompts)}
    if not settings.ours_only:
        runs["theirs"] = their_run(case, decoder, prompts)
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for turn in range(settings.repeats + 1):
        for name, run in runs.items():
            result = call(run)
            if turn > 0:  # the first turn warms up
                results[name].append(result)
    figures = {}
    for name, found in results.items():
        figures[name] = statistics.median(rate for rate, _ in found)
        figures[f"{name} bytes"] = statistics.median(size for _, size in found)
    tokens = int(planned_lengths(case).sum())
    figures["seconds"] = tokens / figures["ours"]
    figures["roofline"] = roofline_seconds(case) / figures["seconds"]
    return figures


def main(settings: Settings) -> None:
    table = Table(
        "case", "ours tok/s", "transformers tok/s", "ratio", "of roofline", "ours MB", "transformers MB"
    )
    found = {}
    for name in settings.case:
        found[name] = figures = measure(CASES[name], settings)
        theirs, theirs_bytes = figures.get("theirs", float("nan")), figures.get("theirs bytes", float("nan"))
        table.add_row(
            name,
            f"{figures['ours']:,.0f}",
            f"{theirs:,.0f}",
            f"{figures['ours'] / theirs:.2f}",
            f"{100 * figures['roofline']:.0f} %",
            f"{figures['ours bytes'] / 1e6:,.0f}",
            f"{theirs_bytes / 1e6:,.0f}",
        )
    Console().print(table)
    if {"drop", "full 256"} <= found.keys():
        share = found["drop"]["seconds"] / found["full 256"]["seconds"]
        print(f"90 % ended by token 32 of 256: {100 * share:.0f} % of the full batch's time")


if __name__ == "__main__":
    main(tyro.cli(Settings))
