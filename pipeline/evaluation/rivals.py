"""Rivals: transformers' own ways to decode the same greedy text, plain and with drafts, selected by name.

Takes a transformers model, token ids, stopping conditions and draft models; gives the new tokens and the seconds they
took, including the prefill, which cannot be timed separately in `generate`.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import UserError

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup drafts per round: the default of transformers' candidate generator."""

NAME = re.compile(r"generate|generate:static|early_exit|assistant_model:[1-9]\d*|prompt_lookup")
AT_EXIT_LAYERS = ("early_exit", "assistant_model")


def assisted(num_drafts: int) -> dict[str, Any]:
    """Generation settings of a draft model with which transformers drafts exactly `num_drafts` tokens a round.

    By default it drafts up to 20 and stops where the draft model's probability falls below 0.4.
    """
    return {
        "num_assistant_tokens": num_drafts,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


@dataclass(frozen=True)
class Rival:
    """One of transformers' ways of decoding; exit_layer is 0 for those without an early exit."""

    rival: str
    exit_layer: int = 0


def rivals_of(names: list[str], exit_layers: list[int]) -> list[Rival]:
    """The rivals of these names; one with an early exit appears once for each exit layer. Raises UserError for an
    unknown name."""
    if unknown := [name for name in names if not NAME.fullmatch(name)]:
        known = "generate, generate:static, early_exit, assistant_model:K, prompt_lookup"
        raise UserError(f"evaluate.rivals={names}: {unknown[0]!r} is not one of {known}; [] for none")
    return [Rival(name, n) for name in names for n in (exit_layers if _exits(name) else [0])]


def _exits(name: str) -> bool:
    return name.partition(":")[0] in AT_EXIT_LAYERS


def decode(
    model: Any,
    rival: Rival,
    ids: list[int],
    max_new_tokens: int,
    end_tokens: frozenset[int],
    drafts: Mapping[int, Any] = MappingProxyType({}),
) -> tuple[list[int], float]:
    """Decode greedily: the new tokens, an end token included, and the seconds from ids in to ids out.

    drafts: exit layer -> draft model, for `assistant_model`.
    """
    ends = sorted(end_tokens)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False} | _options(rival, model.device, drafts)
    if ends:
        options |= {"eos_token_id": ends, "pad_token_id": ends[0]}  # one row is never padded, but pad must be named
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # so that earlier work is not counted; tolist() below waits for this one
    with _undisturbed(model):
        started = time.perf_counter()
        row = torch.tensor([ids], device=model.device)
        out = model.generate(row, attention_mask=torch.ones_like(row), **options)
        tokens = out[0, len(ids) :].tolist()
        return tokens, time.perf_counter() - started


def _options(rival: Rival, device: torch.device, drafts: Mapping[int, Any]) -> dict[str, Any]:
    if rival.rival.startswith("assistant_model"):
        draft, num_drafts = drafts[rival.exit_layer], int(rival.rival.partition(":")[2])
        draft.generation_config = GenerationConfig(**assisted(num_drafts))
        return {"assistant_model": draft}
    if rival.rival == "generate:static":  # compiled only on a GPU, as transformers does by default
        return {"cache_implementation": "static", "disable_compile": device.type != "cuda"}
    if rival.rival == "early_exit":  # drafts with the backbone's final norm and LM head after layer N, untrained
        return {"assistant_early_exit": rival.exit_layer}
    if rival.rival == "prompt_lookup":
        return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    return {}


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Gives the model plain generation settings inside the block, and restores it afterwards, also after an error.

    The checkpoint's own settings may contain a repetition penalty, or a number of drafts that a call adapts. Early exit
    lowers the number of layers in the config while it drafts, and does not restore it when interrupted.
    """
    layers, settings = model.config.num_hidden_layers, model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.config.num_hidden_layers, model.generation_config = layers, settings
