"""Every figure from tables so small that the answer can be counted by hand."""

import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation.intervals import interval
from pipeline.evaluation.metrics import BASELINE, beside, conditional_rates, cost_table, predicted_speedup, summarise
from pipeline.generation.repetition import first_loop


def round_row(prompt: str, j: int, drafted: int, accepted: int, **more) -> dict:
    row = {
        "exit_layer": 2, "temperature": 0.0, "controller": "fixed:2", "prompt": prompt, "repeat": 0, "round": j,
        "drafted": drafted, "accepted": accepted, "tokens": accepted + 1, "head_passes": drafted, "seconds": 2.0,
        "shallow_seconds": 0.3, "head_seconds": 0.2, "verify_seconds": 1.0,
    }  # fmt: skip
    return row | more


def generation(prompt: str, controller: str, tokens: list[int], seconds: float) -> dict:
    return {
        "exit_layer": 0 if controller == BASELINE else 2, "temperature": 0.0, "controller": controller,
        "prompt": prompt, "task": "", "repeat": 0, "tokens": tokens, "seconds": seconds,
        "prefill_seconds": 0.0, "finish_reason": "length",
    }  # fmt: skip


def test_first_loop() -> None:
    assert first_loop([1, 2, 3, 4], n=2) == 4
    assert first_loop([1, 2, 3, 1, 2, 5], n=2) == 3  # the 2-gram (1, 2) comes again at position 3
    assert first_loop([7] * 10, n=3) == 1
    assert first_loop([], n=8) == 0


def test_interval_is_a_ratio_of_sums_and_brackets_it() -> None:
    n, s = np.array([10.0, 30.0]), np.array([1.0, 1.0])
    value, (low, high) = interval(lambda a, b: a / b, n, s)
    assert value == 20 and low == 10 and high == 30  # not the mean of per-prompt ratios of some weighting
    same, (low, high) = interval(lambda a, b: a / b, np.full(5, 4.0), np.full(5, 2.0))
    assert same == low == high == 2


def test_conditional_rates_count_only_tested_positions() -> None:
    rounds = pd.DataFrame(
        [round_row("a", 0, 2, 0), round_row("a", 1, 2, 1), round_row("a", 2, 2, 2), round_row("a", 3, 1, 1)]
    )
    assert conditional_rates(rounds) == [3 / 4, 1 / 2]  # of 4 first drafts 3; of the 2 second ones that were tested 1


def test_costs_are_per_call_and_per_width() -> None:
    rounds = pd.DataFrame([round_row("a", 0, 2, 1), round_row("a", 1, 1, 1, verify_seconds=0.5)])
    costs = cost_table(rounds, token_seconds=0.5)
    assert costs["shallow"] == pytest.approx(0.6 / 5 / 0.5)  # 3 + 2 shallow passes
    assert costs["head"] == pytest.approx(0.4 / 3 / 0.5)  # 2 + 1 head calls
    assert costs["verify"] == {2: 1.0, 3: 2.0}
    assert costs["rest"] == pytest.approx((0.5 + 1.0) / 2 / 0.5)


