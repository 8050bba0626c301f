"""The teacher: the frozen backbone's pass over packed sequences, and the states that exit heads learn from.

Takes token ids and positions; gives the final hidden state, the hidden state after each exit layer and the arguments
of the last decoder layer's call; `last_layer_arguments` computes these without a pass.

Letters: B sequences, T tokens of a sequence, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..inference.outline import Outline, packed_masks

TeacherStates = tuple[Tensor, dict[int, Tensor]]
"""(final_BTD after the final norm, exit layer N -> hidden state [B, T, D] after it)."""


class Teacher:
    """A backbone with hooks on its decoder layers. It is no nn.Module: the training module holds the backbone."""

    def __init__(self, backbone: nn.Module, exit_layers: list[int]):
        self.backbone, self.exit_layers = backbone, exit_layers
        self._seen: dict[Any, Any] = {}
        layers = backbone.model.layers  # type: ignore[union-attr]
        for n in exit_layers:
            # Each hook keeps one hidden state; output_hidden_states=True would keep all L.
            layers[n - 1].register_forward_hook(self._keep_output(n))
        for layer in layers:
            layer.register_forward_pre_hook(self._additive_mask, with_kwargs=True)
        # Exit heads have the last layer's index, so they need the last layer's arguments: mask and rotary angles.
        layers[-1].register_forward_pre_hook(self._keep_arguments, with_kwargs=True)

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[TeacherStates, dict[str, Any]]:
        """(hidden states, the last layer's keyword arguments) for token ids and positions [B, T]."""
        body: Any = self.backbone.model
        with torch.no_grad():
            like_BT1 = torch.empty(*ids_BT.shape, 1, dtype=body.norm.weight.dtype, device=ids_BT.device)
            final_BTD = body(
                input_ids=ids_BT, position_ids=positions_BT, use_cache=False,
                **packed_masks(self.backbone.config, like_BT1, positions_BT),
            ).last_hidden_state  # fmt: skip
        seen, self._seen = self._seen, {}
        return (final_BTD, {n: seen[n] for n in self.exit_layers}), seen["arguments"]

    def _keep_output(self, n: int):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[n] = output[0] if isinstance(output, tuple) else output

        return hook

    def _additive_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Convert a boolean mask to an additive one once per pass; CPU attention would convert it in every layer."""
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype != torch.bool or mask.is_cuda:
            return None
        masks = self._seen.setdefault("masks", {})
        if id(mask) not in masks:  # one mask, two with sliding windows; kept alive, so that their ids stay unique
            added = torch.zeros(mask.shape, dtype=args[0].dtype).masked_fill_(~mask, float("-inf"))
            masks[id(mask)] = (mask, added)
        return args, kwargs | {"attention_mask": masks[id(mask)][1]}

    def _keep_arguments(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._seen["arguments"] = kwargs


def last_layer_arguments(backbone: Any, layer: nn.Module, hidden_BTD: Tensor, positions_BT: Tensor) -> dict[str, Any]:
    """Attention mask, rotary angles and whatever else the backbone's last layer is called with, without a pass.

    layer: one of the last layer's class and index, such as an exit head: the backbone need not have its layers.
    `hidden_BTD` gives dtype and device, positions are [B, T].
    """
    outline = Outline(backbone.model, [layer] * backbone.config.num_hidden_layers)
    masks = packed_masks(backbone.config, hidden_BTD, positions_BT)
    _, calls = outline(inputs_embeds=hidden_BTD, position_ids=positions_BT, use_cache=False, **masks)
    return calls[-1].named
