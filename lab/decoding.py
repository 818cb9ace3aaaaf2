"""Compare decoding with plain forwards. A run on a GPU does so once per device and version."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lab.runfolder import write_whole
from model import ModelError, Qwen3, generate, token_logprobs
from model.sampler import TokenChoice, random_uniforms, sample_tokens
from model.weights import TINY

CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "pocketgrpo/decoding.json")
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
def decoding_row(what: str, model: Qwen3, prompts: list[list[int]]) -> Row:
    """`generate` against a plain forward over each completion; the worse of with and without top-k."""
    others, gaps = [], []
    uniforms = random_uniforms(prompts, num_samples=4, max_new_tokens=NEW_TOKENS, seed=0).to(model.device)
    for top_k in (None, 20):
        count = other = gap = 0
        groups = generate(
            model,
            prompts,
            num_samples=4,
            max_new_tokens=NEW_TOKENS,
            seed=0,
            top_k=top_k,
            stop_token_ids=list(range(0, model.num_tokens, 50)),  # rows finish at all lengths
        )
        for prompt, group, rows in zip(prompts, groups, uniforms, strict=True):
            for completion, row in zip(group, rows, strict=True):
                ids = torch.tensor(prompt + completion.token_ids, device=model.device)
                logits = model.next_logits(model.model(ids[None])[0, len(prompt) - 1 : -1])
                ids = ids[len(prompt) :]
                choice = TokenChoice(top_k=top_k)
                sampled, _ = sample_tokens(logits, row[: len(ids)], model.num_tokens, choice)
                logprobs = token_logprobs(logits, 1.0, model.num_tokens).gather(-1, ids[:, None])[:, 0]
                count += len(ids)
                other += int((sampled != ids).sum())
                gap += float((logprobs - logprobs.new_tensor(completion.logprobs)).abs().sum())
        others.append(other / count)
        gaps.append(gap / count)
    other, gap = np.max(others), np.max(gaps)  # NaN if one of them is
    found = f"{100 * other:.1f} % other ids, log-probabilities {gap:.1g} nats apart"
    wrong = exceeds(other, MOST_OTHER_IDS[model.dtype]) or exceeds(gap, MOST_NATS[model.dtype])
    return Row(what, found, wrong)


def check_decoding(model: Qwen3, prompts: list[list[int]]) -> str | None:
    """On a GPU, see that decoding is right; where CUDA graphs make it fail, `model` decodes without.

    The result is remembered for the device, the versions and this code. Returns a line to show, or None if
    there is nothing to say. ModelError: decoding is wrong even without graphs.
    """
    if model.device.type != "cuda":
        return None
    code = b"".join(path.read_bytes() for path in sorted(TINY.parent.glob("*.py")))
    versions = (torch.cuda.get_device_name(model.device), torch.__version__, torch.version.cuda)
    key = " ".join(map(str, (*versions, model.dtype, model.graphed, hashlib.sha256(code).hexdigest())))
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(CACHE.read_text())
    if key in known:
        model.graphed = known[key]
        return None if known[key] else "decoding  without CUDA graphs, which did not work here before"
    said = "decoding  compared with plain forwards: the same"
    graphed = model.graphed
    try:
        row = decoding_row("decoding", model, prompts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        row = Row("decoding", str(error).splitlines()[0], wrong=True)
    if row.wrong and graphed:
        model.graphed = False
        said = f"decoding  without CUDA graphs, which do not work here ({row.found}): slower, and right"
        row = decoding_row("decoding", model, prompts)
    if row.wrong:
        raise ModelError(f"decoding is wrong on this device ({row.found}): make check says more")
    if not CACHE.is_absolute():  # the user has no home
        return said
    with contextlib.suppress(OSError):
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        write_whole(CACHE, json.dumps(known | {key: model.graphed}))
    return said
