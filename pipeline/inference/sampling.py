"""From logits to tokens: processing of logits, which is the same for p and q, drawing, and the exact accept rule.

Takes logits of the exit head (q) and of the backbone (p); gives drafted tokens, the number of accepted ones and the
bonus token. The committed text has the backbone's own distribution.

K drafted tokens of this round, V vocabulary, W tokens that the head can draft, M rows, T ids
p: the backbone's distribution, q: the exit head's
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .law import DraftVocabulary, Law
from .processors import Prefix
from .rounds import Confidence
from .tree import Draft, Tree


@dataclass
class Sampler:
    """How the next token is chosen from logits. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    processors: Callable[[Tensor, Tensor], Tensor] | None = None
    """transformers' LogitsProcessorList: (ids [1, T], logits [1, V]) -> logits [1, V]. It replaces temperature, top_k
    and top_p, except that temperature 0 still means greedy. It is also called for drafts that are rejected, so it must
    be a function of its two arguments alone (processors.py)."""
    shown: list[int] | None = None
    """The ids that processors are given in place of the prompt: those of a left-padded row, padding included."""
    block: bool = False
    """Sampling: verify the drafts of a round together instead of one by one (`_accept_block`)."""
    _prefix: Prefix = field(default_factory=Prefix, init=False, repr=False, compare=False)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def settings(self) -> tuple[float, int, float] | None:
        """Texts of equal settings shape their logits alike, whatever their tokens; None: processors shape them."""
        return None if self.processors is not None else (self.temperature, self.top_k, self.top_p)

    def shape(
        self, logits_MV: Tensor, prompt: list[int], tokens: list[int], drafted: list[int] | None = None
    ) -> Tensor:
        """Processed logits [M, V] of M consecutive positions.

        The last row follows prompt + tokens + drafted, each earlier row one token less. While one text is decoded,
        `prompt` and `tokens` must be the same two list objects, and `tokens` may only grow: only new ids are copied.
        """
        if self.processors is not None:
            shown = prompt if self.shown is None else self.shown
            ids_1T = self._prefix.ids(shown, tokens, drafted or [], logits_MV.device)
            first = ids_1T.shape[1] - len(logits_MV) + 1
            rows = [self.processors(ids_1T[:, : first + i], row[None]) for i, row in enumerate(logits_MV)]
            return torch.cat(rows)
        if self.greedy:
            return logits_MV
        logits_MV = logits_MV / self.temperature
        if self.top_k:
            kth = logits_MV.topk(min(self.top_k, logits_MV.shape[-1])).values[:, -1:]
            logits_MV = logits_MV.masked_fill(logits_MV < kth, float("-inf"))
        if self.top_p < 1.0:
            logits_MV = logits_MV.masked_fill(outside_nucleus(logits_MV, self.top_p), float("-inf"))
        return logits_MV

    def law(
        self,
        logits_MW: Tensor,
        vocabulary: DraftVocabulary | None,
        prompt: list[int],
        tokens: list[int],
        drafted: list[int] | None = None,
    ) -> Law:
        """The law of the drafts at M consecutive positions, from the head's logits; positions are those of `shape`."""
        if vocabulary is not None and self.processors is not None:
            # Processors know tokens by their ids, so they are given logits of all V.
            logits_MV = self.shape(vocabulary.spread(logits_MW, float("-inf")), prompt, tokens, drafted)
            # They may forbid the whole draft vocabulary. Then no q is better than another, but it must be one.
            forbidden_M1 = logits_MV.isneginf().all(-1, keepdim=True)
            return Law(torch.where(forbidden_M1, 0.0, logits_MV))
        return Law(self.shape(logits_MW, prompt, tokens, drafted), vocabulary)

    def draw(self, logits_V: Tensor) -> int:
        """A token from processed logits."""
        return int(logits_V.argmax()) if self.greedy else self._draw(logits_V.softmax(-1))

    def propose(self, q: Confidence) -> Draft:
        """A token drawn from the head's distribution, not read yet; it is read with the first figure of q (`Draft`)."""
        law = q.law
        index_1 = law.logits_W.argmax(0, keepdim=True) if self.greedy else self._pick(law.q_W)
        draft = Draft(law.token(index_1), index_1)
        q.read = draft.read_with
        return draft

    def siblings(self, q: Confidence, first: Draft, count: int) -> list[Draft]:
        """Up to `count` further candidates beside a proposed draft: greedy, the next best tokens; sampling, draws
        without replacement, each from q without the tokens drawn before it. There are fewer where q has no more."""
        law, found = q.law, [first]
        if self.greedy:
            others_W = law.logits_W.index_fill(0, first.index_1, float("-inf"))
            found += [
                Draft(law.token(i_1), i_1) for i_1 in others_W.topk(min(count, len(others_W) - 1)).indices[:, None]
            ]
        else:
            left_W = law.q_W.clone()
            for _ in range(min(count, int((left_W > 0).sum()) - 1)):
                left_W.index_fill_(0, found[-1].index_1, 0.0)
                index_1 = self._pick(left_W)
                found.append(Draft(law.token(index_1), index_1))
        return found[1:]

    def candidates(self, q: Confidence, first: Draft, count: int) -> list[Draft]:
        """Up to `count` candidates for a place, of which `first` was proposed: none, it alone, or also siblings."""
        return [first, *self.siblings(q, first, count - 1)] if count > 1 else [first][:count]

    def shape_tree(self, logits_RV: Tensor, prompt: list[int], tokens: list[int], tree: Tree) -> Tensor:
        """Processed logits [R, V] of the tokens after every row of a tree; the root is the last of `tokens`."""
        if tree.is_chain or self.processors is None:
            return self.shape(logits_RV, prompt, tokens, tree.tokens[1:])
        rows = [self.shape(row[None], prompt, tokens, tree.drafted(i)) for i, row in enumerate(logits_RV)]
        return torch.cat(rows)

    def draft(self, q: Confidence) -> int:
        """A token drawn from the head's distribution, read at once."""
        return self.propose(q).token

    def accept(self, drafts: list[Draft], q: list[Confidence], p_logits_MV: Tensor) -> tuple[int, int]:
        """(number of accepted drafts, bonus token) of a round, read from the device together.

        p_logits_MV: processed logits of the backbone in K+1 rows. Greedy: drafts are accepted while they equal the
        backbone's argmax. Sampling (Leviathan et al., ICML 2023, algorithm 1): draft x is accepted with probability
        min(1, p(x)/q(x)); the first rejected one is replaced by a draw from the residual max(p - q, 0); if none is
        rejected, the bonus token is drawn from the last row of p. With `block`, `_accept_block` decides instead.
        """
        if self.greedy:
            targets = p_logits_MV.argmax(-1).tolist()
            accepted = next((i for i, draft in enumerate(drafts) if draft.token != targets[i]), len(drafts))
            return accepted, targets[accepted]
        p_MV = p_logits_MV.softmax(-1)
        if not drafts:
            return 0, self._draw(p_MV[0])
        x_K1 = torch.stack([draft.token_1 for draft in drafts])
        # q is 0 in the row after the last draft, so that p is the residual there
        q_MV = torch.stack([*(one.law.q_V for one in q), torch.zeros_like(p_MV[0])])
        ratio_K = (p_MV.gather(1, x_K1) / q_MV.gather(1, x_K1))[:, 0]
        accepted_1, left_V = (self._accept_block if self.block else self._accept_each)(ratio_K, p_MV, q_MV)
        bonus_1 = self._pick(left_V)
        accepted, bonus = torch.cat((accepted_1, bonus_1)).tolist()
        return accepted, bonus

    def verify(self, tree: Tree, p_logits_RV: Tensor, may_branch: bool = False) -> tuple[list[int], int]:
        """(rows of the accepted drafts, in order; bonus token) of a round. p_logits_RV: processed logits of the
        backbone after each row. may_branch: whether these drafts could have branched.

        A chain is verified by `accept`, but not as a block if it might have become a tree: whether it did depends on
        its tokens, and the choice between the two rules must not. Where drafts branch, greedy: the path follows the
        backbone's argmax. Sampling (recursive rejection: Jeon et al., arXiv 2402.14160, algorithm 1): the candidates
        after a row are tried in the order in which they were drawn. With r = p at first, and q without the candidates
        drawn before x, x is accepted with probability min(1, r(x)/q(x)); where it is rejected, r becomes the residual
        max(r - q, 0), both normalised. The bonus token is drawn from the last r. So each token of the path is
        distributed as p, whatever the tree's shape (docs/control.md).
        """
        if tree.is_chain and not (may_branch and self.block):
            accepted, bonus = self.accept(tree.drafts, tree.laws[:-1], p_logits_RV)
            return list(range(1, accepted + 1)), bonus
        if self.greedy:
            return followed(tree, p_logits_RV.argmax(-1).tolist())
        path: list[int] = []
        row, p_RV = 0, p_logits_RV.softmax(-1)
        while True:
            row, left_V = self._accept_one_of(tree, row, p_RV[row])
            if row == 0:
                return path, self._draw(left_V)
            path.append(row)

    def _accept_one_of(self, tree: Tree, row: int, left_V: Tensor) -> tuple[int, Tensor]:
        """(the accepted one of the drafts after a row, or 0; weights [V] of the bonus token if it is 0)."""
        children = tree.children[row]
        q_V = tree.laws[row].law.q_V.clone() if children else left_V
        for child in children:
            x_1 = tree.drafts[child - 1].token_1
            if bool(self._coins(left_V[x_1] / q_V[x_1])):
                return child, left_V
            left_V = residual(left_V, q_V)
            left_V = left_V / left_V.sum()
            q_V[x_1] = 0.0
            q_V = q_V / q_V.sum()
        return 0, left_V

    def _accept_each(self, ratio_K: Tensor, p_MV: Tensor, q_MV: Tensor) -> tuple[Tensor, Tensor]:
        """(accepted [1], weights [V] of the bonus token) by a coin for each draft, whose p(x)/q(x) is its ratio."""
        accepted_1 = self._coins(ratio_K).cumprod(0).sum(0, keepdim=True)
        p_1V, q_1V = p_MV.index_select(0, accepted_1), q_MV.index_select(0, accepted_1)
        return accepted_1, residual(p_1V[0], q_1V[0])

    def _accept_block(self, ratio_K: Tensor, p_MV: Tensor, q_MV: Tensor) -> tuple[Tensor, Tensor]:
        """The same by block verification (Sun et al., ICLR 2025, arXiv 2403.10444, algorithm 2), which accepts no fewer
        drafts on average: a draft that is more probable than it was drafted makes up for an earlier one that is less.

            reach_0 = 1,  reach_i = min(1, reach_{i-1} ratio_i)        P(at least i are accepted | the first i drafts)
            left_i  = max(reach_i p_{i+1} - q_{i+1}, 0)                weights of a bonus token after i drafts
            h_i     = |left_i| / (|left_i| + 1 - reach_i)              P(i are accepted | no more are); h_0 = 1

        As q is 0 behind the last draft, h is reach there. With one draft it is the rule of `_accept_each`.
        """
        reach = [torch.ones_like(ratio_K[0])]
        for ratio in ratio_K:
            reach.append((reach[-1] * ratio).clamp(max=1))
        reach_M = torch.stack(reach)
        left_MV = (reach_M[:, None] * p_MV - q_MV).clamp_(min=0)
        mass_M = left_MV.sum(-1)
        # 0/0 is where p = q and nothing was lost so far: then more drafts are accepted for certain.
        stops_M = (mass_M / (mass_M + 1 - reach_M)).nan_to_num(0.0)
        stops_M[0] = 1
        fewer_M = (1 - stops_M).flip(0).cumprod(0).flip(0)  # P(fewer than i are accepted)
        accepted_1 = self._pick(stops_M * torch.cat((fewer_M[1:], reach_M[:1])))
        left_V = left_MV.index_select(0, accepted_1)[0]
        return accepted_1, torch.where(left_V.sum() > 0, left_V, p_MV.index_select(0, accepted_1)[0])

    def _draw(self, weights_V: Tensor) -> int:
        return int(self._pick(weights_V))

    # All randomness of a text passes through these two methods, so that a test can enumerate it. Their results stay on
    # the device.

    def _pick(self, weights_V: Tensor) -> Tensor:
        """An index [1] drawn with probability proportional to its weight."""
        device = weights_V.device
        u_1 = torch.rand(1, generator=self.generator, device=device, dtype=exact_dtype(device))
        return inverted(weights_V, u_1)

    def _coins(self, chance_K: Tensor) -> Tensor:
        """Independent booleans [K] that are True with these probabilities; above 1 means always."""
        u_K = torch.rand(len(chance_K), generator=self.generator, device=chance_K.device, dtype=chance_K.dtype)
        return u_K < chance_K


