"""Writes grade-school word problems of several steps, with their worked answers, from problem_templates.py.

`problems(role, count)` gives rows of one role: prompt, answer, task and template. They depend on nothing but the seed,
and fewer rows are the beginning of more. The templates of training and of evaluation are different ones.
"""

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from .problem_templates import TEMPLATES, Template

SEED = 0
TASK = "word problem"
TRIES = 1000
"""Draws for one problem; far more than any template needs to meet its steps, or to be new."""

SHE, HE = ("she", "her"), ("he", "his")
PEOPLE = {
    **dict.fromkeys("Amara Bea Chloe Dina Elif Freya Grace Hana Ilse Jun Kemi Leila Maya Nora Olga Priya".split(), SHE),
    **dict.fromkeys("Rosa Sofia Tess Uma Vera Wen Yara Zoe Carmen Ingrid Lucia Miriam Salma Thea".split(), SHE),
    **dict.fromkeys("Adam Ben Carlos Dev Emil Farid Gus Hugo Ivan Jamal Kofi Luca Marco Nils Omar Pablo".split(), HE),
    **dict.fromkeys("Quinn Ravi Sam Tomas Umar Victor Wei Yusuf Andre Diego Felix Henrik Kenji Mateo".split(), HE),
}
CLOSINGS = [""] * 6 + [
    " Show your work.", " Explain each step.", " Think step by step.", " Give the number and how you got it.",
    " Please keep it short.", " Write the calculation too.",
]  # fmt: skip

Row = dict[str, str]


def problems(role: str, count: int, seed: int = SEED) -> list[Row]:
    """The first `count` problems of the role, train or evaluate; all templates in turn, no text twice."""
    return list(islice(_endless(role, seed), count))


def _endless(role: str, seed: int) -> Iterator[Row]:
    chance, seen = random.Random(f"{role} {seed}"), set()
    while True:
        for name, form in TEMPLATES[role].items():
            row = next(r for r in (_drawn(form, chance) for _ in range(TRIES)) if r and r["prompt"] not in seen)
            seen.add(row["prompt"])
            yield row | {"task": TASK, "template": name}


def _drawn(form: Template, chance: random.Random) -> Row | None:
    """One problem; None if a step does not come out with the numbers that were drawn."""
    numbers = {name: chance.choice(span) for name, span in form.numbers.items()}
    worked = _worked(form.steps, numbers)
    if worked is None:
        return None
    name, other = chance.sample(list(PEOPLE), 2)
    he, his = PEOPLE[name]
    words = {hole: chance.choice(choices.split(", ")) for hole, choices in form.words.items()}
    people = {"name": name, "other": other, "he": he, "his": his, "He": he.capitalize(), "His": his.capitalize()}
    text = form.text.format(**people, **words, **numbers)
    return {"prompt": text + chance.choice(CLOSINGS), "answer": worked}


def _worked(steps: tuple[str, ...], numbers: dict[str, int]) -> str | None:
    """The lines of the answer, such as `4 * 6 = 24`, then `#### 24`; None unless all results are whole and above 0."""
    values: dict[str, Fraction] = {name: Fraction(number) for name, number in numbers.items()}
    lines = []
    for step in steps:
        result, expression = step.split(" = ")
        value = eval(expression, {"__builtins__": {}}, values)  # only what problem_templates.py says
        if value.denominator != 1 or value <= 0:
            return None
        lines.append(re.sub(r"[a-z_]+", lambda word: str(values[word[0]]), expression) + f" = {value}")
        values[result] = value
    return "\n".join([*lines, f"#### {value}"])
