"""The table of `exit-heads heads`: a row for each exit head of the runs in one folder, and for each run without one.

Takes the folder that holds the run folders; prints the table. It only reads marks, records and results, and loads no
model, so it is fast and works on read-only disks.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from . import results as evaluated

COLUMNS = ("run", "state", "backbone", "exit layer", "controller", "speedup (95%)", "acceptance length", "lossless",
           "published")  # fmt: skip
DONE = {"generate": "answered", "cache": "cached", "pilot": "exit layer chosen", "distill": "distilled",
        "evaluate": "evaluated", "publish": "published"}  # fmt: skip
NOTHING = "-"
WIDTH = 500  # maximum number of terminal columns: wrapped lines are better than truncated ones


def show(runs: Path) -> None:
    """Print the table, with runs in the order of their names."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name.replace(" ", "\n"), no_wrap=True)
    found = sorted(p.parent for p in runs.glob("*/stages") if p.is_dir())
    for run in found:
        for row in rows(run):
            table.add_row(*(row[name] for name in COLUMNS))
    if found:
        Console(markup=False, highlight=False, width=WIDTH).print(table, crop=False)
    else:
        print(f"{runs} holds no run folders yet; `exit-heads run` makes one")


def rows(run: Path) -> list[dict[str, str]]:
    """Rows of a run, with COLUMNS as keys: one for each exit layer, or a single one with the run's state."""
    blank = dict.fromkeys(COLUMNS, NOTHING) | {"run": run.name}
    try:
        marks = {stage: _read(run / "stages" / f"{stage}.json") for stage in DONE}
        blank |= {"state": _state(marks), "backbone": _backbone(run / "config.yaml")}
        heads = _measured(run) if _is_done(marks["evaluate"]) else _trained(run)
        published = _published(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return [blank | {"state": f"cannot be read: {error!r}"[:60]}]
    return [
        blank | figures | {"exit layer": str(n), "published": published.get(n, NOTHING)} for n, figures in heads.items()
    ] or [blank]


def _state(marks: dict[str, Any]) -> str:
    """The state of the last stage that was begun."""
    begun = [(stage, mark) for stage, mark in marks.items() if mark is not None]
    if not begun:
        return "nothing begun"
    stage, mark = begun[-1]
    return DONE[stage] if _is_done(mark) else f"{stage} begun"


def _backbone(config: Path) -> str:
    """The backbone's name in the newest config; for an absolute path only its last part."""
    if not config.exists():
        return NOTHING
    name = yaml.safe_load(config.read_text())["backbone"]["name_or_path"]
    return Path(name).name if Path(name).is_absolute() else name


def _trained(run: Path) -> dict[int, dict[str, str]]:
    """Exit layer -> an empty row, for heads that were trained but not evaluated."""
    return {n: {} for n in sorted(int(p.name.split("-")[1]) for p in run.glob("heads/exit-*"))}


def _measured(run: Path) -> dict[int, dict[str, str]]:
    """Exit layer -> the judged figures of its fastest controller, at the temperature of `best` in results.json."""
    results = _read(run / "eval" / "results.json")
    if results["schema"] != evaluated.SCHEMA:
        stale = {"state": f"evaluated by another version; {evaluated.ANEW}"}
        return dict.fromkeys(sorted({entry["exit_layer"] for entry in results["heads"]}), stale)
    found = {}
    for entry in results["heads"]:
        if entry["temperature"] == results["best"]["temperature"]:
            name, best = max(entry["controllers"].items(), key=lambda item: item[1]["speedup"])
            joint = best["speedup_joint_ci95"]
            interval = "not judged" if joint is None else f"{joint[0]:.2f}-{joint[1]:.2f}"
            found[entry["exit_layer"]] = {
                "backbone": results["backbone"]["name"],
                "controller": name,
                "speedup (95%)": f"{best['speedup']:.2f} ({interval})",
                "acceptance length": f"{best['acceptance_length']:.2f}",
                "lossless": "yes" if evaluated.is_lossless(results) else "no",
            }
    return found


def _published(run: Path) -> dict[int, str]:
    """Exit layer -> the repo and tag that the head was last pushed as, or its folder if it was not pushed."""
    places = {}
    for folder in run.glob("hub/*"):
        if folder.name.isdigit():
            repo = pushed(run, folder)
            places[int(folder.name)] = f"{repo['repo_id']}@{repo['tag']}" if repo else str(folder)
    return places


def pushed(run: Path, folder: Path) -> dict[str, str] | None:
    """repo_id, tag and commit of the push of this folder of the run; None if its present contents were never pushed.

    The mark of a push is removed when the folder is written anew; the records of earlier pushes stay.
    """
    name, mark = folder.relative_to(run).as_posix(), _read(run / "stages" / "push.json")
    if not _is_done(mark) or name not in mark["inputs"]:
        return None
    records = [r for r in _read(run / "run.json") or [] if "pushed" in r and r["inputs"] == mark["inputs"]]
    return records[-1]["pushed"] if records else None


def _is_done(mark: Any) -> bool:
    return mark is not None and mark["state"] == "done"


def _read(file: Path) -> Any:
    """The contents of a JSON file; None if it does not exist."""
    return json.loads(file.read_text()) if file.exists() else None
