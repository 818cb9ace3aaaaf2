"""Recipes: the dataclasses behind a TOML file, the command line and a run's `config.json`."""

import contextlib
import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import Discriminator, TypeAdapter, ValidationError

from data import AnyTask, Countdown, DataError, split_problems
from data.task import AnyProblem
from model.config import read_text
from model.weights import is_bundled
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.ranges import Count, CountOrZero, Positive, ZeroToOne
from rl.reward import RewardSettings
from rl.rollout import SamplingSettings
from rl.sft import SFTStage

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = {"grpo": GRPOStage, "sft": SFTStage}


class RecipeError(ValueError):
    """A recipe or run folder cannot be used. The message names the field, and says what would be accepted."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Accuracy on problems that are never trained on."""

    every: Count = 10  # Steps between evaluations; SFT: this or a quarter of the stage, if that is more
    problems: Count = 512  # Held-out problems, one completion each
    final_problems: CountOrZero = 0  # Held-out problems for the evaluation at the end, sampled and greedy

    @property
    def held_out(self) -> int:
        """How many problems are never trained on."""
        return max(self.problems, self.final_problems)


@dataclass(frozen=True)
class AdapterSettings:
    """Train low-rank adapters beside frozen weights instead of the weights (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Interval(ge=0, le=4096)] = 0  # 0: none; they need 5 to 10 times the learning rate
    alpha: Positive = 32.0  # The adapters' product is scaled by alpha / rank
    int8: bool = True  # Keep the frozen projections in 8 bits (bitsandbytes); checkpoints are plain


@dataclass(frozen=True)
class Recipe:
    """One experiment: a model, its problems, and the stages of its training."""

    model: str = "auto"  # "auto" (Qwen/Qwen3-1.7B on a GPU, else bundled), "tiny", a folder, or a hub id
    revision: str | None = None  # Branch, tag or commit of a hub id
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of the weights; auto: as stored
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    problems: str = "auto"  # hub, hub@COMMIT, generated, a .parquet or .jsonl; auto: hub; bundled: generated
    task: Annotated[AnyTask, Discriminator("kind")] = field(default_factory=Countdown)
    generated_problems: Count = 20000  # How many problems to generate, the held-out ones included
    seed: Annotated[int, Interval(ge=0, le=2**31)] = 0  # Decides the order of the problems, and the sampling
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    checkpoint_every: Count = 10  # Steps between checkpoints; there is one at each stage's end
    checkpoint_share: ZeroToOne = 0.05  # Skip one within a stage if all would take a larger share of the time
    keep_checkpoints: Count = 2  # Latest checkpoints to keep, beside stage ends and the most accurate one
    out: str = ""  # Run folder; empty is runs/<recipe>
    stages: tuple[Annotated[GRPOStage | SFTStage, Discriminator("kind")], ...] = ()

    def __post_init__(self):
        for number, stage in enumerate(self.stages):
            if stage.kind != "grpo":
                continue
            if stage.updates_per_step > stage.prompts_per_step:
                raise RecipeError(f"stages.{number}.updates_per_step must be at most prompts_per_step")
            if self.sampling.temperature == 0:
                raise RecipeError("sampling.temperature must be above 0 for GRPO, not 0")
            if self.sampling.top_k is not None or self.sampling.top_p is not None:
                reason = "the loss scores tokens under the full distribution, so every ratio would be wrong"
                raise RecipeError(f"sampling.top_k and sampling.top_p are not for training: {reason}")


def problems_of(recipe: Recipe, seen: Iterable[str] = ()) -> tuple[list[AnyProblem], list[AnyProblem]]:
    """The training and the held-out problems of a recipe; none of `seen`, by fingerprint, is held out.

    The examples that its prompts show are in neither.
    """
    source = recipe.problems
    if source == "auto":
        source = "generated" if is_bundled(recipe.model) else "hub"
    if source != "generated":
        problems = recipe.task.load(source)
    try:
        if source == "generated":
            problems = recipe.task.generate(recipe.generated_problems, seed=0)
        shown = {problem.key for problem in recipe.task.examples(recipe.sampling.examples)}
    except ValueError as error:
        raise DataError(f"task: {error}") from None
    problems = [problem for problem in problems if problem.key not in shown]
    return split_problems(problems, recipe.evaluation.held_out, seen)


def load_recipe(name: str, variant: str = "") -> tuple[str, Recipe]:
    """The name and the recipe of `recipes/<name>.toml`, or of a path that ends in .toml.

    With a `variant` ("tiny"), it is that of `<name>-<variant>.toml` if there is such a file. A recipe may say
    `extends = "other.toml"` and then states only what differs. Tables [grpo] and [sft] hold what all stages
    of that kind share; a stage's own fields override them.
    """
    path = Path(os.path.expanduser(name)) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    sibling = path.with_name(f"{path.stem}-{variant}.toml")
    if variant and sibling.is_file():
        path = sibling
    return path.stem, build_recipe(read_tables(path), path)


def recipe_for(model: str) -> Recipe:
    """The recipe by which to ask an untrained model: the first for this model, else 256."""
    name = Path(model).name if is_bundled(model) else model
    for path in sorted(RECIPES.glob("*.toml")):
        recipe = load_recipe(path.stem)[1]
        if recipe.model == name:
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
            from_dict(STAGES[kind], table, kind)  # checks it even if there is no such stage
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
        tables = tomllib.loads(read_text(path))
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {path}; there are {known}, or name a .toml file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    base = tables.pop("extends", None)
    if base is None:
        return tables
    return merge(read_tables(path.parent / Path(os.path.expanduser(str(base))), (*extended_by, path)), tables)


def merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`: tables are merged, values and lists replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def from_dict(cls, values: dict, where: str = ""):
    """A dataclass, with those nested in it, from parsed TOML or JSON. A RecipeError names a bad field."""
    try:
        text = json.dumps(values, default=str)  # in JSON, dates cannot pass for numbers
        return TypeAdapter(cls).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        messages = [explain(fault, values, where) for fault in error.errors()]
        raise RecipeError("; ".join(messages)) from None


def explain(fault: dict, values, where: str) -> str:
    """A message for one of pydantic's errors about `values`, which belong to the field `where`."""
    names = [where] * bool(where)
    for part in fault["loc"]:
        with contextlib.suppress(LookupError, TypeError):  # pydantic names the members of unions too
            values = values[part]
            names.append(str(part))
    name = ".".join(names)
    if fault["type"] == "unexpected_keyword_argument":
        return f"unknown field {name}; python train.py --help lists those of this version"
    if fault["type"] == "json_invalid":
        return "a text, or a path, is not UTF-8: name another, or set PYTHONUTF8=1"
    if fault["type"] == "union_tag_not_found":
        return f"{name}.kind is missing"
    reason = str(fault.get("ctx", {}).get("error", "")) or f"{fault['msg']}, not {fault['input']!r:.100}"
    return f"{name}: {reason[0].lower()}{reason[1:]}" if name else reason


def checked(recipe: Recipe) -> Recipe:
    """The same recipe, if all its fields are in their ranges; else a RecipeError."""
    return from_dict(Recipe, asdict(recipe))
