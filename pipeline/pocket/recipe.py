"""Trains the pocket backbone: a tokenizer and a deep, thin Llama, in one run with fixed seeds.

`train` takes the texts of corpus.py and writes a folder in transformers' format and training.json with the loss curve.

Letters: B windows, T positions, D hidden size, V vocabulary.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .muon import Muon

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Recipe:
    """All settings that, with the corpus, determine the weights."""

    layers: int = 32
    hidden: int = 96
    ffn: int = 288
    heads: int = 3
    kv_heads: int = 1
    vocabulary: int = 2048
    context: int = 512
    steps: int = 1700
    long_from: float = 0.85
    """Share of the steps after which windows grow from 256 tokens to the whole context."""
    tokens_per_step: int = 4096
    warmup: int = 40
    decay_from: float = 0.4
    """Share of the steps after which both learning rates fall linearly to zero."""
    lr_matrices: float = 6e-3
    lr_rest: float = 4e-3
    seed: int = 0


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps a line break and the indentation after it in one piece."""
    tokenizer = Tokenizer(models.BPE())
    pieces = r"\s*\n[ \t]*| ?_*[A-Za-z]+|_+|[0-9]| ?[^\sA-Za-z_0-9]+|[ \t]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, an end token after each."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(p, std=0.05)
        elif "o_proj" in name or "down_proj" in name:  # every layer starts as the identity, so that a deep model trains
            torch.nn.init.zeros_(p)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def windows(stream: torch.Tensor, step: int, recipe: Recipe) -> torch.Tensor:
    """The ids [B, T+1] of a step: random windows, a pure function of the step and the seed."""
    length = recipe.context if step >= recipe.long_from * recipe.steps else recipe.context // 2
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length - 1, (recipe.tokens_per_step // length,), generator=generator)
    return torch.stack([stream[s : s + length + 1] for s in starts])


def mean_loss(model: LlamaForCausalLM, ids_BT1: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in nats per token."""
    hidden_BTD = model.model(ids_BT1[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden_BTD).flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, ids_BT1[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, context: int, device: str = "cpu") -> float:
    """Mean loss over consecutive windows of a held-out stream, in nats per token."""
    ids = stream[: (len(stream) - 1) // context * context + 1].to(device)
    rows = [ids[i : i + context + 1] for i in range(0, len(ids) - context, context)]
    batches = [torch.stack(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    return sum(mean_loss(model, b).item() * len(b) for b in batches) / len(rows)


def train(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]], out: Path, device: str
) -> dict:
    """Train, write the bf16 checkpoint and `training.json` (recipe, curve, cost) to `out`; returns the latter."""
    stream, held_out = encode(tokenizer, texts["train"]), encode(tokenizer, texts["evaluate"])
    model = build_model(recipe, tokenizer).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    optimizers = [Muon(matrices, lr=recipe.lr_matrices), torch.optim.AdamW(rest, lr=recipe.lr_rest, weight_decay=0.0)]
    decay_steps = recipe.steps * (1 - recipe.decay_from)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda s: min(1, (s + 1) / recipe.warmup, (recipe.steps - s) / decay_steps)
        )
        for o in optimizers
    ]
    for layer in model.model.layers:  # all layers share one graph; worth it for training of more than a few minutes
        layer.compile()
    curve, started = [], time.time()
    bar = tqdm(range(recipe.steps), desc=f"train {recipe.layers} layers", unit="step")
    for step in bar:
        loss = mean_loss(model, windows(stream, step, recipe).to(device))
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 25 == 0 or step == recipe.steps - 1:
            curve.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)})
            bar.set_postfix(loss=f"{loss.item():.3f}")
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": {"train": len(stream), "evaluate": len(held_out)},
        "minutes": round((time.time() - started) / 60, 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out_loss": round(held_out_loss(model, held_out, recipe.context, device), 4),
        "curve": curve,
    }
    save(model, tokenizer, recipe.context, out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: int, out: Path) -> None:
    """The checkpoint: weights in bfloat16, to halve the file, but loaded as float32 unless asked otherwise.

    A CPU without bfloat16 units emulates them at a tenth of the speed.
    """
    model.to(torch.bfloat16).to("cpu").save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(out)
