"""The evaluate stage on a tiny backbone: what it writes, what it proves, what it refuses."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
from helpers import make_run, plant_heads, tiny_backbone
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.evaluation import against_transformers
from pipeline.inference import family_llama
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.canary import distance
from pipeline.inference.sampling import Sampler
from pipeline.stages import evaluate

PICTURES = ("speedup", "time", "acceptance", "drafted", "learned")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("evaluate"), "evaluate.temperatures=[0.0,1.0]")
    plant_heads(run, 2, 3)
    evaluate.run(run)
    return run


def test_results_hold_the_contract(run) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    assert {
        "schema",
        "backbone",
        "dtype",
        "device",
        "threads",
        "kernels",
        "prompts",
        "lossless",
        "heads",
        "best",
    } <= results.keys()
    assert results["lossless"]["greedy"] == {
        "prompts": 4, "texts": 16, "identical": 16, "divergences": [], "passed": True
    }  # fmt: skip
    assert {(h["exit_layer"], h["temperature"]) for h in results["heads"]} == {(2, 0.0), (3, 0.0), (2, 1.0), (3, 1.0)}
    perfect = next(h for h in results["heads"] if h["exit_layer"] == 3)["controllers"]["fixed:2"]
    assert perfect["conditional_rates"][0] == 1, "after L-1 layers the copied last layer is the backbone itself"
    assert str(run.path.parent.parent) not in json.dumps(results), "no folder of this machine may be published"


def test_tables_agree(run) -> None:
    generations = pd.read_parquet(run / "eval" / "generations.parquet")
    rounds = pd.read_parquet(run / "eval" / "rounds.parquet")
    # 4 prompts x (baseline + 2 heads x 2 controllers) x 2 temperatures
    assert len(generations) == 4 * 5 * 2
    keys = ["exit_layer", "controller", "temperature", "prompt", "repeat"]
    committed = rounds.groupby(keys).tokens.sum()
    for row in generations[generations.exit_layer > 0].itertuples():
        rest = committed.get(tuple(getattr(row, k) for k in keys), 0)
        assert len(row.tokens) == 1 + rest  # the first token follows the prompt, the others come in rounds


def test_what_publish_compares_with_is_kept(run) -> None:
    """The ids of every prompt, what ends a text, and a canary that the backbone itself passes."""
    results = json.loads((run / "eval" / "results.json").read_text())
    prompts = pd.read_parquet(run / "eval" / "prompts.parquet")
    generations = pd.read_parquet(run / "eval" / "generations.parquet")
    assert list(prompts.prompt) == list(dict.fromkeys(generations.prompt)) and results["ends"] == [256]
    model = AutoModelForCausalLM.from_pretrained(run.config.backbone.name_or_path)
    row = generations[(generations.exit_layer == 0) & (generations.temperature == 0)].iloc[0]
    ids = torch.tensor([prompts.set_index("prompt").ids[row.prompt].tolist()])
    out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=256)
    assert out[0, ids.shape[1] :].tolist() == row.tokens.tolist()
    assert distance(model, results["canary"]) < 1e-4


def test_intervals_of_acceptance_length_hold_it(run) -> None:
    for entry in json.loads((run / "eval" / "results.json").read_text())["heads"]:
        for c in entry["controllers"].values():
            for figures in (c, *c["tasks"].values()):
                low, high = figures["acceptance_length_ci95"]
                assert 1 <= low <= figures["acceptance_length"] <= high


def test_report_is_there(run) -> None:
    text = (run / "report" / "report.md").read_text()
    assert "Lossless: yes: 16 of 16" in text and "| 2 | fixed:2 |" in text
    pictures = {f"{kind}-{t}.png" for kind in PICTURES for t in (0, 1)}
    assert {p.name for p in (run / "report").iterdir()} == {"report.md", "index.html"} | pictures


def test_the_page_needs_nothing_beside_it(run) -> None:
    page = (run / "report" / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2 * len(PICTURES)
    words = re.sub(r"base64,[^\"]*", "", page)  # which may spell anything
    assert "http" not in words.replace("https://arxiv.org", "") and str(run.path) not in words
    assert page.count("<table>") == page.count("</table>") >= 5


def test_figures_of_a_controller_fit_together(run) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    for entry in results["heads"]:
        file = run / "heads" / f"exit-{entry['exit_layer']}" / "model.safetensors"
        assert 0 <= file.stat().st_size - entry["memory"]["head_bytes"] < 4096, "the file's header, and nothing else"
        for c in entry["controllers"].values():
            assert sum(c["time_per_token"].values()) > 0 and set(c["tasks"]) == {"t0", "t1"}
        learned = entry["controllers"]["thompson"]["learned"]
        assert len(learned) == 4 and all(0 < mean < 1 for row in learned for mean in row)


def test_sampled_texts_are_tested(run) -> None:
    sampling = json.loads((run / "eval" / "results.json").read_text())["lossless"]["sampling"]
    assert sampling["passed"] and len(sampling["tests"]) == 5  # the baseline, 2 heads x 2 controllers
    assert sampling["largest_p_difference"] < 1e-4


def test_a_second_run_does_nothing_and_another_config_is_refused(run, tmp_path, capsys) -> None:
    before = (run / "eval" / "results.json").stat().st_mtime_ns
    evaluate.run(run)
    assert capsys.readouterr().out == "evaluate: done already\n"
    assert (run / "eval" / "results.json").stat().st_mtime_ns == before
    run.config.evaluate.max_new_tokens = 21
    try:
        with pytest.raises(UserError, match=r"evaluate.max_new_tokens was 20, is 21.*--redo evaluate"):
            evaluate.run(run)
    finally:
        run.config.evaluate.max_new_tokens = 20


def test_an_engine_that_differs_from_transformers_measures_nothing(tmp_path, monkeypatch) -> None:
    """Autoregressive and speculative ids stay equal under such a change, so no other comparison would find it."""
    run = make_run(tmp_path)
    plant_heads(run, 2)
    monkeypatch.setattr(family_llama, "F", SimpleNamespace(silu=torch.zeros_like))
    with pytest.raises(UserError, match=r"exit layer 2\) and transformers \S+ give different logits on prompt \S+: at"):
        evaluate.run(run)
    assert not (run / "eval").exists() and not (run / "report").exists()
    monkeypatch.undo()
    evaluate.run(run)  # no --redo is asked for
    compared = json.loads((run / "eval" / "results.json").read_text())["transformers"]
    assert 0 < compared["largest_difference"] < 1e-5 < compared["tolerance"] == 1e-4
    assert compared["prompts"] == 4 and compared["positions"] == 4 * 36
    assert compared["version"] == transformers.__version__


def test_a_wrong_engine_is_caught(tmp_path, monkeypatch) -> None:
    """If the deep layers went wrong in drafted rounds, the ids would differ and the verdict must say so."""
    run = make_run(tmp_path)
    plant_heads(run, 2)
    # The comparison with transformers would see it first: here, what stands behind it is looked at.
    monkeypatch.setattr(against_transformers, "check", lambda *_: {})
    honest = SplitBackbone.deep

    def broken(self, base, end, cache, tree=None):
        hidden = honest(self, base, end, cache, tree)
        return hidden if base == 0 else -hidden

    monkeypatch.setattr(SplitBackbone, "deep", broken)
    evaluate.run(run)
    greedy = json.loads((run / "eval" / "results.json").read_text())["lossless"]["greedy"]
    assert greedy["identical"] < greedy["texts"]
    assert all(d["first_divergence"] >= 1 and d["logit_gap"] > 0 for d in greedy["divergences"])


def test_what_was_measured_is_on_disk_before_any_proof_and_is_gone_on_from(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path, "evaluate.num_prompts=2")
    plant_heads(run, 2)
    tables = ("prompts", "generations", "rounds", "rivals")

    def out_of_memory(*_):
        assert all((run / "eval" / f"{name}.parquet").exists() for name in tables)
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(evaluate.losslessness, "greedy", out_of_memory)
        with pytest.raises(MemoryError):
            evaluate.run(run)
    assert not (run / "eval" / "results.json").exists()
    with pytest.raises(UserError, match=r"evaluate\.max_new_tokens was 20, is 21"):
        evaluate.run(make_run(tmp_path, "evaluate.num_prompts=2", "evaluate.max_new_tokens=21"))
    before = {name: (run / "eval" / f"{name}.parquet").read_bytes() for name in tables}
    with monkeypatch.context() as untimed:
        untimed.setattr(evaluate, "measure", None)
        evaluate.run(run)
    assert "holds what was measured before" in capsys.readouterr().out
    assert {name: (run / "eval" / f"{name}.parquet").read_bytes() for name in tables} == before
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["lossless"]["greedy"]["passed"] and results["prompts"]["tasks"] and results["device"] == "cpu"
    assert results["heads"][0]["controllers"]["thompson"]["state"]["rounds"] > 0


def test_block_verification_is_used_where_it_is_asked_for(tmp_path, monkeypatch) -> None:
    def refuses(*_):
        raise AssertionError("one by one")

    monkeypatch.setattr(Sampler, "_accept_each", refuses)
    run = make_run(tmp_path, "evaluate.temperatures=[1.0]", "evaluate.block_verification=true")
    plant_heads(run, 2)
    evaluate.run(run)
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["sampling"]["block_verification"] and results["lossless"]["sampling"]["passed"]


def test_what_was_measured_elsewhere_or_under_no_mark_is_measured_again(run, tmp_path, monkeypatch) -> None:
    again = make_run(tmp_path, "evaluate.temperatures=[0.0,1.0]")
    shutil.copytree(run.path, again.path, dirs_exist_ok=True)
    mark = again / "stages" / "evaluate.json"
    mark.write_text(mark.read_text().replace('"done"', '"begun"'))
    assert evaluate._already_measured(again) is not None
    monkeypatch.setattr(evaluate, "environment", lambda: {"hardware": {"cpu": "another"}, "versions": {}})
    assert evaluate._already_measured(again) is None
    monkeypatch.undo()
    mark.unlink()
    assert evaluate._already_measured(again) is None


def test_too_few_conversations_are_said_before_they_are_timed(run, tmp_path, capsys) -> None:
    best = json.loads((run / "eval" / "results.json").read_text())["best"]
    assert (best["speedup_ci95"], best["methods"], best["conversations"], best["prompts"]) == (None, 4, 4, 4)
    text = (run / "report" / "report.md").read_text()
    assert "too few conversations to say whether drafting pays" in text
    assert "not judged: 4 conversations are too few, 8 are needed" in text


def test_bad_input(tmp_path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="holds no exit head: run distill first"):
        evaluate.run(run)
    plant_heads(run, 2)
    with pytest.raises(UserError, match=r"evaluate.controllers=\['fixd:2'\].*must be thompson, fixed:K"):
        evaluate.run(make_run(tmp_path, "evaluate.controllers=[fixd:2]"))
    with pytest.raises(UserError, match=r"does not fit into the context of 256.*too_long=drop"):
        evaluate.run(make_run(tmp_path, "evaluate.max_new_tokens=250"))
    other = tiny_backbone(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="this exit head belongs to tiny"):
        evaluate.run(make_run(tmp_path, f"backbone.name_or_path={other}"))
    with pytest.raises(UserError, match="no CUDA device is visible"):
        evaluate.run(make_run(tmp_path, "machine.device=cuda"))
    assert not (run / "eval").exists() and not list((run / "stages").glob("evaluate*"))


def test_a_device_map_changes_nothing_but_the_place(run, tmp_path) -> None:
    """accelerate lays the backbone over what there is, here the CPU; its hooks stay out of the engine's way."""
    mapped = make_run(tmp_path, "machine.device_map=auto")
    plant_heads(mapped, 2, 3)
    evaluate.run(mapped)
    texts = [
        pd.read_parquet(r / "eval" / "generations.parquet").query("temperature == 0").tokens.map(list).tolist()
        for r in (run, mapped)
    ]
    assert texts[0] == texts[1]


