"""Prompt sets: where they come from, who may see which, and their token ids.

Takes a `prompts` section of the config, gives Prompts in a fixed order, their source record (public name,
sha256 or revision, licence) and their ids with or without a chat template; each prompt belongs to distill or
to evaluate, never to both. Knows nothing of models or of what is done with the prompts.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import pocket
from .config import Config, EvaluatePrompts, Prompts
from .errors import UserError
from .rundir import sha256_of

Role = Literal["distill", "evaluate"]

COLUMNS = ("prompt", "question", "instruction", "text")
FILES = (".jsonl", ".json", ".parquet", ".txt")
POCKET_LICENCE = "PSF-2.0"


@dataclass(frozen=True)
class Prompt:
    id: str
    """First 16 hex digits of the text's sha256: equal texts are one prompt."""
    text: str
    task: str
    """What kind of prompt it is, from the `task` column; empty if there is none."""


def load_prompts(prompts: Prompts, role: Role, seed: int = 0) -> list[Prompt]:
    """The prompts of `role`, without duplicates, in an order that only their texts and the seed decide.

    The first k are therefore a random subset. Only pocket's evaluate file keeps its own order, which is a
    balanced mix already. Raises UserError for a source that cannot be read, or that leaves nothing.
    """
    found = _prompts(prompts, role)
    if prompts.path == "pocket":
        return found if role == "evaluate" else _shuffled(found, seed)
    chosen = [p for p in found if (_share(p.text) < prompts.held_out) == (role == "evaluate")]
    if not chosen:
        raise UserError(
            f"{_section(prompts)}.held_out={prompts.held_out}: of {len(found)} prompts none are left to {role}. "
            "Give more prompts, another share, or evaluate.prompts.path."
        )
    return _shuffled(chosen, seed)


def evaluation_prompts(config: Config) -> list[Prompt]:
    """All prompts of evaluate.prompts if its path is set, in their own order; else the held-out share of prompts."""
    settings = evaluation_settings(config)
    if settings is config.prompts:
        return load_prompts(settings, "evaluate", config.seed)
    same = (settings.path, settings.revision, settings.split) == (
        config.prompts.path,
        config.prompts.revision,
        config.prompts.split,
    )
    if same and settings.path != "pocket":
        raise UserError(
            f"evaluate.prompts.path={settings.path}: the same as prompts.path, so the heads have learnt from it. "
            "Leave it out to evaluate on the held-out share of prompts.path."
        )
    return _prompts(settings, "evaluate")


def evaluation_settings(config: Config) -> Prompts:
    """The section that decides chat template and length handling of evaluation_prompts."""
    return config.prompts if config.evaluate.prompts.path is None else config.evaluate.prompts


def source_record(prompts: Prompts, role: Role = "distill") -> dict[str, Any]:
    """name (no folders), sha256 of the file or revision and split of the dataset, licence if known, rows."""
    rows = len(_rows(prompts, role))
    if prompts.path == "pocket":
        file = pocket.PROMPTS[role]
        return {"name": f"pocket/{file.name}", "sha256": sha256_of(file), "licence": POCKET_LICENCE, "rows": rows}
    if _is_file(prompts):
        path = Path(str(prompts.path))
        return {"name": path.name, "sha256": sha256_of(path), "licence": None, "rows": rows}
    licence = _load_dataset(prompts).info.license or None
    return {
        "name": prompts.path,
        "revision": prompts.revision,
        "split": prompts.split,
        "licence": licence,
        "rows": rows,
    }


def encode(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int
) -> list[tuple[Prompt, list[int]]]:
    """Each prompt with its token ids: what tokenizer(text) gives, or the chat template around it as one user turn.

    A prompt whose ids and max_new_tokens exceed `context` (in tokens) is a UserError, or is dropped and counted
    in one printed line if `settings.too_long` is drop. The order is kept.
    """
    section = _section(settings)
    texts = [p.text for p in prompts]
    if not texts:
        return []
    if settings.chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{section}.chat_template=true: this tokenizer has no chat template; set it to false.")
        turns = [[{"role": "user", "content": t}] for t in texts]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(texts, verbose=False)["input_ids"]
    kept = []
    for prompt, row in zip(prompts, ids, strict=True):
        if 0 < len(row) <= context - max_new_tokens:
            kept.append((prompt, list(row)))
        elif settings.too_long == "error":
            raise UserError(
                f"prompt {prompt.id} ({_start(prompt.text)}) has {len(row)} tokens; with {max_new_tokens} new ones it "
                f"does not fit into the context of {context}. Set {section}.too_long=drop or ask for fewer new "
                "tokens (max_new_tokens)."
            )
    if len(kept) < len(prompts):
        print(
            f"{section}.too_long=drop: {len(prompts) - len(kept)} of {len(prompts)} prompts dropped "
            f"(longer than {context - max_new_tokens} tokens)"
        )
    if not kept:
        raise UserError(f"{section}.too_long=drop: no prompt is left; ask for fewer new tokens (max_new_tokens).")
    return kept


