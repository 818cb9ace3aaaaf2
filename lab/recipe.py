"""An experiment as data: the dataclasses behind a recipe's TOML, its command line and its saved `config.json`."""

import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal

from rl.reward import RewardSettings
from data import AnyTask, Countdown


class RecipeError(ValueError):
    """A recipe, or a run folder, that cannot be used; the message says which field and what would do."""


@dataclass(frozen=True)
class Range:
    """What a number in a recipe may be: from `low`, which counts itself unless `above`, to `high`.

    The upper ends are beyond any use; they stop a slip of the pen before it takes all memory or hangs.
    """

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'from'} {self.low:,g} {'and at most' if self.above else 'to'} {self.high:,.12g}"


Count = Annotated[int, Range(1, 1_000_000)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0, 1e9)]
Positive = Annotated[float, Range(0, 1e9, above=True)]


@dataclass(frozen=True)
class GRPOStage:
    """Reinforcement on sampled groups."""

    kind: Literal["grpo"] = "grpo"
    steps: Count = 80
    """Rollout batches."""
    prompts_per_step: Count = 32
    """Groups in a rollout batch."""
    samples_per_prompt: Count = 8
    """Completions in a group."""
    updates_per_step: Count = 2
    """Optimizer steps a rollout batch, each on its own share of the groups. From the second on, the clip is alive."""
    learning_rate: Positive = 2e-6
    """Reached after the warm-up."""
    warmup_steps: Annotated[int, Range(0, 1_000_000)] = 5
    """Steps of linear rise to the learning rate."""
    end_rate: Share = 1.0
    """Share of the learning rate that is left at the stage's end; it falls linearly. 1 keeps it constant."""
    clip_low: Share = 0.25
    """A token's ratio counts down to 1 - clip_low; 1 is no limit."""
    clip_high: NonNegative = 0.25
    """A token's ratio counts up to 1 + clip_high; 1e9 is no limit."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """How token losses are averaged."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL penalty towards the policy at the stage's start; above 0, a frozen copy is kept in memory."""
    importance_cap: Positive | None = None
    """Weigh tokens by min(trainer's probability / sampler's, cap), for when the two differ (int8): costs a forward."""


@dataclass(frozen=True)
class SFTStage:
    """Imitation of curated correct traces."""

    kind: Literal["sft"] = "sft"
    epochs: Annotated[int, Range(1, 1000)] = 2
    """Passes over the traces."""
    batch_size: Count = 64
    """Traces an optimizer step."""
    learning_rate: Positive = 5e-6
    """Peak; falls linearly to zero over the stage."""
    max_traces: Count = 2400
    """At most so many traces; those of later steps are taken first."""
    traces_per_problem: Count = 2
    """At most so many traces of one problem; the shortest are taken."""
    traces: str | None = None
    """A JSONL file of your own instead of the rollouts of the stage before: a problem's fields and a "completion" a line."""


STAGES = {"grpo": GRPOStage, "sft": SFTStage}


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled, in training and in evaluation alike."""

    max_new_tokens: Count = 256
    """Tokens a completion may have, its stop token included."""
    temperature: NonNegative = 1.0
    """Softmax temperature; training needs it above 0."""
    thinking: bool = True
    """Open a <think> block in the prompt; without, the prompt closes an empty one."""
    max_cache_tokens: Annotated[int, Range(1, 10**12)] | None = None
    """Tokens whose keys and values are in memory at once, a group's prompt counted once; None: what memory allows."""
    top_k: Count | None = None
    """Sample from the k likeliest tokens only (evaluation; training refuses it)."""
    top_p: Annotated[float, Range(0, 1, above=True)] | None = None
    """Sample from the likeliest tokens of this joint probability only (evaluation; training refuses it)."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Accuracy on problems that are never trained on."""

    every: Count = 10
    """Steps between evaluations; there is one before the first step and one at each stage's end."""
    problems: Count = 512
    """Held-out problems, one completion each."""
    final_problems: Annotated[int, Range(0, 1_000_000)] = 0
    """Held-out problems, these among them, for an evaluation at the run's end, sampled and greedy; 0: there is none."""

    @property
    def held_out(self) -> int:
        """How many problems are never trained on."""
        return max(self.problems, self.final_problems)


