"""Reads the header of a GGUF file, from which everything about the model but its weights is known.

Takes a path; gives metadata and where each tensor lies. Every length is checked against the file's size, so a file that
is cut short or damaged raises UserError, whatever its bytes say. (gguf's own reader loops through damaged counts.)
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, LlamaFileType

from ..errors import UserError
from .damaged import AGAIN, what_is_wrong

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""GGUF's number of a value's type -> its name in numpy."""
STRING, ARRAY = 8, 9
LARGEST_RANK = 8


class Stored(NamedTuple):
    """Where a tensor lies in the file, and how it is stored there."""

    shape: tuple[int, ...]
    """In torch's order, outputs first; in numbers, not in quantised blocks."""
    kind: GGMLQuantizationType
    start: int
    """Offset in bytes from the beginning of the file."""
    size: int
    """Number of bytes."""


@dataclass(frozen=True)
class Header:
    """The header of one file. `where` is the config key with its value, with which every message begins."""

    path: Path
    where: str
    fields: dict[str, Any]
    """Metadata by key: numbers, texts, booleans, lists of them."""
    tensors: dict[str, Stored]

    def error(self, text: str) -> UserError:
        return UserError(f"{self.where}: {self.path.name}: {text}")

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    @property
    def quantisation(self) -> str:
        """Such as Q4_1 or Q4_K_M: what the file says of itself, else the type of most of its numbers."""
        try:
            name = LlamaFileType(self.fields["general.file_type"]).name
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except (KeyError, ValueError):
            count: dict[str, int] = {}
            for stored in self.tensors.values():
                count[stored.kind.name] = count.get(stored.kind.name, 0) + prod(stored.shape)
            return max(count, key=lambda kind: count[kind], default="unknown")


def read_header(path: Path, where: str) -> Header:
    """The header of a GGUF file. Raises UserError for any other file, and for one that is cut short or damaged."""
    if wrong := what_is_wrong(path):
        raise UserError(f"{where}: {wrong}")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UserError(
                f"{where}: {path.name}: is no GGUF file (it does not begin with the letters GGUF); give a .gguf file, "
                "or the folder of a checkpoint"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                header = Header(path, where, *_Reader(content).header())
            except (struct.error, ValueError, OverflowError) as error:
                raise UserError(
                    f"{where}: {path.name}: its header is damaged, or was cut short at {size} bytes ({error}): {AGAIN}"
                ) from None
    whole = max((stored.start + stored.size for stored in header.tensors.values()), default=0)
    if size < whole:
        raise header.error(f"was cut short, at {size} of {whole} bytes: {AGAIN}")
    return header


class _Reader:
    """Walks through a header. Raises struct.error or ValueError where the content is not what the format says."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, len(MAGIC)

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        (version,) = self.take("<I")
        if version not in VERSIONS:
            order = "is written for big-endian machines" if version & 0xFFFF == 0 else f"is of version {version}"
            raise ValueError(f"it {order}, read are versions {' and '.join(map(str, VERSIONS))} in little-endian order")
        num_tensors, num_fields = self.take("<QQ")
        fields = {}
        for _ in range(num_fields):
            key = self.text()
            fields[key] = self.value(*self.take("<I"))
        table = [(self.text(), *self.place()) for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment={alignment}")
        data = -(-self.at // alignment) * alignment
        tensors = {name: Stored(shape, kind, data + offset, size) for name, shape, kind, offset, size in table}
        if len(tensors) < num_tensors:
            raise ValueError("two tensors have one name")
        return fields, tensors

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.content, self.at)
        self.at += struct.calcsize(layout)
        return values

    def bytes(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            raise ValueError(f"{count} bytes are announced at {self.at}")
        self.at += count
        return self.content[self.at - count : self.at]

    def text(self) -> str:
        return self.bytes(*self.take("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.numbers(kind, 1)[0]
        inside, count = self.take("<IQ")
        return [self.text() for _ in range(count)] if inside == STRING else self.numbers(inside, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind} at {self.at}")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()

    def place(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int, int]:
        """Shape, type, offset and size in bytes of the next tensor in the table."""
        (rank,) = self.take("<I")
        if rank > LARGEST_RANK:
            raise ValueError(f"a tensor of {rank} dimensions")
        shape = tuple(reversed(self.take(f"<{rank}Q")))
        number, offset = self.take("<IQ")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(f"rows of {shape[-1]} numbers in blocks of {block}")
        return shape, kind, offset, prod(shape) // block * block_bytes
