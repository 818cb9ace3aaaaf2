"""Folders from strangers: whatever a checkpoint's JSON holds, it loads or is refused by one clear error."""

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
    "nothing": b"", "no utf-8": b"\xff\xfe{}", "cut": b'{"a": ', "a number": b"3", "null": b"null",
    "a text": b'"x"', "a list": b"[1]", "empty": b"{}", "nested": b"[" * 200_000,
    "nested tables": b'{"a":' * 200_000, "a long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "half a character": b'{"a": "\\ud800"}', "a byte order mark": b"\xef\xbb\xbf{}", "zeros": bytes(1000),
}  # fmt: skip
FINE = {  # file -> contents that harm nothing
    "generation_config.json": ("empty", "a long number", "half a character"),
    "tokenizer_config.json": ("empty", "half a character"),
}
NUMBERS = (-1, 0, 1, 2**31, 10**12, 10**30, -1.5, 1e300, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, "", "x", "../x", "\ud800", [], [[]], {}, [None], {"a": 1})


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
    """Whether a checkpoint's file is refused, by an error that names the folder and fits on a screen."""
    for read in (load_state, saved_recipe) if name in RUN_FILES else (load_model,):
        try:
            read(folder)
        except (ModelError, RecipeError) as error:
            message = str(error)
            assert str(folder) in message
            assert len(message) < 1000
            return True
    return damage(folder) is not None


@pytest.mark.parametrize("name", MODEL_FILES + RUN_FILES)
def test_a_file_of_something_else_is_refused(name, folder):
    for kind, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        assert refused(folder, name) or kind in FINE.get(name, ()), kind


def places(parsed) -> list[tuple]:
    """Where values are in parsed JSON, the outer ones first, as a table or list and the key in it."""
    found, values = [], [parsed]
    for value in values:  # which grows
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            found.append((value, key))
            values.append(value[key])
    return found


def with_another_value(content: bytes, rng: random.Random) -> bytes:
    """JSON in which a value, of the outer ones as often as of all, is replaced or deleted."""
    spoilt = json.loads(content)
    every = places(spoilt)
    inside, key = rng.choice(rng.choice((every, every[:40])))
    if rng.random() < 0.1:
        del inside[key]
    else:
        inside[key] = rng.choice(VALUES)
    return json.dumps(spoilt).encode()


def with_other_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes, near the beginning, replaced, removed or inserted."""
    start = rng.randrange(min(len(content), 3000))
    return content[:start] + rng.randbytes(rng.randrange(4)) + content[start + rng.randrange(4) :]


@pytest.mark.parametrize("name", (*MODEL_FILES, *RUN_FILES, "model.safetensors"))
def test_any_value_and_any_bytes_are_refused_or_harmless(name, folder):
    file, rng = folder / name, random.Random(0)
    content = file.read_bytes()
    for _ in range(60 if name.endswith("json") else 0):
        file.write_bytes(with_another_value(content, rng))
        refused(folder, name)
    for _ in range(20):
        file.write_bytes(with_other_bytes(content, rng))
        refused(folder, name)
    file.write_bytes(content)
    assert not refused(folder, name)
    assert damage(folder) is None
