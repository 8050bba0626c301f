"""The terms of the distillation loss, each with its formula, its gradient and its source.

A term takes the log-probabilities of teacher and head for one chunk of rows, and gives the loss and its gradient with
respect to the head's logits. Every term is a sum over rows, and the value of a row depends on that row alone, so the
result does not depend on how rows are cut into chunks or spread over processes.

Letters: C rows of one chunk, V vocabulary. p is the teacher's distribution, q a head's, both at the temperature T of
the loss; z are the head's logits divided by T. overlap = sum_v min(p, q) is the probability that speculative sampling
accepts a token drawn from q (Leviathan et al. 2023, theorem 3.5), and 1 - overlap is the total variation distance. r is
1 for the tokens with p > q, which the head underrates, and 0 for the others; m = sum_v q r is the head's probability of
the former.

  name     loss of a row               dloss/dz                    length of the gradient (sum of absolute values)
  kl       sum_v p (log p - log q)     q - p                       2 (1 - overlap)
  ce       -log q(argmax p)            q - [argmax p]              2 (1 - q(argmax p))
  tvd      1 - overlap                 q (m - r)                   2 m (1 - m)
  tvd++    1 - overlap (see below)     q (m - r) / sqrt(m (1-m))   2 sqrt(m (1 - m))
  overlap  -log overlap                q (m - r) / overlap         2 m (1 - m) / overlap, at most 2 (1 - m)

The gradients of the last three have the same direction in a row and differ in length. Where the head is far off (m near
0), that of tvd almost vanishes, that of overlap is as long as that of kl, and that of tvd++ lies between.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError


def kl(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p || q): soft targets (Hinton et al. 2015, section 2)."""
    ratio_CV = torch.sub(log_p_CV, log_q_CV, out=out_CV)
    loss = torch.dot(p_CV.view(-1), ratio_CV.view(-1))
    torch.sub(q_CV, p_CV, out=out_CV)
    return loss


def ce(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Cross-entropy of the teacher's most probable token: hard targets.

    The target is not the next token of the response: where that was sampled from p, it would be a noisy estimate of kl.
    The argmax is the token that greedy verification accepts, however the response was made.
    """
    best_C1 = log_p_CV.argmax(-1, keepdim=True)
    loss = -log_q_CV.gather(-1, best_C1).sum()
    out_CV.copy_(q_CV).scatter_(-1, best_C1, q_CV.gather(-1, best_C1) - 1)
    return loss


def tvd(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Total variation distance, sum_v |p - q| / 2: the rejection rate itself (Zhou et al. 2023, arXiv 2310.08461).

    It has no derivative where p = q for some token; r = 0 is used there.
    """
    overlap_C1, _ = _overlap(p_CV, q_CV, out_CV)
    out_CV.neg_()
    return (1 - overlap_C1).sum()


def tvd_plus_plus(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """TVD++: the gradient of tvd as a policy gradient with normalised rewards (Goel et al. 2024, arXiv 2403.00858).

    The gradient of tvd is -E_{x~q}[r(x) grad log q(x)], with r the reward; TVD++ is -E_{x~q}[(r(x) - mean) / std
    grad log q(x)]. No loss has this gradient, so the value returned is that of tvd.

    Mean and standard deviation are those of r under q *in each row*: m and sqrt(m (1 - m)). Subtracting any mean leaves
    an expectation over the whole vocabulary unchanged, since E_{x~q}[grad log q(x)] = 0 in every row. One deviation for
    all rows of a chunk, a batch or all processes would be a common factor, which Adam divides out again, and it would
    make the gradient depend on how rows are grouped. So only normalising row by row changes what is learned.
    (Only the abstract of the paper was read, which names variance reduction as in policy gradients. This normalisation
    is how other papers quote it; over which set the paper itself normalises is not known to us.)
    """
    overlap_C1, mass_C1 = _overlap(p_CV, q_CV, out_CV)
    variance_C1 = (mass_C1 * (1 - mass_C1)).clamp_(
        min=torch.finfo(q_CV.dtype).eps
    )  # else rounding errors would be divided by 0
    out_CV.div_(variance_C1.sqrt_().neg_())
    return (1 - overlap_C1).sum()


def overlap(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """The negative log of the acceptance probability (LK losses, Samarin et al. 2026, arXiv 2602.23881)."""
    overlap_C1, _ = _overlap(p_CV, q_CV, out_CV)
    overlap_C1.clamp_(min=torch.finfo(q_CV.dtype).tiny)
    out_CV.div_(-overlap_C1)
    return -overlap_C1.log_().sum()


def _overlap(p_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(overlap_C1, m_C1); out_CV becomes doverlap/dz = q (r - m)."""
    overlap_C1 = torch.minimum(p_CV, q_CV, out=out_CV).sum(-1, keepdim=True)
    mass_C1 = torch.gt(p_CV, q_CV, out=out_CV).mul_(q_CV).sum(-1, keepdim=True)
    out_CV.addcmul_(q_CV, mass_C1, value=-1)
    return overlap_C1, mass_C1


class Term(NamedTuple):
    function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(log_p, p, log_q, q, out), all [C, V] -> the loss summed over rows; out becomes dloss/dz.

    out may share the memory of log_q, so a term must not read log_q after its last write to out.
    """
    power: int
    """The term is multiplied by T^power, so that dloss/d(T z) keeps its size when T changes. For kl, q - p itself
    shrinks like 1/T (Hinton et al. 2015, section 2), hence T^2; the gradients of the other terms do not."""


# Terms that read log_q come first: when several are mixed, the later ones overwrite it.
TERMS = {
    "kl": Term(kl, 2),
    "ce": Term(ce, 1),
    "tvd": Term(tvd, 1),
    "tvd++": Term(tvd_plus_plus, 1),
    "overlap": Term(overlap, 1),
}


def parse(words: Sequence[str]) -> dict[str, float]:
    """Name -> weight of the terms in distill.loss, each given as NAME or WEIGHT*NAME. Raises UserError otherwise."""
    weights: dict[str, float] = {}
    for word in words:
        weight, star, name = (part.strip() for part in word.rpartition("*"))
        if name not in TERMS:
            close = difflib.get_close_matches(name, TERMS, n=1, cutoff=0.5)
            remedy = f"Did you mean {close[0]}?" if close else "Write NAME or WEIGHT*NAME."
            raise _wrong(words, f"there is no term {name!r}. {remedy}")
        if name in weights:
            raise _wrong(words, f"{name} is there twice. Add the weights up.")
        weights[name] = _number(weight) if star else 1.0
        if not 0 < weights[name] < math.inf:
            raise _wrong(words, f"the weight of {name} must be a number above 0, and is {weight!r}.")
    if not weights:
        raise _wrong(words, "a loss needs a term.")
    return weights


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _wrong(words: Sequence[str], what: str) -> UserError:
    return UserError(f"distill.loss=[{', '.join(words)}]: {what} The terms are {', '.join(TERMS)}.")
