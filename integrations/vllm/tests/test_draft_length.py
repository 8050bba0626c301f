"""The rule that chooses draft lengths, without vLLM: against known costs and acceptances, whose best length is
computed."""

import math
import random
from collections.abc import Callable

import pytest
from exit_heads_vllm.draft_length import Costs, DraftLength, best, fitted, robust, rounded

LONGEST = 5
Time = Callable[[int, int], float]


def flat(b: int, k: int) -> float:
    """Rows are free: a step costs what one row costs, a draft a twentieth of it."""
    return 0.02 * (1 + 0.05 * k) + 1e-5 * b * (1 + k)


def by_rows(b: int, k: int) -> float:
    """Every row costs as much as any other."""
    return 0.001 + 0.005 * b * (1 + k) + 0.001 * k


def bound_later(b: int, k: int) -> float:
    """Rows are free up to 12 of them."""
    return 0.01 * max(1.0, b * (1 + k) / 12) * (1 + 0.06 * k)


def expected(chance: float, k: int) -> float:
    return sum(chance**i for i in range(k + 1))


class World:
    """Requests that are decoded with known costs and acceptances."""

    def __init__(self, time: Time, chance: float, seed: int = 0):
        self.time, self.chance, self.dice = time, chance, random.Random(seed)
        self.seconds = self.tokens = 0.0
        self.chosen: list[int] = []

    def run(self, batches: list[int], choose: Callable[[int], int], rule: DraftLength | None = None) -> "World":
        """One step for each entry, a number of requests. A step verifies what the one before it drafted."""
        drafted = 0
        for b in batches:
            k = choose(b)
            verify, draft = self.time(b, drafted), self.time(b, k)
            seconds = (verify + draft) / 2 * self.dice.choice([1.0, 1.02, 1.05])
            for _ in range(b):
                accepted = next((i for i in range(drafted) if self.dice.random() >= self.chance), drafted)
                self.tokens += 1 + accepted
                if rule and drafted:
                    rule.outcome(drafted, accepted)
            if rule and k == drafted:
                rule.took(b, k, seconds)
            self.seconds += seconds
            self.chosen.append(k)
            drafted = k
        return self

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def adaptive(time: Time, chance: float, batches: list[int], seed: int = 0) -> tuple[World, DraftLength]:
    rule = DraftLength(LONGEST, seed)
    return World(time, chance, seed).run(batches, rule.choose, rule), rule


def best_fixed(time: Time, chance: float, batches: list[int]) -> float:
    return max(World(time, chance).run(batches, lambda b, k=k: k).rate for k in range(LONGEST + 1))


def test_best_is_the_largest_ratio_of_all() -> None:
    dice = random.Random(1)
    for _ in range(200):
        chances = [dice.random() for _ in range(4)]
        seconds = [dice.uniform(0.5, 3) for _ in range(5)]
        rates = [sum(math.prod(chances[:i]) for i in range(k + 1)) / seconds[k] for k in range(5)]
        assert best(chances, seconds) == rates.index(max(rates))


@pytest.mark.parametrize("time", [flat, by_rows, bound_later])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.9])
def test_steady_load_comes_within_three_percent_of_the_best_fixed_length(time: Time, chance: float) -> None:
    for b in (1, 7):
        found, _ = adaptive(time, chance, [b] * 3000)
        assert found.rate > 0.97 * best_fixed(time, chance, [b] * 3000)
        assert max(found.chosen) <= LONGEST
        right = max(range(LONGEST + 1), key=lambda k: expected(chance, k) / time(b, k))
        usual = max(set(found.chosen[500:]), key=found.chosen[500:].count)
        worth = expected(chance, usual) / time(b, usual) * time(b, right) / expected(chance, right)
        assert worth > 0.97, f"{usual} is drafted most, {right} is best"


def test_nothing_is_drafted_where_it_does_not_pay() -> None:
    found, _ = adaptive(by_rows, 0.3, [8] * 2000)
    assert found.chosen[200:].count(0) > 0.9 * 1800
    assert len(found.chosen) - found.chosen[200:].count(0) - 200 > 0, "now and then a draft is tried all the same"


