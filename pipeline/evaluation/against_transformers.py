"""Compares the engine's logits with transformers' own, before anything is timed.

Takes the model, its engines and the prompts to measure; returns a record for results.json. Autoregressive and
speculative decoding run in the same engine, so only a comparison with `model(...)` finds errors that both make.
"""

from typing import Any

import torch
import transformers

from ..errors import UserError
from ..inference.backbone import SplitBackbone
from ..inference.canary import Difference, compare, rounding
from ..prompts.ids import Encoded

TEXTS = 4
"""Number of prompts compared: the longest, and the first of the others."""


def check(model: Any, engines: dict[int, SplitBackbone], encoded: Encoded, max_new_tokens: int) -> dict[str, Any]:
    """Compare every engine on a few prompts, each repeated up to the longest length that will be measured.

    Raises UserError where logits differ by more than rounding explains.
    """
    longest = max(encoded, key=lambda entry: len(entry[1]))
    others = [entry for entry in encoded if entry is not longest]
    largest, positions = 0.0, 0
    for n, engine in engines.items():
        limit = rounding(engine.dtype, engine.num_layers)
        for prompt, ids in [longest, *others][:TEXTS]:
            length = min(len(ids) + max_new_tokens, engine.max_context)
            text = (ids * (length // len(ids) + 1))[:length]
            found = compare(engine, model, text)
            if not found.largest <= limit:
                raise UserError(_differ(n, prompt.id, found, limit, engine.dtype))
            largest, positions = max(largest, found.largest), positions + found.positions
    return {
        "version": transformers.__version__,
        "prompts": min(TEXTS, len(encoded)),
        "positions": positions,
        "largest_difference": largest,
        "tolerance": limit,
    }


def _differ(exit_layer: int, prompt: str, found: Difference, limit: float, dtype: torch.dtype) -> str:
    return (
        f"evaluate: the decoder (exit layer {exit_layer}) and transformers {transformers.__version__} give different "
        f"logits on prompt {prompt}: at position {found.position} they differ by {found.largest:.2g} of their spread, "
        f"where rounding in {str(dtype).removeprefix('torch.')} explains {limit:.2g}. Nothing was measured, as no "
        "figure would hold for this backbone: give one whose layers the decoder knows, or report this"
    )
