"""Checkpoint files: written whole or not at all, and read only while they are what was written.

Takes what Lightning wants to save and a folder, gives a file and the newest one that can be trusted. Knows nothing of
what a checkpoint holds.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..errors import warn
from ..runs.files import atomic_path


class WholeFile(TorchCheckpointIO):
    """Saves straight to disk under a temporary name, then renames.

    Lightning's own would put the whole file together in memory first: on process 0, which holds heads, optimizer and
    best weights already, that is once more all of them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises UserError if the disk is full."""
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch's writer makes of an error of the file
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name without the bytes


def newest_intact(folder: Path) -> Path | None:
    """The checkpoint to go on from, or None. Whatever is not what was written is passed over with a warning."""
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for path in paths:
        if damage := damage_of(path):
            warn("distill", f"{path} is damaged ({damage}); trying the one before")
        else:
            return path
    if paths:
        warn("distill", f"no checkpoint in {folder} can be read; starting anew")
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a file of torch.save, or None. Reads all of it, holds a block at a time.

    torch.save writes a zip archive with a CRC-32 of each tensor, which torch.load does not compare: it would load a
    flipped bit as a weight. zipfile compares them, but forgives the archive's own headers more than torch does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if wrong := archive.testzip():
                return f"the checksum of {wrong} is another"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both raise many kinds for a broken file
        return str(error).partition("\n")[0] or type(error).__name__
    return None
