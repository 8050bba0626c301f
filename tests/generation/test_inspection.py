"""What `exit-heads generate` tells of responses: --status, --verify, --show, and the figures of the report."""

import json
import shutil
from io import StringIO

import pyarrow.parquet as pq
import pytest
from helpers import make_run
from rich.console import Console

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.generation import inspection
from pipeline.generation.responses import COLUMNS, Responses
from pipeline.stages import generate


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path)
    generate.run(run)
    return run


def _begun(run, shards: int) -> Responses:
    """As a killed run leaves it: the first `shards` are there."""
    responses = Responses(run / "responses")
    manifest = responses.manifest()
    manifest |= {"complete": False, "shards": [], "responses": {}}
    (responses.folder / "manifest.json").write_text(json.dumps(manifest))
    for name in responses.names()[shards:]:
        responses.forget(name)
    return responses


def test_status(run, capsys):
    (line,) = inspection.status(run)
    assert "complete: 2 of 2 shards, 8 of 8 prompts, 8 responses" in line
    responses = _begun(run, 1)
    first, second = inspection.status(run)
    assert "not complete: 1 of 2 shards, 4 of 8 prompts, 4 responses" in first and "nobody is working" in second
    entry = responses.entry("shard-00000.parquet")
    tokens = entry["counts"]["tokens"]
    entry["made"]["seconds"] = 2.0
    (responses.folder / "entries" / "shard-00000.json").write_text(json.dumps(entry))
    with responses.claims.hold("shard-00001.parquet"):
        _, working, rate = inspection.status(run)
    assert "shard-00001.parquet: " in working and "for 0 s" in working and "left behind" not in working
    assert f"1 at work, {tokens / 2:.0f} tokens/s together; about 2 s left" in rate
    (responses.claims.folder / "shard-00001.parquet").write_text(
        json.dumps(responses.claims.me | {"made": 0, "born": "?"})
    )
    assert "left behind" in list(inspection.status(run))[1]


def test_verify_tells_what_is_not_as_it_was_written(run):
    assert "2 shards: every sha256 is as entered; 8 turns of 8 prompts: 8 answered" in inspection.verify(run)
    responses = Responses(run / "responses")
    path = responses.folder / "shard-00001.parquet"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[40] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"shard-00001\.parquet \(changed\).*Remove shard-00001\.parquet and run"):
        inspection.verify(run)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet \(missing\)"):
        inspection.verify(run)
    generate.run(run)  # as the message says
    assert path.read_bytes() == whole and "every sha256" in inspection.verify(run)

    other = responses.folder / "shard-00000.parquet"  # somebody wrote the same rows twice, and entered them
    rows = pq.read_table(other).to_pylist()
    counts = responses.entry(other.name)["counts"]
    responses.forget(path.name)
    responses.put(path.name, rows, counts, {})
    with pytest.raises(UserError, match=r"rows that were not asked for"):
        inspection.verify(run)
    responses.forget(path.name)
    responses.put(path.name, rows[:1], counts | {"rows": 1}, {})
    with pytest.raises(UserError, match=r"rows that were not asked for, or too few"):
        inspection.verify(run)
    (responses.folder / "prompts.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"prompts\.parquet: missing or not what was written"):
        inspection.verify(run)


def test_a_shard_that_was_placed_and_not_entered_is_looked_over(run):
    responses = Responses(run / "responses")
    name = "shard-00000.parquet"
    entry = responses.entry(name)
    (responses.folder / "entries" / "shard-00000.json").unlink()
    assert not responses.has(name) and responses.adopt(name)
    assert responses.entry(name) == entry | {"made": {}}
    responses.forget(name)
    (responses.folder / name).write_bytes(b"no parquet")
    assert not responses.adopt(name) and not (responses.folder / name).exists()
    assert not responses.adopt(name)


def test_what_is_in_place_is_never_replaced(run):
    responses = Responses(run / "responses")
    before = (responses.folder / "shard-00000.parquet").read_bytes()
    row = dict.fromkeys(COLUMNS.names) | {"id": "other", "prompt_ids": [1], "response_ids": [2]}
    responses.put("shard-00000.parquet", [row], responses.entry("shard-00000.parquet")["counts"], {})
    assert (responses.folder / "shard-00000.parquet").read_bytes() == before
    assert responses.finish(), "and the entry is of what is there"


def test_show_marks_what_is_learned(run):
    out = StringIO()
    inspection.show(run, 3, Console(file=out, width=200))
    text = out.getvalue()
    assert text.count("prompt number") == 3
    rows = pq.read_table(run / "responses" / "shard-00000.parquet").to_pylist()
    assert f"{rows[0]['prompt']}[[" in text and "8 documents" in text and "context learned" not in text
    run.config.distill.learn_from = "all"
    inspection.show(run, 1, Console(file=out, width=200))
    assert "context learned from too" in out.getvalue()


def test_figures(run):
    found = inspection.figures(run)
    assert found["rows"] == 8 and found["temperatures"] == {"0": 4, "1": 4} and found["workers"] == 1
    assert sum(found["prompt_lengths"]["counts"]) == sum(found["response_lengths"]["counts"]) == 8
    assert found["duplicates"] == 0 and found["tokens_per_second"] > 0
    (run / "responses" / "shard-00000.parquet").unlink()
    (run / "responses" / "manifest.json").unlink()
    assert inspection.figures(run) is None


def test_responses_of_an_older_version(run):
    path = run / "responses" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    assert inspection.figures(run) is None
    with pytest.raises(UserError, match=r"schema 1, this version knows schema 2.*--redo generate"):
        list(inspection.status(run))


def test_the_command_line_looks_and_writes_nothing(run, capsys):
    words = [f"run.dir={run.path.parent}", f"run.name={run.path.name}",
             f"backbone.name_or_path={run.config.backbone.name_or_path}", "distill.truncated=keep"]  # fmt: skip
    shutil.rmtree(run / "stages")  # a copy of what matters
    (run / "responses" / "claims" / "shard-00001.parquet").write_text("somebody's")

    def tree() -> dict[str, int]:
        """A file that came and went shows in the time of its folder."""
        return {str(p): p.stat().st_mtime_ns for p in (run.path.parent, *run.path.parent.rglob("*"))}

    before = tree()
    looks = {"--status": "2 of 2 shards", "--verify": "every sha256", "--show=1": "prompt number"}
    for look, expected in looks.items():
        assert main(["generate", look, *words]) == 0
        assert expected in capsys.readouterr().out
    assert main(["heads", words[0]]) == main(["run", *words, "--show-config", "seed"]) == main(["plan", *words]) == 0
    assert tree() == before
    capsys.readouterr()
    assert main(["generate", "--status", *words, "run.name=none"]) == 2
    assert "there is no run folder" in capsys.readouterr().err
