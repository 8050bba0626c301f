"""Draws docs/control.png: where Bernoulli stopping loses to the best fixed K, and where it does not.

Takes nothing, gives the picture of docs/control.md: `python docs/draw_control.py`. Closed forms throughout, for
confidences that are known and right: what a stopping rule is worth before any learning.

a: acceptance of a draft, c: cost of a draft, in rounds that draft nothing
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COSTS = (0.05, 0.11, 0.20)
LONGEST = 24


def best_fixed(mean: float, c: float) -> float:
    """max over K of (1 + m + ... + m^K) / (1 + c K), drafts independent with mean acceptance m."""
    k = np.arange(LONGEST + 1)
    return float((np.cumsum(mean**k) / (1 + c * k)).max())


def bernoulli(mean: float, square: float, c: float) -> float:
    """Draft on with probability equal to the last draft's own acceptance; square = E[a^2]. At least one draft.

    Draft j is made with probability m^(j-1); made and accepted with all before it, (E a^2)^(j-1) m.
    """
    return (1 + mean / (1 - square)) / (1 + c / (1 - mean))


def cost_aware(draws: np.ndarray, c: float) -> float:
    """The best rule that sees each draft's acceptance before it pays for it: continue iff P a + V(P a) > c rate.

    The rate is where the value of a round, E[tokens] - rate E[time], is zero (Dinkelbach); P on a grid of logs.
    """
    grid = np.linspace(-6.0, 0.0, 121)
    reach = np.exp(grid)[:, None] * draws
    low, high = 1.0, 1.0 + 1.0 / c
    for _ in range(18):
        rate, value = (low + high) / 2, np.zeros(len(grid))
        for _ in range(LONGEST):
            later = np.interp(np.log(np.maximum(reach, 1e-9)), grid, value, left=0.0)
            value = np.maximum(0.0, reach - rate * c + later).mean(1)
        low, high = (rate, high) if 1 + value[-1] > rate else (low, rate)
    return low


def main() -> None:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = np.linspace(0.2, 0.95, 76)
    for c in COSTS:
        ratio = [bernoulli(m, m * m, c) / best_fixed(m, c) for m in means]
        left.plot(means, ratio, label=f"a draft costs {c:.2f} rounds")
    left.set(xlabel="acceptance, the same for every draft", ylabel="Bernoulli stopping / best fixed K",
             title="Confidence says nothing")  # fmt: skip
    mean, c = 0.75, 0.11
    spreads = np.linspace(0.02, 0.98, 17)
    fixed = best_fixed(mean, c)
    uniform = (np.arange(64) + 0.5) / 64
    aware = []
    for spread in spreads:  # Beta(mean s, (1 - mean) s) with 1 / (s + 1) = spread
        s = 1 / spread - 1
        aware.append(cost_aware(beta_quantiles(mean * s, (1 - mean) * s, uniform), c) / fixed)
    squares = mean**2 + mean * (1 - mean) * spreads
    right.plot(spreads, [bernoulli(mean, x, c) / fixed for x in squares], label="Bernoulli(confidence)")
    right.plot(spreads, [bernoulli(mean, mean**2, c) / fixed] * len(spreads), label="Bernoulli(mean) = Beta-TS")
    right.plot(spreads, aware, label="cost-aware rule")
    right.set(xlabel="spread of confidences: 0 all alike, 1 all certain", ylabel="over best fixed K",
              title=f"Confidence is right; mean {mean}, a draft costs {c}")  # fmt: skip
    for axes in (left, right):
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_name("control.png"), dpi=120)


def beta_quantiles(a: float, b: float, at: np.ndarray) -> np.ndarray:
    """Quantiles of Beta(a, b) by inverting its sampled distribution function."""
    draws = np.sort(np.random.default_rng(0).beta(a, b, size=200_001))
    return draws[(at * (len(draws) - 1)).astype(int)]


if __name__ == "__main__":
    main()
