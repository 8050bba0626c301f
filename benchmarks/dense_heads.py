"""Does a dense layer draft as well for a mixture of experts as its own layer does, and what should its MLP start from?

    python benchmarks/dense_heads.py --folder runs/toy-mixture

Trains a toy mixture of experts on the standard library of CPython (qwen3_moe, 6 layers, 8 experts of which 2 compute a
token, with a shared expert if `--family qwen2_moe`), or takes the one in `--folder`. Then heads learn side by side at
one exit layer, from the same batches of the same text in the same order: the mixture's last layer with its experts, and
dense layers whose MLP starts from different weights. Prints, on held-out text after the same steps, the loss (KL
divergence in nats), the greedy match, the overlap of p and q, and the expected greedy acceptance length of a round of 4
drafts: counts and means, which do not depend on other work on the machine. `--seeds` repeats it with other batches.
Before that it prints how many different experts tokens in a row reach, and what independent choices would.

Starts (`--starts`): layer (with its experts), and of dense heads random, spread and zero (at random; the last two with
output 0), mean (groups of experts averaged), first and often (the first experts, or those used most, side by side),
distilled (random, then taught the experts' outputs). NAME*M has an MLP of M times the width.

It is a toy: 3 million parameters, of which a token uses a good third, and little text. What it says is a hint.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.inference.dense_mlp import block_of
from pipeline.inference.exit_head import HeadSpec, new_exit_layer
from pipeline.pocket import corpus
from pipeline.pocket.paths import BUILT_IN
from pipeline.pocket.recipe import encode
from pipeline.training.teacher import last_layer_arguments

CONTEXT = 256
FIELDS = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 512, "tie_word_embeddings": True, "router_aux_loss_coef": 0.01,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 128}


# ---- the backbone


def batch_of(stream: Tensor, step: int, tokens: int, seed: int) -> Tensor:
    """Ids [B, T+1] of a step: random windows, a pure function of the step and the seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - CONTEXT - 1, (tokens // CONTEXT,), generator=generator)
    return torch.stack([stream[s : s + CONTEXT + 1] for s in starts])


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 20 steps, then linearly down to a tenth."""
    return peak * min((step + 1) / 20, 1 - 0.9 * step / steps)


def train_backbone(a: argparse.Namespace, tokenizer: Any, stream: Tensor) -> None:
    fields = FIELDS | (SHARED if a.family == "qwen2_moe" else {})
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(a.family, vocab_size=len(tokenizer), output_router_logits=True, **fields, **ends)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            zero = "o_proj" in name or "down_proj" in name
            nn.init.normal_(weight, std=0.05 if "embed" in name else 1e-3 if zero else weight.shape[-1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.backbone_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.time()
    for step in range(a.backbone_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, a.backbone_steps, a.backbone_rate)
        ids = batch_of(stream, step, a.backbone_tokens, 0)
        loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == a.backbone_steps - 1:
            print(f"backbone: step {step}, loss {loss.item():.3f}, {time.time() - started:.0f} s", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(a.folder)
    tokenizer.save_pretrained(a.folder)


# ---- how many experts a pass of several tokens reads


def reached(model: Any, ids_BT: Tensor) -> list[tuple[int, float, float]]:
    """(m, different experts that m consecutive tokens of a text reach, the same by independent choices): means over
    places and layers."""
    chosen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, args, out: chosen.append(out[2])) for gate in gates]
    with torch.no_grad():
        model.model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    experts = gates[0].num_experts
    hits_LBTE = torch.stack([torch.zeros(c.shape[0], experts).scatter_(1, c, 1.0) for c in chosen])
    hits_LBTE = hits_LBTE.view(len(chosen), *ids_BT.shape, experts)
    share = chosen[0].shape[1] / experts
    rows = []
    for m in (1, 2, 3, 5, 9):
        found = hits_LBTE.unfold(2, m, 1).amax(-1).sum(-1).mean().item()
        rows.append((m, found, experts * (1 - (1 - share) ** m)))
    return rows


# ---- what a dense MLP starts from


class Block:
    """The last layer's experts, and what its router does with text.

    E experts, I width of an expert, D hidden, R rows
    """

    def __init__(self, model: Any, ids: Tensor):
        self.layer, self.config = model.model.layers[-1], model.config
        self.mlp = self.layer.mlp
        self.gate_EID, self.up_EID = self.mlp.experts.gate_up_proj.detach().chunk(2, 1)
        self.down_EDI = self.mlp.experts.down_proj.detach()
        seen = {}
        hooks = [
            self.mlp.register_forward_hook(lambda _, args, out: seen.update(into=args[0], out=out)),
            self.mlp.gate.register_forward_hook(lambda _, args, out: seen.update(weights=out[1], chosen=out[2])),
        ]
        with torch.no_grad():
            model.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.into_RD, self.out_RD = (seen[name].flatten(0, 1) for name in ("into", "out"))
        counts_E = torch.zeros(len(self.down_EDI)).index_add_(0, seen["chosen"].flatten(), seen["weights"].flatten())
        self.share_E = counts_E / counts_E.sum()
        """The mean weight that the router gives each expert."""

    def shared(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """gate [I, D], up [I, D], down [D, I] of the expert that computes every token, if there is one."""
        if not hasattr(self.mlp, "shared_expert"):
            return []
        expert = self.mlp.shared_expert
        return [(expert.gate_proj.weight.data, expert.up_proj.weight.data, expert.down_proj.weight.data)]


Parts = list[tuple[Tensor, Tensor, Tensor]]
"""gate [I, D], up [I, D] and down [D, I] of MLPs that are added up to one, side by side."""


def stacked(block: Block, chosen: list[int], scales: list[float]) -> Parts:
    """These experts, each of whose outputs is multiplied by a number, and the shared expert."""
    parts = [(block.gate_EID[e], block.up_EID[e], block.down_EDI[e] * c) for e, c in zip(chosen, scales, strict=True)]
    return [*parts, *block.shared()]


def means(block: Block, count: int) -> Parts:
    """`count` experts, each the mean of as many others of the block."""
    groups = torch.arange(len(block.down_EDI)).chunk(count)
    return [
        *((block.gate_EID[g].mean(0), block.up_EID[g].mean(0), block.down_EDI[g].mean(0) / count) for g in groups),
        *block.shared(),
    ]


def distilled(block: Block, head: nn.Module, steps: int) -> None:
    """Let the MLP learn what the block gives for the rows that it saw."""
    optimizer = torch.optim.AdamW(head.mlp.parameters(), lr=3e-3)
    for step in range(steps):
        rows_R = torch.randint(len(block.into_RD), (1024,), generator=torch.Generator().manual_seed(step))
        loss = (head.mlp(block.into_RD[rows_R]) - block.out_RD[rows_R]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def new_head(start: str, model: Any, block: Block) -> nn.Module:
    """A head in float32. start: layer (with its experts), or NAME[*WIDTH] of a dense one, WIDTH in active widths."""
    if start == "layer":
        return new_exit_layer(model)
    name, _, times = start.partition("*")
    own, k = block_of(block.layer, block.config), block.config.num_experts_per_tok
    factor = int(times or 1)
    count = k * factor
    spec = HeadSpec("dense", count * own.expert_width + own.shared_width)
    torch.manual_seed(0)
    head = spec.build(type(block.layer), block.config).float()
    for linear in (head.mlp.gate_proj, head.mlp.up_proj, head.mlp.down_proj):
        nn.init.normal_(linear.weight, std=block.config.initializer_range)
    kept = {n: w for n, w in block.layer.state_dict().items() if not n.startswith("mlp.")}
    head.load_state_dict(kept, strict=False)
    often = block.share_E.argsort(descending=True).tolist()
    parts: Parts = []
    if name == "zero":
        nn.init.zeros_(head.mlp.down_proj.weight)
    elif name == "spread":  # as wide as torch's own layers start
        for linear in (head.mlp.gate_proj, head.mlp.up_proj):
            nn.init.normal_(linear.weight, std=block.config.hidden_size**-0.5)
        nn.init.zeros_(head.mlp.down_proj.weight)
    elif name == "mean":
        parts = means(block, count)
    elif name == "first":
        parts = stacked(block, list(range(count)), [1 / count] * count)
    elif name == "often":
        parts = stacked(block, often[:count], [1 / count] * count)
    elif name == "distilled":
        distilled(block, head, 300)
    elif name != "random":
        raise SystemExit(f"--starts {start}: unknown")
    if parts:
        for linear, tensors, dim in zip(
            (head.mlp.gate_proj, head.mlp.up_proj, head.mlp.down_proj), zip(*parts, strict=True), (0, 0, 1), strict=True
        ):
            linear.weight.data.copy_(torch.cat(tensors, dim))
    return head


# ---- training


def figures(model: Any, hidden_BTD: Tensor, final_BTD: Tensor, draft_BTD: Tensor) -> dict[str, float]:
    """Loss, overlap, match and expected greedy acceptance length of a batch, over all of its rows."""
    log_p, log_q = (model.lm_head(x.flatten(0, 1)).log_softmax(-1) for x in (final_BTD, draft_BTD))
    match_BT = (log_p.argmax(-1) == log_q.argmax(-1)).view(final_BTD.shape[:2]).double()
    length_BT, run_BT = torch.ones_like(match_BT), torch.ones_like(match_BT)
    for i in range(4):
        run_BT = run_BT[:, :-1] * match_BT[:, i:][:, : run_BT.shape[1] - 1]
        length_BT = length_BT[:, : run_BT.shape[1]] + run_BT
    return {
        "loss": kl(log_p, log_q).item(),
        "match": match_BT.mean().item(),
        "overlap": torch.minimum(log_p.exp(), log_q.exp()).sum(-1).mean().item(),
        "acceptance length": length_BT.mean().item(),
    }


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@torch.no_grad()
def teach(model: Any, ids_BT: Tensor, exit_layer: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Hidden states [B, T, D] after the exit layer and at the end, and the arguments of the last layer."""
    out = model.model(ids_BT, output_hidden_states=True, use_cache=False)
    positions_BT = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
    arguments = last_layer_arguments(model, model.model.layers[-1], out.hidden_states[0], positions_BT)
    return out.hidden_states[exit_layer], out.last_hidden_state, arguments


def draft(model: Any, head: nn.Module, hidden_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
    out = head(hidden_BTD, **arguments)
    return model.model.norm(out[0] if isinstance(out, tuple) else out)


def train_heads(a: argparse.Namespace, model: Any, block: Block, stream: Tensor, held_out: Tensor, seed: int) -> dict:
    """Start -> (parameters, figures after --steps steps and at half of them)."""
    heads = {start: new_head(start, model, block) for start in a.starts}
    optimizers = {n: torch.optim.AdamW(h.parameters(), lr=a.rate, betas=(0.9, 0.95)) for n, h in heads.items()}
    found: dict[str, Any] = {n: {"parameters": sum(p.numel() for p in h.parameters())} for n, h in heads.items()}
    for step in range(a.steps + 1):
        if step in (0, a.steps // 2, a.steps):
            for name, values in validate(a, model, heads, held_out).items():
                found[name][step] = values
        if step == a.steps:
            return found
        hidden, final, arguments = teach(model, batch_of(stream, step, a.tokens, 100 + seed)[:, :-1], a.exit_layer)
        with torch.no_grad():
            log_p = model.lm_head(final.flatten(0, 1)).log_softmax(-1)
        for name, head in heads.items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate_at(step, a.steps, a.rate)
            log_q = model.lm_head(draft(model, head, hidden, arguments).flatten(0, 1)).log_softmax(-1)
            optimizers[name].zero_grad()
            kl(log_p, log_q).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizers[name].step()
    raise AssertionError


@torch.no_grad()
def validate(a: argparse.Namespace, model: Any, heads: dict[str, nn.Module], held_out: Tensor) -> dict[str, dict]:
    sums: dict[str, dict[str, float]] = {name: {} for name in heads}
    for i in range(a.held_out):
        hidden, final, arguments = teach(model, batch_of(held_out, i, 2048, 7)[:, :-1], a.exit_layer)
        for name, head in heads.items():
            for key, value in figures(model, hidden, final, draft(model, head, hidden, arguments)).items():
                sums[name][key] = sums[name].get(key, 0.0) + value / a.held_out
    return sums


def report(a: argparse.Namespace, runs: list[dict]) -> None:
    print("| start | parameters | KL at 0 | KL at half | KL | match | overlap | acceptance length |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in a.starts:

        def over(step: int, key: str, digits: int = 3, name: str = name) -> str:
            values = [run[name][step][key] for run in runs]
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(runs) > 1 and step else ""
            return f"{sum(values) / len(values):.{digits}f}{spread}"

        last = [over(a.steps, key) for key in ("loss", "match", "overlap", "acceptance length")]
        row = [name, f"{runs[0][name]['parameters']:,}", over(0, "loss"), over(a.steps // 2, "loss"), *last]
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--family", choices=["qwen3_moe", "qwen2_moe"], default="qwen3_moe")
    parser.add_argument("--backbone-steps", type=int, default=800)
    parser.add_argument("--backbone-tokens", type=int, default=2048)
    parser.add_argument("--backbone-rate", type=float, default=3e-3)
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--starts", nargs="+", default=["layer", "random", "zero", "mean", "first", "often"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=8, help="batches of 2048 held-out tokens")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["pocket"])
    found = corpus.modules(check=False)
    stream, held_out = (encode(tokenizer, list(found[role].values())) for role in ("train", "evaluate"))
    if not (a.folder / "config.json").exists():
        train_backbone(a, tokenizer, stream)
    model = AutoModelForCausalLM.from_pretrained(a.folder, dtype=torch.float32).requires_grad_(False).eval()
    block = Block(model, batch_of(stream, 0, 8192, 99)[:, :-1])
    for m, reaching, expected in reached(model, batch_of(held_out, 0, 8192, 98)[:, :-1]):
        print(f"tokens in a row: {m} reach {reaching:.2f} of the experts of a layer, {expected:.2f} if independent")
    print("mean weight of each expert of the last layer:", [round(x, 3) for x in block.share_E.tolist()])
    runs = []
    for seed in range(a.seeds):
        runs.append(train_heads(a, model, block, stream, held_out, seed))
        print(f"\nafter {a.steps} steps, {seed + 1} of {a.seeds} seeds: mean (smallest-largest)\n", flush=True)
        report(a, runs)


if __name__ == "__main__":
    main()
