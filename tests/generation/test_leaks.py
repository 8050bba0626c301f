"""No prompt that the heads were trained on is evaluated on: not after a change of the config either."""

import json
import shutil
from contextlib import nullcontext

import pytest
from helpers import make_run, plant_heads

from pipeline.errors import UserError
from pipeline.generation.leaks import PUBLISHED, check_not_trained_on, hashes_of
from pipeline.prompts.origins import origins
from pipeline.prompts.prompt import Prompt
from pipeline.prompts.reading import read
from pipeline.prompts.sets import evaluation_prompts
from pipeline.runs.folder import RunDir
from pipeline.stages import evaluate, generate


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDir:
    """Responses to all but the held-out prompts, of which some are conversations, and a head."""
    folder = tmp_path_factory.mktemp("leaks")
    rows = [{"turns": [f"Prompt number {i}", "and then?"][: 1 + i % 2]} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(folder, "generate.num_prompts=0", "generate.max_new_tokens=4")
    generate.run(run)
    plant_heads(run, 2)
    return run


def _changed(run: RunDir, *words: str) -> RunDir:
    return make_run(run.path.parent.parent, "generate.num_prompts=0", "generate.max_new_tokens=4", *words)


def _other(run: RunDir, name: str, rows: list[dict]) -> str:
    path = run.path.parent.parent / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _of(run: RunDir, role_is_evaluate: bool) -> list:
    everything = read(origins(run.config.prompts)[0], run.config.prompts, "distill", set())
    held_out = {p.id for p in evaluation_prompts(run.config)}
    return [p for p in everything if (p.id in held_out) == role_is_evaluate]


def test_the_held_out_share_is_no_leak(trained) -> None:
    chosen = evaluation_prompts(trained.config)
    assert len(chosen) > 3
    check_not_trained_on(trained / "responses", chosen, "prompts")


def test_every_prompt_that_was_trained_on_is_named(trained) -> None:
    learned, held_out = _of(trained, False), _of(trained, True)
    with pytest.raises(UserError) as caught:
        check_not_trained_on(trained / "responses", [*held_out[:2], *learned[:5]], "evaluate.prompts")
    said = str(caught.value)
    assert said.startswith("evaluate.prompts: the heads were trained on 5 of the 7 prompts")
    assert all(p.id in said and repr(p.text) in said for p in learned[:3]) and learned[3].id not in said
    assert "evaluate.prompts.path" in said and "--redo generate" in said


LEAKS = {
    "the same texts": lambda p: {"turns": list(p.turns)},
    "other capitals and spaces": lambda p: {"prompt": p.text.upper().replace(" ", "  ")},
    "a conversation that begins so": lambda p: {"turns": [p.text, "something else"]},
    "with a line feed behind it": lambda p: {"prompt": p.text + "\n"},
}


@pytest.mark.parametrize("as_row", LEAKS.values(), ids=LEAKS.keys())
@pytest.mark.parametrize("mixture", [False, True])
def test_another_set_after_generate_is_refused(trained, as_row, mixture) -> None:
    learned = _of(trained, False)[:4]
    path = _other(trained, "leak.jsonl", [as_row(p) for p in learned] + [as_row(Prompt("", ("new",), ""))])
    clean = _other(trained, "clean.jsonl", [{"prompt": "newer"}])
    both = f"evaluate.prompts.mixture=[{{path: {clean}}},{{path: {path}}}]"
    words = both if mixture else f"evaluate.prompts.path={path}"
    with pytest.raises(UserError, match=rf"trained on 4 of the {5 + mixture} prompts"):
        evaluate.run(_changed(trained, words, "evaluate.num_prompts=0"))
    assert not (trained / "eval").exists() and not (trained / "stages" / "evaluate.json").exists()


def test_a_larger_held_out_share_after_generate_is_refused(trained) -> None:
    with pytest.raises(UserError, match=r"^prompts: the heads were trained on \d+ of the"):
        evaluate.run(_changed(trained, "prompts.held_out=0.9", "evaluate.num_prompts=0"))


def test_responses_that_the_heads_did_not_learn_from_prove_nothing(trained) -> None:
    record = {"stage": "distill", "inputs": {"responses/manifest.json": "of others"}}
    path = trained / "run.json"
    before = path.read_text()
    path.write_text(json.dumps([*json.loads(before), record]))
    try:
        with pytest.raises(UserError, match=r"learned from other responses.*--redo distill"):
            evaluate.run(trained)
    finally:
        path.write_text(before)


def test_without_responses_it_is_said_that_nothing_could_be_checked(tmp_path, capsys) -> None:
    few = [
        "evaluate.num_prompts=1",
        "evaluate.max_new_tokens=4",
        "evaluate.controllers=[fixed:2]",
    ]
    run = make_run(tmp_path, *few)
    plant_heads(run, 2)
    evaluate.run(run)
    assert "holds no responses: whether some of the prompts" in capsys.readouterr().err
    head = run / "heads" / "exit-2"
    evaluate.run(make_run(tmp_path, "run.name=o", f"evaluate.head={head}", *few))
    assert f"evaluate.head={head} brings no training prompts" in capsys.readouterr().err


def test_a_published_head_brings_hashes_of_its_prompts(trained, tmp_path) -> None:
    """Another spelling of a prompt that it learned from is refused; others are measured."""
    head = tmp_path / "head"
    shutil.copytree(trained / "heads" / "exit-2", head)
    (head / PUBLISHED).write_text(json.dumps(hashes_of(trained / "responses")))
    answered = _of(trained, role_is_evaluate=False)[0].turns[0]
    asked = ["evaluate.num_prompts=1", "evaluate.max_new_tokens=4", "evaluate.controllers=[fixed:2]", "run.name=o"]
    for prompt, refused in ((f" {answered.upper()}\n", True), ("Something else", False)):
        path = _other(trained, "asked.jsonl", [{"prompt": prompt}])
        run = _changed(trained, *asked, f"evaluate.head={head}", f"evaluate.prompts.path={path}")
        with pytest.raises(UserError, match="trained on 1 of the 1 prompts") if refused else nullcontext():
            evaluate.run(run)
    (head / PUBLISHED).write_text("[1, ")
    with pytest.raises(UserError, match="not the hashes of prompts"):
        evaluate.run(_changed(trained, *asked[:-1], "run.name=damaged", f"evaluate.head={head}"))
