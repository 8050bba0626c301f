"""Prompt sets: every kind of source, no leak between the roles, lengths, and one clear message per mistake."""

import hashlib
import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import byte_tokenizer

from pipeline.config import Config, EvaluatePrompts, Prompts, Source
from pipeline.errors import UserError
from pipeline.pocket.paths import PROMPTS
from pipeline.prompts.ids import encode
from pipeline.prompts.prompt import SPEC_BENCH, count_tasks
from pipeline.prompts.records import source_record
from pipeline.prompts.sets import evaluation_prompts, load_prompts

TEXTS = [f"prompt number {i}" for i in range(200)]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def settings(path, **changes) -> Prompts:
    return Prompts(path=str(path), **changes)


def texts_of(prompts) -> list[str]:
    return [p.text for p in prompts]


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    rows = [{"question": t, "task": "count"} for t in TEXTS]
    write(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.txt").write_text("\n".join(TEXTS) + "\n\n")
    found = {s: load_prompts(settings(tmp_path / f"p.{s}"), "distill") for s in ("jsonl", "json", "parquet", "txt")}
    assert found["jsonl"] == found["json"] == found["parquet"]
    assert texts_of(found["txt"]) == texts_of(found["jsonl"])
    assert {p.task for p in found["jsonl"]} == {"count"} and {p.task for p in found["txt"]} == {""}


def test_a_dataset_is_read_at_its_revision(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        made = datasets.Dataset.from_list([{"instruction": t} for t in TEXTS])
        made.info.license = "cc-by-4.0"
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen = Prompts(path="someone/questions", revision="abc123", split="test")
    found = load_prompts(chosen, "distill")
    assert asked[0] == (("someone/questions",), {"revision": "abc123", "split": "test"})
    assert set(texts_of(found)) < set(TEXTS)
    record = source_record(chosen)
    assert record == {
        "name": "someone/questions",
        "revision": "abc123",
        "split": "test",
        "licence": "cc-by-4.0",
        "rows": 200,
        "bad_rows": 0,
    }
    assert source_record(replace(chosen, licence="mine"))["licence"] == "mine"
    assert {p.source for p in found} == {"someone/questions"}
    with pytest.raises(UserError, match=r"prompts.revision=null: pin a commit"):
        load_prompts(replace(chosen, revision=None), "distill")
    load_prompts(replace(chosen, name="main"), "distill")
    assert asked[-1] == (("someone/questions",), {"name": "main", "revision": "abc123", "split": "test"})
    assert source_record(replace(chosen, name="main"))["config"] == "main"


def test_a_set_of_several_configurations_needs_a_name(tmp_path, monkeypatch):
    """datasets itself reads it, from a folder laid out as such a set on the Hub."""
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write(tmp_path / "set" / name / "train.jsonl", [{"question": f"{name} {i}"} for i in range(20)])
    front = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("main", "other"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    real, cache = datasets.load_dataset, str(tmp_path / "cache")

    def load_dataset(path, **how):
        return real(str(tmp_path / "set"), **how | {"revision": None, "cache_dir": cache})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for section in (Prompts, EvaluatePrompts):
        key = "prompts" if section is Prompts else "evaluate.prompts"
        chosen = section(path="org/set", revision="abc123", held_out=0.0)
        with pytest.raises(UserError) as caught:
            load_prompts(chosen, "distill")
        said = str(caught.value)
        assert said.startswith(f"{key}.name=null: ") and "'main', 'other'" in said, "the names stand on a later line"
        with pytest.raises(UserError, match=rf"^{key}\.name=third: .*main.*other"):
            load_prompts(replace(chosen, name="third"), "distill")
        found = load_prompts(replace(chosen, name="other"), "distill")
        assert sorted(texts_of(found)) == sorted(f"other {i}" for i in range(20))
    both = Prompts(held_out=0.0, mixture=[
        Source(path="org/set", name=n, revision="abc123") for n in ("main", "other")
    ])  # fmt: skip
    assert len(load_prompts(both, "distill")) == 40
    config = Config(prompts=Prompts(path="org/set", name="main", revision="abc123", held_out=0.0))
    config.evaluate.prompts = EvaluatePrompts(path="org/set", name="other", revision="abc123")
    assert {t.split()[0] for t in texts_of(evaluation_prompts(config))} == {"other"}, "another set, no leak"


def test_no_prompt_leaks_and_duplicates_drop_out(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in TEXTS + TEXTS[:50]])
    distill, evaluate = (load_prompts(settings(path), role) for role in ("distill", "evaluate"))
    assert not set(distill) & set(evaluate)
    assert sorted(texts_of(distill + evaluate)) == sorted(TEXTS)
    assert 8 <= len(evaluate) <= 35  # 10 % of 200
    grown = write(tmp_path / "grown.jsonl", [{"prompt": t} for t in [*TEXTS, "one more", "and another"]])
    moved = set(load_prompts(settings(grown), "distill")) & set(evaluate)
    assert not moved, "a prompt that was held out must stay so when the file grows"


def test_ids_of_single_texts_are_what_they_always_were_and_turns_are_one_prompt(tmp_path):
    """Ids of old runs must stay: the id of one turn is that of its text, alone or in a list."""
    rows = [{"prompt": "alone"}, {"turns": ["alone"]}, {"turns": ["alone", "more"]}, {"turns": ["alone", "other"]}]
    config = Config()
    config.evaluate.prompts = EvaluatePrompts(path=write(tmp_path / "p.jsonl", rows))
    found = evaluation_prompts(config)
    assert [p.turns for p in found] == [("alone",), ("alone", "more"), ("alone", "other")]
    assert found[0].id == hashlib.sha256(b"alone").hexdigest()[:16] and len({p.id for p in found}) == 3
    assert texts_of(found) == ["alone"] * 3


def test_prompts_of_one_first_turn_go_to_one_side(tmp_path):
    """generate answers first turns: what it answers must not be measured in another conversation."""
    rows = [{"turns": [t, f"and then {i}"]} for t in TEXTS[:60] for i in range(3)]
    path = write(tmp_path / "p.jsonl", rows)
    distill, evaluate = (load_prompts(settings(path), role) for role in ("distill", "evaluate"))
    assert len(distill) + len(evaluate) == 180 and not set(texts_of(distill)) & set(texts_of(evaluate))
    assert distill == load_prompts(settings(write(tmp_path / "b.jsonl", rows[::-1])), "distill")


def test_spec_bench_is_read_as_it_is(tmp_path):
    categories = ["rag", "writing", "humanities", "qa", "math_reasoning", "math", "summarization", "translation"]
    rows = [
        {"question_id": 81 + i, "category": c, "turns": [f"do {c}", "again"][: 1 + (c == "math")], "reference": ["x"]}
        for i, c in enumerate(categories)
    ]
    config = Config()
    config.evaluate.prompts = EvaluatePrompts(path=write(tmp_path / "question.jsonl", rows))
    found = evaluation_prompts(config)
    tasks = ["rag", "mt_bench", "mt_bench", "qa", "math_reasoning", "mt_bench", "summarization", "translation"]
    assert [p.task for p in found] == tasks and found[5].turns == ("do math", "again")
    counts = count_tasks(found)
    assert list(counts) == list(SPEC_BENCH) and counts["mt_bench"] == 3 and counts["rag"] == 1


def test_a_category_is_the_task_where_no_task_is_given(tmp_path):
    rows = [
        {"prompt": "a", "category": "writing"},
        {"prompt": "b", "category": "writing", "task": "mine"},
        {"turns": ["c"], "category": "writing"},
    ]
    config = Config()
    config.evaluate.prompts = EvaluatePrompts(path=write(tmp_path / "p.jsonl", rows))
    found = evaluation_prompts(config)
    assert [p.task for p in found] == ["writing", "mine", "writing"]
    assert count_tasks(found[1:]) == {"mine": 1, "writing": 1}


def test_blank_texts_are_skipped_and_counted(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": " "}, {"prompt": None}])
    assert texts_of(load_prompts(settings(path, held_out=0.0), "distill")) == ["a"]
    assert "2 of 3 rows have an empty prompt and are skipped" in capsys.readouterr().out


def test_order_is_random_by_seed_and_the_same_every_time(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in TEXTS])
    backwards = write(tmp_path / "b.jsonl", [{"prompt": t} for t in reversed(TEXTS)])
    first = texts_of(load_prompts(settings(path), "distill"))
    assert first == texts_of(load_prompts(settings(backwards), "distill"))
    assert first != texts_of(load_prompts(settings(path), "distill", seed=1))
    assert first != [t for t in TEXTS if t in first]


def test_evaluation_prompts_are_the_held_out_share_or_a_set_of_their_own(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in TEXTS])
    config = Config(prompts=settings(path))
    assert evaluation_prompts(config) == load_prompts(config.prompts, "evaluate")
    own = write(tmp_path / "own.jsonl", [{"prompt": f"own {i}"} for i in range(5)])
    config.evaluate.prompts = EvaluatePrompts(path=own)
    assert texts_of(evaluation_prompts(config)) == [f"own {i}" for i in range(5)]
    config.evaluate.prompts = EvaluatePrompts(path=path)
    with pytest.raises(UserError, match=r"evaluate\.prompts\.path=.*the heads have learnt from it"):
        evaluation_prompts(config)


def test_source_record_names_no_folder(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": t} for t in TEXTS])
    record = source_record(settings(path))
    assert record["name"] == "mine.jsonl" and record["rows"] == 200 and len(record["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(record)
    write(tmp_path / "mine.jsonl", [{"prompt": t} for t in TEXTS[1:]])
    assert source_record(settings(path))["sha256"] != record["sha256"]


def test_pocket_roles_have_files_of_their_own():
    config = Config()
    distill, evaluate = load_prompts(config.prompts, "distill"), evaluation_prompts(config)
    assert not {p.id for p in distill} & {p.id for p in evaluate}
    assert source_record(config.prompts)["licence"] == "PSF-2.0"
    assert source_record(config.prompts, "evaluate")["rows"] == len(evaluate)
    first = [json.loads(line)["prompt"] for line in PROMPTS["evaluate"].read_text().splitlines()[:24]]
    assert texts_of(evaluate)[:24] == first


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', {}, r"prompts\.path=.*p\.jsonl: line 3: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', {}, r"line 2: an object"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": ]', {}, r"line 2: not JSON"),
        ("p.jsonl", "", {}, r"prompts\.path=.*holds no prompts"),
        ("p.txt", "\n \n", {}, r"holds no prompts"),
        ("p.jsonl", '{"prompt": " "}\n', {}, r"every prompt is empty"),
        ("p.jsonl", '{"query": "a", "id": 1}\n', {}, r"prompts\.column=null: .*these are there: query, id"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n',
            {"column": "topic"},
            r"prompts\.column=topic: .*these are there: prompt",
        ),
        ("p.jsonl", '{"prompt": {"role": "user"}}\n', {}, r"line 1: column prompt holds a dict; a text or a list"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', {}, r"line 2: column prompt holds a int; a text or a list"),
        ("p.jsonl", '{"instruction": "a", "input": 3}\n', {}, r"line 1: column input holds a int; a text is needed"),
        ("p.jsonl", '{"prompt": "half a pair: \\ud800"}\n', {}, r"line 1: .*surrogates not allowed"),
        ("p.json", "[]", {}, r"holds no prompts"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"query": "b"}\n{"id": 1}\n',
            {},
            r"prompts\.path=.*: line 3: no prompt; line 4: no prompt: 2 of 3 rows cannot be used\. Mend them or "
            r"take them out, or set prompts\.bad_rows=skip",
        ),
        ("p.json", '[{"turns": ["a"]}, {"task": "b"}]', {}, r"row 2: no prompt: 1 of 2 rows cannot be used"),
        ("p.jsonl", '{"turns": ["a"]}\n{"turns": "b"}\n', {}, r"line 2: turns must be a list of texts"),
        ("p.jsonl", '{"turns": []}\n', {}, r"line 1: turns must be a list of texts, none of them empty"),
        ("p.jsonl", '{"turns": ["a", " "]}\n', {}, r"line 1: turns must be a list of texts, none of them empty"),
        ("p.jsonl", '{"turns": ["a", 3]}\n', {}, r"line 1: turns must be"),
        ("p.jsonl", '{"turns": null}\n', {}, r"every prompt is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"turns": {"a": 1}}\n', {}, r"line 2: turns must be"),
        ("p.parquet", "not parquet", {}, r"not a parquet file"),
        ("p.csv", "a,b", {}, r"unknown kind of file"),
        ("p.jsonl", '{"prompt": "a"}\n', {"held_out": 0.0}, r"none are left to evaluate"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, changes, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(settings(tmp_path / name, **changes), "evaluate")


def test_missing_sources_say_so(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, "a/b/c", "./here"):
        with pytest.raises(UserError, match=r"^prompts\.path="):
            load_prompts(settings(path), "distill")
    config = Config()
    config.evaluate.prompts.path = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.path=.*no such file"):
        evaluation_prompts(config)


def test_plain_text_keeps_the_tokenizers_own_special_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in TEXTS])
    found = load_prompts(settings(path), "distill")
    rows = encode(found, tokenizer, settings(path), 256, 16)
    assert [p for p, _ in rows] == found
    assert all(ids == tokenizer(p.text)["input_ids"] for p, ids in rows)


def test_prompts_that_leave_no_room(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "x" * 100}, {"prompt": "y" * 20}])
    for chosen, key in ((settings(path, held_out=0.0), "prompts"), (EvaluatePrompts(path=path), "evaluate.prompts")):
        found = load_prompts(chosen, "distill")
        long = next(p for p in found if p.text[0] == "x")
        with pytest.raises(UserError) as caught:
            encode(found, tokenizer, chosen, 110, 11)
        for word in (long.id, "100 tokens", "11 new", "context of 110", f" {key}.too_long=drop"):
            assert word in str(caught.value)
        kept = encode(found, tokenizer, replace(chosen, too_long="drop"), 110, 11)
        assert [p.text[0] for p, _ in kept] == ["y"]
        assert f"{key}.too_long=drop: 1 of 2 prompts dropped" in capsys.readouterr().out
        assert len(encode(found, tokenizer, chosen, 110, 10)) == 2
    with pytest.raises(UserError, match="no prompt is left"):
        encode(found, tokenizer, replace(chosen, too_long="drop"), 16, 15)
