"""The teacher's cache: it holds the backbone's hidden states, whoever made it and however often it was killed."""

import contextlib
import json
import os
import random
import shutil
import signal
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import forked
import pytest
import torch
import torture
from distilling import WORDS, head_bytes, lines, prepare, write_responses
from helpers import tiny_backbone
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.runs.files import sha256_of
from pipeline.runs.folder import RunDir
from pipeline.stages import cache, distill
from pipeline.training import packing
from pipeline.training import teacher_cache as folders
from pipeline.training.teacher_cache import CachedTeacher, TeacherCache, check_room

SEQUENCE = 48 * 3 * 32 * 4
"""Bytes of a full sequence: tokens x (final and two exit layers) x D x float32."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    """Makes shards of two sequences each."""
    monkeypatch.setattr(folders, "SHARD_BYTES", 2 * SEQUENCE)


def cached(folder: Path, backbone: Path, *words: str) -> RunDir:
    return prepare(folder, backbone, "distill.teacher=cached", *words)


@pytest.fixture
def run(tmp_path, backbone) -> RunDir:
    """A run with a finished cache."""
    run = cached(tmp_path, backbone)
    cache.run(run)
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, backbone) -> Path:
    """The cache that one undisturbed process made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "SHARD_BYTES", 2 * SEQUENCE)
        run = cached(tmp_path_factory.mktemp("alone"), backbone)
        cache.run(run)
    return run / "cache"


def packed(run: RunDir) -> packing.Packed:
    return packing.joined(*packing.read_packed(run / "responses", run.config.distill)[1:3])


def cached_teacher(run: RunDir, *exit_layers: int) -> CachedTeacher:
    return CachedTeacher(TeacherCache(run / "cache"), packed(run), list(exit_layers))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*sorted(folder.glob("shard-*")), folder / "manifest.json"]}


# ---- what is kept


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_what_is_kept_is_what_the_backbone_says_of_each_document_alone(tmp_path, family):
    window = {"sliding_window": 8} if family == "mistral" else {}
    folder = tiny_backbone(tmp_path, family, **window)
    run = cached(tmp_path, folder)
    cache.run(run)
    model, sequences = AutoModelForCausalLM.from_pretrained(folder).model, packed(run)
    numbers = random.Random(0).sample(range(len(sequences)), len(sequences))
    final_BTD, hidden = cached_teacher(run, 2, 1)(numbers, torch.device("cpu"))
    assert list(hidden) == [2, 1] and final_BTD.shape == (len(sequences), 48, 32)
    for b, s in enumerate(numbers):
        length = int(sequences.lengths_S[s])
        starts = [t for t in range(length) if sequences.positions_ST[s, t] == 0]
        for start, end in pairwise([*starts, length]):
            ids = sequences.ids_ST[None, s, start:end].long()
            with torch.no_grad():
                states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for found_BTD, expected in ((final_BTD, states[-1]), (hidden[1], states[1]), (hidden[2], states[2])):
                torch.testing.assert_close(found_BTD[b, start:end], expected[0], rtol=1e-4, atol=1e-5)
        assert not final_BTD[b, length:].any() and not hidden[2][b, length:].any()


