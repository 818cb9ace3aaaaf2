"""Compare decoding with plain forwards, as a run on a GPU does before it begins."""

from typing import NamedTuple

import torch

from model import ModelError, Qwen3, generate, token_logprobs
from model.sampler import TokenChoice, random_uniforms, sample_tokens

SAMPLES = 4  # of each prompt
NEW_TOKENS = 96  # of a completion: two blocks of the cache, so at least two graphs
# What rounding explains: the share of ids that differ, and nats between log-probabilities.
MOST_OTHER_IDS = {torch.float32: 0.01, torch.bfloat16: 0.15}
MOST_NATS = {torch.float32: 5e-3, torch.bfloat16: 0.05}


class Row(NamedTuple):
    """A comparison: what was compared, what was found, and whether that is wrong."""

    what: str
    found: str
    wrong: bool = False


def exceeds(value: float, limit: float) -> bool:
    """Whether `value` is above `limit` or is NaN, which every comparison by `>` would let pass."""
    return not value <= limit


@torch.inference_mode()
def decoding_row(model: Qwen3, prompts: list[list[int]]) -> Row:
    """Compare what `generate` samples with what a plain forward over each completion would."""
    device = model.device
    uniforms = random_uniforms(prompts, SAMPLES, NEW_TOKENS, seed=0).to(device)
    some_tokens = list(range(0, model.num_tokens, 50))  # so that rows finish at all lengths
    groups = generate(
        model, prompts, num_samples=SAMPLES, max_new_tokens=NEW_TOKENS, seed=0, stop_token_ids=some_tokens
    )
    count = others = gap = 0
    for prompt, group, rows in zip(prompts, groups, uniforms, strict=True):
        for completion, row in zip(group, rows, strict=True):
            ids = torch.tensor(completion.token_ids, device=device)
            whole = torch.tensor([prompt + completion.token_ids], device=device)
            logits = model.next_logits(model.model(whole)[0, len(prompt) - 1 : -1])  # [new tokens, vocab]
            sampled, _ = sample_tokens(logits, row[: len(ids)], model.num_tokens, TokenChoice())
            logprobs = token_logprobs(logits, 1.0, model.num_tokens).gather(-1, ids[:, None])[:, 0]
            count += len(ids)
            others += int((sampled != ids).sum())
            gap += float((logprobs - logprobs.new_tensor(completion.logprobs)).abs().sum())
    found = f"{100 * others / count:.1f} % other ids, log-probabilities {gap / count:.1g} nats apart"
    alike = torch.bfloat16 if model.dtype.itemsize == 2 else torch.float32  # in precision
    wrong = exceeds(others / count, MOST_OTHER_IDS[alike])
    wrong |= exceeds(gap / count, MOST_NATS[alike])
    return Row(f"decoding, {model.dtype}", found, wrong)


def check_decoding(model: Qwen3, prompts: list[list[int]]) -> str:
    """On a GPU, see that decoding is right; where CUDA graphs make it fail, `model` decodes without.

    Returns a line to show, which is empty on a CPU. ModelError: decoding is wrong even without graphs.
    """
    if model.device.type != "cuda":
        return ""
    fault = decoding_fault(model, prompts)
    if not fault:
        return "decoding  compared with plain forwards: the same"
    said = f"decoding  without CUDA graphs, which do not work here ({fault}): slower, and right"
    if model.graphed:
        model.graphed = False
        fault = decoding_fault(model, prompts)
    if fault:
        raise ModelError(f"decoding is wrong on this device ({fault}): make check says more")
    return said


def decoding_fault(model: Qwen3, prompts: list[list[int]]) -> str:
    """The fault that `decoding_row` finds, or the error by which it fails; empty without one."""
    try:
        row = decoding_row(model, prompts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return row.found if row.wrong else ""
