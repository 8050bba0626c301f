"""A model's forward without its layers: it tells what each decoder layer is called with.

Takes a model of transformers and its decoder layers; runs the model's own forward with every layer replaced by a
recorder, and gives the hidden states before the first layer and the arguments of every layer's call: masks, rotary
angles, and whatever else the family passes. Nothing of a family is written down here.

B sequences, T tokens of a sequence, D hidden
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


class Call(NamedTuple):
    """The arguments of a layer's call besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class Recorder(nn.Module):
    """Stands for a decoder layer: keeps the arguments of its call, and returns the hidden states as they are."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, Call]]):
        super().__init__()
        self.__dict__.update(layer=layer, calls=calls)  # not as a child: its weights stay the model's

    def __getattr__(self, name: str) -> Any:  # a forward may ask a layer for its type
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_BTD: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.calls.append((hidden_BTD, Call(positional, named)))
        return hidden_BTD


class Outline:
    """body: `model.model` of a causal LM. layers: its decoder layers, or others of the same classes and indices."""

    def __init__(self, body: nn.Module, layers: Sequence[nn.Module]):
        self.calls: list[tuple[Tensor, Call]] = []
        self.body = copy.copy(body)
        # accelerate puts a `forward` on the instance, which would run the layers of the original
        self.body.__dict__ = {name: part for name, part in body.__dict__.items() if name != "forward"}
        recorders = nn.ModuleList(Recorder(layer, self.calls) for layer in layers)
        self.body._modules = {**body._modules, "layers": recorders, "norm": nn.Identity()}

    def __call__(self, **arguments: Any) -> tuple[Tensor, list[Call]]:
        """(hidden states [B, T, D] before the first layer, every layer's call) in a forward with these arguments.

        Raises ValueError if the forward changes hidden states between layers, or calls none.
        """
        self.calls.clear()
        self.body(**arguments)
        found = list(self.calls)
        self.calls.clear()
        if not found:
            raise ValueError("the model's forward calls no layer of model.layers")
        if any(hidden is not found[0][0] for hidden, _ in found):
            raise ValueError("the model's forward computes something between its layers")
        return found[0][0], [call for _, call in found]


MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
UNMASKED = ("gpt_oss",)
"""Model types whose forward forgets the positions when it makes masks, but takes masks that were made before."""


def packed_masks(config: Any, hidden_BTD: Tensor, positions_BT: Tensor) -> dict[str, Any]:
    """What a forward over packed sequences needs besides positions, in which each text begins again with 0, so that its
    texts do not see each other: nothing in most families. hidden_BTD gives sizes, dtype and device."""
    if config.model_type not in UNMASKED:
        return {}
    about = {"config": config, "inputs_embeds": hidden_BTD, "attention_mask": None, "past_key_values": None}
    made = {
        kind: make(**about, position_ids=positions_BT) for kind, make in MASKS.items() if kind in config.layer_types
    }
    return {"attention_mask": made}