def _section(prompts: Prompts) -> str:
    return "evaluate.prompts" if isinstance(prompts, EvaluatePrompts) else "prompts"


def _start(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")


def _share(text: str) -> float:
    """A number in [0, 1) of the text alone. Salted: `distill.held_out` and the order must not depend on it."""
    return int.from_bytes(hashlib.sha256(b"held out:" + text.encode()).digest()[:8]) / 2**64


def _shuffled(found: list[Prompt], seed: int) -> list[Prompt]:
    return sorted(found, key=lambda p: hashlib.sha256(f"order {seed}:{p.text}".encode()).digest())


def _prompts(prompts: Prompts, role: Role) -> list[Prompt]:
    """All distinct prompts of the source in its order. Rows without text are skipped and counted."""
    key = f"{_section(prompts)}.path={prompts.path}"
    rows = _rows(prompts, role)
    if not rows:
        raise UserError(f"{key}: holds no prompts")
    column = _column(prompts, rows)
    found: dict[str, Prompt] = {}
    blank = 0
    for row in rows:
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{key}: column {column} holds a {type(text).__name__}, a text is needed")
        if not text or not text.strip():
            blank += 1
            continue
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        found.setdefault(name, Prompt(name, text, str(row.get("task") or "")))
    if blank:
        print(f"{key}: {blank} of {len(rows)} rows have an empty {column} and are skipped")
    if not found:
        raise UserError(f"{key}: every {column} is empty")
    return list(found.values())


def _column(prompts: Prompts, rows: list[dict[str, Any]]) -> str:
    there = list(dict.fromkeys(name for row in rows for name in row))
    wanted = [prompts.column] if prompts.column else [c for c in COLUMNS if c in there]
    if wanted and wanted[0] in there:
        return wanted[0]
    raise UserError(
        f"{_section(prompts)}.column={prompts.column or 'null'}: not a column of {prompts.path}; "
        f"these are there: {', '.join(there) or 'none'}"
    )


def _is_file(prompts: Prompts) -> bool:
    """True for a file, False for a datasets id; anything else is a UserError."""
    key, path = f"{_section(prompts)}.path", Path(str(prompts.path))
    if path.is_dir():
        raise UserError(f"{key}={path}: a folder; give one file ({', '.join(FILES)})")
    if path.suffix in FILES:
        if not path.is_file():
            raise UserError(f"{key}={path}: no such file")
        return True
    if path.is_file():
        raise UserError(f"{key}={path}: unknown kind of file; these can be read: {', '.join(FILES)}")
    if not prompts.path or prompts.path[0] in "./~" or prompts.path.count("/") > 1:
        raise UserError(f"{key}={prompts.path}: neither a file that is there nor a datasets id")
    return False


def _rows(prompts: Prompts, role: Role) -> list[dict[str, Any]]:
    if prompts.path == "pocket":
        return _read_jsonl(pocket.PROMPTS[role], f"{_section(prompts)}.path=pocket")
    if not _is_file(prompts):
        return _load_dataset(prompts).to_list()
    path = Path(str(prompts.path))
    key = f"{_section(prompts)}.path={path}"
    if path.suffix == ".parquet":
        return _read_parquet(path, key)
    if path.suffix == ".txt":
        return [{"text": line} for line in _text(path, key).splitlines() if line.strip()]
    return _read_jsonl(path, key)


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot be read as UTF-8 text: {error}") from None


def _read_jsonl(path: Path, key: str) -> list[dict[str, Any]]:
    """One JSON object a line; a .json file may also be one list of objects."""
    text = _text(path, key)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: line {error.lineno}: not JSON: {error.msg}") from None
        numbered = list(enumerate(rows, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside strings
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{key}: line {number}: not JSON: {error.msg}") from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f'{key}: line {number}: an object such as {{"prompt": "..."}} is needed')
    return [row for _, row in numbered]


def _read_parquet(path: Path, key: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        return pq.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{key}: not a parquet file: {str(error).splitlines()[0]}") from None


def _load_dataset(prompts: Prompts) -> Any:
    """The split of a datasets id. A revision is needed: a set that changes under its name cannot be repeated."""
    section = _section(prompts)
    if not prompts.revision:
        raise UserError(
            f"{section}.revision=null: pin a commit of the dataset {prompts.path}, "
            f"see https://huggingface.co/datasets/{prompts.path}/commits/main"
        )
    import datasets

    try:
        return datasets.load_dataset(str(prompts.path), revision=prompts.revision, split=prompts.split)
    except Exception as error:  # datasets raises its own, huggingface_hub's, fsspec's and OSError here
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{section}.path={prompts.path}: neither a file nor a readable dataset: {lines[0]}") from None
