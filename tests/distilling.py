"""Helpers of the tests of distill: runs on a tiny random backbone and random responses, in one or several processes.

`python tests/distilling.py CONFIG [MANNER]` is one process of such a run; MANNER says how it is to be disturbed.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from pipeline.config import load
from pipeline.inference.fingerprint import fingerprint
from pipeline.runs.files import sha256_of
from pipeline.runs.folder import RunDir
from pipeline.stages import distill
from pipeline.training import checkpoints, packing
from pipeline.training.module import Distillation

STEPS = 9
WORDS = f"""distill.exit_layers=[1,2] distill.max_steps={STEPS} distill.sequence_length=48 distill.warmup_steps=2
    distill.sequences_per_step=2 distill.validate_every=4 distill.checkpoint_every=3 distill.loss_chunk=16
    distill.held_out=0.2 distill.learning_rate=1e-2 backbone.dtype=float32 machine.device=cpu machine.threads=1
    wandb.mode=disabled""".split()


def write_responses(
    folder: Path, backbone: Path, count: int = 24, turns: int = 1, reasons: Sequence[str] = ("stop",)
) -> None:
    """Random prompts and responses, as `generate` lays them out; of conversations, each turn continues the last.

    They end for `reasons` in turn.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest, (), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    rows = []
    for i in range(count):
        said: list[int] = []
        for turn in range(1, turns + 1):
            prompt, response = said + tokens(3, 10), tokens(4, 20)
            id_ = f"p-{i}" if turn == 1 else f"p-{i}.{turn}"
            reason = reasons[len(rows) % len(reasons)]
            rows.append({"id": id_, "prompt_ids": prompt, "response_ids": response, "finish_reason": reason})
            said = prompt + response
    half = len(rows) // 2
    folder.mkdir(parents=True)
    shards = []
    for number, part in enumerate((rows[:half], rows[half:])):
        path = folder / f"shard-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path)
        shards.append({"file": path.name, "rows": len(part), "sha256": sha256_of(path)})
    identity = {"name": "tiny", "revision": None, "model_type": "llama",
                "fingerprint": fingerprint(AutoModelForCausalLM.from_pretrained(backbone))}  # fmt: skip
    manifest = {"shards": shards, "complete": True, "backbone": identity, "sampling": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def prepare(folder: Path, backbone: Path, *words: str) -> RunDir:
    run = RunDir(load(None, [f"run.dir={folder}", "run.name=run", f"backbone.name_or_path={backbone}", *WORDS, *words]))
    if not (run / "responses").exists():
        write_responses(run / "responses", backbone)
    return run


def head_bytes(run: RunDir, name: str) -> bytes:
    return (run / "heads" / name / "model.safetensors").read_bytes()


def lines(run: RunDir) -> list[dict]:
    timing = ("tokens_per_second", "step_over_teacher")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in found]


def assert_same(run: RunDir, other: RunDir) -> None:
    for name in ("exit-1", "exit-2"):
        assert head_bytes(run, name) == head_bytes(other, name)
    assert lines(run) == lines(other)
    mine, theirs = (json.loads((r / "run.json").read_text())[-1] for r in (run, other))
    assert mine["heads"] == theirs["heads"] and mine["train_tokens"] == theirs["train_tokens"]


def unpack(packed: packing.Packed, batch: Sequence[int]):
    """(tokens, first and one past the last place that is learned from) of every document of these sequences."""
    for s in batch:
        length = int(packed.lengths_S[s])
        starts = [t for t in range(length) if packed.positions_ST[s, t] == 0]
        for start, end in pairwise([*starts, length]):
            learned = packed.mask_ST[s, start:end].nonzero().squeeze(1)
            yield packed.ids_ST[s, start:end].long(), int(learned[0]), int(learned[-1]) + 1


# ---- processes


def start(run: RunDir, manner: str = "", *, each: bool = False) -> list[forked.Popen]:
    """The process that a user would start, which starts the others; or, with `each`, all that a launcher would start.

    What they say goes to <run>.log.
    """
    config, log = run.path.with_suffix(".yaml"), run.path.with_suffix(".log")
    config.write_text(OmegaConf.to_yaml(OmegaConf.structured(run.config)))
    machine = run.config.machine
    places = [{}]
    if each:
        meet_at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
        ranks = [(n, r) for n in range(machine.nodes) for r in range(machine.processes_per_node)]
        places = [meet_at | {"NODE_RANK": str(n), "LOCAL_RANK": str(r)} for n, r in ranks]
    command = [sys.executable, __file__, str(config), *filter(None, [manner])]
    return [forked.Popen(command, env=os.environ | place, stdout=log, stderr=log) for place in places]


