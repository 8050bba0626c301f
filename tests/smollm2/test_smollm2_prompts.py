"""The prompts in the repository: word problems come out, chats repeat nothing, training and evaluation are apart."""

import ast
import json
import operator
import re
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.prompts.prompt import normal_form
from pipeline.prompts.sets import evaluation_prompts, training_prompts
from pipeline.smollm2 import __main__ as commands
from pipeline.smollm2 import prompt_files, word_problems
from pipeline.smollm2.problem_templates import TEMPLATES
from pipeline.smollm2.word_problems import problems

ROLES = ("train", "evaluate")
TASKS = ("explaining", "rewriting", "listing", "code", "small talk")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Numbers that the words of a problem stand for: I and my friends, twice or half, a third, a quarter or legs, and units.
SAID_IN_WORDS = {1, 2, 3, 4, 60, 100}

UNUSED = {"honey": 1, "film": 1}
"""Templates with numbers that the answer does not need, and how many."""


def committed(role: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in prompt_files.path_of(role).read_text().splitlines()]


def value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    assert isinstance(node, ast.Constant)
    return Fraction(node.value)


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of so many words; of a shorter text, the text itself."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def nearly_equal(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of texts that have in common more than 0.45 of their pairs of neighbouring words."""
    told = [(text, runs(text, 2)) for text in texts]
    return [(one, other) for (one, a), (other, b) in combinations(told, 2) if len(a & b) > 0.45 * len(a | b)]


def test_the_committed_files_are_made_by_the_generator(tmp_path: Path, monkeypatch) -> None:
    committed_bytes = {role: prompt_files.path_of(role).read_bytes() for role in ROLES}
    monkeypatch.setattr(prompt_files, "path_of", lambda role: tmp_path / role)
    assert commands.main(["prompts"]) == 0
    assert {role: (tmp_path / role).read_bytes() for role in ROLES} == committed_bytes


def test_more_problems_begin_with_the_same_ones(tmp_path: Path) -> None:
    assert problems("train", 90)[:31] == problems("train", 31) != problems("train", 31, seed=1)
    assert commands.main(["problems", "31", str(tmp_path / "more.jsonl")]) == 0
    assert [json.loads(x) for x in (tmp_path / "more.jsonl").read_text().splitlines()] == problems("train", 31)


@pytest.mark.parametrize("role", ROLES)
def test_every_answer_follows_from_its_question(role: str) -> None:
    """Each line is calculated anew, from numbers of the question and results of lines before; all numbers are used."""
    for row in problems(role, 10 * len(TEMPLATES[role])):
        *steps, last = row["answer"].splitlines()
        asked = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        known, used = set(asked) | SAID_IN_WORDS, set()
        for step in steps:
            left, right = step.split(" = ")
            result = value(ast.parse(left, mode="eval").body)
            numbers = {int(number) for number in re.findall(r"\d+", left)}
            assert result == int(right) > 0 and numbers <= known, row
            known.add(int(right))
            used |= numbers
        assert last == f"#### {right}" and len(steps) >= 2, row
        assert len(set(asked) - used) <= UNUSED.get(row["template"], 0), row


@pytest.mark.parametrize("role", ROLES)
def test_no_text_has_a_hole_left_or_one_of_many(role: str) -> None:
    for row in problems(role, 10 * len(TEMPLATES[role])):
        assert not re.search(r"[{}]|\s\s", row["prompt"]), row
        assert not re.search(r"\b1 [a-z]+s\b", row["prompt"]), row


def test_training_and_evaluation_share_no_template() -> None:
    assert not TEMPLATES["train"].keys() & TEMPLATES["evaluate"].keys()
    holes = re.compile(r"\{\w+\}")
    bare = {role: [holes.sub(" ", t.text) for t in TEMPLATES[role].values()] for role in ROLES}
    for first, second in product(bare["train"], bare["evaluate"]):
        assert not runs(first, 4) & runs(second, 4)
    for role in ROLES:
        rows = [row for row in committed(role) if row["task"] == word_problems.TASK]
        assert {row["template"] for row in rows} == TEMPLATES[role].keys()


def test_no_prompt_is_there_twice() -> None:
    texts = [normal_form(row["prompt"]) for role in ROLES for row in committed(role)]
    assert len(texts) == len(set(texts)) == 800


def test_no_chat_is_nearly_another() -> None:
    texts = [row["prompt"] for role in ROLES for row in prompt_files.chats(role)]
    assert len(texts) == 300 and not nearly_equal(texts)
    assert nearly_equal([*texts, "List three fun facts about octopuses, please."])  # one of them is close to that


@pytest.mark.parametrize(("role", "each"), [("train", 40), ("evaluate", 20)])
def test_chats_of_each_task(role: str, each: int) -> None:
    chats = prompt_files.chats(role)
    assert Counter(row["task"] for row in chats) == dict.fromkeys(TASKS, each)
    assert all(row["prompt"].isascii() and len(row["prompt"]) < 500 for row in chats)


def test_the_config_trains_on_one_file_and_measures_on_the_other(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)  # where the config is used
    config = load("configs/smollm2-135m.yaml", [])
    trained, measured = training_prompts(config), evaluation_prompts(config)
    assert len(trained) == len(committed("train")) == 600 >= config.generate.num_prompts
    assert [p.turns[0] for p in measured] == [row["prompt"] for row in committed("evaluate")]
    first = Counter(p.task for p in measured[: config.evaluate.num_prompts])
    half = config.evaluate.num_prompts // 2
    assert first == {word_problems.TASK: half} | dict.fromkeys(TASKS, half // len(TASKS)) and half >= 20
    own = tmp_path / "my.jsonl"
    own.write_text('{"prompt": "Mine?"}\n')
    assert [p.text for p in training_prompts(load("configs/smollm2-135m.yaml", [f"prompts.path={own}"]))] == ["Mine?"]


def test_the_prompts_to_copy_from_share_nothing_with_the_others() -> None:
    rows = committed("copying")
    assert Counter(row["task"] for row in rows) == {"summary with quotes": 6, "code edit": 6}
    others = {run for role in ROLES for row in committed(role) for run in runs(row["prompt"], 6)}
    assert not any(runs(row["prompt"], 6) & others for row in rows)
    assert not nearly_equal([row["prompt"] for row in rows])
    assert all(row["prompt"].isascii() and 60 < len(row["prompt"].split()) < 200 for row in rows)
