"""Which choices in training give the best exit head? Several heads learn side by side from one teacher's cache.

All heads see the same batches in the same order, so their figures differ by the choice alone. A head is named by its
exit layer N, followed by what differs from the config, with commas:

  2                  a plain head at layer 2, as the config says
  2,init=3           starts from the backbone's layer 3 (counted from 1; `last` is the default)
  3,init=FOLDER      starts from an exit head, and all heads have its draft vocabulary
  2,rate=1e-3        another peak learning rate
  2,loss=kl+0.5*tvd  other terms of the loss (pipeline/training/losses.py)
  2,W=2048           another draft vocabulary: the W tokens that the answers use most; 0 = all tokens
  2,learn=all        learns from the tokens of the prompts too; judged, as all others, on answers alone
  2,layers=2         two decoder layers instead of one, which start from the backbone's last two
  2,deep             a deep head: it also sees the backbone's final hidden state of an earlier token

A plain head reads h_N(t), the hidden state after layer N. A deep head reads h_N(t) + A h_L(t - j): A is a learned
matrix that starts at 0, and t - j is the last token whose final hidden state is known when token t + 1 is drafted.
That is j = 1 for the first draft of a round and one more for each further one. Training draws j per step.

Printed after every `--validate-every` steps, on the held-out answers: the greedy match (of the whole vocabulary; for
deep heads at each j), the overlap sum_v min(p, q), and the expected greedy acceptance length of a round of 4 drafts,
all at temperature 1 and over all rows. The keys and values of a deep head's earlier tokens are computed at the same j,
which a decoder would not do beyond the first draft, so its figures at j > 1 are estimates. Everything printed is a
count, so other work on the machine does not matter.

  python benchmarks/heads.py --config configs/smollm2-135m.yaml --heads 2 2,init=3 2,loss=ce

With `--save FOLDER` each layer's last-named plain head is written to FOLDER/heads/exit-N.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backbones.load import load_model
from pipeline.config import load
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.runs.folder import RunDir
from pipeline.stages.distill import draft_vocabulary, open_cached_teacher, read
from pipeline.training import packing
from pipeline.training.acceptance import draft_statistics
from pipeline.training.chunked_loss import LinearDistillation
from pipeline.training.dataloader import StepBatches, validation_batches
from pipeline.training.draft_vocabulary import ranked
from pipeline.training.launch import find_place
from pipeline.training.losses import parse
from pipeline.training.module import learning_rate_at
from pipeline.training.teacher import last_layer_arguments

DRAFTS = 4
NAMES = ("init", "rate", "loss", "W", "learn", "layers", "deep")


@dataclass(frozen=True)
class Choice:
    """What one head is trained with; `vocabulary` None is that of the config."""

    layer: int
    init: str
    rate: float
    loss: tuple[str, ...]
    vocabulary: int | None
    everything: bool
    layers: int
    deep: bool

    @classmethod
    def of(cls, text: str, rate: float, loss: Sequence[str]) -> "Choice":
        layer, *words = text.split(",")
        given = {name: value for name, _, value in (word.partition("=") for word in words)}
        unknown = set(given) - set(NAMES)
        if unknown:
            raise SystemExit(f"--heads {text}: unknown {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
        return cls(
            layer=int(layer),
            init=given.get("init", "last"),
            rate=float(given.get("rate", rate)),
            loss=tuple(given["loss"].split("+")) if "loss" in given else tuple(loss),
            vocabulary=int(given["W"]) if "W" in given else None,
            everything=given.get("learn") == "all",
            layers=int(given.get("layers", 1)),
            deep="deep" in given,
        )

    def given(self) -> ExitHead | None:
        """The exit head that it starts from, if any."""
        return None if self.init == "last" or self.init.isdecimal() else ExitHead.load(Path(self.init))


class Head(nn.Module):
    """An exit head; with `deep`, one that also sees the final hidden state of the token j places earlier."""

    def __init__(self, model: nn.Module, choice: Choice):
        super().__init__()
        self.layers = nn.ModuleList(new_exit_layer(model) for _ in range(choice.layers))
        width = model.config.hidden_size
        if given := choice.given():
            self.layers[0].load_state_dict(given.weights)
        else:
            last = model.config.num_hidden_layers if choice.init == "last" else int(choice.init)
            for layer, of in zip(self.layers, model.model.layers[last - choice.layers : last], strict=True):
                layer.load_state_dict(of.state_dict())
        self.deep = nn.Linear(width, width, bias=False) if choice.deep else None
        if self.deep is not None:
            nn.init.zeros_(self.deep.weight)

    def forward(self, hidden_BTD: Tensor, earlier_BTD: Tensor, arguments: dict) -> Tensor:
        if self.deep is not None:
            hidden_BTD = hidden_BTD + self.deep(earlier_BTD)
        for layer in self.layers:
            out = layer(hidden_BTD, **arguments)
            hidden_BTD = out[0] if isinstance(out, tuple) else out
        return hidden_BTD


def earlier(final_BTD: Tensor, positions_BT: Tensor, j: int) -> Tensor:
    """The final hidden state of the token j places earlier in the same document; 0 where there is none."""
    shifted_BTD = torch.zeros_like(final_BTD)
    shifted_BTD[:, j:] = final_BTD[:, :-j]
    return shifted_BTD * (positions_BT >= j).unsqueeze(-1)


def chain(match_JR: Tensor, index_R: Tensor) -> Tensor:
    """Expected length of a round that starts at each row, when draft i of a chain is accepted as match_JR[i] says."""
    rows = torch.arange(len(index_R))
    run_R, product_R, expected_R = index_R - rows, torch.ones(len(index_R)), torch.ones(len(index_R))
    for i in range(len(match_JR)):
        ahead_R, stays_R = torch.zeros(len(index_R)), torch.zeros(len(index_R))
        end = len(index_R) - i
        ahead_R[:end], stays_R[:end] = match_JR[i, i:], (run_R[i:] == run_R[:end]).float()
        product_R = product_R * ahead_R * stays_R
        expected_R = expected_R + product_R
    return expected_R


class Sweep:
    """The heads in training, the teacher that they share, and their figures on held-out answers."""

    def __init__(self, a: argparse.Namespace):
        layers = sorted({int(text.split(",")[0]) for text in a.heads})
        self.config = load(a.config, [*a.words, f"distill.exit_layers={layers}", f"distill.max_steps={a.steps}"])
        self.d, run, place = self.config.distill, RunDir(self.config), find_place(self.config.machine)
        torch.set_num_threads(self.config.machine.threads or torch.get_num_threads())
        manifest, self.train, self.validation, _ = read(run, place)
        self.everything_ST = packing.read_packed(run / "responses", replace(self.d, learn_from="all"))[1].mask_ST
        usual_W, _ = draft_vocabulary(self.config, place, self.train, self.validation)
        teacher = open_cached_teacher(run, manifest["backbone"], self.train, self.validation)
        if teacher is None:
            raise SystemExit(
                "distill.teacher=online: this script reads the teacher's cache; give distill.teacher=cached"
            )
        self.teacher = teacher
        torch.manual_seed(self.config.seed)
        self.model = load_model(self.config.backbone, "cpu")
        self.model.requires_grad_(False)
        self.choices = {text: Choice.of(text, self.d.learning_rate, self.d.loss) for text in a.heads}
        given = [head for choice in self.choices.values() if (head := choice.given())]
        self.check(given)
        self.heads = {text: Head(self.model, choice) for text, choice in self.choices.items()}
        ranked_V = ranked(self.train, self.model.config.vocab_size)
        if given:
            usual_W = given[0].draft_ids_W
        self.backbone = manifest["backbone"]
        self.ids_W: dict[int | None, Tensor | None] = {None: usual_W, 0: None}
        for choice in self.choices.values():
            size = choice.vocabulary
            if size:
                self.ids_W[size] = ranked_V[:size].sort().values
        self.groups: dict[tuple[tuple[str, ...], int | None, bool], list[str]] = {}  # heads that share rows and p
        for text, choice in self.choices.items():
            self.groups.setdefault((choice.loss, choice.vocabulary, choice.everything), []).append(text)
        self.lm_head = {
            size: self.model.lm_head.weight if ids_W is None else self.model.lm_head.weight[ids_W]
            for size, ids_W in self.ids_W.items()
        }

    def check(self, given: list[ExitHead]) -> None:
        """Ends the script for heads to start from that would be measured as something else than they are."""
        for head in given:
            head.check_fits(self.model)
        vocabularies = {None if h.draft_ids_W is None else tuple(h.draft_ids_W.tolist()) for h in given}
        if len(vocabularies) > 1:
            raise SystemExit("init=FOLDER: the heads have different draft vocabularies: measure them one by one")
        if any(head.spec.kind != "layer" for head in given) or any(
            choice.layers > 1 and choice.given() for choice in self.choices.values()
        ):
            raise SystemExit("init=FOLDER: only heads of one unchanged layer can be gone on with")

    def forward(self, batch: dict[str, Tensor], j: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Final hidden states of the teacher and of every head, before the norm, [B * T, D]."""
        final_BTD, hidden = self.teacher(batch["sequences_B"].tolist(), torch.device("cpu"))
        arguments = last_layer_arguments(self.model, self.model.model.layers[-1], final_BTD, batch["positions_BT"])
        seen_BTD = earlier(final_BTD, batch["positions_BT"], j)
        students = {
            text: head(hidden[self.choices[text].layer], seen_BTD, arguments).flatten(0, 1)
            for text, head in self.heads.items()
        }
        return final_BTD.flatten(0, 1), students

    def losses(self, batch: dict[str, Tensor], j: int) -> Tensor:
        """The sum of the heads' losses: they share no parameter, so each has its own gradient of it."""
        teacher_PD, students_PD = self.forward(batch, j)
        total = torch.zeros(())
        for (loss, size, everything), names in self.groups.items():
            mask_BT = self.everything_ST[batch["sequences_B"]] if everything else batch["mask_BT"]
            index_R = mask_BT.flatten().nonzero().squeeze(1)
            losses_H = LinearDistillation.apply(
                self.lm_head[size],
                teacher_PD[index_R],
                parse(loss),
                1 / len(index_R),
                self.d.temperature,
                self.d.loss_chunk,
                0.0,
                None,
                *(self.model.model.norm(students_PD[text][index_R]) for text in names),
            )
            total = total + losses_H.sum()
        return total

    def save(self, folder: Path) -> None:
        for text, choice in self.choices.items():
            if not choice.deep and choice.layers == 1:
                weights, ids_W = self.heads[text].layers[0].state_dict(), self.ids_W[choice.vocabulary]
                head = ExitHead(choice.layer, self.model.config.num_hidden_layers, self.backbone, weights, ids_W)
                head.save(folder / "heads" / f"exit-{choice.layer}")

    @torch.no_grad()
    def validate(self) -> dict[str, dict[str, float | list[float]]]:
        deep = any(choice.deep for choice in self.choices.values())
        match: dict[str, list[Tensor]] = {text: [] for text in self.heads}
        overlap: dict[str, list[Tensor]] = {text: [] for text in self.heads}
        length: dict[str, list[Tensor]] = {text: [] for text in self.heads}
        for numbers in validation_batches(len(self.validation), self.d.sequences_per_step, 0, 1):
            batch = self.validation[[n for n in numbers if n >= 0]]
            index_R = batch["mask_BT"].flatten().nonzero().squeeze(1)
            by_j: dict[str, list[Tensor]] = {text: [] for text in self.heads}
            for j in range(1, DRAFTS + 1 if deep else 2):
                teacher_PD, students_PD = self.forward(batch, j)
                for (_, size, _), names in self.groups.items():
                    figures = draft_statistics(
                        self.model.lm_head.weight,
                        teacher_PD[index_R],
                        [self.model.model.norm(students_PD[text][index_R]) for text in names],
                        self.d.loss_chunk,
                        self.ids_W[size],
                    )
                    for h, text in enumerate(names):
                        by_j[text].append(figures["match"][h])
                        if j == 1:
                            overlap[text].append(figures["overlap"][h])
            for text, found in by_j.items():
                match_JR = torch.stack(found if deep else found * DRAFTS)
                match[text].append(match_JR)
                length[text].append(chain(match_JR, index_R))
        return {
            text: {
                "match": [
                    round(value, 4) for value in torch.cat(match[text], -1).mean(-1)[: 4 if deep else 1].tolist()
                ],
                "overlap": round(torch.cat(overlap[text]).mean().item(), 4),
                "length": round(torch.cat(length[text]).mean().item(), 3),
            }
            for text in self.heads
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--heads", nargs="+", default=["2", "2,deep"], help="N[,NAME=VALUE...], as above")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="a file for the figures, one JSON line a validation")
    parser.add_argument("--save", type=Path, default=None, help="a folder for the heads")
    parser.add_argument("words", nargs="*", help="KEY=VALUE, as for exit-heads")
    a = parser.parse_args()
    sweep = Sweep(a)
    d, seed = sweep.d, sweep.config.seed
    parameters = {text: list(head.parameters()) for text, head in sweep.heads.items()}
    rates = [sweep.choices[text].rate for text in parameters]
    optimizer = torch.optim.AdamW(
        [{"params": one} for one in parameters.values()], betas=(0.9, 0.95), weight_decay=d.weight_decay
    )
    lengths = torch.Generator().manual_seed(seed)
    batches = StepBatches(len(sweep.train), d.sequences_per_step, a.steps, seed)
    for step, numbers in enumerate(itertools.islice(iter(batches), a.steps), start=1):
        j = int(torch.randint(1, DRAFTS + 1, (1,), generator=lengths))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate_at(step - 1, rate, d.warmup_steps, a.steps)
        optimizer.zero_grad()
        sweep.losses(sweep.train[numbers], j).backward()
        for one in parameters.values():
            nn.utils.clip_grad_norm_(one, d.clip_norm)
        optimizer.step()
        if step % a.validate_every == 0 or step == a.steps:
            found = sweep.validate()
            for text, figures in found.items():
                print(step, text, json.dumps(figures), flush=True)
            if a.out:
                with a.out.open("a") as file:
                    file.write(json.dumps({"step": step, **found}) + "\n")
    if a.save:
        sweep.save(a.save)


if __name__ == "__main__":
    main()
