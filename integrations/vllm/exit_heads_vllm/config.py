"""config.json of a published exit head, as vLLM wants to see a draft model.

Takes the file's fields; gives a config that has the backbone's fields (sizes, rotary parameters, vocabulary) with one
decoder layer, beside the head's own (N, L, draft vocabulary, which backbone).
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .support import check_head, check_version, found_version


class ExitHeadConfig(PretrainedConfig):
    """exit_layer: N. num_layers: L. backbone: name, fingerprint and model_type of the backbone. draft_vocabulary: W,
    the number of tokens that the head can draft; 0 for all. sha256: of the weights. Raises Refused; see
    support.py."""

    model_type = "exit_head"

    def __init__(self, backbone_config: dict[str, Any] | None = None, **fields: Any):
        shown: dict[str, Any] = {}
        if backbone_config is not None or "exit_layer" in fields:  # transformers also makes empty ones, to compare with
            check_version(found_version())
            check_head(fields | {"backbone_config": backbone_config})
            shown = AutoConfig.for_model(**(backbone_config or {})).to_dict()
        for name in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
            shown.pop(name, None)
        fields["architectures"] = ["ExitHeadForCausalLM"]
        fields.pop("auto_map", None)  # the folder's own class, for transformers
        self.draft_vocabulary = 0
        super().__init__(**shown | fields)
        self.backbone_config = backbone_config or {}
        if "exit_layer" in fields:
            # Which hidden states the served model hands to the drafter; vLLM caches compiled graphs by it, too.
            self.eagle_aux_hidden_state_layer_ids = [fields["exit_layer"]]
