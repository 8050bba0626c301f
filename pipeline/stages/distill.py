"""Responses -> exit heads: checks what can be checked early, assembles the Trainer, saves the best heads.

Takes responses/ of the run folder, gives heads/exit-<N>/, metrics.jsonl and checkpoints; killed and run again it
resumes. Knows nothing of how a step works: the parts are in training/.
"""

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from .. import backbones
from ..config import Config
from ..inference.exit_head import ExitHead
from ..rundir import RunDir, atomic_path
from ..tracking import Tracker
from ..training import data, terms
from ..training.callbacks import Checkpoints, Preemption, Recorder, Throughput, newest_readable
from ..training.launch import Place, find_place, workers
from ..training.loading import check_checkpoint
from ..training.module import Distillation
from ..training.sharding import check_mesh


def check(config: Config) -> None:
    """What can be known before anything is loaded. Raises UserError for a loss that does not exist."""
    terms.parse(config.distill.loss)


def run(run: RunDir) -> None:
    """Train the heads of distill.exit_layers. Raises UserError for what the user must change, SystemExit with
    128 + the signal's number (KeyboardInterrupt for Ctrl-C) when a signal stopped it after saving."""
    check(run.config)
    inputs = [run / "responses" / "manifest.json"]
    place = find_place(run.config.machine)
    if not run.plan("distill", inputs):
        if place.rank == 0:
            print("distill: done already")
        return
    # Before the stage is marked begun, so that a mistake found here can be corrected without --redo.
    num_layers = backbones.load_config(run.config.backbone).num_hidden_layers
    backbones.check_exit_layers(run.config.distill.exit_layers, num_layers)
    device = backbones.device_of(run.config.machine.device)
    check_mesh(run.config.machine)
    manifest, train, validation, counts = read(run, place)
    fingerprint = manifest["backbone"]["fingerprint"]
    check_checkpoint(run.config.backbone, fingerprint, run.config.distill.exit_layers, run.config.distill.init)
    mark: AbstractContextManager = run.stage("distill", inputs) if place.rank == 0 else contextlib.nullcontext({})
    with mark as summary, quiet(), workers(place, run / "config.yaml", run.config.machine.processes_per_node):
        module, throughput = fit(run, place, device, fingerprint, train, validation)
        if place.rank == 0:
            save_heads(run, module, num_layers, manifest["backbone"])
            summary |= {"responses": counts} | describe(module, throughput)
    if place.rank == 0:
        for name, head in summary["heads"].items():
            after, before = (h["expected_acceptance_length"] for h in (head, head["before"]))
            steps = f"best at step {head['best_step']}"
            print(f"{name}: expected acceptance length {after:.2f} (from {before:.2f} before training), {steps}")


def read(run: RunDir, place: Place) -> tuple[dict[str, Any], data.Packed, data.Packed, dict[str, int]]:
    """(manifest, packed training set, packed validation set, what became of how many responses)."""
    d = run.config.distill
    manifest = data.read_manifest(run / "responses")
    documents, counts = data.read_documents(run / "responses", manifest, d.truncated, d.repeated_share)
    kept = data.usable(documents, d.sequence_length)
    train, validation = data.split(kept, d.held_out)
    # validation is always on responses: that is what will be drafted
    packed = (
        data.pack(train, d.sequence_length, prompts_too=d.learn_from == "all"),
        data.pack(validation, d.sequence_length),
    )
    data.StepBatches(len(packed[0]), d.sequences_per_step, d.max_steps, 0, world_size=place.world_size)  # checks
    learned = sum(len(document.spans) for document in kept)
    too_long = sum(len(document.spans) for document in documents) - learned
    found = {**counts, "too_long": too_long, "learned": learned, "documents": len(kept)}
    if place.rank == 0:
        print(told(found))
    return manifest, *packed, found


