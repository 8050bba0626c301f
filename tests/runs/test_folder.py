"""The run folder keeps its promises: whole files or none, done marks that notice a change, --redo that forgets."""

import fcntl
import json
import threading
from pathlib import Path

import pytest

from pipeline.config import Config, load
from pipeline.errors import UserError
from pipeline.runs import files, presence
from pipeline.runs.files import atomic_path, atomic_write, sha256_of, temporary_of
from pipeline.runs.folder import OUTPUTS, STAGES, SUBTREES, RunDir


def run_stage(run: RunDir, stage: str, inputs: list[Path] | None = None) -> bool:
    """What every stage does around its work. True if the work was done now."""
    inputs = inputs or []
    if not run.plan(stage, inputs):
        return False
    with run.stage(stage, inputs) as summary:
        summary["rows"] = 3
        atomic_write(run / OUTPUTS[stage][0] / "made.txt", stage)
    return True


def again(config: Config, *words: str) -> RunDir:
    """The same run folder, opened by another invocation with other words."""
    return RunDir(load(None, [f"run.dir={config.run.dir}", f"run.name={config.run.name}", *words]))


# ---- whole files or none


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    atomic_write(target, "a long first text")
    atomic_write(target, "short")
    assert target.read_text() == "short"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()], ids=["bug", "interrupt"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        raise ValueError("bug")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "head"
    for names in (["a", "b"], ["c"]):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            for name in names:
                (temporary / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["c"]
    with pytest.raises(ValueError, match="bug"), atomic_path(target) as temporary:
        temporary.mkdir()
        raise ValueError("bug")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def test_a_full_disk_is_a_message_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), atomic_path(tmp_path / "file.txt"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # below a file nobody can make a folder, not even root
    with pytest.raises(UserError, match=r"run\.dir="):
        RunDir(load(None, [f"run.dir={tmp_path / 'file' / 'runs'}"]))


# ---- done marks


def test_a_done_stage_is_not_done_twice(config: Config) -> None:
    assert run_stage(RunDir(config), "generate")
    assert not run_stage(again(config), "generate")


def test_a_stage_that_broke_goes_on(config: Config) -> None:
    run = RunDir(config)
    with pytest.raises(ValueError, match="bug"), run.stage("generate", []):
        raise ValueError("bug")
    assert again(config).plan("generate", [])
    assert not (run / "run.json").exists()  # no record of what did not finish


def test_a_stage_that_broke_does_not_go_on_with_other_values(config: Config) -> None:
    with pytest.raises(ValueError, match="bug"), RunDir(config).stage("generate", []):
        raise ValueError("bug")
    with pytest.raises(UserError, match=r"generate\.max_new_tokens"):
        again(config, "generate.max_new_tokens=5").plan("generate", [])


def test_a_changed_key_is_named_with_both_values_and_the_ways_out(config: Config) -> None:
    run_stage(RunDir(config), "generate")
    with pytest.raises(UserError) as caught:
        again(config, "generate.max_new_tokens=5", "seed=3").plan("generate", [])
    for part in ("generate.max_new_tokens was 128, is 5", "seed was 0, is 3", "run.name", "--redo generate"):
        assert part in str(caught.value)


def test_a_stage_may_depend_on_single_keys_of_a_section(config: Config) -> None:
    run_stage(RunDir(config), "cache")
    assert not run_stage(again(config, "distill.learning_rate=1e-4"), "cache")
    with pytest.raises(UserError, match=r"distill\.sequence_length was 256, is 64\. .*--redo cache"):
        again(config, "distill.sequence_length=64").plan("cache", [])


@pytest.mark.parametrize("stage", STAGES)
def test_a_key_of_another_stage_changes_nothing(config: Config, stage: str) -> None:
    run_stage(RunDir(config), stage)
    elsewhere = {"generate": "generate.max_new_tokens=5", "distill": "distill.max_steps=5"}
    words = [word for section, word in elsewhere.items() if section not in SUBTREES[stage]]
    assert not run_stage(again(config, *words, "machine.threads=1"), stage)


def test_where_a_folder_goes_is_no_part_of_what_it_is(config: Config) -> None:
    run_stage(RunDir(config), "publish")
    elsewhere = again(config, "publish.target=hub", "publish.public=true", "publish.repo_id=org/head")
    with pytest.raises(UserError, match=r"publish\.repo_id was None, is org/head\. Give"):
        elsewhere.plan("publish", [])
    elsewhere.redo("publish")
    run_stage(elsewhere, "publish")
    assert not again(config, "publish.repo_id=org/head").plan("publish", [])


def test_what_may_be_done_again_with_other_values_is_asked_and_not_refused(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "publish")
    folder = run / "hub"
    assert not run.is_done("push", [folder], {"to": "a"})
    with run.stage("push", [folder], {"to": "a"}):
        assert not run.is_done("push", [folder], {"to": "a"}), "begun is not done"
    assert run.is_done("push", [folder], {"to": "a"}) and not run.is_done("push", [folder], {"to": "b"})
    run.redo("publish")
    run_stage(run, "publish")
    assert not run.is_done("push", [folder], {"to": "a"}), "a folder made anew has not been pushed"


def test_a_changed_input_is_named(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    manifest = run / "responses" / "made.txt"
    assert run_stage(run, "distill", [manifest])
    assert not run_stage(run, "distill", [manifest])
    manifest.write_text("other responses")
    with pytest.raises(UserError, match=r"responses/made\.txt was [0-9a-f]{12}.*--redo distill"):
        run_stage(run, "distill", [manifest])


def test_a_missing_input_is_named(config: Config) -> None:
    run = RunDir(config)
    with pytest.raises(UserError, match=r"responses/manifest\.json is missing"):
        run.plan("distill", [run / "responses" / "manifest.json"])


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    seen = set()
    for name, text in (("a", "1"), ("b", "1"), ("b", "2")):
        folder = tmp_path / f"{name}{text}"
        atomic_write(folder / name, text)
        seen.add(sha256_of(folder))
    assert len(seen) == 3


# ---- --redo


def test_redo_forgets_one_stage_and_what_it_wrote(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    run_stage(run, "distill")
    run.redo("distill")
    assert run.plan("distill", []) and not run.plan("generate", [])
    assert not (run / "heads").exists() and (run / "responses" / "made.txt").exists()


def test_redo_of_a_stage_that_never_ran_does_nothing(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    run.redo("evaluate")
    assert not run.plan("generate", [])


def test_redo_lets_the_config_change(config: Config) -> None:
    run_stage(RunDir(config), "generate")
    changed = again(config, "generate.max_new_tokens=5")
    changed.redo("generate")
    assert run_stage(changed, "generate")


# What each stage writes but for marks, by its real names.
WRITTEN = {
    "generate": ["responses"],
    "cache": ["cache"],
    "pilot": ["pilot"],
    "distill": ["heads", "checkpoints", "metrics.jsonl", "wandb"],
    "evaluate": ["eval", "report"],
    "publish": ["hub/2", "hub/10", "hub/126"],
    "draft": ["hub/2-draft", "hub/10-draft", "hub/126-draft"],
    "push": [],
    "push-draft": [],
}


@pytest.mark.parametrize("host", ["n1", "draft-7", "x-draft"])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_stage_removes_what_it_wrote_and_nothing_of_the_others(config, monkeypatch, stage: str, host: str) -> None:
    assert SUBTREES.keys() == OUTPUTS.keys() == WRITTEN.keys() >= set(STAGES)
    monkeypatch.setattr(files.socket, "gethostname", lambda: host)
    run = RunDir(config)
    final = {name: [run / place for place in places] for name, places in WRITTEN.items()}
    half = {name: [temporary_of(path) for path in paths] for name, paths in final.items()}
    for path in (p for places in (final, half) for paths in places.values() for p in paths):
        atomic_write(path / "file", "")
    for remove, places in ((run._sweep, half), (run.redo, final)):
        remove(stage)
        gone = {name for name, paths in places.items() for p in paths if not p.exists()}
        left = {name for name, paths in places.items() for p in paths if p.exists()}
        assert gone == ({stage} if WRITTEN[stage] else set()) and left == {n for n in WRITTEN if WRITTEN[n]} - {stage}


# ---- provenance


def test_each_stage_leaves_one_record_of_where_it_came_from(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    run_stage(again(config), "generate")
    run_stage(again(config), "distill", [run / "responses" / "made.txt"])
    records = json.loads((run / "run.json").read_text())
    assert [r["stage"] for r in records] == ["generate", "distill"]
    assert records[1]["inputs"] == {"responses/made.txt": sha256_of(run / "responses" / "made.txt")}
    assert records[0]["rows"] == 3 and records[0]["config"]["seed"] == 0
    for key in ("time", "git", "git_dirty", "versions", "hardware", "command", "seconds"):
        assert key in records[0], key
    assert {"exit-heads", "python", "torch", "transformers"} <= records[0]["versions"].keys()


def test_a_record_holds_no_secret(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cr3t-" + name)
    run = RunDir(config)
    run_stage(run, "generate")
    assert "s3cr3t" not in "".join(p.read_text() for p in run.path.rglob("*") if p.is_file())


def test_the_config_in_the_folder_loads_again(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    assert load(run / "config.yaml", []) == config


def test_what_a_killed_run_left_is_no_input_and_is_swept(config: Config) -> None:
    run = RunDir(config)
    run_stage(run, "generate")
    whole = sha256_of(run / "responses")
    (run / "responses" / ".tmp-shard-0.parquet@host-123").write_text("half")
    (run / ".tmp-eval@host-123").mkdir()
    assert sha256_of(run / "responses") == whole
    run.redo("generate")
    run_stage(run, "generate")
    run_stage(run, "evaluate")
    assert not list(run.path.rglob(".tmp-*"))


def test_an_error_that_is_no_matter_of_writing_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        (tmp_path / "nowhere").read_text()


def test_a_user_error_takes_a_new_mark_back_but_not_an_older_one(tmp_path: Path) -> None:
    run = RunDir(load(None, [f"run.dir={tmp_path}"]))
    with pytest.raises(UserError), run.stage("generate", []):
        raise UserError("prompts.path=x: wrong")
    assert not (run / "stages" / "generate.json").exists()
    with pytest.raises(ValueError, match="a bug"), run.stage("generate", []):
        raise ValueError("a bug")
    with pytest.raises(UserError), run.stage("generate", []):
        raise UserError("wrong again")
    assert run.plan("generate", []), "a stage that was at work before still goes on"
    assert (run / "stages" / "generate.json").exists()


def test_a_user_error_keeps_the_mark_of_work_that_was_begun(tmp_path: Path) -> None:
    """A disk that fills after the first shard: another config must not go on from what is there."""
    run = RunDir(load(None, [f"run.dir={tmp_path}"]))
    with pytest.raises(UserError), run.stage("generate", []):
        atomic_write(run / "responses" / "shard-00000.parquet", "rows")
        raise UserError("no space left")
    assert run.plan("generate", [])
    other = RunDir(load(None, [f"run.dir={tmp_path}", "generate.max_new_tokens=7"]))
    with pytest.raises(UserError, match=r"generate\.max_new_tokens was 128, is 7"):
        other.plan("generate", [])


def test_a_stage_is_for_one_process_at_a_time(config):
    run = RunDir(config)
    with run.stage("distill", []):
        with pytest.raises(UserError, match="another process is at stage distill"), again(config).stage("distill", []):
            pass
        with again(config).stage("evaluate", []):
            pass
    assert again(config).plan("distill", []) is False


def test_a_job_that_slurm_started_again_waits_for_what_its_first_start_may_hold(config, monkeypatch):
    run = RunDir(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with (run / "stages" / ".distill.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(presence, "RESTARTED", 0.1)
        with pytest.raises(UserError, match="another process"), run.stage("distill", []):
            pass
        monkeypatch.setattr(presence, "RESTARTED", 60.0)
        threading.Timer(0.5, held.close).start()
        with run.stage("distill", []):
            pass


def test_a_shared_stage_is_for_many(config):
    with RunDir(config).stage("generate", [], shared=True), again(config).stage("generate", [], shared=True):
        pass
    assert [r["stage"] for r in json.loads((RunDir(config) / "run.json").read_text())] == ["generate"] * 2


def test_a_mark_from_before_a_key_was_there_is_no_other_config(tmp_path) -> None:
    words = [f"run.dir={tmp_path}", "prompts.mixture=[{path: a.jsonl}, {path: b.jsonl}]"]
    run = RunDir(load(None, words))
    with run.stage("generate", []):
        pass
    path = run / "stages" / "generate.json"
    mark = json.loads(path.read_text())
    del mark["config"]["backbone"]["end_tokens"], mark["config"]["prompts"]["name"]
    for source in mark["config"]["prompts"]["mixture"]:
        del source["name"]
    path.write_text(json.dumps(mark))
    assert run.plan("generate", []) is False
    words[1] = "prompts.mixture=[{path: a.jsonl}, {path: b.jsonl, name: main}]"
    with pytest.raises(UserError, match=r"prompts\.mixture\[1\]\.name was None, is main"):
        RunDir(load(None, words)).plan("generate", [])
    with pytest.raises(UserError, match=r"backbone\.end_tokens was None, is \[5\]"):
        RunDir(load(None, [words[0], "backbone.end_tokens=[5]"])).plan("generate", [])
