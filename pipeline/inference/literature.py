"""Drafting rules of other papers and engines, as controllers, to be measured beside ours on the same engine.

Each class names its source and what it leaves open; where our choice fills a gap, it says so. They take and give what
every controller does (rounds.py), and are lossless by the same argument (docs/control.md).
"""

import math
import random
from collections.abc import Callable
from itertools import accumulate
from operator import mul

from .costs import Costs, first_probes
from .rounds import LONGEST, Confidence, Controller, Round
from .thompson import BINS, Thompson, fade


class ByCount:
    """Decides how many tokens to draft without the head's confidence."""

    def draft(self, k: int, confidence: Confidence) -> bool:
        return True


class ConfidenceStop:
    """Drafts while max q is at least a threshold (Kangaroo: Liu et al., NeurIPS 2024, section 3).

    Kangaroo keeps the first token below the threshold; here that token is not drafted, which makes verification one
    token narrower. Looking at the token before discarding it would change the distribution of the text.
    """

    def __init__(self, threshold: float, limit: int = LONGEST):
        self.threshold, self.limit = threshold, limit

    def peek(self, k: int) -> bool:
        return k < self.limit

    def draft(self, k: int, confidence: Confidence) -> bool:
        return confidence.top >= self.threshold

    def observe(self, round: Round) -> None:
        pass


class EntropyStop(ConfidenceStop):
    """Drafts while 1 - sqrt(gamma * H(q)), a lower bound of acceptance in the style of AdaEDL (Agrawal et al.,
    2024, arXiv 2410.18351), is at least a threshold. gamma = 0.2. AdaEDL also adapts the threshold; this does not."""

    gamma = 0.2

    def draft(self, k: int, confidence: Confidence) -> bool:
        return 1 - math.sqrt(self.gamma * max(0.0, confidence.entropy)) >= self.threshold


class Beta(ByCount):
    """EESD's Beta-TS as we understand the paper (Liu et al., ACL Findings 2024, figure 2). It states neither the priors
    nor a limit; both are our choice.

    theta ~ Beta(1 + accepted, 1 + rejected). After each draft, chi ~ Bernoulli(theta) with a newly drawn theta: 1 goes
    on drafting, 0 stops and verifies. Every round has at least one draft. Drafts after the first rejected one were
    never tested and are not counted.
    """

    def __init__(self, limit: int = LONGEST, seed: int = 0):
        self.accepted, self.rejected, self.limit = 1, 1, limit
        self.random = random.Random(seed)

    def peek(self, k: int) -> bool:
        if k == 0:
            return True
        theta = self.random.betavariate(self.accepted, self.rejected)
        return k < self.limit and self.random.random() < theta

    def observe(self, round: Round) -> None:
        self.accepted += round.accepted
        self.rejected += round.accepted < round.drafted


class Calibration:
    """EESD's Calibration-TS: as Beta, but theta combines the head's own confidence with the observed acceptance.

    theta ~ N(mu, v) clipped to [0, 1], with p = max q of the last draft, n tested drafts of mean acceptance r and mean
    confidence p', prior variance s0^2 = 0.04 and noise s^2 = 0.25 (our choice). The paper's text allows two readings:
      pull:  mu = (n s0^2 r + s^2 p) / (n s0^2 + s^2), the posterior of a Gaussian with prior mean p, in which the
             weight of p vanishes as n grows;
      shift: mu = p + n / (n + n0) (r - p'), n0 = s^2 / s0^2, the confidence corrected by its mean error, in which p
             keeps its weight.
    In both, v = s^2 s0^2 / (n s0^2 + s^2).
    """

    prior, noise = 0.04, 0.25

    def __init__(self, shift: bool = False, limit: int = LONGEST, seed: int = 0):
        self.shift, self.limit, self.random = shift, limit, random.Random(seed)
        self.tested = 0
        self.accepted = self.predicted = 0.0
        self.drafts: list[float] = []

    def peek(self, k: int) -> bool:
        if k == 0:
            self.drafts = []
            return True
        mean, variance = self.posterior(self.drafts[-1])
        theta = min(1.0, max(0.0, self.random.gauss(mean, math.sqrt(variance))))
        return k < self.limit and self.random.random() < theta

    def draft(self, k: int, confidence: Confidence) -> bool:
        self.drafts.append(confidence.top)
        return True

    def observe(self, round: Round) -> None:
        tested = min(round.accepted + 1, round.drafted)
        self.tested += tested
        self.accepted += round.accepted
        self.predicted += sum(self.drafts[:tested])

    def posterior(self, p: float) -> tuple[float, float]:
        """Mean and variance of theta for a draft of confidence p."""
        n, s0, s = self.tested, self.prior, self.noise
        weight = n * s0 / (n * s0 + s)
        observed = self.accepted / n if n else 0.0
        centre = self.predicted / n if n else 0.0
        mean = p + weight * (observed - centre) if self.shift else weight * observed + (1 - weight) * p
        return mean, s * s0 / (n * s0 + s)


