"""The drafting rules of other papers decide and learn as their docstrings say."""

import copy
import random

import pytest

from pipeline.inference.controllers import make_controller
from pipeline.inference.literature import UCB, AdaptiveSteps, Cumulative, Goodput, Logistic, Schedule, TapOut
from pipeline.inference.rounds import Round


class Said:
    """A confidence that is said rather than computed."""

    def __init__(self, top: float):
        self.top = self.collision = top
        self.entropy = 1.0


def timed(drafted: int, accepted: int, passes: int | None = None) -> Round:
    shallow, head, deep = 0.06 * (drafted + 1), 0.05 * (drafted if passes is None else passes), 0.94 + 0.02 * drafted
    return Round(drafted, accepted, accepted + 1, drafted, shallow + head + deep, shallow, head, deep)


def play(controller, acceptance, count: int, seed: int = 1) -> list[Round]:
    """Rounds in which each draft has the chance that `acceptance(position, dice)` gives, and the head says it."""
    dice, rounds = random.Random(seed), []
    for _ in range(count):
        k = accepted = 0
        alive = True
        while controller.peek(k):
            a = acceptance(k, dice)
            if not controller.draft(k, Said(a)):
                break
            k, alive = k + 1, alive and dice.random() < a
            accepted += alive
        rounds.append(timed(k, accepted))
        controller.observe(rounds[-1])
    return rounds


def rate(rounds: list[Round]) -> float:
    return sum(r.tokens for r in rounds) / sum(r.seconds for r in rounds)


def test_schedule_adds_two_and_takes_one() -> None:
    schedule, lengths = Schedule(limit=8), []
    for drafted, accepted in ((5, 5), (7, 7), (8, 8), (8, 3), (7, 0)):
        schedule.observe(Round(drafted, accepted))
        lengths.append(schedule.k)
    assert lengths == [7, 8, 8, 7, 6]
    for _ in range(9):
        schedule.observe(Round(3, 0))
    assert schedule.k == 1 and schedule.peek(0) and not schedule.peek(1)


def test_adaptive_steps_climb_and_fall_by_the_moving_average() -> None:
    steps, lengths = AdaptiveSteps(), []
    for i in range(40):
        k = steps.candidates[steps.at]
        steps.observe(Round(k, k if i < 25 else 0))
        lengths.append(steps.candidates[steps.at])
    # e is asked in rounds 10, 15 ...: 3 there, then 5 - 2 * 0.8^5 = 4.34, which is not above 4.5, and 4.79, which is.
    assert lengths[8:20] == [3, *[5] * 10, 7]
    # 6.27 after round 25; then 2.06 is below 4.25 (K = 7 to 5), 0.67 below 2.25 (5 to 3), and 0.22 below 0.25 (3 to 1).
    assert lengths[24:] == [*[7] * 5, *[5] * 5, *[3] * 5, 1]


def test_cumulative_stops_where_the_product_falls_below_the_threshold() -> None:
    controller = Cumulative(0.5)
    controller.counts = [[0.0, 1.0]] * 4 + [[6.0, 10.0]] * 2 + [[8.0, 10.0]] * 2
    assert controller.peek(0) and controller.draft(0, Said(0.9))  # 0.8
    assert controller.peek(1) and not controller.draft(1, Said(0.6))  # 0.8 * 0.6 < 0.5
    assert controller.draft(1, Said(0.9)) and controller.product == pytest.approx(0.64)
    assert controller.draft(2, Said(0.9)) and not controller.draft(3, Said(0.9))  # 0.512, 0.41
    controller.counts = [list(count) for count in controller.counts]
    controller.observe(Round(3, 1))  # the third draft was never tested
    assert controller.counts[7] == pytest.approx([9.0, 12.0], abs=0.01)
    assert controller.peek(0) and controller.product == 1.0


