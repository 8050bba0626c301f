"""The training step: its losses against a plain loop in one process, and its collectives, which are counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import distilling
import pytest
import torch
from distilling import assert_same, finish, head_bytes, lines, prepare, start, unpack, whole_units
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from pipeline.generation.documents import read_documents, read_manifest, split, usable
from pipeline.inference.exit_head import new_exit_layer
from pipeline.runs.folder import RunDir
from pipeline.stages import distill
from pipeline.training import packing
from pipeline.training.dataloader import StepBatches, validation_batches
from pipeline.training.module import Distillation, learning_rate_at

# The learning rate and its warm-up are the defaults; the norm is small enough to clip every gradient.
STEPS = 20
EXACT = f"""distill.max_steps={STEPS} distill.learning_rate=2e-3 distill.warmup_steps=10 distill.weight_decay=0.1
    distill.clip_norm=0.3 distill.sequences_per_step=4 distill.validate_every=10 distill.checkpoint_every=10""".split()
ONE_BY_ONE = "distill.sequences_per_pass=1"


# ---- against a plain loop


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, backbone) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of each head, without FSDP, Lightning, packing or chunks of logits: one
    document at a time, one head at a time."""
    run = prepare(tmp_path_factory.mktemp("plain"), backbone, *EXACT)
    d = run.config.distill
    documents, _ = read_documents(run / "responses", read_manifest(run / "responses"), d.truncated, 0.5)
    train, _ = split(usable(documents, d.sequence_length), d.held_out)
    packed = packing.pack(train, d.sequence_length)
    model = AutoModelForCausalLM.from_pretrained(backbone).requires_grad_(False)
    return {f"exit-{n}": _train_plainly(model, n, packed, run) for n in d.exit_layers}


def _train_plainly(model: Any, exit_layer: int, packed: packing.Packed, run: RunDir) -> list[tuple[float, float]]:
    d = run.config.distill
    head = new_exit_layer(model)
    optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=d.weight_decay)
    found = []
    for step, batch in enumerate(StepBatches(len(packed), d.sequences_per_step, STEPS, 0)):
        total, rows = torch.zeros(()), 0
        for tokens, start_, end in unpack(packed, batch):
            hidden = model.model(tokens[None], output_hidden_states=True, use_cache=False).hidden_states
            at = torch.arange(len(tokens))[None]
            drafted = head(hidden[exit_layer], position_embeddings=model.model.rotary_emb(hidden[0], at))
            log_p, log_q = (
                model.lm_head(h[0, start_:end]).log_softmax(-1) for h in (hidden[-1], model.model.norm(drafted))
            )
            total = total + torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
            rows += end - start_
        optimizer.zero_grad()
        (total / rows).backward()
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), d.clip_norm)
        assert norm > d.clip_norm
        found.append((total.item() / rows, norm.item()))
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, d.learning_rate, d.warmup_steps, STEPS)
        optimizer.step()
    assert found[-1][0] < 0.6 * found[0][0]
    return found


def assert_losses_equal(run: RunDir, plain: dict[str, list[tuple[float, float]]]) -> None:
    steps = [line for line in lines(run) if "learning_rate" in line]
    for name, found in plain.items():
        losses, norms = zip(*found, strict=True)
        assert [step[f"train/{name}/loss"] for step in steps] == pytest.approx(losses, rel=1e-6)
        assert [step[f"train/{name}/grad_norm"] for step in steps] == pytest.approx(norms, rel=5e-6)


@pytest.mark.parametrize("words", [[], [ONE_BY_ONE], ["distill.sequences_per_pass=3"]], ids=["whole", "1", "3"])
def test_losses_equal_a_plain_training_loop(tmp_path, backbone, plain_losses, words):
    """A step of four sequences is one pass, four passes, or a pass of three and a pass of one."""
    run = prepare(tmp_path, backbone, *EXACT, *words)
    distill.run(run)
    assert_losses_equal(run, plain_losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["machine.processes_per_node=4"],
        ["machine.nodes=2", ONE_BY_ONE],
        ["machine.nodes=2", "machine.processes_per_node=2"],
        ["machine.processes_per_node=4", "machine.shard_degree=2"],
    ],
    ids=["4", "2x1", "2x2", "sharded by 2"],
)
def test_losses_of_several_processes_and_nodes_equal_a_plain_training_loop(tmp_path, backbone, plain_losses, words):
    run = prepare(tmp_path, backbone, *EXACT, *words)
    finish(start(run, each=True), run)
    assert_losses_equal(run, plain_losses)


# ---- two processes: collectives, and that nothing stays whole


@pytest.fixture(scope="module")
def two(tmp_path_factory, backbone) -> tuple[RunDir, dict[str, list[str]]]:
    return traced_run(tmp_path_factory.mktemp("two"), backbone, "machine.processes_per_node=2")


