"""The oracle's speedup of a head, from the texts of the baseline alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_run, plant_heads

from pipeline.backbones.load import load_model
from pipeline.evaluation import bound, simulation
from pipeline.evaluation.measuring import Measured
from pipeline.evaluation.metrics import CostModel
from pipeline.evaluation.results import of_oracle
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.stages import evaluate

COSTS = {"shallow": 0.1, "head": 0.05, "verify": {1: 0.9, 5: 1.0}, "rest": 0.01}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("bound"), "evaluate.temperatures=[0.0,1.0]")
    plant_heads(run, 2)
    evaluate.run(run)
    model = load_model(run.config.backbone, torch.device("cpu"))
    engine = SplitBackbone(model, ExitHead.load(run / "heads" / "exit-2"))
    return run, engine, Measured.load(run / "eval")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_that_of_a_recorded_trace(measured, temperature: float) -> None:
    _, engine, found = measured
    texts = found.generations.query(f"controller == 'autoregressive' and temperature == {temperature}")
    ids = dict(zip(found.prompts.prompt, found.prompts.ids, strict=True))
    for row in texts.head(3).itertuples():
        sampler = Sampler(temperature, generator=torch.Generator().manual_seed(0))
        trace = simulation.record(engine, row.prompt, ids[row.prompt], row.tokens, sampler, 20)
        assert np.allclose(bound.acceptance(engine, ids[row.prompt], row.tokens, sampler), trace.acceptance_T)


def test_no_controller_exceeds_it(measured) -> None:
    """Greedy texts with the same costs: rounds are determined, so the inequality is exact."""
    _, engine, found = measured
    ids = dict(zip(found.prompts.prompt, found.prompts.ids, strict=True))
    greedy = found.generations[found.generations.temperature == 0]
    best = bound.speedup(engine, ids, greedy, Sampler(), COSTS, 20, seed=0)
    own = greedy[greedy.controller == "autoregressive"]
    traces = [simulation.record(engine, r.prompt, ids[r.prompt], r.tokens, Sampler(), 20) for r in own.itertuples()]
    traces = [trace for trace in traces if len(trace) > 1]
    outcomes = simulation.outcomes(traces, 0)
    for name in ("fixed:0", "fixed:1", "fixed:3", "thompson"):
        tokens, seconds = simulation.play(lambda name=name: make_controller(name), traces, outcomes, CostModel(COSTS))
        assert tokens.sum() / seconds.sum() <= best + 1e-9
    least = sum(simulation.oracle(t, a, CostModel(COSTS)) for t, a in zip(traces, outcomes, strict=True))
    assert best == pytest.approx(sum(len(t) - 1 for t in traces) / least)


def test_texts_of_one_token_have_no_bound(measured) -> None:
    _, engine, found = measured
    ids = dict(zip(found.prompts.prompt, found.prompts.ids, strict=True))
    ended = found.generations[found.generations.temperature == 0].assign(tokens=lambda t: t.tokens.map(lambda x: x[:1]))
    assert bound.speedup(engine, ids, ended, Sampler(), COSTS, 20, seed=0) is None


def test_results_have_it_and_all_outputs_say_it(measured) -> None:
    run, *_ = measured
    results = json.loads(Path(run / "eval" / "results.json").read_text())
    assert len(results["heads"]) == 2 and all(entry["oracle_speedup"] > 0 for entry in results["heads"])
    report = (run / "report" / "report.md").read_text()
    for entry in results["heads"]:
        assert of_oracle(entry) in report and f"{entry['oracle_speedup']:.2f}" in of_oracle(entry)
    assert of_oracle({"controllers": {}}) == "", "results of an older version"
