"""Detects damaged checkpoint files: git-lfs pointers, saved error pages, truncated downloads.

Takes a path; returns one sentence with the remedy, or None for a file that looks right. Of a safetensors file only the
header is read; a JSON file is parsed whole.
"""

import json
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec"
AGAIN = "fetch it again"
LARGEST_HEADER = 100_000_000
"""Largest header in bytes that safetensors accepts."""


def what_is_wrong(path: Path) -> str | None:
    """One sentence on the damage of a checkpoint's .json or .safetensors file, with the remedy; None if none is found.

    Raises nothing for a file that cannot be read: the sentence says so.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        return f"{path.name}: cannot be read ({error.strerror}): {AGAIN}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text:
        return f"{path.name}: is empty: {AGAIN}"
    if text.startswith(LFS):
        return f"{path.name}: is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
    if text.startswith(b"<"):
        return f"{path.name}: is a web page (of an error, or a login), not the file itself: {AGAIN}"
    if path.suffix == ".json":
        return _of_json(path)
    return _of_safetensors(path, start, size) if path.suffix == ".safetensors" else None


def damage_in(folder: Path) -> str | None:
    """The sentence of `what_is_wrong` for the first damaged file of a checkpoint's folder; None if none is damaged."""
    for pattern in ("config.json", "*.index.json", "*.safetensors", "*.json"):
        for path in sorted(folder.glob(pattern)):
            if wrong := what_is_wrong(path):
                return wrong
    return None


def _of_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{path.name}: is not JSON ({error}): {AGAIN}"
    return None if isinstance(found, dict | list) else f"{path.name}: holds no JSON object: {AGAIN}"


def _of_safetensors(path: Path, start: bytes, size: int) -> str | None:
    """Check the layout: 8 bytes (little-endian header length), the JSON header, then the tensors' bytes up to the end.

    `start` holds the first bytes of the file, `size` is its length in bytes.
    """
    if start.startswith(b"{"):
        return f"{path.name}: is text, not tensors: {AGAIN}"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x1f\x8b")):
        return f"{path.name}: is a pickled or packed file, not safetensors: give the checkpoint's own safetensors files"
    if size < 8 or (length := int.from_bytes(start[:8], "little")) > size - 8:
        return f"{path.name}: was cut short, at {size} bytes: {AGAIN}"
    if length > LARGEST_HEADER:
        return f"{path.name}: is no safetensors file: {AGAIN}"
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{path.name}: is no safetensors file: {AGAIN}"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"{path.name}: was cut short, at {size} of {whole} bytes: {AGAIN}"
    return None if size == whole else f"{path.name}: has {size - whole} bytes behind its last tensor: {AGAIN}"