class Cumulative:
    """Drafts while the chance that all drafts of the round are accepted is at least a threshold.

    The form is that of EAGLE-2 (Li et al., 2024, arXiv 2406.16858, section 3), which ranks the nodes of a tree by the
    product of the head's confidences. Here a confidence is first replaced by the acceptance seen in its bin, to which
    our prior adds the confidence itself, with the weight of `prior` drafts. Earlier rounds are discounted as by
    `thompson`, so that a bin which was refused after bad luck comes back.
    """

    prior = 8.0

    def __init__(self, threshold: float, limit: int = LONGEST):
        self.threshold, self.limit = threshold, limit
        self.thought = [(self.prior * (b + 0.5) / BINS, self.prior) for b in range(BINS)]
        self.counts = [list(t) for t in self.thought]
        """Of each bin of max q: accepted drafts, and tested ones."""
        self.bins: list[int] = []
        self.product = 1.0

    def peek(self, k: int) -> bool:
        if k == 0:
            self.bins, self.product = [], 1.0
        return k < self.limit

    def draft(self, k: int, confidence: Confidence) -> bool:
        b = min(BINS - 1, int(confidence.top * BINS))
        accepted, tested = self.counts[b]
        if self.product * accepted / tested < self.threshold:
            return False
        self.product *= accepted / tested
        self.bins.append(b)
        return True

    def observe(self, round: Round) -> None:
        for i, b in enumerate(self.bins[: round.accepted + 1]):
            self.counts[b][0] += i < round.accepted
            self.counts[b][1] += 1
        fade(self.counts, self.thought, 1)
        self.bins = []  # a round without room for drafts is observed too, and no `peek` comes before it


class Schedule(ByCount):
    """The `heuristic` schedule of transformers: two drafts more after a round in which all were accepted, else one
    less, at least one. It begins with 5 drafts, the library's own number when it brought the schedule in; the limit of
    8 is that of all controllers here. Rounds without room for a draft change nothing."""

    def __init__(self, limit: int = LONGEST):
        self.k, self.limit = 5, limit

    def peek(self, k: int) -> bool:
        return k < self.k

    def observe(self, round: Round) -> None:
        if round.drafted:
            self.k = min(self.limit, self.k + 2) if round.accepted == round.drafted else max(1, self.k - 1)


