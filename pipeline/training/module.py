"""One training step: teacher and heads in a single forward pass, one optimizer over all heads.

Takes packed batches, gives losses, validation figures and a state that resumes exactly. Knows nothing of files,
processes' launching or logging.

Letters: B sequences, T tokens of a sequence, R rows (positions that predict a response token), D hidden size,
V vocabulary, H heads.
"""

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..config import Config
from .data import Packed, StepBatches, validation_batches
from .loading import load_sharded_backbone
from .losses import LinearDistillation, acceptance_lengths, draft_statistics
from .sharding import full_weights, make_mesh, number, shard_engine
from .terms import parse

FIGURES = ("loss", "overlap", "match", "expected_acceptance_length", "greedy_acceptance_length")


Taught = tuple[Tensor, dict[int, Tensor]]
"""final_BTD, and the hidden state [B, T, D] after each exit layer N."""


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


class Engine(nn.Module):
    """The FSDP2 root: its forward is the whole step, so that every unit is gathered and freed by one root."""

    def __init__(self, backbone: nn.Module, exit_layers: list[int], heads: list[nn.Module], config: Config):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({f"exit-{n}": head for n, head in zip(exit_layers, heads, strict=True)})
        self.terms = parse(config.distill.loss)
        self.temperature, self.chunk = config.distill.temperature, config.distill.loss_chunk
        self.teacher_clock = Stopwatch(next(heads[0].parameters()).device)
        self._seen: dict[Any, Any] = {}
        layers = backbone.model.layers  # type: ignore[union-attr]
        for n in exit_layers:
            # A hook keeps one hidden state; output_hidden_states=True would keep all L.
            layers[n - 1].register_forward_hook(self._keep_output(n))
        for layer in layers:
            layer.register_forward_pre_hook(self._additive_mask, with_kwargs=True)
        # The exit layer has the last layer's index, so it wants what the last layer gets: mask and rotary angles.
        layers[-1].register_forward_pre_hook(self._keep_arguments, with_kwargs=True)

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask_BT: Tensor,
        scale: float = 1.0,
        statistics: bool = False,
        taught: "Taught | None" = None,
        teach_only: bool = False,
    ) -> Any:
        """losses_H of the masked rows, each summed and times `scale`; or their `draft_statistics` and places.

        `taught` is what an earlier call with `teach_only` returned for the same sequences: the backbone rests then.
        """
        with torch.no_grad(), self.teacher_clock:
            if taught is None:
                final_BTD = self.backbone.model(  # type: ignore[operator,union-attr]
                    input_ids=ids_BT, position_ids=positions_BT, use_cache=False
                ).last_hidden_state
                seen, self._seen = self._seen, {}
            else:
                final_BTD, hidden = taught
                seen = {**hidden, "arguments": last_layer_arguments(self.backbone, final_BTD, positions_BT)}
        if teach_only:
            return final_BTD, {n: seen[n] for n, _ in self._numbered()}
        index_R = mask_BT.flatten().nonzero().squeeze(1)
        teacher_RD = final_BTD.flatten(0, 1)[index_R]
        students_RD = [self._draft(head, seen[n], seen["arguments"], index_R) for n, head in self._numbered()]
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

    def train(self, mode: bool = True) -> "Engine":
        super().train(mode)
        self.backbone.eval()
        return self

    def _numbered(self) -> Iterator[tuple[int, nn.Module]]:
        for name, head in self.heads.items():
            yield int(name.removeprefix("exit-")), head

    def _draft(self, head: nn.Module, hidden_BTD: Tensor, arguments: dict[str, Any], index_R: Tensor) -> Tensor:
        """The head's final hidden states of the rows that count: [R, D], in the backbone's dtype."""
        out = head(hidden_BTD, **arguments)
        out_BTD = out[0] if isinstance(out, tuple) else out
        # Normalising only these rows, after the layer, leaves out most of the work when prompts are long.
        return self.backbone.model.norm(out_BTD.flatten(0, 1)[index_R])  # type: ignore[operator,union-attr]

    def _keep_output(self, n: int):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[n] = output[0] if isinstance(output, tuple) else output

        return hook

    def _additive_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """On a CPU, attention turns a boolean mask into numbers to add, in every layer: do it once a pass."""
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype != torch.bool or mask.is_cuda:
            return None
        masks = self._seen.setdefault("masks", {})
        if id(mask) not in masks:  # one, or two where some layers have a sliding window; kept, so that ids stay apart
            added = torch.zeros(mask.shape, dtype=args[0].dtype).masked_fill_(~mask, float("-inf"))
            masks[id(mask)] = (mask, added)
        return args, kwargs | {"attention_mask": masks[id(mask)][1]}

    def _keep_arguments(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._seen["arguments"] = kwargs


def last_layer_arguments(backbone: Any, hidden_BTD: Tensor, positions_BT: Tensor) -> dict[str, Any]:
    """Attention mask and rotary angles as the backbone's last layer would get them, without running the backbone."""
    config = backbone.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = kinds[-1] == "sliding_attention" if kinds else config.model_type == "mistral" and window is not None
    make = create_sliding_window_causal_mask if slides else create_causal_mask
    mask = make(
        config=config, inputs_embeds=hidden_BTD, attention_mask=None, past_key_values=None, position_ids=positions_BT
    )
    angles = backbone.model.rotary_emb(hidden_BTD, positions_BT)
    return {"attention_mask": mask, "position_ids": positions_BT, "position_embeddings": angles}


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Of the step that follows `step` finished ones: linear warm-up, then a cosine down to a tenth."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Distillation(lightning.LightningModule):
    """Distils a frozen backbone into its exit heads.

    Heads share the teacher's pass and nothing else: each has its own loss, gradient clipping and best step, so that
    training several gives what training each alone gives.
    """

    strict_loading = False  # checkpoints hold the heads only

    def __init__(self, config: Config, fingerprint: str, train: Packed, validation: Packed):
        super().__init__()
        self.config, self.fingerprint = config, fingerprint
        self.packed_train, self.packed_validation = train, validation
        self.names = [f"exit-{n}" for n in config.distill.exit_layers]
        self.engine: Engine | None = None
        self.step_losses_H = torch.zeros(len(self.names))
        """Mean loss of each head over the rows of the last step, all processes."""
        self.step_rows = self.step_tokens = 0
        """Rows and tokens of the last step, all processes."""
        self.grad_norms: dict[str, float] = {}
        """Of each head at the last step, before clipping."""
        self.best: dict[str, dict[str, Any]] = {}
        """Of each head: step, figures and whole weights of its best validation."""
        self.first: dict[str, dict[str, float]] = {}
        """Figures of each head before training."""
        self.validated_step = -1
        self._restore: dict[str, Any] | None = None
        self.taught: Taught | None = None
        """With distill.teacher=cached: the teacher's hidden states of all sequences, on the host."""

    # ---- assembly

    def configure_model(self) -> None:
        if self.engine is not None:
            return
        c = self.config
        mesh = make_mesh(self.device.type, self.trainer.world_size, c.machine.shard_degree)
        backbone, heads = load_sharded_backbone(
            c.backbone, self.device, mesh, self.fingerprint, c.distill.exit_layers, c.distill.init, c.seed
        )
        self.engine = Engine(backbone, c.distill.exit_layers, heads, c)
        shard_engine(self.engine, heads, mesh)

    def configure_optimizers(self) -> Any:
        assert self.engine is not None
        d = self.config.distill
        groups = [{"params": list(head.parameters())} for head in self.engine.heads.values()]
        optimizer = torch.optim.AdamW(
            groups, lr=d.learning_rate, betas=(0.9, 0.95), weight_decay=d.weight_decay, foreach=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_at(step, 1.0, d.warmup_steps, d.max_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        d = self.config.distill
        batches = StepBatches(
            len(self.packed_train), d.sequences_per_step, d.max_steps, self.config.seed,
            self.global_rank, self.trainer.world_size, start_step=self.global_step,
        )  # fmt: skip
        return DataLoader(self.packed_train, sampler=batches, batch_size=None, num_workers=0)

    # ---- the step

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        assert self.engine is not None
        counts = self._sum(torch.stack([batch["mask_BT"].sum(), batch["tokens"]]))
        self.step_rows, self.step_tokens = (int(n) for n in counts.tolist())
        # FSDP averages gradients over processes, which may hold unequal numbers of rows.
        scale = self.trainer.world_size / self.step_rows
        taught = None if self.taught is None else self._lesson(batch["sequences_B"])
        losses_H = self.engine(batch["ids_BT"], batch["positions_BT"], batch["mask_BT"], scale, taught=taught)
        self.step_losses_H = self._sum(losses_H.detach().clone()) / self.trainer.world_size
        return losses_H.sum()

    @torch.no_grad()
    def _teach_all(self) -> Taught:
        """One teacher pass over every packed sequence, in their order, so that a resume finds the same numbers."""
        assert self.engine is not None
        packed, size = self.packed_train, self.config.distill.sequences_per_step
        finals, hiddens = [], []
        for start in range(0, len(packed), size):
            batch = packed[range(start, min(start + size, len(packed)))]
            inputs = (batch[name].to(self.device) for name in ("ids_BT", "positions_BT", "mask_BT"))
            final_BTD, hidden = self.engine(*inputs, teach_only=True)
            finals.append(final_BTD.cpu())
            hiddens.append({n: h.cpu() for n, h in hidden.items()})
        return torch.cat(finals), {n: torch.cat([h[n] for h in hiddens]) for n in hiddens[0]}

    def _lesson(self, sequences_B: Tensor) -> Taught:
        assert self.taught is not None
        final_STD, hidden = self.taught
        chosen_B = sequences_B.cpu()
        return final_STD[chosen_B].to(self.device), {n: h[chosen_B].to(self.device) for n, h in hidden.items()}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        assert self.engine is not None
        for name, head in self.engine.heads.items():
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), self.config.distill.clip_norm)
            self.grad_norms[name] = number(norm)

    def train_figures(self) -> dict[str, float]:
        """What the last step is logged with."""
        d = self.config.distill
        figures = dict(zip((f"train/{n}/loss" for n in self.names), self.step_losses_H.tolist(), strict=True))
        figures |= {f"train/{name}/grad_norm": norm for name, norm in self.grad_norms.items()}
        rate = learning_rate_at(self.global_step - 1, d.learning_rate, d.warmup_steps, d.max_steps)
        return figures | {"learning_rate": rate}

    # ---- validation: a pure function of the weights, outside Lightning's loop, which would shift it after a resume

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Figures of every head on the held-out responses; keeps the weights of heads that were never better."""
        assert self.engine is not None
        packed, world = self.packed_validation, self.trainer.world_size
        sums = torch.zeros(len(FIGURES), len(self.names), dtype=torch.float64, device=self.device)
        rows = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._evaluating():
            for indices in validation_batches(
                len(packed), self.config.distill.sequences_per_step, self.global_rank, world
            ):
                batch = {name: value.to(self.device) for name, value in packed[indices].items()}
                found, index_R = self.engine(batch["ids_BT"], batch["positions_BT"], batch["mask_BT"], statistics=True)
                found["expected_acceptance_length"] = acceptance_lengths(found["overlap"], index_R)
                found["greedy_acceptance_length"] = acceptance_lengths(found["match"], index_R)
                sums += torch.stack([found[name].double().sum(-1) for name in FIGURES])
                rows += len(index_R)
        means = (self._sum(sums) / self._sum(rows)).cpu()
        logged: dict[str, float] = {}
        for h, name in enumerate(self.names):
            figures = {figure: means[f, h].item() for f, figure in enumerate(FIGURES)}
            logged |= {f"val/{name}/{figure}": value for figure, value in figures.items()}
            self._keep_if_best(name, step, figures)
        self.validated_step = step
        return logged

    def _keep_if_best(self, name: str, step: int, figures: dict[str, float]) -> None:
        assert self.engine is not None
        self.first.setdefault(name, figures)
        key = "expected_acceptance_length"
        if name not in self.best or figures[key] > self.best[name]["figures"][key]:
            self.best[name] = {"step": step, "figures": figures, "weights": full_weights(self.engine.heads[name])}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        assert self.engine is not None
        self.engine.eval()
        yield
        self.engine.train()
        self.engine.teacher_clock.take()  # not part of any step

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
        for name, best in checkpoint["best"].items():  # the file is mapped, and will be removed
            self.best[name] = best | {"weights": {n: w.clone() for n, w in best["weights"].items()}}
        states = checkpoint["random"]
        self._restore = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def on_train_start(self) -> None:
        if self.config.distill.teacher == "cached":
            self.taught = self._teach_all()
            self.engine.teacher_clock.take()  # type: ignore[union-attr]  # not part of any step
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
