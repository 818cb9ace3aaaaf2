"""Give models a problem, and watch them think side by side: `make play`, or `python play.py tiny tiny-256`.

You first get a random problem. For Countdown type numbers and then the target: `7 9 11 22`. An empty line
takes another random problem; `q` ends.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import tyro
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data.task import AnyProblem
from lab.errors import user_errors
from lab.named_model import check_one_task, named_model
from lab.output import lost_output
from lab.recipe import Recipe
from lab.screen import plain_console, printable
from model import Completion, Qwen3, Tokenizer
from model.sampler import TokenChoice, random_uniforms, sample_completion
from rl.rollout import make_rollout, prompt_for


@dataclass(frozen=True)
class Arguments:
    """Try models out."""

    models: tyro.conf.Positional[tuple[str, ...]] = ("tiny", "tiny-256")  # Checkpoint folders, or hub ids
    max_new_tokens: int | None = None  # Tokens a completion may have; default: the recipe's
    temperature: float | None = None  # 0 is greedy; default: the recipe's
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int | None = None  # For sampling and random problems; default: a new one each time


@dataclass(frozen=True)
class Player:
    """A model, and how it is asked."""

    source: str
    recipe: Recipe
    model: Qwen3
    tokenizer: Tokenizer

    def think(self, problem: AnyProblem, seed: int) -> Iterator[tuple[str, str]]:
        """The text so far after each token, and the verdict, which is empty before the last token."""
        recipe, tokenizer = self.recipe, self.tokenizer
        sampling, stops = recipe.sampling, tokenizer.stop_token_ids
        prompt = prompt_for(tokenizer, recipe.task, problem, sampling)
        uniforms = random_uniforms([prompt], 1, sampling.max_new_tokens, seed)[0, 0]
        choice = TokenChoice(sampling.temperature, sampling.top_k, sampling.top_p)
        ids, logprobs = [], []
        for token, logprob in sample_completion(self.model, prompt, uniforms, stops, choice):
            ids.append(token)
            logprobs.append(logprob)
            text = tokenizer.decode([id for id in ids if id not in stops])
            yield text.removesuffix("\N{REPLACEMENT CHARACTER}"), ""  # half a character
        completion = Completion(ids, logprobs, finished=ids[-1] in stops)
        rollout = make_rollout(tokenizer, recipe.task, problem, prompt, completion, sampling, recipe.reward)
        cut = "" if completion.finished else "cut off, "
        yield rollout.text, f"{cut}{rollout.outcome}: reward {rollout.reward:.2f}, {len(ids)} tokens"


def load_player(source: str, arguments: Arguments) -> Player:
    sampling = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    named = named_model(source, arguments.models, arguments.device, sampling).opened()
    model, tokenizer = named.load()
    return Player(source, named.recipe, model, tokenizer)


def side_by_side(players: list[Player], shown: list[tuple[str, str]], lines: int | None = None) -> Table:
    """A column for each player with the last `lines` of its text, or all, and its verdict."""
    table = Table(expand=True)
    for player in players:
        table.add_column(Text(player.source), ratio=1)
    texts = ["\n".join(printable(text).splitlines()[-lines if lines else 0 :]) for text, _ in shown]
    table.add_row(*map(Text, texts), end_section=True)
    table.add_row(*(Text(verdict) for _, verdict in shown))
    return table


def show(players: list[Player], problem: AnyProblem, seed: int) -> None:
    """Ask all the same, show their tokens as they come, then verdicts and a solution."""
    console = plain_console()
    console.print(printable(str(problem)))
    thoughts = [player.think(problem, seed) for player in players]
    shown = [("", "")] * len(players)
    with Live(console=console, transient=True) as live:
        for new in itertools.zip_longest(*thoughts):
            shown = [after or before for before, after in zip(shown, new, strict=True)]
            live.update(side_by_side(players, shown, max(1, console.height - 8)))
    console.print(side_by_side(players, shown))
    console.print(f"A solution: {printable(players[0].recipe.task.solution(problem) or 'there is none')}\n")


def main(arguments: Arguments) -> None:
    players = [load_player(source, arguments) for source in arguments.models]
    check_one_task({player.source: player.recipe for player in players})
    task = players[0].recipe.task
    rng = random.Random(arguments.seed)
    line = ""
    while line not in ("q", "quit", "exit") and not lost_output():
        try:
            problem = task.parse_input(line) if line else task.generate(1, rng.randrange(2**31))[0]
            show(players, problem, rng.randrange(2**31))
        except ValueError as error:
            print(error)
        try:
            line = input(f"{task.input_format}; an empty line for a random problem, q to end > ").strip()
        except EOFError:
            return


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, description=__doc__))
