"""Reads the metrics of a run folder: metrics.jsonl, and W&B's offline files with W&B's own reader."""

import json
import subprocess
import sys

from pipeline.runs.folder import RunDir


def segments(run: RunDir) -> list[list[dict]]:
    """The records of each of W&B's offline files, in order, as W&B's own reader prints them."""
    found = []
    for folder in sorted((run / "wandb").rglob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found.append([json.loads(line) for line in lines])
    return found


def rows(segment: list[dict]) -> dict[int, dict[str, float]]:
    """Step -> figures, from the history records of a file."""
    items = [record["history"]["item"] for record in segment if "history" in record]
    return {item["_step"]: {k: v for k, v in item.items() if not k.startswith("_")} for item in items}


def lines(run: RunDir) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        found.setdefault(figures.pop("step"), {}).update(figures)
    return found
