"""Every figure of an evaluation, computed from its tables: speedups, acceptance, costs, and the judged speedup.

Takes `generations` (a row for each prompt, method and repeat, with tokens and seconds) and `rounds` (a row for each
round); gives the entries `heads`, `rivals` and `best` of results.json. All functions depend on the tables alone.

Speedup is tokens per second over autoregressive decoding on the same engine, dtype and prompts, interleaved; neither
side includes the prefill. Acceptance length counts the bonus token and is a mean over rounds. Intervals are
bootstrapped over conversations, for each figure separately; only `best` and `speedup_joint_ci95` account for the
selection among many methods (intervals.py).
"""

from typing import Any

import numpy as np
import pandas as pd

from ..generation.repetition import first_loop
from ..inference.controllers import fixed_length, remembers
from ..prompts.prompt import conversation_of
from .intervals import Columns, interval, joint_intervals, ratio_of_rates

BASELINE = "autoregressive"


def summarise(generations: pd.DataFrame, rounds: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per exit layer and temperature: baseline, costs, and every controller's figures.

    generations: exit_layer (0 for the baseline), temperature, controller, prompt, repeat, tokens (list),
    seconds, finish_reason. rounds: exit_layer, temperature, controller, prompt, repeat, drafted, levels, accepted,
    tokens, head_passes, seconds, shallow_seconds, head_seconds, verify_seconds.
    """
    generations = generations.assign(length=generations.tokens.map(len), loop=generations.tokens.map(first_loop))
    entries = []
    for temperature, at_t in generations.groupby("temperature"):
        base = at_t[at_t.controller == BASELINE]
        drafting = at_t[at_t.controller != BASELINE]
        joint = _joint(base, drafting)
        for exit_layer, heads in drafting.groupby("exit_layer"):
            mine = rounds[(rounds.temperature == temperature) & (rounds.exit_layer == exit_layer)]
            costs = cost_table(mine, pass_seconds(base.seconds, base["length"]))
            controllers = {
                name: _controller(name, base, rows, mine[mine.controller == name])
                | {"speedup_joint_ci95": joint[exit_layer, name]}
                for name, rows in heads.groupby("controller", sort=False)
            }
            entries.append(
                {
                    "exit_layer": int(exit_layer),
                    "temperature": float(temperature),
                    "compared": {
                        "methods": len(joint),
                        "conversations": base.prompt.map(conversation_of).nunique(),
                        "prompts": base.prompt.nunique(),
                    },
                    "baseline": _baseline(base),
                    "costs": costs,
                    "controllers": controllers,
                }
            )
    return entries


def _joint(base: pd.DataFrame, drafting: pd.DataFrame) -> dict[tuple[int, str], list[float] | None]:
    """(exit layer, controller) -> the interval of its speedup that holds simultaneously with all others."""
    groups = drafting.groupby(["exit_layer", "controller"], sort=False)
    found = joint_intervals([_columns(base, rows) for _, rows in groups])
    return {key: None if found is None else found[i] for i, (key, _) in enumerate(groups)}


def beside(rivals: pd.DataFrame, generations: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per rival and exit layer. Both sides of every ratio include the prefill, as rivals' times cannot be
    split.

    rivals: columns rival, exit_layer (0 where it has none), prompt, repeat, tokens, seconds. In an entry,
    over_autoregressive is the speedup over the greedy baseline of `generations`, over_generate that over the rival
    `generate` (None for itself, or without it), best that of the fastest greedy controller over the rival, and differ
    the number of texts that are not the baseline's.
    """
    if rivals.empty:
        return []
    rivals = rivals.assign(length=rivals.tokens.map(len))
    greedy = generations[generations.temperature == 0]
    greedy = greedy.assign(length=greedy.tokens.map(len), seconds=greedy.prefill_seconds + greedy.seconds)
    base = greedy[greedy.controller == BASELINE]
    expected = {(r.prompt, r.repeat): list(r.tokens) for r in base.itertuples()}
    loop = rivals[rivals.rival == "generate"]
    ours = greedy[greedy.controller != BASELINE].groupby(["exit_layer", "controller"])
    (n, controller), best = min(ours, key=lambda group: _seconds_per_token(group[1]))
    entries = []
    for (name, exit_layer), rows in rivals.groupby(["rival", "exit_layer"], sort=False):
        entries.append(
            {
                "rival": name,
                "exit_layer": int(exit_layer) or None,
                "texts": len(rows),
                "differ": sum(list(r.tokens) != expected[r.prompt, r.repeat] for r in rows.itertuples()),
                "tokens_per_second": 1 / _seconds_per_token(rows),
                "over_autoregressive": _speedup(base, rows),
                "over_generate": None if name == "generate" or loop.empty else _speedup(loop, rows),
                "best": {"exit_layer": int(n), "controller": controller, **_speedup(rows, best)},
            }
        )
    return entries


def cost_table(rounds: pd.DataFrame, token_seconds: float) -> dict[str, Any]:
    """Mean time of each part of a round, in units of one autoregressive token (`token_seconds`).

    shallow and head are per pass, of the rounds that the head drafted, of chains if there are any among them; verify
    per width (number of tokens verified in one pass), rest per round. target_efficiency: the time of verifying the
    smallest width over that of each width (MoESD, Huang et al., 2025); it is 1 where further tokens take no time.
    """
    parts = rounds.shallow_seconds + rounds.head_seconds + rounds.verify_seconds
    calls, own = max(1, int(rounds.head_passes.sum())), of_head(rounds)
    chains = own[own.drafted == levels(own)]  # elsewhere a pass may have more rows
    own = own if chains.empty else chains
    verify = rounds.groupby(rounds.drafted + 1).verify_seconds.mean() / token_seconds
    return {
        "unit_seconds": token_seconds,
        "shallow": float(own.shallow_seconds.sum() / max(1, (levels(own) + 1).sum()) / token_seconds),
        "head": float(rounds.head_seconds.sum() / calls / token_seconds),
        "verify": {int(width): round(float(cost), 4) for width, cost in verify.items()},
        "rest": float((rounds.seconds - parts).mean() / token_seconds),
        "target_efficiency": {int(w): round(float(verify.iloc[0] / cost), 4) for w, cost in verify.items()},
    }


def of_head(rounds: pd.DataFrame) -> pd.DataFrame:
    """The rounds whose drafts were not copied."""
    return rounds[rounds.source == "head"] if "source" in rounds else rounds


def levels(rounds: pd.DataFrame) -> pd.Series:
    """The most drafts of each round that could have been accepted: fewer than were drafted where drafts branch."""
    return rounds.levels if "levels" in rounds else rounds.drafted


class CostModel:
    """Time of a round's parts, in units of one autoregressive token, from the `costs` of results.json."""

    def __init__(self, costs: dict[str, Any]):
        self.shallow, self.head, self.rest = costs["shallow"], costs["head"], costs["rest"]
        known = sorted((int(width), cost) for width, cost in costs["verify"].items())
        self._widths, self._verify = zip(*known, strict=True)

    def verify(self, width: int) -> float:
        """Time of a verification, interpolated linearly between measured widths, and beyond the largest one
        extrapolated along the line through the smallest and the largest."""
        if width > self._widths[-1] and len(self._widths) > 1:
            slope = (self._verify[-1] - self._verify[0]) / (self._widths[-1] - self._widths[0])
            return self._verify[-1] + max(0.0, slope) * (width - self._widths[-1])
        return float(np.interp(width, self._widths, self._verify))

    def round(self, drafted: int, head_passes: int, levels: int | None = None) -> tuple[float, float, float, float]:
        """Times of a round: (all parts, shallow, head, verify). levels: where drafts branch, how many there are in a
        row; a row more in a shallow pass then costs its share of what it costs in verification."""
        levels = drafted if levels is None else levels
        shallow = self.shallow * (levels + 1)
        if drafted > levels:
            row = self.verify(drafted + 1) - self.verify(levels + 1)
            shallow += max(0.0, row) * self.shallow / self.verify(1)
        parts = shallow, self.head * head_passes, self.verify(drafted + 1)
        return sum(parts) + self.rest, *parts


def of_fixed(controllers: dict[str, Any]) -> dict[int, Any]:
    """K -> the entry of `fixed:K`, for each K above 0."""
    lengths = {fixed_length(name): figures for name, figures in controllers.items()}
    return {k: figures for k, figures in lengths.items() if k}


def conditional_rates(rounds: pd.DataFrame) -> list[float]:
    """P(draft i+1 is accepted | it was drafted and the first i were accepted), for each position i that was drafted;
    where drafts branch, any of the candidates for it."""
    longest = 0 if rounds.empty else int(levels(rounds).max())
    tested = [(levels(rounds) > i) & (rounds.accepted >= i) for i in range(longest)]
    return [float((rounds.accepted[t] > i).mean()) for i, t in enumerate(tested) if t.any()]


def predicted_speedup(k: int, rates: list[float], costs: dict[str, Any]) -> float:
    """The speedup that fixed K should have, from conditional rates and costs in token units.

    It is tokens / time of a round: tokens = 1 + sum_i prod_{j<=i} rate_j;
    time = (K+1) shallow + K head + verify(K+1) + rest.
    """
    tokens = 1 + float(np.cumprod(rates[:k]).sum())
    return tokens / CostModel(costs).round(k, k)[0]


def time_per_token(rounds: pd.DataFrame, token_seconds: float) -> dict[str, float]:
    """Time per committed token by part of a round, in units of one autoregressive token; the sum is 1 / speedup."""
    tokens = rounds.tokens.sum() * token_seconds
    parts = {name: float(rounds[f"{name}_seconds"].sum() / tokens) for name in ("shallow", "head", "verify")}
    return parts | {"rest": float(rounds.seconds.sum() / tokens) - sum(parts.values())}


def pass_seconds(seconds, lengths) -> float:
    """Seconds per autoregressive token, without the first of each text, which comes from the prefill."""
    return float(sum(seconds) / max(1, sum(lengths) - len(lengths)))


def _per_conversation(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Sums over all turns and repeats of each conversation."""
    return rows.groupby(rows.prompt.map(conversation_of))[list(columns)].sum()


def _columns(base: pd.DataFrame, rows: pd.DataFrame, count: str = "length", time: str = "seconds") -> Columns:
    """Tokens and seconds of the texts `rows`, and of the baseline's texts of the same conversations."""
    ours = _per_conversation(rows, count, time)
    theirs = _per_conversation(base, count, time).loc[ours.index]
    return ours[count].to_numpy(), ours[time].to_numpy(), theirs[count].to_numpy(), theirs[time].to_numpy()


def _speedup(base: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """Speedup of the texts `rows` over the baseline's texts of the same conversations, and its interval."""
    speedup, ci = interval(ratio_of_rates, *_columns(base, rows))
    return {"speedup": speedup, "speedup_ci95": ci}


def acceptance(rounds: pd.DataFrame) -> dict[str, Any]:
    """Acceptance length and its interval; None where every text ended with its first token, before any round."""
    if rounds.empty:
        return {"acceptance_length": None, "acceptance_length_ci95": None}
    of = _per_conversation(rounds.assign(count=1), "accepted", "count")
    length, ci = interval(lambda accepted, count: 1 + accepted / count, of.accepted.to_numpy(), of["count"].to_numpy())
    return {"acceptance_length": length, "acceptance_length_ci95": ci}


def best(entries: list[dict[str, Any]], temperature: float) -> dict[str, Any]:
    """The judged figure: the fastest of the entries' methods at this temperature, with the interval of its speedup.
    Controllers with a memory are left out if there are others: what they gain depends on the order of the prompts.

    speedup_ci95 holds simultaneously for all methods compared at this temperature (`methods` of them, including those
    of heads that are not among `entries`), so it accounts for the selection; None if there were too few conversations.
    """
    found = [(figures["speedup"], entry, name) for entry in entries if entry["temperature"] == temperature
             for name, figures in entry["controllers"].items()]  # fmt: skip
    found = [one for one in found if not remembers(one[2])] or found
    _, entry, name = max(found, key=lambda one: one[0])
    figures = entry["controllers"][name]
    return {
        "exit_layer": entry["exit_layer"],
        "controller": name,
        "temperature": temperature,
        "speedup": figures["speedup"],
        "speedup_ci95": figures["speedup_joint_ci95"],
        "acceptance_length": figures["acceptance_length"],
        "acceptance_length_ci95": figures["acceptance_length_ci95"],
        **entry["compared"],
    }


def _seconds_per_token(rows: pd.DataFrame) -> float:
    return float(rows.seconds.sum() / rows["length"].sum())


def _baseline(base: pd.DataFrame) -> dict[str, Any]:
    sums = _per_conversation(base, "length", "seconds")
    rate, ci = interval(lambda n, s: n / s, sums["length"].to_numpy(), sums.seconds.to_numpy())
    looped = float((base["length"] - base.loop).sum() / base["length"].sum())
    return {
        "tokens_per_second": rate,
        "ci95": ci,
        "tokens": int(base["length"].sum()),
        "share_after_first_loop": looped,
        "prompts_that_loop": float((base.loop < base["length"]).mean()),
    }


def _controller(name: str, base: pd.DataFrame, rows: pd.DataFrame, rounds: pd.DataFrame) -> dict[str, Any]:
    before, before_ci = _before_loop(base, rows, rounds)
    drafted, accepted = int(rounds.drafted.sum()), int(rounds.accepted.sum())
    histogram = rounds.drafted.value_counts().sort_index()
    marginal = [float((rounds.accepted > i).mean()) for i in range(int(levels(rounds).max() or 0))]
    figures: dict[str, Any] = {
        **_speedup(base, rows),
        "speedup_before_loop": before,
        "speedup_before_loop_ci95": before_ci,
        "tokens_per_second": 1 / _seconds_per_token(rows),
        **acceptance(rounds),
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "conditional_rates": conditional_rates(of_head(rounds)),
        "marginal_rates": marginal,
        "drafted_histogram": {int(k): int(n) for k, n in histogram.items()},
        "time_per_token": time_per_token(rounds, pass_seconds(base.seconds, base["length"])),
        "rounds": len(rounds),
        "tokens": int(rows["length"].sum()),
        "tasks": {
            task: {
                "prompts": part.prompt.nunique(),
                **_speedup(base[base.task == task], part),
                **acceptance(rounds[rounds.prompt.isin(part.prompt)]),
            }
            for task, part in rows.groupby("task", sort=False)
        },
    }
    if len(of_head(rounds)) < len(rounds):
        figures["sources"] = {
            source: {"rounds": len(part), **{name: int(part[name].sum()) for name in ("drafted", "accepted", "tokens")}}
            for source, part in rounds.groupby("source")
        }
    # every token except the first of each text comes from a round
    assert abs(figures["acceptance_length"] - 1 - sum(marginal)) < 1e-9
    assert figures["tokens"] == int(rounds.tokens.sum()) + len(rows)
    k = fixed_length(name)
    if k is not None:
        figures["predicted_speedup"] = _cross_predicted(k, base, rounds)
    return figures


def _before_loop(base: pd.DataFrame, rows: pd.DataFrame, rounds: pd.DataFrame) -> tuple[float, list[float]]:
    """Speedup on the tokens before each text's first repeated 8-gram, because repetitions are easy to draft and would
    raise it."""
    ended = rounds.sort_values("round").groupby(["prompt", "repeat"])
    spent = {}
    for row in rows.itertuples():
        if row.loop >= row.length:
            spent[row.prompt, row.repeat] = row.seconds
            continue
        group = ended.get_group((row.prompt, row.repeat))
        reached = 1 + group.tokens.cumsum()  # the first token comes from the prefill, not from a round
        inside = (reached <= row.loop).sum()
        spent[row.prompt, row.repeat] = (
            float(group.seconds.iloc[: inside + 1].sum())
            * row.loop
            / max(row.loop, int(reached.iloc[min(inside, len(group) - 1)]))
        )
    ours = rows.assign(before=[spent[row.prompt, row.repeat] for row in rows.itertuples()])
    theirs = base.assign(before=base.seconds * base.loop / base["length"])
    return interval(ratio_of_rates, *_columns(theirs, ours, "loop", "before"))


def _cross_predicted(k: int, base: pd.DataFrame, rounds: pd.DataFrame) -> float | None:
    """Predicted speedup, from costs and rates of one half of the conversations; the mean over both halves."""
    conversations = sorted(set(rounds.prompt.map(conversation_of)))
    values = []
    for half in (conversations[::2], conversations[1::2]):
        seen, unit = (rows[rows.prompt.map(conversation_of).isin(half)] for rows in (rounds, base))
        full = seen[seen.drafted == k]  # empty where the texts are too short for K drafts
        if full.empty or unit.empty:
            return None
        costs = cost_table(full, pass_seconds(unit.seconds, unit["length"]))
        values.append(predicted_speedup(k, conditional_rates(seen), costs))
    return float(np.mean(values))
