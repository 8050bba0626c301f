"""The distillation loss, computed from hidden states without ever holding the logits of all positions.

`LinearDistillation` takes the final hidden states of teacher and heads and the shared LM head, and gives each head's
loss with its exact gradient, a chunk of logits at a time. The terms that a loss is made of are in losses.py.

Letters: H heads, R rows (positions that predict a response token), C rows of one chunk, D hidden size,
V vocabulary. p is the teacher's distribution, q a head's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .losses import TERMS


class LinearDistillation(torch.autograd.Function):
    """The loss of every head, from hidden states, without [R, V] logits.

        p = softmax(W t / T),  q = softmax(W s / T)
        loss_h = scale * sum_terms weight * T^power * sum_r term(p_r, q_hr)
        d loss_h / d s_hr = scale * sum_terms weight * T^(power - 1) * W^T (dterm/dz)_hr

    In a family that caps its logits, z = c tanh(W h / c) stands for W h, and (dterm/dz) is multiplied by 1 - (z/c)^2.

    W is frozen, so only the hidden states of the heads have a gradient. It is computed in the forward pass, where the
    logits that it needs are at hand; neither logits nor W are saved. The teacher's logits of a chunk are computed once
    for all heads, which share nothing else. There is no double backward.

    LinearDistillation.apply(weight_VD, teacher_RD, terms, scale, temperature, chunk, cap, mark, *students_RD) gives
    losses_H in float32 (float64 if W is). `terms` maps the name of a term to its weight (losses.py). `cap` is c, or 0.
    `mark` is called with the name of the part of the work that has just ended, "teacher" or "rest" (`Stopwatch.mark`),
    or is None. Peak memory: 4 * chunk * V logits, 5 with several terms, one more with a cap, and one [R, D] gradient
    per head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        teacher_RD: Tensor,
        terms: dict[str, float],
        scale: float,
        temperature: float,
        chunk: int,
        cap: float,
        mark: Callable[[str], None] | None,
        *students_RD: Tensor,
    ) -> Tensor:
        total_H = torch.zeros(len(students_RD), dtype=torch.float64, device=weight_VD.device)
        needed = ctx.needs_input_grad[8:]
        grads = [torch.empty_like(s) if need else None for s, need in zip(students_RD, needed, strict=True)]
        mix = [(t.function, terms[n] * temperature ** (t.power - 1)) for n, t in TERMS.items() if n in terms]
        rows_at_once, buffers = min(chunk, max(1, len(teacher_RD))), 4 if len(mix) == 1 else 5
        logits = ChunkedLogits(weight_VD, rows_at_once, buffers, cap, gradient=True)
        unit = scale * mix[0][1]
        for start in range(0, len(teacher_RD), chunk):
            rows = slice(start, start + chunk)
            if mark:
                mark("rest")
            log_p_CV = logits.log_softmax(0, teacher_RD[rows], temperature)
            if mark:
                mark("teacher")
            p_CV = torch.exp(log_p_CV, out=logits.rows(1, len(log_p_CV)))
            for h, student_RD in enumerate(students_RD):
                log_q_CV = logits.log_softmax(2, student_RD[rows], temperature)
                q_CV = torch.exp(log_q_CV, out=logits.rows(3, len(log_q_CV)))
                loss, grad_CV = _mixed(mix, log_p_CV, p_CV, log_q_CV, q_CV, logits.rows(-1, len(log_q_CV)))
                total_H[h] += loss
                if (grad_RD := grads[h]) is not None:
                    if logits.bend_CV is not None:
                        grad_CV.mul_(logits.bend_CV[: len(grad_CV)])
                    grad_RD[rows] = (grad_CV.to(weight_VD.dtype) @ weight_VD).mul_(unit)
        ctx.save_for_backward(*grads)
        return (total_H * (unit * temperature)).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        out_H = grad_outputs[0]
        scaled = [None if g is None else g * out_H[h].to(g.dtype) for h, g in enumerate(ctx.saved_tensors)]
        return None, None, None, None, None, None, None, None, *scaled


