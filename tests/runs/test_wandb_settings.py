"""W&B is told what its own variables and settings files say, unless the config says otherwise."""

from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.runs.folder import RunDir
from pipeline.runs.tracking import Tracker
from pipeline.runs.wandb_settings import InitArguments, init_arguments, wandb_mode, wandb_root


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, file or login of who runs the tests."""
    import os

    for name in [name for name in os.environ if name.startswith(("WANDB_", "EXIT_HEADS_WANDB"))]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path / "here")


def told_by(*words: str) -> InitArguments:
    return init_arguments(load(None, list(words)).wandb)


def write(path: Path, **settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))


def test_config_variables_files_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_by() == ("offline", "exit-heads", None, None)
    write(
        tmp_path / ".config/wandb/settings", mode="online", project="shared", entity="team", base_url="https://w.corp"
    )
    assert told_by() == ("online", "shared", "team", "https://w.corp")
    write(tmp_path / "here/wandb/settings", mode="offline", project="local%20")
    assert told_by() == ("offline", "local%20", "team", "https://w.corp")
    for name, value in {"WANDB_MODE": "run", "WANDB_PROJECT": "variable", "WANDB_ENTITY": "me"}.items():
        monkeypatch.setenv(name, value)
    assert told_by() == ("online", "variable", "me", "https://w.corp")
    assert told_by("wandb.mode=offline", "wandb.project=word", "wandb.entity=us")[:3] == ("offline", "word", "us")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "")
    assert told_by() == ("offline", "local%20", "team", "https://w.corp"), "an empty variable says nothing"
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "elsewhere"))
    assert told_by()[2] is None
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "disk"))
    assert told_by()[1] == "exit-heads", "the folder of the local file is below WANDB_DIR"


@pytest.mark.parametrize(
    ("name", "value", "mode"),
    [
        ("WANDB_MODE", "dryrun", "offline"), ("WANDB_MODE", "run", "online"), ("WANDB_MODE", "shared", "online"),
        ("WANDB_MODE", "disabled", "disabled"), ("WANDB_MODE", "sometimes", "offline"),
        ("WANDB_DISABLED", "true", "disabled"), ("WANDB_DISABLED", "1", "disabled"),
        ("WANDB_DISABLED", "false", "online"), ("WANDB_DISABLED", "", "online"),
    ],
)  # fmt: skip
def test_modes(name: str, value: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv(name, value)
    assert wandb_mode(load(None, []).wandb) == mode
    assert wandb_mode(load(None, ["wandb.mode=online"]).wandb) == "online", "what the config says wins"


def test_a_login_of_the_server_that_the_settings_name(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine w.corp login user password " + "0" * 40)
    assert told_by().mode == "offline"
    write(tmp_path / ".config/wandb/settings", base_url="https://w.corp")
    assert told_by().mode == "online"


def test_files_that_are_none_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / ".config/wandb/settings"
    write(file)
    for data in (b"", b"mode = online", b"[other]\nmode=online", b"\xff\xfe"):
        file.write_bytes(data)
        assert told_by() == ("offline", "exit-heads", None, None)


def test_files_go_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With W&B itself, twice in one process: first where nothing is said, then below WANDB_DIR."""
    for name, disk in {"a": None, "b": tmp_path / "disk"}.items():
        if disk is not None:
            disk.mkdir()
            monkeypatch.setenv("WANDB_DIR", str(disk))
        run = RunDir(load(None, [f"run.dir={tmp_path / 'runs'}", f"run.name={name}", "wandb.mode=offline"]))
        assert wandb_root(run / "wandb") == (disk or run / "wandb")
        for after in (-1, 0):  # a start, and one from the checkpoint of step 0
            tracker = Tracker(run, True)
            tracker.start(after)
            tracker.log(after + 1, {"loss": 1.0})
            tracker.finish()
        files = sorted(tmp_path.rglob("run-*.wandb"))
        mine = [file for file in files if file.is_relative_to(disk or run / "wandb")]
        assert len(mine) == 2 and len(files) == (2 if disk is None else 4)
    assert not (tmp_path / ".config").exists() and not (tmp_path / ".cache" / "wandb").exists()
