"""Lightning callbacks around the training steps: speed, logging, validation, checkpoints, signals, the progress bar.

They take the Trainer's hooks and write metrics.jsonl and checkpoints. At the end of a step they act in the order in
which stages/distill.py lists them: measure, log and validate, save, stop on a signal. `Signals` comes first, so that a
signal during the first validation is caught.
"""

import math
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from ..runs.tracking import Tracker
from .module import Distillation

WARM_UP_STEPS = 2  # left out of the averages: they pay for allocating memory and choosing kernels


class Throughput(Callback):
    """Tokens per second, and the time of a step over the time of the teacher's forward pass and logits in it.

    A step is timed from the batch to the updated weights; validation and saving are not part of it.
    """

    def __init__(self) -> None:
        self.since_start = 0
        self.last: dict[str, float] = {}
        self.total = {"seconds": 0.0, "teacher_seconds": 0.0, "timed_tokens": 0, "tokens": 0, "rows": 0}

    def on_train_batch_start(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        module.step_model.stopwatch.start()  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        stopwatch = module.step_model.stopwatch  # type: ignore[union-attr]
        stopwatch.mark("rest")
        parts = stopwatch.read()  # waits for the GPU
        seconds, teacher = sum(parts.values()), parts["teacher"]
        self.last = {"tokens_per_second": module.step_tokens / seconds}
        if module.cached_teacher is None:  # with a cached teacher, a step computes only its logits
            self.last["step_over_teacher"] = seconds / teacher
        self.total["tokens"] += module.step_tokens
        self.total["rows"] += module.step_rows
        self.since_start += 1
        if self.since_start > WARM_UP_STEPS:
            self.total["seconds"] += seconds
            self.total["teacher_seconds"] += teacher
            self.total["timed_tokens"] += module.step_tokens

    def averages(self) -> dict[str, float | None]:
        """The averages over all steps but the first two after each start; None if there were no others."""
        t = self.total
        if not t["seconds"]:
            return {"tokens_per_second": None, "step_over_teacher": None}
        ratio = round(t["seconds"] / t["teacher_seconds"], 3) if "step_over_teacher" in self.last else None
        return {"tokens_per_second": round(t["timed_tokens"] / t["seconds"], 1), "step_over_teacher": ratio}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.total)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = dict(state)


class Recorder(Callback):
    """Logs every step; validates before the first step, every `validate_every` steps and after the last; shows both."""

    def __init__(self, tracker: Tracker, throughput: Throughput, validate_every: int, max_steps: int, shown: bool):
        self.tracker, self.throughput = tracker, throughput
        self.validate_every, self.max_steps = validate_every, max_steps
        self.shown = shown
        self.bar: Any = None
        self.lengths: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, module: Distillation) -> None:  # type: ignore[override]
        done = trainer.global_step
        # A checkpoint may precede the first validation, which then validates and logs step 0 again.
        self.tracker.start(done if module.validated_step >= 0 else -1)
        if self.shown:
            self.bar = tqdm(total=self.max_steps, initial=done, desc="distill", unit="step", disable=None)
        if module.validated_step < 0:
            self._validate(module, 0)
        if not module.learning:  # the run was killed between its last checkpoint and writing its heads
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        self._log(step, module.train_figures() | self.throughput.last)
        self._show_skips(module, step)
        if step % self.validate_every == 0 or step == self.max_steps:
            learning = module.learning
            self._validate(module, step)
            self._show_stopped(module, step, set(learning) - set(module.learning))
        if self.bar is not None:
            losses = {n: f"{loss:.3f} -> {self.lengths.get(n, '?')}" for n, loss in module.losses.items()}
            self.bar.set_postfix(losses, refresh=False)
            self.bar.update(1)
        if not module.learning:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: Distillation) -> None:  # type: ignore[override]
        self._close()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._close(failed=True)

    def _log(self, step: int, figures: dict[str, float]) -> None:
        """Figures that are not finite are left out: JSON has no such numbers."""
        self.tracker.log(step, {name: value for name, value in figures.items() if math.isfinite(value)})

    def _validate(self, module: Distillation, step: int) -> None:
        figures = module.validate(step)
        self._log(step, figures)
        lengths = {n: figures.get(f"val/{n}/expected_acceptance_length") for n in module.names}
        self.lengths = {n: f"{length:.2f}" for n, length in lengths.items() if length is not None}
        if self.bar is not None and self.bar.disable:  # there is no terminal: print lines
            heads = ", ".join(f"{n} {figures[f'val/{n}/loss']:.3f} -> {length}" for n, length in self.lengths.items())
            what = "held-out loss -> expected acceptance length"
            print(f"distill: step {step}/{self.max_steps}, {what}: {heads}", flush=True)

    def _show_skips(self, module: Distillation, step: int) -> None:
        """One line at the first of the steps in a row that a head skips."""
        for name in module.losses if self.shown else ():
            if module.skipped_in_row[name] == 1:
                line = f"distill: step {step}/{self.max_steps}, {name}: loss or gradient is not finite; step skipped"
                tqdm.write(line, file=sys.stderr)

    def _show_stopped(self, module: Distillation, step: int, stopped: set[str]) -> None:
        if not self.shown or not stopped or step == self.max_steps:
            return
        bests = ", ".join(f"{n} (best at step {module.best[n]['step']})" for n in sorted(stopped))
        rest = f"{', '.join(module.learning)} still learning" if module.learning else "no head learns any more: the end"
        tqdm.write(f"distill: step {step}/{self.max_steps}, stopped: {bests}; {rest}")

    def _close(self, failed: bool = False) -> None:
        if self.bar is not None:
            self.bar.close()
        self.tracker.finish(failed)


class Checkpoints(Callback):
    """Saves every `every` steps and at the end: heads, optimizer, random generators, best weights, step.

    The last two checkpoints are kept; every other is removed, also a damaged one that was passed over and those of
    later steps, which are done again.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder, self.every, self.keep = folder, every, keep
        self.kept: list[Path] = []
        """Paths of the checkpoints to keep, oldest first. A run that resumes adds the checkpoint it resumes from."""

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % self.every == 0 or module.finished:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Collective: all processes must call it, at the same step."""
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self.kept = [*(p for p in self.kept if p != path), path][-self.keep :]
        if trainer.is_global_zero:
            for other in set(self.folder.glob("step-*.ckpt")) - set(self.kept):
                other.unlink()
        return path


class Signals(Callback):
    """Handlers of SIGUSR1, SIGTERM and SIGINT that only set a flag, from before the first validation on.

    Saving and stopping are collective, and a signal reaches the processes at different moments, so `Preemption` acts on
    the flag at the end of a step. Lightning's own handler, which these replace, would start a collective at once, and
    would end a run that is still validating as if it were done. A second Ctrl-C ends the process.
    """

    def __init__(self) -> None:
        self.flag = 0
        """Number of the signal that this process has received, or 0."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        try:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # this is not the main thread, as in some notebooks: signals do not arrive here

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._restore()

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.flag == signal.SIGINT:
            raise KeyboardInterrupt
        self.flag = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class Preemption(Callback):
    """At the end of a step: if any process has received a signal, save a checkpoint and stop."""

    def __init__(self, checkpoints: Checkpoints, signals: Signals):
        self.checkpoints, self.signals = checkpoints, signals
        self.received = 0
        """Number of the signal that stopped the run, or 0."""
        self.saved: Path | None = None

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        flag = torch.tensor([self.signals.flag], device=module.device)
        if trainer.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not (received := int(flag.item())) or module.finished:
            return
        self.received = received
        self.saved = self.checkpoints.save(trainer)
        trainer.should_stop = True
