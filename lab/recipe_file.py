"""Recipes as files: TOML that extends other TOML, and any table as the dataclass it describes."""

import math
import tomllib
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Literal

from model.weights import is_embedded
from lab.recipe import STAGES, Recipe, RecipeError

RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str, variant: str = "") -> tuple[str, Recipe]:
    """Read `recipes/<name>.toml`, or a path ending in .toml; the name to call the run by, and the recipe.

    `variant` ("tiny") picks the sibling `<name>-<variant>.toml` where there is one.

    A recipe may say `extends = "other.toml"`: it then states only what differs. Tables [grpo] and [sft] hold what all
    stages of that kind share; a stage's own fields come first.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    sibling = path.with_name(f"{path.stem}-{variant}.toml")
    if variant and sibling.is_file():
        path = sibling
    return path.stem, build_recipe(read_tables(path), path)


def recipe_for(model: str) -> Recipe:
    """The recipe to evaluate a model by that was not trained here: that of an embedded model, else 256."""
    if is_embedded(model):
        for path in sorted(RECIPES.glob("*.toml")):
            recipe = build_recipe(read_tables(path), path)
            if recipe.model == model:
                return recipe
    return load_recipe("256")[1]


def build_recipe(tables: dict, path: Path) -> Recipe:
    """The recipe that parsed TOML describes; `path` is where it was read, to be named in errors."""
    tables = dict(tables)
    shared = {kind: tables.pop(kind, {}) for kind in STAGES}
    stages = tables.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(f"{path}: stages must be written as [[stages]] tables")
    try:
        for kind, table in shared.items():
            from_dict(STAGES[kind], table, f"{kind}.")  # also where no stage takes from it
        tables["stages"] = [{**shared.get(str(stage.get("kind")), {}), **stage} for stage in stages]
        return from_dict(Recipe, tables)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_tables(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    """A recipe's TOML with what it extends merged in; tables merge, values and lists replace."""
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
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def from_dict(cls, values: dict, where: str = ""):
    """Build a (nested) dataclass from parsed TOML or JSON; unknown names and wrong types are errors that name the field."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where.rstrip('.') or cls.__name__} must be a table, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise RecipeError(f"unknown field {where}{name}; {cls.__name__} has {', '.join(sorted(known))}")
    built = {name: convert(hints[name], value, f"{where}{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except RecipeError:
        raise
    except ValueError as error:  # the dataclass's own check
        raise RecipeError(f"{where.rstrip('.') or cls.__name__}: {error}") from None


def convert(hint, value, where: str):
    """`value` as `hint`: the few kinds of type that occur in a recipe."""
    if is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")
    if typing.get_origin(hint) is tuple:  # the stages
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list of tables, not {value!r}")
        return tuple(convert(typing.get_args(hint)[0], stage, f"{where}.{number}") for number, stage in enumerate(value))
    if all(map(is_dataclass, typing.get_args(hint) or (0,))):  # one of several, by its kind
        kinds = {cls.kind: cls for cls in typing.get_args(hint)}
        kind = value.get("kind") if isinstance(value, dict) else value
        if not isinstance(kind, str) or kind not in kinds:
            allowed = " or ".join(f'"{name}"' for name in kinds)
            raise RecipeError(f"{where}.kind must be {allowed}, not {kind!r}")
        return from_dict(kinds[kind], value, f"{where}.")
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise RecipeError(f"{where} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None, or X | Literal[...]
        first, second = typing.get_args(hint)
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
    """Plain JSON of a recipe; `from_dict(Recipe, ...)` takes it back."""
    return asdict(recipe) | {"stages": [asdict(stage) for stage in recipe.stages]}