def test_an_unknown_device_map_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"machine\.device_map=by_hand: null, auto, balanced or sequential"):
        make_run(tmp_path, "machine.device_map=by_hand")


def test_thompson_goes_on_from_an_earlier_evaluation(run, tmp_path) -> None:
    results = run / "eval" / "results.json"
    known = next(h for h in json.loads(results.read_text())["heads"] if h["exit_layer"] == 2)["controllers"]["thompson"]
    again = make_run(tmp_path, f"evaluate.states={results}")
    plant_heads(again, 2, 3)
    evaluate.run(again)
    after = json.loads((again / "eval" / "results.json").read_text())["heads"][0]["controllers"]["thompson"]
    assert after["state"]["rounds"] > known["state"]["rounds"] > 0


@pytest.mark.parametrize("what", ["another head", "not json", "missing", "nothing learned"])
def test_a_state_that_cannot_be_used_is_refused(run, tmp_path, what: str) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    path = tmp_path / "results.json"
    if what == "another head":
        results["heads"][0]["head_sha256"] = "0" * 64
    if what == "nothing learned":
        for entry in results["heads"]:
            del entry["controllers"]["thompson"]["state"]
    if what != "missing":
        path.write_text("{" if what == "not json" else json.dumps(results))
    again = make_run(tmp_path, f"evaluate.states={path}")
    plant_heads(again, 2, 3)
    said = {"another head": "learned of another exit head 2 [(]000000000000, not", "nothing learned": "thompson has",
            "missing": "no such file"}  # fmt: skip
    with pytest.raises(UserError, match=said.get(what, "not the results.json of an evaluation")):
        evaluate.run(again)
    assert not (again / "eval").exists()


def test_a_state_in_the_folder_that_would_be_replaced_is_refused(run) -> None:
    again = copy.deepcopy(run.config)
    again.evaluate.states = str(run / "eval" / "results.json")
    with pytest.raises(UserError, match="lies in this run's own eval/, which evaluate replaces"):
        evaluate.check(again)
