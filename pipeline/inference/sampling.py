"""From logits to tokens: the processors that shape p and q alike, drawing, and the exact accept rule.

Takes logits of the exit head (q) and of the backbone (p), gives drafted tokens, how many of them are accepted
and the bonus token; the emitted text is distributed as the backbone's own. Knows nothing of layers or caches.

K drafted tokens this round, V vocabulary, M rows;  p: backbone's distribution, q: exit head's
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounds import Confidence


@dataclass
class Sampler:
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    processors: Callable[[Tensor, Tensor], Tensor] | None = None
    """transformers' LogitsProcessorList: (ids [1, T], logits [1, V]) -> logits [1, V]. Replaces the three above,
    except that temperature 0 still means greedy."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def shape(self, logits_MV: Tensor, context: list[int], drafted: list[int]) -> Tensor:
        """Processed logits [M, V] of M consecutive positions.

        The first row follows `context` and all but the last M-1 of `drafted`; each further row one token more.
        """
        if self.processors is not None:
            ids = torch.tensor([context + drafted], device=logits_MV.device)
            first = ids.shape[1] - len(logits_MV) + 1
            rows = [self.processors(ids[:, : first + i], row[None]) for i, row in enumerate(logits_MV)]
            return torch.cat(rows)
        if self.greedy:
            return logits_MV
        logits_MV = logits_MV / self.temperature
        if self.top_k:
            kth = logits_MV.topk(min(self.top_k, logits_MV.shape[-1])).values[:, -1:]
            logits_MV = logits_MV.masked_fill(logits_MV < kth, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = logits_MV.sort(-1, descending=True)
            mass = ordered.softmax(-1)
            outside = mass.cumsum(-1) - mass >= self.top_p  # the token that crosses the line stays
            logits_MV = logits_MV.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
        return logits_MV

    def draw(self, logits_V: Tensor) -> int:
        """A token from processed logits."""
        return int(logits_V.argmax()) if self.greedy else self._draw(logits_V.softmax(-1))

    def draft(self, q: Confidence) -> int:
        """A token from the head's distribution."""
        return self.draw(q.logits_V) if self.greedy else self._draw(q.q_V)

    def accept(self, drafted: list[int], q: list[Confidence], p_logits_MV: Tensor) -> tuple[int, int]:
        """(accepted, bonus token) of a round; p are processed logits of K+1 rows.

        Greedy: drafts are accepted while they equal the backbone's argmax. Sampling (Leviathan et al., ICML
        2023, algorithm 1): draft x is accepted with probability min(1, p(x)/q(x)); the first rejected one is
        replaced by a draw from the residual max(p - q, 0); if none is, the bonus comes from p's last row.
        """
        if self.greedy:
            targets = p_logits_MV.argmax(-1).tolist()
            accepted = next((i for i, x in enumerate(drafted) if x != targets[i]), len(drafted))
            return accepted, targets[accepted]
        p_MV = p_logits_MV.softmax(-1)
        if drafted:
            q_KV = torch.stack([one.q_V for one in q])
            x_K1 = torch.tensor(drafted, device=p_MV.device)[:, None]
            kept = self._coins((p_MV[:-1].gather(1, x_K1) / q_KV.gather(1, x_K1))[:, 0])
            if False in kept:
                first = kept.index(False)
                return first, self._draw(residual(p_MV[first], q_KV[first]))
        return len(drafted), self._draw(p_MV[-1])

    # All randomness of a text passes through these two, so that a proof can enumerate it (tests/test_exact.py).

    def _draw(self, weights_V: Tensor) -> int:
        """An index with chance proportional to its weight: one uniform number through the inverse of the sums. (On a
        CPU multinomial draws a number for every index, which takes longer than two decoder layers of a thin model.)"""
        exact = torch.float32 if weights_V.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        sums_V = weights_V.cumsum(-1, dtype=exact)
        u = torch.rand(1, generator=self.generator, device=sums_V.device, dtype=exact)
        # the first sum above u: never an index without weight
        return min(int(torch.searchsorted(sums_V, u * sums_V[-1:], right=True)), len(sums_V) - 1)

    def _coins(self, chance_K: Tensor) -> list[bool]:
        """Independent coins that show True with these chances; above 1 is always."""
        u_K = torch.rand(len(chance_K), generator=self.generator, device=chance_K.device, dtype=chance_K.dtype)
        return (u_K < chance_K).tolist()


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """max(p - q, 0), unnormalised; p itself where rounding leaves nothing of it."""
    rest = (p_V - q_V).clamp_(min=0)
    return rest if rest.sum() > 0 else p_V
