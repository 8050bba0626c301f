"""The stage `distill`: trains exit heads on the responses of a run folder.

It reads responses/, and cache/ if distill.teacher=cached, and writes heads/exit-<N>/, metrics.jsonl and checkpoints/.
A run that was killed or stopped resumes from its newest checkpoint. This file checks the inputs, assembles the Trainer
and saves the best heads; how a step works is in training/.
"""

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from ..backbones.load import check_exit_layers, device_of, head_spec
from ..backbones.source import load_config
from ..config import Config
from ..errors import UserError
from ..inference.exit_head import ExitHead, HeadSpec
from ..planning.architecture import Architecture
from ..planning.gain import choose_draft_vocabulary
from ..runs.files import atomic_path
from ..runs.folder import RunDir
from ..runs.tracking import Tracker
from ..training import losses, packing
from ..training.callbacks import Checkpoints, Preemption, Recorder, Signals, Throughput
from ..training.checkpoints import WholeFile, check_format, newest_intact
from ..training.dataloader import StepBatches
from ..training.draft_vocabulary import coverage, ranked
from ..training.launch import Place, find_place, own_device, workers
from ..training.load_sharded import check_checkpoint, fail_on_all_ranks
from ..training.module import Distillation
from ..training.rank_log import RankLog, rank_log
from ..training.rendezvous import before_rendezvous
from ..training.teacher_cache import CachedTeacher, TeacherCache
from ..training.watchdog import Progress, watched_process_group


def check(config: Config) -> None:
    """Checks the config before anything is loaded. Raises UserError for a loss that does not exist."""
    losses.parse(config.distill.loss)


def check_layers(config: Config) -> int:
    """The backbone's number of layers L. Raises UserError if one of distill.exit_layers is not from 1 to L - 1, or if
    the backbone cannot have heads as distill.head says, which `exit-heads run` asks before it answers any prompt."""
    backbone = load_config(config.backbone)
    check_exit_layers(config.distill.exit_layers, backbone.num_hidden_layers)
    head_spec(config.distill, backbone)
    return backbone.num_hidden_layers


def run(run: RunDir) -> None:
    """Train the heads of distill.exit_layers.

    Raises UserError for a mistake of the user's and when training cannot go on, LostError if another process has
    disappeared, and SystemExit when a signal stopped the run after saving (KeyboardInterrupt for Ctrl-C): with 128 +
    the signal's number on the first process and with 0 on the others, which a launcher would otherwise take as failed.
    """
    check(run.config)
    inputs = [run / "responses" / "manifest.json"]
    if run.config.distill.teacher == "cached":
        inputs.append(run / "cache" / "manifest.json")
    place = find_place(run.config.machine)
    if not run.plan("distill", inputs):
        if place.rank == 0:
            print("distill: done already")
        return
    with contextlib.ExitStack() as stack:
        with before_rendezvous(place):
            # These checks precede the mark, so that a mistake found here can be corrected without --redo.
            num_layers = check_layers(run.config)
            device = own_device(device_of(run.config.machine.device), place)
            run.config.machine.processes_of_a_copy()  # checks
            manifest, train, validation, counts = read(run, place)
            fingerprint = manifest["backbone"]["fingerprint"]
            draft_ids_W, vocabulary = draft_vocabulary(run.config, place, train, validation)
            cached_teacher = open_cached_teacher(run, manifest["backbone"], train, validation)
            d, spec = run.config.distill, head_spec(run.config.distill, load_config(run.config.backbone))
            check_checkpoint(run.config.backbone, fingerprint, d.exit_layers, d.init, spec)
            summary = stack.enter_context(run.stage("distill", inputs)) if place.rank == 0 else {}
        log = stack.enter_context(rank_log(run / "logs", place))
        stack.enter_context(quiet())
        stack.enter_context(workers(place, run / "config.yaml", run.config.machine.processes_per_node))
        module, throughput = fit(
            run, place, device, log, fingerprint, train, validation, cached_teacher, draft_ids_W, spec
        )
        if place.rank == 0:
            save_heads(run, module, num_layers, manifest["backbone"])
            summary |= {"responses": counts, "draft_vocabulary": vocabulary} | describe(module, throughput)
    if place.rank == 0:
        for name, head in summary["heads"].items():
            after, before = (h["expected_acceptance_length"] for h in (head, head["before"]))
            steps = f"best at step {head['best_step']}"
            print(f"{name}: expected acceptance length {after:.2f} (from {before:.2f} before training), {steps}")


