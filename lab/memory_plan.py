"""Plan a run's memory from shapes and settings, before it starts."""

from dataclasses import dataclass

import torch

from lab.recipe import Recipe
from model import ModelError, Qwen3, Qwen3Config
from model.logprobs import chunk_tokens
from model.memory import CACHE_SHARE, LOGITS_COPIES, token_bytes
from model.sampler import PREFILL_TOKENS
from rl.distributed import PIECE
from rl.optimizer import OptimizerSettings

LARGEST_AUTO = {"cpu": 2**13, "cuda": 2**15}  # tokens of a micro-batch; larger ones are no faster
TRANSIENT_LAYERS = 3  # layers' worth of activations that backward allocates and frees on its way; measured
STEP_BYTES = 20  # of an optimizer step, per weight of a piece: float32 weight, gradient and temporaries
MARGIN = 0.92  # of the free memory; the rest is for what the plan does not cover


@dataclass(frozen=True)
class Work:
    """The most that one process does at once, if every completion is as long as it may be."""

    sample_tokens: int  # tokens of the longest sample, which a micro-batch never splits
    group_tokens: int  # tokens of the largest group, which is split only if it does not fit
    key_copies: float  # keys that attention reads per token of a group: a prompt's are read by each branch
    update_tokens: int  # tokens of an optimizer step, packed as in `rl.batch`; 0 without training
    rows: int  # completions sampled together
    prefill_tokens: int  # tokens of their prompts
    cache_tokens: int  # tokens of cache that they take
    has_reference: bool  # a stage keeps a second, frozen policy


