"""The run folder: the paths of each stage's files, and whether a stage is done.

Takes a Config; gives paths, done marks and provenance records. A mark holds the config keys that a stage depends on and
the hashes of its inputs: a rerun with the same values does nothing, a rerun with others is refused, and --redo removes
the mark and the stage's files.

    runs/<name>/
      config.yaml  run.json             the newest resolved config; one provenance record per stage run
      stages/<stage>.json               begun or done, of which config and inputs
      responses/  cache/  pilot/  heads/  checkpoints/  eval/  report/  hub/  metrics.jsonl  logs/  wandb/
"""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from ..config import Config, to_dict
from ..errors import GateError, UserError
from .files import TEMPORARY, atomic_write, remove, sha256_of, who
from .presence import Presence
from .provenance import provenance

STAGES = ("generate", "cache", "pilot", "distill", "evaluate", "publish")
SHARED = ("generate", "cache")
"""Stages that any number of processes may work on together."""

# The config that a stage depends on: sections or single keys. A change of other keys leaves the stage done.
SUBTREES = {
    "generate": ("seed", "backbone", "prompts", "generate"),
    # Which tokens the teacher reads; which layers it keeps stands in the manifest, as distill may take fewer.
    "cache": (
        "backbone",
        *(f"distill.{key}" for key in ("sequence_length", "truncated", "repeated_share", "held_out")),
    ),
    # What was answered, and how it is packed. The choice outlives other steps and rates, for a head to be made anew.
    "pilot": (
        "backbone",
        *(
            f"distill.{key}"
            for key in ("sequence_length", "truncated", "repeated_share", "held_out", "draft_vocabulary")
        ),
    ),
    "distill": ("seed", "backbone", "distill"),
    "evaluate": ("seed", "backbone", "prompts", "evaluate"),
    "publish": ("backbone", "publish"),
    "draft": ("backbone", "publish"),
    "push": (),
    "push-draft": (),
}

# Keys of these that say only where files go: the stage stays done.
NEVER_STALE = ("publish.target", "publish.public", "backbone.gguf_dir")

NUMBERS = ("[0-9]", "[0-9][0-9]", "[0-9][0-9][0-9]")
"""Glob patterns of an exit layer's digits: --redo of the heads must not remove a draft model in the same folder."""

# Glob patterns of the files that each stage writes and --redo removes. Logs are kept.
OUTPUTS = {
    "generate": ("responses",),
    "cache": ("cache",),
    "pilot": ("pilot",),
    "distill": ("heads", "checkpoints", "metrics.jsonl", "wandb"),
    "evaluate": ("eval", "report"),
    "publish": (*(f"hub/{n}" for n in NUMBERS), "stages/push.json"),
    "draft": (*(f"hub/{n}-draft" for n in NUMBERS), "stages/push-draft.json"),
    "push": (),
    "push-draft": (),
}