def test_prediction_is_the_formula() -> None:
    costs = {"shallow": 0.1, "head": 0.05, "verify": {3: 0.9}, "rest": 0.02}
    assert predicted_speedup(2, [0.8, 0.5], costs) == pytest.approx((1 + 0.8 + 0.4) / (0.3 + 0.1 + 0.9 + 0.02))


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two prompts, 7 tokens each; baseline 1 s a token; two rounds of 2 s that give 3 tokens each."""
    generations = [generation(p, BASELINE, list(range(7)), 7.0) for p in "ab"]
    generations += [generation(p, "fixed:2", list(range(7)), 4.0) for p in "ab"]
    rounds = [round_row(p, j, 2, 2) for p in "ab" for j in range(2)]
    return pd.DataFrame(generations), pd.DataFrame(rounds)


def test_summary_of_a_perfect_head() -> None:
    [entry] = summarise(*tables())
    assert entry["baseline"]["tokens_per_second"] == 1
    c = entry["controllers"]["fixed:2"]
    assert c["speedup"] == c["speedup_before_loop"] == pytest.approx(7 / 4)
    assert c["speedup_ci95"] == [pytest.approx(7 / 4)] * 2
    assert (c["acceptance_length"], c["draft_acceptance_rate"], c["rounds"], c["tokens"]) == (3, 1, 4, 14)
    assert c["conditional_rates"] == c["marginal_rates"] == [1, 1]
    assert c["drafted_histogram"] == {2: 4}
    # 3 tokens a round of 2 s (3 shallow calls, 2 head calls, one verify, the rest); 7 s for 6 passes of the baseline
    assert c["predicted_speedup"] == pytest.approx(3 / 2 * 7 / 6, rel=1e-4)


def test_tasks_have_figures_of_their_own() -> None:
    generations, rounds = tables()
    generations["task"] = generations.prompt.map({"a": "qa", "b": "rag"})
    rounds.loc[rounds.prompt == "b", ["accepted", "tokens"]] = [1, 2]
    of_b = (generations.prompt == "b") & (generations.exit_layer == 2)
    generations.loc[of_b, "tokens"] = pd.Series([[0, 1, 2, 3, 4]], index=generations.index[of_b])
    c = summarise(generations, rounds)[0]["controllers"]["fixed:2"]
    assert (c["tasks"]["qa"]["acceptance_length"], c["tasks"]["rag"]["acceptance_length"]) == (3, 2)
    assert c["acceptance_length"] == 2.5
    assert c["tasks"]["qa"]["speedup"] == pytest.approx(7 / 4) and c["tasks"]["rag"]["speedup"] == pytest.approx(5 / 4)


def test_a_task_whose_texts_end_before_any_round_has_no_acceptance_length() -> None:
    generations, rounds = tables()
    generations["task"] = generations.prompt.map({"a": "qa", "b": "rag"})
    of_b = (generations.prompt == "b") & (generations.exit_layer == 2)
    generations.loc[of_b, "tokens"] = pd.Series([[0]], index=generations.index[of_b])
    c = summarise(generations, rounds[rounds.prompt == "a"])[0]["controllers"]["fixed:2"]
    assert c["tasks"]["rag"]["acceptance_length"] is None and c["tasks"]["qa"]["acceptance_length"] == 3


def test_no_prediction_from_texts_shorter_than_the_drafts() -> None:
    generations, rounds = tables()
    c = summarise(generations, rounds.assign(drafted=1, accepted=1, tokens=3))[0]["controllers"]["fixed:2"]
    assert c["predicted_speedup"] is None


def test_speedup_before_the_loop_leaves_the_loop_out() -> None:
    """A text that repeats one token from position 4 on: only the rounds before it count."""
    generations, rounds = tables()
    looping = [0, 1, 2, 3] + [9] * 21
    long = [generation("a", BASELINE, looping, 25.0), generation("a", "fixed:2", looping, 100.0)]
    generations = pd.concat([generations[generations.prompt == "b"], pd.DataFrame(long)], ignore_index=True)
    first = [round_row("a", 0, 2, 2), round_row("a", 1, 2, 2)]  # 7 tokens in 4 s
    slow = [round_row("a", 2 + j, 2, 2, seconds=16.0) for j in range(6)]
    rounds = pd.concat([rounds[rounds.prompt == "b"], pd.DataFrame(first + slow)], ignore_index=True)
    [entry] = summarise(generations, rounds)
    c = entry["controllers"]["fixed:2"]
    assert entry["baseline"]["prompts_that_loop"] == 0.5
    assert c["speedup"] < 0.5
    # text a counts its 5 tokens before the first repeated 8-gram: 5/7 of the 4 s of its first two rounds
    assert c["speedup_before_loop"] == pytest.approx((12 / (4 + 4 * 5 / 7)) / 1)


def rival_row(name: str, prompt: str, seconds: float, tokens: int = 6, exit_layer: int = 0) -> dict:
    return {"rival": name, "exit_layer": exit_layer, "prompt": prompt, "task": "", "repeat": 0,
            "tokens": list(range(tokens)), "seconds": seconds}  # fmt: skip


def beside_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two prompts of 6 tokens; with prefill the baseline takes 6 s, fixed:2 4 s, beta 3 s, beta at T = 1 nothing."""
    ours = [(BASELINE, 5.0, 0.0), ("fixed:2", 3.0, 0.0), ("beta", 2.0, 0.0), ("beta", 0.1, 1.0)]
    generations = [
        generation(p, name, list(range(6)), s) | {"prefill_seconds": 1.0, "temperature": t}
        for name, s, t in ours
        for p in "ab"
    ]
    rivals = [rival_row("early_exit", p, 24.0, exit_layer=3) for p in "ab"]
    rivals += [rival_row("generate", "a", 10.0), rival_row("generate", "b", 14.0)]
    rivals += [rival_row("generate:static", "a", 6.0), rival_row("generate:static", "b", 6.0, tokens=3)]
    return pd.DataFrame(rivals), pd.DataFrame(generations)


def speedup(value: float, low: float | None = None, high: float | None = None) -> dict:
    ci = [value if low is None else low, value if high is None else high]
    return {"speedup": pytest.approx(value), "speedup_ci95": [pytest.approx(x) for x in ci]}


def test_rivals_beside_ours_with_prefill_on_both_sides() -> None:
    early, plain, static = beside(*beside_tables())
    best = {"exit_layer": 2, "controller": "beta"}
    assert early == {
        "rival": "early_exit", "exit_layer": 3, "texts": 2, "differ": 0, "tokens_per_second": 6 / 24,
        "over_autoregressive": speedup(1 / 4), "over_generate": speedup(1 / 2, 10 / 24, 14 / 24),
        "best": best | speedup(8),
    }  # fmt: skip
    assert plain == {
        "rival": "generate", "exit_layer": None, "texts": 2, "differ": 0, "tokens_per_second": 1 / 2,
        "over_autoregressive": speedup(1 / 2, 6 / 14, 6 / 10), "over_generate": None,
        "best": best | speedup(4, 10 / 3, 14 / 3),
    }  # fmt: skip
    # 9 tokens in 12 s; text b is not the baseline's
    assert (static["differ"], static["tokens_per_second"]) == (1, 9 / 12)
    assert static["over_autoregressive"] == speedup(3 / 4, 1 / 2, 1)
    assert static["over_generate"] == speedup((9 / 12) / (12 / 24), (3 / 6) / (6 / 14), (6 / 6) / (6 / 10))


def test_rivals_without_their_own_loop_and_none_at_all() -> None:
    rivals, generations = beside_tables()
    [static] = beside(rivals[rivals.rival == "generate:static"], generations)
    assert static["over_generate"] is None and static["best"]["controller"] == "beta"
    assert beside(rivals[:0], generations) == []