def test_what_a_run_leaves_behind(run, capsys):
    manifest = json.loads((run / "cache" / "manifest.json").read_text())
    sequences = packed(run)
    tokens = int(sequences.lengths_S.sum())
    assert manifest["complete"] and manifest["exit_layers"] == [1, 2] and manifest["dtype"] == "float32"
    assert manifest["packing"] | {"sha256": None} == {
        "sequence_length": 48, "sequences": len(sequences), "tokens": tokens, "sha256": None
    }  # fmt: skip
    assert len(manifest["shards"]) == -(-len(sequences) // 2) > 4
    assert sum(shard["tokens"] for shard in manifest["shards"]) == tokens
    for shard in manifest["shards"]:
        path = run / "cache" / shard["file"]
        assert sha256_of(path) == shard["sha256"] and path.stat().st_size == shard["bytes"]
        tensors = load_file(path)
        assert tensors.keys() == {"final", "hidden.1", "hidden.2"}
        assert {tuple(tensor.shape) for tensor in tensors.values()} == {(shard["tokens"], 32)}
        assert shard["bytes"] - shard["tokens"] * manifest["bytes_per_token"] < 500, "and a header"
    record = json.loads((run / "run.json").read_text())[-1]
    assert record["stage"] == "cache" and record["tokens"] == tokens and record["tokens_per_second"] > 0
    cache.run(run)
    assert "cache: done already" in capsys.readouterr().out


def test_an_online_teacher_needs_none(tmp_path, backbone, capsys):
    run = prepare(tmp_path, backbone)
    cache.run(run)
    assert "nothing is kept" in capsys.readouterr().out
    assert not (run / "cache").exists() and not (run / "stages" / "cache.json").exists()


# ---- training from it


def trained(folder: Path, backbone: Path, *words: str) -> RunDir:
    run = cached(folder, backbone, *words)
    cache.run(run)
    distill.run(run)
    return run


def assert_learned_the_same(run: RunDir, other: RunDir, *names: str) -> None:
    for ours, theirs in zip(lines(run), lines(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name in names:
        weights, expected = (load_file(r / "heads" / name / "model.safetensors") for r in (run, other))
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "turns", "words"),
    [
        ("llama", 1, []),
        ("llama", 3, ["distill.sequence_length=144"]),
        ("mistral", 1, []),
        ("qwen3", 1, ["distill.learn_from=all"]),
    ],
)
def test_training_from_the_cache_equals_online_training(tmp_path, family, turns, words):
    window = {"sliding_window": 8} if family == "mistral" else {}
    backbone = tiny_backbone(tmp_path, family, sharpness=4.0, **window)
    for name in ("online", "cached"):
        write_responses(tmp_path / name / "run" / "responses", backbone, turns=turns)
    online = prepare(tmp_path / "online", backbone, *words)
    distill.run(online)
    assert_learned_the_same(trained(tmp_path / "cached", backbone, *words), online, "exit-1", "exit-2")


def test_fewer_exit_layers_than_are_kept(tmp_path, run, backbone):
    exact = trained(tmp_path / "exact", backbone, "distill.exit_layers=[2]")
    fewer = cached(tmp_path, backbone, "distill.exit_layers=[2]")
    cache.run(fewer)
    distill.run(fewer)
    assert head_bytes(fewer, "exit-2") == head_bytes(exact, "exit-2")


@pytest.mark.slow
def test_two_processes_learn_from_the_cache_what_one_does_online(tmp_path, backbone):
    online = prepare(tmp_path / "online", backbone)
    distill.run(online)
    both = cached(tmp_path / "both", backbone, "machine.processes_per_node=2")
    cache.run(both)
    shard = both / "cache" / "shard-00001.safetensors"  # in the other process's share
    whole = shard.read_bytes()
    change_a_byte(shard)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: damaged"):
        distill.run(both)
    shard.write_bytes(whole)
    distill.run(both)
    for ours, theirs in zip(lines(both), lines(online), strict=True):
        # Sums in another order: a last-bit difference, which Adam's division makes larger as steps go by.
        assert ours == pytest.approx(theirs, rel=1e-6 if ours["step"] <= 1 else 1e-5)


# ---- made by any number of processes, killed anywhere


def words_of(folder: Path, backbone: Path, *words: str) -> list[str]:
    """For a test in a process of its own, which has no fixture's patches."""
    folders.SHARD_BYTES = 2 * SEQUENCE
    run = cached(folder, backbone, *words)
    return ["cache", f"run.dir={run.config.run.dir}", "run.name=run", f"backbone.name_or_path={backbone}", *WORDS,
            "distill.teacher=cached", *words]  # fmt: skip


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@forked.apart
def test_two_processes_make_one_cache(tmp_path, backbone, alone):
    words, log = words_of(tmp_path, backbone), torture.Log()
    here = TeacherCache(tmp_path / "run" / "cache")
    with contextlib.ExitStack() as everything:
        held = {path.name: contextlib.ExitStack() for path in alone.glob("shard-*")}
        for name, claim in held.items():
            everything.enter_context(claim).enter_context(here.claims.hold(name))
        both = [torture.start("none", words, log) for _ in range(2)]
        while str(log).count("waiting for other processes") < 2:
            assert os.waitpid(-1, os.WNOHANG) == (0, 0), str(log)
        # Each makes one while the other stands still, so that both certainly have a share.
        for name, works, stands in zip(sorted(held), both, reversed(both), strict=False):
            os.kill(stands, signal.SIGSTOP)
            held[name].close()
            while here.entry(name) is None:
                assert os.waitpid(works, os.WNOHANG) == (0, 0), str(log)
            os.kill(stands, signal.SIGCONT)
    assert [ended(pid) for pid in both] == [0, 0], str(log)
    assert files(here.folder) == files(alone)
    makers = [here.entry(name)["made"]["worker"].rpartition("-")[2] for name in here.names()]
    assert makers[:2] == [str(pid) for pid in both] and set(makers) == set(makers[:2])


@pytest.mark.slow
@forked.apart
def test_twelve_kills_change_nothing(tmp_path, backbone, alone):
    words, log, r = words_of(tmp_path, backbone), torture.Log(), random.Random(5)
    folder, kills, refused, number = tmp_path / "run" / "cache", 0, 0, 0
    alive: dict[int, str] = {}
    while kills < 12:
        while len(alive) < 2:
            disk = f"disk:{r.choice([0, 300, SEQUENCE, 2 * SEQUENCE])}"
            manner = disk if number % 3 == 2 else f"call:{r.randrange(1, 25)}:{r.choice(['before', 'after'])}"
            number += 1
            alive[torture.start(manner, words, log)] = manner
        pid, status = os.wait()
        manner, code = alive.pop(pid), os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL) or (code == 2 and manner.startswith("disk")), (manner, str(log)[-3000:])
        kills, refused = kills + (code < 0), refused + (code == 2)
        if code == 0:  # all was done before all were killed: lose some of it
            for path in folder.glob("shard-*"):
                if r.random() < 0.5:
                    path.unlink()
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended(torture.start("none", words, log)) == 0, str(log)[-3000:]
    assert refused and "File too large" in str(log), "the full disk was met"
    assert files(folder) == files(alone)
    left = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".json")]
    assert not left, "neither claims nor temporary files are left"


