"""Metrics: written to metrics.jsonl and report/ in any case, and mirrored to Weights & Biases.

Takes a step and a dict of numbers, appends one JSON line and logs the same to W&B; takes the blocks of a report and
logs its tables and pictures to the same W&B run. W&B never prompts the user, and delays a stage by no more than the
time limits below. wandb_settings.py decides where it writes and sends; all it gets has passed through anonymous.py.
"""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import to_dict
from ..errors import warn
from .anonymous import anonymous
from .files import atomic_path, atomic_write
from .folder import RunDir
from .wandb_resume import readable_steps
from .wandb_settings import init_arguments, set_folders, wandb_root

INIT_TIMEOUT = 20.0  # seconds to reach the server before going on offline
FINISH_TIMEOUT = 120.0  # seconds for the last upload; the rest stays in the run folder for `wandb sync`
Block = tuple[str, Any]  # (kind, content) of a part of a report: report.py defines both


class Tracker:
    """Writes metrics.jsonl and the W&B run of one distill stage. On ranks other than 0 it does nothing."""

    def __init__(self, run: RunDir, enabled: bool):
        self.run, self.enabled = run, enabled
        self.path = run / "metrics.jsonl"
        self.file: Any = None
        self.wandb: Any = None

    def start(self, step: int) -> None:
        """Open both; lines of steps after `step` are dropped, as a resumed run computes them again.

        W&B writes a step only when the next one begins, so steps that a killed run logged may be missing from its
        files: these are logged again.
        """
        if not self.enabled:
            return
        kept = _lines_up_to(self.path, step) if self.path.exists() else []
        atomic_write(self.path, "".join(kept))
        self.file = self.path.open("a")
        self.wandb = start_wandb(self.run, "distill")
        for figures in _lacking(self.wandb, kept, wandb_root(self.run / "wandb")):
            self._mirror(figures.pop("step"), figures)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Append one line {"step": step, ...} to metrics.jsonl, flushed at once, and mirror it to W&B."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        self._mirror(step, figures)

    def _mirror(self, step: int, figures: dict[str, float]) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.log(figures, step=step)
        except Exception as error:  # W&B's own process has ended, as by a signal to the whole job
            warn("distill", f"W&B failed ({type(error).__name__}); the run folder has every figure")
            self.wandb = None
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()  # lets a later run in this process start a new one

    def finish(self, failed: bool = False) -> None:
        """Close both. Further calls do nothing."""
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            _not_for_ever(lambda: self.wandb.finish(int(failed)), self.run, "distill")
        self.file = self.wandb = None


def mirror_report(run: RunDir, summary: dict[str, Any], page: list[Block], folder: Path) -> None:
    """Log the tables, pictures and summary of evaluate's report to the W&B run of this run folder.

    Pictures are read from `folder`. An error or a time-out of W&B is a warning: the run folder has the report anyway.
    """

    def mirror() -> None:
        wandb_run = start_wandb(run, "evaluate")
        if wandb_run is None:
            return
        try:
            wandb_run.summary.update(anonymous(summary))
            # After distill's last step: an offline run begins at 0 and is merged with distill's by `wandb sync`.
            wandb_run.log(
                _media(anonymous(page), folder), step=max(wandb_run.step, _last_step(run / "metrics.jsonl") + 1)
            )
        finally:
            wandb_run.finish()

    _not_for_ever(mirror, run, "evaluate")


def _media(page: list[Block], folder: Path) -> dict[str, Any]:
    """W&B's media by name: tables are named by the headings above them, pictures by their files."""
    import wandb

    media: dict[str, Any] = {}
    headings = {"h2": "", "h3": ""}
    for kind, content in page:
        if kind in headings:
            headings |= {"h2": content, "h3": ""} if kind == "h2" else {"h3": content}
        elif kind == "image":
            media[f"report/{Path(content[0]).stem}"] = wandb.Image(str(folder / content[0]), caption=content[1])
        elif kind == "table":
            header, *body = content
            name = "report/" + ", ".join(filter(None, headings.values()))
            while name in media:
                name += "'"
            media[name] = wandb.Table(columns=header, data=body)
    return media


def _last_step(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def _not_for_ever(call: Callable[[], object], run: RunDir, stage: str) -> None:
    """Call it, and go on after an error or FINISH_TIMEOUT seconds: W&B may wait for an unreachable server for ever."""

    def guarded() -> None:
        try:
            call()
        except Exception as error:  # wandb raises its own, pydantic's and the network's
            warn(stage, f"W&B failed ({type(error).__name__}); the run folder has every figure")

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(FINISH_TIMEOUT)
    if thread.is_alive():
        warn(stage, f"W&B did not answer for {FINISH_TIMEOUT:.0f} s; its files are in {run / 'wandb'}")


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a partial line, written by a killed process
    return kept


def _lacking(wandb_run: Any, lines: list[str], folder: Path) -> list[dict[str, Any]]:
    """The figures of those lines of metrics.jsonl whose steps are missing from W&B's server, or from its files."""
    if wandb_run is None or not lines:
        return []
    figures = [json.loads(line) for line in lines]
    if not wandb_run.offline:
        return [each for each in figures if each["step"] >= wandb_run.step]
    written = {step for file in folder.rglob(f"run-{wandb_run.id}.wandb") for step in readable_steps(file)}
    return [each for each in figures if each["step"] not in written]


def start_wandb(run: RunDir, stage: str) -> Any:
    """A W&B run; None for wandb.mode=disabled and if W&B fails. The run folder has all figures in any case."""
    asked = init_arguments(run.config.wandb)
    if asked.mode == "disabled":
        return None
    (run / "wandb").mkdir(parents=True, exist_ok=True)
    set_folders(run / "wandb")
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    server = {} if asked.base_url is None else {"base_url": asked.base_url}

    def init(mode: Any) -> Any:
        return wandb.init(
            project=asked.project,
            entity=asked.entity,
            name=run.config.run.name,
            id=wandb_id(run / "wandb"),
            resume="allow" if mode == "online" else None,
            dir=str(wandb_root(run / "wandb")),
            mode=mode,
            config=anonymous(to_dict(run.config)),
            settings=wandb.Settings(
                silent=True,
                quiet=True,
                console="off",
                init_timeout=INIT_TIMEOUT,
                login_timeout=INIT_TIMEOUT,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # command line, program and user
                x_disable_machine_info=True,
                host="",
                **server,
                x_transaction_log_flush_interval=1,  # seconds; a killed run loses no more than this
            ),
        )

    try:
        return init(asked.mode)
    except Exception as error:  # wandb raises its own, pydantic's and the network's
        if asked.mode == "offline":
            warn(stage, f"W&B cannot start ({type(error).__name__}); the run folder has every figure")
            return None
        warn(stage, f"W&B cannot be reached ({type(error).__name__}); going on offline, `wandb sync` sends it later")
    wandb.teardown()
    try:
        return init("offline")
    except Exception as error:
        warn(stage, f"W&B cannot start ({type(error).__name__}); the run folder has every figure")
        return None


def wandb_id(folder: Path) -> str:
    """The W&B run id of this folder, under which a resumed run and evaluate log too.

    The id is random and stored in the folder, which --redo distill removes: W&B would drop the steps of a new training
    under an old id. A hash of the path would not do: in containers two users may have the same path.
    """
    path = folder / "run-id"
    if not path.exists():
        with atomic_path(path, once=True) as temporary:
            temporary.write_text(f"exit-heads-{secrets.token_hex(6)}\n")
    return path.read_text().strip()
