"""Checks that the pocket backbone is a sensible one: its code parses, and its depth lowers the loss.

`run` takes the checkpoint folders that recipe.py wrote and measures the share of sampled functions that parse, and the
loss on held-out modules of the standard library, also for a shallow twin. The figures go to checks.json beside the
weights.
"""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from . import corpus, cutting, recipe
from .paths import PROMPTS

NUM_PROMPTS = 200
MAX_NEW_TOKENS = 96
TEMPERATURES = (1.0, 0.7)
BATCH = 50
SEED = 0


def run(backbone_folder: Path, twin_folder: Path | None = None, stdlib: Path | None = None) -> dict[str, Any]:
    """Check a backbone, and its shallow twin if given; returns what it writes to `checks.json`.

    parse_share: completions are sampled from function heads; the share that parses as Python with its head in front,
    cut at the end of the function or else at the last whole line (`function`), and always cut at the last whole line
    (`last_line`). `library` is the same for the library's own continuations: an upper bound.
    held_out_loss: nats per token over the evaluate modules, in float32.
    """
    transformers_logging.disable_progress_bar()
    backbone_folder = Path(backbone_folder)
    modules = corpus.modules(stdlib)
    texts = list(modules["evaluate"].values())
    losses = {"backbone": _held_out_loss(backbone_folder, texts)}
    if twin_folder is not None:
        losses["twin"] = _held_out_loss(Path(twin_folder), texts)
        losses["gain"] = losses["twin"] - losses["backbone"]
    prompts = heads(NUM_PROMPTS)
    model, tokenizer = _load(backbone_folder)
    training = _training(backbone_folder)
    result = {
        "weights_sha256": weights_sha256(backbone_folder),
        "layers": model.config.num_hidden_layers,
        "parameters": training["parameters"],
        "minutes": training["minutes"],
        "twin_layers": _training(Path(twin_folder))["recipe"]["layers"] if twin_folder else None,
        "prompts": len(prompts),
        "max_new_tokens": MAX_NEW_TOKENS,
        "seed": SEED,
        "parse_share": {str(t): parse_share(prompts, complete(model, tokenizer, prompts, t)) for t in TEMPERATURES}
        | {"library": parse_share(prompts, library_text(prompts, modules, tokenizer))},
        "held_out_loss": {name: round(loss, 4) for name, loss in losses.items()},
    }
    (backbone_folder / "checks.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def heads(count: int) -> list[str]:
    """Up to `count` function heads: those of the evaluate prompts first, then those of distill."""
    rows = [
        json.loads(line) for role in ("evaluate", "distill") for line in PROMPTS[role].read_text("utf-8").splitlines()
    ]
    return [row["prompt"] for row in rows if row["task"] == "head"][:count]


def parse_share(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """The share of prompts that parse as Python with their completion, for both ways of cutting it."""
    pairs = list(zip(prompts, completions, strict=True))
    return {
        "function": round(sum(parses(p + function_body(p, c)) for p, c in pairs) / len(pairs), 3),
        "last_line": round(sum(parses(p + c[: c.rfind("\n") + 1]) for p, c in pairs) / len(pairs), 3),
    }


def library_text(prompts: list[str], modules: dict[str, dict[str, str]], tokenizer: Any) -> list[str]:
    """The library's own text after each prompt, as many tokens as a completion has at most."""
    sources = [source for role in ("evaluate", "distill") for source in modules[role].values()]
    known = {head: rest for source in sources for head, rest in cutting.continuations(source).items()}
    ids = [tokenizer.encode(known.get(p, ""), add_special_tokens=False)[:MAX_NEW_TOKENS] for p in prompts]
    return [tokenizer.decode(x) for x in ids]


def function_body(head: str, completion: str) -> str:
    """The completion up to the first line that is indented no deeper than the head, or to its last whole line."""
    last = head.splitlines()[-1]
    depth = len(last) - len(last.lstrip())
    lines = completion[: completion.rfind("\n") + 1].splitlines(keepends=True)
    for i, line in enumerate(lines[1:], 1):  # the first line is the end of the head
        if line.strip() and len(line) - len(line.lstrip()) <= depth:
            return "".join(lines[:i])
    return "".join(lines)


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return False
    return True


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: list[str], temperature: float) -> list[str]:
    """A sampled completion of each prompt, with a line break added to one that ends with the end token."""
    torch.manual_seed(SEED)
    texts = []
    for at in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
        )
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)] if ended else row)
            texts.append(text + "\n" if ended else text)
    return texts


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def plot_curves(folders: list[Path], out: Path) -> None:
    """The training loss of each folder's `training.json`, with its held-out loss as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        record = _training(Path(folder))
        layers = record["recipe"]["layers"]
        steps, losses = zip(*((point["step"], point["loss"]) for point in record["curve"]), strict=True)
        (line,) = axes.plot(steps, losses, label=f"{layers} layers, {record['parameters'] / 1e6:.1f} M parameters")
        held_out = record["held_out_loss"]
        label = f"{layers} layers, held-out modules: {held_out:.2f}"
        axes.axhline(held_out, color=line.get_color(), linestyle="--", linewidth=1, label=label)
    axes.set(
        xlabel="optimizer step", ylabel="loss (nats per token)", title="The pocket backbone on the standard library"
    )
    axes.set_ylim(top=min(5.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _training(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def _held_out_loss(folder: Path, texts: list[str]) -> float:
    model, tokenizer = _load(folder)
    return recipe.held_out_loss(model, recipe.encode(tokenizer, texts), model.config.max_position_embeddings)
