"""A measured text, token by token: which are accepted drafts, which were rejected, which are the backbone's own."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import make_run, plant_heads

from pipeline.evaluation import texts
from pipeline.evaluation.rendering import html_page, markdown
from pipeline.inference.rounds import Round
from pipeline.stages import evaluate


class Letters:
    """Token 0 is a, 1 is b, and so on; 30 is what HTML would take for a tag."""

    def decode(self, ids: list[int], **_) -> str:
        return "".join("<b>" if i == 30 else chr(97 + i) for i in ids)


def chain(drafts: list[int], accepted: int, committed: int) -> texts.Drafts:
    made = Round(len(drafts), accepted, committed)
    made.drafts = drafts
    return texts.drafts_of(made)


def test_every_token_is_told_where_it_came_from() -> None:
    # a from the prefill; b c accepted, x rejected, y behind it, d; nothing drafted, e; f accepted, and the end
    tokens = [0, 1, 2, 3, 4, 5]
    rounds = [chain([1, 2, 23, 24], 2, 3), chain([], 0, 1), chain([5, 6], 2, 1)]
    found = texts.pieces(tokens, rounds, Letters())
    assert [(text, kind) for text, kind, _ in found] == [
        ("a", "own"), ("b", "accepted"), ("c", "accepted"), ("x", "rejected"), ("y", "rejected"), ("d", "own"),
        ("e", "own"), ("f", "accepted"),
    ]  # fmt: skip
    assert found[3][2] == "round 1: draft 3 of 4, rejected" and found[4][2].endswith("behind a rejected one")
    assert found[5][2] == "round 1: the bonus token; 2 of 4 drafts accepted"
    assert found[6][2] == "round 2: the bonus token; nothing was drafted"


def branched() -> Round:
    """b or c after a; after each of them d or e; the text goes on with c d."""
    made = Round(drafted=6, accepted=2, tokens=3, parents=[0, 0, 1, 2, 1, 2], path=[2, 4])
    made.drafts = [1, 2, 3, 3, 4, 4]
    return made


def test_where_drafts_branch_the_path_is_told_and_the_candidates_for_the_place_behind_it() -> None:
    found = texts.pieces([0, 2, 3, 5], [texts.drafts_of(branched())], Letters())
    assert [piece[:2] for piece in found] == [["a", "own"], ["c", "accepted"], ["d", "accepted"], ["f", "own"]]
    wrong = replace(branched(), accepted=1, tokens=2, path=[2])
    found = texts.pieces([0, 2, 5], [texts.drafts_of(wrong)], Letters())
    assert [piece[:2] for piece in found] == [
        ["a", "own"], ["c", "accepted"], ["d", "rejected"], ["e", "rejected"], ["f", "own"]
    ]  # fmt: skip
    assert found[2][2] == "round 1: a candidate, rejected"


def test_a_tree_is_drawn() -> None:
    drawn = texts.picture(branched(), 0, Letters())
    assert drawn.splitlines() == [
        "'a'  pending",
        "├─ 'b'",
        "│  ├─ 'd'",
        "│  └─ 'e'",
        "└─ 'c'  accepted",
        "   ├─ 'd'  accepted",
        "   └─ 'e'",
    ]
    page = [("h1", "report"), *texts.blocks([{"task": "t", "prompt": "p", "pieces": [], "tree": drawn}])]
    assert "    ├─ 'b'" in markdown(page) and "<pre>&#x27;a&#x27;  pending" in html_page(page, Path())


class Stripping(Letters):
    """As SentencePiece: every token is a word behind a space, and the first space of a text is dropped."""

    def decode(self, ids: list[int], **_) -> str:
        return " ".join(chr(97 + i) for i in ids)


def test_a_space_at_the_beginning_of_a_token_is_kept() -> None:
    found = texts.pieces([0, 1, 2], [chain([1, 9, 8], 1, 2)], Stripping())
    assert [text for text, *_ in found] == ["a", " b", " j", " i", " c"]


def test_it_is_drawn(tmp_path: Path) -> None:
    pieces = texts.pieces([0, 30, 2], [chain([30, 9], 1, 2)], Letters())
    page = [("h1", "report"), *texts.blocks([{"task": "letters", "prompt": "say\n" * 99, "pieces": pieces}])]
    html = html_page(page, tmp_path)
    assert '<span class="accepted" title="round 1: draft 1 of 2, accepted">&lt;b&gt;</span>' in html
    assert '<del class="rejected" title="round 1: draft 2 of 2, rejected">j</del>' in html
    assert "    a[<b>]c" in markdown(page) and "### letters: ... " in markdown(page)
    assert texts.blocks([]) == []


def test_the_pieces_of_an_evaluation_are_its_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "evaluate.controllers=[tree:2x2]")
    plant_heads(run, 2)
    evaluate.run(run)
    found = evaluate.Measured.load(run / "eval")
    tokenizer = evaluate.load_tokenizer(run.config.backbone)
    best = json.loads((run / "eval" / "results.json").read_text())["best"]
    shown = texts.shown(found, best, tokenizer)
    assert sorted(text["task"] for text in shown) == sorted(set(found.generations.task))
    drafted: pd.DataFrame = found.rounds
    assert (drafted.drafts.map(len) == drafted.drafted).all() and drafted.drafted.sum() > 0
    own = found.generations.query("controller == 'autoregressive'")
    for text in shown:
        written = "".join(piece for piece, kind, _ in text["pieces"] if kind != "rejected")
        prompts = found.prompts[found.prompts.ids.map(tokenizer.decode) == text["prompt"]].prompt
        plain = own[own.prompt.isin(prompts)].tokens
        assert written in {"".join(tokenizer.decode([i]) for i in ids) for ids in plain}
    assert 'class="drafts"' in (run / "report" / "index.html").read_text()
    assert "texts" not in json.loads((run / "eval" / "results.json").read_text()), "results are published"


@pytest.mark.parametrize("committed", [1, 2])
def test_a_text_may_end_within_a_round(committed: int) -> None:
    found = texts.pieces([0, 1, 2][: 1 + committed], [chain([1, 2, 3], 3, committed)], Letters())
    assert [kind for _, kind, _ in found] == ["own"] + ["accepted"] * committed
