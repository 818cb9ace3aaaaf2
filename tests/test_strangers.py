"""Folders from strangers: whatever stands in a checkpoint's JSON, it loads or is refused by one clear error."""

import copy
import json
import random
import shutil

import pytest
from helpers import random_model
from reference import TINY, TINY_TOKENS

from lab.checkpoint import TrainState, damage, load_state, save_checkpoint, saved_recipe
from lab.recipe import Recipe, RecipeError
from model import ModelError, Tokenizer, load_model

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
RUN_FILES = ("trainer_state.json", "recipe.json", "sha256.json")
CONTENTS = {
    "nothing": b"", "no utf-8": b"\xff\xfe{}", "cut": b'{"a": ', "a number": b"3", "null": b"null", "a text": b'"x"', "a list": b"[1]",
    "empty": b"{}", "nested": b"[" * 200_000, "nested tables": b'{"a":' * 200_000, "a long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "half a character": b'{"a": "\\ud800"}', "a byte order mark": b"\xef\xbb\xbf{}", "zeros": bytes(1000),
}  # fmt: skip
FINE = {
    "generation_config.json": ("empty", "a long number", "half a character"),
    "tokenizer_config.json": ("empty", "half a character"),
}
VALUES = (None, True, -1, 0, 1, 2**31, 10**12, 10**30, -1.5, 1e300, float("nan"), float("inf"), "", "x", "../x", "\ud800", [], [[]], {},
          [None], {"a": 1})  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run") / "step_0001"
    model = random_model(vocab_size=TINY_TOKENS)
    save_checkpoint(folder, model, Tokenizer(TINY), None, TrainState(), Recipe())
    load_model(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


def refused(folder, name: str) -> bool:
    """Whether reading a checkpoint's file is refused, by an error that names the folder and fits on a screen."""
    for read in (load_model,) if name in MODEL_FILES else (load_state, saved_recipe):
        try:
            read(folder)
        except (ModelError, RecipeError) as error:
            message = str(error)
            assert str(folder) in message and len(message) < 1000, message[:2000]
            return True
    return damage(folder) is not None


@pytest.mark.parametrize("name", MODEL_FILES + RUN_FILES)
def test_a_file_of_something_else_is_refused(name, folder):
    for kind, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        assert refused(folder, name) or kind in FINE.get(name, ()), kind


def paths(value, path=()) -> list[tuple]:
    """The paths to all values inside parsed JSON."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, child in below for inner in [(*path, key), *paths(child, (*path, key))]]


@pytest.mark.parametrize("name", MODEL_FILES + RUN_FILES)
def test_any_value_of_any_type_anywhere_is_refused_or_harmless(name, folder):
    content = (folder / name).read_bytes()
    sound = json.loads(content)
    rng, every = random.Random(0), paths(sound)
    shallow = [path for path in every if len(path) <= 2]
    for _ in range(100):
        *above, last = rng.choice(rng.choice((every, shallow)))
        spoilt = inside = copy.deepcopy(sound)
        for key in above:
            inside = inside[key]
        if rng.random() < 0.1:
            del inside[last]
        else:
            inside[last] = rng.choice(VALUES)
        (folder / name).write_text(json.dumps(spoilt))
        refused(folder, name)
    (folder / name).write_bytes(content)
    assert not refused(folder, name)


def test_any_bytes_anywhere_are_refused_or_harmless(folder):
    rng = random.Random(0)
    for name in (*MODEL_FILES, *RUN_FILES, "model.safetensors"):
        content = (folder / name).read_bytes()
        for _ in range(40):
            spoilt, start = bytearray(content), rng.randrange(min(len(content), 3000))
            spoilt[start : start + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
            (folder / name).write_bytes(spoilt)
            refused(folder, name)
        (folder / name).write_bytes(content)
    assert not refused(folder, "config.json") and damage(folder) is None
