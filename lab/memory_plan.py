"""What a run will hold in memory, worked out before it starts from shapes and settings."""

from dataclasses import dataclass, replace

import torch

from model import ModelError, Qwen3, Qwen3Config
from model.logprobs import chunk_tokens
from model.memory import CACHE_SHARE, LOGITS_COPIES, token_bytes
from model.sampler import PREFILL_TOKENS
from rl.optimizer import PIECE
from lab.recipe import GRPOStage, OptimizerSettings, Recipe
from lab.sharding import local, sharding_of

LARGEST_AUTO = {"cpu": 2**13, "cuda": 2**15}  # tokens in a micro-batch beyond which nothing gets faster
TRANSIENT_LAYERS = 3  # what backward makes and drops on its way, in layers' worth of activations; measured
STEP_BYTES = 20  # for each weight of a piece: float32 weights and gradient, and what the optimizer makes of them
MARGIN = 0.92  # of the free memory; the rest is for what no plan knows of


@dataclass(frozen=True)
class Work:
    """The most that a run does at once, all completions taken as long as they may get.

    Attributes:
        prompt_length: tokens of the longest prompt.
        sample_tokens: tokens of the longest sample, which no micro-batch can divide.
        group_tokens: tokens of the largest group, which none divides if it fits whole.
        expanded: keys that branches of a group attend to, over the tokens of the group.
        update_tokens: tokens of one optimizer step, as `rl.batch` packs them; 0 without training.
        rows, prompts, cache_tokens: completions sampled together, their prompts, and the tokens of cache they take.
        has_reference: a stage keeps a second, frozen policy.
    """

    prompt_length: int
    sample_tokens: int
    group_tokens: int
    expanded: float
    update_tokens: int
    rows: int
    prompts: int
    cache_tokens: int
    has_reference: bool