@forked.apart
def test_a_disk_that_fills_on_the_way(tmp_path, backbone, alone):
    words, log = words_of(tmp_path, backbone), torture.Log()
    assert ended(torture.start(f"disk:{SEQUENCE}", words, log)) == 2
    assert "cannot write" in str(log) and "File too large" in str(log) and "Traceback" not in str(log)
    assert not list((tmp_path / "run" / "cache").glob("shard-*"))
    assert ended(torture.start("none", words, log)) == 0, str(log)
    assert files(tmp_path / "run" / "cache") == files(alone)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, backbone, monkeypatch, capsys):
    run, usage = cached(tmp_path, backbone), shutil.disk_usage
    tokens = int(packed(run).lengths_S.sum())
    need = tokens * 3 * 32 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=need - 1))
    with pytest.raises(UserError) as caught:
        cache.run(run)
    for part in (f"{tokens} tokens x 384 bytes", "are free", "exit_layers", "num_prompts", "teacher=online"):
        assert part in str(caught.value)
    assert not (run / "cache").exists() and not (run / "stages" / "cache.json").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=need))
    cache.run(run)
    assert f"{tokens} tokens x 384 bytes" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    check_room(run / "cache", json.loads((run / "cache" / "manifest.json").read_text()))  # what is there counts


# ---- what changes, and what is wrong with it


@pytest.mark.parametrize("word", ["distill.learning_rate=1e-3", "distill.learn_from=all", "seed=3"])
def test_what_the_teacher_does_not_see_leaves_it_done(tmp_path, run, backbone, word, capsys):
    other = cached(tmp_path, backbone, word)
    cache.run(other)
    assert "cache: done already" in capsys.readouterr().out
    distill.run(other)


@pytest.mark.parametrize("word", ["distill.sequence_length=40", "distill.held_out=0.4", "backbone.dtype=bfloat16"])
def test_what_the_teacher_sees_is_noticed(tmp_path, run, backbone, word):
    key = word.partition("=")[0]
    other = cached(tmp_path, backbone, word)
    with pytest.raises(UserError, match=rf"{key} was .*--redo cache"):
        cache.run(other)
    with pytest.raises(UserError, match=r"(backbone\.dtype|packed responses) was .*cache --redo cache"):
        distill.run(other)
    assert not (run / "stages" / "distill.json").exists()


