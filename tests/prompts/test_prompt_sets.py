"""Which prompts go where: mixtures by weight, near-equal prompts, no leak from evaluate into distill."""

import hashlib
import json
from collections import Counter

import pytest

from pipeline.config import Config, EvaluatePrompts, Prompts, Source
from pipeline.errors import UserError
from pipeline.prompts.prompt import count_sources, normal_form
from pipeline.prompts.records import pins, source_record
from pipeline.prompts.sets import evaluation_prompts, load_prompts, training_prompts

# sha256 of all ids in their order, as they were when pocket was made: its runs must be repeatable.
POCKET = {
    ("distill", 0): "aedda4ffcda2b1105a92c51ffc9e67d235587068e373c7d9f1386b59bce13093",
    ("distill", 1): "9b24e1f9fad6aee38ccadd3a0c409756203edf9c4fa256ab2888d3e25d342b1b",
    ("evaluate", 0): "04c72c5707ac01849cc4b3f81336825e110c16552876ac4c2ca531df25e1352e",
}


def write(path, texts) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def texts_of(prompts) -> list[str]:
    return [p.text for p in prompts]


def mixed(*sources: Source, **changes) -> Prompts:
    return Prompts(mixture=list(sources), **{"held_out": 0.0, **changes})


@pytest.fixture
def three(tmp_path) -> list[str]:
    return [write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(60)]) for name in "abc"]


def test_pocket_is_what_it_always_was() -> None:
    config = Config()
    found = {
        ("distill", 0): load_prompts(config.prompts, "distill"),
        ("distill", 1): load_prompts(config.prompts, "distill", seed=1),
        ("evaluate", 0): evaluation_prompts(config),
    }
    hashes = {k: hashlib.sha256(" ".join(p.id for p in v).encode()).hexdigest() for k, v in found.items()}
    assert hashes == POCKET
    assert training_prompts(config) == found["distill", 0]


# ---- mixtures


