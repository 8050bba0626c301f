"""Finds the steps in W&B's offline files, so that a resumed run logs the steps that a killed one did not write.

Takes a .wandb file (records in LevelDB's log format); gives the steps of its history records.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from ..errors import warn


def readable_steps(file: Path) -> list[int]:
    """The steps before the first unreadable record of a .wandb file; a warning says if there is such a record."""
    steps: list[int] = []
    try:
        for step in steps_in(file):
            steps.append(step)
    except Exception as error:  # from protobuf, the disk, or a malformed number
        warn("distill", f"W&B's file {file} is damaged ({type(error).__name__}); what it may lack is logged once more")
    return steps


def steps_in(file: Path) -> Iterator[int]:
    """The steps of a .wandb file: a header of 7 bytes, then records in blocks of 32 KiB, as in a LevelDB log.

    Bytes after the last whole record are ignored: they were being written when the process was killed.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # too little for a header: the rest of the block is padding
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        if kind == 0 or len(part) < length:
            return
        at += 7 + length
        record = part if kind in (1, 2) else record + part  # full or first; middle or last
        if kind in (1, 4):
            for item in Record.FromString(record).history.item:
                if "_step" in (item.key, *item.nested_key):
                    yield int(item.value_json)
