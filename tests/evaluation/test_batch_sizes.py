"""evaluate.batch_sizes on a tiny backbone: texts, figures, predictions, words, and what is left out."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_run, plant_heads, tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.errors import UserError
from pipeline.evaluation import batch_report, batch_sizes, batches, intervals, report
from pipeline.evaluation.batch_sizes import costs_of, in_batches, predicted, rates_of, target_efficiency, up_to
from pipeline.evaluation.measuring import Measured
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.decoding import Request
from pipeline.inference.sampling import Sampler
from pipeline.stages import evaluate

WORDS = ("evaluate.batch_sizes=[1,3]", "evaluate.controllers=[fixed:2,thompson,beta,thompson+lookup]",
         "evaluate.max_new_tokens=12", "evaluate.num_prompts=4")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("batches"), *WORDS)
    plant_heads(run, 2)
    evaluate.run(run)
    return run


@pytest.fixture()
def results(run):
    return json.loads((run / "eval" / "results.json").read_text())


# ---- the stage


def test_every_text_of_a_batch_is_that_of_one_at_a_time(run, results) -> None:
    """4 texts one at a time and 12, the prompts three times, through 3 places; 3 methods, 3 repeats."""
    assert results["lossless"]["batches"] == {"texts": 144, "identical": 144, "divergences": [], "passed": True}
    runs = pd.read_parquet(run / "eval" / "batches.parquet")
    generations = pd.read_parquet(run / "eval" / "generations.parquet")
    plain = [tokens.tolist() for tokens in generations[generations.exit_layer == 0].tokens]
    assert len(runs) == 18 and set(runs.method) == {"autoregressive", "fixed:2", "thompson"}
    for batch_size, texts in zip(runs.batch_size, runs.texts, strict=True):
        assert [text.tolist() for text in texts] == plain * batch_size
    assert "144 of 144 greedy texts decoded several at once are so too" in report.lossless_line(results)


def test_figures_are_those_of_the_tables(run, results) -> None:
    (entry,) = results["batches"]
    assert entry["batch_sizes"] == [1, 3] and entry["repeats"] == 3
    assert list(entry["controllers"]) == ["fixed:2", "thompson"], "beta and copies know nothing of batches"
    runs, rounds = (pd.read_parquet(run / "eval" / f"{name}.parquet") for name in ("batches", "batch_rounds"))
    at = entry["controllers"]["fixed:2"]["sizes"][1]
    mine, base = (runs[(runs.batch_size == 3) & (runs.method == m)] for m in ("fixed:2", "autoregressive"))
    ratios = (mine.tokens / mine.seconds).to_numpy() / (base.tokens / base.seconds).to_numpy()
    logs = np.log(ratios)
    assert at["speedup"] == pytest.approx(np.median(ratios))
    assert at["high"] == pytest.approx(np.exp(logs.mean() + 4.303 * logs.std(ddof=1) / 3**0.5))
    assert at["tokens_per_second"] == pytest.approx((mine.tokens / mine.seconds).median())
    assert at["drafted_per_token"] == mine.drafted.sum() / mine.tokens.sum() > 0
    drafting = rounds[rounds.repeat >= 0]
    assert set(drafting.method) == {"autoregressive", "fixed:2", "thompson"}
    assert set(rounds[rounds.repeat < 0].method) == {"none"}, "what warms up drafts nothing"
    assert (rounds[rounds.repeat < 0].rows == rounds[rounds.repeat < 0]["count"]).all()
    keys = ["batch_size", "method", "repeat"]
    full = drafting[drafting["count"] == drafting.batch_size]
    assert full.groupby(keys).tokens.sum().to_dict() == runs.set_index(keys).tokens.to_dict()
    for key, texts in runs.set_index(keys).texts.items():  # the first token of each follows its prompt
        assert drafting.groupby(keys).tokens.sum()[key] == sum(len(text) - 1 for text in texts)


def test_the_report_shows_table_picture_and_sentence(run, results) -> None:
    text = (run / "report" / "report.md").read_text()
    assert (run / "report" / "batches-2.png").stat().st_size > 5000
    assert "## Several texts at once" in text and "(batches-2.png)" in text
    assert batch_report.sentence(results, 2) in text
    (table,) = [content for kind, content in batch_report.blocks(results) if kind == "table"]
    assert [row[1:3] for row in table[1:]] == [
        [b, name] for b in ("1", "3") for name in ("autoregressive", "fixed:2", "thompson")
    ]
    assert report.summary(results)["evaluate/batches/pays_up_to"] in (0, 1, 3)
    without = {**results, "batches": None, "lossless": {"greedy": results["lossless"]["greedy"], "sampling": None}}
    assert batch_report.blocks(without) == [] and batch_report.sentence(without, 2) == ""


def test_what_was_measured_is_not_measured_again(run, tmp_path, monkeypatch) -> None:
    """A run that ends while batches are measured goes on with them alone; one that ends later measures nothing."""
    again = make_run(tmp_path, WORDS[0], WORDS[2], "evaluate.num_prompts=1", "evaluate.controllers=[fixed:1]")
    plant_heads(again, 2)

    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(batch_sizes, "measure", broken)
        with pytest.raises(MemoryError):
            evaluate.run(again)
    assert (again / "eval" / "measured.json").exists() and not (again / "eval" / "batches.parquet").exists()
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "measure", None)
        patched.setattr(evaluate.report, "write", broken)
        with pytest.raises(MemoryError):
            evaluate.run(again)
    before = (again / "eval" / "batches.parquet").read_bytes()
    monkeypatch.setattr(evaluate, "measure", None)
    monkeypatch.setattr(batch_sizes, "measure", None)
    evaluate.run(again)
    assert (again / "eval" / "batches.parquet").read_bytes() == before


def test_what_is_left_out_is_said(tmp_path, capsys) -> None:
    run = make_run(tmp_path, "evaluate.batch_sizes=[2]", "evaluate.controllers=[fixed:1,tree:2,beta,thompson+tree]")
    plant_heads(run, 2)
    engines = {2: object()}
    assert batch_sizes.engines_of(make_run(tmp_path).config.evaluate, engines) == ({}, [])
    assert capsys.readouterr().out == ""
    model = load(tmp_path / "tiny-llama")
    engine = SplitBackbone(model, head_for(model, 2))
    found, names = batch_sizes.engines_of(run.config.evaluate, {2: engine})
    assert names == ["fixed:1", "tree:2"] and found[2].backbone is engine
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "evaluate.batch_sizes=[2]: beta, thompson+tree: left out; of several texts at once are thomp"
    )
    recorded = SplitBackbone(model, head_for(model, 2), fixed_shapes=True)
    assert batch_sizes.engines_of(run.config.evaluate, {2: recorded}) == ({}, [])
    assert "left out: several texts at once cannot be decoded with fixed_shapes" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["[0]", "[4,1]", "[1,1]", "[-2]"])
def test_wrong_numbers_are_refused(tmp_path, sizes) -> None:
    with pytest.raises(UserError, match=r"evaluate\.batch_sizes=\[.*different numbers of texts from 1 on, ascending"):
        make_run(tmp_path, f"evaluate.batch_sizes={sizes}")


def test_sampled_texts_are_tested_and_another_law_is_found(tmp_path, monkeypatch) -> None:
    words = ("evaluate.batch_sizes=[3]", "evaluate.temperatures=[1.0]", "evaluate.controllers=[fixed:2]")
    run = make_run(tmp_path, *words)
    plant_heads(run, 2)
    evaluate.run(run)
    results = json.loads((run / "eval" / "results.json").read_text())
    found = results["lossless"]["batches"]
    assert found["passed"] and found["texts"] == 24
    assert [test["controller"] for test in found["tests"]] == ["autoregressive, 3 at once", "fixed:2, 3 at once"]
    results["lossless"]["batches"]["passed"] = False
    assert report.lossless_line(results).startswith("no") and "do NOT follow" in report.lossless_line(results)


# ---- figures, by hand


def seconds(part: str, rows: int) -> float:
    """A machine that verifies 8 rows for the price of one, and then each costs the same."""
    fixed, each = {"shallow": (1.0, 0.01), "head": (0.5, 0.02), "verify": (4.0, 0.5)}[part]
    return fixed + each * max(0, rows - 8 * (part == "verify"))


def rounds_of(sizes: range, drafts: range) -> pd.DataFrame:
    rows = []
    for b in sizes:
        for k in drafts:
            shallow, head = [b] * (k + 1 if k else 0), [b] * k  # a round without drafts is one pass
            verify = seconds("verify", b * (k + 1)) + (0 if k else seconds("shallow", b))
            rows += 2 * [
                (b, "none" if k == 0 else f"fixed:{k}", -1 if k == 0 else 0, b, b * (k + 1), b, shallow,
                 [seconds("shallow", n) for n in shallow], head, [seconds("head", n) for n in head], verify, 0.1)
            ]  # fmt: skip
    return pd.DataFrame(rows, columns=batches.ROUND_COLUMNS)


def test_predictions_are_tokens_over_time() -> None:
    """Up to 16 rows the times of every number of rows are known; K up to 3 is within that for 1 to 4 texts."""
    rates = [0.8, 0.7]
    expected = predicted(costs_of(rounds_of(range(1, 5), range(4))), rates, 4)
    for b in range(1, 5):
        for k, tokens in enumerate([1, 1.8, 2.36, 1 + 0.8 + 0.8 * 0.7 + 0.8 * 0.7 * 0.7]):
            round_of_k, round_of_none = (
                (j + 1) * seconds("shallow", b) + j * seconds("head", b) + seconds("verify", b * (j + 1)) + 0.1
                for j in (k, 0)
            )
            assert expected[b - 1, k] == pytest.approx(tokens * round_of_none / round_of_k)
    assert predicted(costs_of(rounds_of(range(1, 2), range(2))), None, 4) is None


def test_rates_are_those_of_the_fixed_rule_that_drafted_furthest() -> None:
    of = {"thompson": [0.99] * 9, "fixed:4": [0.5, 0.4], "fixed:1": [0.6], "fixed:8": []}
    entry = {"controllers": {name: {"conditional_rates": rates} for name, rates in of.items()}}
    assert rates_of(entry) == [0.5, 0.4]
    del entry["controllers"]["fixed:4"], entry["controllers"]["fixed:1"]
    assert rates_of(entry) is None


def test_target_efficiency_is_of_full_rounds() -> None:
    rounds = rounds_of(range(1, 9), range(3))
    assert target_efficiency(rounds, 2, "fixed:2") == (3, pytest.approx(1)), "6 rows cost what 2 do"
    assert target_efficiency(rounds, 8, "fixed:2") == (3, pytest.approx(4 / (4 + 0.5 * 16)))
    assert target_efficiency(rounds, 9, "fixed:2") == target_efficiency(rounds, 8, "beta") == (None, None)
    rounds.loc[rounds["count"] < 8, "batch_size"] = 8  # rounds at the end, with some places free
    assert target_efficiency(rounds, 8, "fixed:2") == (3, pytest.approx(4 / (4 + 0.5 * 16)))


@pytest.mark.parametrize(
    ("points", "most"),
    [([(1, 1.2), (4, 1.01), (16, 0.9)], 4), ([(1, 0.99), (4, 1.2)], 0), ([(2, 1.2)], 2), ([(1, 1.0)], 0),
     ([(1, float("nan"))], 0), ([(1, 1.5), (4, 0.9), (16, 1.1)], 1)],
)  # fmt: skip
def test_up_to_how_many_it_pays(points, most) -> None:
    assert up_to(points) == most


def test_the_sentence_says_where_it_stops(results) -> None:
    (entry,) = results["batches"]
    results["best"]["controller"] = "beta"  # which knows of one text only: thompson is spoken of
    c = entry["controllers"]["thompson"]
    c["sizes"][0] |= {"speedup": 1.3, "low": 1.2, "high": 1.4}
    c["sizes"][1] |= {"speedup": 1.0, "low": 0.98, "high": 1.02}
    said = "Several texts at once, `thompson` at temperature 0: drafting "
    c["pays_up_to"] = 1
    assert batch_report.sentence(results, 2) == (
        f"{said}pays up to 1 text (speedup 1.30, 95 % interval 1.20-1.40), and not surely at 3 texts (speedup 1.00, "
        "95 % interval 0.98-1.02)."
    )
    c["pays_up_to"] = 3
    assert batch_report.sentence(results, 2).endswith(
        "up to 3 texts (speedup 1.00, 95 % interval 0.98-1.02), the most measured."
    )
    c["pays_up_to"] = 0
    assert batch_report.sentence(results, 2).startswith(f"{said}does not surely pay at 1 text (speedup 1.30")
    c["predicted_up_to"] = 2
    assert "Predicted was that it pays up to 2 texts." in batch_report.blocks(results)[2][1]


def test_methods_take_turns_round_by_round(tmp_path, monkeypatch) -> None:
    """In engines of their own, with the texts that each gives alone; the one that drafts is done first."""
    model = load(tiny_backbone(tmp_path, sharpness=4.0))
    engine, order = BatchEngine(SplitBackbone(model, head_for(model, 2), check=False)), []
    monkeypatch.setattr(BatchEngine, "reserve", lambda self, more, honest=BatchEngine.reserve: (
        order.append(id(self)), honest(self, more)))  # fmt: skip
    requests = [Request([3, 5, 7 + i], 12) for i in range(3)]
    frame, rounds = batches.measure(engine, requests, lambda i: Sampler(), ["fixed:2"], [2], 2)
    plain, drafting = (len(rounds[(rounds.method == m) & (rounds.repeat == 0)]) for m in ("autoregressive", "fixed:2"))
    warm = len(rounds[rounds.repeat < 0])
    first, second = dict.fromkeys(order[warm:])
    shorter = min(plain, drafting)
    assert order[warm : warm + 2 * shorter] == [first, second] * shorter
    assert len({str(texts) for texts in frame.texts}) == 1 and set(frame.repeat) == {0, 1}


def test_one_repeat_has_no_interval() -> None:
    assert all(np.isnan(intervals.interval_of_repeats(np.array([1.2]))))
    low, high = intervals.interval_of_repeats(np.array([1.1, 1.2, 1.3, 1.2]))
    assert low < 1.2 < high < 1.4


# ---- proofs


def test_a_text_that_differs_is_found_and_judged(run, results) -> None:
    model = load(run.config.backbone.name_or_path)
    engines = {2: BatchEngine(SplitBackbone(model, head_for(model, 2)))}
    measured = Measured.load(run / "eval")
    runs, _ = batch_sizes.measured(run / "eval", engines, [], measured.prompts, run.config.evaluate, frozenset(), 0)
    runs = copy.deepcopy(runs[(runs.batch_size == 3) & (runs.method == "fixed:2")])
    for texts in runs.texts:
        texts[5][7] = (texts[5][7] + 1) % 256  # of the second prompt, in every repeat
    found = batch_sizes.losslessness(engines, runs, measured, run.config.evaluate, 0)
    assert (found["texts"], found["identical"], found["passed"]) == (36, 33, False)
    (one,) = found["divergences"]
    assert one["controller"] == "fixed:2, 3 at once" and one["prompt"] == measured.prompts.prompt[1]
    assert one["first_divergence"] == 7 and not one["explained"] and one["logit_gap"] > one["logit_noise"] > 0
    results["lossless"]["batches"] = found
    assert report.lossless_line(results).startswith("no: ")
    assert "33 of 36 greedy texts decoded several at once are so too, 0 of the 1 other" in report.lossless_line(results)
    assert "Texts that differ from those of one at a time" in [content for _, content in batch_report.blocks(results)]


def test_copies_of_a_text_have_its_logits(run) -> None:
    model = load(run.config.backbone.name_or_path)
    engine = BatchEngine(SplitBackbone(model, head_for(model, 2)))
    ids = [*PROMPT, *range(40, 50)]
    with torch.inference_mode():
        wanted_V = model(torch.tensor([ids])).logits[0, -1]
        for prompt in (len(PROMPT), len(ids)):
            found = list(in_batches(engine, prompt, ids, 3))
            assert len(found) == 3 and not engine.places.caches
            for logits_V in found:
                torch.testing.assert_close(logits_V, wanted_V, rtol=1e-4, atol=1e-4)
