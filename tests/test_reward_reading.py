"""The reward against a second reading of another kind: a walk over pieces whose meaning is written down by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data import Problem
from data.countdown import score

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ARITHMETIC = {  # text -> (value, spends exactly the numbers 79, 60, 17), or None for what is not arithmetic
    "(79 - 60) + 17": (36, True),
    "(60 - 79 + 17)": (-2, True),
    "79 - 17 - 60 / 1": (2, False),
    "36": (36, False),
    "41": (41, False),
    "79 - 60 + 18": (37, False),
    "2 ** 5": None,
}
EQUATIONS = {
    "(79 - 60) + 17 = 36": (36, True),
    "(79 - 60) + 17 = 41": None,
    "6 * 6 = 36": (36, False),
    "36 = 36": (36, False),
}
FILLER = ["so", "hence", "\n"]
MEANING = ARITHMETIC | EQUATIONS


def second_reading(pieces: list[str], problem: Problem, thinking: bool) -> str:
    """The outcome for pieces joined by single spaces, none of which makes sense glued to its neighbour."""
    visible = [piece for piece in pieces if piece != "\n"]
    if not thinking and visible[:1] == ["<think>"]:
        pieces, thinking = pieces[pieces.index("<think>") + 1 :], True
    start = 0
    if thinking:
        if "</think>" not in pieces:
            return "malformed"
        end = pieces.index("</think>")
        tags = [piece for piece in pieces[:end] if piece in TAGS]
        opened = False
        for tag in tags:
            if tag == "<think>" or (tag == "</answer>" and opened):
                return "malformed"
            opened = opened or tag == "<answer>"
        start = end + 1
    answer_tags = [(place, piece) for place, piece in enumerate(pieces) if place >= start and "answer" in piece]
    if [piece for _, piece in answer_tags] != ["<answer>", "</answer>"]:
        return "malformed"
    (first, _), (last, _) = answer_tags
    if any("think" in piece for piece in pieces[start:first]):
        return "malformed"
    content = [piece for piece in pieces[first + 1 : last] if piece != "\n"]
    meaning = MEANING.get(content[0]) if len(content) == 1 else None
    if meaning and content[0] in ("36", "41"):
        before = pieces[start:first]
        while before and before[-1] == "\n":
            before.pop()
        earned = EQUATIONS.get(before[-1]) if before else None
        alone = len(before) < 2 or before[-2] in FILLER
        meaning = earned if earned and alone and earned[0] == meaning[0] else None
    if not meaning or not meaning[1]:
        return "wrong"
    distance = abs(meaning[0] - problem.target)
    return "correct" if distance == 0 else "near" if distance <= 10 else "wrong"


any_piece = st.sampled_from([*TAGS, *MEANING, *FILLER])
some_text = st.lists(st.sampled_from([*FILLER, *MEANING]), max_size=3)
likely = st.builds(  # mostly well formed, with an odd piece thrown in here and there
    lambda thoughts, before, content, after: [*thoughts, "</think>", *before, "<answer>", content, "</answer>", *after],
    st.lists(any_piece, max_size=2),
    some_text,
    st.sampled_from([*MEANING]),
    st.lists(any_piece, max_size=1),
)


@settings(max_examples=600, deadline=None)
@given(
    st.one_of(likely, likely.flatmap(st.permutations), st.lists(any_piece, max_size=9)),
    st.sampled_from([36, 41, 5, 1, 99]),
    st.booleans(),
)
def test_the_outcome_is_that_of_an_independent_second_reading(pieces, target, thinking):
    problem = Problem((79, 60, 17), target)
    assert score(" ".join(pieces), problem, thinking).outcome == second_reading(pieces, problem, thinking)
