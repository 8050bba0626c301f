"""95 % intervals by bootstrap over conversations: of one figure by itself, and of many speedups at the same time.

Takes sums per conversation (arrays of one entry a conversation), gives values and intervals. All turns and repeats of a
conversation are summed before they come here, because they are not independent of each other.

C conversations, R resamples
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 8
"""Conversations below which no speedup is judged: with fewer, resampling them says little about the others."""

SMALLEST_ERROR = 0.1
"""Least standard error of a resample's log speedup, as a share of that of all conversations."""

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(n, s, m, t), each [C]: n tokens in s seconds by a method, m tokens in t seconds by the baseline."""


def interval(value: Callable[..., np.ndarray], *columns: np.ndarray, seed: int = 0) -> tuple[float, list[float]]:
    """value(sums of the columns over conversations) and its percentile interval; the columns are [C]."""
    picks = np.random.default_rng(seed).integers(len(columns[0]), size=(RESAMPLES, len(columns[0])))
    low, high = np.percentile(value(*(c[picks].sum(1) for c in columns)), [2.5, 97.5])
    return float(value(*(c.sum() for c in columns))), [float(low), float(high)]


def ratio_of_rates(n, s, m, t):
    """n tokens in s seconds over m tokens in t seconds: what `interval` takes for a speedup."""
    return (n / s) / (m / t)


def joint_intervals(methods: Sequence[Columns], resamples: int = RESAMPLES, seed: int = 0) -> list[list[float]] | None:
    """Intervals of all methods' speedups that hold all at once with 95 %; None for fewer than FEWEST conversations.

    Because they hold together, the interval of whichever method is picked afterwards, by whatever rule, is honest too:
    if no method is faster than the baseline, the lower end of the fastest lies above 1 with a chance of 2.5 %. They are
    studentised bootstrap intervals of the log speedup (Davison and Hinkley, 1997, section 5.2), whose width comes from
    the largest of all methods' statistics in each resample (the single-step max-T of Westfall and Young, 1993).

    To choose on one half of the conversations and judge on the other is as honest, and needs about twice as many
    conversations for the same power (docs/lab-notes.md): what the first half says is lost, and the methods succeed and
    fail on the same conversations, so that comparing many of them costs little.
    """
    count = len(methods[0][0])
    if count < FEWEST:
        return None
    picks_RC = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    estimates = [_log_speedup(np.ones((1, count)), columns) for columns in methods]
    centres, errors = (np.array(values)[:, 0] for values in zip(*estimates, strict=True))
    largest_R, smallest_R = np.full(resamples, -np.inf), np.full(resamples, np.inf)
    for columns, centre, error in zip(methods, centres, errors, strict=True):
        if error > 0:
            resampled_R, errors_R = _log_speedup(picks_RC, columns)
            # A resample of nearly equal conversations has hardly an error of its own.
            statistic_R = (resampled_R - centre) / np.maximum(errors_R, SMALLEST_ERROR * error)
            largest_R, smallest_R = np.maximum(largest_R, statistic_R), np.minimum(smallest_R, statistic_R)
    if not errors.any():
        return [[float(np.exp(x))] * 2 for x in centres]
    tail = (1 - LEVEL) / 2
    below = float(np.quantile(largest_R, 1 - tail, method="higher"))
    above = -float(np.quantile(smallest_R, tail, method="lower"))
    return [[float(np.exp(x - below * e)), float(np.exp(x + above * e))] for x, e in zip(centres, errors, strict=True)]


def _log_speedup(picks_RC: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(log speedup, its standard error by linearisation) [R] of the conversations, counted as often as picked."""
    n, s, m, t = (picks_RC @ column for column in columns)
    influence_RC = columns[0] / n[:, None] - columns[1] / s[:, None] - columns[2] / m[:, None] + columns[3] / t[:, None]
    errors_R = np.sqrt((picks_RC * influence_RC**2).sum(1))
    return np.log(ratio_of_rates(n, s, m, t)), np.where(errors_R < 1e-12, 0.0, errors_R)  # 0 but for rounding
