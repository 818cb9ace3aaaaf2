"""From verdicts to rewards: what a recipe pays for. The verdicts are each task's own, in `tasks/`."""

from dataclasses import dataclass, replace

from data.traces import latin_only
from tasks import MALFORMED, WRONG, Score


@dataclass(frozen=True)
class RewardSettings:
    """What the reward pays for beside a correct answer. Verdicts, and so accuracy, are the same whatever stands here."""

    near_miss: bool = True
    """Pay for answers that the task calls near; without, they earn what any other wrong answer does."""
    latin_only: bool = False
    """Guard against drift into other languages: a letter outside the Latin script, and the completion earns nothing."""


def pay(score: Score, text: str, settings: RewardSettings) -> Score:
    """The same outcome with the reward that a recipe pays for it."""
    if settings.latin_only and not latin_only(text):
        return replace(score, reward=MALFORMED.reward)
    if score.outcome == "near" and not settings.near_miss:
        return replace(score, reward=WRONG.reward)
    return score
