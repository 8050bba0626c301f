"""Questions that a chat model asks itself, to answer and to learn from: the user's turn of its template, sampled.

Takes a backbone with a chat template; gives a .jsonl file of prompts. Shown the beginning of a user's turn and nothing
else, a chat model writes what users may ask (Magpie, Xu et al., ICLR 2025, arXiv 2406.08464). Such prompts are as broad
as the model's training was, and need no data set.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from ..backbones.load import load_model, load_tokenizer
from ..config import Backbone
from ..errors import UserError
from .prompt_files import write

BATCH = 64
LONGEST = 72
"""Tokens of a question. One that does not end by then is dropped."""
SHORTEST = 12
"""Characters: below, it is a greeting or a stray word."""
TEMPERATURE, TOP_P = 0.9, 0.95
FRUITLESS = 5
"""Batches without a new question after which no more are tried."""
MARK = "@@"


def ask(backbone: Backbone, count: int, out: Path, seed: int = 0) -> Path:
    """Write `count` different questions; gives the path. Raises UserError for a backbone without chat template, and if
    it writes no more new ones."""
    tokenizer, model = load_tokenizer(backbone), load_model(backbone, torch.device("cpu"))
    if not tokenizer.chat_template:
        raise UserError(f"backbone.name_or_path={backbone.name_or_path}: it has no chat template")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    before, _, after = turn.partition(MARK)
    if not after:
        raise UserError(f"backbone.name_or_path={backbone.name_or_path}: its chat template does not end a user's turn")
    end = tokenizer(after, add_special_tokens=False).input_ids[0]
    ids_1T = torch.tensor([tokenizer(before, add_special_tokens=False).input_ids])
    torch.manual_seed(seed)
    found: dict[str, None] = {}
    fruitless = 0
    with tqdm(total=count, desc="questions", unit="question") as bar:
        while len(found) < count:
            known = len(found)
            for text in _batch(model, tokenizer, ids_1T, end):
                if len(text) >= SHORTEST and len(found) < count:
                    found.setdefault(text)
            bar.update(len(found) - known)
            fruitless = 0 if len(found) > known else fruitless + 1
            if fruitless == FRUITLESS:
                raise UserError(
                    f"{backbone.name_or_path}: {len(found)} of {count} questions, and the last {FRUITLESS * BATCH} "
                    "texts gave no new one that ends; ask for fewer"
                )
    return write(out, [{"prompt": text} for text in found])


@torch.inference_mode()
def _batch(model, tokenizer, ids_1T: torch.Tensor, end: int) -> list[str]:
    """The user's turns that ended, as text."""
    ids_BT = ids_1T.expand(BATCH, -1)
    written_BT = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
        max_new_tokens=LONGEST, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    rows = written_BT[:, ids_1T.shape[1] :].tolist()
    ended = [row[: row.index(end)] for row in rows if end in row]
    special = set(tokenizer.all_special_ids)
    return [tokenizer.decode(row).strip() for row in ended if not special & set(row)]
