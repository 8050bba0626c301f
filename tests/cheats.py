"""Two controllers that violate the condition of losslessness in realistic ways, to test the tests.

The exact enumeration must detect both, the transform test the first. Each takes the sampler; in `draft`, both look at
the token that was drawn before they decide, so that the text has a wrong distribution.
"""

from torch import Tensor

from pipeline.inference.sampling import Draft, Sampler


def with_pending(kind: type[Sampler]) -> type[Sampler]:
    """A subclass of `kind` that exposes the proposed token before the decision, and lets the next accept coin be tossed
    in advance."""

    class Pending(kind):
        unseen: Draft | None = None
        coins: Tensor | None = None

        def propose(self, q):
            self.unseen = super().propose(q)
            return self.unseen

        def _coins(self, chance_K):
            coins, self.coins = self.coins, None
            return super()._coins(chance_K) if coins is None else coins

    return Pending


class Discards:
    """Discards a drawn token if its probability is low, which is the most common mistake."""

    def __init__(self, sampler, threshold: float):
        self.sampler, self.threshold = sampler, threshold

    def peek(self, k: int) -> bool:
        return k < 3

    def draft(self, k: int, confidence) -> bool:
        return float(confidence.law.q_V[self.sampler.unseen.token]) >= self.threshold

    def observe(self, round) -> None:
        pass


class LooksAtAcceptDraw:
    """Tosses the accept coin of a draft in advance, and drafts only what will be accepted.

    p: gives the backbone's processed distribution [V] after the committed text and this round's drafts.
    """

    def __init__(self, sampler, p):
        self.sampler, self.p = sampler, p

    def peek(self, k: int) -> bool:
        return k < 1

    def draft(self, k: int, confidence) -> bool:
        token = self.sampler.unseen.token
        coins = self.sampler._coins((self.p() / confidence.law.q_V)[token : token + 1])
        self.sampler.coins = coins if coins[0] else None
        return bool(coins[0])

    def observe(self, round) -> None:
        pass
