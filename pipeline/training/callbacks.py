"""What happens around the steps: speed, logging, validation, checkpoints, preemption, the progress bar.

Takes hooks of the Trainer, writes metrics and checkpoints. The order of the callbacks is the order of a step's
end: measure, log, validate, show, save, stop; before all of them come the signals, for the first validation. Knows
nothing of losses or how weights are sharded.
"""

import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from ..runs.tracking import Tracker
from .module import Distillation

WARM_UP_STEPS = 2  # left out of the averages: first touches of memory, kernel choice


class Throughput(Callback):
    """Tokens per second, and what a step costs in units of the teacher's forward pass (logits of the rows included).

    A step is timed from the batch to the updated weights; validation and saving are not part of it.
    """

    def __init__(self) -> None:
        self.since_start = 0
        self.last: dict[str, float] = {}
        self.total = {"seconds": 0.0, "teacher_seconds": 0.0, "timed_tokens": 0, "tokens": 0, "rows": 0}

    def on_train_batch_start(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        module.step_model.teacher_clock.take()  # type: ignore[union-attr]
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        teacher = module.step_model.teacher_clock.take()  # type: ignore[union-attr]  # waits for the GPU
        seconds = time.perf_counter() - self.started
        self.last = {"tokens_per_second": module.step_tokens / seconds}
        if module.cached_teacher is None:  # with a cached teacher only its logits are left in the step
            self.last["step_over_teacher"] = seconds / teacher
        self.total["tokens"] += module.step_tokens
        self.total["rows"] += module.step_rows
        self.since_start += 1
        if self.since_start > WARM_UP_STEPS:
            self.total["seconds"] += seconds
            self.total["teacher_seconds"] += teacher
            self.total["timed_tokens"] += module.step_tokens

    def averages(self) -> dict[str, float | None]:
        """Over all steps but the first two after each start; None if there were no more."""
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
    """Logs every step, validates before the first, every `validate_every` and after the last, shows both."""

    def __init__(self, tracker: Tracker, throughput: Throughput, validate_every: int, max_steps: int, shown: bool):
        self.tracker, self.throughput = tracker, throughput
        self.validate_every, self.max_steps = validate_every, max_steps
        self.shown = shown
        self.bar: Any = None
        self.lengths: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, module: Distillation) -> None:  # type: ignore[override]
        done = trainer.global_step
        self.tracker.start(done if module.validated_step >= 0 else -1)  # else step 0 is validated and logged again
        if self.shown:
            self.bar = tqdm(total=self.max_steps, initial=done, desc="distill", unit="step", disable=None)
        if module.validated_step < 0:
            self._validate(module, 0)
        if not module.learning:  # killed between its last checkpoint and its heads
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        self.tracker.log(step, module.train_figures() | self.throughput.last)
        if step % self.validate_every == 0 or step == self.max_steps:
            learning = module.learning
            self._validate(module, step)
            self._tell_who_stopped(module, step, set(learning) - set(module.learning))
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

    def _validate(self, module: Distillation, step: int) -> None:
        figures = module.validate(step)
        self.tracker.log(step, figures)
        lengths = {n: figures.get(f"val/{n}/expected_acceptance_length") for n in module.names}
        self.lengths = {n: f"{length:.2f}" for n, length in lengths.items() if length is not None}
        if self.bar is not None and self.bar.disable:  # no terminal: a line instead of a bar
            heads = ", ".join(f"{n} {figures[f'val/{n}/loss']:.3f} -> {length}" for n, length in self.lengths.items())
            what = "held-out loss -> expected acceptance length"
            print(f"distill: step {step}/{self.max_steps}, {what}: {heads}", flush=True)

    def _tell_who_stopped(self, module: Distillation, step: int, stopped: set[str]) -> None:
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

    The last two are kept, and nothing else: neither a damaged one that was passed over nor one of later steps, which
    are now done anew.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder, self.every, self.keep = folder, every, keep
        self.kept: list[Path] = []
        """Oldest first; whoever resumes puts in what from."""

    def on_train_batch_end(self, trainer: Trainer, module: Distillation, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % self.every == 0 or module.finished:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """All processes must call it, at the same step."""
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self.kept = [*(p for p in self.kept if p != path), path][-self.keep :]
        if trainer.is_global_zero:
            for other in set(self.folder.glob("step-*.ckpt")) - set(self.kept):
                other.unlink()
        return path


class Signals(Callback):
    """From before the first validation a signal sets a flag and nothing else: whatever it asks for is a meeting of all
    processes, which signals reach at different moments. Lightning's own handler, which this one takes the place of,
    would talk to the others at once, and end a run that is still validating as if it were done. A second Ctrl-C ends
    the process."""

    def __init__(self) -> None:
        self.flag = 0
        """The signal that has come, or 0."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        try:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread, as in some notebooks: no signals arrive here

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
    """Behind a step: if a signal has reached any process, save and stop."""

    def __init__(self, checkpoints: Checkpoints, signals: Signals):
        self.checkpoints, self.signals = checkpoints, signals
        self.received = 0
        """The signal that stopped the run, or 0."""
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
