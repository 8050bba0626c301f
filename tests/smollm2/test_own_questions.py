"""A chat model's own questions: its user's turns that ended, each once, the same for a seed."""

import json
from pathlib import Path

import pytest
from ggufs import tiny_gguf
from helpers import tiny_backbone

from pipeline.config import Backbone
from pipeline.errors import UserError
from pipeline.smollm2 import own_questions


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    """Of random weights; its template ends a turn by a line break."""
    path = tiny_gguf(tiny_backbone(tmp_path), tmp_path / "tiny.gguf")
    return Backbone(name_or_path=str(path), dtype="float32", gguf_dir=str(tmp_path))


def test_questions_end_and_differ(tmp_path: Path, backbone: Backbone) -> None:
    first, again = (own_questions.ask(backbone, 9, tmp_path / name, seed=3) for name in ("a.jsonl", "b.jsonl"))
    assert first.read_bytes() == again.read_bytes()
    prompts = [json.loads(line)["prompt"] for line in first.read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) == 9
    assert all(len(p) >= own_questions.SHORTEST and "\n" not in p and "user" not in p for p in prompts)


def test_a_model_that_writes_nothing_new(tmp_path: Path, backbone: Backbone, monkeypatch) -> None:
    monkeypatch.setattr(own_questions, "_batch", lambda *_: ["Is it the same again?", "no"])
    with pytest.raises(UserError, match="1 of 9 questions"):
        own_questions.ask(backbone, 9, tmp_path / "a.jsonl")


def test_a_backbone_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        own_questions.ask(Backbone(name_or_path="pocket"), 9, tmp_path / "a.jsonl")