def read(run: RunDir, place: Place) -> tuple[dict[str, Any], packing.Packed, packing.Packed, dict[str, int]]:
    """The result of `packing.read_packed`, checked against the number of processes."""
    d = run.config.distill
    manifest, train, validation, found = packing.read_packed(run / "responses", d)
    StepBatches(len(train), d.sequences_per_step, d.max_steps, 0, world_size=place.world_size)  # checks
    if place.rank == 0:
        print(response_counts(found))
    return manifest, train, validation, found


def draft_vocabulary(
    config: Config, place: Place, train: packing.Packed, validation: packing.Packed
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The tokens that the heads shall draft, ascending [W] (None: all), and what the run's record says of them.

    Raises UserError for a draft vocabulary larger than the backbone's.
    """
    asked, backbone = config.distill.draft_vocabulary, load_config(config.backbone)
    whole = backbone.vocab_size
    if asked != "auto" and int(asked) > whole:
        raise UserError(
            f"distill.draft_vocabulary={asked}: the backbone's vocabulary has {whole} tokens; give 2 to {whole}, 0 for "
            "all of them, or auto"
        )
    ranked_V = ranked(train, whole)
    if asked == "auto":
        spec = head_spec(config.distill, backbone)
        architecture = Architecture.of(config.backbone.name_or_path, "", backbone, spec)
        covered_by = partial(coverage, ranked_V, validation)
        size = choose_draft_vocabulary(architecture, config.distill.exit_layers, covered_by)
    else:
        size = int(asked) % whole  # all tokens: no draft vocabulary
    if size == 0:
        return None, {"size": whole, "of": whole}
    covered = coverage(ranked_V, validation, size)
    if place.rank == 0:
        print(f"distill: the heads draft {size} of {whole} tokens, {covered:.2%} of those of the validation's answers")
    return ranked_V[:size].sort().values, {"size": size, "of": whole, "coverage": covered}


def open_cached_teacher(
    run: RunDir, backbone: dict[str, Any], train: packing.Packed, validation: packing.Packed
) -> CachedTeacher | None:
    """The cached teacher, or None for an online one. Raises UserError for a cache of another backbone, dtype or
    packing, and for one that is not complete."""
    if run.config.distill.teacher == "online":
        return None
    cache, sequences = TeacherCache(run / "cache"), packing.joined(train, validation)
    cache.check(run.config, backbone["fingerprint"], sequences)
    if not cache.is_complete():
        raise UserError(f"{cache.folder} is not complete: run `exit-heads cache` again, it resumes.")
    return CachedTeacher(cache, sequences, run.config.distill.exit_layers)


def response_counts(found: dict[str, int]) -> str:
    """One line: how many responses are trained on and how many are left out."""
    line = f"distill: {found['learned']} of {found['answers']} responses in {found['documents']} documents; left out: "
    line += f"{found['truncated']} truncated, {found['repeating']} repeating, {found['too_long']} too long"
    if later := found["joined"] + found["alone"]:
        line += f"; of {later} later turns {found['joined']} joined to the turn before, {found['alone']} stand alone"
    return line


def fit(
    run: RunDir,
    place: Place,
    device: torch.device,
    log: RankLog,
    fingerprint: str,
    train: packing.Packed,
    validation: packing.Packed,
    cached_teacher: CachedTeacher | None,
    draft_ids_W: torch.Tensor | None,
    spec: HeadSpec,
) -> tuple[Distillation, Throughput]:
    """Train from the newest checkpoint, or from the start, to distill.max_steps or until every head has stopped."""
    d = run.config.distill
    set_threads(run.config)
    (run / "checkpoints").mkdir(exist_ok=True)
    throughput = Throughput()
    checkpoints = Checkpoints(run / "checkpoints", d.checkpoint_every)
    signals = Signals()
    preemption = Preemption(checkpoints, signals)
    recorder = Recorder(Tracker(run, place.rank == 0), throughput, d.validate_every, d.max_steps, place.rank == 0)
    module = Distillation(run.config, fingerprint, train, validation, cached_teacher, draft_ids_W, spec)
    try:
        with watched_process_group(place, device, run.config.machine.timeout, log) as watchdog:
            resumed = agree_on_checkpoint(run / "checkpoints", place)
            checkpoints.kept += [resumed] if resumed else []
            callbacks = [signals, throughput, recorder, checkpoints, preemption, Progress(watchdog)]
            trainer = build_trainer(run, place, device, callbacks)
            try:
                trainer.fit(module, ckpt_path=resumed, weights_only=True)
            except UserError as error:  # every process raises it, and the first one shows it
                log.line(str(error))
                if place.rank > 0:
                    raise SystemExit(error.exit_code) from error
                raise
    except SystemExit as error:  # Lightning turns Ctrl-C into it and leaves further ones ignored
        if isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise
    if preemption.received:
        stop(preemption, place)
    return module, throughput


def agree_on_checkpoint(folder: Path, place: Place) -> Path | None:
    """The checkpoint to resume from, or None. Only process 0 looks: on a shared disk, others may see another state.

    Collective. Raises UserError on all processes for a checkpoint of another format.
    """
    chosen: list[Path | None] = [None]
    with fail_on_all_ranks():
        if place.rank == 0 and (newest := newest_intact(folder)):
            check_format(newest)
            chosen = [newest]
    dist.broadcast_object_list(chosen)
    if chosen[0] and place.rank == 0:
        print(f"distill: going on from {chosen[0]}")
    return chosen[0]


def build_trainer(run: RunDir, place: Place, device: torch.device, callbacks: list[Any]) -> lightning.Trainer:
    machine, d = run.config.machine, run.config.distill
    devices: Any = machine.processes_per_node
    if device.type == "cuda" and device.index is not None and place.world_size == 1:
        devices = [device.index]
    return lightning.Trainer(
        accelerator=device.type,
        devices=devices,
        num_nodes=machine.nodes,
        # Both sizes are given: the defaults would make the processes of a node tensor-parallel.
        strategy=ModelParallelStrategy(
            data_parallel_size=place.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        plugins=[place.environment, WholeFile()],
        precision="32-true",  # the heads are float32; the backbone keeps backbone.dtype
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
    """Ends this process as the signal that it received demands: KeyboardInterrupt or SystemExit."""
    number = preemption.received
    if place.rank == 0:
        print(f"distill: {signal.Signals(number).name}: saved {preemption.saved}; the same command goes on from there")
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(0 if place.rank else 128 + number)


def save_heads(run: RunDir, module: Distillation, num_layers: int, backbone: dict[str, Any]) -> None:
    for n, name in zip(run.config.distill.exit_layers, module.names, strict=True):
        with atomic_path(run / "heads" / name) as folder:
            head = ExitHead(n, num_layers, backbone, module.best[name]["weights"], module.draft_ids_W, module.spec)
            head.save(folder)


def describe(module: Distillation, throughput: Throughput) -> dict[str, Any]:
    """The results of the stage that run.json records."""
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
    elif machine.processes_per_node > 1 and not os.environ.get("OMP_NUM_THREADS"):  # torch gives every core to each
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // machine.processes_per_node))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the hints of Lightning and torch.distributed; our own warnings and every error still show."""
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
