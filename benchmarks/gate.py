"""How often the gate's line of speedup lets a head pass: where no method is faster, and where some are.

Simulated evaluations: seconds of a text vary by 30 % between conversations, which the methods share for the most part.
Three rules: the fastest method's own interval; the joint interval, which the gate uses; chosen on one half of the
conversations, judged on the other. Methods that are faster: the fastest by 22 %, the others evenly between that and 0.

    python benchmarks/gate.py
"""

import argparse
from collections.abc import Callable

import numpy as np

from pipeline.evaluation.intervals import Columns, interval, joint_intervals, ratio_of_rates

SPREAD, SHARED, GAIN = 0.3, 0.7, 0.2


def evaluation(draw: np.random.Generator, conversations: int, count: int, gain: float) -> list[Columns]:
    """(tokens, seconds) of each method and of the baseline, per conversation."""
    tokens, base = np.full(conversations, 64.0), 0.5 * np.exp(draw.normal(0, 0.05, conversations))
    together = draw.normal(size=conversations)
    columns = []
    for log_speedup in np.linspace(gain, 0, count):
        z = np.sqrt(SHARED) * together + np.sqrt(1 - SHARED) * draw.normal(size=conversations)
        columns.append((tokens, base * np.exp(SPREAD * z - SPREAD**2 / 2 - log_speedup), tokens, base))
    return columns


def fastest(columns: list[Columns]) -> int:
    return int(np.argmax([ratio_of_rates(*(c.sum() for c in one)) for one in columns]))


def of_its_own(columns: list[Columns]) -> bool:
    return interval(ratio_of_rates, *columns[fastest(columns)])[1][0] > 1


def joint(columns: list[Columns]) -> bool:
    found = joint_intervals(columns, resamples=1000)
    return found is not None and found[fastest(columns)][0] > 1


def on_halves(columns: list[Columns]) -> bool:
    """The rows are independent, so that every second one is a random half."""
    first, second = ([tuple(c[start::2] for c in one) for one in columns] for start in (0, 1))
    found = joint_intervals([second[fastest(first)]], resamples=1000)  # type: ignore[arg-type, list-item]
    return found is not None and found[0][0] > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--methods", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--simulations", type=int, default=400)
    args = parser.parse_args()
    rules: list[Callable[[list[Columns]], bool]] = [of_its_own, joint, on_halves]
    print("passes without a gain, with one")
    for conversations in args.conversations:
        for count in args.methods:
            said = []
            for rule in rules:
                shares = []
                for gain in (0.0, GAIN):
                    draw = np.random.default_rng(0)
                    passed = sum(rule(evaluation(draw, conversations, count, gain)) for _ in range(args.simulations))
                    shares.append(f"{passed / args.simulations:.1%}")
                said.append(f"{rule.__name__} {', '.join(shares)}")
            print(f"{conversations} conversations, {count} methods: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
