"""What every test gets: no network, no GPU unless marked, quiet libraries, two fixtures for run folders.

`slow` and `gpu` are declared in pyproject.toml; a gpu test is skipped where there is no CUDA device.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

# Before torch, transformers or wandb are imported anywhere: nothing may reach out, prompt or fight for cores.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.pop("WANDB_API_KEY", None)

import pytest

from pipeline.config import Config, load

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Take the modules out of the garbage collector's sight: they stay, and each full collection would go through a
    million objects of theirs (a third of a second, and the stages collect at every decoded method)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def pocket_run(tmp_path_factory) -> Path:
    """The run folder of a small demo: the pocket backbone, its answers, heads trained for a moment, published by force.

    Half a minute on one core; for slow tests that look at or use what a whole run leaves.
    """
    folder = tmp_path_factory.mktemp("pocket")
    words = [
        "--config", str(ROOT / "configs" / "pocket.yaml"), f"run.dir={folder}", "wandb.mode=disabled",
        "generate.num_prompts=24", "generate.shard_size=12", "generate.max_new_tokens=24", "distill.exit_layers=[2]",
        "distill.max_steps=20", "distill.validate_every=5", "distill.checkpoint_every=20", "evaluate.num_prompts=3",
        "evaluate.max_new_tokens=24", "publish.force=true",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", *words], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "pocket"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The default config, with its run folder under tmp_path."""
    return load(None, [f"run.dir={tmp_path}", "run.name=test"])
