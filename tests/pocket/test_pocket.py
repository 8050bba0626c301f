"""The built-in backbone: small, offline, checked, and kept apart from the text that it is measured on."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.pocket import checks, corpus, cutting, recipe
from pipeline.pocket.paths import BACKBONE, HOME, PROMPTS

weights = pytest.mark.skipif(not BACKBONE.exists(), reason="not trained yet: python -m pipeline.pocket train")

MODULE = '''\
"""A module of which prompts are cut."""

import os


class Thing:
    @property
    def size(self,
             of=None):
        """How large it is.

        In bytes.
        """
        total = 0
        total += 1
        return total

    def short(self):
        return 1

    async def wait(self):  # for it
        # first of all
        if self:
            pass
        return 2
'''


def _rows(role: str) -> list[dict]:
    return [json.loads(line) for line in PROMPTS[role].read_text("utf-8").splitlines()]


def _manifest() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "distill": set(), "evaluate": set()}
    for line in corpus.MANIFEST.read_text().splitlines()[1:]:
        _, role, name = line.split()
        found[role].add(name)
    return found


# ---- what was held out


def test_manifest_lists_exactly_the_held_out_names():
    found = _manifest()
    assert found["distill"] == set(corpus.HELD_OUT["distill"])
    assert found["evaluate"] == set(corpus.HELD_OUT["evaluate"])
    assert len(found["train"]) > 500 and not found["train"] & (found["distill"] | found["evaluate"])


@pytest.mark.parametrize("role", ["distill", "evaluate"])
def test_prompts_come_from_held_out_modules_of_their_role(role):
    rows = _rows(role)
    assert {row["source"] for row in rows} <= set(corpus.HELD_OUT[role])
    assert 0 < max(len(row["prompt"]) for row in rows) <= cutting.LONGEST
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert {row["task"] for row in rows} == set(cutting.KINDS)


def test_the_roles_share_no_prompt():
    assert len(_rows("distill")) >= 1000 and len(_rows("evaluate")) >= 150
    assert not {r["prompt"] for r in _rows("distill")} & {r["prompt"] for r in _rows("evaluate")}


def test_the_first_prompts_are_a_balanced_mix():
    first = _rows("evaluate")[:24]
    assert Counter(row["task"] for row in first) == dict.fromkeys(cutting.KINDS, 8)
    assert Counter(row["source"] for row in first).most_common(1)[0][1] <= 3, "one of each kind at most"


def test_no_prompt_ends_with_a_line_break():
    """The tokenizer makes one token of a line break and the indentation after it: a prompt must not end inside it."""
    assert not [row for role in ("distill", "evaluate") for row in _rows(role) if row["prompt"].endswith("\n")]


def test_heads_ask_for_a_body():
    for row in _rows("distill"):
        if row["task"] == "head":
            last = row["prompt"].splitlines()[-1]
            tree = ast.parse(row["prompt"] + "\n" + " " * 40 + "pass\n").body[0]
            function = tree.body[0] if isinstance(tree, ast.ClassDef) else tree
            assert (
                isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and last.split("#")[0].rstrip()[-1] == ":"
            )


def test_cutting():
    found = cutting.cut(MODULE)
    head = "class Thing:\n    def size(self,\n             of=None):"
    wait = "class Thing:\n    async def wait(self):  # for it"
    assert [text for kind, text in found if kind == "head"] == [head, wait], "the body of short() is too short"
    docstring = head + '\n        """How large it is.\n\n        In bytes.\n        """'
    assert [text for kind, text in found if kind == "docstring"] == [docstring]
    openings = [text for kind, text in found if kind == "opening"]
    assert list(cutting.continuations(MODULE)) == [head, wait]
    assert (
        cutting.continuations(MODULE)[wait]
        == "\n        # first of all\n        if self:\n            pass\n        return 2\n"
    )
    assert openings and all(MODULE.startswith(text + "\n") for text in openings)


def test_notice_carries_the_licence():
    notice = (HOME / "prompts" / "NOTICE").read_text()
    for words in ("Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved", corpus.PYTHON):
        assert words in notice
    for number in range(1, 9):
        assert f"\n{number}. " in notice, "the agreement has eight numbered paragraphs"


# ---- the recipe and the checks, on a model of two steps


def test_training_writes_a_checkpoint_that_the_checks_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: None)  # a minute of compilation proves nothing here
    monkeypatch.setattr(checks, "MAX_NEW_TOKENS", 8)
    text = "def f(x):\n    return x + 1\n\n" * 200
    sources = {"train": {"a.py": text}, "distill": {}, "evaluate": {"b.py": text}}
    tokenizer = recipe.train_tokenizer([text], 300)
    chosen = recipe.Recipe(layers=2, hidden=24, ffn=32, vocabulary=300, context=32, steps=2, tokens_per_step=64)
    folders = [tmp_path / "deep", tmp_path / "twin"]
    for folder in folders:
        recipe.train(chosen, tokenizer, {k: list(v.values()) for k, v in sources.items()}, folder, "cpu")
    monkeypatch.setattr(corpus, "modules", lambda stdlib=None: sources)
    monkeypatch.setattr(checks, "heads", lambda count: ["def f(x):"] * 3)
    monkeypatch.setattr(cutting, "SHORTEST_BODY", 1)
    result = checks.run(*folders)
    assert result == json.loads((folders[0] / "checks.json").read_text())
    assert result["held_out_loss"]["gain"] == 0 and result["held_out_loss"]["backbone"] > 0
    assert set(result["parse_share"]) == {*(str(t) for t in checks.TEMPERATURES), "library"}
    assert result["parse_share"]["library"]["function"] == 1, "what stands in the module is Python"
    checks.plot_curves(folders, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_what_counts_as_parsing():
    completions = {
        "def a():": "\n    return 1\n    half a li",
        "class B:\n    def b():": "\n        pass\n\n    def c(:\n",  # the next function is no longer this one
        "def c():": "\n    return (1,\n            2",
        "def d():": "no line at all",
    }
    found = checks.parse_share(list(completions), list(completions.values()))
    assert found == {"function": 0.5, "last_line": 0.25}


# ---- the weights that are shipped


@weights
def test_backbone_loads_offline_in_plain_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BACKBONE)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_hidden_layers == recipe.Recipe.layers
    assert model.config.vocab_size == len(tokenizer) == recipe.Recipe.vocabulary
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("def main():", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    assert text.startswith("def main():\n    "), "it indents a body"


@weights
def test_backbone_fits_into_a_repository():
    assert sum(p.stat().st_size for p in BACKBONE.rglob("*") if p.is_file()) <= 16 * 2**20


@weights
def test_tokenizer_gives_every_text_back():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    texts = [
        "def f(x):\n\treturn x  # tab\n\n\n",
        "naïve Größe, 日本語, \N{SNAKE}, e\u0301, \u2028 and \x00",
        "   leading, trailing   ",
        "\r\n  \r\n",
        Path(__file__).read_text("utf-8"),
        *(row["prompt"] for row in _rows("evaluate")),
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@weights
def test_recorded_checks_meet_their_floors():
    record = json.loads((BACKBONE / "checks.json").read_text())
    assert record["weights_sha256"] == checks.weights_sha256(BACKBONE), "run python -m pipeline.pocket check anew"
    share = record["parse_share"]["0.7"]["function"]
    assert share >= 0.5, "half of its functions, sampled at temperature 0.7, are Python"
    assert record["held_out_loss"]["gain"] >= 0.15, "nats per token below the shallow twin: depth is not for show"
    training = json.loads((BACKBONE / "training.json").read_text())
    assert abs(training["held_out_loss"] - record["held_out_loss"]["backbone"]) < 0.02, "bf16 weights lose little"
