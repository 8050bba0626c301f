"""Intervals: what is resampled, and how often the gate would let a head pass that is not faster.

The data of the simulations look like an evaluation's: per conversation seconds of the baseline, and of methods whose
acceptance varies with the conversation and partly together.
"""

import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation.intervals import FEWEST, Columns, joint_intervals, ratio_of_rates
from pipeline.evaluation.metrics import BASELINE, best, summarise


def methods(draw: np.random.Generator, conversations: int, speedups: list[float]) -> list[Columns]:
    """Of these true speedups: 64 tokens of every text, seconds that vary by 30 % between conversations."""
    tokens = np.full(conversations, 64.0)
    base = 0.5 * np.exp(draw.normal(0, 0.05, conversations))
    together, spread = draw.normal(size=conversations), 0.3
    columns = []
    for speedup in speedups:
        z = np.sqrt(0.7) * together + np.sqrt(0.3) * draw.normal(size=conversations)
        columns.append((tokens, base * np.exp(spread * z - spread**2 / 2) / speedup, tokens, base))
    return columns


def passes(columns: list[Columns]) -> bool:
    """As the gate does: the fastest method, its interval above 1."""
    speedups = [ratio_of_rates(*(c.sum() for c in one)) for one in columns]
    found = joint_intervals(columns, resamples=400)
    assert found is not None
    return found[int(np.argmax(speedups))][0] > 1


@pytest.mark.parametrize("count", [1, 5, 10])
def test_without_a_faster_method_one_in_forty_passes(count: int) -> None:
    """Nominal 2.5 %. Of 400 simulations 4 to 18 are within three standard errors, whichever way."""
    draw = np.random.default_rng(count)
    passed = sum(passes(methods(draw, 24, [1.0] * count)) for _ in range(400))
    assert 1 <= passed <= 19, f"{passed / 400:.1%}"


def test_a_method_that_is_faster_passes() -> None:
    draw = np.random.default_rng(0)
    assert sum(passes(methods(draw, 24, [1.4, 1.2, 1.0, 0.9])) for _ in range(50)) >= 45
    assert sum(passes(methods(draw, 100, [1.2, 1.1, 1.0, 0.9])) for _ in range(50)) >= 45


def test_intervals_widen_with_the_number_of_methods_and_hold_their_speedups() -> None:
    columns = methods(np.random.default_rng(3), 24, [1.2] * 8)
    alone, among = joint_intervals(columns[:1]), joint_intervals(columns)
    assert alone is not None and among is not None
    assert among[0][0] < alone[0][0] < ratio_of_rates(*(c.sum() for c in columns[0])) < alone[0][1] < among[0][1]


def test_few_or_equal_conversations() -> None:
    columns = methods(np.random.default_rng(3), FEWEST, [1.2] * 3)
    assert joint_intervals([tuple(c[:-1] for c in one) for one in columns]) is None  # type: ignore[misc]
    found = joint_intervals(columns)
    assert found is not None and all(0 < low < high < 100 for low, high in found)
    ones = np.ones(FEWEST)
    assert joint_intervals([(ones, ones / 2, ones, ones)]) == [[2.0, 2.0]]


def evaluation(conversations: int, turns: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Conversations whose turns and repeats are all alike; fixed:1 is 1 to 3 times as fast, by conversation."""
    texts, rounds = [], []
    for i in range(conversations):
        for turn in range(turns):
            name = f"{i:016x}" + (f".{turn + 1}" if turn else "")
            speedup = 1 + 2 * i / (conversations - 1)
            for controller, seconds in ((BASELINE, 7.0), ("fixed:1", 7 / speedup)):
                key = {"exit_layer": int(controller != BASELINE), "temperature": 0.0, "controller": controller,
                       "prompt": name, "task": "", "repeat": 0}  # fmt: skip
                texts.append(key | {"tokens": list(range(7)), "seconds": seconds, "finish_reason": "length"})
                parts = {f"{part}_seconds": seconds / 12 for part in ("shallow", "head", "verify")}
                rounds += [key | parts | {"round": j, "drafted": 1, "accepted": i % 2, "tokens": 1 + i % 2,
                                          "head_passes": 1, "seconds": seconds / 3}
                           for j in range(6 // (1 + i % 2))] if controller != BASELINE else []  # fmt: skip
    return pd.DataFrame(texts), pd.DataFrame(rounds)


def test_turns_of_a_conversation_are_no_further_evidence() -> None:
    """Said again three times, the same conversations give the same intervals."""
    (once,), (four_times,) = (summarise(*evaluation(12, turns)) for turns in (1, 4))
    assert (once["compared"]["conversations"], four_times["compared"]["conversations"]) == (12, 12)
    assert (once["compared"]["prompts"], four_times["compared"]["prompts"]) == (12, 48)
    assert once["baseline"]["ci95"] == pytest.approx(four_times["baseline"]["ci95"])
    one, four = once["controllers"]["fixed:1"], four_times["controllers"]["fixed:1"]
    for key in ("speedup_ci95", "speedup_joint_ci95", "speedup_before_loop_ci95", "acceptance_length_ci95"):
        assert one[key] == pytest.approx(four[key]), key
        assert one[key][0] < one[key][1]


def test_the_best_is_quoted_with_the_interval_that_allows_for_the_choice() -> None:
    entries = summarise(*evaluation(12, 1))
    figures, quoted = entries[0]["controllers"]["fixed:1"], best(entries, 0.0)
    assert quoted["speedup_ci95"] == figures["speedup_joint_ci95"] != figures["speedup_ci95"]
    assert (quoted["methods"], quoted["conversations"], quoted["prompts"]) == (1, 12, 12)
