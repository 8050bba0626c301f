"""How exit heads are trained: the Lightning module of one run.

`Distillation` takes packed sequences and does the optimizer steps, the validations and the checkpoints' contents, so
that a resumed run ends with the same bits. The forward pass of a step is in step_model.py; what happens around the
steps (logging, saving, signals) is in callbacks.py.

Letters: B sequences, T tokens of a sequence, R rows (positions that predict a response token), H heads that learn,
W tokens of the draft vocabulary.
"""

import math
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import Config
from ..errors import UserError
from ..inference.exit_head import LAYER, HeadSpec
from .acceptance import acceptance_lengths
from .checkpoints import FORMAT
from .dataloader import StepBatches, passes, validation_batches
from .fsdp_units import gradient_square, resharded, scale_gradient, whole_weights
from .load_sharded import fail_on_all_ranks, load_sharded_backbone
from .packing import Packed
from .random_state import random_state, seed_everything, set_random_state
from .sharding import make_mesh, shard_step_model
from .step_model import StepModel
from .teacher import TeacherStates
from .teacher_cache import CachedTeacher

FIGURES = ("loss", "overlap", "match", "expected_acceptance_length", "greedy_acceptance_length")
"""What a validation measures of each head: means over the rows of the held-out responses."""
LOST = "lost_mass"
"""Measured too if there is a draft vocabulary."""

