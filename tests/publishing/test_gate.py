"""Every line of the gate: results that must not be published, and folders that are not what was evaluated."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import forked
import pytest
import torch
from helpers import make_run, plant_heads
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.errors import GateError, UserError
from pipeline.evaluation import overview
from pipeline.evaluation.closing import closing_table
from pipeline.evaluation.results import SCHEMA
from pipeline.publishing import build, gate, head_folder, parity
from pipeline.runs.files import sha256_of
from pipeline.stages import evaluate, publish

JUDGED = ("evaluate.num_prompts=8", "prompts.held_out=0.6")
"""As few conversations as a speedup is judged on."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("gate"), "publish.min_speedup=0.01", *JUDGED)
    plant_heads(run, 2, 3)
    evaluate.run(run)
    return run


@pytest.fixture(scope="module")
def folder(run):
    """A head's folder as it is when parity is checked, and the results of its head, of which every draft is right."""
    results = gate.results_of_one(json.loads((run / "eval" / "results.json").read_text()), 3)
    head_folder.write(run / "whole", run, results)
    return run / "whole", results


def copy_of(run, folder: Path, *words: str):
    """The evaluated run elsewhere, with other publish keys."""
    shutil.copytree(run.path, folder / "runs" / "t")
    shutil.copytree(run.config.backbone.name_or_path, folder / "tiny-llama")
    return make_run(folder, *JUDGED, *words)


# ---- by results alone


def a_result(**changes) -> dict:
    """Of a head that passes."""
    speedups = {"fixed:2": 1.2, "fixed:4": 1.3, "thompson": 1.4, "fixed:0": 9.0}
    figures = {name: {"speedup": s, "speedup_ci95": [s - 0.1, s + 0.1], "speedup_joint_ci95": [s - 0.2, s + 0.2],
                      "acceptance_length": 2.0, "acceptance_length_ci95": [1.9, 2.1]}
               for name, s in speedups.items()}  # fmt: skip
    entry = {"exit_layer": 2, "temperature": 0.0, "head_sha256": "aa", "controllers": figures,
             "compared": {"methods": 4, "conversations": 20, "prompts": 22}}  # fmt: skip
    greedy = {"prompts": 4, "texts": 8, "identical": 8, "divergences": [], "passed": True}
    return {
        "schema": SCHEMA, "dtype": "float32", "lossless": {"greedy": greedy, "sampling": None}, "heads": [entry],
        "best": {"exit_layer": 2, "controller": "thompson", "temperature": 0.0, "speedup_ci95": [1.2, 1.6],
                 "methods": 4, "conversations": 20, "prompts": 22},
    } | changes  # fmt: skip


def test_texts_of_a_batch_that_are_not_the_backbones_are_refused() -> None:
    proofs = a_result()["lossless"]
    assert gate.failures(a_result(lossless=proofs | {"batches": {"passed": True}}), 1.0, "aa") == []
    (reason,) = gate.failures(a_result(lossless=proofs | {"batches": {"passed": False}}), 1.0, "aa")
    assert reason.startswith("lossless: texts decoded several at once are not the backbone's")


def test_only_the_batches_of_the_head_are_published() -> None:
    assert "batches" not in gate.results_of_one(a_result(), None)
    both = a_result(batches=[{"exit_layer": 1}, {"exit_layer": 2}])
    assert gate.results_of_one(both, None)["batches"] == [{"exit_layer": 2}]


def test_the_gate_names_every_reason() -> None:
    good = a_result()
    assert gate.failures(good, 1.0, "aa") == []
    slow = a_result(best=good["best"] | {"speedup_ci95": [0.99, 1.4]})
    greedy = good["lossless"]["greedy"] | {"identical": 7, "passed": False}
    wrong = slow | {"lossless": {"greedy": greedy, "sampling": {"passed": False, "p_value": 1e-9}}}
    assert [r.split(":")[0] for r in gate.failures(wrong, 1.0, "bb")] == ["weights", "lossless", "lossless", "speedup"]
    assert "which holds for all 4 methods that were compared, begins at 0.990" in gate.failures(slow, 1.0, "aa")[0]
    learning = a_result(
        heads=[good["heads"][0] | {"controllers": {"thompson": good["heads"][0]["controllers"]["thompson"]}}]
    )
    assert [r.split(":")[0] for r in gate.failures(learning, 1.0, "aa")] == ["parity"]


