"""Replays any controller over recorded texts, in seconds instead of minutes, and computes the optimum for comparison.

Takes an engine to record traces once; then only traces, a controller and the costs of a round. Gives rounds and times.
The replay is exact because the exit head reads the hidden states of the committed tokens and keeps its own keys and
values, so that q after an accepted prefix does not depend on where a round began.

T tokens of a text, V vocabulary, J drafts recorded after a rejected one, C confidences, P traces
p: the backbone's distribution, q: the exit head's
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..inference.backbone import SplitBackbone
from ..inference.law import Law
from ..inference.lookup import Copying, Lookup
from ..inference.rounds import LONGEST, Confidence, Controller, Round, look_of, memory_of, reads_of, spare_of
from ..inference.sampling import Sampler, residual
from ..inference.tree import WIDEST
from .losslessness import first_divergence, teacher_forced
from .metrics import CostModel

NEVER = 1 << 30
RECORDED = LONGEST
"""J: confidences recorded after a rejected draft. Controllers that read confidences draft no more than this."""


@dataclass
class Trace:
    """What drafting finds at each place of one text. Index t is the text's token t; token 0 is never drafted."""

    prompt: str
    max_new_tokens: int
    acceptance_T: np.ndarray
    """Probability that a draft for token t is accepted, given the text: greedy 0 or 1, sampling min(1, q/p)."""
    said_TC: np.ndarray
    """The head's confidence before each draft, with the fields of `Recorded` as columns."""
    off_TJC: np.ndarray
    """The same for the J drafts that follow a rejected draft for token t."""
    rank_T: np.ndarray | None = None
    """How many candidates for token t are tried before it is accepted, where the first is rejected: of drafts that
    branch. In sampling it is a draw, which belongs with the rejected draft of `off_TJC`."""
    ids: np.ndarray | None = None
    """Of the prompt; with `tokens`, what drafts may be copied from."""
    tokens: np.ndarray | None = None

    @classmethod
    def of(cls, prompt: str, max_new_tokens: int, acceptance_T: np.ndarray) -> "Trace":
        """A trace without confidences and tokens, for the oracle and for controllers that read none."""
        unread = np.tile(NOTHING, (len(acceptance_T), 1))
        return cls(prompt, max_new_tokens, acceptance_T, unread, unread[:, None].repeat(RECORDED, 1))

    def __len__(self) -> int:
        return len(self.acceptance_T)

    @cached_property
    def fewest(self) -> float:
        """The fewest tokens that any recorded q allows."""
        rows = (*self.said_TC[1:], *self.off_TJC[1:].reshape(-1, self.said_TC.shape[1]))
        return min((Recorded(*row).support for row in rows), default=NEVER)


class Recorded(NamedTuple):
    """The figures of a `Confidence` as recorded earlier, and how many tokens its q allows."""

    top: float
    collision: float
    entropy: float
    support: float = NEVER
    """Sampling: the most candidates that can be drawn for a place."""


NOTHING = Recorded(0.0, 0.0, 0.0)
"""Where nothing was recorded."""


def acceptance(p_TV: Tensor, q_TV: Tensor, tokens: list[int], sampler: Sampler) -> Tensor:
    """The probability [T] that a draft for each token is accepted, given all before it: greedy 0 or 1, sampling
    min(1, q/p). p and q are processed."""
    y_T1 = torch.tensor(tokens, device=p_TV.device)[:, None]
    if sampler.greedy:
        return (q_TV.argmax(-1, keepdim=True) == y_T1)[:, 0].double()
    return (q_TV.gather(1, y_T1) / p_TV.gather(1, y_T1)).clamp(max=1)[:, 0].double()