def test_other_responses_are_noticed(tmp_path, run, backbone):
    shutil.rmtree(run / "responses")
    write_responses(run / "responses", backbone, count=20)
    with pytest.raises(UserError, match=r"responses/manifest\.json was .*--redo cache"):
        cache.run(run)
    with pytest.raises(UserError, match=r"sha256 of the packed responses was .*cache --redo cache"):
        distill.run(run)


def test_another_cache_under_finished_heads_is_noticed(tmp_path, backbone):
    run = trained(tmp_path, backbone)
    tensors = load_file(run / "cache" / "shard-00000.safetensors")
    here = TeacherCache(run / "cache")
    here.forget("shard-00000.safetensors")  # and made again where sums are rounded in another way
    here.put("shard-00000.safetensors", {name: t + 1e-6 for name, t in tensors.items()}, {}, here.of())
    cache.run(run)
    with pytest.raises(UserError, match=r"cache/manifest\.json was .*--redo distill"):
        distill.run(run)


def test_more_exit_layers_than_are_kept(tmp_path, run, backbone):
    other = cached(tmp_path, backbone, "distill.exit_layers=[1,3]")
    for stage in (cache, distill):
        with pytest.raises(UserError, match=r"exit_layers=\[1, 3\].*holds the exit layers \[1, 2\], not \[3\].*--redo"):
            stage.run(other)


def test_responses_of_another_backbone(tmp_path, backbone):
    run = cached(tmp_path, backbone)
    manifest = json.loads((run / "responses" / "manifest.json").read_text())
    manifest["backbone"]["fingerprint"] = "0" * 64
    (run / "responses" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint"):
        cache.run(run)
    assert not (run / "cache").exists()


def test_a_cache_that_is_not_there_or_not_complete(tmp_path, run, backbone):
    (run / "cache" / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="not complete: run `exit-heads cache`"):
        distill.run(run)
    with pytest.raises(UserError, match=r"cache/manifest\.json is missing: run the stage"):
        distill.run(cached(tmp_path / "none", backbone))
    cache.run(run)
    distill.run(run)


def change_a_byte(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)


def test_a_changed_byte_is_found_before_training(tmp_path, run, alone):
    path = run / "cache" / "shard-00001.safetensors"
    change_a_byte(path)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: damaged \(1 shards in all\)"):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists() and not (run / "metrics.jsonl").exists()
    path.unlink()
    cache.run(run)  # as the message says
    assert files(run / "cache") == files(alone)


def test_a_changed_byte_is_found_before_the_manifest_is_complete(run, alone):
    manifest = run / "cache" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False, "shards": []}))
    (run / "stages" / "cache.json").unlink()
    change_a_byte(run / "cache" / "shard-00002.safetensors")
    cache.run(run)
    assert files(run / "cache") == files(alone)


def test_a_shard_of_another_cache_is_not_taken(tmp_path, run, backbone, alone):
    other = cached(tmp_path / "other", backbone, "distill.exit_layers=[2]")
    cache.run(other)
    name = "shard-00000.safetensors"
    TeacherCache(run / "cache").forget(name)
    shutil.copy(other / "cache" / name, run / "cache" / name)  # of a process that was at work before a --redo
    cache.run(run)
    assert files(run / "cache") == files(alone)


def test_who_is_at_work_while_the_cache_is_begun_anew_puts_nothing(tmp_path, backbone, monkeypatch):
    run, other = cached(tmp_path, backbone), cached(tmp_path, backbone, "distill.exit_layers=[2]")
    plain, shards = cache.TeacherWorker.shard, {}

    def shard(self, *args):
        monkeypatch.setattr(cache.TeacherWorker, "shard", plain)
        tensors = plain(self, *args)
        with pytest.raises(UserError, match="another process is at stage cache"):
            other.redo("cache")
        # As on another machine that had heard nothing of this process for too long.
        monkeypatch.setattr(other.presence, "alone", lambda *_: nullcontext())
        other.redo("cache")
        cache.run(other)
        shards.update(files(other / "cache"))
        return tensors

    monkeypatch.setattr(cache.TeacherWorker, "shard", shard)
    with pytest.raises(UserError, match="another process has restarted this cache"):
        cache.run(run)
    assert shards and files(run / "cache") == shards