def told(found: dict[str, int]) -> str:
    """One line on what is learned from and what is left out."""
    line = f"distill: {found['learned']} of {found['answers']} responses in {found['documents']} documents; left out: "
    line += f"{found['truncated']} truncated, {found['repeating']} repeating, {found['too_long']} too long"
    if later := found["joined"] + found["alone"]:
        line += f"; of {later} later turns {found['joined']} joined to the turn before, {found['alone']} stand alone"
    return line


def fit(
    run: RunDir, place: Place, device: torch.device, fingerprint: str, train: data.Packed, validation: data.Packed
) -> tuple[Distillation, Throughput]:
    """Train from the newest checkpoint, or from the start, to distill.max_steps."""
    d = run.config.distill
    set_threads(run.config)
    (run / "checkpoints").mkdir(exist_ok=True)
    throughput = Throughput()
    checkpoints = Checkpoints(run / "checkpoints", d.checkpoint_every, d.max_steps)
    preemption = Preemption(checkpoints)
    recorder = Recorder(Tracker(run, place.rank == 0), throughput, d.validate_every, d.max_steps, place.rank == 0)
    module = Distillation(run.config, fingerprint, train, validation)
    trainer = build_trainer(run, place, device, [throughput, recorder, checkpoints, preemption])
    resumed = newest_readable(run / "checkpoints")
    if resumed and place.rank == 0:
        print(f"distill: going on from {resumed}")
    try:
        trainer.fit(module, ckpt_path=resumed, weights_only=True)
    except SystemExit as error:  # how Lightning ends on Ctrl-C, after switching it off
        if isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise
    finally:
        if dist.is_initialized():  # else a later fit in this process would meet the old group
            dist.destroy_process_group()
    if preemption.received:
        stop(preemption, place)
    return module, throughput


def build_trainer(run: RunDir, place: Place, device: torch.device, callbacks: list[Any]) -> lightning.Trainer:
    machine, d = run.config.machine, run.config.distill
    devices: Any = machine.processes_per_node
    if device.type == "cuda" and device.index is not None and place.world_size == 1:
        devices = [device.index]
    return lightning.Trainer(
        accelerator=device.type,
        devices=devices,
        num_nodes=machine.nodes,
        # Both sizes: the defaults would make the processes of a node tensor-parallel.
        strategy=ModelParallelStrategy(
            data_parallel_size=place.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        plugins=[place.environment],
        precision="32-true",  # heads are float32; the backbone has its own dtype
        max_steps=d.max_steps,
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=run.path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def stop(preemption: Preemption, place: Place) -> None:
    """End the process the way the signal asks."""
    number = preemption.received
    if place.rank == 0:
        print(f"distill: {signal.Signals(number).name}: saved {preemption.saved}; the same command goes on from there")
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def save_heads(run: RunDir, module: Distillation, num_layers: int, backbone: dict[str, Any]) -> None:
    for n, name in zip(run.config.distill.exit_layers, module.names, strict=True):
        with atomic_path(run / "heads" / name) as folder:
            ExitHead(n, num_layers, backbone, module.best[name]["weights"]).save(folder)


def describe(module: Distillation, throughput: Throughput) -> dict[str, Any]:
    """What run.json keeps of the stage."""
    heads = {}
    for n, name in zip(module.config.distill.exit_layers, module.names, strict=True):
        best = module.best[name]
        parameters = sum(w.numel() for w in best["weights"].values())
        heads[name] = {"exit_layer": n, "parameters": parameters, **best["figures"], "best_step": best["step"]}
        heads[name]["before"] = module.first[name]
    tokens = {"train_tokens": throughput.total["tokens"], "train_response_tokens": throughput.total["rows"]}
    return {"heads": heads, **throughput.averages(), **tokens}


def set_threads(config: Config) -> None:
    machine = config.machine
    if machine.threads > 0:
        torch.set_num_threads(machine.threads)
    elif machine.processes_per_node > 1:  # torch's choice would give every process every core
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // machine.processes_per_node))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's hints; our own warnings and every error still show."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torch\..*")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
