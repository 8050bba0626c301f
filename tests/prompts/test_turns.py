"""Conversations: which ids each turn is decoded from, by hand, and the same for every method; the table by task."""

import json

import pandas as pd
import pytest
import torch
import yaml
from helpers import byte_tokenizer, make_run, plant_heads
from transformers import AutoModelForCausalLM

from pipeline import cli
from pipeline.config import EvaluatePrompts, Prompts, to_dict
from pipeline.errors import UserError
from pipeline.evaluation import against_transformers, measuring, report
from pipeline.inference.backbone import SplitBackbone
from pipeline.prompts.prompt import SPEC_BENCH, Prompt
from pipeline.prompts.turns import every_turn
from pipeline.stages import evaluate

NEW = 6
THREE = Prompt("abc", ("one?", "two?", "three?"), "talk")
ONE = Prompt("def", ("only",), "count")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


def answered_by_length(ids: list[int]) -> list[int]:
    """A backbone that says how long its context is, with white space and an end token around it."""
    tokenizer = byte_tokenizer()
    return [*tokenizer(f" {len(ids)}\n")["input_ids"], tokenizer.eos_token_id]


def contexts(settings: Prompts, context: int = 256, prompts=(ONE, THREE)) -> dict[str, str]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    entries = every_turn(list(prompts), tokenizer, settings, context, NEW, answered_by_length)
    assert [p.task for p, _ in entries] == [ONE.task if p.id == "def" else THREE.task for p, _ in entries]
    return {p.id: tokenizer.decode(ids) for p, ids in entries}


def test_turns_and_answers_are_joined_by_blank_lines() -> None:
    assert list(contexts(Prompts()).items()) == [
        ("def", "only"),
        ("abc", "one?"),
        ("abc.2", "one?\n\n4\n\ntwo?"),
        ("abc.3", "one?\n\n4\n\ntwo?\n\n13\n\nthree?"),
    ]


def test_the_chat_template_goes_around_the_messages() -> None:
    found = contexts(Prompts(chat_template="tokenizer"))
    assert found["abc.2"] == "[user]one?[assistant]14[user]two?[me]"
    assert found["abc.3"] == f"[user]one?[assistant]14[user]two?[assistant]{len(found['abc.2'])}[user]three?[me]"


def test_a_turn_without_room_takes_the_later_ones_with_it(capsys) -> None:
    room = len("one?\n\n4\n\ntwo?") + NEW
    assert list(contexts(EvaluatePrompts(too_long="drop"), room)) == ["def", "abc", "abc.2"]
    assert "evaluate.prompts.too_long=drop: 1 of 1 prompts dropped" in capsys.readouterr().out
    assert list(contexts(Prompts(too_long="drop"), room - 1, [THREE])) == ["abc"], "the first turn is left"
    with pytest.raises(UserError, match=r"prompt abc\.2 \('two\?'\) has 13 tokens.*too_long=drop"):
        contexts(Prompts(), room - 1)


def test_prompts_of_one_turn_are_not_answered() -> None:
    def refuse(ids):
        raise AssertionError

    entries = every_turn([ONE], byte_tokenizer(), Prompts(), 256, NEW, refuse)
    assert entries == [(ONE, byte_tokenizer()("only")["input_ids"])]


# ---- through the stage


def spec_bench_rows() -> list[dict]:
    categories = ["rag", "math", "qa", "translation", "math_reasoning", "summarization"]
    turns = {"math": ["add 2 and 2", "and 3 more"]}
    return [
        {"question_id": 81 + i, "category": c, "turns": turns.get(c, [f"do {c}"])} for i, c in enumerate(categories)
    ]


