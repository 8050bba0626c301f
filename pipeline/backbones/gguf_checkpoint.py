"""Makes an ordinary checkpoint of a GGUF file: safetensors, config, tokenizer with its chat template, end tokens.

Takes a header and a new folder. Quantised tensors become float32; float16 and bfloat16 ones keep their dtype. So every
number is the one that the file stands for. No more than one safetensors file is in memory at a time.

    config.json  generation_config.json  model.safetensors (or numbered files and their index)
    tokenizer.json  tokenizer_config.json  chat_template.jinja   as transformers reads them from the GGUF
    README.md                            the licence that the file names, for cards
    gguf.json                            file name, sha256, quantisation and name of what it was made from
"""

import contextlib
import json
import re
import shutil
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

from ..errors import reason, warn
from .gguf_header import Header, Stored
from .gguf_model import as_transformers, end_ids

KEPT = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Types of tensors that keep their dtype; all others become float32."""
LARGEST_FILE = 4_000_000_000
"""Bytes of a safetensors file, and about the memory that a conversion takes."""
RECORD = "gguf.json"
INDEX = "model.safetensors.index.json"
LIKE_GPT2 = ("gpt-2", "default", "mpt", "olmo", "jais", "trillion")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names in tokenizer.ggml.pre of how texts are split: as for GPT-2, or so with every digit by itself."""


def check_types(header: Header, sources: dict[str, Stored]) -> None:
    """Raises UserError for a type of tensors that cannot be dequantised here."""
    for kind in sorted({stored.kind for stored in sources.values()}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise header.error(f"its tensors are {kind.name}: not supported; give another quantisation") from None


def size_of(sources: dict[str, Stored]) -> int:
    """Bytes of the weights that `write` will write."""
    return sum(_size(stored) for stored in sources.values())


def write(folder: Path, header: Header, config: Any, sources: dict[str, Stored], record: dict[str, Any]) -> None:
    """Write the checkpoint into a new folder. record: the content of gguf.json.

    Raises UserError for a tokenizer that cannot be read.
    """
    folder.mkdir()
    _write_tokenizer(folder, header, config)
    _write_weights(folder, header, config, sources)
    config.save_pretrained(folder)
    ends = end_ids(header)
    generation = GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.save_pretrained(folder)
    (folder / "README.md").write_text(_card(header))
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


# ---- weights


def _dtype(stored: Stored) -> torch.dtype:
    return KEPT.get(stored.kind.name, torch.float32)


def _size(stored: Stored) -> int:
    return prod(stored.shape) * _dtype(stored).itemsize


def _write_weights(folder: Path, header: Header, config: Any, sources: dict[str, Stored]) -> None:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, stored in sources.items():
        if parts[-1] and filled + _size(stored) > LARGEST_FILE:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += _size(stored)
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    files = ["model.safetensors"] if len(parts) == 1 else files
    with tqdm(total=len(sources), desc="dequantising", unit="tensor", disable=None, leave=False) as progress:
        for file, names in zip(files, parts, strict=True):
            weights = {}
            for name in names:
                weights[name] = _tensor(name, header.path, sources[name], config)
                progress.update()
            save_file(weights, folder / file, metadata={"format": "pt"})
            with contextlib.suppress(OSError):  # safetensors writes files that only their owner can read
                shutil.copymode(folder / "tokenizer_config.json", folder / file)
    if len(parts) > 1:
        by_tensor = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": size_of(sources)}, "weight_map": by_tensor}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _tensor(parameter: str, path: Path, stored: Stored, config: Any) -> torch.Tensor:
    """The parameter's values as the file stands for them."""
    rows = prod(stored.shape[:-1])
    blocks = np.fromfile(path, np.uint8, stored.size, offset=stored.start).reshape(rows, -1)
    weight = dequantize(blocks, stored.kind).reshape(stored.shape)
    return torch.from_numpy(np.ascontiguousarray(as_transformers(parameter, weight, config))).to(_dtype(stored))


# ---- tokenizer and card


def _write_tokenizer(folder: Path, header: Header, config: Any) -> None:
    with tempfile.TemporaryDirectory() as alone:  # a tokenizer_config.json beside the GGUF would be mixed in
        (Path(alone) / "model.gguf").symlink_to(header.path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        except Exception as error:  # libraries raise exceptions of many types over metadata
            raise header.error(f"its tokenizer cannot be read: {reason(error)}") from None
    _split_as_trained(tokenizer, header)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "name_or_path"}, indent=1) + "\n")


def _split_as_trained(tokenizer: Any, header: Header) -> None:
    """Split off every digit where the file asks for it, which transformers does not; warn of a split unknown to it."""
    if header.fields["tokenizer.ggml.model"] != "gpt2":
        return
    split, like_gpt2 = header.fields.get("tokenizer.ggml.pre", "default"), pre_tokenizers.ByteLevel
    found = tokenizer.backend_tokenizer.pre_tokenizer
    if split in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, like_gpt2(add_prefix_space=False, use_regex=True)]
        )
    elif isinstance(found, like_gpt2) and split not in LIKE_GPT2:
        warn(
            "backbone",
            f"{header.path.name}: tokenizer.ggml.pre={split} is not known to transformers; texts are split as for "
            "GPT-2, so prompts may be cut into other tokens than the model has seen",
        )


def _card(header: Header) -> str:
    """A model card's text with the licence that the file names, if it names one."""
    licence = str(header.fields.get("general.license", "")).lower()
    front = f"---\nlicense: {licence}\n---\n" if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) else ""
    return f"{front}Dequantised from {header.path.name} ({header.quantisation}) by exit-heads.\n"