def followed(tree: Tree, targets: list[int]) -> tuple[list[int], int]:
    """(rows of the accepted drafts, bonus token) of greedy decoding. targets: the backbone's choice after each row."""
    path, row = [], 0
    while following := [child for child in tree.children[row] if tree.tokens[child] == targets[row]]:
        row = following[0]
        path.append(row)
    return path, targets[row]


def exact_dtype(device: torch.device) -> torch.dtype:
    """In which probabilities are added up: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverted(weights_MV: Tensor, u_M1: Tensor) -> Tensor:
    """Indices [M, 1] with probabilities proportional to the weights (or [1] of [V]), by inverting their cumulative sums
    at uniform numbers from 0 to 1, in the dtype of `u`.

    On a CPU torch.multinomial draws a number for every index, which takes longer than two decoder layers of a thin
    model.
    """
    sums_MV = weights_MV.cumsum(-1, dtype=u_M1.dtype)
    total_M1 = sums_MV[..., -1:].contiguous()
    # The first sum above u * total is never at an index of weight 0. Rounding may give u * total = total: then it is
    # the first index that has the total, as the last may have weight 0.
    last_M1 = torch.searchsorted(sums_MV, total_M1)
    return torch.searchsorted(sums_MV, u_M1 * total_M1, right=True).minimum(last_M1)


def outside_nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Mask [M, V] of the tokens outside the nucleus, which is the smallest set of most probable tokens whose
    probabilities sum to at least `top_p` (Holtzman et al., ICLR 2020, section 3.1)."""
    ordered_MV, order_MV = logits_MV.sort(-1, descending=True)
    mass_MV = ordered_MV.softmax(-1)
    outside_MV = mass_MV.cumsum(-1) - mass_MV >= top_p
    return outside_MV.scatter(-1, order_MV, outside_MV)


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """max(p - q, 0) [V], unnormalised; p itself where rounding leaves only zeros."""
    rest_V = (p_V - q_V).clamp_(min=0)
    return torch.where(rest_V.sum() > 0, rest_V, p_V)