def spec_bench_run(tmp_path, *words: str):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in spec_bench_rows()))
    return make_run(tmp_path, f"evaluate.prompts.path={path}", "evaluate.num_prompts=0", "evaluate.repeats=2",
                    "evaluate.max_new_tokens=12", "evaluate.temperatures=[0.0,1.0]", *words)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run over a small Spec-Bench, and the set of contexts that each prompt id was decoded from."""
    tmp_path = tmp_path_factory.mktemp("turns")
    run = spec_bench_run(tmp_path)
    plant_heads(run, 2)
    decoded: list[tuple[str, float, tuple[int, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for where, name in (
            (evaluate, "autoregressive"),
            (measuring, "autoregressive"),
            (measuring, "self_speculative"),
        ):
            honest = getattr(where, name)

            def spy(engine, request, sampler, *more, honest=honest, name=name):
                decoded.append((name, sampler.temperature, tuple(request.prompt)))
                return honest(engine, request, sampler, *more)

            patch.setattr(where, name, spy)
        evaluate.run(run)
    return run, decoded


def test_a_later_turn_follows_plain_greedy_decoding_for_every_method(measured) -> None:
    run, decoded = measured
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(run.config.backbone.name_or_path, dtype=torch.float32)
    first = tokenizer("add 2 and 2")["input_ids"]
    ids = list(first)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    answer = tokenizer.decode(ids[len(first) :], skip_special_tokens=True).strip()
    second = tuple(tokenizer(f"add 2 and 2\n\n{answer}\n\nand 3 more")["input_ids"])

    assert decoded[0] == ("autoregressive", 0.0, tuple(first)), (
        "the earlier turn is answered once, before anything else"
    )
    others = {tuple(tokenizer(row["turns"][0])["input_ids"]) for row in spec_bench_rows()}
    assert {ids for _, _, ids in decoded} == others | {second}
    # 2 repeats of the baseline and of 2 controllers at 2 temperatures
    mine = [(name, t) for name, t, ids in decoded if ids == second]
    assert sorted(mine) == sorted([("autoregressive", t) for t in (0.0, 1.0)] * 2
                                  + [("self_speculative", t) for t in (0.0, 1.0)] * 4)  # fmt: skip


def test_each_turn_is_an_entry_beside_its_first_and_all_are_lossless(measured) -> None:
    run, _ = measured
    generations = pd.read_parquet(run / "eval" / "generations.parquet")
    ids = list(dict.fromkeys(generations.prompt))
    assert len(ids) == 7 and ids[2] == f"{ids[1]}.2"
    assert set(generations[generations.prompt == ids[2]].task) == {"mt_bench"}
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["lossless"]["greedy"]["passed"] and results["lossless"]["greedy"]["texts"] == 7 * 2 * 2
    assert results["prompts"]["count"] == 7 and results["prompts"]["later_turns"] == 1
    assert results["prompts"]["tasks"] == {task: 1 + (task == "mt_bench") for task in SPEC_BENCH}


def test_the_table_by_task_is_spec_benchs(measured) -> None:
    run, _ = measured
    results = json.loads((run / "eval" / "results.json").read_text())
    tables = [content for kind, content in report.blocks(results) if kind == "table"]
    greedy, sampled = (table for table in tables if "overall" in table[0])
    tasks = [f"{task}, n = {1 + (task == 'mt_bench')}" for task in SPEC_BENCH]
    assert greedy[0] == sampled[0] == ["exit layer", "controller", *tasks, "overall"]
    c = results["heads"][0]["controllers"]["fixed:2"]
    rows = pd.read_parquet(run / "eval" / "rounds.parquet").query("temperature == 0 and controller == 'fixed:2'")
    for column, figures in ((2, c["tasks"]["mt_bench"]), (-1, c)):
        mine = rows[rows.task == "mt_bench"] if column == 2 else rows
        assert figures["acceptance_length"] == pytest.approx(1 + mine.accepted.mean())
        assert greedy[1][column] == f"{figures['speedup']:.2f} ({1 + mine.accepted.mean():.2f})"
    assert "1 of the prompts are later turns" in (run / "report" / "report.md").read_text()


def test_a_backbone_that_says_nothing_is_refused(tmp_path, monkeypatch) -> None:
    run = spec_bench_run(tmp_path)
    plant_heads(run, 2)
    honest = SplitBackbone.logits

    def ends_at_once(self, hidden):
        logits = honest(self, hidden)
        logits[..., byte_tokenizer().eos_token_id] = 1e9
        return logits

    monkeypatch.setattr(SplitBackbone, "logits", ends_at_once)
    monkeypatch.setattr(against_transformers, "check", lambda *_: {})  # it would refuse such logits
    with pytest.raises(UserError, match=r"evaluate\.temperatures=\[0\.0, 1\.0\]: the backbone ended every text"):
        evaluate.run(run)


BAD = {
    "no prompt": ("", [], "holds no prompts"),
    "blank prompts": ('{"prompt": " "}\n{"prompt": ""}\n', [], "every prompt is empty"),
    "a prompt missing": ('{"prompt": "a"}\n{"text": "b"}\n', [], "line 2: no prompt: 1 of 2 rows cannot be used"),
    "turns of no texts": ('{"turns": ["a", ""]}\n', [], "line 1: turns must be a list of texts"),
    "none fits": ('{"prompt": "abc"}\n', ["evaluate.max_new_tokens=254", "evaluate.prompts.too_long=drop"],
                  "evaluate.prompts.too_long=drop: no prompt is left"),
    **{name: ('{"prompt": "a"}\n', [f"evaluate.controllers=[{name}]"], f"controller={name}: must be thompson")
       for name in ("fixed:-1", "fixed:x", "confidence:1.5", "entropy:0", "thompson:3")},
    "the same controller": ('{"prompt": "a"}\n', ["evaluate.controllers=[beta,beta]"], "different controllers"),
    "the same temperature": ('{"prompt": "a"}\n', ["evaluate.temperatures=[0,0]"], "different temperatures"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("bad"))
    plant_heads(run, 2)
    (run.path.parent / "my.yaml").write_text(yaml.safe_dump(to_dict(run.config)))
    return run


@pytest.mark.parametrize(("rows", "more", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_is_written(with_heads, tmp_path, capsys, rows, more, message) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(rows)
    words = [f"evaluate.prompts.path={path}", *more]
    assert cli.main(["evaluate", "--config", str(with_heads.path.parent / "my.yaml"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (with_heads / "eval").exists() and not list((with_heads / "stages").glob("evaluate*"))
