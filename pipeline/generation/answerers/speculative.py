"""The answerer `speculative`: self-speculative decoding with an exit head that was trained before.

Takes a backbone, a head and a controller without memory; gives each question's new ids, one question at a time. As the
controller does not learn, the answers of a call depend on its arguments alone.
"""

from collections.abc import Collection

import torch
from torch import nn

from ...errors import UserError
from ...inference.backbone import SplitBackbone
from ...inference.controllers import make_controller
from ...inference.decoding import Request, self_speculative
from ...inference.exit_head import ExitHead
from ...inference.rounds import look_of
from ...inference.sampling import Sampler
from .interface import Answer, Question, Report, Sampling

STEADY = ("fixed", "confidence", "entropy", "tree")
"""Controllers without memory: their draft lengths depend on the current text alone."""


class Speculative:
    """Answers with the backbone, drafting with its first N layers and an exit head."""

    reproducible = True

    def __init__(self, model: nn.Module, head: ExitHead, controller: str, ends: Collection[int]):
        """`ends`: the ids that end an answer."""
        self.controller = steady_controller(controller)
        self.ends = frozenset(ends)
        # kernels chosen by timing could differ between processes, and their rounding can decide a near tie
        self.backbone = SplitBackbone(model, head, timed_kernels=False)
        try:
            self.backbone.check_controller(self.controller)
        except ValueError as error:
            raise UserError(f"generate.controller={controller}: {error}") from None
        self.device = model.device

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        answers = []
        for q in questions:
            sampler = Sampler(q.temperature, top_p=sampling.top_p, generator=generator)
            request = Request(q.ids, sampling.max_new_tokens, self.ends)
            ids = self_speculative(self.backbone, request, sampler, self.controller).tokens
            answers.append(Answer(ids, ids[-1] in self.ends))
            if report is not None:
                report(1, len(ids))
        return answers


def steady_controller(name: str):
    """The controller of that name. Raises UserError if it is unknown or learns: its answers could not be repeated."""
    try:
        controller = make_controller(name)
    except ValueError as error:
        raise UserError(f"generate.{error}") from None
    if name.partition(":")[0] not in STEADY or look_of(controller):
        raise UserError(
            f"generate.controller={name}: it learns from text to text, so a shard could not be made again; "
            "give fixed:K, tree:AxB, confidence:T or entropy:T"
        )
    return controller
