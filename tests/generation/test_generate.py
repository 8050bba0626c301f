"""generate: batches are answered as the model itself answers, and a run that was killed loses and doubles nothing."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import torch
from helpers import plant_heads, tiny_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone, Config, load
from pipeline.errors import UserError
from pipeline.generation.answerers.continuous import Continuous
from pipeline.generation.answerers.interface import Question, Sampling
from pipeline.generation.answerers.padded import Padded, sample
from pipeline.generation.responses import Responses
from pipeline.generation.shard_answers import shard_seed
from pipeline.inference.families import FAMILIES
from pipeline.inference.fingerprint import fingerprint
from pipeline.runs.folder import RunDir
from pipeline.stages import generate

END = 256
ENDS = [END, *range(10)]
ANSWERERS = {"padded": Padded, "continuous": Continuous}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Its `generation_config.json` names a second end token, so that a good part of the answers ends early."""
    folder = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    _end_early(folder)
    return folder


def _end_early(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _answers(answerer, prompts: list[list[int]], temperatures: list[float], sampling: Sampling) -> list[list[int]]:
    questions = [Question(ids, [], t) for ids, t in zip(prompts, temperatures, strict=True)]
    return [answer.ids for answer in answerer.answer(questions, sampling)]


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(256) for _ in range(r.randrange(2, 30))] for _ in range(count)]


def _alone(model, ids: list[int], max_new_tokens: int) -> list[int]:
    one = torch.tensor([ids])
    out = model.generate(
        one, attention_mask=torch.ones_like(one), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ANSWERERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_each_prompt_alone(tmp_path, family, name):
    folder = tiny_backbone(tmp_path, family, **({"sliding_window": 8} if family == "mistral" else {}))
    _end_early(folder)
    model, prompts = _load(folder), _prompts(9)
    expected = [_alone(model, p, 20) for p in prompts]
    assert len({len(e) for e in expected}) > 2, "rows should leave their batch at different times"
    assert _answers(ANSWERERS[name](model, ENDS), prompts, [0.0] * 9, Sampling(20, 1.0, 4, seed=1)) == expected


@pytest.mark.parametrize("name", ANSWERERS)
def test_a_call_is_a_pure_function_of_its_arguments(backbone, name):
    model, prompts = _load(backbone), _prompts(10)
    temperatures = [0.0, 1.0, 0.7, 0.0, 1.0] * 2
    answers = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(answers))  # what ran before must not matter
        before = torch.get_rng_state()
        answers.append(_answers(ANSWERERS[name](model, ENDS), prompts, temperatures, Sampling(16, 0.9, 4, seed)))
        assert torch.equal(before, torch.get_rng_state())
    assert answers[0] == answers[1]
    greedy = [i for i, t in enumerate(temperatures) if t == 0]
    assert (
        [answers[0][i] for i in greedy]
        == [answers[2][i] for i in greedy]
        == [_alone(model, prompts[i], 16) for i in greedy]
    )
    assert answers[0] != answers[2]


def test_samples_follow_the_nucleus_of_the_softmax():
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    p = (logits[0] / 0.7).softmax(-1)
    nucleus = torch.tensor([True, True, True, False, False])  # 0.54 + 0.27 < 0.9 <= + 0.13
    for top_p, expected in ((1.0, p), (0.9, p * nucleus / (p * nucleus).sum())):
        drawn = sample(logits, torch.full((20_000,), 0.7), top_p, generator)
        found = torch.bincount(drawn, minlength=5) / 20_000
        assert torch.allclose(found, expected, atol=0.012)
        assert found[expected == 0].sum() == 0
    assert sample(logits, torch.zeros(20_000), 0.9, generator).eq(0).all()


# ---- the stage


