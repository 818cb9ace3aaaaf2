"""From verdicts to rewards. A task's verdicts, and so accuracy, do not depend on what a recipe rewards."""

from dataclasses import dataclass, replace

from data.task import MALFORMED, WRONG, Score
from data.traces import non_latin


@dataclass(frozen=True)
class RewardSettings:
    """How a recipe changes the rewards of verdicts; each field is an option `--reward.<field>`."""

    near_miss: bool = True  # Reward near answers; without, they earn what other wrong answers earn
    format: bool = True  # Reward wrong answers that are well-formed; without, they earn 0
    latin_only: bool = False  # A completion with a letter outside the Latin script earns 0


def reward_for(score: Score, text: str, settings: RewardSettings) -> Score:
    """The same outcome, with the reward of a completion with this text."""
    if settings.latin_only and non_latin(text):
        return replace(score, reward=MALFORMED.reward)
    if score.outcome == "near" and not settings.near_miss:
        score = replace(score, reward=WRONG.reward)
    if score.reward == WRONG.reward and not settings.format:
        score = replace(score, reward=MALFORMED.reward)
    return score
