"""Documents for the bundled calculus model before any RL: derivatives, with mistakes.

Every step is in the right form, but chance decides which rule it follows: the right one, more often the most
common mistake (the exponent stays), and now and then one of a few others. So a model trained on these
documents knows all the rules side by side, and multiplies well; decoded greedily, it makes the common
mistake. GRPO has to find which rule is right. The problem here is to differentiate 3x^4 - 2x^3 + 5x + 7
once:

    3x^4 -> 12x^3
    -2x^3 -> -6x^3
    5x -> 5
    7 -> 7
    </think>
    <answer>12x^3 - 6x^3 + 5 + 7</answer>

The answer repeats the results of the steps, mistakes included. A second derivative has a second block of
steps, which starts from the results of the first. Half of the documents forget the answer tags. Steps are
independent, so some documents are right throughout; leaving those out would teach that the last step must be
wrong when all steps before it are right.
"""

import random

from data.calculus import Polynomial, sum_text, term_text, terms_of

RIGHT_SHARE = 0.45
COMMON_MISTAKE_SHARE = 0.5  # above RIGHT_SHARE, so that the likeliest rule is a wrong one
WELL_FORMED_SHARE = 0.5

Term = tuple[int, int]  # coefficient, exponent


def right_step(term: Term) -> Term:
    coefficient, exponent = term
    return (coefficient * exponent, exponent - 1) if exponent else (0, 0)


def wrong_steps(term: Term) -> list[Term]:
    """Possible mistakes with this term, the most common first.

    The exponent is kept; it is raised; the coefficient is not multiplied; the sign is lost.
    """
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
    common, *others = wrong_steps(term)
    return rng.choice(others) if others and chance > RIGHT_SHARE + COMMON_MISTAKE_SHARE else common


def derivation_document(polynomial: Polynomial, order: int, rng: random.Random) -> str:
    """The text after the prompt, from inside the open `<think>` to the end of the turn."""
    terms = terms_of(polynomial)
    blocks = []
    for _ in range(order):
        results = [random_step(term, rng) for term in terms]
        steps = zip(terms, results, strict=True)
        blocks.append("".join(f"{term_text(*term)} -> {term_text(*result)}\n" for term, result in steps))
        terms = [result for result in results if result[0]]
    answer = sum_text(terms)
    answer = f"<answer>{answer}</answer>" if rng.random() < WELL_FORMED_SHARE else answer
    return "\n".join(blocks) + f"</think>\n{answer}<|im_end|>"
