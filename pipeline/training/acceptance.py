"""How often the teacher would accept a head's drafts on given responses, estimated without decoding.

`draft_statistics` takes the final hidden states of teacher and heads and gives figures per row; `acceptance_lengths`
turns them into expected acceptance lengths, by which the best step of a head is chosen.

Letters: H heads, R rows (positions that predict a response token), C rows of one chunk, D hidden size,
V vocabulary, W tokens of the draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunked_loss import ChunkedLogits


@torch.no_grad()
def draft_statistics(
    weight_VD: Tensor,
    teacher_RD: Tensor,
    students_RD: Sequence[Tensor],
    chunk: int,
    draft_ids_W: Tensor | None = None,
    cap: float = 0.0,
) -> dict[str, Tensor]:
    """How well each head would draft the token after each row, at temperature 1. Each value is [H, R], float32. cap: of
    the family's logits (`ChunkedLogits`).

    loss     KL(p || q), nats
    overlap  sum_v min(p, q) = 1 - TV(p, q): the probability that speculative sampling accepts a token drawn from
             q (Leviathan et al. 2023, theorem 3.5)
    match    1 where argmax p = argmax q, so that greedy decoding accepts, else 0

    With a draft vocabulary, q is 0 outside it. overlap and match are still those of the whole p. The loss is that of
    training, KL of p restricted to the draft vocabulary and renormalised, and there is a fourth figure:

    lost_mass  1 - sum of p over the draft vocabulary: what no head can draft
    """
    rows_at_once, ids_W = min(chunk, max(1, len(teacher_RD))), draft_ids_W
    whole = ChunkedLogits(weight_VD, rows_at_once, 4 if ids_W is None else 2, cap)
    drafts = whole if ids_W is None else ChunkedLogits(weight_VD.index_select(0, ids_W), rows_at_once, 4, cap)
    names = ("loss", "overlap", "match") if ids_W is None else ("loss", "overlap", "match", "lost_mass")
    shape = (len(students_RD), len(teacher_RD))
    found = {name: torch.empty(shape, device=weight_VD.device) for name in names}
    for start in range(0, len(teacher_RD), chunk):
        rows = slice(start, start + chunk)
        log_p_CV = whole.log_softmax(0, teacher_RD[rows], 1.0)
        best_C, count = log_p_CV.argmax(-1), len(log_p_CV)
        log_p_CW = log_p_CV
        if ids_W is not None:
            log_p_CW = torch.index_select(log_p_CV, -1, ids_W, out=drafts.rows(0, count))
        p_CW = torch.exp(log_p_CW, out=drafts.rows(1, count))
        mass_C = None if ids_W is None else p_CW.sum(-1)
        for h, student_RD in enumerate(students_RD):
            log_q_CW = drafts.log_softmax(2, student_RD[rows], 1.0)
            drafted_C = log_q_CW.argmax(-1)
            found["match"][h, rows] = ((drafted_C if ids_W is None else ids_W[drafted_C]) == best_C).float()
            ratio_CW = torch.sub(log_p_CW, log_q_CW, out=drafts.rows(3, count))
            loss_C = ratio_CW.mul_(p_CW).sum(-1)
            if mass_C is not None:  # p / mass in place of p
                loss_C = loss_C / mass_C - mass_C.log()
                found["lost_mass"][h, rows] = (1 - mass_C).float()
            found["loss"][h, rows] = loss_C.float()
            found["overlap"][h, rows] = torch.minimum(p_CW, log_q_CW.exp_()).sum(-1).float()
    return found


def acceptance_lengths(accept_HR: Tensor, index_R: Tensor, horizon: int = 8) -> Tensor:
    """Expected number of tokens of a round that starts at each row and drafts K = `horizon` tokens: [H, R].

        E_t = 1 + sum_{j=1..K} prod_{i=0..j-1} a_{t+i}

    a is the probability that the draft of a row is accepted (overlap at temperature 1, match for greedy decoding); the
    1 is the bonus token. Rows of one response have consecutive `index_R` (their place in the flattened batch); the
    products stop at the end of a response, as nothing is drafted beyond it. The mean over rows serves to compare steps
    of one head. It is no forecast, because it weighs all positions alike and real rounds often start after a rejection.
    """
    step_R = torch.arange(len(index_R), device=index_R.device)
    run_R = index_R - step_R  # constant along a response, and larger in the next one
    expected_HR = torch.ones_like(accept_HR)
    product_HR = torch.ones_like(accept_HR)
    for i in range(min(horizon, len(index_R))):
        stays = torch.zeros_like(run_R, dtype=torch.bool)
        stays[: len(run_R) - i] = run_R[i:] == run_R[: len(run_R) - i]
        ahead_HR = torch.zeros_like(accept_HR)
        ahead_HR[:, : len(run_R) - i] = accept_HR[:, i:]
        product_HR = product_HR * ahead_HR * stays
        expected_HR = expected_HR + product_HR
    return expected_HR
