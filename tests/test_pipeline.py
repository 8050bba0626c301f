"""All stages through the command line: in one go, killed in the middle of each."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import forked
import pandas as pd
import pytest
from helpers import make_run, plant_heads
from omegaconf import OmegaConf

from pipeline.cli import main
from pipeline.config import to_dict
from pipeline.runs.folder import STAGES, RunDir

ROOT = Path(__file__).resolve().parent.parent


def config_file(run: RunDir, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    return file


def made(run: Path) -> dict[str, object]:
    """What must not depend on interruptions: responses row for row, head weights, greedy ids."""
    shards = sorted((run / "responses").glob("*.parquet"))
    responses = pd.concat([pd.read_parquet(s) for s in shards], ignore_index=True)
    greedy = pd.read_parquet(run / "eval" / "generations.parquet").query("temperature == 0")
    heads = sorted((run / "heads").glob("exit-*/model.safetensors"))
    return {
        "responses": responses.astype(str).to_csv(),
        "heads": [hashlib.sha256(h.read_bytes()).hexdigest() for h in heads],
        "greedy": greedy.sort_values(["exit_layer", "controller", "prompt"]).tokens.map(list).tolist(),
    }


def test_run_makes_everything_and_then_nothing(tmp_path, capsys) -> None:
    run = make_run(
        tmp_path, "publish.min_speedup=0", "distill.teacher=cached", "distill.exit_layers=auto",
        "generate.num_prompts=24", "distill.held_out=0.3",
    )  # fmt: skip
    words = ["run", "--config", str(config_file(run, tmp_path))]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "lossless = yes" in out.replace("\n", " ") and "custom_generate=" in out
    records = json.loads((run / "run.json").read_text())
    assert [r["stage"] for r in records] == list(STAGES)
    assert all(r["versions"]["torch"] and r["command"] and "seconds" in r for r in records)
    before = made(run.path)
    assert main(words) == 0
    again = capsys.readouterr().out
    assert all(f"{stage}: done already" in again for stage in STAGES)
    assert made(run.path) == before
    assert main([*words, "--redo", "evaluate"]) == 0  # remakes evaluate and publish, keeps the rest
    third = capsys.readouterr().out
    assert "cache: done already" in third and "distill: done already" in third and "evaluate: done already" not in third


def test_a_gate_that_refuses_exits_with_3(tmp_path, capsys) -> None:
    run = make_run(tmp_path, "publish.min_speedup=1000")
    plant_heads(run, 2)
    words = ["--config", str(config_file(run, tmp_path))]
    assert main(["evaluate", *words]) == 0
    assert main(["publish", *words]) == 3
    assert "the gate refused exit layer 2" in capsys.readouterr().err


def test_errors_leave_nothing_half_written(tmp_path, capsys) -> None:
    """N out of range is found before anything heavy; a later stage without its input says what to run."""
    run = make_run(tmp_path)
    file = str(config_file(run, tmp_path))
    assert main(["generate", "--config", file]) == 0
    for n in (0, 4, 99):
        assert main(["distill", "--config", file, f"distill.exit_layers=[{n}]"]) == 2
        assert "distill.exit_layers" in capsys.readouterr().err
    assert not (run / "heads").exists()
    assert main(["publish", "--config", file]) == 2
    assert "eval is missing" in capsys.readouterr().err


def cli(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_killed_in_the_middle_of_each_stage_ends_the_same(tmp_path) -> None:
    """SIGKILL once inside generate, cache, distill, evaluate and publish; then the same command to the end."""
    words = [
        "--config", str(ROOT / "configs" / "pocket.yaml"), f"run.dir={tmp_path}", "publish.min_speedup=0",
        "wandb.mode=offline", "generate.num_prompts=96", "generate.shard_size=16", "generate.max_new_tokens=48",
        "distill.exit_layers=[1,4]", "distill.max_steps=30", "distill.sequences_per_step=4",
        "distill.checkpoint_every=5", "distill.validate_every=10", "evaluate.num_prompts=8",
        "evaluate.max_new_tokens=48", "evaluate.temperatures=[0.0]",
    ]  # fmt: skip
    forked.run(cli("run", *words, "run.name=calm"), check=True, env=ENVIRONMENT)
    killed = tmp_path / "killed"
    # When each stage has left its first trace and is still at work, but for publish, which is over in a moment.
    traces = {
        "generate": lambda: len(list(killed.glob("responses/shard-*.parquet"))) >= 2,
        "cache": lambda: (killed / "cache" / "manifest.json").exists(),
        "distill": lambda: any(killed.glob("checkpoints/*")),
        "evaluate": lambda: (killed / "stages" / "evaluate.json").exists(),
        "publish": lambda: (killed / "stages" / "publish.json").exists(),
    }
    for stage, trace in traces.items():
        process = forked.Popen(cli("run", *words, "run.name=killed"), env=ENVIRONMENT)
        deadline = time.time() + 600
        while not trace() and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if stage != "publish":
            state = json.loads((killed / "stages" / f"{stage}.json").read_text())["state"]
            assert state == "begun", f"{stage} was over before it could be killed"
    forked.run(cli("run", *words, "run.name=killed"), check=True, env=ENVIRONMENT)
    assert made(killed) == made(tmp_path / "calm")
    assert not [p for p in killed.rglob(".tmp-*") if "wandb" not in p.parts], (
        "temporary files of the killed stay behind"
    )