@torch.inference_mode()
def record(
    engine: SplitBackbone, prompt: str, ids: list[int], tokens: list[int], sampler: Sampler, max_new_tokens: int
) -> Trace:
    """The trace of one text that the backbone wrote with `sampler`'s settings. Rejected drafts are drawn with its
    generator.

    In sampling, a rejected draft is distributed as max(q - p, 0). At every position one such draft is drawn, and the
    confidences along its continuation by the head are recorded, as is how many candidates would be tried after it; in
    greedy decoding both are determined.
    """
    p_TV, q_TV = teacher_forced(engine, ids, tokens, sampler)
    said = [_read(Confidence(Law(row.log())), sampler) for row in q_TV]
    rank_T = ranks(q_TV, tokens).cpu().numpy()
    off = np.tile(NOTHING, (len(tokens), RECORDED, 1))
    cache = engine.new_cache(min(len(ids) + len(tokens) + RECORDED, engine.max_context))
    engine.shallow([*ids, tokens[0]], 0, cache)
    for t in range(1, len(tokens)):
        at = len(ids) + t
        if sampler.greedy:
            wrong = int(q_TV[t].argmax())
        else:
            wrong = sampler._draw(residual(q_TV[t], p_TV[t]))
            rank_T[t] = tried_in_vain(p_TV[t], q_TV[t], tokens[t], wrong, sampler)
        chain = [wrong]
        for j in range(min(RECORDED, cache.max_length - at)):
            engine.shallow(chain[-1:], at + j, cache)
            logits_1W = engine.draft_logits([at + j], cache)
            q = Confidence(sampler.law(logits_1W, engine.draft_vocabulary, ids, tokens[:t] + chain).row(0))
            off[t, j] = _read(q, sampler)
            chain.append(sampler.draft(q))
        engine.shallow(tokens[t : t + 1], at, cache)  # the committed token again; the head then catches up by itself
        cache.head_length = at
    chance_T = acceptance(p_TV, q_TV, tokens, sampler).cpu().numpy()
    said_TC, texts = np.array(said), (np.array(ids), np.array(tokens))
    return Trace(prompt, max_new_tokens, chance_T, said_TC, off, rank_T, *texts)


def ranks(q_TV: Tensor, tokens: list[int]) -> Tensor:
    """How many tokens [T] the head finds more likely than each token of a text, in the order of greedy candidates."""
    y_T1 = torch.tensor(tokens, device=q_TV.device)[:, None]
    return (q_TV > q_TV.gather(1, y_T1)).sum(-1)


def tried_in_vain(p_V: Tensor, q_V: Tensor, token: int, first: int, sampler: Sampler) -> int:
    """How many candidates for a token of a sampled text are tried before it is accepted, where `first` is the first of
    them and rejected; NEVER if it is not among the most that a round has.

    It replays `Sampler.verify` given the text. A candidate that is rejected is distributed as max(q - r, 0) and says
    nothing of the text's token y; that is distributed as the next r then. So the next candidate is y, and accepted,
    with probability min(1, q(y) / r(y)).
    """
    left_V, q_V, wrong = p_V, q_V.clone(), first
    for rank in range(1, WIDEST):
        left_V = residual(left_V, q_V)
        left_V = left_V / left_V.sum()
        q_V[wrong] = 0.0
        if not q_V[token] > 0:
            break
        q_V = q_V / q_V.sum()
        if bool(sampler._coins((q_V[token] / left_V[token])[None])):
            return rank
        wrong = sampler._draw(residual(q_V, left_V))
    return NEVER


def _read(confidence: Confidence, sampler: Sampler) -> Recorded:
    support = NEVER if sampler.greedy else int((confidence.law.q_W > 0).sum())
    return Recorded(confidence.top, confidence.collision, confidence.entropy, support)


def known_round(controller: Controller, chances: Sequence[float], coins: Sequence[float]) -> tuple[int, int, int]:
    """(drafted, accepted, head passes) of a round whose law is known: draft i is accepted if coins[i] < chances[i].

    The head's confidence before draft i is chances[i]. The round ends at the latest after len(chances) drafts.
    """
    k = passes = 0
    while k < len(chances) and controller.peek(k):
        passes += 1
        if not controller.draft(k, Recorded(chances[k], chances[k], 1.0)):  # type: ignore[arg-type]
            break
        k += 1
    accepted = next((j for j in range(k) if coins[j] >= chances[j]), k)
    return k, accepted, passes


def outcomes(traces: list[Trace], seed: int) -> list[np.ndarray]:
    """Whether a draft for each token is accepted: booleans [T] for each trace. The draws depend on the seed alone, so
    that all controllers face the same ones."""
    dice = np.random.default_rng(seed)
    return [dice.random(len(t)) < t.acceptance_T for t in traces]


