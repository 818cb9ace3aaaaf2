"""Give a model numbers and a target, and watch it think: `make play`, or `python play.py runs/256-tiny/checkpoints/step_0226`.

Type the numbers and then the target, as in `7 9 11 22`; an empty line takes a random problem, `q` ends.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from interrupt import ctrl_c_exits

with ctrl_c_exits():
    import torch
    import tyro

    from data import Problem, generate_problems, prompt_text, solve
    from model import KVCache, Qwen3, Tokenizer, load_model, prompt_ids
    from model.distribution import random_streams, sample
    from rl import score
    from rl.checkpoint import saved_recipe
    from rl.console import printable, user_errors
    from rl.device import pick_device, pick_dtype
    from rl.recipe import Recipe
    from rl.recipe_file import load_recipe


@dataclass(frozen=True)
class Arguments:
    """Try a model out."""

    model: tyro.conf.Positional[str | None] = None
    """A checkpoint folder, tiny, or a hub id; default: the newest checkpoint in runs/, or tiny."""
    max_new_tokens: int | None = None
    """Tokens a completion may have; default: the recipe's."""
    temperature: float | None = None
    """0 is greedy; default: the recipe's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int | None = None
    """Of the sampling and of random problems; default: another one each time."""


@torch.inference_mode()
def stream(
    model: Qwen3, prompt: list[int], max_new_tokens: int, temperature: float, stops: tuple[int, ...], seed: int
) -> Iterator[int]:
    """The ids of one completion, each as soon as it is sampled; the prompt once, then a token at a time."""
    uniforms = random_streams([prompt], 1, max_new_tokens, seed)[0, 0]
    cache, ids = KVCache(model.config, 1, len(prompt) + max_new_tokens, model.device, model.dtype), prompt
    for uniform in uniforms:
        logits = model(torch.tensor([ids], device=model.device), cache=cache)[:, -1]
        token, _ = sample(logits, uniform[None].to(model.device), model.num_tokens, temperature, None, None)
        ids = [token.item()]
        yield ids[0]
        if ids[0] in stops:
            return


def read_problem(line: str, recipe: Recipe, rng: random.Random) -> Problem:
    """A problem from a typed line, or a random one of the recipe's kind for an empty line.

    Raises:
        ValueError: what was typed is no problem.
    """
    words = line.replace(",", " ").replace("->", " ").split()
    if not words:
        return generate_problems(1, rng.randrange(2**31), recipe.generator)[0]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ValueError("type whole numbers and then the target, as in 7 9 11 22")
    *numbers, target = map(int, words)
    return Problem(numbers, target)


def show_completion(model: Qwen3, tokenizer: Tokenizer, problem: Problem, recipe: Recipe, seed: int) -> None:
    """One completion as it is sampled, the verdict on it, and what a search of all possibilities finds."""
    sampling = recipe.sampling
    prompt = prompt_ids(tokenizer, prompt_text(problem), sampling.thinking)
    print(f"\n{', '.join(map(str, problem.numbers))} -> {problem.target}")
    ids, shown = [], ""
    for token in stream(model, prompt, sampling.max_new_tokens, sampling.temperature, tokenizer.stop_token_ids, seed):
        ids += [] if token in tokenizer.stop_token_ids else [token]
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else half a character
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
    verdict = score(tokenizer.decode(ids), problem, thinking=sampling.thinking)
    print(f"\n{verdict.outcome}, reward {verdict.reward:.2f}. A solution: {solve(problem) or 'there is none'}\n")


def newest_checkpoint() -> str:
    found = sorted(Path("runs").glob("**/checkpoints/step_*"), key=lambda folder: folder.stat().st_mtime)
    return str(found[-1]) if found else "tiny"


def main(arguments: Arguments) -> None:
    source = arguments.model or newest_checkpoint()
    recipe = saved_recipe(source) or load_recipe("256", "tiny" if source == "tiny" else "")[1]
    changes = {name: value for name in ("max_new_tokens", "temperature") if (value := getattr(arguments, name)) is not None}
    recipe = replace(recipe, stages=(), device=arguments.device, sampling=replace(recipe.sampling, **changes))
    model, tokenizer = load_model(source, pick_device(recipe), pick_dtype(recipe), recipe.revision)
    rng = random.Random(arguments.seed)
    print(f"{source}. Numbers and target (7 9 11 22), an empty line for a random problem, q to end.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("q", "quit", "exit"):
            return
        try:
            problem = read_problem(line, recipe, rng)
        except ValueError as error:
            print(error)
            continue
        show_completion(model, tokenizer, problem, recipe, rng.randrange(2**31))


if __name__ == "__main__":
    with user_errors("take a smaller model"):
        main(tyro.cli(Arguments, description=__doc__))
