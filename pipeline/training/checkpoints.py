"""Checkpoint files: written completely or not at all, and never resumed from when damaged.

`WholeFile` saves what Lightning hands to it; `newest_intact` finds the checkpoint to resume from, and `check_format`
refuses one that another version of this program wrote. What a checkpoint holds is decided in module.py.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..errors import UserError, warn
from ..runs.files import atomic_path

FORMAT = 2
"""Raised when names or contents of a checkpoint change: weights of another name would be left out without an error."""


class WholeFile(TorchCheckpointIO):
    """Saves directly to disk under a temporary name, then renames.

    Lightning's own plugin would build the whole file in memory first: a second copy of heads, optimizer and best
    weights on process 0, which holds all of them already.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises UserError if the disk is full."""
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer hides the error of the file system behind it
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the name without the bytes


def newest_intact(folder: Path) -> Path | None:
    """The checkpoint to resume from, or None. Damaged files are passed over with a warning."""
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for path in paths:
        if damage := damage_of(path):
            warn("distill", f"{path} is damaged ({damage}); trying the one before")
        else:
            return path
    if paths:
        warn("distill", f"no checkpoint in {folder} can be read; starting anew")
    return None


def check_format(path: Path) -> None:
    """Raises UserError for an intact checkpoint that another version of this program wrote."""
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"{path}: this checkpoint has format {found}, and this version of exit-heads resumes from format {FORMAT} "
            "only. Finish the run with the version that began it, or train anew with --redo distill."
        )


def damage_of(path: Path) -> str | None:
    """What is wrong with a file written by torch.save, or None. Reads the whole file, a block at a time.

    torch.save writes a zip archive with a CRC-32 of each tensor, which torch.load does not compare: it would load a
    flipped bit as a weight. zipfile compares the checksums, but tolerates damage to the archive's headers that torch
    does not; so both read the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if wrong := archive.testzip():
                return f"the checksum of {wrong} does not match"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both raise many kinds for a broken file
        return str(error).partition("\n")[0] or type(error).__name__
    return None
