"""Benchmarks: where one cannot measure it says so; rivals are tuned on other texts than those they are judged by."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.evaluation.metrics import CostModel
from pipeline.inference.backbone import SplitBackbone

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "training.py"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_are_left_out_where_there_is_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--part", "processes", "--device", "cuda"])
    script("training").main()
    assert "processes: left out: two processes need two GPUs, there is 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_measurement() -> None:
    """There is no layer 9 to exit after. The first worker to find out raises; nobody waits for its rate."""
    small = ["--layers", "2", "--hidden", "32", "--vocabulary", "64", "--length", "16", "--exit-layers", "9"]
    command = [sys.executable, str(SCRIPT), "--part", "processes", *small]
    done = subprocess.run(command, cwd=SCRIPT.parent.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "ProcessRaisedException" in done.stderr and "tokens/s" not in done.stdout


def test_a_rival_is_tuned_on_the_other_half_of_the_texts() -> None:
    """`a` is the faster one of even texts, `b` of odd ones: either half gets what the other chose."""
    sums = {"a": np.array([[4, 4, 4, 4], [1, 8, 1, 8]]), "b": np.array([[4, 4, 4, 4], [2, 2, 2, 2]])}
    tuned, chosen = script("controllers").tuned_on_others(sums)
    assert chosen == ["b", "a"] and tuned.tolist() == [[4, 4, 4, 4], [2, 8, 2, 8]]


def test_what_was_timed_is_read_again(tmp_path, monkeypatch) -> None:
    """The second run with the same file times nothing."""
    module = script("controllers")
    args = argparse.Namespace(timings=tmp_path / "t.json", timed=1, tokens=40, clock=["fixed:1", "thompson"])
    model = load(tiny_backbone(tmp_path / "tiny"))
    engine = SplitBackbone(model, head_for(model, 2))
    first = module.timings(engine, [PROMPT], frozenset(), "greedy", args)
    monkeypatch.setattr(module, "clock", None)
    again = module.timings(engine, [PROMPT], frozenset(), "greedy", args)
    assert again["wall"].keys() == first["wall"].keys() and again["own"] == first["own"]
    assert CostModel(again["costs"]).round(3, 3) == CostModel(first["costs"]).round(3, 3)
    args.tokens = 41
    with pytest.raises(SystemExit, match=r"was timed with .*'tokens': '40'"):
        module.timings(engine, [PROMPT], frozenset(), "greedy", args)
