"""distill.exit_layers=auto: the pilot's choice, and what the later stages make of it."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import make_run
from tqdm import tqdm

from pipeline.backbones.load import load_model
from pipeline.cli import main
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.evaluation import simulation
from pipeline.evaluation.metrics import CostModel
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.planning.gain import candidates
from pipeline.runs.folder import RunDir
from pipeline.stages import cache, distill, generate, pilot
from pipeline.training import packing

AUTO = ["distill.teacher=cached", "distill.exit_layers=auto", "distill.held_out=0.3", "generate.num_prompts=24"]


@pytest.fixture(autouse=True)
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone has 4 layers, a third of which leave one candidate."""
    for module in (pilot, cache):
        monkeypatch.setattr(module, "candidates", lambda layers: [1, 2])


def test_candidates_are_the_first_third_of_the_layers() -> None:
    assert candidates(2) == candidates(4) == [1]
    assert candidates(30) == [1, 2, 3, 4, 6, 8] and candidates(80) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_the_exit_layer_of_the_largest_predicted_speedup_is_trained(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path, *AUTO)
    generate.run(run)
    cache.run(run)
    assert json.loads((run / "cache" / "manifest.json").read_text())["exit_layers"] == [1, 2]
    with pytest.raises(UserError, match="exit-heads pilot"):
        pilot.chosen(run, must_fit=True)
    distill.run(pilot.prepare(run))
    heads = sorted(path.name for path in (run / "pilot" / "heads").iterdir())
    assert heads == ["exit-1", "exit-2"] and not (run / "heads").exists()
    pilot.run(run)
    found = json.loads((run / "pilot" / "choice.json").read_text())
    predicted = {row["exit_layer"]: row["predicted"] for row in found["candidates"]}
    assert found["exit_layer"] == max(predicted, key=predicted.get) and predicted.keys() == {1, 2}
    out = capsys.readouterr().out
    assert f"exit layer {found['exit_layer']} is predicted to pay most" in out and "<- chosen" in out
    assert next(r for r in run.records() if r["stage"] == "pilot")["exit_layer"] == found["exit_layer"]

    (run / "pilot" / "choice.json").write_text(json.dumps(found | {"exit_layer": 1}))  # either may have won
    assert pilot.chosen(run).config.distill.exit_layers == [1]
    distill.run(pilot.chosen(run))
    assert [path.name for path in (run / "heads").iterdir()] == ["exit-1"]
    assert pilot.prepare(run) is None
    pilot.run(run)
    assert "pilot: done already: exit layer 1" in capsys.readouterr().out
    run.redo("pilot")
    assert not (run / "pilot").exists() and (run / "cache" / "manifest.json").exists(), "its links were removed alone"
    assert list((run / "responses").glob("*.parquet"))


def test_the_prompts_are_those_of_the_held_out_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "FEWEST", 1)
    run = make_run(tmp_path, *AUTO)
    generate.run(run)
    answers = pd.concat(map(pd.read_parquet, sorted((run / "responses").glob("shard-*.parquet"))))
    *_, validation, _ = packing.read_packed(run / "responses", run.config.distill)
    held_out = " ".join(map(str, validation.ids_ST.flatten().tolist()))
    known = {tuple(ids) for ids in answers.prompt_ids if " ".join(map(str, ids)) in held_out}
    assert len(known) < len(answers)
    responses = pilot._held_out(run)
    assert len(pilot._spread(responses, pilot.PROMPTS)) <= pilot.PROMPTS and pilot._spread(responses, 99) == responses
    found = [tuple(pilot.prompt_of(d)) for d in responses]
    assert len(found) >= pilot.FEWEST and len(set(found)) == len(found) and set(found) <= known
    by_prompt = {tuple(ids): t for ids, t in zip(answers.prompt_ids, answers.temperature, strict=True)}
    greedy = pilot._of_temperature(run, responses, 0.0)
    assert {by_prompt[tuple(pilot.prompt_of(d))] for d in greedy} == {0.0}
    assert pilot._of_temperature(run, responses, 0.7) == responses, "no answer has that temperature"


def test_replayed_fixed_k_is_that_of_the_decoder(tmp_path: Path) -> None:
    """The pilot's prediction for a response that was written greedily: the decoder's rounds, at the same costs."""
    run = make_run(tmp_path, *AUTO, "generate.temperatures=[0.0]")
    generate.run(run)
    cache.run(run)
    distill.run(pilot.prepare(run))
    model = load_model(run.config.backbone, torch.device("cpu"))
    engine = SplitBackbone(model, ExitHead.load(run / "pilot" / "heads" / "exit-2"))
    costs = {"shallow": 0.1, "head": 0.05, "rest": 0.01, "verify": {"1": 0.9, "2": 1.0, "5": 1.2}}
    for text in pilot._of_temperature(run, pilot._held_out(run), 0.0)[:3]:
        trace = pilot._trace(engine, text, Sampler(), tqdm(disable=True))
        for k in (1, 4):
            request = Request(pilot.prompt_of(text), len(text.tokens) - text.spans[0][0] + 1)
            out = self_speculative(engine, request, Sampler(temperature=0.0), Fixed(k))
            assert out.tokens[:-1] == text.tokens[text.spans[0][0] :]
            replayed = simulation.replay(Fixed(k), trace, trace.acceptance_T > 0.5, CostModel(costs))
            assert len(replayed) > 1
            same = out.rounds[: len(replayed) - 1]  # the decoder was given room for one token more
            assert [r.accepted for r in replayed[:-1]] == [r.accepted for r in same]
            times = [CostModel(costs).round(r.drafted, r.head_passes)[0] for r in same]
            assert [r.seconds for r in replayed[:-1]] == pytest.approx(times)


