"""A loss or gradient that is not finite: the head skips the step, the others do not notice, and training stops when it
happens several times in a row."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Container

import pytest
import torch
from distilling import assert_same, head_bytes, lines, prepare
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.runs.folder import RunDir
from pipeline.stages import distill
from pipeline.training.module import MAX_SKIPPED_IN_ROW, Distillation
from pipeline.training.step_model import StepModel

DECAY = "distill.weight_decay=0.1"  # it changes weights even where a gradient is zero
UNDISTURBED = [DECAY]


# ---- ways to break exit 2 at given steps (counted from 0), in this process only


def break_gradient(patch: pytest.MonkeyPatch, steps: Container[int], value: float) -> None:
    """One number of one gradient becomes `value`."""
    inner = Distillation.manual_backward

    def manual_backward(self: Distillation, loss: Tensor) -> None:
        inner(self, loss)
        if self.global_step in steps:
            gradient = next(self.step_model.heads["exit-2"].parameters()).grad
            gradient.to_local().view(-1)[0] = value

    patch.setattr(Distillation, "manual_backward", manual_backward)


def break_loss(patch: pytest.MonkeyPatch, steps: Container[int], value: float) -> None:
    """The loss becomes `value`; every gradient stays finite."""
    forward, training_step = StepModel.forward, Distillation.training_step
    now = []

    def step(self: Distillation, *args) -> None:
        now[:] = [self.global_step]
        training_step(self, *args)

    def broken(self: StepModel, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not torch.is_grad_enabled() or now[0] not in steps:
            return out
        return out + torch.tensor([value if name == "exit-2" else 0.0 for name in kwargs["heads"]])

    patch.setattr(Distillation, "training_step", step)
    patch.setattr(StepModel, "forward", broken)


# ---- one step


def state_of(module: Distillation, name: str) -> list[Tensor]:
    """A copy of the head's weights and of all that the optimizer keeps for it."""
    parameters = list(module.step_model.heads[name].parameters())
    kept = module.optimizers().state
    tensors = [*parameters, *(kept[p][key] for p in parameters for key in sorted(kept[p]))]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize(
    ("broken", "value"),
    [(break_gradient, math.nan), (break_gradient, math.inf), (break_loss, math.inf), (break_loss, math.nan)],
)
def test_a_head_skips_the_step_and_the_other_is_unchanged(
    tmp_path, backbone, undisturbed, monkeypatch, capsys, broken: Callable, value: float
):
    run = prepare(tmp_path, backbone, DECAY)
    broken(monkeypatch, {4}, value)
    inner, unchanged = Distillation.training_step, []

    def step(self: Distillation, *args) -> None:
        before = {name: state_of(self, name) for name in self.names}
        inner(self, *args)
        after = {name: state_of(self, name) for name in self.names}
        unchanged.append([name for name in self.names if all(map(torch.equal, before[name], after[name]))])

    monkeypatch.setattr(Distillation, "training_step", step)
    capsys.readouterr()
    distill.run(run)
    assert unchanged == [[], [], [], [], ["exit-2"], [], [], [], []]
    assert head_bytes(run, "exit-1") == head_bytes(undisturbed, "exit-1")
    assert all(w.isfinite().all() for w in load_file(run / "heads" / "exit-2" / "model.safetensors").values())
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert told == ["distill: step 5/9, exit-2: loss or gradient is not finite; step skipped"]

    logged = [line for line in strict_lines(run) if "learning_rate" in line]
    assert [line["train/exit-1/skipped_steps"] for line in logged] == [0] * 9
    assert [line["train/exit-2/skipped_steps"] for line in logged] == [0] * 4 + [1] * 5
    missing = [line["step"] for line in logged if not {"train/exit-2/loss", "train/exit-2/grad_norm"} <= line.keys()]
    assert missing == [5]