class AdaptiveSteps(ByCount):
    """SGLang's adaptive number of steps (adaptive_spec_params.py, 2026), as we read it.

    e is a moving average of the accepted drafts, of weight 0.2. After a warm-up of 10 rounds, every 5 rounds K goes to
    the next larger of 1, 3, 5, 7 if e > K - 0.5, or to the next smaller one, J, if e < J - 0.75.
    That it begins with 3 is our choice.
    """

    candidates, weight, warm_up, interval = (1, 3, 5, 7), 0.2, 10, 5

    def __init__(self) -> None:
        self.at, self.average, self.rounds = 1, 0.0, 0

    def peek(self, k: int) -> bool:
        return k < self.candidates[self.at]

    def observe(self, round: Round) -> None:
        self.rounds += 1
        weight = self.weight if self.rounds > 1 else 1.0
        self.average += weight * (round.accepted - self.average)
        if self.rounds < self.warm_up or self.rounds % self.interval:
            return
        if self.at + 1 < len(self.candidates) and self.average > self.candidates[self.at] - 0.5:
            self.at += 1
        elif self.at and self.average < self.candidates[self.at - 1] - 0.75:
            self.at -= 1


def expected_tokens(acceptance: list[float]) -> list[float]:
    """E(K) = 1 + a_1 + a_1 a_2 + ... for K = 0, 1, ..., where a_i is the chance that draft i is accepted if those
    before it were."""
    return [1.0, *(1 + total for total in accumulate(accumulate(acceptance, mul)))]


class Goodput(ByCount):
    """Drafts the K with the largest E(K) / C(K), expected tokens over the seconds of a round.

    The rule was proposed for vLLM (#47111), of which only this maximum is taken over. E(K) = 1 + a_1 + a_1 a_2 + ...,
    with a_i a moving average of how often draft i is accepted if those before it were. Its weight of 0.1, the start at
    0.5, and how costs are timed are our choice: C, the first rounds and the repeated probes are those of `thompson`.
    Probes also test positions beyond K.
    """

    weight = 0.1

    def __init__(self, limit: int = LONGEST):
        self.limit, self.costs = limit, Costs()
        self.acceptance = [0.5] * limit
        self.plan = first_probes(limit)
        self.k = 0

    def peek(self, k: int) -> bool:
        if k == 0:
            due = self.plan.pop(0) if self.plan else self.costs.due(self.limit)
            self.k = self.best() if due is None else due
        return k < self.k

    def best(self) -> int:
        tokens = expected_tokens(self.acceptance)
        seconds = self.costs.rounds(self.limit)
        if not min(seconds):  # nothing was timed yet
            return 1
        return max(range(self.limit + 1), key=lambda k: tokens[k] / seconds[k])

    def observe(self, round: Round) -> None:
        self.costs.observe(round)
        for i in range(min(round.accepted + 1, round.drafted)):
            self.acceptance[i] += self.weight * ((i < round.accepted) - self.acceptance[i])


class UCB(ByCount):
    """UCB1 (Auer et al., 2002) over K = 1..limit: BanditSpec (Hou et al., ICML 2025, arXiv 2505.15141) with K as the
    hyper-parameter. The reward, tokens per second of a round over the largest one seen, is our choice."""

    def __init__(self, limit: int = LONGEST):
        self.count, self.total = [0] * limit, [0.0] * limit
        self.largest = 0.0
        self.arm: int | None = None
        """The arm of the current round; None in a round without room for a draft."""

    def peek(self, k: int) -> bool:
        if k == 0:
            self.arm = self.choose()
        return k < self.drafts()

    def drafts(self) -> int:
        """Drafts of a round with the arm chosen."""
        return 0 if self.arm is None else self.arm + 1

    def choose(self) -> int:
        """The arm with the largest upper confidence bound; each once before."""
        if 0 in self.count:
            return self.count.index(0)
        width = 2 * math.log(sum(self.count))
        scale = self.largest or 1.0
        bounds = [t / n / scale + math.sqrt(width / n) for t, n in zip(self.total, self.count, strict=True)]
        return bounds.index(max(bounds))

    def observe(self, round: Round) -> None:
        self.learn(round.tokens / round.seconds if round.seconds > 0 else 0.0)

    def learn(self, reward: float) -> None:
        if self.arm is None:
            return
        self.largest = max(self.largest, reward)
        self.total[self.arm] += reward
        self.count[self.arm] += 1
        self.arm = None


