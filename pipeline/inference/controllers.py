"""The names of the controllers, which decide how many tokens to draft. The default one is in thompson.py, those
whose drafts branch in branching.py, copies of texts in sources.py, rules of other papers and engines in literature.py.

A controller answers whether token k+1 is drafted, or how many candidates for it. For decoding to stay lossless, the
answer may depend on committed text, earlier rounds, this round's drafted tokens and their q, q of token k+1, and random
numbers of its own. It must not depend on token k+1 itself, on an accept draw of this round, or on what the deep layers
compute in it. Then the next token has the backbone's distribution whatever the controller's state (docs/control.md).
"""

import math
from typing import Any

from .branching import Branching, FixedTree
from .literature import PLAIN, STOPS
from .lookup import Memory
from .rounds import Confidence, Controller, Round
from .sources import WithLookup
from .thompson import Thompson


class Fixed:
    """Always drafts K tokens. K = 0 drafts nothing: a round yields one token, as in autoregressive decoding."""

    def __init__(self, k: int):
        self.k = k

    def peek(self, k: int) -> bool:
        return k < self.k

    def draft(self, k: int, confidence: Confidence) -> bool:
        return True

    def observe(self, round: Round) -> None:
        pass


NAMES = (
    "thompson, fixed:K, thompson+tree, tree:AxBxC (A candidates for the first draft, B after each of them, ...), "
    "confidence:T, entropy:T, cumulative:T (0 < T < 1), beta, calibration, calibration:shift, goodput, logistic, "
    "adaptive_steps, schedule, ucb, tapout or none, alone or with +lookup or +memory behind it"
)
THOMPSON = {"thompson": Thompson, "thompson+tree": Branching}
COPYING = {"+lookup": False, "+memory": True}
"""Endings of a name: drafts may also be copied from the text -> whether from earlier texts too."""


def fixed_length(name: str) -> int | None:
    """K of a controller named `fixed:K`; None for any other name."""
    kind, _, argument = name.partition(":")
    return int(argument) if kind == "fixed" and argument.isdecimal() else None


def branches(name: str) -> bool:
    """Whether the drafts of a controller of this name may branch."""
    return name.startswith("tree:") or "+tree" in name


def remembers(name: str) -> bool:
    """Whether a controller of this name copies from earlier texts, so that its figures depend on their order."""
    return any(name.endswith(ending) for ending, earlier in COPYING.items() if earlier)


def make_controller(name: str, seed: int = 0, greedy: bool = True) -> Controller:
    """The controller of a name such as `thompson`, `fixed:3` or `confidence:0.6`; `none` drafts nothing.

    greedy: whether the text is decoded greedily or sampled, because a different quantity predicts acceptance in each.
    Raises ValueError for an unknown name or a parameter out of range.
    """
    for ending, earlier in COPYING.items():
        head = name.removesuffix(ending)
        if head != name and not head.endswith(tuple(COPYING)):
            memory = Memory() if earlier else None
            return WithLookup(make_controller(head, seed, greedy), greedy, seed, memory=memory)
    kind, _, argument = name.partition(":")
    k = fixed_length(name)
    if k is not None:
        return Fixed(k)
    if kind in STOPS:
        try:
            threshold = float(argument)
        except ValueError:
            threshold = math.nan
        if 0 < threshold < 1:
            return STOPS[kind](threshold)
    if kind == "tree" and all(width.isdecimal() for width in argument.split("x")):
        try:
            return FixedTree([int(width) for width in argument.split("x")])
        except ValueError as error:
            raise ValueError(f"controller={name}: {error}") from None
    if name in PLAIN:
        return PLAIN[name](greedy, seed)
    if name in THOMPSON:
        return THOMPSON[name](greedy, seed)
    if name == "none":
        return Fixed(0)
    raise ValueError(f"controller={name}: must be {NAMES}")


def thompson_in(controller: Controller) -> Thompson | None:
    """The controller's part that learns of the head and keeps it from text to text, if it has one."""
    head = controller.head if isinstance(controller, WithLookup) else controller
    return head if type(head) in THOMPSON.values() else None  # type: ignore[return-value]  # a logistic one is another


def learned_controller(name: str, config: dict[str, Any], seed: int = 0, greedy: bool = True) -> Controller:
    """`make_controller`, but thompson starts from what it had learned of this head when the head was measured.

    config: that of the head's folder; only a published one holds a state. Raises ValueError as `make_controller`, and
    for the state of another kind of controller.
    """
    controller = make_controller(name, seed, greedy)
    state = config.get("states", {}).get("greedy" if greedy else "sampled")
    if (head := thompson_in(controller)) and state is not None:
        head.load_state_dict(state)
    return controller