def _config(tmp_path: Path, backbone: Path, *words: str) -> Config:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        r = random.Random(1)
        rows = [{"prompt": f"{i} " + "ab c"[: r.randrange(1, 4)] * r.randrange(1, 8)} for i in range(70)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(None, _words(tmp_path, backbone, *words))


def _words(tmp_path: Path, backbone: Path, *words: str) -> list[str]:
    return [
        f"run.dir={tmp_path}/runs",
        f"backbone.name_or_path={backbone}",
        "backbone.dtype=float32",
        f"prompts.path={tmp_path}/prompts.jsonl",
        "generate.num_prompts=60",
        "generate.max_new_tokens=20",
        "generate.shard_size=16",
        "generate.batch_size=6",
        *words,
    ]


def _run(config: Config) -> RunDir:
    run = RunDir(config)
    generate.run(run)
    return run


def _rows(run: RunDir) -> list[dict]:
    folder = run / "responses"
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [row for shard in shards for row in pq.read_table(folder / shard["file"]).to_pylist()]


def test_what_is_written(tmp_path, backbone):
    run = _run(_config(tmp_path, backbone, "generate.temperatures=[0.0,0.7,1.0]"))
    manifest = json.loads((run / "responses" / "manifest.json").read_text())
    files = sorted(p.name for p in (run / "responses").iterdir())
    assert files == ["claims", "entries", "manifest.json", "prompts.parquet"] + [
        f"shard-0000{i}.parquet" for i in range(4)
    ]
    assert manifest["schema"] == 2 and manifest["complete"]
    assert manifest["prompts"]["name"] == "prompts.jsonl" and str(tmp_path) not in json.dumps(manifest["prompts"])
    assert manifest["backbone"]["name"] == "tiny-llama" and manifest["backbone"]["model_type"] == "llama"
    for shard in manifest["shards"]:
        assert pq.read_metadata(run / "responses" / shard["file"]).num_rows == shard["rows"]
    rows = _rows(run)
    counts = manifest["responses"]
    assert len(rows) == counts["rows"] == 60 - counts["empty"]
    assert counts["stop"] + counts["length"] == len(rows) and counts["stop"] > 5 and counts["length"] > 5
    assert {r["temperature"] for r in rows} == {0.0, 0.7, 1.0}
    assert {r["seed"] for r in rows} == {shard_seed(0, i) for i in range(4)}
    ends = {END, *range(10)}
    for row in rows:
        assert not set(row["response_ids"][:-1]) & ends, "nothing follows the end token: no padding"
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in ends else "length")
        assert row["finish_reason"] == "stop" or len(row["response_ids"]) == 20
        assert row["response_ids"] and row["response_ids"][0] not in ends, "an empty answer teaches nothing"
    model = _load(backbone)
    for row in [r for r in rows if r["temperature"] == 0][:5]:
        assert row["response_ids"] == _alone(model, row["prompt_ids"], 20)
    record = json.loads((run / "run.json").read_text())[-1]
    assert record["rows"] == len(rows) and record["tokens"] == counts["tokens"] and record["tokens_per_second"] > 0


def test_a_second_run_does_nothing(tmp_path, backbone, capsys):
    config = _config(tmp_path, backbone)
    run = _run(config)
    before = {p: p.stat().st_mtime_ns for p in (run / "responses").iterdir()}
    _run(config)
    assert "generate: done already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (run / "responses").iterdir()}
    (tmp_path / "prompts.jsonl").unlink()  # the responses may have been moved to where the prompts are not
    _run(config)


def test_a_killed_run_goes_on_to_the_same_responses(tmp_path, backbone):
    _config(tmp_path, backbone)
    many = ("generate.max_new_tokens=120", "generate.shard_size=5", "generate.temperatures=[1.0,0.0]")
    words = _words(tmp_path, backbone, "run.name=killed", *many)
    said = tmp_path / "said"
    command = [sys.executable, "-m", "pipeline", "generate", *words]
    process = forked.Popen(command, env=os.environ, stdout=said, stderr=said)
    folder = tmp_path / "runs" / "killed" / "responses"
    deadline = time.time() + 240
    while len(entries := sorted(folder.glob("entries/shard-*.json"))) < 2:
        assert process.poll() is None and time.time() < deadline, said.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    assert len(list(folder.glob("shard-*.parquet"))) < 12
    kept, lost = (folder / f"{path.stem}.parquet" for path in entries[:2])
    lost.write_bytes(b"half a shard")  # and the disk lost one
    (folder / ".tmp-shard-00002.parquet@elsewhere-1").write_bytes(b"killed while writing")
    os.utime(folder / ".tmp-shard-00002.parquet@elsewhere-1", (0, 0))

    config = load(None, words)
    inode = kept.stat().st_ino
    with pytest.raises(UserError, match=r"seed was 0, is 1"):
        _run(load(None, [*words, "seed=1"]))
    killed = _rows(_run(config))
    assert kept.stat().st_ino == inode, "a whole shard is kept, not made again"
    undisturbed = _rows(_run(load(None, [*words, "run.name=undisturbed"])))
    assert killed == undisturbed
    assert len({r["id"] for r in killed}) == len(killed)
    assert not list(folder.rglob(".*")) and not list(folder.glob("claims/*"))


