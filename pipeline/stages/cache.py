"""The stage `cache`: runs the backbone once over the packed responses and keeps its hidden states, from which
distill.teacher=cached trains.

Takes responses/ of the run folder; writes cache/ (training/teacher_cache.py). A shard is a pure function of responses,
weights and its number, so any number of processes can share the work, and a killed one loses only its current shard.

B sequences of a pass, S sequences in all, T positions of a sequence, P positions of a shard, D hidden
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..backbones.load import check_exit_layers, device_of, head_spec, load_model, rounds_by
from ..backbones.source import load_config
from ..planning.gain import candidates, with_exit_layers
from ..runs.folder import RunDir
from ..runs.shard_worker import Report, ShardWorker
from ..training import packing
from ..training.load_sharded import check_checkpoint
from ..training.teacher import Teacher
from ..training.teacher_cache import TeacherCache, check_room, head_of, size

TOKENS_PER_PASS = 4096
"""Tokens of a pass, padding included: enough to keep a GPU busy. It is not a config key, because it may change the last
bits of the cached values."""


def run(run: RunDir) -> None:
    """Fill cache/, or what is missing of it; does nothing with distill.teacher=online. Raises UserError for mistakes in
    the config, and for a cache that does not fit it."""
    config, cache = run.config, TeacherCache(run / "cache")
    if config.distill.teacher == "online":
        print("cache: distill.teacher=online: the backbone runs in every step, nothing is kept")
        return
    inputs = [run / "responses" / "manifest.json"]
    must_run = run.plan("cache", inputs)
    if not config.distill.exit_layers:  # auto: those among which the pilot chooses
        config = with_exit_layers(config, candidates(load_config(config.backbone).num_hidden_layers))
    cache.check_layers(config.distill.exit_layers)
    if not must_run and cache.is_complete():
        print("cache: done already")
        return
    # These checks precede the mark, so that a mistake found here can be corrected without --redo.
    architecture = load_config(config.backbone)
    check_exit_layers(config.distill.exit_layers, architecture.num_hidden_layers)
    manifest, train, validation, _ = packing.read_packed(run / "responses", config.distill)
    fingerprint = manifest["backbone"]["fingerprint"]
    spec = head_spec(config.distill, architecture)
    check_checkpoint(config.backbone, fingerprint, config.distill.exit_layers, config.distill.init, spec)
    sequences = packing.joined(train, validation)
    head = cache.manifest() or head_of(config, manifest["backbone"], architecture.hidden_size, sequences)
    print(f"cache: {check_room(cache.folder, head)}")
    if config.machine.threads > 0:
        torch.set_num_threads(config.machine.threads)
    device = device_of(config.machine.device)
    backbone = load_model(config.backbone, device, config.machine.device_map)
    with run.stage("cache", inputs, shared=True) as summary:
        cache.begin(head)
        cache.check(config, fingerprint, sequences)  # another process may have begun it
        speed = TeacherWorker(cache, sequences, backbone, device).work()
        bytes_ = sum(shard["bytes"] for shard in (cache.manifest() or {})["shards"])
        summary |= {"tokens": head["packing"]["tokens"], "bytes": bytes_, "tokens_per_second": speed}
    at = f" at {speed:.0f} tokens/s in this process" if speed else ""
    print(f"cache: hidden states of {summary['tokens']} tokens, {size(bytes_)}{at}")


class TeacherWorker(ShardWorker):
    """Passes the packed sequences of a begun cache through the backbone."""

    unit = "token"

    def __init__(self, cache: TeacherCache, sequences: packing.Packed, backbone: nn.Module, device: torch.device):
        super().__init__(cache, rounds_by(device))
        self.cache, self.sequences, self.device = cache, sequences, device
        manifest = cache.manifest()
        assert manifest is not None
        self.tokens, self.per_shard = manifest["packing"]["tokens"], manifest["sequences_per_shard"]
        self.of = cache.of()
        self.teacher = Teacher(backbone, manifest["exit_layers"])

    def total(self) -> int:
        return self.tokens

    def units(self, entry: dict[str, Any]) -> int:
        return entry["tokens"]

    def make(self, index: int, name: str, report: Report) -> Callable[[dict[str, Any]], None]:
        tensors = self.shard(index, report)
        return lambda made: self.cache.put(name, tensors, made, self.of)

    def shard(self, index: int, report: Report) -> dict[str, torch.Tensor]:
        """Tensor name -> [P, D] on the host, a pure function of weights, sequences and the shard's number."""
        first = index * self.per_shard
        last = min(first + self.per_shard, len(self.sequences))
        step = max(1, TOKENS_PER_PASS // self.sequences.ids_ST.shape[1])
        parts: dict[str, list[torch.Tensor]] = {}
        for start in range(first, last, step):
            batch = self.sequences[range(start, min(start + step, last))]
            lengths_B = self.sequences.lengths_S[batch["sequences_B"]]
            (final_BTD, hidden), _ = self.teacher(
                batch["ids_BT"].to(self.device), batch["positions_BT"].to(self.device)
            )
            states = {"final": final_BTD} | {f"hidden.{n}": state_BTD for n, state_BTD in hidden.items()}
            for name, state_BTD in states.items():
                kept = [row_TD[:length] for row_TD, length in zip(state_BTD, lengths_B.tolist(), strict=True)]
                parts.setdefault(name, []).append(torch.cat(kept).cpu())
            report(int(lengths_B.sum()))
        return {name: torch.cat(part) for name, part in parts.items()}