def test_a_speedup_over_too_few_conversations_is_not_judged() -> None:
    few = a_result()
    few["best"] |= {"speedup_ci95": None, "conversations": 7, "prompts": 30}
    (line,) = gate.failures(few, 1.0, "aa")
    assert line.startswith("speedup: 7 conversations are too few, 8 are needed to judge it") and "num_prompts" in line
    assert gate.failures(few, 0.0, "aa") == [], "nothing is asked of the speed"


def test_the_best_fixed_length_is_greedys_and_drafts_something() -> None:
    assert gate.best_fixed(a_result()) == 4
    sampled = a_result()
    sampled["heads"][0]["temperature"] = 1.0
    assert gate.best_fixed(sampled) is None


def test_one_head_is_chosen_with_its_own_best() -> None:
    one = a_result()
    slower = json.loads(json.dumps(one["heads"][0]))
    slower["exit_layer"] = 3
    slower["controllers"]["thompson"]["speedup"] = 1.1
    both = a_result(heads=[one["heads"][0], slower])
    assert gate.results_of_one(both, None)["best"]["controller"] == "fixed:0", "the fastest of layer 2 here"
    chosen = gate.results_of_one(both, 3)
    assert [h["exit_layer"] for h in chosen["heads"]] == [3] and chosen["best"]["exit_layer"] == 3
    with pytest.raises(UserError, match=r"publish\.exit_layer=4: not evaluated; these were: 2, 3"):
        gate.results_of_one(both, 4)
    assert chosen["best"]["speedup_ci95"] == [9.0 - 0.2, 9.0 + 0.2], "the one that holds for the methods of both heads"
    assert (chosen["best"]["methods"], chosen["best"]["conversations"], chosen["best"]["prompts"]) == (4, 20, 22)
    with pytest.raises(UserError, match=r"evaluate\.temperatures: nothing greedy was evaluated.*--redo evaluate"):
        gate.results_of_one(a_result(lossless={"greedy": None, "sampling": {"passed": True}}), None)


# ---- in the run folder


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"schema": 3, "heads": []}'])
def test_without_results_there_is_no_folder_and_no_card(run, tmp_path, content) -> None:
    """Not by force either: there is nothing that a card could say."""
    again = copy_of(run, tmp_path, "publish.force=true")
    file = again / "eval" / "results.json"
    file.unlink() if content is None else file.write_text(content)
    for run_stage in (publish.run, publish.run_draft):
        with pytest.raises(UserError, match=r"results\.json: holds no results of an exit head; .*--redo evaluate"):
            run_stage(again)
    assert not (again / "hub").exists()


def test_results_of_another_version_are_named_as_such(run, tmp_path, capsys) -> None:
    """Their `best` had another meaning: by publish, by the closing table and by the overview."""
    again = copy_of(run, tmp_path, "publish.force=true")
    file = again / "eval" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 2}))
    for read in (publish.run, closing_table):
        with pytest.raises(UserError, match=r"is of schema 2, this version knows schema 3: evaluate anew, with --redo"):
            read(again)
    rows = overview.rows(again.path)
    assert [row["exit layer"] for row in rows] == ["2", "3"] and all("--redo evaluate" in row["state"] for row in rows)