def traced_run(folder: Path, backbone: Path, *words: str) -> tuple[RunDir, dict[str, list[str]]]:
    """A run of several processes, one of them this one, with two passes a step; and its profile of one step and one
    validation. After every step and validation it is seen to that nothing is whole."""
    run = prepare(folder, backbone, *EXACT, ONE_BY_ONE, *words)
    traces: dict[str, list[str]] = {}

    def traced(owner: Any, name: str, step: int) -> None:
        inner = getattr(owner, name)

        def wrapped(self: Any, *args: Any) -> Any:
            module = self.trainer.lightning_module
            if module.global_step != step:
                result = inner(self, *args)
            else:
                with profile(activities=[ProfilerActivity.CPU]) as recorded:
                    result = inner(self, *args)
                events = sorted(recorded.events(), key=lambda event: event.time_range.start)
                traces[name] = [event.name for event in events]
            assert not whole_units(module)
            return result

        patch.setattr(owner, name, wrapped)

    with pytest.MonkeyPatch.context() as patch:
        traced(_TrainingEpochLoop, "advance", 2)
        traced(Distillation, "validate", 10)
        distill.run(run)
    return run, traces


UNITS = ["", " (backbone.model.embed_tokens)", *(f" (backbone.model.layers.{i})" for i in range(4))]
HEADS = [" (heads.exit-1)", " (heads.exit-2)"]
GATHERED = [f"FSDP::all_gather{unit}" for unit in (*UNITS, *HEADS, " (backbone.lm_head)")]


def units_of(trace: list[str]) -> list[str]:
    """The names of FSDP's gathers and reductions, in order."""
    return [name for name in trace if name in GATHERED or name.startswith("FSDP::post_backward_reduce")]


def test_losses_of_two_processes_equal_a_plain_training_loop(two, plain_losses):
    assert_losses_equal(two[0], plain_losses)


def test_a_pass_gathers_each_unit_once_and_reduces_each_head_once(two):
    """The root's own parameter is the final norm. The backward pass gathers nothing: the heads are still whole."""
    trace = two[1]["advance"]
    assert units_of(trace) == 2 * [*GATHERED, *(f"FSDP::post_backward_reduce{head}" for head in HEADS)]
    # One sum of losses and norms and one of the flag of signals a step; the broadcast is Lightning's own such flag.
    assert Counter(name for name in trace if name.startswith("c10d::")) == {
        "c10d::_allgather_base_": 2 * len(GATHERED),
        "c10d::_reduce_scatter_base_": 2 * len(HEADS),
        "c10d::allreduce_": 2,
        "c10d::broadcast_": 1,
    }


@pytest.mark.slow
def test_between_copies_only_the_heads_gradients_are_summed(tmp_path, backbone):
    """There are two copies of the backbone, each over two processes, and one pass a step."""
    words = "machine.processes_per_node=4", "machine.shard_degree=2"
    trace = traced_run(tmp_path, backbone, *words)[1]["advance"]
    assert units_of(trace) == [*GATHERED, *(f"FSDP::post_backward_reduce{head}" for head in HEADS)]
    assert Counter(name for name in trace if name.startswith("c10d::")) == {
        "c10d::_allgather_base_": len(GATHERED),
        "c10d::_reduce_scatter_base_": len(HEADS),
        "c10d::allreduce_": len(HEADS) + 2,
        "c10d::broadcast_": 1,
    }


def test_validation_reduces_no_gradient(two):
    trace = two[1]["validate"]
    batches = len(validation_batches(_held_out(two[0]), 1, 0, 2))
    kept = {GATHERED[0], *(f"FSDP::all_gather{head}" for head in HEADS)}  # whole from the first pass to the last
    assert batches > 1
    assert units_of(trace) == [*GATHERED, *(batches - 1) * [name for name in GATHERED if name not in kept]]
    assert Counter(name for name in trace if name.startswith("c10d::all") and "gather" not in name) == {
        "c10d::allreduce_": 1
    }
    assert not [name for name in trace if "reduce_scatter" in name]


def _held_out(run: RunDir) -> int:
    d = run.config.distill
    documents, _ = read_documents(run / "responses", read_manifest(run / "responses"), d.truncated, 0.5)
    return len(packing.pack(split(usable(documents, d.sequence_length), d.held_out)[1], d.sequence_length))


needs_reset = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "reset_iter_state"), reason="FSDP2 cannot go on before torch 2.13"
)


@needs_reset
def test_an_exception_in_a_pass_leaves_nothing_whole_and_the_next_step_is_right(tmp_path, backbone, monkeypatch):
    runs = [prepare(tmp_path / name, backbone, ONE_BY_ONE) for name in ("broken", "undisturbed")]
    distill.run(runs[1])
    monkeypatch.setattr(Distillation, "training_step", Distillation.training_step)  # what is put back afterwards
    distilling.break_passes()
    distill.run(runs[0])
    assert_same(*runs)


