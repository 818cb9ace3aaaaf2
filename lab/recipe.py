"""Recipes: the dataclasses behind a TOML file, the command line and a run's `config.json`."""

import math
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal

from data import AnyTask, Countdown, DataError, split_problems
from data.task import Problem
from model.weights import is_embedded
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.ranges import Count, CountOrZero, Positive, Range
from rl.reward import RewardSettings
from rl.rollout import SamplingSettings
from rl.sft import SFTStage

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = {"grpo": GRPOStage, "sft": SFTStage}
# Fields of older recipes that are gone, with their defaults, which are what holds for every run now.
RETIRED = {
    GRPOStage: {"importance_cap": None},
    OptimizerSettings: {"max_skipped_updates": 5, "weight_decay": 0.0, "max_grad_norm": 1.0},
}


class RecipeError(ValueError):
    """A recipe or run folder cannot be used. The message names the field, and says what would be accepted."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Accuracy on problems that are never trained on."""

    every: Count = 10
    """Steps between evaluations; there is one before the first step and one at each stage's end."""
    problems: Count = 512
    """Held-out problems, one completion each."""
    final_problems: CountOrZero = 0
    """Held-out problems for an evaluation at the run's end, sampled and greedy; 0: there is none."""

    @property
    def held_out(self) -> int:
        """How many problems are never trained on."""
        return max(self.problems, self.final_problems)


@dataclass(frozen=True)
class AdapterSettings:
    """Train low-rank adapters beside frozen weights instead of the weights (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Range(0, 4096)] = 0
    """Rank; 0 trains the weights themselves. Adapters want five to ten times the learning rate."""
    alpha: Positive = 32.0
    """The adapters' product is scaled by alpha / rank."""
    int8: bool = True
    """Keep the frozen projections in 8 bits (bitsandbytes); checkpoints are plain and merged all the same."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes that torchrun starts hold a model; without torchrun this changes nothing."""

    kind: Literal["replicate", "shard"] = "replicate"
    """replicate: each rank has all weights. shard: each has a part of every layer (FSDP2)."""
    sampling: Literal["auto", "whole", "layers"] = "auto"
    """Gather a sharded model once a rollout phase (whole), or each layer for every token; auto: what fits."""


