"""A repair of vLLM 0.32.0 on CPUs, without which sampled text is not the served model's, whatever drafts.

There the temperature, top-k and top-p of each request are spread over its drafted tokens by a kernel that writes into a
converted copy of its output, which is then thrown away (utils/cpu_triton_utils.py, `_expand_kernel_impl`): drafts are
verified at whatever temperature the memory happened to hold. Greedy requests alone are not affected. The test of the
law in tests/test_vllm.py finds it.

B requests, M drafted tokens
"""

import torch
from torch import Tensor


def spread(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """x [B] repeated for each request's drafted tokens: [M]. cu_num_tokens [B]: their running sum. Values that equal
    `replace_from` become `replace_to`, as vLLM's function has it."""
    counts_B = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    replaced_B = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced_B.repeat_interleave(counts_B, output_size=num_tokens)


def repair() -> None:
    """Replace vLLM's function by `spread`, on CPUs alone."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = spread