MAX_SKIPPED_IN_ROW = 5
"""Training stops when a head has had so many steps in a row without a finite loss and gradient."""


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of the step after `step` finished ones: linear warm-up, then a cosine down to a tenth."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Distillation(lightning.LightningModule):
    """Distils a frozen backbone into its exit heads.

    Heads share the teacher's pass and nothing else: each has its own loss, gradient clipping, skipped steps, best step
    and end, so that training several heads at once gives the same heads as training each alone.
    """

    strict_loading = False  # checkpoints hold the heads only

    def __init__(
        self,
        config: Config,
        fingerprint: str,
        train: Packed,
        validation: Packed,
        cached_teacher: CachedTeacher | None = None,
        draft_ids_W: Tensor | None = None,
        spec: HeadSpec = LAYER,
    ):
        super().__init__()
        self.automatic_optimization = False  # a Lightning batch is an optimizer step, of one pass or several
        self.config, self.fingerprint = config, fingerprint
        self.packed_train, self.packed_validation = train, validation
        self.cached_teacher = cached_teacher
        """The teacher's hidden states of any sequence; only with distill.teacher=cached."""
        self.draft_ids_W = draft_ids_W
        """The tokens that the heads shall draft; None: all."""
        self.spec = spec
        """What kind of layer the heads are."""
        self.names = [f"exit-{n}" for n in config.distill.exit_layers]
        self.step_model: StepModel | None = None
        self.losses: dict[str, float] = {}
        """Mean loss over the rows of the last step, on all processes, of each head that learns."""
        self.grad_norms: dict[str, float] = {}
        """Gradient norm at the last step, before clipping, of each head that learns."""
        self.skipped = dict.fromkeys(self.names, 0)
        """Steps that each head has skipped because its loss or gradient was not finite."""
        self.skipped_in_row = dict.fromkeys(self.names, 0)
        """The same, since the last step that the head did not skip."""
        self.step_rows = self.step_tokens = 0
        """Rows and tokens of the last step, on all processes."""
        self.best: dict[str, dict[str, Any]] = {}
        """Head -> step and figures of its best validation, the number of validations since (`waited`) and, on process
        0 only, its weights at that step."""
        self.first: dict[str, dict[str, float]] = {}
        """Head -> its figures before training."""
        self.validated_step = -1
        self._restore: dict[str, Any] | None = None

    @property
    def learning(self) -> list[str]:
        """Names of the heads that have not stopped: a head stops when distill.patience validations in a row were no
        better than its best. All processes have the same figures, so they get the same names."""
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
            self.spec,
            layers=c.distill.teacher == "online",
        )
        ids_W = None if self.draft_ids_W is None else self.draft_ids_W.to(self.device)
        self.step_model = StepModel(backbone, c.distill.exit_layers, heads, c, ids_W)
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
        self._clip_or_skip(names, losses_H)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(self.global_step)
        optimizer.step()

    def _clip_or_skip(self, names: list[str], losses_H: Tensor) -> None:
        """Clips the gradient of each head by its own norm; drops it if norm or loss is not finite.

        AdamW passes over parameters without a gradient: weights, moments, step counts and weight decay of a head that
        skips the step stay as they are. Losses and norms of all heads are one sum over the processes, so every process
        decides alike without asking the others again.
        """
        heads = [self.step_model.heads[name] for name in names]  # type: ignore[union-attr]
        squares_H = torch.stack([gradient_square(head) for head in heads])
        losses, squares = self._sum(torch.stack([losses_H, squares_H])).tolist()
        self.losses = dict(zip(names, losses, strict=True))
        self.grad_norms = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}
        for name, head in zip(names, heads, strict=True):
            loss, norm = self.losses[name], self.grad_norms[name]
            if math.isfinite(loss) and math.isfinite(norm):
                # The same factor as torch.nn.utils.clip_grad_norm_, which would need a collective for each head.
                scale_gradient(head, min(1.0, self.config.distill.clip_norm / (norm + 1e-6)))
                self.skipped_in_row[name] = 0
            else:
                head.zero_grad()
                self.skipped[name] += 1
                self.skipped_in_row[name] += 1
                self._stop_if_stuck(name)

    def _stop_if_stuck(self, name: str) -> None:
        """Raises UserError, on every process alike, when the head has skipped too many steps in a row."""
        count, step = self.skipped_in_row[name], self.global_step + 1
        if count < min(MAX_SKIPPED_IN_ROW, self.config.distill.max_steps):
            return
        raise UserError(
            f"{name}: no finite loss and gradient in {count} steps in a row, the last of them step {step} (loss "
            f"{self.losses[name]:g}, gradient norm {self.grad_norms[name]:g}); {self._likely_causes()}"
        )

    def _likely_causes(self) -> str:
        rate, backbone = self.config.distill.learning_rate, self.config.backbone
        overflow = "" if backbone.dtype == "float32" else f"overflow in backbone.dtype={backbone.dtype} (try float32), "
        return (
            f"likely causes: distill.learning_rate={rate:g} is too high (give a lower one and --redo distill), "
            f"{overflow}or broken weights in backbone.name_or_path={backbone.name_or_path} (fetch it again)"
        )

    def learning_rate(self, step: int) -> float:
        d = self.config.distill
        return learning_rate_at(step, d.learning_rate, d.warmup_steps, d.max_steps)

    def _sequences_per_pass(self) -> int:
        """How many sequences this process takes in one forward pass."""
        d = self.config.distill
        share = d.sequences_per_step // self.trainer.world_size
        return min(share, d.sequences_per_pass or share)

    def _teacher_states(self, batch: dict[str, Tensor]) -> TeacherStates | None:
        return None if self.cached_teacher is None else self.cached_teacher(batch["sequences_B"].tolist(), self.device)

    def train_figures(self) -> dict[str, float]:
        """The figures of the last step that are logged."""
        figures = {f"train/{name}/loss": loss for name, loss in self.losses.items()}
        figures |= {f"train/{name}/grad_norm": norm for name, norm in self.grad_norms.items()}
        figures |= {f"train/{name}/skipped_steps": self.skipped[name] for name in self.losses}
        return figures | {"learning_rate": self.learning_rate(self.global_step - 1)}

    # ---- validation: not by Lightning's loop, which would validate at other steps after a resume

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Figures of every head that learns on the held-out responses; keeps the weights of each that is best so far.

        A pure function of the weights. Raises UserError if the figures before training are not finite.
        """
        assert self.step_model is not None
        packed, names = self.packed_validation, self.learning
        measured = FIGURES if self.draft_ids_W is None else (*FIGURES, LOST)
        sums = torch.zeros(len(measured), len(names), dtype=torch.float64, device=self.device)
        batches = validation_batches(len(packed), self._sequences_per_pass(), self.global_rank, self.trainer.world_size)
        with resharded(self.step_model):
            for indices in batches:
                batch = {name: value.to(self.device) for name, value in packed[indices].items()}
                inputs = (batch["ids_BT"], batch["positions_BT"], batch["mask_BT"])
                states = self._teacher_states(batch)
                found, index_R = self.step_model(*inputs, statistics=True, teacher_states=states, heads=names)
                found["expected_acceptance_length"] = acceptance_lengths(found["overlap"], index_R)
                found["greedy_acceptance_length"] = acceptance_lengths(found["match"], index_R)
                sums += torch.stack([found[name].double().sum(-1) for name in measured])
        means = (self._sum(sums) / packed.rows_S.sum().item()).cpu()
        logged: dict[str, float] = {}
        for h, name in enumerate(names):
            figures = {figure: means[f, h].item() for f, figure in enumerate(measured)}
            logged |= {f"val/{name}/{figure}": value for figure, value in figures.items()}
            self._compare_with_best(name, step, figures)
        self.validated_step = step
        return logged

    def _compare_with_best(self, name: str, step: int, figures: dict[str, float]) -> None:
        assert self.step_model is not None
        if name not in self.first and not all(map(math.isfinite, figures.values())):
            found = ", ".join(f"{figure} {value:g}" for figure, value in figures.items())
            backbone = self.config.backbone
            raise UserError(
                f"{name}: figures before training are not finite ({found}): the weights of "
                f"backbone.name_or_path={backbone.name_or_path} are broken (fetch it again), or numbers overflow in "
                f"backbone.dtype={backbone.dtype} (try float32)"
            )
        self.first.setdefault(name, figures)
        key = "expected_acceptance_length"
        if name in self.best and not figures[key] > self.best[name]["figures"][key]:  # nan is not better either
            self.best[name]["waited"] += 1
            return
        weights = whole_weights(self.step_model.heads[name])
        self.best[name] = {"step": step, "figures": figures, "weights": weights, "waited": 0}

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
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
        checkpoint["format"], checkpoint["random"] = FORMAT, states
        checkpoint["best"], checkpoint["first"] = self.best, self.first
        checkpoint["validated_step"] = self.validated_step
        checkpoint["skipped"], checkpoint["skipped_in_row"] = self.skipped, self.skipped_in_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.first, self.validated_step = checkpoint["first"], checkpoint["validated_step"]
        self.skipped, self.skipped_in_row = checkpoint["skipped"], checkpoint["skipped_in_row"]
        for name, best in checkpoint["best"].items():
            kept = best["weights"] if self.global_rank == 0 else {}
            # Cloned, because the file is only mapped into memory and will be removed.
            self.best[name] = best | {"weights": {n: w.clone() for n, w in kept.items()}}
        states = checkpoint["random"]
        self._restore = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def on_train_start(self) -> None:
        if self._restore is not None:
            set_random_state(self._restore)
        else:  # fresh, or with another number of processes than before
            seed_everything(self.config.seed + 1009 * self.global_rank + self.global_step)