def replay(controller: Controller, trace: Trace, accepted_T: np.ndarray, costs: CostModel) -> list[Round]:
    """The rounds that decoding this text with the controller would take; times are in autoregressive tokens.

    accepted_T: whether the first candidate for each token is accepted. Where drafts branch, the confidence behind a
    wrong one is known only if the head reads first candidates alone.

    Raises ValueError for a controller that copies drafts if the trace has no tokens, for one whose drafts branch if it
    has no ranks, and for one that branches behind wrong candidates of which it is not known how many q allows there.
    """
    texts, tokens = None, [] if trace.tokens is None else trace.tokens.tolist()
    if look_of(controller):
        if trace.ids is None or trace.tokens is None:
            raise ValueError("a trace without tokens cannot be replayed with a controller that copies")
        texts = Copying(trace.ids.tolist(), memory_of(controller))
    if spare_of(controller) and trace.rank_T is None:
        raise ValueError("a trace without ranks cannot be replayed with a controller whose drafts branch")
    rank_T = _ranks(trace, accepted_T)
    rounds, t = [], 1
    while t < len(trace):
        made = None if texts is None else _copied_round(controller, trace.max_new_tokens, tokens, texts, t)
        made = made or _round(controller, trace, rank_T, t)
        levels = made.levels if made.source == "head" else 0  # copied drafts share one shallow pass
        made.seconds, made.shallow_seconds, made.head_seconds, made.verify_seconds = costs.round(
            made.drafted, made.head_passes, levels
        )
        rounds.append(made)
        controller.observe(made)
        t += made.tokens
    if texts is not None:
        texts.end(tokens)
    return rounds


def _ranks(trace: Trace, accepted_T: np.ndarray) -> np.ndarray:
    """How many candidates for each token are tried in vain before the right one."""
    return np.where(accepted_T, 0, NEVER if trace.rank_T is None else np.maximum(1, trace.rank_T))


def _copied_round(controller: Any, most: int, tokens: list[int], texts: Copying, t: int) -> Round | None:
    """The round that begins at place t, if its drafts are copied. A copied token is accepted iff it is the text's, when
    sampling too: one that is rejected is replaced by another token."""
    match = texts.match(tokens[:t])
    if not match.length:
        return None
    copied = match.copy(min(controller.look(match), most - t - 1))
    accepted = _right(copied, tokens[t:])
    if t + accepted == len(tokens):
        copied = copied[:accepted]  # behind a copied end token nothing is drafted
    made = Round(len(copied), accepted, min(accepted + 1, len(tokens) - t), source=match.source)
    return made if copied else None


def _right(copied: list[int], text: list[int]) -> int:
    """How many of the copied tokens are those of the text, up to the first that is not."""
    first = first_divergence(copied, text)
    return len(copied) if first is None else first


def _round(controller: Controller, trace: Trace, rank_T: np.ndarray, t: int) -> Round:
    """The round that begins at place t, without its times."""
    reads, room = reads_of(controller), trace.max_new_tokens - t - 1
    k = passes = 0
    level = [0]  # rows of the last level
    parents: list[int] = []  # of every draft, its parent's row
    path: list[int] = []  # accepted rows
    right: int | None = 0  # the row of this level that the text goes on from
    wrong_at: int | None = None  # the first place where a first candidate was wrong
    while True:
        ended = t + k >= len(trace)
        # nothing is drafted after an accepted end token, which is the last of a text that ended; other paths go on
        read = [row for row in level[: reads(k)] if not (ended and row == right)]
        if k >= room or not read or not controller.peek(k):
            break
        passes += 1
        rank = NEVER if ended else int(rank_T[t + k])
        counts = []
        for row in read:
            said = _said(trace, t + k, None if row == right else wrong_at)
            wanted = int(controller.draft(k, said))  # type: ignore[arg-type]
            if wanted > 1 and row != right and row != level[0] and wanted > trace.fewest:
                raise ValueError(
                    "drafts that branch behind others than first candidates can be replayed only where q allows as "
                    "many everywhere: without top-k and top-p"
                )
            counts.append(min(wanted, int(said.support)))
        following = [(row, i) for i in range(max(counts)) for row, n in zip(read, counts, strict=True) if i < n]
        if not following:
            break
        if wrong_at is None and rank > 0 and not ended:
            wrong_at = t + k
        level = list(range(len(parents) + 1, len(parents) + len(following) + 1))
        parents += [row for row, _ in following]
        right = next((at for at, one in zip(level, following, strict=True) if one == (right, rank)), None)
        path += [] if right is None else [right]
        k += 1
    made = Round(len(parents), len(path), min(len(path) + 1, len(trace) - t), passes)
    if parents != list(range(len(parents))):
        made.parents, made.path = parents, path
    return made


