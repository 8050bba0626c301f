"""A published exit head as a transformers model: `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

Takes the hidden state after the backbone's layer N, gives that of the exit layer, which the backbone's own final norm
and LM head turn into draft logits. For looking at a head; decoding needs none of this (custom_generate/), and reading
the weights neither: model.safetensors holds one decoder layer under its own names. Knows nothing of the backbone's
weights.
"""

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


class ExitHeadConfig(PretrainedConfig):
    """exit_layer: N. num_layers: L of the backbone. backbone_config: that of the backbone, cut to the one layer."""

    model_type = "exit_head"

    def __init__(self, exit_layer: int = 1, num_layers: int = 2, backbone_config: dict | None = None, **kwargs):
        self.exit_layer = exit_layer
        self.num_layers = num_layers
        self.backbone_config = backbone_config or {}
        super().__init__(**kwargs)


class ExitHeadModel(PreTrainedModel):
    """One decoder layer of the backbone's class."""

    config_class = ExitHeadConfig
    base_model_prefix = "layer"  # the checkpoint holds the layer's names without it
    _supports_sdpa = True

    def __init__(self, config: ExitHeadConfig):
        super().__init__(config)
        layer_config = AutoConfig.for_model(**config.backbone_config)
        backbone = AutoModel.from_config(layer_config, attn_implementation=config._attn_implementation)
        self.layer, self.rotary_emb, self.layer_config = backbone.layers[0], backbone.rotary_emb, backbone.config
        self.post_init()

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] after layer N of positions 0..T-1 -> [B, T, D] before the final norm."""
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        rotary = self.rotary_emb(hidden_BTD, positions_1T)
        # None where the attention is causal, or reaches back no further than its window, without a mask
        mask = create_masks_for_generate(self.layer_config, hidden_BTD, None, None, positions_1T)
        if isinstance(mask, dict):  # one for each type of layer, and there is one layer
            (mask,) = mask.values()
        return self.layer(hidden_BTD, attention_mask=mask, position_ids=positions_1T, position_embeddings=rotary)
