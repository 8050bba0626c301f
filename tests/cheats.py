"""Two controllers that break the condition of losslessness, each as it is really met. The enumeration
must catch both, the transform test the first.

Take the sampler they cheat with, give wrong text. Both draw the next draft in `draft`, before they answer, and
hand it to the decoder when they answer yes.
"""

from pipeline.inference.sampling import Sampler


def with_pending(kind: type[Sampler]) -> type[Sampler]:
    """A sampler whose next draw and next coin can be fixed beforehand."""

    class Pending(kind):
        token: int | None = None
        coins: list[bool] | None = None

        def draft(self, q):
            token, self.token = self.token, None
            return super().draft(q) if token is None else token

        def _coins(self, chance_K):
            coins, self.coins = self.coins, None
            return super()._coins(chance_K) if coins is None else coins

    return Pending


class Discards:
    """Draws a draft, looks at its probability, and throws it away when that is low: the commonest mistake."""

    def __init__(self, sampler, threshold: float):
        self.sampler, self.threshold = sampler, threshold

    def peek(self, k: int) -> bool:
        return k < 3

    def draft(self, k: int, confidence) -> bool:
        token = self.sampler.draft(confidence)
        if float(confidence.q_V[token]) < self.threshold:
            return False
        self.sampler.token = token
        return True

    def observe(self, round) -> None:
        pass


class LooksAtAcceptDraw:
    """Tosses the accept coin of its draft first, and drafts only what will be accepted.

    `p` gives the backbone's processed distribution [V] behind the committed text and this round's drafts.
    """

    def __init__(self, sampler, p):
        self.sampler, self.p = sampler, p

    def peek(self, k: int) -> bool:
        return k < 1

    def draft(self, k: int, confidence) -> bool:
        token = self.sampler.draft(confidence)
        if not self.sampler._coins((self.p() / confidence.q_V)[token : token + 1])[0]:
            return False
        self.sampler.token, self.sampler.coins = token, [True]
        return True

    def observe(self, round) -> None:
        pass