@dataclass(frozen=True)
class OptimizerSettings:
    """The update, in GRPO and in SFT alike."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw is torch's; the 8-bit ones are bitsandbytes'; paged moments go to the CPU when the GPU is full."""
    rounding: Literal["masters", "stochastic"] = "masters"
    """How weights below float32 keep small updates: float32 copies of them, or rounding up or down by chance."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this joint norm."""
    max_skipped_updates: Count = 5
    """Updates in a row whose loss or gradient is not finite, and which are left out, before the run ends with advice."""
    micro_batch_tokens: Annotated[int, Range(1, 10**9)] | Literal["auto"] = "auto"
    """Tokens in one forward and backward; changes memory and speed, not the gradient. auto: what memory allows."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in backward: slower by a third, for less memory."""


@dataclass(frozen=True)
class AdapterSettings:
    """Train low-rank adapters beside frozen weights instead of the weights (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Range(0, 4096)] = 0
    """Of the adapters; 0 trains the weights themselves. Adapters want five to ten times the learning rate."""
    alpha: Positive = 32.0
    """The adapters' product counts alpha / rank times."""
    int8: bool = True
    """Keep the frozen projections in 8 bits (bitsandbytes); checkpoints are plain and merged all the same."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes that torchrun starts divide a model; without torchrun nothing here matters."""

    kind: Literal["replicate", "shard"] = "replicate"
    """replicate: each has all weights. shard: each has a part of every layer's (FSDP2), for models too large for that."""
    sampling: Literal["auto", "whole", "layers"] = "auto"
    """Divided weights are gathered once a rollout phase (whole), or layer by layer for every token; auto: if they fit."""


@dataclass(frozen=True)
class Recipe:
    """One experiment: a model, its problems, and the stages it goes through."""

    model: str = "auto"
    """"auto" (Qwen/Qwen3-1.7B on a CUDA device, else tiny), "tiny", a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is what the checkpoint is stored in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    problems: str = "auto"
    """"hub" (the task's dataset; hub@COMMIT pins it), "generated", a .parquet or .jsonl; auto: generated for tiny, else hub."""
    task: AnyTask = field(default_factory=Countdown)
    generated_problems: Count = 20000
    """How many problems to generate, the held-out ones included."""
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Of problems, their order and sampling."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint_every: Count = 10
    """Steps between checkpoints; there is one at each stage's end."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints to keep; those at a stage's end and the most accurate are kept too."""
    out: str = ""
    """Run folder; empty is runs/<recipe>."""
    stages: tuple[GRPOStage | SFTStage, ...] = ()

    def __post_init__(self):
        check_ranges(self)
        plain = self.optimizer.kind == "adamw" and self.optimizer.rounding == "masters" and self.adapters.rank == 0
        if self.parallel.kind == "shard" and not plain:
            raise RecipeError(
                "parallel.kind shard keeps float32 weights and moments, divided: it needs optimizer.kind adamw, "
                "optimizer.rounding masters and adapters.rank 0"
            )
        for number, stage in enumerate(self.stages):
            check_ranges(stage, f"stages.{number}.")
            if stage.kind == "grpo":
                check_grpo(number, stage, self.sampling)


def check_ranges(settings, where: str = "") -> None:
    """Refuse numbers outside the range that their field's type states."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for name in (f.name for f in fields(settings)):
        value = getattr(settings, name)
        if is_dataclass(value):
            check_ranges(value, f"{where}{name}.")
        for kind in (hints[name], *typing.get_args(hints[name])):  # X, or one of X | None and X | Literal[...]
            for allowed in getattr(kind, "__metadata__", ()):
                if isinstance(value, (int, float)) and value not in allowed:
                    raise RecipeError(f"{where}{name} must be {allowed}, not {value!r}")


def check_grpo(number: int, stage: GRPOStage, sampling: SamplingSettings) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    if stage.updates_per_step > stage.prompts_per_step:
        raise RecipeError(f"stages.{number}.updates_per_step must be at most prompts_per_step, not {stage.updates_per_step}")
    completions = stage.prompts_per_step * stage.samples_per_prompt
    if completions not in Range(1, 1_000_000):
        raise RecipeError(
            f"stages.{number}: prompts_per_step x samples_per_prompt must be at most 1,000,000, not {completions:,}"
        )
    if sampling.temperature == 0:
        raise RecipeError("sampling.temperature must be above 0 for GRPO, not 0")
    if sampling.top_k is not None or sampling.top_p is not None:
        raise RecipeError(
            "sampling.top_k and sampling.top_p cannot be used with a grpo stage: the loss scores tokens under the "
            "full distribution, and the ratio would be wrong from the first update"
        )