def finish(processes: list[forked.Popen], run: RunDir) -> None:
    """Waits for the processes, all of which must end with code 0; pytest limits the time."""
    codes = list(map(end_of, processes))
    assert not any(codes), f"{codes}\n{run.path.with_suffix('.log').read_text()}"


def end_of(process: forked.Popen) -> int:
    """Waits for its exit code; kills its group if the wait is interrupted."""
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def whole_units(module: Distillation) -> list[str]:
    """Parameters of which this process holds more than its shard."""
    return [name for name, p in module.step_model.named_parameters() if not isinstance(p, DTensor)]


# ---- manners of disturbing a run


def die(who: str, step: int, moment: str) -> None:
    """Kills `first` (this process), `other` (the one it started) or `all` with SIGKILL at `moment` of a step.

    `step` steps, or more if a checkpoint of more is there, are finished by then. Moments: before the step, between two
    of its passes, when its gradients are there, while a checkpoint is written.
    """
    others: list[int] = []

    class Popen(subprocess.Popen):
        def __init__(self, command: Any, *args: Any, **kwargs: Any):
            super().__init__(command, *args, **kwargs)
            if "distill" in command:
                others.append(self.pid)
                print("started", self.pid, flush=True)

    subprocess.Popen = Popen  # type: ignore[misc]

    def before(inner: Callable, call: int = 0) -> Callable:
        calls = {}

        def wrapped(*args: Any) -> Any:
            done = trained[0].global_step if trained else -1
            calls[done] = calls.get(done, -1) + 1
            if done >= step and calls[done] == call:
                kill = os.killpg if who == "all" else os.kill
                kill(others[0] if who == "other" else os.getpid(), signal.SIGKILL)
            return inner(*args)

        return wrapped

    trained: list[Distillation] = []
    start_training = Distillation.on_train_start

    def on_train_start(self: Distillation) -> None:
        trained.append(self)
        start_training(self)

    Distillation.on_train_start = on_train_start  # type: ignore[method-assign]
    if moment == "saving":
        checkpoints.os = type("os", (), {"fsync": before(os.fsync)})  # type: ignore[assignment]
    else:
        methods = {"before": ("training_step", 0), "between": ("manual_backward", 1), "after": ("_clip_or_skip", 0)}
        name, call = methods[moment]
        setattr(Distillation, name, before(getattr(Distillation, name), call))


class Broken(Exception):
    pass


def break_passes() -> None:
    """Before its second step, the run tries it several times, each time with an exception at another place of it.

    The step of every process is broken alike. Nothing may be left whole, and the run must go on as if nothing was.
    """
    plain = Distillation.training_step

    def step(self: Distillation, batch: Any, index: int) -> None:
        if self.global_step == 1:
            head = self.step_model.heads["exit-2"]
            layer = self.step_model.backbone.model.layers[2]
            for owner, name in ((layer.mlp, "forward"), (head.mlp, "forward"), (torch, "log_softmax")):
                _raises(self, lambda: plain(self, batch, index), owner, name)
            _raises_in_backward(self, lambda: plain(self, batch, index), head)
            _raises(self, lambda: self.validate(1), torch, "log_softmax")
        plain(self, batch, index)

    Distillation.training_step = step  # type: ignore[method-assign]


def _raises(module: Distillation, call: Callable, owner: Any, name: str) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        assert whole_units(module)
        raise Broken

    inner = getattr(owner, name)
    setattr(owner, name, broken)
    try:
        call()
    except Broken:
        assert not whole_units(module), (name, whole_units(module))
    else:
        raise AssertionError(f"{name} was not called")
    finally:
        setattr(owner, name, inner)


def _raises_in_backward(module: Distillation, call: Callable, head: Any) -> None:
    def broken(*_: Any) -> None:
        raise Broken

    handle = head.mlp.register_full_backward_hook(broken)
    try:
        call()
    except Broken:
        assert not whole_units(module)
    else:
        raise AssertionError("no backward pass")
    finally:
        handle.remove()


def check_who_holds_weights() -> None:
    """The best weights lie on process 0 only, after training and after having been resumed."""
    plain = Distillation.on_train_end

    def on_train_end(self: Distillation) -> None:
        assert self.best and all(bool(best["weights"]) == (self.global_rank == 0) for best in self.best.values())
        plain(self)

    Distillation.on_train_end = on_train_end  # type: ignore[method-assign]


if __name__ == "__main__":
    manner, *words = (sys.argv[2] if len(sys.argv) > 2 else "").split(",")
    if manner == "die":
        die(words[0], int(words[1]), words[2])
    elif manner == "break":
        break_passes()
    check_who_holds_weights()
    distill.run(RunDir(load(sys.argv[1], [])))
