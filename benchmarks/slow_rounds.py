"""What `thompson` reaches on synthetic rounds, undisturbed and after slow rounds, with common random numbers.

    python benchmarks/slow_rounds.py --seeds 50

Takes laws of acceptance and of costs; gives, for each, tokens per unit of time of rounds 0..199 and 200..1999
undisturbed, the best fixed K, and the least share of the undisturbed rate that is kept from round 200 to 599 over all
disturbances: one round of the first 21 slower by 5, 10 or 50 times, in all its parts or in verification alone, or a
machine half as fast for a while. To compare two commits, run each one's own file (`git worktree`).
"""

import argparse
import random
from collections.abc import Callable

import numpy as np

from pipeline.evaluation.simulation import known_round
from pipeline.inference.controllers import make_controller
from pipeline.inference.rounds import Round

NOISE = 0.08
"""Standard deviation of the logarithm of each part's time."""
LONGEST = 10
# name: (acceptance of a draft, (shallow, head, verify of one token, of each further one, jump from one to two))
LAWS: dict[str, tuple[Callable[[random.Random], float], tuple[float, ...]]] = {
    "bimodal": (lambda dice: 0.95 if dice.random() < 0.75 else 0.38, (0.06, 0.05, 0.94, 0.02, 0.0)),
    "spread": (lambda dice: dice.betavariate(2, 0.5), (0.06, 0.05, 0.94, 0.02, 0.0)),
    "always 0.8": (lambda dice: 0.8, (0.06, 0.05, 0.94, 0.02, 0.0)),
    "always 0.5": (lambda dice: 0.5, (0.06, 0.05, 0.94, 0.02, 0.0)),
    "always 0.05": (lambda dice: 0.05, (0.06, 0.05, 0.94, 0.02, 0.0)),
    "jump in cost": (lambda dice: dice.betavariate(2, 0.7), (0.08, 0.07, 0.85, 0.03, 0.35)),
    "dear drafts": (lambda dice: dice.betavariate(1.2, 0.8), (0.10, 0.14, 0.90, 0.15, 0.0)),
}
SLOW_TIMES = [(0, 20), (0, 60), (20, 80), (100, 160)]


def play(name: str, law: str, seed: int, count: int, factors=lambda i: (1.0, 1.0)) -> np.ndarray:
    """[count, 2]: tokens and undisturbed time of each round; `factors(i)` = how much slower round i is measured in all
    parts, and in verification on top."""
    acceptance, (shallow, head, single, further, jump) = LAWS[law]
    controller, rows = make_controller(name, seed), []
    for i in range(count):
        dice = random.Random(100_000 * seed + i)  # of the round: the same whatever was decided before
        chances = [acceptance(dice) for _ in range(LONGEST)]
        coins = [dice.random() for _ in range(LONGEST)]
        noise = [dice.lognormvariate(0, NOISE) for _ in range(4)]
        k, accepted, passes = known_round(controller, chances, coins)
        parts = [shallow * (k + 1), head * passes, single + further * k + (jump if k else 0), 0.02]
        slower, verify_slower = factors(i)
        timed = [part * n * slower for part, n in zip(parts, noise, strict=True)]
        timed[2] *= verify_slower
        controller.observe(Round(k, accepted, accepted + 1, passes, sum(timed), *timed[:3]))
        rows.append((accepted + 1, sum(parts)))
    return np.array(rows)


def rate(rounds: np.ndarray) -> float:
    tokens, time = rounds.sum(0)
    return tokens / time


def disturbances() -> dict[str, Callable[[int], tuple[float, float]]]:
    found: dict[str, Callable[[int], tuple[float, float]]] = {}
    for at in range(21):
        for slow in (5.0, 10.0, 50.0):
            for whole in (True, False):
                factors = (slow, 1.0) if whole else (1.0, slow)
                name = f"round {at}, {'all' if whole else 'verification'} x {slow:g}"
                found[name] = lambda i, at=at, factors=factors: factors if i == at else (1.0, 1.0)
    for start, end in SLOW_TIMES:
        found[f"rounds {start}..{end - 1} x 2"] = lambda i, s=start, e=end: (2.0 if s <= i < e else 1.0, 1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    parser.add_argument("--undisturbed", action="store_true", help="no disturbances: minutes, not an hour")
    args = parser.parse_args()
    seeds = range(args.seeds)
    for law in args.laws:
        quiet = [play("thompson", law, seed, 2000) for seed in seeds]
        fixed = {k: np.mean([rate(play(f"fixed:{k}", law, seed, 1000)) for seed in range(8)]) for k in range(7)}
        best = max(fixed, key=lambda k: fixed[k])
        line = [f"{law:13}"]
        for start, end in ((0, 200), (200, 2000)):
            rates = [rate(rounds[start:end]) for rounds in quiet]
            line.append(f"rounds {start}-{end} {np.mean(rates):.4f} +- {np.std(rates) / len(rates) ** 0.5:.4f}")
        line.append(f"best fixed K={best} {fixed[best]:.4f}")
        if not args.undisturbed:
            kept = {
                name: np.mean([rate(play("thompson", law, s, 600, f)[200:]) / rate(quiet[s][200:600]) for s in seeds])
                for name, f in disturbances().items()
            }
            worst = min(kept, key=lambda name: kept[name])
            line.append(f"least kept {kept[worst]:.4f} ({worst})")
        print("   ".join(line), flush=True)


if __name__ == "__main__":
    main()
