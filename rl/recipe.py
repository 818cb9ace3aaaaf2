"""An experiment as data: the dataclasses behind a recipe's TOML, its command line and its saved `config.json`."""

from dataclasses import dataclass, field
from typing import Literal

from data import ProblemSettings


class RecipeError(ValueError):
    """A recipe, or a run folder, that cannot be used; the message says which field and what would do."""


@dataclass(frozen=True)
class GRPOStage:
    """Reinforcement on sampled groups."""

    kind: Literal["grpo"] = "grpo"
    steps: int = 80
    """Rollout batches."""
    prompts_per_step: int = 32
    """Groups in a rollout batch."""
    samples_per_prompt: int = 8
    """Completions in a group."""
    updates_per_step: int = 2
    """Optimizer steps a rollout batch, each on its own share of the groups. From the second on, the clip is alive."""
    learning_rate: float = 2e-6
    """Reached after the warm-up."""
    warmup_steps: int = 5
    """Steps of linear rise to the learning rate."""
    end_rate: float = 1.0
    """Share of the learning rate that is left at the stage's end; it falls linearly. 1 keeps it constant."""
    clip_low: float = 0.25
    """A token's ratio counts down to 1 - clip_low; 1 is no limit."""
    clip_high: float = 0.25
    """A token's ratio counts up to 1 + clip_high; 1e9 is no limit."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """How token losses are averaged."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    kl_coef: float = 0.0
    """Weight of the KL penalty towards the policy at the stage's start; above 0, a frozen copy is kept in memory."""
    importance_cap: float | None = None
    """Weigh tokens by min(trainer's probability / sampler's, cap), for when the two differ (int8): costs a forward."""


@dataclass(frozen=True)
class SFTStage:
    """Imitation of curated correct traces."""

    kind: Literal["sft"] = "sft"
    epochs: int = 2
    """Passes over the traces."""
    batch_size: int = 64
    """Traces an optimizer step."""
    learning_rate: float = 5e-6
    """Peak; falls linearly to zero over the stage."""
    max_traces: int = 2400
    """At most so many traces; those of later steps are taken first."""
    traces_per_problem: int = 2
    """At most so many traces of one problem; the shortest are taken."""
    traces: str | None = None
    """A JSONL file of your own instead of the rollouts of the stage before: {"numbers", "target", "completion"} a line."""


STAGES = {"grpo": GRPOStage, "sft": SFTStage}


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled, in training and in evaluation alike."""

    max_new_tokens: int = 256
    """Tokens a completion may have, its stop token included."""
    temperature: float = 1.0
    """Softmax temperature; training needs it above 0."""
    thinking: bool = True
    """Open a <think> block in the prompt; without, the prompt closes an empty one."""
    max_cache_tokens: int | None = None
    """Tokens whose keys and values are in memory at once, a group's prompt counted once; None: what memory allows."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only (evaluation; training refuses it)."""
    top_p: float | None = None
    """Sample from the likeliest tokens of this joint probability only (evaluation; training refuses it)."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Accuracy on problems that are never trained on."""

    every: int = 10
    """Steps between evaluations; there is one before the first step and one at each stage's end."""
    problems: int = 512
    """Held-out problems, one completion each."""
    final_problems: int = 0
    """Held-out problems, these among them, for an evaluation at the run's end, sampled and greedy; 0: there is none."""

    @property
    def held_out(self) -> int:
        """How many problems are never trained on."""
        return max(self.problems, self.final_problems)


@dataclass(frozen=True)
class RewardSettings:
    """What the reward pays for beside a correct answer. Verdicts, and so accuracy, are the same whatever stands here."""

    near_miss: bool = True
    """Pay for well-formed answers off the target by at most 10; without, they earn what any other wrong answer does."""
    latin_only: bool = False
    """Guard against drift into other languages: a letter outside the Latin script, and the completion earns nothing."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The update, in GRPO and in SFT alike."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw is torch's; the 8-bit ones are bitsandbytes'; paged moments go to the CPU when the GPU is full."""
    rounding: Literal["masters", "stochastic"] = "masters"
    """How weights below float32 keep small updates: float32 copies of them, or rounding up or down by chance."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this joint norm."""
    max_skipped_updates: int = 5
    """Updates in a row whose loss or gradient is not finite, and which are left out, before the run ends with advice."""
    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens in one forward and backward; changes memory and speed, not the gradient. auto: what memory allows."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in backward: slower by a third, for less memory."""