@dataclass(frozen=True)
class Recipe:
    """One experiment: a model, its problems, and the stages of its training."""

    model: str = "auto"
    """"auto" (Qwen/Qwen3-1.7B on a CUDA device, else tiny), "tiny", a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is what the checkpoint is stored in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    problems: str = "auto"
    """"hub" (the task's dataset; hub@COMMIT pins it), "generated", or a .parquet or .jsonl file; auto:
    generated for tiny, else hub."""
    task: AnyTask = field(default_factory=Countdown)
    generated_problems: Count = 20000
    """How many problems to generate, the held-out ones included."""
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Of the problems, their order, and sampling."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint_every: Count = 10
    """Steps between checkpoints; there is one at each stage's end."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints to keep; stage ends and the most accurate one are kept too."""
    out: str = ""
    """Run folder; empty is runs/<recipe>."""
    stages: tuple[GRPOStage | SFTStage, ...] = ()

    def __post_init__(self):
        check_ranges(self)
        kept = (self.optimizer.kind, self.optimizer.rounding, self.adapters.rank)
        if self.parallel.kind == "shard" and kept != ("adamw", "masters", 0):
            raise RecipeError(
                "parallel.kind shard keeps float32 weights and moments: it needs optimizer.kind adamw, "
                "optimizer.rounding masters and adapters.rank 0"
            )
        for number, stage in enumerate(self.stages):
            check_ranges(stage, f"stages.{number}.")
            if stage.kind == "grpo":
                check_grpo(number, stage, self.sampling)


def check_ranges(settings, where: str = "") -> None:
    """Refuse numbers outside the range in the type of their field."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for name, hint in hints.items():
        value = getattr(settings, name)
        if is_dataclass(value):
            check_ranges(value, f"{where}{name}.")
        for kind in (hint, *typing.get_args(hint)):  # X, or one of X | None and X | Literal[...]
            for allowed in getattr(kind, "__metadata__", ()):
                if isinstance(value, (int, float)) and value not in allowed:
                    raise RecipeError(f"{where}{name} must be {allowed}, not {value!r}")


def check_grpo(number: int, stage: GRPOStage, sampling: SamplingSettings) -> None:
    """Refuse a stage that cannot be trained."""
    updates, completions = stage.updates_per_step, stage.prompts_per_step * stage.samples_per_prompt
    if updates > stage.prompts_per_step:
        raise RecipeError(f"stages.{number}.updates_per_step must be at most prompts_per_step, not {updates}")
    if completions > 1_000_000:
        product = f"stages.{number}: prompts_per_step x samples_per_prompt"
        raise RecipeError(f"{product} must be at most 1,000,000, not {completions:,}")
    if sampling.temperature == 0:
        raise RecipeError("sampling.temperature must be above 0 for GRPO, not 0")
    if sampling.top_k is not None or sampling.top_p is not None:
        raise RecipeError(
            "sampling.top_k and sampling.top_p cannot be used with a grpo stage: the loss scores tokens "
            "under the full distribution, and the ratio would be wrong from the first update"
        )


def problems_of(recipe: Recipe) -> tuple[list[Problem], list[Problem]]:
    """The training and the held-out problems of a recipe; none is in both."""
    source = recipe.problems
    if source == "auto":
        source = "generated" if is_embedded(recipe.model) else "hub"
    if source != "generated":
        problems = recipe.task.load(source)
    else:
        try:
            problems = recipe.task.generate(recipe.generated_problems, recipe.seed)
        except ValueError as error:
            raise DataError(f"task: {error}") from None
    return split_problems(problems, recipe.evaluation.held_out, recipe.seed)


def load_recipe(name: str, variant: str = "") -> tuple[str, Recipe]:
    """The name and the recipe of `recipes/<name>.toml`, or of a path that ends in .toml.

    With a `variant` ("tiny"), it is that of `<name>-<variant>.toml` if there is such a file. A recipe may say
    `extends = "other.toml"` and then states only what differs. Tables [grpo] and [sft] hold what all stages
    of that kind share; a stage's own fields override them.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    sibling = path.with_name(f"{path.stem}-{variant}.toml")
    if variant and sibling.is_file():
        path = sibling
    return path.stem, build_recipe(read_tables(path), path)


def recipe_for(model: str) -> Recipe:
    """The recipe to evaluate a model with that was not trained here: an embedded model's own, else 256."""
    if is_embedded(model):
        for path in sorted(RECIPES.glob("*.toml")):
            recipe = build_recipe(read_tables(path), path)
            if recipe.model == model:
                return recipe
    return load_recipe("256")[1]


def build_recipe(tables: dict, path: Path) -> Recipe:
    """The recipe in the parsed TOML of `path`."""
    tables = dict(tables)
    shared = {kind: tables.pop(kind, {}) for kind in STAGES}
    stages = tables.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(f"{path}: stages must be written as [[stages]] tables")
    try:
        for kind, table in shared.items():
            from_dict(STAGES[kind], table, f"{kind}.")  # checks it even if there is no such stage
        tables["stages"] = [{**shared.get(str(stage.get("kind")), {}), **stage} for stage in stages]
        return from_dict(Recipe, tables)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_tables(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    """A recipe's TOML over that of the recipe it extends."""
    path = path.resolve()
    if path in extended_by:
        raise RecipeError(f"{path}: extends itself")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {path}; there are {known}, or name a .toml file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    base = tables.pop("extends", None)
    if base is None:
        return tables
    return merge(read_tables(path.parent / str(base), (*extended_by, path)), tables)


def merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`: tables are merged, values and lists replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def from_dict(cls, values: dict, where: str = ""):
    """A dataclass, with those nested in it, from parsed TOML or JSON. A RecipeError names a bad field."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where.rstrip('.') or cls.__name__} must be a table, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    retired = RETIRED.get(cls, {})
    built = {}
    for name, value in values.items():
        if name in known:
            built[name] = convert(hints[name], value, f"{where}{name}")
        elif name not in retired:
            raise RecipeError(f"unknown field {where}{name}; {cls.__name__} has {', '.join(sorted(known))}")
        elif value != retired[name]:
            raise RecipeError(f"{where}{name} is no longer a field, and is always {retired[name]!r} now")
    try:
        return cls(**built)
    except RecipeError:
        raise
    except ValueError as error:  # the dataclass's own check
        raise RecipeError(f"{where.rstrip('.') or cls.__name__}: {error}") from None


def convert(hint, value, where: str):
    """`value` as a `hint`, one of the few kinds of type that occur in a recipe."""
    arguments = typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")
    if typing.get_origin(hint) is tuple:  # the stages
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list of tables, not {value!r}")
        return tuple(convert(arguments[0], stage, f"{where}.{number}") for number, stage in enumerate(value))
    if arguments and all(map(is_dataclass, arguments)):  # one of several, by its kind
        kinds = {cls.kind: cls for cls in arguments}
        kind = value.get("kind") if isinstance(value, dict) else value
        if not isinstance(kind, str) or kind not in kinds:
            allowed = " or ".join(f'"{name}"' for name in kinds)
            raise RecipeError(f"{where}.kind must be {allowed}, not {kind!r}")
        return from_dict(kinds[kind], value, f"{where}.")
    if typing.get_origin(hint) is Literal:
        if value not in arguments:
            raise RecipeError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None, or X | Literal[...]
        first, second = arguments
        others = (None,) if second is types.NoneType else typing.get_args(second)
        if value in others:
            return value
        if isinstance(value, str) and "auto" in others:
            raise RecipeError(f'{where} must be "auto" or of type {first.__name__}, not {value!r}')
        return convert(first, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} must be finite, not {value!r}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


def to_dict(recipe: Recipe) -> dict:
    """A recipe as plain JSON; `from_dict(Recipe, ...)` is the inverse."""
    return asdict(recipe) | {"stages": [asdict(stage) for stage in recipe.stages]}
