"""benchmarks/training.py where it cannot measure: it says so, and never waits for what will not come."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "training.py"


def test_two_processes_are_left_out_where_there_is_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--part", "processes", "--device", "cuda"])
    spec = importlib.util.spec_from_file_location("benchmark_of_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert "processes: left out: two processes need two GPUs, there is 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_measurement() -> None:
    """There is no layer 9 to exit after. The first worker to find out raises; nobody waits for its rate."""
    small = ["--layers", "2", "--hidden", "32", "--vocabulary", "64", "--length", "16", "--exit-layers", "9"]
    command = [sys.executable, str(SCRIPT), "--part", "processes", *small]
    done = subprocess.run(command, cwd=SCRIPT.parent.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "ProcessRaisedException" in done.stderr and "tokens/s" not in done.stdout