def test_a_refused_head_is_not_written_unless_forced(run, forked_child, tmp_path) -> None:
    strict = copy_of(run, tmp_path, "publish.min_speedup=50", "publish.exit_layer=2")
    for run_stage in (publish.run, publish.run_draft):
        with pytest.raises(GateError, match=r"exit layer 2:\n  - speedup"):
            run_stage(strict)
    assert not (strict / "hub").exists() and not (strict / "stages" / "publish.json").exists()
    forced = make_run(tmp_path, *JUDGED, "publish.min_speedup=50", "publish.exit_layer=2", "publish.force=true")
    publish.run(forced)
    text = (forced / "hub" / "2" / "README.md").read_text()
    assert "did not pass the gate and was published by force" in text and "asks for more" in text


def test_weights_that_were_not_evaluated_are_refused(run, tmp_path) -> None:
    other = copy_of(run, tmp_path, "publish.min_speedup=0.01", "publish.exit_layer=2")
    shutil.copy(other / "heads" / "exit-3" / "model.safetensors", other / "heads" / "exit-2" / "model.safetensors")
    file = other / "heads" / "exit-2" / "model.safetensors"
    save_file({k: w * 1.01 for k, w in load_file(file).items()}, file)
    with pytest.raises(GateError, match="weights: these are not those that were evaluated"):
        publish.run(other)


def test_a_folder_that_fails_leaves_nothing_and_no_mark(run, tmp_path, monkeypatch) -> None:
    """Found after it was written: the temporary folder goes, and the next try needs no --redo."""
    again = copy_of(run, tmp_path, "publish.min_speedup=0.01", "publish.exit_layer=2")
    monkeypatch.setattr(build.parity, "check", lambda *_: ({}, ["parity: for a reason"]))
    with pytest.raises(GateError, match="- parity: for a reason"):
        publish.run(again)
    assert not list((again / "hub").iterdir()) and not (again / "stages" / "publish.json").exists()


def test_force_is_a_flag_and_draft_a_form(run, tmp_path, capsys, monkeypatch) -> None:
    again = copy_of(run, tmp_path)
    monkeypatch.setattr(build.parity, "check", lambda *_: (None, []))
    words = ["publish", f"run.dir={again.path.parent}", "run.name=t", "publish.min_speedup=50", "publish.exit_layer=2",
             f"backbone.name_or_path={tmp_path / 'tiny-llama'}", "backbone.dtype=float32"]  # fmt: skip
    assert main(words) == 3
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--as", "draft", "--force"]) == 0
    assert [p.name for p in (again / "hub").iterdir()] == ["2-draft"]
    assert main([*words, "--force"]) == 0 and main([*words, "--force", "--as", "draft"]) == 0
    assert "draft: done already" in capsys.readouterr().out
    assert main([*words, "--force", "--redo", "publish"]) == 0
    assert (again / "hub" / "2-draft").is_dir(), "the head alone is made anew"
    assert main([*words, "--redo", "draft"]) == 2
    assert "publish --as draft --redo draft" in capsys.readouterr().err
    assert main([*words, "--force", "--as", "draft", "--redo", "draft"]) == 0


# ---- in the published folder


def check(run, folder, results) -> tuple[dict, list[str]]:
    return parity.check(run, results, folder, "head", 2)


class Cycle:
    """Held by itself alone, as a model may be that a stage before has let go of."""

    def __init__(self, size: int, device: str):
        self.itself, self.weights = self, torch.zeros(size, device=device)


def test_a_whole_folder_gives_what_was_evaluated(run, folder) -> None:
    """And what stages before have let go of is gone."""
    gc.disable()
    try:
        left = weakref.ref(Cycle(1, "cpu"))
        figures, failed = check(run, *folder)
        assert left() is None
    finally:
        gc.enable()
    assert failed == []
    assert (figures["texts"], figures["identical"]) == (6, 6), "four by fixed:2, the first by the folder's own two"
    assert figures["tokens_per_round"] == pytest.approx(figures["evaluated"], abs=1e-12), "the very same rounds"


@pytest.fixture
def forked_child(monkeypatch) -> None:
    """The check's process need not be a fresh one where the folder is what is wrong."""
    monkeypatch.setattr(parity, "subprocess", forked)


