"""The repository's head: it is whole, and what `try` shows is what was decoded."""

import json
from pathlib import Path

import pytest
from helpers import make_run, plant_heads
from rich.console import Console

from pipeline.errors import UserError
from pipeline.generation.leaks import check_not_published_as_trained_on
from pipeline.inference.exit_head import ExitHead
from pipeline.prompts.prompt import Prompt
from pipeline.publishing import head_folder
from pipeline.smollm2 import trial

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny-llama with a chat template, and runs/t/heads/exit-2."""
    place = tmp_path_factory.mktemp("trial")
    plant_heads(make_run(place), 2)
    settings = json.loads((place / "tiny-llama" / "tokenizer_config.json").read_text())
    (place / "tiny-llama" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return place


def test_plain_and_drafted_stand_side_by_side(place, tmp_path, monkeypatch, capsys) -> None:
    head = place / "runs" / "t" / "heads" / "exit-2"
    monkeypatch.setattr(trial, "HEAD", head)
    whole, screen = tmp_path / "whole", Console(width=160)
    assert trial.run(place / "tiny-llama", whole, questions=3, new_tokens=12, controller="fixed:2", screen=screen)
    said = capsys.readouterr().out
    assert "3 of 3 texts identical" in said and said.count("acceptance length") == 3
    assert said.count("plain, ") == 3 and said.count("drafted, ") == 3
    assert (whole / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()
    published = {path.name for path in (whole / "custom_generate").iterdir()}
    assert {"generate.py", "decoding.py", "requirements.txt"} <= published and (
        whole / head_folder.MODELING.name
    ).exists()


def test_the_repositorys_head_is_whole_and_has_seen_no_evaluation_prompt() -> None:
    head = ExitHead.load(trial.HEAD)
    assert head.exit_layer == 2 and head.num_layers == 30 and head.draft_ids_W is not None
    assert sum(path.stat().st_size for path in trial.HEAD.rglob("*")) < 10 << 20
    asked = [Prompt("p", (json.loads(line)["prompt"],), "") for line in trial.QUESTIONS.read_text().splitlines()]
    assert len(asked) >= 40 and check_not_published_as_trained_on(trial.HEAD, asked, "evaluate.prompts")
    learned = [json.loads(line)["prompt"] for line in trial.QUESTIONS.with_name("train.jsonl").read_text().splitlines()]
    with pytest.raises(UserError, match="trained on 1 of the 1"):
        check_not_published_as_trained_on(trial.HEAD, [Prompt("p", (learned[0],), "")], "evaluate.prompts")


def test_questions_are_of_every_task_and_in_turn() -> None:
    asked = trial.first_of_each_task(8)
    rows = [json.loads(line) for line in trial.QUESTIONS.read_text().splitlines()]
    tasks = [next(row["task"] for row in rows if row["prompt"] == question) for question in asked]
    assert len(set(asked)) == 8 and len(set(tasks[:6])) == 6 and tasks[6:] == tasks[:2]
