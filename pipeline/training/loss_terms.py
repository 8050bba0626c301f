"""What a head learns from: the terms of the loss, each with its formula, its gradient and where it comes from.

Takes log-probabilities of teacher and head for one chunk of rows, gives the loss and its gradient with respect to the
head's logits. Knows nothing of hidden states, chunks or processes: every term is a sum over rows, and what it is of
one row depends on no other, so it is the same however rows are cut into chunks or spread over processes.

Letters: C rows of one chunk, V vocabulary. p is the teacher's distribution, q a head's, both at the temperature T of
the loss; z are the head's logits over T. overlap = sum_v min(p, q) is the probability that speculative sampling accepts
a token drawn from q (Leviathan et al. 2023, theorem 3.5), and 1 - overlap the total variation distance. r marks the
tokens with p > q, of which there should be more, and m = sum_v q r is what the head gives them.

  name     loss of a row               dloss/dz                    length of the gradient (sum of absolute values)
  kl       sum_v p (log p - log q)     q - p                       2 (1 - overlap)
  ce       -log q(argmax p)            q - [argmax p]              2 (1 - q(argmax p))
  tvd      1 - overlap                 q (m - r)                   2 m (1 - m)
  tvd++    1 - overlap, see there      q (m - r) / sqrt(m (1-m))   2 sqrt(m (1 - m))
  overlap  -log overlap                q (m - r) / overlap         2 m (1 - m) / overlap, at most 2 (1 - m)

The last three pull a row in the same direction and differ in what the row weighs. Where the head is far off (m near 0)
tvd all but lets go, overlap pulls as hard as kl does, and tvd++ is in between.
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

    Not of the token that the response goes on with: that one was drawn from p, so it would be a noisy estimate of kl
    where the response was sampled; the argmax is what greedy verification asks for in either case.
    """
    best_C1 = log_p_CV.argmax(-1, keepdim=True)
    loss = -log_q_CV.gather(-1, best_C1).sum()
    out_CV.copy_(q_CV).scatter_(-1, best_C1, q_CV.gather(-1, best_C1) - 1)
    return loss


def tvd(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Total variation distance, sum_v |p - q| / 2: the rejection rate itself (Zhou et al. 2023, arXiv 2310.08461).

    Where p = q for some token it has no derivative; r = 0 there.
    """
    overlap_C1, _ = _overlap(p_CV, q_CV, out_CV)
    out_CV.neg_()
    return (1 - overlap_C1).sum()


def tvd_plus_plus(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """TVD++: the gradient of tvd as a policy gradient with normalised rewards (Goel et al. 2024, arXiv 2403.00858).

    The gradient of tvd is -E_{x~q}[r(x) grad log q(x)], with r the reward; TVD++ is -E_{x~q}[(r(x) - mean) / std
    grad log q(x)], and no loss has this gradient: the value given is tvd's.

    Mean and deviation are those of r under q *in each row*: m and sqrt(m (1 - m)). An expectation over the whole
    vocabulary is unchanged by any mean, since E_{x~q}[grad log q(x)] = 0 in every row; and one deviation for all rows
    of a chunk, a batch or all processes would be a common factor, which Adam divides out again, and which would make
    the gradient depend on how rows are grouped. So the row is the one set over which normalising changes what is
    learned. (Of the paper only the abstract was read: variance reduction as in policy gradients. That it is this
    normalisation is how it is quoted elsewhere; the set that the paper takes is not known to us.)
    """
    overlap_C1, mass_C1 = _overlap(p_CV, q_CV, out_CV)
    variance_C1 = (mass_C1 * (1 - mass_C1)).clamp_(min=torch.finfo(q_CV.dtype).eps)  # rounding is no reward
    out_CV.div_(variance_C1.sqrt_().neg_())
    return (1 - overlap_C1).sum()


def overlap(log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, q_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Minus the log of the probability of acceptance (LK losses, Samarin et al. 2026, arXiv 2602.23881)."""
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

    out may be the memory of log_q, for which reason a term reads log_q before it writes out for the last time.
    """
    power: int
    """The term counts times T^power, so that the size of dloss/d(T z) stays when T changes: of kl, q - p shrinks like
    1/T itself (Hinton et al. 2015, section 2); what the others pull with does not."""


# Those that read log_q come first: in a mix the later ones write over it.
TERMS = {
    "kl": Term(kl, 2),
    "ce": Term(ce, 1),
    "tvd": Term(tvd, 1),
    "tvd++": Term(tvd_plus_plus, 1),
    "overlap": Term(overlap, 1),
}


def parse(words: Sequence[str]) -> dict[str, float]:
    """Name -> weight of the terms in distill.loss, each NAME or WEIGHT*NAME. Raises UserError for anything else."""
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
