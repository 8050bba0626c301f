"""One training step: teacher and heads in a single forward pass, one optimizer over all heads.

Takes packed batches, gives losses, validation figures and a state that resumes exactly. Knows nothing of files,
processes' launching or logging.

Letters: B sequences, T tokens of a sequence, R rows (positions that predict a response token), D hidden size,
V vocabulary, H heads.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from .acceptance import acceptance_lengths, draft_statistics
from .dataloader import StepBatches, passes, validation_batches
from .fsdp_units import gradient_square, resharded, scale_gradient, whole_weights
from .load_sharded import fail_on_all_ranks, load_sharded_backbone
from .loss_terms import parse
from .losses import LinearDistillation
from .packing import Packed
from .sharding import make_mesh, shard_step_model
from .teacher import Teacher, TeacherStates, last_layer_arguments
from .teacher_cache import CachedTeacher

FIGURES = ("loss", "overlap", "match", "expected_acceptance_length", "greedy_acceptance_length")


class Stopwatch:
    """Adds up the time of `with` blocks; on a GPU by events, so that nothing waits until `take`."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    def take(self) -> float:
        """Seconds since the last take. On a GPU, waits for the work."""
        if self.events:
            torch.cuda.synchronize()
            self.seconds += sum(a.elapsed_time(b) for a, b in self.events) / 1000
            self.events.clear()
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class StepModel(nn.Module):
    """The FSDP2 root: its forward is the whole step, so that every unit is gathered and freed by one root."""

    def __init__(self, backbone: nn.Module, exit_layers: list[int], heads: list[nn.Module], config: Config):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({f"exit-{n}": head for n, head in zip(exit_layers, heads, strict=True)})
        self.terms = parse(config.distill.loss)
        self.temperature, self.chunk = config.distill.temperature, config.distill.loss_chunk
        self.teacher_clock = Stopwatch(next(heads[0].parameters()).device)
        # Of a cached teacher no layer is needed.
        self.teacher = Teacher(backbone, exit_layers) if config.distill.teacher == "online" else None

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
        """losses_H of the masked rows, each summed and times `scale`; or their `draft_statistics` and places.

        H are the `heads` named, default all; the others are not run at all.
        `teacher_states`: hidden states of these sequences from an earlier pass; without it, the teacher runs.
        """
        with torch.no_grad(), self.teacher_clock:
            if teacher_states is None:
                assert self.teacher is not None
                teacher_states, arguments = self.teacher(ids_BT, positions_BT)
            else:
                arguments = last_layer_arguments(self.backbone, teacher_states[0], positions_BT)
        final_BTD, hidden = teacher_states
        index_R = mask_BT.flatten().nonzero().squeeze(1)
        teacher_RD = final_BTD.flatten(0, 1)[index_R]
        students_RD = [self._draft(head, hidden[n], arguments, index_R) for n, head in self._numbered(heads)]
        lm_head = self.backbone.lm_head
        lm_head.unshard()  # type: ignore[operator]  # once, for teacher and every head, and freed before backward
        try:
            if statistics:
                return draft_statistics(lm_head.weight, teacher_RD, students_RD, self.chunk), index_R
            return LinearDistillation.apply(
                lm_head.weight, teacher_RD, self.terms, scale, self.temperature, self.chunk, self.teacher_clock,
                *students_RD,
            )  # fmt: skip
        finally:
            lm_head.reshard()  # type: ignore[operator]

    def train(self, mode: bool = True) -> "StepModel":
        super().train(mode)
        self.backbone.eval()
        return self

    def _numbered(self, names: Sequence[str] | None) -> Iterator[tuple[int, nn.Module]]:
        for name in self.heads if names is None else names:
            yield int(name.removeprefix("exit-")), self.heads[name]

    def _draft(self, head: nn.Module, hidden_BTD: Tensor, arguments: dict[str, Any], index_R: Tensor) -> Tensor:
        """The head's final hidden states of the rows that count: [R, D], in the backbone's dtype."""
        out = head(hidden_BTD, **arguments)
        out_BTD = out[0] if isinstance(out, tuple) else out
        # Normalising only these rows, after the layer, leaves out most of the work when prompts are long.
        return self.backbone.model.norm(out_BTD.flatten(0, 1)[index_R])  # type: ignore[operator,union-attr]


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Of the step that follows `step` finished ones: linear warm-up, then a cosine down to a tenth."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Distillation(lightning.LightningModule):
    """Distils a frozen backbone into its exit heads.

    Heads share the teacher's pass and nothing else: each has its own loss, gradient clipping, best step and end, so
    that training several gives what training each alone gives.
    """

    strict_loading = False  # checkpoints hold the heads only

    def __init__(
        self,
        config: Config,
        fingerprint: str,
        train: Packed,
        validation: Packed,
        cached_teacher: CachedTeacher | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False  # a Lightning batch is an optimizer step, of one pass or several
        self.config, self.fingerprint = config, fingerprint
        self.packed_train, self.packed_validation = train, validation
        self.cached_teacher = cached_teacher
        """With distill.teacher=cached: what the teacher says of any sequence."""
        self.names = [f"exit-{n}" for n in config.distill.exit_layers]
        self.step_model: StepModel | None = None
        self.losses: dict[str, float] = {}
        """Mean loss of each head that learns over the rows of the last step, all processes."""
        self.grad_norms: dict[str, float] = {}
        """Of each head that learns at the last step, before clipping."""
        self.step_rows = self.step_tokens = 0
        """Rows and tokens of the last step, all processes."""
        self.best: dict[str, dict[str, Any]] = {}
        """Of each head: step and figures of its best validation, how many it has `waited` since for a better one,
        and, on process 0 only, its whole weights then."""
        self.first: dict[str, dict[str, float]] = {}
        """Figures of each head before training."""
        self.validated_step = -1
        self._restore: dict[str, Any] | None = None

    @property
    def learning(self) -> list[str]:
        """The heads that have not stopped: those whose last longer acceptance is less than `patience` validations ago.

        The same on every process, as the figures are.
        """
        patience = self.config.distill.patience
        return [n for n in self.names if not patience or n not in self.best or self.best[n]["waited"] < patience]

    @property
    def finished(self) -> bool:
        return self.global_step >= self.config.distill.max_steps or not self.learning

    # ---- assembly

    def setup(self, stage: str) -> None:
        if self.cached_teacher is not None:
            with fail_on_all_ranks():
                self.cached_teacher.check(self.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        if self.step_model is not None:
            return
        c = self.config
        mesh = make_mesh(self.device.type, self.trainer.world_size, c.machine.shard_degree)
        backbone, heads = load_sharded_backbone(
            c.backbone,
            self.device,
            mesh,
            self.fingerprint,
            c.distill.exit_layers,
            c.distill.init,
            c.seed,
            layers=c.distill.teacher == "online",
        )
        self.step_model = StepModel(backbone, c.distill.exit_layers, heads, c)
        shard_step_model(self.step_model, heads, mesh)

    def configure_optimizers(self) -> Any:
        assert self.step_model is not None
        d = self.config.distill
        groups = [{"params": list(head.parameters())} for head in self.step_model.heads.values()]
        return torch.optim.AdamW(
            groups, lr=d.learning_rate, betas=(0.9, 0.95), weight_decay=d.weight_decay, foreach=True
        )

    def train_dataloader(self) -> DataLoader:
        d = self.config.distill
        self.batches = StepBatches(
            len(self.packed_train), d.sequences_per_step, d.max_steps, self.config.seed,
            self.global_rank, self.trainer.world_size, start_step=self.global_step,
        )  # fmt: skip
        return DataLoader(self.packed_train, sampler=self.batches, batch_size=None, num_workers=0)

    # ---- the step

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Passes of at most distill.sequences_per_pass sequences, whose gradients add up, then one optimizer step."""
        assert self.step_model is not None
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        names, world = self.learning, self.trainer.world_size
        sequences = self.batches.of_all_ranks(self.global_step)
        self.step_rows = int(self.packed_train.rows_S[sequences].sum())
        self.step_tokens = int(self.packed_train.lengths_S[sequences].sum())
        # FSDP averages gradients over processes, which may hold unequal numbers of rows.
        scale = world / self.step_rows
        losses_H = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        with resharded(self.step_model):
            for part in passes(batch, self._sequences_per_pass()):
                inputs = (part["ids_BT"], part["positions_BT"], part["mask_BT"])
                part_H = self.step_model(*inputs, scale, teacher_states=self._teacher_states(part), heads=names)
                self.manual_backward(part_H.sum())
                losses_H += part_H.detach().double() / world
        self._clip(names, losses_H)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(self.global_step)
        optimizer.step()

    def _clip(self, names: list[str], losses_H: Tensor) -> None:
        """Clips each head's gradient by itself; losses and norms of all heads are one sum over the processes."""
        heads = [self.step_model.heads[name] for name in names]  # type: ignore[union-attr]
        squares_H = torch.stack([gradient_square(head) for head in heads])
        losses, squares = self._sum(torch.stack([losses_H, squares_H])).tolist()
        self.losses = dict(zip(names, losses, strict=True))
        self.grad_norms = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}
        for head, norm in zip(heads, self.grad_norms.values(), strict=True):
            # As torch.nn.utils.clip_grad_norm_ does, which would ask the other processes once for each head.
            scale_gradient(head, min(1.0, self.config.distill.clip_norm / (norm + 1e-6)))

    def learning_rate(self, step: int) -> float:
        d = self.config.distill
        return learning_rate_at(step, d.learning_rate, d.warmup_steps, d.max_steps)

    def _sequences_per_pass(self) -> int:
        """Of this process."""
        d = self.config.distill
        share = d.sequences_per_step // self.trainer.world_size
        return min(share, d.sequences_per_pass or share)

    def _teacher_states(self, batch: dict[str, Tensor]) -> TeacherStates | None:
        return None if self.cached_teacher is None else self.cached_teacher(batch["sequences_B"].tolist(), self.device)

    def train_figures(self) -> dict[str, float]:
        """What the last step is logged with."""
        figures = {f"train/{name}/loss": loss for name, loss in self.losses.items()}
        figures |= {f"train/{name}/grad_norm": norm for name, norm in self.grad_norms.items()}
        return figures | {"learning_rate": self.learning_rate(self.global_step - 1)}

    # ---- validation: a pure function of the weights, outside Lightning's loop, which would shift it after a resume

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Figures on the held-out responses of every head that learns; keeps the weights of those never better."""
        assert self.step_model is not None
        packed, names = self.packed_validation, self.learning
        sums = torch.zeros(len(FIGURES), len(names), dtype=torch.float64, device=self.device)
        batches = validation_batches(len(packed), self._sequences_per_pass(), self.global_rank, self.trainer.world_size)
        with self._evaluating():
            for indices in batches:
                batch = {name: value.to(self.device) for name, value in packed[indices].items()}
                inputs = (batch["ids_BT"], batch["positions_BT"], batch["mask_BT"])
                states = self._teacher_states(batch)
                found, index_R = self.step_model(*inputs, statistics=True, teacher_states=states, heads=names)
                found["expected_acceptance_length"] = acceptance_lengths(found["overlap"], index_R)
                found["greedy_acceptance_length"] = acceptance_lengths(found["match"], index_R)
                sums += torch.stack([found[name].double().sum(-1) for name in FIGURES])
        means = (self._sum(sums) / packed.rows_S.sum().item()).cpu()
        logged: dict[str, float] = {}
        for h, name in enumerate(names):
            figures = {figure: means[f, h].item() for f, figure in enumerate(FIGURES)}
            logged |= {f"val/{name}/{figure}": value for figure, value in figures.items()}
            self._compare_with_best(name, step, figures)
        self.validated_step = step
        return logged

    def _compare_with_best(self, name: str, step: int, figures: dict[str, float]) -> None:
        assert self.step_model is not None
        self.first.setdefault(name, figures)
        key = "expected_acceptance_length"
        if name in self.best and not figures[key] > self.best[name]["figures"][key]:
            self.best[name]["waited"] += 1
            return
        weights = whole_weights(self.step_model.heads[name])
        self.best[name] = {"step": step, "figures": figures, "weights": weights, "waited": 0}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        assert self.step_model is not None
        self.step_model.eval()
        try:
            with resharded(self.step_model):
                yield
        finally:
            self.step_model.train()

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        if self.trainer.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    # ---- state: heads, optimizer, random generators and best weights; never the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        for name in [n for n in state if ".backbone." in n]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mine = random_state()
        states: list[Any] = [mine] * self.trainer.world_size
        if self.trainer.world_size > 1:
            dist.all_gather_object(states, mine)
        checkpoint["random"] = states
        checkpoint["best"], checkpoint["first"] = self.best, self.first
        checkpoint["validated_step"] = self.validated_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.first, self.validated_step = checkpoint["first"], checkpoint["validated_step"]
        for name, best in checkpoint["best"].items():
            kept = best["weights"] if self.global_rank == 0 else {}
            # Cloned, as the file is only mapped into memory, and will be removed.
            self.best[name] = best | {"weights": {n: w.clone() for n, w in kept.items()}}
        states = checkpoint["random"]
        self._restore = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def on_train_start(self) -> None:
        if self._restore is not None:
            set_random_state(self._restore)
        else:  # fresh, or with another number of processes than before
            seed_everything(self.config.seed + 1009 * self.global_rank + self.global_step)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """State of this process's generators, in types that torch.load(weights_only=True) takes."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
