"""95 % intervals by bootstrap over conversations, for a single figure and for many speedups simultaneously; and of a
ratio that was measured several times, where a run is of many conversations at once.

Takes sums per conversation (arrays with one entry for each), gives values and intervals. The caller sums all turns and
repeats of a conversation first, because they are not independent of each other.

C conversations, R resamples
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 8
"""The fewest conversations for which a speedup is judged: resamples of fewer say little about other conversations."""

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
SMALLEST_ERROR = 0.1
"""Lower bound of the standard error of a resample's log speedup, as a share of the error over all conversations."""

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(n, s, m, t), each [C]: n tokens in s seconds by a method, m tokens in t seconds by the baseline."""


def interval(value: Callable[..., np.ndarray], *columns: np.ndarray, seed: int = 0) -> tuple[float, list[float]]:
    """`value` of the columns' sums over conversations, and its percentile interval [low, high]; the columns are [C]."""
    picks = np.random.default_rng(seed).integers(len(columns[0]), size=(RESAMPLES, len(columns[0])))
    low, high = np.percentile(value(*(c[picks].sum(1) for c in columns)), [2.5, 97.5])
    return float(value(*(c.sum() for c in columns))), [float(low), float(high)]


def ratio_of_rates(n, s, m, t):
    """The speedup of n tokens in s seconds over m tokens in t seconds, a `value` for `interval`."""
    return (n / s) / (m / t)


def joint_intervals(methods: Sequence[Columns], resamples: int = RESAMPLES, seed: int = 0) -> list[list[float]] | None:
    """Simultaneous 95 % intervals of all methods' speedups; None for fewer than FEWEST conversations.

    Because they hold simultaneously, the interval of a method that is selected afterwards, by any rule, is valid too:
    if no method is faster than the baseline, the lower end for the fastest lies above 1 with a probability of 2.5 %.
    They are studentised bootstrap intervals of the log speedup (Davison and Hinkley, 1997, section 5.2), whose width
    comes from the largest of all methods' statistics in each resample (the single-step max-T of Westfall and Young,
    1993).

    Selecting on one half of the conversations and judging on the other would be valid too, but needs about twice as
    many conversations for the same power (docs/lab-notes.md): it does not use the first half for the interval, and the
    methods succeed and fail on the same conversations, so comparing many of them widens simultaneous intervals little.
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
            # A resample of nearly equal conversations has an error close to 0.
            statistic_R = (resampled_R - centre) / np.maximum(errors_R, SMALLEST_ERROR * error)
            largest_R, smallest_R = np.maximum(largest_R, statistic_R), np.minimum(smallest_R, statistic_R)
    if not errors.any():
        return [[float(np.exp(x))] * 2 for x in centres]
    tail = (1 - LEVEL) / 2
    below = float(np.quantile(largest_R, 1 - tail, method="higher"))
    above = -float(np.quantile(smallest_R, tail, method="lower"))
    return [[float(np.exp(x - below * e)), float(np.exp(x + above * e))] for x, e in zip(centres, errors, strict=True)]


def _log_speedup(picks_RC: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(log speedup, its standard error by linearisation), each [R]; picks_RC counts each conversation in a resample."""
    n, s, m, t = (picks_RC @ column for column in columns)
    influence_RC = columns[0] / n[:, None] - columns[1] / s[:, None] - columns[2] / m[:, None] + columns[3] / t[:, None]
    errors_R = np.sqrt((picks_RC * influence_RC**2).sum(1))
    return np.log(ratio_of_rates(n, s, m, t)), np.where(errors_R < 1e-12, 0.0, errors_R)  # below it is only rounding


def interval_of_repeats(ratios: np.ndarray) -> tuple[float, float]:
    """The interval of paired ratios, one of each repeat, from Student's t of their logs; nan for a single one."""
    freedom = len(ratios) - 1
    if freedom < 1:
        return float("nan"), float("nan")
    logs = np.log(ratios)
    t = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.72 / freedom
    width = t * logs.std(ddof=1) / (freedom + 1) ** 0.5
    return float(np.exp(logs.mean() - width)), float(np.exp(logs.mean() + width))