def test_a_load_that_changes_is_served_better_than_by_any_fixed_length() -> None:
    """From 1 to 16 in flight and back: alone drafts are nearly free, together they are not."""
    batches = ([1] * 400 + [4] * 200 + [16] * 300 + [4] * 200) * 3
    found, _ = adaptive(bound_later, 0.6, batches)
    assert found.rate > 1.02 * best_fixed(bound_later, 0.6, batches)
    by_batch = {b: [k for c, k in zip(batches[1100:], found.chosen[1100:], strict=True) if c == b] for b in (1, 16)}
    mean = {b: sum(ks) / len(ks) for b, ks in by_batch.items()}
    assert mean[1] > 2 and mean[16] < 0.7


def test_slow_steps_do_not_mislead_it() -> None:
    rule, world = DraftLength(LONGEST), World(flat, 0.8)
    slow = {3, 10, 17, 40, 200}
    count = iter(range(10**6))
    world.time = lambda b, k: flat(b, k) * (50 if next(count) // 2 in slow else 1)
    world.run([1] * 1500, rule.choose, rule)
    late = world.chosen[600:]
    right = max(range(LONGEST + 1), key=lambda k: expected(0.8, k) / flat(1, k))
    assert sum(late) / len(late) > 0.85 * right


def test_another_acceptance_is_noticed() -> None:
    rule, world = DraftLength(LONGEST), World(bound_later, 0.95)
    world.run([4] * 1500, rule.choose, rule)
    before = sum(world.chosen[-300:]) / 300
    world.chance = 0.05
    world.run([4] * 3000, rule.choose, rule)
    assert before > 1.5 and sum(world.chosen[-300:]) / 300 < 0.5


def test_the_first_lengths_are_the_ends_and_each_is_held() -> None:
    rule = DraftLength(3)
    assert [rule.choose(2) for _ in range(9)] == [3] * 3 + [0] * 3 + [1] * 3
    one = DraftLength(1)
    assert [one.choose(2) for _ in range(6)] == [1] * 3 + [0] * 3
    with pytest.raises(ValueError, match="longest=0"):
        DraftLength(0)


def test_drafts_behind_a_rejected_one_are_not_counted() -> None:
    rule = DraftLength(4)
    rule.outcome(3, 1)
    assert [[round(x, 2) for x in ab] for ab in rule.outcomes] == [[2, 1], [1, 2], [1, 1], [1, 1]]
    rule.outcome(2, 2)
    assert [sum(ab) > 3.9 for ab in rule.outcomes] == [True, True, False, False]


def test_times_that_were_not_measured_are_on_the_line() -> None:
    costs = Costs()
    for b in (1, 4, 16):
        for k in (0, 1, 5):
            costs.add(b, k, by_rows(b, k))
    found = costs.steps(8, 5)
    assert found == pytest.approx([by_rows(8, k) for k in range(6)], rel=0.02)
    for _ in range(3):
        costs.add(8, 2, 7.0)
    assert costs.steps(8, 5)[2] == 7.0
    assert Costs().steps(3, 2) == [1.0, 1.0, 1.0]


def test_a_fit_has_no_negative_weight_and_finds_exact_ones() -> None:
    rows = [[1.0, x, y] for x in (0.0, 1.0, 2.0) for y in (0.0, 3.0)]
    assert fitted(rows, [2 + 0.5 * x + 0.1 * y for _, x, y in rows]) == pytest.approx([2, 0.5, 0.1], rel=1e-3)
    falling = fitted(rows, [2 - 0.5 * x + 0.1 * y for _, x, y in rows])
    assert min(falling) >= 0 and falling[1] == 0


def test_of_times_the_fastest_two_thirds_count() -> None:
    assert robust([1.0, 2.0, 300.0]) == 1.5 and robust([5.0, 4.0]) == 4.0


def test_large_batches_share_their_measurements() -> None:
    assert [rounded(b) for b in (1, 5, 8)] == [1, 5, 8]
    assert rounded(100) == rounded(104) and len({rounded(b) for b in range(1, 257)}) < 32
    assert all(abs(rounded(b) - b) <= 0.13 * b for b in range(1, 257))