def test_a_lost_shard_of_a_finished_run_is_made_again(tmp_path, backbone, capsys):
    run = _run(_config(tmp_path, backbone))
    before = (run / "responses" / "manifest.json").read_bytes()
    rows = _rows(run)
    (run / "responses" / "shard-00001.parquet").unlink()
    _run(run.config)
    assert _rows(run) == rows and (run / "responses" / "manifest.json").read_bytes() == before
    capsys.readouterr()
    _run(run.config)
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_fingerprint_needs_no_loaded_model(tmp_path, tied, shard):
    folder = tiny_backbone(tmp_path, tie_word_embeddings=tied)
    model = _load(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert fingerprint_of_files(Backbone(name_or_path=str(folder))) == fingerprint(model)


def test_another_kind_of_machine_is_told(tmp_path, backbone, capsys):
    run = _run(_config(tmp_path, backbone))
    path = run / "responses" / "entries" / "shard-00000.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"made": entry["made"] | {"threads": 99}}))
    (run / "responses" / "shard-00001.parquet").unlink()
    _run(run.config)
    assert "shards were made with threads 99, here " in capsys.readouterr().out


def test_two_processes_share_the_work(tmp_path, backbone):
    _config(tmp_path, backbone)
    words = _words(tmp_path, backbone, "run.name=t", "generate.max_new_tokens=60", "generate.shard_size=4")
    command = [sys.executable, "-m", "pipeline", "generate", *words]
    claims = Responses(tmp_path / "runs" / "t" / "responses").claims
    with contextlib.ExitStack() as held:  # until both have seen that there is nothing for them: so that both get some
        for i in range(15):
            held.enter_context(claims.hold(f"shard-{i:05d}.parquet"))
        said = {forked.Popen(command, env=os.environ, stdout=file, stderr=file): file
                for file in (tmp_path / "one", tmp_path / "two")}  # fmt: skip
        for process, file in said.items():
            while not (file.exists() and "waiting for other processes" in file.read_text()):
                assert process.poll() is None, file.read_text()
                time.sleep(0.1)
    for process, file in said.items():
        assert process.wait(240) == 0 and " responses (" in file.read_text(), file.read_text()
    folder = tmp_path / "runs" / "t" / "responses"
    entries = [json.loads(p.read_text()) for p in folder.glob("entries/*.json")]
    assert len(entries) == 15 and sum(e["counts"]["prompts"] for e in entries) == 60
    assert len({e["made"]["worker"] for e in entries}) == 2, "each of them made some"
    record = json.loads((tmp_path / "runs" / "t" / "run.json").read_text())
    assert [r["stage"] for r in record] == ["generate", "generate"]
    assert _rows(RunDir(load(None, words))) == _rows(_run(load(None, [*words, "run.name=alone"])))


def test_every_turn_is_answered_behind_the_answers_before(tmp_path):
    folder = tiny_backbone(tmp_path, max_position_embeddings=200)
    _end_early(folder)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"turns": [f"turn {i}", "second", "third"][: 1 + i % 3]}) + "\n" for i in range(30))
    )
    words = (f"backbone.name_or_path={folder}", "prompts.held_out=0.0", "generate.num_prompts=0")
    run = _run(load(None, [*_words(tmp_path, folder), *words]))
    counts = json.loads((run / "responses" / "manifest.json").read_text())["responses"]
    assert counts["prompts"] == 30 and counts["turns"] == 60
    assert counts["rows"] + counts["empty"] + counts["unanswered"] == 60 and counts["unanswered"] > 0
    rows = {row["id"]: row for row in _rows(run)}
    order = [id.partition(".")[0] for id in rows]
    assert order == sorted(order, key=order.index), "turns of a conversation lie together"
    model, later = _load(folder), [row for id, row in rows.items() if "." in id]
    assert len(later) > 5
    decode = AutoTokenizer.from_pretrained(folder).decode
    for row in later:
        id, _, turn = row["id"].partition(".")
        before = rows[id if turn == "2" else f"{id}.{int(turn) - 1}"]
        said = decode(before["response_ids"], skip_special_tokens=True).strip()
        assert decode(row["prompt_ids"]) == f"{decode(before['prompt_ids'])}\n\n{said}\n\n{row['prompt']}"
        assert row["temperature"] == before["temperature"] and row["seed"] != before["seed"]
        if row["temperature"] == 0:
            assert row["response_ids"] == _alone(model, row["prompt_ids"], 20)