@needs_reset
@pytest.mark.slow
def test_the_same_exception_on_every_process_leaves_nothing_whole(tmp_path, backbone, two):
    run = prepare(tmp_path, backbone, *EXACT, ONE_BY_ONE, "machine.processes_per_node=2")
    finish(start(run, "break", each=True), run)
    assert_same(run, two[0])


# ---- heads keep to themselves


@pytest.mark.slow
def test_heads_trained_together_by_two_processes_equal_heads_trained_alone(tmp_path, backbone, two):
    for name in ("exit-1", "exit-2"):
        words = (ONE_BY_ONE, "machine.processes_per_node=2", f"distill.exit_layers=[{name[-1]}]")
        run = prepare(tmp_path / name, backbone, *EXACT, *words)
        distill.run(run)
        assert head_bytes(run, name) == head_bytes(two[0], name)


STOPS = "distill.max_steps=30 distill.validate_every=1 distill.patience=2 distill.weight_decay=0.1".split()


@pytest.fixture(scope="module")
def together(tmp_path_factory, backbone) -> RunDir:
    """Exit 2 stops at step 3, exit 1 at step 11 of 30."""
    run = prepare(tmp_path_factory.mktemp("together"), backbone, *STOPS)
    distill.run(run)
    return run


def curve(run: RunDir, name: str) -> list[dict]:
    """The logged figures of one head, with their steps."""
    picked = [{key: value for key, value in line.items() if key == "step" or name in key} for line in lines(run)]
    return [line for line in picked if len(line) > 1]


def last_state(run: RunDir, name: str) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of one head in the last checkpoint."""
    state = torch.load(max((run / "checkpoints").glob("step-*.ckpt")), weights_only=True)
    weights = {key: w for key, w in state["state_dict"].items() if f".{name}." in key}
    group = state["optimizer_states"][0]["param_groups"][run.config.distill.exit_layers.index(int(name[-1]))]
    moments = [state["optimizer_states"][0]["state"][parameter] for parameter in group["params"]]
    return weights | {f"{i}.{key}": value for i, moment in enumerate(moments) for key, value in moment.items()}


def test_a_head_that_stops_earlier_is_the_one_trained_alone(tmp_path, backbone, together):
    """Equal are its file, its figures and its last weights and optimizer state, although the other head went on."""
    ends = {}
    for name in ("exit-1", "exit-2"):
        alone = prepare(tmp_path / name, backbone, *STOPS, f"distill.exit_layers=[{name[-1]}]")
        distill.run(alone)
        assert head_bytes(alone, name) == head_bytes(together, name)
        assert curve(alone, name) == curve(together, name)
        mine, theirs = (json.loads((run / "run.json").read_text())[-1]["heads"][name] for run in (alone, together))
        assert mine == theirs
        states = [last_state(run, name) for run in (alone, together)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        ends[name] = curve(together, name)[-1]["step"]
        assert ends[name] == theirs["best_step"] + 2
    assert ends["exit-2"] < ends["exit-1"] < 30


def test_training_ends_when_no_head_learns_any_more(tmp_path, backbone, together, capsys):
    run = prepare(tmp_path, backbone, *STOPS)
    distill.run(run)
    said = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert said == [
        "distill: step 3/30, stopped: exit-2 (best at step 1); exit-1 still learning",
        "distill: step 11/30, stopped: exit-1 (best at step 9); no head learns any more: the end",
    ]
    assert_same(run, together)


@pytest.mark.parametrize(("owner", "name"), [(Distillation, "training_step"), (distill, "save_heads")])
def test_who_has_stopped_is_remembered(tmp_path, backbone, together, monkeypatch, owner, name):
    """Training fails between the two stops, or between the last checkpoint and writing the heads, and is resumed."""
    inner = getattr(owner, name)

    def fails(self: Any, *args: Any) -> Any:
        if getattr(self, "global_step", 11) == 5:
            raise ZeroDivisionError
        return inner(self, *args) if owner is Distillation else 1 / 0

    run = prepare(tmp_path, backbone, *STOPS)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(ZeroDivisionError):
        distill.run(run)
    monkeypatch.undo()
    distill.run(run)
    assert_same(run, together)


@pytest.mark.slow
def test_a_stopped_head_is_neither_gathered_nor_reduced(tmp_path, backbone, together, monkeypatch):
    """Two processes; looked at is the step after exit 2 has stopped."""
    run = prepare(tmp_path, backbone, *STOPS, "machine.processes_per_node=2")
    traces = []
    inner = Distillation.training_step

    def step(self: Distillation, *args: Any) -> None:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            inner(self, *args)
        traces.append(units_of([event.name for event in recorded.events()]))

    monkeypatch.setattr(Distillation, "training_step", step)
    distill.run(run)
    assert Counter(traces[3]) == Counter(
        [name for name in GATHERED if "exit-2" not in name] + ["FSDP::post_backward_reduce (heads.exit-1)"]
    )
    assert len(traces) == 11
