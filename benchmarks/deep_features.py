"""Would an exit head draft better if it also saw the backbone's final hidden state of an earlier token?

A plain head reads h_N(t), the hidden state after layer N. A deep head reads h_N(t) + A h_L(t - j): A is a learned
matrix that starts at 0, and t - j is the last token whose final hidden state is known when token t + 1 is drafted.
That is j = 1 for the first draft of a round and one more for each further one. Training draws j per sequence.

The script takes a run folder with a teacher's cache and trains plain and deep heads on the same batches, with one
teacher. It prints, on the held-out answers, the greedy match at each j (of the whole vocabulary) and the expected
greedy acceptance length of a round of 4 drafts, whose draft i is judged at j = i. The keys and values of earlier
tokens are computed at the same j, which a decoder would not do beyond the first draft: the figures at j > 1 are
estimates. Everything printed is a count, so other work on the machine does not matter.

  python benchmarks/deep_features.py --run runs/smollm2-135m --config configs/smollm2-135m.yaml --steps 700
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backbones.load import load_model
from pipeline.config import load
from pipeline.inference.exit_head import new_exit_layer
from pipeline.runs.folder import RunDir
from pipeline.stages.distill import draft_vocabulary, open_cached_teacher, read
from pipeline.training.acceptance import draft_statistics
from pipeline.training.chunked_loss import LinearDistillation
from pipeline.training.dataloader import StepBatches, validation_batches
from pipeline.training.launch import find_place
from pipeline.training.module import learning_rate_at
from pipeline.training.teacher import last_layer_arguments

DRAFTS = 4


class Head(nn.Module):
    """An exit head; with `deep`, one that also sees the final hidden state of the token j places earlier."""

    def __init__(self, model: nn.Module, deep: bool):
        super().__init__()
        self.layer, width = new_exit_layer(model), model.config.hidden_size
        self.deep = nn.Linear(width, width, bias=False) if deep else None
        if self.deep is not None:
            nn.init.zeros_(self.deep.weight)

    def forward(self, hidden_BTD: Tensor, earlier_BTD: Tensor, arguments: dict) -> Tensor:
        if self.deep is not None:
            hidden_BTD = hidden_BTD + self.deep(earlier_BTD)
        out = self.layer(hidden_BTD, **arguments)
        return out[0] if isinstance(out, tuple) else out


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--heads", nargs="+", default=["2", "2+deep"], help="exit layers, `+deep` for a deep head")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="a file for the figures, one JSON line a validation")
    parser.add_argument("words", nargs="*", help="KEY=VALUE, as for exit-heads")
    a = parser.parse_args()
    layers = sorted({int(name.split("+")[0]) for name in a.heads})
    config = load(a.config, [*a.words, f"distill.exit_layers={layers}", f"distill.max_steps={a.steps}"])
    d, run, place = config.distill, RunDir(config), find_place(config.machine)
    torch.set_num_threads(config.machine.threads or torch.get_num_threads())
    manifest, train, validation, _ = read(run, place)
    ids_W, _ = draft_vocabulary(config, place, train, validation)
    teacher = open_cached_teacher(run, manifest["backbone"], train, validation)
    assert teacher is not None, "the script needs distill.teacher=cached"
    torch.manual_seed(config.seed)
    model = load_model(config.backbone, "cpu")
    model.requires_grad_(False)
    heads = {name: Head(model, name.endswith("+deep")) for name in a.heads}
    weights = [list(head.parameters()) for head in heads.values()]
    optimizer = torch.optim.AdamW(
        [{"params": one} for one in weights], lr=d.learning_rate, betas=(0.9, 0.95), weight_decay=d.weight_decay
    )
    lm_head_WD = model.lm_head.weight if ids_W is None else model.lm_head.weight[ids_W]
    cpu, lengths = torch.device("cpu"), torch.Generator().manual_seed(config.seed)

    def students(batch: dict[str, Tensor], j: int) -> tuple[Tensor, list[Tensor], Tensor]:
        final_BTD, hidden = teacher(batch["sequences_B"].tolist(), cpu)
        arguments = last_layer_arguments(model, final_BTD, batch["positions_BT"])
        index_R = batch["mask_BT"].flatten().nonzero().squeeze(1)
        seen_BTD = earlier(final_BTD, batch["positions_BT"], j)
        found = []
        for name, head in heads.items():
            out_BTD = head(hidden[int(name.split("+")[0])], seen_BTD, arguments)
            found.append(model.model.norm(out_BTD.flatten(0, 1)[index_R]))
        return final_BTD.flatten(0, 1)[index_R], found, index_R

    @torch.no_grad()
    def validate(step: int) -> None:
        match, rounds = [], []
        for numbers in validation_batches(len(validation), d.sequences_per_step, 0, 1):
            batch, found = validation[[n for n in numbers if n >= 0]], []
            for j in range(1, DRAFTS + 1):
                teacher_RD, students_RD, index_R = students(batch, j)
                figures = draft_statistics(model.lm_head.weight, teacher_RD, students_RD, d.loss_chunk, ids_W)
                found.append(figures["match"])
            match_JHR = torch.stack(found)
            match.append(match_JHR)
            rounds.append(torch.stack([chain(match_JHR[:, h], index_R) for h in range(len(heads))]))
        by_JH, length_H = torch.cat(match, -1).mean(-1), torch.cat(rounds, -1).mean(-1)
        line = {
            name: {
                "match": [round(by_JH[j, h].item(), 4) for j in range(DRAFTS)],
                "length": round(length_H[h].item(), 3),
            }
            for h, name in enumerate(heads)
        }
        print(step, json.dumps(line), flush=True)
        if a.out:
            with a.out.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")

    batches = StepBatches(len(train), d.sequences_per_step, a.steps, config.seed)
    for step, numbers in enumerate(itertools.islice(iter(batches), a.steps)):
        batch = train[numbers]
        j = int(torch.randint(1, DRAFTS + 1, (1,), generator=lengths))
        teacher_RD, students_RD, index_R = students(batch, j)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, d.learning_rate, d.warmup_steps, a.steps)
        losses_H = LinearDistillation.apply(
            lm_head_WD, teacher_RD, {"kl": 1.0}, 1 / len(index_R), 1.0, d.loss_chunk, None, *students_RD
        )
        optimizer.zero_grad()
        losses_H.sum().backward()
        for one in weights:
            nn.utils.clip_grad_norm_(one, d.clip_norm)
        optimizer.step()
        if (step + 1) % a.validate_every == 0 or step + 1 == a.steps:
            validate(step + 1)


if __name__ == "__main__":
    main()
