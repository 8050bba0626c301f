"""The rendezvous of distill's processes before torch.distributed starts, which names processes that are missing.

Takes the place of this process (launch.py) and a time limit; gives a store that all processes share, a list of them,
and torch.distributed on that store. If some do not arrive, every process that did ends with the same UserError.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, TCPStore

from ..errors import UserError
from .launch import Place

LOOK = 0.2
"""Seconds between two checks of who has arrived."""
READ = 10.0
"""Seconds that rank 0 keeps the store alive after a failed rendezvous, so that the others can read the reason."""
DECLINE = 60.0
"""Seconds that a process which cannot train tries to reach the others."""
LATER = 30.0
"""Seconds by which torch's time limit exceeds ours, so that our message, which names the ranks, comes first."""


@dataclass(frozen=True)
class Member:
    """One process of distill, as it describes itself to the others."""

    rank: int
    node: str
    pid: int
    device: str
    threads: int
    versions: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, process {self.pid})"


def rendezvous(place: Place, device: torch.device, timeout: float) -> tuple[TCPStore, list[Member]]:
    """Wait for all processes, at most `timeout` seconds after rank 0; gives (shared store, members by rank).

    `device` is that of this process. Raises UserError, the same on every process, if some did not arrive, have other
    versions, or failed before.
    """
    limit = f"machine.timeout={timeout:g}"
    try:
        store = connect(place, timeout, host=place.hosts and place.rank == 0)
    except DistError as error:
        if place.rank == 0:
            raise UserError(
                f"MASTER_PORT={place.port}: rank 0 cannot listen there on {place.node}, take another: {_first(error)}"
            ) from None
        raise UserError(
            f"{limit}: rank 0 did not come to {place.address}:{place.port} within {timeout:g} s; this is rank "
            f"{place.rank} of {place.world_size} on {place.node}. Look for what rank 0 printed; raise machine.timeout "
            "if nodes start slowly, set MASTER_ADDR if it is another address"
        ) from None
    ours = PrefixStore(f"rendezvous {place.attempt}", store)
    ours.set(f"member {place.rank}", json.dumps(asdict(_introduce(place, device))))
    try:
        if place.rank == 0:
            ours.set("verdict", _wait_for_all(ours, place.world_size, timeout) or "complete")
        ours.set_timeout(timedelta(seconds=timeout + LATER))
        verdict = ours.get("verdict").decode()
    except DistError as error:
        raise UserError(f"rank 0 at {place.address} went away while the processes met: {_first(error)}") from None
    if verdict != "complete":
        _leave_after_all_have_read(ours, place)
        raise UserError(verdict)
    return store, [_member(ours, rank) for rank in range(place.world_size)]


@contextmanager
def before_rendezvous(place: Place) -> Iterator[None]:
    """Context manager for work before the rendezvous: if it fails here, the others are told and need not wait."""
    try:
        yield
    except Exception as error:
        if place.world_size > 1 and not place.starts_others:
            with suppress(DistError):
                _decline(place, _first(error))
        raise


def _decline(place: Place, reason: str) -> None:
    ours = PrefixStore(f"rendezvous {place.attempt}", connect(place, DECLINE, host=place.hosts and place.rank == 0))
    text = f"rank {place.rank} on {place.node} ended before all had met: {reason}"
    if place.rank == 0:
        ours.set("verdict", text)
        _until(lambda: ours.add("read", 0) + ours.add("declining", 0) >= place.world_size - 1, DECLINE)
    else:
        ours.compare_set("declined", "", text)
        ours.add("declining", 1)


def connect(place: Place, timeout: float, host: bool = False) -> TCPStore:
    """A new connection to the store of rank 0. Raises DistError if there is none within `timeout` seconds."""
    limit = timedelta(seconds=timeout)
    return TCPStore(place.address, place.port, is_master=host, timeout=limit, wait_for_workers=False)


def start_group(store: TCPStore, place: Place, device: torch.device, timeout: float) -> None:
    """Start torch.distributed, with NCCL on GPUs and gloo on CPUs; operations time out after `timeout` + LATER s."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # object collectives, and calls without a device, use the current one
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=PrefixStore(f"group {place.attempt}", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout + LATER),
        device_id=device if cuda else None,
    )


def described(members: list[Member]) -> list[str]:
    """One line for each node: its ranks, devices, threads and versions."""
    return [
        f"{node}: {ranks_of(member.rank for member in there)}, {', '.join(_runs(member.device for member in there))}, "
        f"{there[0].threads} CPU thread{'s' * (there[0].threads > 1)} each, {there[0].versions}"
        for node, there in _by_node(members)
    ]


def ranks_of(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "ranks 0-2, 5"."""
    ordered = sorted(ranks)
    runs = [[r for _, r in group] for _, group in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(ordered) > 1)} {text}"


def _introduce(place: Place, device: torch.device) -> Member:
    versions = [f"torch {torch.__version__}", f"lightning {version('lightning')}"]
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions.append(f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[attr-defined]
    return Member(place.rank, place.node, os.getpid(), name, torch.get_num_threads(), ", ".join(versions))


def _wait_for_all(store: PrefixStore, world_size: int, timeout: float) -> str | None:
    """On rank 0: wait for all; the reason if the rendezvous failed, else None."""
    absent = set(range(world_size))
    deadline = time.monotonic() + timeout
    while absent := {rank for rank in absent if not store.check([f"member {rank}"])}:
        if store.check(["declined"]):
            return store.get("declined").decode()
        if time.monotonic() > deadline:
            there = [_member(store, rank) for rank in range(world_size) if rank not in absent]
            names = "; ".join(f"{node}: {ranks_of(m.rank for m in here)}" for node, here in _by_node(there))
            return (
                f"machine.timeout={timeout:g}: {ranks_of(absent)} of {world_size} did not come within {timeout:g} s; "
                f"there are {names}. Look for what the missing ones printed; raise machine.timeout if nodes start "
                "slowly"
            )
        time.sleep(LOOK)
    members = [_member(store, rank) for rank in range(world_size)]
    if len({member.versions for member in members}) > 1:
        ordered = sorted(members, key=lambda member: member.versions)
        groups = groupby(ordered, lambda member: member.versions)
        found = "; ".join(f"{ranks_of(m.rank for m in group)}: {versions}" for versions, group in groups)
        return f"all ranks need the same versions, found {found}. Give all nodes one environment"
    return None


def _leave_after_all_have_read(store: PrefixStore, place: Place) -> None:
    store.add("read", 1)
    if place.rank == 0:
        there = sum(store.check([f"member {rank}"]) for rank in range(place.world_size))
        _until(lambda: store.add("read", 0) >= there, READ)


def _until(ready: Callable[[], bool], timeout: float) -> None:
    """Wait until `ready` or for `timeout` seconds; rank 0 calls it, since the store ends with rank 0."""
    deadline = time.monotonic() + timeout
    while not ready() and time.monotonic() < deadline:
        time.sleep(LOOK)


def _member(store: PrefixStore, rank: int) -> Member:
    return Member(**json.loads(store.get(f"member {rank}")))


def _by_node(members: list[Member]) -> list[tuple[str, list[Member]]]:
    nodes = list(dict.fromkeys(member.node for member in members))
    return [(node, [member for member in members if member.node == node]) for node in nodes]


def _runs(names: Iterable[str]) -> list[str]:
    counts = [(name, len(list(group))) for name, group in groupby(names)]
    return [f"{count} x {name}" if count > 1 else name for name, count in counts]


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