def work_of(recipe: Recipe, prompt_length: int, processes: int = 1) -> Work:
    """The work of one of `processes` processes, which divide a recipe's evenly."""

    def per_process(count: int) -> int:
        return -(-count // processes)

    new_tokens = recipe.sampling.max_new_tokens
    sample_tokens = prompt_length + new_tokens
    rows = prompts = per_process(recipe.evaluation.held_out)
    cache = prompts * sample_tokens
    largest = 1
    update = 0
    key_copies = 1.0
    has_reference = False
    for stage in recipe.stages:
        if stage.kind == "sft":
            update = max(update, per_process(stage.batch_size) * sample_tokens)
            continue
        count = stage.samples_per_prompt
        groups = per_process(stage.prompts_per_step)
        group_tokens = prompt_length + count * new_tokens
        largest = max(largest, group_tokens)
        key_copies = max(key_copies, count * sample_tokens / group_tokens)
        update = max(update, per_process(-(-stage.prompts_per_step // stage.updates_per_step)) * group_tokens)
        rows = max(rows, groups * count)
        prompts = max(prompts, groups)
        cache = max(cache, groups * group_tokens)
        has_reference |= stage.kl_coef > 0
    cache = min(cache, recipe.sampling.max_cache_tokens or cache)
    return Work(
        sample_tokens, largest, key_copies, update, rows, prompts * prompt_length, cache, has_reference
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a process adds to what it holds already. Updating and sampling take turns."""

    weights: int
    reference: int
    masters: int
    moments: int
    gradients: int
    activations: int
    output_head: int
    updating: int  # the peak of an update, beyond `lasting`
    sampling: int  # the peak of sampling, beyond `lasting`
    micro_batch_tokens: int  # 0 without training

    @property
    def lasting(self) -> int:
        return self.weights + self.masters + self.moments + self.reference

    @property
    def peak(self) -> int:
        return self.lasting + max(self.updating, self.sampling)

    def __str__(self) -> str:
        sizes = []
        for name in ("weights", "masters", "moments", "reference", "sampling", "updating"):
            size = getattr(self, name)
            if size:
                sizes.append(f"{name} {gb(size)}")
        if self.micro_batch_tokens:
            sizes.append(f"micro-batches of {self.micro_batch_tokens:,} tokens")
        return ", ".join(sizes)


def gb(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def activation_bytes(config: Qwen3Config, itemsize: int, key_copies: float) -> int:
    """Bytes that autograd keeps of one token in one `model.qwen3.DecoderLayer` for backward.

    Of an RMSNorm the input in float32, the normalised values and the result; queries and attention's output,
    twice; keys and values, also joined to the prompt's; of the MLP projections, activation and product.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = 2 * config.hidden_size * (4 + 2 * itemsize)
    attention = queries * (4 + 4 * itemsize) + keys * (4 + itemsize)
    joined = int(2 * (1 + key_copies) * keys * itemsize)
    return norms + attention + joined + 4 * config.intermediate_size * itemsize


def plan_memory(model: Qwen3, settings: OptimizerSettings, work: Work, free: int) -> MemoryPlan:
    """Plan a run's memory; `free` bytes were free before the weights were loaded."""
    config = model.config
    size = model.dtype.itemsize
    head = model.lm_head.weight
    device = model.device.type

    # 1. What the run holds from beginning to end, and gradients.
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    reference = weights if work.has_reference else 0
    trained = [p for p in model.parameters() if p.requires_grad and work.update_tokens]
    low = sum(p.numel() for p in trained if p.dtype != torch.float32)
    masters = 4 * low if settings.rounding == "masters" else 0
    moments = (8 if settings.kind == "adamw" else 2) * sum(p.numel() for p in trained)
    gradients = sum(p.numel() * p.dtype.itemsize for p in trained)
    lasting = weights + reference + masters + moments

    # 2. An update. Its peak is where backward begins, where it ends, or in the optimizer. With a single
    # micro-batch, gradients appear as activations are freed. Tied embeddings get theirs in two parts.
    activations = output_head = updating = tokens = 0
    if work.update_tokens:
        checkpointing = settings.activation_checkpointing
        layer = activation_bytes(config, size, work.key_copies)
        kept = config.hidden_size * size if checkpointing else layer
        per_token = config.num_hidden_layers * kept + (TRANSIENT_LAYERS + checkpointing) * layer
        head_gradient = head.numel() * head.dtype.itemsize * head.requires_grad
        chunk = min(chunk_tokens(head), work.update_tokens)
        output_head = chunk * len(head) * (20 if device == "cuda" else size) + head_gradient
        tokens = settings.micro_batch_tokens
        if tokens == "auto":
            room = MARGIN * free - lasting - gradients - output_head
            largest = min(LARGEST_AUTO[device], work.update_tokens)
            tokens = max(work.sample_tokens, min(int(room / per_token), largest))
        batch = min(max(tokens, work.sample_tokens), work.update_tokens)
        batch = batch // work.group_tokens * work.group_tokens or batch  # groups that fit are not split
        activations = batch * per_token
        several = tokens < work.update_tokens
        begin = activations + output_head + gradients * (several or checkpointing)
        end = gradients + head_gradient * (several + config.tie_word_embeddings)
        step = gradients + STEP_BYTES * min(PIECE, max(p.numel() for p in trained))
        updating = max(begin, end, step)

    # 3. Sampling: the cache, the logits of a step, and a prefill's widest layer. If they do not fit, rollouts
    # are decoded in several batches, which take the room that there is.
    logits = work.rows * config.vocab_size * (4 * LOGITS_COPIES if device == "cuda" else 2 * size)
    widest = 3 * config.intermediate_size + 4 * config.hidden_size
    prefill = min(work.prefill_tokens, PREFILL_TOKENS) * size * widest
    wanted = work.cache_tokens * token_bytes(model) + logits + prefill
    return MemoryPlan(
        weights=weights,
        reference=reference,
        masters=masters,
        moments=moments,
        gradients=gradients,
        activations=activations,
        output_head=output_head,
        updating=updating,
        sampling=min(wanted, max(0, int(CACHE_SHARE * (free - lasting)))),
        micro_batch_tokens=tokens,
    )


def check_plan(plan: MemoryPlan, free: int) -> None:
    """Refuse a run that cannot fit, by a ModelError that says what it needs and which options need less."""
    if plan.peak > free:
        smaller = "--optimizer.kind adamw8bit, --optimizer.rounding stochastic, --adapters.rank 16"
        advice = f"try --optimizer.activation-checkpointing, {smaller}, or a smaller --model"
        raise ModelError(
            f"this run needs {gb(plan.peak)} of memory and {gb(free)} are free ({plan}): {advice}"
        )
