"""What evaluate will refuse is refused before the responses are generated, with a remedy that costs nothing."""

import json

import pytest
from helpers import make_run, plant_heads

from pipeline import cli
from pipeline.errors import UserError
from pipeline.runs.folder import RunDir
from pipeline.stages import evaluate, generate


def _prompts(tmp_path, long_share: int) -> None:
    """40 prompts, one in `long_share` of them of 235 tokens."""
    rows = [{"prompt": f"prompt {i} " + "x" * (235 - len(f"prompt {i} ")) * (i % long_share == 0)} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _nothing_was_made(run: RunDir) -> bool:
    return not (run / "responses").exists() and not (run / "stages" / "generate.json").exists()


def test_prompts_without_room_for_evaluates_answers(tmp_path, capsys) -> None:
    _prompts(tmp_path, long_share=2)
    words = ["evaluate.max_new_tokens=24", "evaluate.controllers=[fixed:2]"]
    run = make_run(tmp_path, *words)
    with pytest.raises(
        UserError, match=r"context of 256\. Set evaluate\.prompts\.too_long=drop or .*evaluate\.max_new"
    ):
        generate.run(run)
    assert _nothing_was_made(run)
    small = make_run(tmp_path)
    generate.run(small)
    plant_heads(small, 2)
    with pytest.raises(UserError, match=r"Set evaluate\.prompts\.too_long=drop"):
        evaluate.run(run)
    told = make_run(tmp_path, *words, "evaluate.prompts.too_long=drop")
    capsys.readouterr()
    generate.run(told)
    assert "generate: done already" in capsys.readouterr().out, "the remedy costs nothing"
    evaluate.run(told)
    assert "evaluate.prompts.too_long=drop: " in capsys.readouterr().out


def test_a_run_that_would_have_nothing_to_evaluate_on(tmp_path, capsys) -> None:
    run = make_run(tmp_path, "prompts.held_out=0.0")
    words = [f"run.dir={tmp_path / 'runs'}", f"prompts.path={tmp_path / 'prompts.jsonl'}", "prompts.held_out=0.0"]
    assert cli.main(["run", *words, "run.name=t"]) == 2
    assert "prompts.held_out=0: no prompt is left to evaluate on" in capsys.readouterr().err
    assert _nothing_was_made(run)
    generate.run(run)  # alone, it may have them all