class RunDir:
    """Paths and done marks of one run. Raises UserError if the folder cannot be written to.

    With `look_only` nothing will be written, so the folder is neither created nor tested for writing.
    """

    def __init__(self, config: Config, look_only: bool = False):
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.presence = Presence(self.path / "stages")
        if look_only:
            return
        try:
            (self.path / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.path / "stages" / f".probe-{who()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"run.dir={config.run.dir}: cannot write to {self.path}: {error.strerror}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ---- is this stage done, and for which config and inputs?

    def plan(self, stage: str, inputs: list[Path], outside: dict[str, Any] | None = None) -> bool:
        """True if the stage must run, from its beginning or from where it was killed; False if it is done.

        `outside` is what identifies inputs that are not in the run folder, such as the sha256 of a prompt file.
        Raises UserError when a missing input has to be made first, or when the stage was begun with another
        config or other inputs: the message names every difference and the ways out.
        """
        missing = [p for p in inputs if not p.exists()]
        if missing:
            raise UserError(f"{missing[0]} is missing: run the stage that makes it first, or `exit-heads run`.")
        now = self._now(stage, inputs, outside)
        mark = self._read_mark(stage)
        if mark is None:
            return True
        changed = _differences(mark["config"], now["config"]) + _differences(mark["inputs"], now["inputs"])
        if changed:
            raise UserError(
                f"stage {stage} of {self.path} was made with other values: {'; '.join(changed)}. "
                f"Give another run.name to keep it, or --redo {stage} to make it anew."
            )
        return mark["state"] != "done"

    def is_done(self, stage: str, inputs: list[Path], outside: dict[str, Any] | None = None) -> bool:
        """True if the stage was done with this config and these inputs; False otherwise, without an error."""
        return self._read_mark(stage) == {"state": "done", **self._now(stage, inputs, outside)}

    def is_begun(self, stage: str) -> bool:
        """True if an earlier run of the stage ended before it was done; `plan` says whether it may be resumed."""
        mark = self._read_mark(stage)
        return mark is not None and mark["state"] == "begun"

    @contextlib.contextmanager
    def stage(
        self, stage: str, inputs: list[Path], outside: dict[str, Any] | None = None, *, shared: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Context manager: marks the stage begun, gives a dict for the record's results, marks it done at the end.

        `shared`: other processes may run the same stage now, so their temporary files are kept.

        A UserError or GateError before anything was written removes a new mark again, so that the user can change the
        config without --redo. Once there is unfinished work the mark stays: that work belongs to this config.
        """
        with self.presence.shared(stage) if shared else self.presence.alone(stage):
            yield from self._marked(stage, inputs, outside, shared)

    def _marked(
        self, stage: str, inputs: list[Path], outside: dict[str, Any] | None, shared: bool
    ) -> Iterator[dict[str, Any]]:
        """`stage` without the exclusion of other processes."""
        now = self._now(stage, inputs, outside)
        if not shared:
            self._sweep(stage)
        atomic_write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
        fresh = self._read_mark(stage) is None
        self._write_mark(stage, {"state": "begun", **now})
        record = {"stage": stage, **provenance(), "config": now["config"], "inputs": now["inputs"]}
        started = time.time()
        summary: dict[str, Any] = {}
        try:
            yield summary
        except (UserError, GateError):
            if fresh and not self._has_output(stage):
                self._mark(stage).unlink()
            raise
        record |= {"seconds": round(time.time() - started, 1), **summary}
        with FileLock(self.path / "stages" / ".run.json.lock"):
            atomic_write(self.path / "run.json", json.dumps([*self.records(), record], indent=1) + "\n")
        self._write_mark(stage, {"state": "done", **now})

    def records(self) -> list[dict[str, Any]]:
        """The provenance records of all successful stage runs, the newest last."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else []

    def _has_output(self, stage: str) -> bool:
        return any(p.is_file() or any(f.is_file() for f in p.rglob("*")) for p in self._outputs(stage))

    def _outputs(self, stage: str) -> list[Path]:
        return [path for pattern in OUTPUTS[stage] for path in self.path.glob(pattern)]

    def redo(self, *stages: str) -> None:
        """Remove the marks and files of these stages.

        Raises UserError, and removes nothing, if another process runs one of them, or a later stage that may be reading
        their files.
        """
        order = list(OUTPUTS)
        with self.presence.alone(*order[min(map(order.index, stages)) :]):
            for stage in stages:
                for target in self._outputs(stage):
                    remove(target)
                self._mark(stage).unlink(missing_ok=True)

    def at(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Context manager around a process's whole part in a shared stage; meanwhile --redo cannot remove the stage."""
        return self.presence.shared(stage) if stage in SHARED else contextlib.nullcontext()

    def _sweep(self, stage: str) -> None:
        """Remove the temporary files that a killed run of this stage left."""
        for folder, _, name in (pattern.rpartition("/") for pattern in OUTPUTS[stage]):
            for path in (self.path / folder).glob(f"{TEMPORARY}{name}@*"):
                remove(path)
        for target in self._outputs(stage):
            for path in target.rglob(f"{TEMPORARY}*"):
                remove(path)

    def _now(self, stage: str, inputs: list[Path], outside: dict[str, Any] | None) -> dict[str, Any]:
        tree = to_dict(self.config)
        return {
            "config": {key: reduce(dict.__getitem__, key.split("."), tree) for key in SUBTREES[stage]},
            "inputs": {p.relative_to(self.path).as_posix(): sha256_of(p) for p in inputs} | (outside or {}),
        }

    def _mark(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _read_mark(self, stage: str) -> dict[str, Any] | None:
        return json.loads(self._mark(stage).read_text()) if self._mark(stage).exists() else None

    def _write_mark(self, stage: str, mark: dict[str, Any]) -> None:
        atomic_write(self._mark(stage), json.dumps(mark, indent=1) + "\n")


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if key in NEVER_STALE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _are_dicts(old + new):
        return [d for i, (o, n) in enumerate(zip(old, new, strict=True)) for d in _differences(o, n, f"{key}[{i}]")]
    if old is None and (new == [] or new is False):  # the mark is older than this key
        return []
    return [] if old == new else [f"{key} was {_short(old)}, is {_short(new)}"]


def _are_dicts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