class TapOut(UCB):
    """UCB1 over rules that stop drafting: TapOut (2025, arXiv 2511.02017). Which rules, and the reward, half the share
    of drafts accepted and half the accepted drafts over the limit, scaled as in `UCB`, are our choice; only its
    abstract was read."""

    def __init__(self, limit: int = LONGEST):
        rules = [ConfidenceStop(t, limit) for t in (0.3, 0.5, 0.7)]
        self.rules = [*rules, *(EntropyStop(t, limit) for t in (0.4, 0.6))]
        super().__init__(len(self.rules))
        self.limit = limit

    def drafts(self) -> int:
        return self.limit

    def draft(self, k: int, confidence: Confidence) -> bool:
        return self.rules[self.arm or 0].draft(k, confidence)

    def observe(self, round: Round) -> None:
        share = round.accepted / round.drafted if round.drafted else 0.0
        self.learn((share + round.accepted / self.limit) / 2)


class Logistic(Thompson):
    """`thompson` with a logistic curve in place of sampled bins, after the acceptance estimator proposed for vLLM's
    adaptive verification: P(draft k is accepted) = sigmoid(w logit(x) + b_k), x its confidence.

    The slope w and the intercept b_k of each position begin at 0.5 and -0.2 and take a damped Newton step after every
    tested draft; the damping is our choice. The curve is evaluated in the middles of the bins; nothing is sampled, so
    it explores by the probes of `thompson` alone. What is expected behind the next draft is the mean over the bins'
    counts, as there.
    """

    damping = 10.0

    def __init__(self, greedy: bool = True, seed: int = 0, limit: int = LONGEST):
        super().__init__(greedy, seed, limit)
        self.slope, self.intercepts = 0.5, [-0.2] * limit
        self.curvature, self.curvatures = self.damping, [self.damping] * limit
        middles = [(b + 0.5) / BINS for b in range(BINS)]
        self.odds = [math.log(x / (1 - x)) for x in middles]
        self.table: list[list[float]] = []
        """table[k][b]: the chance of draft k in bin b; valid until the next refresh."""

    def chance(self, k: int, b: int) -> float:
        return 1 / (1 + math.exp(-self.slope * self.odds[b] - self.intercepts[k]))

    def _refresh(self) -> None:
        super()._refresh()
        self.table = [[self.chance(k, b) for b in range(BINS)] for k in range(self.limit)]

    def _hopes(self, k: int) -> bool:
        self.theta = self.table[k]
        return super()._hopes(k)

    def draft(self, k: int, confidence: Confidence) -> int:
        self.theta = self.table[k]
        return super().draft(k, confidence)

    def observe(self, round: Round) -> None:
        for i, b in enumerate(self.bins[: round.accepted + 1]):
            p = self.chance(i, b)
            error, information = (i < round.accepted) - p, p * (1 - p)
            self.curvature += information * self.odds[b] ** 2
            self.curvatures[i] += information
            self.slope += error * self.odds[b] / self.curvature
            self.intercepts[i] += error / self.curvatures[i]
        super().observe(round)


STOPS: dict[str, Callable[[float], Controller]] = {
    "confidence": ConfidenceStop,
    "entropy": EntropyStop,
    "cumulative": Cumulative,
}
"""Controllers with a threshold from 0 to 1."""
PLAIN: dict[str, Callable[[bool, int], Controller]] = {
    "beta": lambda greedy, seed: Beta(seed=seed),
    "calibration": lambda greedy, seed: Calibration(seed=seed),
    "calibration:shift": lambda greedy, seed: Calibration(shift=True, seed=seed),
    "goodput": lambda greedy, seed: Goodput(),
    "logistic": Logistic,
    "adaptive_steps": lambda greedy, seed: AdaptiveSteps(),
    "schedule": lambda greedy, seed: Schedule(),
    "ucb": lambda greedy, seed: UCB(),
    "tapout": lambda greedy, seed: TapOut(),
}
"""The others, made with (greedy, seed)."""
