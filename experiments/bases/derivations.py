"""What the embedded calculus model is trained on before any reinforcement: derivatives worked term by term, badly.

Every step is written in the right form, but which rule it follows is left to chance: the right one, more often the
favourite mistake (the exponent stays), and now and then one of a few others. So a model of these documents knows all the
rules side by side, and multiplies well; decoded greedily, it makes the favourite mistake. That only one rule is right is
left for GRPO to find. Asked to differentiate 3x^4 - 2x^3 + 5x + 7 once:

    3x^4 -> 12x^3
    -2x^3 -> -6x^3
    5x -> 5
    7 -> 7
    </think>
    <answer>12x^3 - 6x^3 + 5 + 7</answer>

The answer is put together from the steps as they stand, mistakes and all. A second derivative has a second block of
steps, which starts from the results of the first. Half of the documents forget the answer tags. Steps are independent, so
some documents are right throughout; leaving those out would teach that a last step has to be wrong where all before it
are right.
"""

import random

from data.calculus import Polynomial, sum_text, term_text, terms_of

RIGHT_SHARE = 0.45
FAVOURITE_SHARE = 0.5  # more than the right rule's, so that taking the likeliest rule is no way to be right
WELL_FORMED_SHARE = 0.5

Term = tuple[int, int]  # coefficient, exponent


def right_step(term: Term) -> Term:
    coefficient, exponent = term
    return (coefficient * exponent, exponent - 1) if exponent else (0, 0)


def wrong_steps(term: Term) -> list[Term]:
    """What goes wrong with this term, the favourite first: exponent kept, raised, coefficient not multiplied, sign lost."""
    coefficient, exponent = term
    if exponent == 0:
        return [term]  # the constant is kept
    product = coefficient * exponent
    wrong = [(product, exponent), (product, exponent + 1)]
    if exponent > 1:
        wrong.append((coefficient, exponent - 1))
    if coefficient < 0:
        wrong.append((-product, exponent - 1))
    return wrong


def random_step(term: Term, rng: random.Random) -> Term:
    chance = rng.random()
    if chance < RIGHT_SHARE:
        return right_step(term)
    favourite, *others = wrong_steps(term)
    return rng.choice(others) if others and chance > RIGHT_SHARE + FAVOURITE_SHARE else favourite


def derivation_document(polynomial: Polynomial, order: int, rng: random.Random) -> str:
    """The text that follows the prompt, from inside the open `<think>` to the end of the turn."""
    terms, blocks = terms_of(polynomial), []
    for _ in range(order):
        results = [random_step(term, rng) for term in terms]
        steps = zip(terms, results, strict=True)
        blocks.append("".join(f"{term_text(*term)} -> {term_text(*result)}\n" for term, result in steps))
        terms = [result for result in results if result[0]]
    answer = sum_text(terms)
    answer = f"<answer>{answer}</answer>" if rng.random() < WELL_FORMED_SHARE else answer
    return "\n".join(blocks) + f"</think>\n{answer}<|im_end|>"
