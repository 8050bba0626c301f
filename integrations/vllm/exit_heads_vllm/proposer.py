"""Drafting with an exit head in vLLM's first model runner: a draft-model proposer that shares the served model's
layers.

Takes what vLLM gives a draft-model proposer; proposes tokens. Three things differ from a draft model: the model's
shallow part is the served model's own, its attention layers' caches are those of the served model, and of the tokens
that were just verified only the exit layer's keys and values are written, as the shallow layers' are there already.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from .fingerprint import check_fits, check_weights
from .support import check_served, is_exit_head


class ChosenProposer(DraftModelProposer):
    """vLLM's own proposer for draft models; an ExitHeadProposer where the draft model is an exit head."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "ChosenProposer":
        return super().__new__(ExitHeadProposer if is_exit_head(vllm_config.speculative_config) else cls)


class ExitHeadProposer(ChosenProposer):
    """Drafts with the served model's first N layers and the exit layer. Raises Refused for what was not tried, and
    for a head of another model."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None):
        check_served(vllm_config)
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.shallow_names: list[str] = []
        """Of the served model's attention layers that draft."""
        self.shallow_slots = torch.zeros_like(self._slot_mapping_buffer)
        self.new_rows_B: Tensor | None = None
        """In the first pass of a round: the row of each request's pending token."""

    def load_model(self, target_model: nn.Module) -> None:
        """Load the exit layer and bind the served model's modules and caches."""
        served, head = self.vllm_config.model_config, self.draft_model_config
        cache = self.vllm_config.load_config.download_dir
        check_fits(head.hf_config, served.model, served.hf_text_config, served.revision, cache)
        check_weights(head.hf_config, head.model, head.revision, cache)
        super().load_model(target_model)
        self.shallow_names = self.model.bind(target_model)
        self._draft_attn_layer_names = self._draft_attn_layer_names | set(self.shallow_names)
        self._draft_up_to_the_end()

    def _draft_up_to_the_end(self) -> None:
        """vLLM leaves a step without drafts, for all requests, when one of them is within K tokens of the longest
        length, and the exit layer's cache would have a hole there. Only the pending token has to fit: later ones are
        clamped."""
        longest = self.vllm_config.model_config.max_model_len
        if self.draft_model_config.max_model_len >= longest:
            self.runner.effective_drafter_max_model_len = longest + self.num_speculative_tokens - 1

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> tuple[int, Tensor, Any]:
        count, rows_B, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self.new_rows_B = rows_B
        return count, rows_B, metadata

    def _get_slot_mapping(self, num_tokens: int, slot_mapping: Tensor | None = None) -> dict[str, Tensor]:
        """Where each row's keys and values go, by layer. In the first pass the shallow layers write those of pending
        tokens alone: what they hold of verified tokens is left to the last bit as the served model wrote it."""
        slots = super()._get_slot_mapping(num_tokens, slot_mapping)
        if slot_mapping is None:
            return slots
        shallow = self.shallow_slots[:num_tokens].fill_(PADDING_SLOT_ID)
        shallow[self.new_rows_B] = self._slot_mapping_buffer[self.new_rows_B]
        return slots | dict.fromkeys(self.shallow_names, shallow)

    def _greedy_sample(self, hidden_states: Tensor) -> Tensor:
        return self.model.top_tokens(hidden_states)
