"""Muon (Jordan et al., 2024): momentum whose matrix updates are orthogonalised by Newton-Schulz steps.

Matrices of one shape are orthogonalised as one batch, in float32. torch.optim.Muon does the same one matrix at a time
in bfloat16, which a CPU without bfloat16 units emulates at a tenth of the speed (measured: docs/lab-notes.md).
"""

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum. The RMS of an update is 0.2 lr, like that of AdamW (Liu et al., 2025)."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                by_shape[tuple(p.shape)].append((p, p.grad.lerp(buffer, group["momentum"])))
            for (rows, columns), pairs in by_shape.items():
                update = orthogonalise(torch.stack([u for _, u in pairs]))
                scale = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for (p, _), u in zip(pairs, update, strict=True):
                    p.sub_(u, alpha=scale)


def orthogonalise(g_MRC: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each g (M matrices, R rows, C columns), by a quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g_MRC.shape[1] > g_MRC.shape[2]
    x = g_MRC.mT if tall else g_MRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
