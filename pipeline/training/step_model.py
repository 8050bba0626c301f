"""The forward pass of a training step: teacher, heads and loss of one batch.

`StepModel` takes packed sequences and gives the loss of every head, or its figures on held-out responses. It is the
root of the FSDP2 units (sharding.py): because its forward is the whole step, one root gathers and frees every unit.

Letters: B sequences, T tokens of a sequence, R rows (positions that predict a response token), D hidden size, H heads,
W tokens of the draft vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..inference.layers import logit_cap, logit_scale
from ..inference.stopwatch import stopwatch
from .acceptance import draft_statistics
from .chunked_loss import LinearDistillation
from .losses import parse
from .teacher import Teacher, TeacherStates, last_layer_arguments


class StepModel(nn.Module):
    """A frozen backbone and its exit heads, named `exit-N` after their exit layers.

    draft_ids_W: the tokens that the heads shall draft, on the device of the heads. Then p and q of the loss are those
    over these tokens alone, which is p restricted to them and renormalised. None: all tokens.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exit_layers: list[int],
        heads: list[nn.Module],
        config: Config,
        draft_ids_W: Tensor | None = None,
    ):
        super().__init__()
        self.backbone, self.draft_ids_W = backbone, draft_ids_W
        self.heads = nn.ModuleDict({f"exit-{n}": head for n, head in zip(exit_layers, heads, strict=True)})
        self.terms = parse(config.distill.loss)
        self.logit_scale, self.logit_cap = logit_scale(backbone.config), logit_cap(backbone.config)
        self.temperature, self.chunk = config.distill.temperature, config.distill.loss_chunk
        self.stopwatch = stopwatch([next(heads[0].parameters()).device])
        """Time of the parts "teacher" (its forward pass and logits) and "rest" since the stopwatch was last started."""
        # A cached teacher has no decoder layers, so there is nothing to run.
        self.teacher = Teacher(backbone, exit_layers) if config.distill.teacher == "online" else None
        self.eval()

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask_BT: Tensor,
        scale: float = 1.0,
        statistics: bool = False,
        teacher_states: TeacherStates | None = None,
        heads: Sequence[str] | None = None,
    ) -> Any:
        """The losses losses_H, summed over the rows of `mask_BT` and multiplied by `scale`; or, with `statistics`, the
        result of `draft_statistics` and the rows' places index_R in the flattened batch.

        H are the heads named in `heads`, all by default; the others are not run.
        `teacher_states` are hidden states of these sequences from an earlier pass; without them, the teacher runs.
        """
        self.stopwatch.mark("rest")
        with torch.no_grad():
            if teacher_states is None:
                assert self.teacher is not None
                teacher_states, arguments = self.teacher(ids_BT, positions_BT)
            else:
                arguments = last_layer_arguments(
                    self.backbone, next(iter(self.heads.values())), teacher_states[0], positions_BT
                )
        self.stopwatch.mark("teacher")
        final_BTD, hidden = teacher_states
        index_R = mask_BT.flatten().nonzero().squeeze(1)
        teacher_RD = self._scaled(final_BTD.flatten(0, 1)[index_R])
        students_RD = [self._draft(head, hidden[n], arguments, index_R) for n, head in self._numbered(heads)]
        lm_head = self.backbone.lm_head
        lm_head.unshard()  # type: ignore[operator]  # once, for teacher and every head, and freed before backward
        try:
            if statistics:
                weights = lm_head.weight, teacher_RD, students_RD
                return draft_statistics(*weights, self.chunk, self.draft_ids_W, self.logit_cap), index_R
            rows = lm_head.weight
            if self.draft_ids_W is not None:
                rows = rows.index_select(0, self.draft_ids_W)
            return LinearDistillation.apply(
                rows, teacher_RD, self.terms, scale, self.temperature, self.chunk, self.logit_cap, self.stopwatch.mark,
                *students_RD,
            )  # fmt: skip
        finally:
            lm_head.reshard()  # type: ignore[operator]

    def train(self, mode: bool = True) -> "StepModel":
        """Backbone and heads always stay in evaluation mode: dropout (Seed-OSS) or the noise of a router (Phi-3.5-MoE)
        would make the loss another than that of decoding."""
        super().train(False)
        return self

    def _numbered(self, names: Sequence[str] | None) -> Iterator[tuple[int, nn.Module]]:
        """(exit layer, head) of each name."""
        for name in self.heads if names is None else names:
            yield int(name.removeprefix("exit-")), self.heads[name]

    def _draft(self, head: nn.Module, hidden_BTD: Tensor, arguments: dict[str, Any], index_R: Tensor) -> Tensor:
        """The head's final hidden states of the rows index_R: [R, D], in the backbone's dtype."""
        out = head(hidden_BTD, **arguments)
        out_BTD = out[0] if isinstance(out, tuple) else out
        # Only these rows are normalised: where prompts are long, they are a small part of all.
        return self._scaled(self.backbone.model.norm(out_BTD.flatten(0, 1)[index_R]))  # type: ignore[operator,union-attr]

    def _scaled(self, hidden_RD: Tensor) -> Tensor:
        """Hidden states whose products with the LM head are the logits, in families that multiply these."""
        return hidden_RD if self.logit_scale == 1 else hidden_RD * self.logit_scale