def test_costs_of_candidates_are_evened_out() -> None:
    def costs(n: int, noise: float) -> dict:
        verify = {"1": 1 - 0.03 * n, "2": 1.1 - 0.03 * n + noise}
        return {"shallow": 0.03 * n + noise, "head": 0.05 + noise, "rest": 0.0, "verify": verify, "unit_seconds": 1.0}

    exact = {n: costs(n, 0.0) for n in (1, 2, 4, 8)}
    assert [c["shallow"] for c in pilot.even(exact).values()] == pytest.approx([0.03 * n for n in exact])
    assert [c["verify"]["2"] for c in pilot.even(exact).values()] == pytest.approx([1.1 - 0.03 * n for n in exact])
    noisy = pilot.even({n: costs(n, 0.02 * (-1) ** i) for i, n in enumerate(exact)})
    assert [c["head"] for c in noisy.values()] == pytest.approx([0.05] * 4)
    assert all(abs(c["shallow"] - 0.03 * n) < 0.02 for n, c in noisy.items()) and noisy[8]["unit_seconds"] == 1.0
    two = {n: costs(n, 0.02) for n in (1, 2)}
    assert pilot.even(two) == two


def test_a_head_may_be_trained_anew_with_the_same_choice(tmp_path: Path) -> None:
    run = make_run(tmp_path, *AUTO)
    generate.run(run)
    cache.run(run)
    distill.run(pilot.prepare(run))
    pilot.run(run)
    again = make_run(tmp_path, *AUTO, "distill.max_steps=6", "distill.learning_rate=0.01", "seed=3")
    assert pilot.prepare(again) is None and pilot.chosen(again, must_fit=True).config.distill.exit_layers
    other = make_run(tmp_path, *AUTO, "distill.draft_vocabulary=64")
    with pytest.raises(UserError, match=r"draft_vocabulary was auto, is 64.*--redo pilot"):
        pilot.chosen(other, must_fit=True)


def test_what_a_killed_pilot_learned_with_another_config_is_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path, *AUTO)
    generate.run(run)
    cache.run(run)
    distill.run(pilot.prepare(run))  # and it is killed before it chooses
    before = (run / "pilot" / "heads" / "exit-1" / "model.safetensors").read_bytes()
    assert pilot.prepare(run) is not None
    assert (run / "pilot" / "heads" / "exit-1" / "model.safetensors").read_bytes() == before, "the same config goes on"
    distill.run(pilot.prepare(make_run(tmp_path, *AUTO, "distill.learning_rate=0.01")))
    assert (run / "pilot" / "heads" / "exit-1" / "model.safetensors").read_bytes() != before


def test_too_few_held_out_responses(tmp_path: Path) -> None:
    run = make_run(tmp_path, *AUTO, "generate.num_prompts=8")
    generate.run(run)
    with pytest.raises(UserError, match=r"exit_layers=auto: [0-3] held-out responses are too few.*num_prompts"):
        pilot._held_out(run)
    cache.run(run)
    with pytest.raises(UserError, match="are too few"):  # before any head is trained
        pilot.prepare(run)
    assert not (run / "pilot").exists()


def test_exit_layers_that_are_given_need_no_pilot(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path)
    assert pilot.prepare(run) is None
    pilot.run(run)
    assert "[2] is given" in capsys.readouterr().out and pilot.chosen(run) is run and not (run / "pilot").exists()


def test_auto_is_written_as_a_word_or_in_yaml_and_needs_the_cache(tmp_path: Path, capsys) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("distill: {exit_layers: auto, teacher: cached}\n")
    assert load(file, []).distill.exit_layers == [] == load(None, AUTO).distill.exit_layers
    assert main(["run", f"run.dir={tmp_path / 'runs'}", "distill.exit_layers=auto"]) == 2
    assert "distill.teacher=online; give distill.teacher=cached" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_one_process_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the pilot takes one"):
        pilot.check(make_run(tmp_path, *AUTO).config)


def test_a_choice_is_read_from_the_folder_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, *AUTO)
    assert pilot.chosen(run).config.distill.exit_layers == []
    (run / "pilot").mkdir()
    (run / "pilot" / "choice.json").write_text('{"exit_layer": 3}')
    again = RunDir(run.config)
    assert pilot.chosen(again).config.distill.exit_layers == [3] and again.config.distill.exit_layers == []