def test_speculative_answers_are_the_backbones_own(tmp_path, backbone):
    greedy = ("generate.temperatures=[0.0]", "generate.num_prompts=12", "generate.shard_size=6")
    expected = _rows(_run(_config(tmp_path, backbone, "run.name=padded", *greedy)))
    plant_heads(RunDir(_config(tmp_path, backbone, "run.name=heads")), 2)
    head = tmp_path / "runs" / "heads" / "heads" / "exit-2"
    speculative = ("generate.engine=speculative", f"generate.exit_head={head}", *greedy)
    run = _run(_config(tmp_path, backbone, "run.name=speculative", *speculative))
    assert _rows(run) == expected
    manifest = (run / "responses" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and json.loads(manifest)["sampling"]["head_sha256"]
    hot = [w.replace("[0.0]", "[1.0]") for w in speculative]
    first, again = (_rows(_run(_config(tmp_path, backbone, f"run.name={n}", *hot))) for n in "ab")
    assert first == again != expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"generate\.exit_head=null: generate\.engine=speculative"),
        (["generate.exit_head=nowhere"], r"generate\.exit_head=nowhere: no exit head here"),
        (["generate.exit_head=HEAD", "generate.controller=thompson"], r"generate\.controller=thompson: it learns"),
        (["generate.exit_head=HEAD", "generate.controller=fixed:2+lookup"], r"controller=fixed:2\+lookup: it learns"),
        (["generate.exit_head=HEAD", "generate.controller=fixed"], r"generate\.controller=fixed: must be"),
        (["generate.exit_head=HEAD", "generate.controller=table:2=1"], r"generate\.controller=table:2=1: .* from 1"),
    ],
)
def test_what_speculative_needs(tmp_path, backbone, words, message):
    _config(tmp_path, backbone)
    head = tmp_path / "runs" / "heads" / "heads" / "exit-2"
    if any("HEAD" in w for w in words):
        plant_heads(RunDir(_config(tmp_path, backbone, "run.name=heads")), 2)
    words = ["generate.engine=speculative", *(w.replace("HEAD", str(head)) for w in words)]
    with pytest.raises(UserError, match=message):
        _run(_config(tmp_path, backbone, *words))
    assert not (tmp_path / "runs" / "t" / "stages" / "generate.json").exists(), "a typing error needs no --redo"


def test_original_answers_are_the_files(tmp_path, backbone):
    rows = [{"instruction": f"do {i}", "output": "o" * (i + 1)} for i in range(30)]
    (tmp_path / "originals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate.engine=original", f"prompts.path={tmp_path / 'originals.jsonl'}", "prompts.held_out=0.0")
    found = {r["prompt"]: r for r in _rows(_run(_config(tmp_path, backbone, *words)))}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    assert len(found) == 30
    for i in range(30):
        row = found[f"do {i}"]
        assert tokenizer.decode(row["response_ids"]) == ("o" * (i + 1) + "<|endoftext|>" if i < 19 else "o" * 20)
        assert row["finish_reason"] == ("stop" if i < 19 else "length")


def test_other_prompts_or_weights_under_the_same_name_are_noticed(tmp_path, backbone):
    folder = tiny_backbone(tmp_path)
    config = _config(tmp_path, folder)
    run = _run(config)
    prompts = tmp_path / "prompts.jsonl"
    original = prompts.read_text()
    prompts.write_text(original + '{"prompt": "one more"}\n')
    with pytest.raises(UserError, match=r"prompts\.path=.*changed.*--redo generate"):
        _run(config)
    prompts.write_text(original)
    mark = run / "stages" / "generate.json"  # as a kill leaves it
    mark.write_text(mark.read_text().replace('"done"', '"begun"'))
    tiny_backbone(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"backbone\.name_or_path=.*weights have changed.*--redo generate"):
        _run(config)
    run.redo("generate")
    _run(config)


def test_made_anew_the_manifest_is_the_same(tmp_path, backbone):
    """So what was distilled from equal responses stays done."""
    config = _config(tmp_path, backbone, "generate.num_prompts=20")
    manifest = _run(config) / "responses" / "manifest.json"
    before = manifest.read_bytes()
    RunDir(config).redo("generate")
    _run(config)
    assert manifest.read_bytes() == before


def test_answerers_write_the_same_greedy_responses(tmp_path, backbone):
    greedy = ("generate.temperatures=[0.0]", "generate.num_prompts=20")
    padded = _rows(_run(_config(tmp_path, backbone, "run.name=padded", *greedy)))
    continuous = _rows(_run(_config(tmp_path, backbone, "run.name=cb", "generate.engine=continuous", *greedy)))
    assert padded == continuous


def test_prompts_without_room(tmp_path, backbone, capsys):
    _config(tmp_path, backbone)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 240}) + "\n")
    wanted = ("generate.num_prompts=0", "prompts.held_out=0.0")
    with pytest.raises(UserError, match=r"240 tokens.*context of 256.*prompts\.too_long=drop"):
        _run(_config(tmp_path, backbone, *wanted))
    run = _run(_config(tmp_path, backbone, "prompts.too_long=drop", *wanted))
    assert "1 of 71 prompts dropped" in capsys.readouterr().out
    assert len(_rows(run)) + json.loads((run / "responses" / "manifest.json").read_text())["responses"]["empty"] == 70


def test_a_backbone_that_says_nothing_is_an_error(tmp_path):
    folder = tiny_backbone(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(258))}))
    with pytest.raises(UserError, match="end token alone"):
        _run(_config(tmp_path, folder))