def _mixed(
    mix: Sequence[tuple[Callable, float]],
    log_p_CV: Tensor,
    p_CV: Tensor,
    log_q_CV: Tensor,
    q_CV: Tensor,
    spare_CV: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dz) of a chunk, both divided by the first term's weight. Overwrites log_q, and the spare buffer if
    there are several terms."""
    (first, unit), *others = mix
    grad_CV = spare_CV if others else log_q_CV
    loss = first(log_p_CV, p_CV, log_q_CV, q_CV, grad_CV)
    for term, weight in others:
        loss = loss + weight / unit * term(log_p_CV, p_CV, log_q_CV, q_CV, log_q_CV)
        grad_CV.add_(log_q_CV, alpha=weight / unit)
    return loss, grad_CV


class ChunkedLogits:
    """Buffers [C, V] that every chunk reuses: allocating them anew costs more than the softmax. cap: c of the logits
    c tanh(W h / c), or 0. gradient: whether its derivative is wanted too."""

    def __init__(self, weight_VD: Tensor, chunk: int, buffers: int, cap: float = 0.0, gradient: bool = False):
        self.weight_VD = weight_VD
        self.dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        shape = (chunk, len(weight_VD))
        self.cap = cap
        self.buffers = [torch.empty(shape, dtype=self.dtype, device=weight_VD.device) for _ in range(buffers)]
        self.bend_CV = torch.empty_like(self.buffers[0]) if cap and gradient else None
        """The derivative of the last logits by W h."""

    def rows(self, index: int, count: int) -> Tensor:
        return self.buffers[index][:count]

    def log_softmax(self, index: int, hidden_CD: Tensor, temperature: float) -> Tensor:
        """log softmax(W h / T) in buffer `index`. Overwrites the last buffer."""
        scratch_CV = self.rows(-1, len(hidden_CD))
        hidden_CD = hidden_CD.to(self.weight_VD.dtype)
        if self.weight_VD.dtype == self.dtype:
            torch.mm(hidden_CD, self.weight_VD.t(), out=scratch_CV)
        elif hidden_CD.is_cuda:  # bfloat16 inputs, float32 sums and result
            scratch_CV = torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=self.dtype)
        else:
            scratch_CV.copy_(hidden_CD @ self.weight_VD.t())
        if self.cap:
            scratch_CV.div_(self.cap).tanh_()
            if self.bend_CV is not None:
                torch.square(scratch_CV, out=self.bend_CV[: len(scratch_CV)]).neg_().add_(1)
            scratch_CV.mul_(self.cap)
        if temperature != 1.0:
            scratch_CV.div_(temperature)
        return torch.log_softmax(scratch_CV, -1, out=self.rows(index, len(hidden_CD)))


def plain_loss(
    weight_VD: Tensor,
    teacher_RD: Tensor,
    terms: dict[str, float],
    scale: float,
    temperature: float,
    students_RD: Sequence[Tensor],
    cap: float = 0.0,
) -> Tensor:
    """The losses_H of LinearDistillation by full logits and autograd: the reference in its tests."""

    def logits(hidden_RD: Tensor) -> Tensor:
        products_RV = hidden_RD @ weight_VD.t()
        return cap * torch.tanh(products_RV / cap) if cap else products_RV

    log_p_RV = torch.log_softmax(logits(teacher_RD) / temperature, -1)
    losses = []
    for student_RD in students_RD:
        log_q_RV = torch.log_softmax(logits(student_RD) / temperature, -1)
        each = [w * temperature ** TERMS[n].power * _PLAIN[n](log_p_RV, log_q_RV).sum() for n, w in terms.items()]
        losses.append(scale * sum(each))
    return torch.stack(losses)


def _plain_overlap(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    return torch.minimum(log_p_RV.exp(), log_q_RV.exp()).sum(-1)


def _plain_tvd_plus_plus(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    """The value of tvd with the gradient of the policy surrogate -sum_v stop_gradient[q (r - mean) / std] log q."""
    q_RV, reward_RV = log_q_RV.detach().exp(), (log_p_RV > log_q_RV).to(log_q_RV.dtype)
    mean_R1 = (q_RV * reward_RV).sum(-1, keepdim=True)
    std_R1 = (q_RV * (reward_RV - mean_R1) ** 2).sum(-1, keepdim=True).sqrt()
    surrogate_R = -(q_RV * (reward_RV - mean_R1) / std_R1 * log_q_RV).sum(-1)
    return 1 - _plain_overlap(log_p_RV, log_q_RV).detach() + surrogate_R - surrogate_R.detach()


_PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda log_p_RV, log_q_RV: (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1),
    "ce": lambda log_p_RV, log_q_RV: torch.nn.functional.nll_loss(log_q_RV, log_p_RV.argmax(-1), reduction="none"),
    "tvd": lambda log_p_RV, log_q_RV: (log_p_RV.exp() - log_q_RV.exp()).abs().sum(-1) / 2,
    "tvd++": _plain_tvd_plus_plus,
    "overlap": lambda log_p_RV, log_q_RV: -_plain_overlap(log_p_RV, log_q_RV).log(),
}
