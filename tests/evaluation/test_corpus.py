"""The corpus from which `+memory` copies: used by evaluate, and refused where it cannot be."""

import json

import pytest
from helpers import make_run, plant_heads

from pipeline.errors import UserError
from pipeline.evaluation.measuring import Decoders
from pipeline.inference.rounds import memory_of
from pipeline.runs.files import sha256_of
from pipeline.stages import evaluate


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("how many words does a text need to be of use to another text? " * 4)
    return path


def test_a_memory_and_a_corpus_are_measured(tmp_path, text) -> None:
    run = make_run(tmp_path, "evaluate.controllers=[thompson+memory,fixed:1]", f"evaluate.corpus={text}")
    plant_heads(run, 2)
    evaluate.run(run)
    greedy = json.loads((run / "eval" / "results.json").read_text())["lossless"]["greedy"]
    assert greedy["identical"] == greedy["texts"] > 0
    assert sha256_of(text) in "".join(path.read_text() for path in run.path.rglob("*.json"))
    before = (run / "eval" / "measured.json").read_text()
    evaluate.run(run)
    assert (run / "eval" / "measured.json").read_text() == before, "done already"


def test_every_memory_begins_with_the_corpus(tmp_path) -> None:
    run = make_run(tmp_path, "evaluate.controllers=[fixed:2+memory,thompson+memory,fixed:1,fixed:1+lookup]")
    made = Decoders({2: None}, run.config.evaluate, frozenset(), 0, {}, corpus=[7, 8, 9]).controllers
    memories = {m.controller: memory_of(c) for m, c in made.items()}
    assert memories.pop("fixed:1") is memories.pop("fixed:1+lookup") is None
    for memory in memories.values():
        assert memory.tables[0].tokens[:3] == [7, 8, 9]
    assert len({id(memory) for memory in memories.values()}) == 2, "each has its own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.controllers=[fixed:1]", "evaluate.corpus={text}"], "no controller copies from it"),
        (["evaluate.controllers=[fixed:1+memory]", "evaluate.corpus=nowhere.txt"], "corpus=nowhere.txt: no such file"),
        (["evaluate.controllers=[fixed:1+memory]", "evaluate.repeats=2"], "repeats=2: fixed:1.memory would copy"),
        (["evaluate.controllers=[fixed:1+memory]", "evaluate.corpus={binary}"], "not a text file in UTF-8"),
        (["evaluate.controllers=[fixed:1+memory]", "evaluate.corpus={empty}"], "it is empty"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, text, words: list[str], message: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    names = {"text": text, "binary": tmp_path / "binary", "empty": tmp_path / "empty"}
    run = make_run(tmp_path, *(word.format(**names) for word in words))
    plant_heads(run, 2)
    with pytest.raises(UserError, match=message):
        evaluate.run(run)