def _said(trace: Trace, place: int, wrong_at: int | None) -> Recorded:
    """The confidence in the draft for a place: in the text, or behind the draft for `wrong_at` that was rejected."""
    if wrong_at is None:
        return Recorded(*trace.said_TC[min(place, len(trace) - 1)])
    return Recorded(*trace.off_TJC[wrong_at, min(place - wrong_at, RECORDED) - 1])


def play(
    make: Callable[[], Controller], traces: Iterable[Trace], accepted: Iterable[np.ndarray], costs: CostModel
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, time in autoregressive tokens), each [P], of every trace. One controller keeps its state throughout."""
    controller, totals = make(), []
    for trace, accepted_T in zip(traces, accepted, strict=True):
        rounds = replay(controller, trace, accepted_T, costs)
        totals.append((sum(r.tokens for r in rounds), sum(r.seconds for r in rounds)))
    tokens, seconds = np.array(totals, dtype=float).T
    return tokens, seconds


def oracle(trace: Trace, accepted_T: np.ndarray, costs: CostModel, candidates: int = 1, copies: bool = False) -> float:
    """The least time of any controller that knows every outcome beforehand, by dynamic programming over the text; in
    autoregressive tokens.

    candidates: how many of the head's candidates for a place may be drafted, the right one and those before it.
    copies: whether drafts may also be copied from the text.
    """
    copied = _right_copies(trace) if copies else None
    n, rank_T = len(trace), _ranks(trace, accepted_T)
    least = np.zeros(n + 1)
    for t in reversed(range(1, n)):
        least[t] = costs.round(0, 0)[0] + least[t + 1]
        for count in range(1, 0 if copied is None else min(copied[t], trace.max_new_tokens - t - 1) + 1):
            least[t] = min(least[t], costs.round(count, 0, 0)[0] + least[min(n, t + count + 1)])
        drafted = 0
        for k in range(1, min(n - t, trace.max_new_tokens - t - 1) + 1):
            rank = rank_T[t + k - 1]
            if rank >= candidates:
                break
            drafted += int(rank) + 1
            least[t] = min(least[t], costs.round(drafted, k, k)[0] + least[min(n, t + k + 1)])
    return float(least[1]) if n > 1 else 0.0


def _right_copies(trace: Trace) -> list[int]:
    """How many tokens, copied from the text at each of its places, are right."""
    assert trace.ids is not None and trace.tokens is not None
    index, tokens, found = Lookup(trace.ids.tolist()), trace.tokens.tolist(), []
    for t, token in enumerate(tokens):
        length, at = index.match()
        found.append(_right(index.copy(at, LONGEST), tokens[t:]) if length else 0)
        index.extend([token])
    return found


# ---- files


def save(path: Path, traces: list[Trace], head_sha256: str) -> None:
    """Write all traces of one head into one .npz file."""
    arrays: dict[str, np.ndarray] = {"head": np.array(json.dumps({"sha256": head_sha256, "traces": len(traces)}))}
    for i, t in enumerate(traces):
        arrays[f"{i}.name"] = np.array([t.prompt, str(t.max_new_tokens)])
        arrays |= {f"{i}.acceptance": t.acceptance_T, f"{i}.said": t.said_TC, f"{i}.off": t.off_TJC}
        more = {"rank": t.rank_T, "ids": t.ids, "tokens": t.tokens}
        arrays |= {f"{i}.{part}": array for part, array in more.items() if array is not None}
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(path: Path, head_sha256: str) -> list[Trace]:
    """Read the traces of a head. Raises ValueError for another kind of file, or traces of another head."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays["head"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a file of traces: {error}") from None
    if about["sha256"] != head_sha256:
        raise ValueError(
            f"{path}: recorded with another exit head ({about['sha256'][:12]}, not {head_sha256[:12]}); record it again"
        )
    traces = []
    for i in range(about["traces"]):
        name, most = arrays[f"{i}.name"]
        parts = (arrays.get(f"{i}.{part}") for part in ("acceptance", "said", "off", "rank", "ids", "tokens"))
        traces.append(Trace(str(name), int(most), *parts))  # type: ignore[arg-type]
    return traces
