"""The answerer `speculative`: self-speculative decoding with an exit head that was trained before.

Takes a backbone, a head and a controller without memory; gives each question's new ids. Several questions are answered
at once where the engine can decode several texts, which takes a family whose layers are computed here; else one after
the other. As the controller does not learn and every question has a random stream of its own, the answers of a call
depend on its arguments alone.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from ...errors import UserError
from ...inference.backbone import SplitBackbone
from ...inference.batch_controllers import Table, is_of_batches, make_batch_controller
from ...inference.batch_decoding import decode_batch
from ...inference.batch_engine import BatchEngine
from ...inference.controllers import make_controller
from ...inference.decoding import Request, self_speculative
from ...inference.exit_head import ExitHead
from ...inference.rounds import look_of
from ...inference.sampling import Sampler
from .interface import Answer, Question, Report, Sampling

STEADY = ("fixed", "confidence", "entropy", "tree", "table")
"""Controllers without memory: their draft lengths depend on the current text and the number of texts alone."""


class Speculative:
    """Answers with the backbone, drafting with its first N layers and an exit head."""

    reproducible = True

    def __init__(self, model: nn.Module, head: ExitHead, controller: str, ends: Collection[int], *, pack: bool = True):
        """`ends`: the ids that end an answer. pack: allow copies of the weights (`SplitBackbone`)."""
        self.controller = steady_controller(controller)
        self.ends = frozenset(ends)
        # kernels chosen by timing could differ between processes, and their rounding can decide a near tie
        self.backbone = SplitBackbone(model, head, products="repeatable", pack=pack)
        try:
            self.backbone.check_controller(self.controller)
        except ValueError as error:
            raise UserError(f"generate.controller={controller}: {error}") from None
        self.device = model.device
        self.engine = None
        if self.backbone.family.is_fast and is_of_batches(controller):
            self.engine, self.together = BatchEngine(self.backbone), make_batch_controller(controller)

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for number, ids in self._texts(questions, sampling):
            answers[number] = Answer(ids, ids[-1] in self.ends)
            if report is not None:
                report(1, len(ids))
        return [answers[i] for i in range(len(questions))]

    def _texts(self, questions: list[Question], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """(number of a question, its new ids), in the order in which they end."""
        jobs = []
        for i, q in enumerate(questions):
            generator = torch.Generator(self.device).manual_seed(hash((sampling.seed, i)) % (1 << 62))
            sampler = Sampler(q.temperature, top_p=sampling.top_p, generator=generator)
            jobs.append((Request(q.ids, sampling.max_new_tokens, self.ends), sampler))
        if self.engine is None:
            for i, (request, sampler) in enumerate(jobs):
                yield i, self_speculative(self.backbone, request, sampler, self.controller).tokens
            return
        order = sorted(range(len(jobs)), key=lambda i: -len(questions[i].ids))  # long ones first: they take longest
        longest = max((len(r.prompt) + r.max_new_tokens for r, _ in jobs), default=1)
        fitting = self.engine.fitting(longest)
        if fitting < min(sampling.batch_size, len(jobs)):  # answers must not depend on the free memory
            raise UserError(
                f"generate.batch_size={sampling.batch_size}: the free memory holds {fitting} texts of {longest} "
                "tokens at once: set it to that or less"
            )
        for text in decode_batch(self.engine, (jobs[i] for i in order), self.together, sampling.batch_size):
            if text.error is not None:
                raise text.error
            yield order[text.number], text.generation.tokens


def steady_controller(name: str):
    """The controller of that name for one text; of a table, what it says of one text. Raises UserError if it is unknown
    or learns: its answers could not be repeated."""
    try:
        if name.partition(":")[0] == "table" and isinstance(table := make_batch_controller(name), Table):
            name = f"fixed:{table.choose(1)}"
        controller = make_controller(name)
    except ValueError as error:
        raise UserError(f"generate.{error}") from None
    if name.partition(":")[0] not in STEADY or look_of(controller):
        raise UserError(
            f"generate.controller={name}: it learns from text to text, so a shard could not be made again; "
            "give fixed:K, table:1=2,8=1,16=0, tree:AxB, confidence:T or entropy:T"
        )
    return controller
