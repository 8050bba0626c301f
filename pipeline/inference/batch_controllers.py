"""The names of the controllers of several texts at once, and the simple rules among them. `thompson` is in
batch_thompson.py.

Takes laws of the texts' next drafts and finished rounds (batch_rounds.py); decides which texts draft.
"""

from collections.abc import Callable
from typing import Any

from .batch_costs import BatchCosts
from .batch_rounds import BatchController, BatchRound
from .batch_thompson import BatchThompson
from .branching import FixedTree
from .controllers import COPYING, fixed_length, make_controller
from .costs import first_probes
from .literature import expected_tokens
from .rounds import LONGEST, Confidence, Controller, reads_of, spare_of


class Each:
    """Asks a controller of one text for every text; for rules without memory or state, whose answers for a text depend
    on its law alone. Its drafts may branch."""

    def __init__(self, rule: Controller, limit: int):
        self.rule, self.limit = rule, limit
        self.reads, self.spare = reads_of(rule), spare_of(rule)

    def begin(self, count: int) -> None:
        pass

    def peek(self, level: int, places: list[int]) -> list[int]:
        return places if level < self.limit and self.rule.peek(level) else []

    def draft(self, level: int, laws: dict[int, Confidence]) -> list[int]:
        return [place for place, law in laws.items() for _ in range(int(self.rule.draft(level, law)))]

    def observe(self, round: BatchRound) -> None:
        pass


class Uniform:
    """All texts draft the same number K, chosen before the round; base of the rules of serving engines."""

    limit = LONGEST

    def __init__(self) -> None:
        self.k = 0

    def choose(self, count: int) -> int:
        """K of a round of `count` texts."""
        raise NotImplementedError

    def begin(self, count: int) -> None:
        self.k = min(self.limit, self.choose(count))

    def peek(self, level: int, places: list[int]) -> list[int]:
        return places if level < self.k else []

    def draft(self, level: int, laws: dict[int, Confidence]) -> list[int]:
        return list(laws)

    def observe(self, round: BatchRound) -> None:
        pass


class Table(Uniform):
    """K by the number of texts, from a table tuned beforehand, as vLLM and SGLang have it
    (`num_speculative_tokens_per_batch_size`). steps: (texts from which on it holds, K), ascending from 1."""

    def __init__(self, steps: list[tuple[int, int]]):
        super().__init__()
        if not steps or steps[0][0] != 1 or sorted(dict(steps)) != [texts for texts, _ in steps]:
            raise ValueError("the numbers of texts must ascend from 1, as in table:1=4,8=2,16=0")
        if any(not 0 <= k <= LONGEST for _, k in steps):
            raise ValueError(f"0 to {LONGEST} drafts in a round")
        self.steps = steps

    def choose(self, count: int) -> int:
        return [k for texts, k in self.steps if texts <= count][-1]


class Goodput(Uniform):
    """K of the largest E(K) / C(K): tokens of a round, from moving averages of each position's acceptance, over its
    seconds by number of rows (proposed for vLLM in #47111). The first rounds measure."""

    MEMORY = 0.9
    """Share of the average that stays when a round's acceptance is added."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = BatchCosts()
        self.accepted = [0.5] * self.limit
        """Of each position: the share of drafts accepted where all before them were."""
        self.plan = first_probes(self.limit)

    def choose(self, count: int) -> int:
        if self.plan:
            return self.plan.pop(0)
        tokens, seconds = expected_tokens(self.accepted), self.costs.rounds(count, self.limit)
        return max(range(self.limit + 1), key=lambda k: tokens[k] / seconds[k] if seconds[k] > 0 else 0.0)

    def observe(self, round: BatchRound) -> None:
        self.costs.observe(round)
        self.costs.forget()
        for position in range(max((text.drafted for text in round.texts), default=0)):
            tested = [text.accepted > position for text in round.texts if text.drafted > position <= text.accepted]
            if tested:
                share = sum(tested) / len(tested)
                self.accepted[position] += (1 - self.MEMORY) * (share - self.accepted[position])


EACH = ("confidence", "entropy", "tree")


def make_batch_controller(name: str, seed: int = 0, greedy: bool = True) -> BatchController:
    """The controller of several texts of a name: `thompson`, `fixed:K`, `tree:AxBxC`, `confidence:T`, `entropy:T`,
    `table:1=4,8=2,16=0`, `goodput` or `none`. Raises ValueError for any other."""
    kind, _, argument = name.partition(":")
    plain: dict[str, Callable[[], BatchController]] = {
        "thompson": lambda: BatchThompson(greedy, seed),
        "goodput": Goodput,
        "none": lambda: Each(make_controller("none"), 0),
    }
    if name in plain:
        return plain[name]()
    if (k := fixed_length(name)) is not None:
        return Each(make_controller(name), k)
    if kind in EACH and not name.endswith(tuple(COPYING)):
        rule = make_controller(name)
        return Each(rule, len(rule.widths) if isinstance(rule, FixedTree) else LONGEST)
    if kind == "table":
        try:
            steps = [(int(texts), int(k)) for texts, k in (step.split("=") for step in argument.split(","))]
            return Table(steps)
        except ValueError as error:
            raise ValueError(f"controller={name}: {error}") from None
    raise ValueError(
        f"controller={name}: of several texts at once must be {BATCH_NAMES}; thompson+tree, copies and other rules "
        "are for one text at a time"
    )


def is_of_batches(name: str) -> bool:
    """Whether a controller of this name can be one of several texts at once."""
    try:
        make_batch_controller(name)
    except ValueError:
        return False
    return True


def learned_batch_controller(name: str, config: dict[str, Any], greedy: bool = True) -> BatchController:
    """`make_batch_controller`, but thompson starts from the acceptances that were measured with the head, whose
    folder's config is given. Raises ValueError as `make_batch_controller`, and for the state of another kind."""
    controller = make_batch_controller(name, greedy=greedy)
    state = config.get("states", {}).get("greedy" if greedy else "sampled")
    if isinstance(controller, BatchThompson) and state is not None:
        controller.load_beliefs(state)
    return controller


BATCH_NAMES = "thompson, fixed:K, tree:AxBxC, confidence:T, entropy:T, table:1=4,8=2,16=0, goodput or none"
