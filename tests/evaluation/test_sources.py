"""A controller that copies drafts from the text too: measured, told in the report, and published like any other."""

import json

import forked
import pandas as pd
import pytest
import torch
from helpers import make_run, plant_heads
from transformers import AutoModelForCausalLM

from pipeline.publishing import parity
from pipeline.stages import evaluate, publish


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(
        tmp_path_factory.mktemp("sources"), "publish.min_speedup=0", "evaluate.max_new_tokens=60",
        'evaluate.controllers=["fixed:2","thompson+lookup"]',
    )  # fmt: skip
    plant_heads(run, 2)
    evaluate.run(run)
    return run


def test_rounds_of_both_sources_are_told_apart(run) -> None:
    rounds = pd.read_parquet(run / "eval" / "rounds.parquet")
    copied = rounds[rounds.source == "lookup"]
    assert set(copied.controller) == {"thompson+lookup"} and (copied.head_passes == 0).all()
    (entry,) = json.loads((run / "eval" / "results.json").read_text())["heads"]
    found = entry["controllers"]["thompson+lookup"]
    assert found["sources"]["lookup"]["drafted"] == copied.drafted.sum() > 0
    assert sum(source["rounds"] for source in found["sources"].values()) == found["rounds"]
    assert "sources" not in entry["controllers"]["fixed:2"]
    own = rounds[(rounds.source == "head") & (rounds.controller == "thompson+lookup")]
    tested = own[own.drafted > 0]
    assert found["conditional_rates"][:1] == pytest.approx([(tested.accepted > 0).mean()])
    assert "of the rounds copied their drafts from the text" in (run / "report" / "report.md").read_text()


def test_it_is_published_and_decodes_in_transformers(run, monkeypatch) -> None:
    path = run / "eval" / "results.json"
    results = json.loads(path.read_text())
    results["best"]["controller"] = "thompson+lookup"  # whichever was faster here
    path.write_text(json.dumps(results))
    monkeypatch.setattr(parity, "subprocess", forked)
    publish.run(run)
    hub = run / "hub" / "2"
    assert (hub / "custom_generate" / "lookup.py").exists() and (hub / "custom_generate" / "sources.py").exists()
    model = AutoModelForCausalLM.from_pretrained(run.config.backbone.name_or_path)
    ids = torch.tensor([[5, 6, 7, 8] * 5])
    plain = model.generate(ids, do_sample=False, max_new_tokens=40)
    for controller in (None, "none+lookup"):
        drafted = model.generate(
            ids, do_sample=False, max_new_tokens=40, custom_generate=str(hub), trust_remote_code=True,
            controller=controller,
        )  # fmt: skip
        assert torch.equal(plain, drafted)