@dataclass(frozen=True)
class AdapterSettings:
    """Train low-rank adapters beside frozen weights instead of the weights (LoRA, arXiv:2106.09685)."""

    rank: int = 0
    """Of the adapters; 0 trains the weights themselves. Adapters want ten times the learning rate."""
    alpha: float = 32.0
    """The adapters' product counts alpha / rank times."""
    int8: bool = True
    """Keep the frozen projections in 8 bits (bitsandbytes); checkpoints are plain and merged all the same."""


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
    """"hub" (Countdown-Tasks-3to4), "generated", a .parquet or a .jsonl; auto is generated for tiny, else hub."""
    generator: ProblemSettings = field(default_factory=ProblemSettings)
    generated_problems: int = 20000
    """How many problems to generate, the held-out ones included."""
    seed: int = 0
    """Of problems, their order and sampling."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    checkpoint_every: int = 10
    """Steps between checkpoints; there is one at each stage's end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep; those at a stage's end are kept too."""
    out: str = ""
    """Run folder; empty is runs/<recipe>."""
    stages: tuple[GRPOStage | SFTStage, ...] = ()

    def __post_init__(self):
        check(self.sampling.max_new_tokens >= 1, "sampling.max_new_tokens", self.sampling.max_new_tokens, "at least 1")
        check(self.evaluation.every >= 1, "evaluation.every", self.evaluation.every, "at least 1")
        check(self.evaluation.problems >= 1, "evaluation.problems", self.evaluation.problems, "at least 1")
        final = self.evaluation.final_problems
        check(final >= 0, "evaluation.final_problems", final, "at least 0")
        check(self.optimizer.max_grad_norm > 0, "optimizer.max_grad_norm", self.optimizer.max_grad_norm, "above 0")
        skipped = self.optimizer.max_skipped_updates
        check(skipped >= 1, "optimizer.max_skipped_updates", skipped, "at least 1")
        budget = self.optimizer.micro_batch_tokens
        check(budget == "auto" or budget >= 1, "optimizer.micro_batch_tokens", budget, "auto or at least 1")
        check(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        check(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        check(self.optimizer.weight_decay >= 0, "optimizer.weight_decay", self.optimizer.weight_decay, "at least 0")
        check(self.sampling.temperature >= 0, "sampling.temperature", self.sampling.temperature, "0 (greedy) or above")
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        room = self.sampling.max_cache_tokens
        check(room is None or room >= 1, "sampling.max_cache_tokens", room, "at least 1")
        check(top_k is None or top_k >= 1, "sampling.top_k", top_k, "at least 1")
        check(top_p is None or 0 < top_p <= 1, "sampling.top_p", top_p, "above 0 and at most 1")
        check(self.adapters.rank >= 0, "adapters.rank", self.adapters.rank, "at least 0")
        check(self.adapters.alpha > 0, "adapters.alpha", self.adapters.alpha, "above 0")
        for number, stage in enumerate(self.stages):
            check_stage(number, stage, self.sampling)


def check(ok: bool, name: str, value, wanted: str) -> None:
    if not ok:
        raise RecipeError(f"{name} must be {wanted}, not {value!r}")


def check_stage(number: int, stage: GRPOStage | SFTStage, sampling: SamplingSettings) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    counts = ("steps", "prompts_per_step", "samples_per_prompt", "updates_per_step") if stage.kind == "grpo" else (
        "epochs", "batch_size", "max_traces", "traces_per_problem")  # fmt: skip
    for name in counts:
        check(getattr(stage, name) >= 1, f"stages.{number}.{name}", getattr(stage, name), "at least 1")
    check(stage.learning_rate > 0, f"stages.{number}.learning_rate", stage.learning_rate, "above 0")
    if stage.kind == "grpo":
        check(0 <= stage.clip_low <= 1, f"stages.{number}.clip_low", stage.clip_low, "in [0, 1]")
        check(stage.clip_high >= 0, f"stages.{number}.clip_high", stage.clip_high, "at least 0")
        check(0 <= stage.end_rate <= 1, f"stages.{number}.end_rate", stage.end_rate, "in [0, 1]")
        check(stage.kl_coef >= 0, f"stages.{number}.kl_coef", stage.kl_coef, "at least 0")
        cap = stage.importance_cap
        check(cap is None or cap > 0, f"stages.{number}.importance_cap", cap, "above 0")
        check(stage.updates_per_step <= stage.prompts_per_step, f"stages.{number}.updates_per_step",
              stage.updates_per_step, "at most prompts_per_step")  # fmt: skip
        check(sampling.temperature > 0, "sampling.temperature", sampling.temperature, "above 0 for GRPO")
        if sampling.top_k is not None or sampling.top_p is not None:
            raise RecipeError(
                "sampling.top_k and sampling.top_p cannot be used with a grpo stage: the loss scores tokens under the "
                "full distribution, and the ratio would be wrong from the first update"
            )