def test_goodput_takes_the_largest_quotient() -> None:
    """The rates are known; the quotient is computed here for every K."""
    chances = [0.9, 0.8, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    controller = Goodput()
    play(controller, lambda k, dice: chances[k], 400)
    reach, tokens, quotients = 1.0, 1.0, []
    for k in range(9):
        quotients.append(tokens / (0.06 * (k + 1) + 0.05 * k + 0.94 + 0.02 * k))
        if k < 8:
            reach *= chances[k]
            tokens += reach
    assert quotients.index(max(quotients)) == 2 and controller.best() == 2
    assert controller.acceptance[:2] == pytest.approx(chances[:2], abs=0.25)
    hopeless = Goodput()
    play(hopeless, lambda k, dice: 0.05, 200)
    assert hopeless.best() == 0


def test_ucb_tries_all_and_then_prefers_the_best() -> None:
    controller = UCB(limit=4)
    firsts = [r.drafted for r in play(controller, lambda k, dice: float(k < 2), 4)]
    assert firsts == [1, 2, 3, 4]
    later = [r.drafted for r in play(controller, lambda k, dice: float(k < 2), 1600)]
    assert max(set(later[-400:]), key=later[-400:].count) == 2 and set(later) == {1, 2, 3, 4}


def test_tapout_prefers_the_rule_of_the_largest_reward() -> None:
    """Half of the drafts are hopeless and said to be; a high threshold leaves them out."""
    controller = TapOut()
    play(controller, lambda k, dice: 0.95 if dice.random() < 0.5 else 0.05, 1200)
    counts = dict(zip(["0.3", "0.5", "0.7", "entropy 0.4", "entropy 0.6"], controller.count, strict=True))
    assert sum(counts.values()) == 1200
    assert min(counts["0.3"], counts["0.5"], counts["0.7"]) > 5 * counts["entropy 0.6"], "it drafts nothing at H = 1"


def test_logistic_learns_the_curve() -> None:
    """The head is overconfident: its odds are halved, and positions beyond the first are worse."""
    controller, dice = Logistic(seed=1), random.Random(3)
    for _ in range(3000):
        bins = tuple(dice.randrange(8) for _ in range(2))
        odds = [0.5 * controller.odds[b] - 0.7 * i for i, b in enumerate(bins)]
        right = [dice.random() < 1 / (1 + 2.718281828**-x) for x in odds]
        controller.bins = bins
        controller.observe(timed(2, 2 if all(right) else 1 if right[0] else 0))
    assert controller.slope == pytest.approx(0.5, abs=0.07)
    assert controller.intercepts[:2] == pytest.approx([0.0, -0.7], abs=0.15)
    assert controller.intercepts[2] == -0.2, "never tested"


@pytest.mark.parametrize("name", ["schedule", "ucb", "tapout", "cumulative:0.4"])
def test_a_round_without_room_teaches_nothing(name: str) -> None:
    """The last round of a text may have room for the bonus token alone: it is observed, but nobody asked before."""
    controller = make_controller(name)
    controller.observe(Round(0, 0, 1, 0, 1.0, 0.1, 0.0, 0.9))
    play(controller, lambda k, dice: 0.8, 30)
    known = copy.deepcopy({key: value for key, value in vars(controller).items() if key not in ("product", "rules")})
    controller.observe(Round(0, 0, 1, 0, 1.0, 0.1, 0.0, 0.9))
    faded = known.pop("counts", None)
    assert {key: vars(controller)[key] for key in known} == known
    assert faded is None or [c for row in controller.counts for c in row] == pytest.approx(
        [c for row in faded for c in row], rel=0.01
    )
    if isinstance(controller, UCB):
        assert sum(controller.count) == 30


def test_cumulative_comes_back_to_a_bin_after_bad_luck() -> None:
    controller = make_controller("cumulative:0.4")
    for _ in range(4):
        controller.peek(0)
        assert controller.draft(0, Said(0.7))
        controller.observe(Round(1, 0))
    for _ in range(3):  # 5.5 accepted of 12 are enough, of 14 they are not
        controller.peek(0)
        controller.draft(0, Said(0.7))
        controller.observe(Round(1, 0))
    assert not controller.draft(0, Said(0.7))
    for _ in range(1500):
        controller.peek(0)
        controller.observe(Round(0, 0))
    assert controller.draft(0, Said(0.7))


@pytest.mark.parametrize("name", ["logistic", "goodput"])
def test_rules_that_know_the_costs_come_near_thompson(name: str) -> None:
    def law(k: int, dice: random.Random) -> float:
        return 0.95 if dice.random() < 0.75 else 0.38

    least = {"logistic": 0.95, "goodput": 0.85}[name]
    assert rate(play(make_controller(name), law, 1200)) > least * rate(play(make_controller("thompson"), law, 1200))
