"""From verdicts to rewards. A task's verdicts, and so accuracy, do not depend on what a recipe rewards."""

from dataclasses import dataclass

from data.task import WRONG, Score
from data.traces import non_latin
from model import Completion


@dataclass(frozen=True)
class RewardSettings:
    """How a recipe changes the rewards of verdicts; each field is an option `--reward.<field>`."""

    near_miss: bool = True  # Reward near answers; without, they earn what other wrong answers earn
    format: bool = True  # Reward wrong answers that are well-formed; without, they earn 0
    latin_only: bool = False  # A completion with a letter outside the Latin script earns 0


def reward_for(verdict: Score, text: str, completion: Completion, settings: RewardSettings) -> float:
    """The reward of a completion, from the task's verdict on it.

    `text` is without the stop token. `completion` is there for rewards by length or by ids.
    """
    if settings.latin_only and non_latin(text):
        return 0.0
    if verdict.outcome == "near" and not settings.near_miss:
        verdict = WRONG
    if verdict.outcome == "wrong" and not settings.format:
        return 0.0
    return verdict.reward
