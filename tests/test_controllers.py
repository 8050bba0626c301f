"""Controllers decide and learn as their docstrings say."""

import pytest

from pipeline.inference.controllers import Beta, Fixed, Round, make_controller


def lengths(controller, rounds: int) -> list[int]:
    """Drafts of each round when nothing else stops it."""
    counts = []
    for _ in range(rounds):
        k = 0
        while controller.peek(k):
            k += 1
        counts.append(k)
    return counts


def test_fixed_drafts_k() -> None:
    assert lengths(Fixed(3), 4) == [3] * 4
    assert lengths(make_controller("none"), 4) == [0] * 4


def test_beta_learns_only_from_tested_drafts() -> None:
    beta = Beta()
    beta.observe(Round(drafted=5, accepted=2))  # two accepted, one rejected, two never tested
    beta.observe(Round(drafted=3, accepted=3))
    assert (beta.accepted, beta.rejected) == (1 + 2 + 3, 1 + 1)


def test_beta_stops_as_a_bernoulli_of_its_posterior() -> None:
    """Its draft count is geometric: E = 1 / (1 - theta) without a limit, whatever the posterior's spread."""
    beta = Beta(limit=10**6, seed=1)
    beta.accepted, beta.rejected = 7500, 2500
    counts = lengths(beta, 4000)
    assert min(counts) == 1
    assert abs(sum(counts) / len(counts) - 4) < 0.25  # standard deviation of the mean 0.055


def test_beta_has_a_limit() -> None:
    beta = Beta(limit=6)
    beta.accepted = 10**9
    assert lengths(beta, 3) == [6] * 3


@pytest.mark.parametrize("name", ["fixed", "fixed:", "fixed:-1", "fixed:x", "thompsom", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be fixed:K"):
        make_controller(name)