def test_the_first_prompts_hold_the_shares_of_the_weights(three) -> None:
    settings = mixed(*(Source(path=p, weight=w) for p, w in zip(three, (3, 1, 2), strict=True)))
    found = load_prompts(settings, "distill")
    assert count_sources(found[:6]) == {"a.jsonl": 3, "c.jsonl": 2, "b.jsonl": 1}
    for k in (6, 24, 60, 120):
        assert count_sources(found[:k]) == {"a.jsonl": k // 2, "c.jsonl": k // 3, "b.jsonl": k // 6}
    assert Counter(p.source for p in found) == dict.fromkeys(("a.jsonl", "b.jsonl", "c.jsonl"), 60), "others fill up"
    keys = {name: [p.text for p in found if p.source == name] for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    for path, name in zip(three, keys, strict=True):
        alone = load_prompts(Prompts(path=path, held_out=0.0), "distill")
        assert keys[name] == texts_of(alone), "each source in its own order, whatever it is mixed with"
    assert texts_of(load_prompts(settings, "distill", seed=1)) != texts_of(found)


def test_equal_weights_take_turns_and_unequal_ones_by_hand(three) -> None:
    found = load_prompts(mixed(Source(path=three[0]), Source(path=three[1])), "distill")
    assert [p.source[0] for p in found] == ["a", "b"] * 60
    found = load_prompts(mixed(Source(path=three[0]), Source(path=three[1], weight=2.0)), "distill")
    # a at 0.5, 1.5, 2.5; b at 0.25, 0.75, 1.25, 1.75
    assert [p.source[0] for p in found[:6]] == list("babbab")


def test_the_first_source_keeps_what_several_have(tmp_path, capsys) -> None:
    a, b = write(tmp_path / "a.jsonl", ["one", "two"]), write(tmp_path / "b.jsonl", ["Two ", "three", "three"])
    found = load_prompts(mixed(Source(path=a), Source(path=b)), "distill")
    assert {p.text: p.source for p in found} == {"one": "a.jsonl", "two": "a.jsonl", "three": "b.jsonl"}
    assert capsys.readouterr().out == (
        f"prompts.mixture[1].path={b}: 2 of 3 rows repeat an earlier prompt and are skipped\n"
    )


def test_a_source_may_have_columns_and_a_task_of_its_own(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "q": "b", "task": "mine"}\n')
    path = str(tmp_path / "a.jsonl")
    found = load_prompts(mixed(Source(path=path), Source(path=path, column="q", task="yours")), "distill")
    assert {(p.text, p.task, p.source) for p in found} == {("a", "mine", "a.jsonl"), ("b", "yours", "a.jsonl#2")}


def test_a_wrong_source_of_a_mixture_is_named(tmp_path, three) -> None:
    with pytest.raises(UserError, match=r"^prompts\.mixture\[1\]\.path=.*none\.jsonl: no such file"):
        load_prompts(mixed(Source(path=three[0]), Source(path=str(tmp_path / "none.jsonl"))), "distill")
    with pytest.raises(UserError, match=r"^prompts\.mixture\[0\]\.column=topic: not a column of"):
        load_prompts(mixed(Source(path=three[0], column="topic")), "distill")
    with pytest.raises(UserError, match=r"^prompts\.mixture\[0\]\.revision=null: pin a commit"):
        load_prompts(mixed(Source(path="someone/questions")), "distill")


def test_the_record_of_a_mixture(tmp_path, three) -> None:
    settings = mixed(Source(path=three[0], weight=2.0, licence="mit"), Source(path=three[1]), Source(path="pocket"))
    record = source_record(settings)
    assert (record["name"], record["rows"], record["bad_rows"]) == ("mixture", 1620, 0)
    first, second, third = record["sources"]
    sha256 = hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert first == {
        "name": "a.jsonl", "sha256": sha256, "licence": "mit", "rows": 60, "bad_rows": 0, "weight": 2.0
    }  # fmt: skip
    assert second["licence"] is None and third["name"] == "pocket/distill.jsonl" and third["licence"] == "PSF-2.0"
    assert str(tmp_path) not in json.dumps(record)
    write(tmp_path / "b.jsonl", ["another"])
    assert pins(source_record(settings)) != pins(record)


def test_pins_of_one_source_are_its_hash_alone(tmp_path, three) -> None:
    record = source_record(Prompts(path=three[0], licence="mit"))
    assert pins(record) == {"prompts": record["sha256"]} and record["licence"] == "mit"
    template = tmp_path / "own.jinja"
    template.write_text("first")
    settings = Prompts(path=three[0], chat_template=str(template))
    record = source_record(settings)
    assert record["chat_template"] == {"name": "own.jinja", "sha256": hashlib.sha256(b"first").hexdigest()}
    template.write_text("second")
    assert pins(source_record(settings))["chat_template"] == hashlib.sha256(b"second").hexdigest()


# ---- near-equal prompts, and who may see which


def test_near_equal_prompts_are_one(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", ["Straße  nach\tRom", "STRASSE nach rom", "\uff32om", "Rom", "rom!"])
    found = load_prompts(Prompts(path=path, held_out=0.0), "distill")
    assert sorted(texts_of(found)) == ["Straße  nach\tRom", "rom!", "\uff32om"]
    assert "2 of 5 rows repeat an earlier prompt and are skipped" in capsys.readouterr().out


def test_prompts_that_begin_alike_go_to_one_side(tmp_path) -> None:
    """Whatever is evaluated on was not distilled from, in no capitals and in no other conversation."""
    rows = [
        {"turns": turns} for i in range(200) for turns in ([f"Say {i}"], [f"say  {i}", "more"], [f"SAY {i}", f"n{i}"])
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Prompts(path=str(tmp_path / "p.jsonl"))
    sides = {role: load_prompts(settings, role) for role in ("distill", "evaluate")}
    begun = {role: {normal_form(p.turns[0]) for p in found} for role, found in sides.items()}
    assert not begun["distill"] & begun["evaluate"]
    assert sum(map(len, begun.values())) == 200 and sum(map(len, sides.values())) == 600
    assert 5 <= len(begun["evaluate"]) <= 40


def test_what_another_file_evaluates_is_taken_out_of_distill(tmp_path, capsys) -> None:
    config = Config(prompts=Prompts(path=write(tmp_path / "p.jsonl", [f"Say {i}" for i in range(20)]), held_out=0.0))
    own = tmp_path / "own.jsonl"
    own.write_text('{"turns": ["SAY  3", "more"]}\n{"turns": ["say 7"]}\n{"turns": ["other", "Say 9"]}\n')
    config.evaluate.prompts = EvaluatePrompts(path=str(own))
    whole = load_prompts(config.prompts, "distill")
    assert training_prompts(config) == [p for p in whole if p.text not in ("Say 3", "Say 7")]
    assert "prompts: 2 of 20 prompts begin as one of evaluate and are left to it\n" in capsys.readouterr().out
    write(own, [f"say {i}" for i in range(20)])
    with pytest.raises(UserError, match=r"^prompts\.path: every prompt is one of evaluate\.prompts too"):
        training_prompts(config)


@pytest.mark.parametrize("first", ["file", "pocket"])
def test_a_mixture_with_pocket_leaks_nothing_either(tmp_path, first) -> None:
    """Pocket's files are split by name, others by hash: a prompt in both kinds still lies on one side."""
    theirs = {role: set(texts_of(load_prompts(Prompts(), role))) for role in ("distill", "evaluate")}
    path = write(tmp_path / "p.jsonl", [*sorted(theirs["evaluate"])[:50], *sorted(theirs["distill"])[:50]])
    sources = [Source(path=path), Source(path="pocket")]
    config = Config(prompts=mixed(*(sources if first == "file" else sources[::-1]), held_out=0.3))
    distill, evaluate = texts_of(training_prompts(config)), texts_of(evaluation_prompts(config))
    assert sorted(distill + evaluate) == sorted(theirs["distill"] | theirs["evaluate"])
    if first == "pocket":
        assert theirs["evaluate"] < set(evaluate)


def test_evaluate_may_have_a_mixture_in_its_own_order_but_none_of_distills(tmp_path, three) -> None:
    config = Config(prompts=mixed(Source(path=three[0]), Source(path=three[1])))
    config.evaluate.prompts = EvaluatePrompts(mixture=[Source(path=three[2]), Source(path="pocket", weight=2.0)])
    found = evaluation_prompts(config)
    assert [p.text for p in found if p.source == "c.jsonl"] == [f"c {i}" for i in range(60)]
    assert count_sources(found[:30]) == {"pocket": 20, "c.jsonl": 10}
    config.evaluate.prompts.mixture.append(Source(path=three[1]))
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.mixture\[2\]\.path=.*b\.jsonl: prompts names it too"):
        evaluation_prompts(config)