def work_of(recipe: Recipe, prompt_length: int, processes: int = 1) -> Work:
    """The work of one of some processes, which share it evenly."""

    def share(count: int) -> int:
        return -(-count // processes)

    new = recipe.sampling.max_new_tokens
    rows = prompts = share(recipe.evaluation.held_out)
    cache, update, expanded, largest = prompts * (prompt_length + new), 0, 1.0, 1
    grpo = [stage for stage in recipe.stages if isinstance(stage, GRPOStage)]
    for stage in recipe.stages:
        if stage not in grpo:
            update = max(update, share(stage.batch_size) * (prompt_length + new))
            continue
        count = stage.samples_per_prompt
        group = prompt_length + count * new
        update = max(update, share(-(-stage.prompts_per_step // stage.updates_per_step)) * group)
        expanded, largest = max(expanded, count * (prompt_length + new) / group), max(largest, group)
        groups = share(stage.prompts_per_step)
        rows, prompts = max(rows, groups * count), max(prompts, groups)
        cache = max(cache, groups * group)
    if recipe.sampling.max_cache_tokens is not None:
        cache = min(cache, recipe.sampling.max_cache_tokens)
    has_reference = any(stage.kl_coef for stage in grpo)
    return Work(prompt_length, prompt_length + new, largest, expanded, update, rows, prompts, cache, has_reference)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process, by what they are for. What an update and what sampling holds do not exist at the same time.

    `gathered` is what a divided model has of its layers in use, and `whole_copy` what it is sampled from, if that fits.
    """

    process: int
    weights: int
    reference: int
    masters: int = 0
    moments: int = 0
    gradients: int = 0
    activations: int = 0
    output_head: int = 0
    gathered: int = 0
    whole_copy: int = 0
    updating: int = 0
    sampling: int = 0
    micro_batch_tokens: int = 0

    @property
    def lasting(self) -> int:
        return self.process + self.weights + self.masters + self.moments + self.reference

    @property
    def peak(self) -> int:
        return self.lasting + max(self.updating, self.sampling)

    def __str__(self) -> str:
        def listed(*names: str) -> str:
            return ", ".join(f"{name.replace('_', ' ')} {gb(getattr(self, name))}" for name in names if getattr(self, name))

        text = [listed("process", "weights", "masters", "moments", "reference")]
        if self.micro_batch_tokens:
            parts = listed("gradients", "activations", "output_head", "gathered")
            text.append(f"{listed('updating')} at most in micro-batches of {self.micro_batch_tokens:,} tokens ({parts})")
        return "; ".join([*text, f"or {listed('sampling')}" if self.micro_batch_tokens else listed("sampling")])


def gb(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def activation_bytes(config: Qwen3Config, itemsize: int, expanded: float) -> int:
    """Bytes that one token leaves behind in one layer for backward.

    By what autograd keeps of `model.qwen3.DecoderLayer`: of an RMSNorm its input in float32, the normalised values and the
    result; queries and what attention made of them, twice; keys and values, and for branches those of prefix and branch
    in one (`expanded` times their own number); of the MLP both projections, the activation and the product.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = 2 * hidden * (4 + 2 * itemsize)
    attention = queries * (4 + 4 * itemsize) + keys * (4 + itemsize) + int(2 * (1 + expanded) * keys * itemsize)
    return norms + attention + 4 * inner * itemsize


def micro_batch_bytes(model: Qwen3, settings: OptimizerSettings, work: Work) -> int:
    """Bytes of activations for each token of a micro-batch."""
    config, size = model.config, model.dtype.itemsize
    layer = activation_bytes(config, size, work.expanded)
    if settings.activation_checkpointing:
        return config.num_hidden_layers * config.hidden_size * size + (1 + TRANSIENT_LAYERS) * layer
    return (config.num_hidden_layers + TRANSIENT_LAYERS) * layer


def sampling_bytes(model: Qwen3, work: Work) -> int:
    """Bytes of the cache, of the logits of a step, and of a prefill's widest layer."""
    config, size = model.config, model.dtype.itemsize
    logits = work.rows * config.vocab_size * (4 * LOGITS_COPIES if model.device.type == "cuda" else 2 * size)
    prefill = min(work.prompts * work.prompt_length, PREFILL_TOKENS) * size
    return work.cache_tokens * token_bytes(model) + logits + prefill * (3 * config.intermediate_size + 4 * config.hidden_size)


def logits_bytes(model: Qwen3, tokens: int) -> int:
    """Bytes of a chunk of logits and, on a GPU, of what is made of all its rows at a time."""
    head = model.lm_head.weight
    return min(chunk_tokens(head), tokens) * len(head) * (model.dtype.itemsize + 16 * (model.device.type == "cuda"))


def updating_bytes(model: Qwen3, plan: "MemoryPlan", several: bool, checkpointing: bool) -> int:
    """Bytes at the highest point of an update: where the layers' backward begins, where the embedding's ends, or in the step.

    With a single micro-batch, gradients come as activations go. A tied embedding's gradient is made twice, for what it
    does as output head and as embedding, before the two are added.
    """
    head = model.lm_head.weight
    head_bytes = head.numel() * head.dtype.itemsize if head.requires_grad else 0
    begin = (plan.gradients if several or checkpointing else 0) + plan.activations + plan.output_head + plan.gathered
    end = plan.gradients + head_bytes * (several + model.config.tie_word_embeddings)
    step = plan.gradients + STEP_BYTES * min(PIECE, max(local(p).numel() for p in model.parameters() if p.requires_grad))
    return max(begin, end, step)


def divided_bytes(model: Qwen3) -> tuple[int, int]:
    """(of two layers in use, of all layers in a copy to sample from), for a divided model; else (0, 0)."""
    if sharding_of(model) is None:
        return 0, 0
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    size = model.dtype.itemsize
    return 2 * max(layers) * (size + 4 + 4), sum(layers) * size  # weights, and gradients as they are made and added up


def plan_memory(model: Qwen3, settings: OptimizerSettings, work: Work, free: int, process: int = 0) -> MemoryPlan:
    """Work out a run's memory; `micro_batch_tokens` "auto" is made a number by what is left of `free`.

    Args:
        free: bytes that could be had before the weights came.
        process: bytes that were held then.
    """
    weights = sum(p.numel() * p.dtype.itemsize for p in map(local, model.parameters()))
    gathered, whole_copy = divided_bytes(model)
    plan = MemoryPlan(process, weights, reference=weights if work.has_reference else 0, gathered=gathered)
    if work.update_tokens:
        head = model.lm_head.weight
        trained = [local(p) for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        low = sum(p.numel() for p in trained if p.dtype != torch.float32)
        plan = replace(
            plan,
            masters=4 * low if settings.rounding == "masters" else 0,
            moments=(8 if settings.kind == "adamw" else 2) * count,
            gradients=sum(p.numel() * p.dtype.itemsize for p in trained),
            output_head=logits_bytes(model, work.update_tokens) + head.numel() * head.dtype.itemsize * head.requires_grad,
        )
        per_token = micro_batch_bytes(model, settings, work)
        tokens = settings.micro_batch_tokens
        if tokens == "auto":
            room = MARGIN * free - (plan.lasting - process) - plan.gradients - plan.output_head - plan.gathered
            largest = min(LARGEST_AUTO["cuda" if model.device.type == "cuda" else "cpu"], work.update_tokens)
            tokens = max(work.sample_tokens, min(int(room / per_token), largest))
        held = min(max(tokens, work.sample_tokens), work.update_tokens)
        held = held // work.group_tokens * work.group_tokens or held
        plan = replace(plan, micro_batch_tokens=tokens, activations=held * per_token)
        several = tokens < work.update_tokens
        plan = replace(plan, updating=updating_bytes(model, plan, several, settings.activation_checkpointing))
    # The sampler takes what it finds, in several waves if it has to.
    left = free - (plan.lasting - process)
    plan = replace(plan, whole_copy=whole_copy if 2 * whole_copy <= left else 0)
    room = CACHE_SHARE * (left - plan.whole_copy)
    return replace(plan, sampling=min(sampling_bytes(model, work), max(0, int(room))) + (plan.whole_copy or gathered))


def check_plan(plan: MemoryPlan, model: Qwen3, settings: OptimizerSettings, work: Work, free: int) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ModelError: with what would make it fit.
    """
    need = plan.peak - plan.process
    if need <= free:
        return
    changes = {
        "--optimizer.activation-checkpointing": {"activation_checkpointing": True},
        "--optimizer.kind adamw8bit": {"kind": "adamw8bit"},
        "--optimizer.rounding stochastic": {"rounding": "stochastic"},
        "--optimizer.micro-batch-tokens auto": {"micro_batch_tokens": "auto"},
    }
    savings, all_changes = [], settings
    for option, change in changes.items():
        saved = plan.peak - plan_memory(model, replace(settings, **change), work, free, plan.process).peak
        if saved > 0:
            savings.append(f"{option} saves {gb(saved)}")
            all_changes = replace(all_changes, **change)
    least = plan_memory(model, all_changes, work, free, plan.process)
    beyond = "; even together that is not enough: try --adapters.rank 16 or a smaller --model"
    enough = "" if least.peak - least.process <= free else beyond
    advice = ", ".join(savings) or "try --adapters.rank 16 or a smaller --model"
    raise ModelError(
        f"this run needs {gb(need)} of memory and {gb(free)} are free ({plan}): {advice}{enough if savings else ''}"
    )
