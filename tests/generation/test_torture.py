"""Twenty workers of generate are killed, at random and in the middle of renames, some with a full disk: afterwards the
dataset is, row for row and byte for byte, that of a run that nobody disturbed."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import torture
from helpers import byte_tokenizer, tiny_backbone

KILLS = 20
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def _words(tmp_path: Path, name: str) -> list[str]:
    folder = tmp_path / "tiny-llama"
    if not folder.exists():
        tiny_backbone(tmp_path, max_position_embeddings=2048)
        # several end tokens: a good part of the answers ends early
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, *range(10)]}))
        tokenizer = byte_tokenizer(2048)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        rows = [{"turns": [f"say {i}", f"and {i * i}", "more"][: 1 + i % 3]} for i in range(240)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "generate", f"run.dir={tmp_path / 'runs'}", f"run.name={name}", f"backbone.name_or_path={folder}",
        "backbone.dtype=float32", f"prompts.path={tmp_path / 'prompts.jsonl'}", "prompts.held_out=0.0",
        "prompts.chat_template=tokenizer", "machine.device=cpu", "machine.threads=1", "wandb.mode=disabled",
        "generate.num_prompts=0", "generate.max_new_tokens=24", "generate.shard_size=6", "generate.batch_size=4",
        "generate.temperatures=[0.0,1.0]",
    ]  # fmt: skip


def _manner(r: random.Random, number: int) -> str:
    kind = ("call", "call", "seconds", "disk")[number % 4]
    if kind == "call":
        return f"call:{r.randrange(1, 40)}:{r.choice(['before', 'after'])}"
    return f"seconds:{r.uniform(0, 0.5):.3f}" if kind == "seconds" else f"disk:{r.choice([0, 100, 3000, 6000])}"


def _rows(folder: Path) -> list[dict]:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [row for shard in shards for row in pq.read_table(folder / shard["file"]).to_pylist()]


@pytest.mark.slow
@forked.apart
def test_twenty_kills_change_nothing(tmp_path):
    import pipeline.stages.generate  # noqa: F401  (once, before the forks)

    words, log = _words(tmp_path, "tortured"), torture.Log()
    r = random.Random(4)
    alive: dict[int, str] = {}
    kills: Counter[str] = Counter()
    refused = number = 0
    deadline = time.time() + 500
    while kills.total() < KILLS:
        assert time.time() < deadline, str(log)[-3000:]
        while len(alive) < 3:
            manner = _manner(r, number)
            number += 1
            alive[torture.start(manner, words, log)] = manner
        pid, status = os.wait()
        manner = alive.pop(pid)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, (manner, str(log)[-3000:])
            kills[manner.partition(":")[0]] += 1
        elif os.waitstatus_to_exitcode(status) == 2:
            assert manner.startswith("disk"), (manner, str(log)[-3000:])
            refused += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0, (manner, str(log)[-3000:])
            responses = tmp_path / "runs" / "tortured" / "responses"
            for path in responses.glob("shard-*.parquet"):  # all is done before all were killed: lose some of it
                if r.random() < 0.5:
                    path.unlink()
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for name in ("tortured", "undisturbed"):
        pid = torture.start("none", _words(tmp_path, name), log)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, str(log)[-3000:]
    tortured, undisturbed = (tmp_path / "runs" / name / "responses" for name in ("tortured", "undisturbed"))
    assert refused and "File too large" in str(log), "the full disk was met"
    assert kills["call"] > 5 and kills["seconds"], "some died in the middle of giving a file its name"
    rows = _rows(tortured)
    assert rows == _rows(undisturbed)
    assert (tortured / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    counts = Counter(row["id"] for row in rows)
    assert set(counts.values()) == {1} and len({i.partition(".")[0] for i in counts}) > 200
    assert any(i.endswith(".3") for i in counts), "conversations went on"
    left = [p for p in tortured.rglob("*") if p.is_file() and p.suffix not in (".parquet", ".json")]
    assert not left, "neither claims nor temporary files are left"
