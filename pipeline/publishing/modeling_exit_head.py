"""A published exit head as a transformers model: `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

Takes the hidden state after the backbone's layer N; gives that of the exit layer, which the backbone's own final norm
and LM head turn into draft logits. It serves to inspect a head. Decoding uses custom_generate/ instead, and to read the
weights model.safetensors suffices, which contains one decoder layer under its own names.

B texts, T positions, D hidden
"""

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


class ExitHeadConfig(PretrainedConfig):
    """exit_layer: N. num_layers: L of the backbone. backbone_config: the backbone's config, reduced to one layer.
    draft_vocabulary: W, the number of tokens that the head can draft; 0 for all."""

    model_type = "exit_head"

    def __init__(
        self,
        exit_layer: int = 1,
        num_layers: int = 2,
        backbone_config: dict | None = None,
        draft_vocabulary: int = 0,
        **kwargs,
    ):
        self.exit_layer = exit_layer
        self.num_layers = num_layers
        self.draft_vocabulary = draft_vocabulary
        self.backbone_config = backbone_config or {}
        super().__init__(**kwargs)


class ExitHeadModel(PreTrainedModel):
    """One decoder layer of the backbone's class; `draft_ids` [W] are the tokens that it can draft, if not all."""

    config_class = ExitHeadConfig
    base_model_prefix = "layer"  # names in the checkpoint lack this prefix
    _supports_sdpa = True

    def __init__(self, config: ExitHeadConfig):
        super().__init__(config)
        layer_config = AutoConfig.for_model(**config.backbone_config)
        backbone = AutoModel.from_config(layer_config, attn_implementation=config._attn_implementation)
        self.layer, self.rotary_emb, self.layer_config = backbone.layers[0], backbone.rotary_emb, backbone.config
        if config.draft_vocabulary:
            self.register_buffer("draft_ids", torch.zeros(config.draft_vocabulary, dtype=torch.int32))
        self.post_init()

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Run the layer on hidden states after layer N at positions 0..T-1; returns [B, T, D] before the final norm."""
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        rotary = self.rotary_emb(hidden_BTD, positions_1T)
        # None where the attention function applies the causal mask or the window by itself
        mask = create_masks_for_generate(self.layer_config, hidden_BTD, None, None, positions_1T)
        if isinstance(mask, dict):  # one mask for each type of layer, and there is only one layer
            (mask,) = mask.values()
        return self.layer(hidden_BTD, attention_mask=mask, position_ids=positions_1T, position_embeddings=rotary)