def damaged(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_other_weights_are_told_by_their_rounds(run, folder, forked_child, tmp_path) -> None:
    """The text is the backbone's with any head, so only the rounds can tell."""
    other = damaged(folder[0], tmp_path / "other")
    file = other / "model.safetensors"
    save_file({k: torch.zeros_like(w) for k, w in load_file(file).items()}, file)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sha256": sha256_of(file)}))
    figures, failed = check(run, other, folder[1])
    assert figures["identical"] == 6 and len(failed) == 1
    assert "tokens a round through the folder in a fresh process; evaluate had" in failed[0]


def test_other_code_is_told_by_its_text(run, folder, forked_child, tmp_path) -> None:
    """A decoder whose bonus tokens are the least likely ones."""
    other = damaged(folder[0], tmp_path / "other")
    code = other / "custom_generate" / "sampling.py"
    assert "def accept(" in code.read_text()
    code.write_text(code.read_text().replace("def accept(", "def accept(self, drafts, q, p_logits_MV):\n"
                    "        return 0, int(p_logits_MV[0].argmin())\n\n    def _accept("))  # fmt: skip
    _, failed = check(run, other, folder[1])
    assert any("of 6 texts decoded through the folder in a fresh process are not those" in line for line in failed)


def test_the_folders_own_controllers_are_tried(run, folder, forked_child, tmp_path) -> None:
    """A default that no decoder knows, or a state that thompson cannot read: fixed:K sees nothing of either."""
    config = json.loads((folder[0] / "config.json").read_text())
    for i, wrong in enumerate(({"controller": "fast"}, {"states": {"greedy": {"rounds": "many"}}})):
        other = damaged(folder[0], tmp_path / str(i))
        (other / "config.json").write_text(json.dumps(config | wrong))
        _, failed = check(run, other, folder[1])
        assert len(failed) == 1 and "does not work in a fresh process" in failed[0], wrong


def begins_with(folder: Path, target: Path, line: str) -> Path:
    """The folder elsewhere, its decoder beginning with another line."""
    shutil.copytree(folder, target)
    code = target / "custom_generate" / "rounds.py"
    code.write_text(f"import os, torch\n{line}\n" + code.read_text())
    return target


def test_a_folder_that_does_not_work_says_why(run, folder, forked_child, tmp_path, capfd) -> None:
    """On stderr in full; the reason, which may be published, names no more than the error's class."""
    wrong = begins_with(folder[0], tmp_path / "wrong", f"raise ValueError('cannot read {tmp_path}')")
    _, failed = check(run, wrong, folder[1])
    assert failed == ["parity: the folder does not work in a fresh process: ValueError, return code 1"]
    assert f"ValueError: cannot read {tmp_path}" in capfd.readouterr().err
    ended = begins_with(folder[0], tmp_path / "ended", "os._exit(7)")
    _, failed = check(run, ended, folder[1])
    assert failed == ["parity: the folder does not work in a fresh process: no word, return code 7"]


@pytest.mark.parametrize(
    "line, code",
    [
        ("os.kill(os.getpid(), 9)", -9),  # as the kernel does where a machine's memory ends
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')", 1),
    ],
)
def test_want_of_memory_is_the_machines_fault(run, folder, forked_child, tmp_path, line, code) -> None:
    other = begins_with(folder[0], tmp_path / "other", line)
    with pytest.raises(UserError, match=rf"machine\.device=cpu: no memory here.*return code {code}\)"):
        check(run, other, folder[1])


@pytest.mark.gpu
def test_memory_of_the_gpu_is_given_back_before_the_child_starts(run, folder) -> None:
    """Else it stays with this process, which keeps what it has freed for itself."""
    Cycle(2**28, "cuda")  # 1 GiB
    held = torch.cuda.memory_reserved()
    check(run, *folder)
    assert torch.cuda.memory_reserved() <= held - 2**30
