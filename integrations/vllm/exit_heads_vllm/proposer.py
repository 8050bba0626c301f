"""Drafting with an exit head in vLLM's first model runner: a draft-model proposer that shares the served model's
layers.

Takes what vLLM gives a draft-model proposer; proposes tokens. Three things differ from a draft model: the model's
shallow part is the served model's own, its attention layers' caches are those of the served model, and tokens that were
just verified do not pass through the shallow layers again: the served model hands over their hidden states behind layer
N (as it does for EAGLE-3), which the exit layer takes for its keys and values.

B requests, M rows of a pass, D hidden
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from .fingerprint import check_fits, check_weights
from .support import check_served, is_exit_head


class ChosenProposer(DraftModelProposer):
    """vLLM's own proposer for draft models; an ExitHeadProposer where the draft model is an exit head."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "ChosenProposer":
        return super().__new__(ExitHeadProposer if is_exit_head(vllm_config.speculative_config) else cls)


class ExitHeadProposer(ChosenProposer):
    """Drafts with the served model's first N layers and the exit layer. Raises Refused for what was not tried and for
    a head of another model, before the served model is loaded."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None):
        check_served(vllm_config)
        _check_files(vllm_config)
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        runner.use_aux_hidden_state_outputs = True  # behind which layer, says config.py
        self.shallow_names: list[str] = []
        """Of the served model's attention layers that draft."""

    def load_model(self, target_model: nn.Module) -> None:
        """Load the exit layer and bind the served model's modules and caches."""
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

    def propose(
        self, num_speculative_tokens: int, target_token_ids: Tensor, target_positions: Tensor,
        target_hidden_states: Tensor, *args: Any, common_attn_metadata: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Drafts [B, K]. Where none are wanted, the exit layer's keys and values of the served model's rows are
        written, and that is all."""
        # `--max-model-len auto` shortens it after this was made: by the longer one, drafts beyond the end would be
        # written over verified tokens in the served model's cache.
        self.max_model_len = self.runner.max_model_len
        if num_speculative_tokens:
            return super().propose(
                num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, *args,
                common_attn_metadata=common_attn_metadata, **kwargs,
            )  # fmt: skip
        self.num_speculative_tokens, self._last_draft_probs = 0, None
        with self._alone(common_attn_metadata):
            self.model.attend(target_positions, target_hidden_states)
        return target_token_ids.new_empty(common_attn_metadata.batch_size(), 0, dtype=torch.int64)

    def _update_positions_dependent_metadata(self, positions: Tensor, *args: Any) -> Tensor:
        """vLLM sends a row beyond the longest length to position 0, from where the next draft would go on to position 1
        and overwrite the served model's keys and values there. Here it stays at 0, and nothing of it is written: no
        pending token is at position 0."""
        return super()._update_positions_dependent_metadata(
            torch.where(positions == 0, self.max_model_len - 1, positions), *args
        )

    def set_inputs_first_pass(
        self, *args: Any, target_hidden_states: Tensor, cad: Any, num_rejected_tokens_gpu: Tensor | None, **kwargs: Any
    ) -> tuple[int, Tensor, Any]:
        """Also runs the shallow layers over the pending tokens, one of each request, which the served model has not
        seen; the rows of both together are what the exit layer's pass begins with."""
        count, rows_B, metadata = super().set_inputs_first_pass(
            *args, target_hidden_states=target_hidden_states, cad=cad, num_rejected_tokens_gpu=num_rejected_tokens_gpu,
            **kwargs,
        )  # fmt: skip
        rows_B = rows_B.long()
        requests = len(rows_B)
        self._put(target_hidden_states, cad, requests)
        rejected = 0 if num_rejected_tokens_gpu is None else num_rejected_tokens_gpu
        pending = metadata.replace(
            query_start_loc=self.arange[: requests + 1],
            query_start_loc_cpu=torch.arange(requests + 1, dtype=torch.int32),
            seq_lens=metadata.seq_lens - rejected,
            num_actual_tokens=requests,
            max_query_len=1,
            slot_mapping=metadata.slot_mapping[rows_B],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        with self._alone(pending):
            self.hidden_states[rows_B] = self.model.shallow(self.input_ids[rows_B], self.positions[rows_B])
        self.model.known = self.hidden_states, rows_B
        return count, rows_B, metadata

    def _put(self, hidden_MD: Tensor, metadata: Any, requests: int) -> None:
        """Into the rows of the exit layer's pass: each request has got one row more than in the served model's."""
        rows, longest = len(hidden_MD), metadata.max_query_len
        if rows == requests * longest:
            room = self.hidden_states[: rows + requests].view(requests, longest + 1, -1)
            room[:, :longest] = hidden_MD.view(requests, longest, -1)
            return
        before_M = self.arange[:requests].repeat_interleave(torch.diff(metadata.query_start_loc), output_size=rows)
        self.hidden_states[self.arange[:rows] + before_M] = hidden_MD

    def _alone(self, metadata: Any) -> AbstractContextManager[None]:
        """The context of a pass with this attention metadata, outside vLLM's own."""
        _, by_layer = self.build_per_group_and_layer_attn_metadata(metadata)
        return set_forward_context(
            by_layer,
            self.vllm_config,
            num_tokens=metadata.num_actual_tokens,
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, metadata.slot_mapping),
        )

    def _greedy_sample(self, hidden_states: Tensor) -> Tensor:
        return self.model.top_tokens(hidden_states)


def _check_files(vllm_config: VllmConfig) -> None:
    """Raises Refused for a head of another model, or with changed weights; vLLM has not loaded any weights yet."""
    served, head = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    cache = vllm_config.load_config.download_dir
    check_weights(head.hf_config, head.model, head.revision, cache)
    check_fits(head.hf_config, served.model, served.hf_text_config, served.revision, cache)