def strict_lines(run: RunDir) -> list[dict]:
    """metrics.jsonl by the rules of JSON, which has no number NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_both_processes_skip_what_only_one_of_them_sees(tmp_path, backbone, monkeypatch):
    """The other process, a fresh one, computes finite gradients only. Had it taken the step, its shard would differ."""
    break_gradient(monkeypatch, {2, 3}, math.nan)
    runs = []
    for processes in (1, 2):
        run = prepare(tmp_path / str(processes), backbone, f"machine.processes_per_node={processes}")
        distill.run(run)
        runs.append(lines(run))
    for one, two in zip(*runs, strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert runs[1][-2]["train/exit-2/skipped_steps"] == 2


# ---- several steps


class Interrupted(Exception):
    pass


def interrupted_at(patch: pytest.MonkeyPatch, step: int) -> None:
    inner = Distillation.training_step

    def training_step(self: Distillation, *args) -> None:
        if self.global_step == step:
            raise Interrupted
        inner(self, *args)

    patch.setattr(Distillation, "training_step", training_step)


def test_skipped_steps_are_counted_on_after_resuming(tmp_path, backbone, monkeypatch):
    break_gradient(monkeypatch, {2, 5}, math.nan)
    runs = [prepare(tmp_path / name, backbone) for name in ("in one go", "resumed")]
    distill.run(runs[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, 5)
        distill.run(runs[1])
    distill.run(runs[1])
    assert_same(*runs)
    assert lines(runs[1])[-2]["train/exit-2/skipped_steps"] == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_training_stops_after_several_skipped_steps_in_a_row(tmp_path, backbone, monkeypatch, interrupted):
    """Steps 2 and, from 4 on, all others are broken, so the end is the same step whether or not the run was resumed."""
    break_gradient(monkeypatch, {1, *range(3, 20)}, math.inf)
    run = prepare(tmp_path, backbone, "distill.max_steps=20", "distill.checkpoint_every=1")
    if interrupted:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupted_at(patch, 5)
            distill.run(run)
    with pytest.raises(UserError) as stopped:
        distill.run(run)
    last = 3 + MAX_SKIPPED_IN_ROW
    assert re.fullmatch(
        rf"exit-2: no finite loss and gradient in {MAX_SKIPPED_IN_ROW} steps in a row, the last of them step {last} "
        rf"\(loss [\d.]+, gradient norm inf\); likely causes: distill.learning_rate=0.01 is too high .*--redo distill.*"
        rf"backbone.name_or_path={re.escape(str(backbone))} .*",
        str(stopped.value),
    )
    assert not (run / "heads").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_that_diverges_ends_with_one_message(tmp_path, backbone):
    """By itself, with a learning rate beyond all reason."""
    run = prepare(tmp_path, backbone, "distill.learning_rate=1e30", "machine.processes_per_node=2")
    config = tmp_path / "config.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.structured(run.config)))
    command = [sys.executable, "-m", "pipeline", "distill", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in ended.stderr.splitlines() if "skipped" not in line]
    assert (ended.returncode, len(said)) == (2, 1), ended.stderr
    assert said[0].startswith("exit-heads distill: exit-1: no finite loss and gradient in 5 steps in a row")
    for rank in range(2):
        assert "no finite loss and gradient" in (run / "logs" / f"distill-rank-0000{rank}.log").read_text()


def test_a_run_that_skips_every_step_is_no_success(tmp_path, backbone, monkeypatch):
    """Even if it is too short for the usual number of skipped steps in a row."""
    break_gradient(monkeypatch, range(3), math.nan)
    with pytest.raises(UserError, match="in 3 steps in a row"):
        distill.run(prepare(tmp_path, backbone, "distill.max_steps=3"))


# ---- figures


def test_a_backbone_that_gives_no_numbers_is_refused_before_the_first_step(tmp_path, backbone):
    model = AutoModelForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = math.nan
    model.save_pretrained(tmp_path / "broken")
    run = prepare(tmp_path, tmp_path / "broken")
    with pytest.raises(UserError, match=r"exit-1: figures before training are not finite \(loss nan, overlap nan, .*"):
        distill.run(run)
    assert not (run / "heads").exists() and lines(run) == []
