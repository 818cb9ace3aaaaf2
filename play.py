"""Give a model a problem, and watch it think: `make play`, or `python play.py tiny`.

For Countdown type numbers and then the target: `7 9 11 22`. An empty line takes a random problem; `q` ends.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from data.task import Problem
from lab.checkpoint import checkpoints, saved_recipe
from lab.device import pick_device
from lab.errors import user_errors
from lab.recipe import Recipe, checked, recipe_for
from lab.screen import printable
from lab.setup import load_policy
from model import KVCache, Qwen3, Tokenizer
from model.sampler import random_streams, sample
from rl.rollout import SamplingSettings, prompt_of


@dataclass(frozen=True)
class Arguments:
    """Try a model out."""

    model: tyro.conf.Positional[str | None] = None  # Checkpoint, tiny or hub id; default: the newest in runs/
    max_new_tokens: int | None = None  # Tokens a completion may have; default: the recipe's
    temperature: float | None = None  # 0 is greedy; default: the recipe's
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int | None = None  # Of the sampling and of random problems; default: a new one each time


@torch.inference_mode()
def stream(model: Qwen3, prompt: list[int], sampling: SamplingSettings, stops, seed: int) -> Iterator[int]:
    """The ids of one completion, each as soon as it is sampled."""
    distribution = (sampling.temperature, sampling.top_k, sampling.top_p)
    uniforms = random_streams([prompt], 1, sampling.max_new_tokens, seed)[0, 0]
    cache = KVCache(model.config, 1, len(prompt) + len(uniforms), model.device, model.dtype)
    ids = prompt
    for uniform in uniforms:
        logits = model(torch.tensor([ids], device=model.device), cache=cache)[:, -1]
        token, _ = sample(logits, uniform[None].to(model.device), model.num_tokens, *distribution)
        ids = [token.item()]
        yield ids[0]
        if ids[0] in stops:
            return


def show_completion(model: Qwen3, tokenizer: Tokenizer, recipe: Recipe, problem: Problem, seed: int) -> None:
    """Print one completion as it is sampled, its verdict, and a solution."""
    prompt = prompt_of(tokenizer, recipe.task, problem, recipe.sampling)
    print(f"\n{printable(str(problem))}")
    ids = []
    shown = ""
    for token in stream(model, prompt, recipe.sampling, tokenizer.stop_token_ids, seed):
        ids += [] if token in tokenizer.stop_token_ids else [token]
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else half a character
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
    verdict = recipe.task.score(tokenizer.decode(ids), problem, recipe.sampling.thinking)
    solution = printable(recipe.task.solution(problem) or "there is none")
    print(f"\n{verdict.outcome}, reward {verdict.reward:.2f}. A solution: {solution}\n")


def newest_checkpoint() -> str:
    folders = [folder for run in Path("runs").glob("**/checkpoints") for folder in checkpoints(run.parent)]
    return str(max(folders, key=lambda path: path.stat().st_mtime, default="tiny"))


def main(arguments: Arguments) -> None:
    source = arguments.model or newest_checkpoint()
    trained = saved_recipe(source)
    recipe = trained or replace(recipe_for(source), model=source, adapters=Recipe().adapters)
    given = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    changes = {name: value for name, value in given.items() if value is not None}
    sampling = replace(recipe.sampling, **changes)
    recipe = checked(replace(recipe, stages=(), device=arguments.device, sampling=sampling))
    model, tokenizer = load_policy(recipe, Path(source) if trained else None, pick_device(recipe))
    rng = random.Random(arguments.seed)
    print(f"{source}. Type {recipe.task.input_format}; an empty line for a random problem, q to end.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("q", "quit", "exit"):
            return
        try:
            random_problem = None if line else recipe.task.generate(1, rng.randrange(2**31))[0]
            problem = random_problem or recipe.task.parse_input(line)
        except ValueError as error:
            print(error)
            continue
        show_completion(model, tokenizer, recipe, problem, rng.randrange(2**31))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, description=__doc__))
