"""Prompt sets: where they come from, who may see which, and their token ids.

Takes a `prompts` section of the config, gives Prompts in a fixed order, their source record (public name,
sha256 or revision, licence) and their ids with or without a chat template; each prompt belongs to distill or
to evaluate, never to both. Spec-Bench's question file is read as it is. Knows nothing of models or of what is
done with the prompts.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import pocket
from .config import Config, EvaluatePrompts, Prompts
from .errors import UserError
from .rundir import sha256_of

Role = Literal["distill", "evaluate"]

COLUMNS = ("prompt", "question", "instruction", "text", "turns")
FILES = (".jsonl", ".json", ".parquet", ".txt")
POCKET_LICENCE = "PSF-2.0"

SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
"""The tasks of Spec-Bench (Xia et al., Findings of ACL 2024) in the order of its tables."""
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories of Spec-Bench's file that are together its task mt_bench."""


@dataclass(frozen=True)
class Prompt:
    id: str
    """First 16 hex digits of the turns' sha256: equal turns are one prompt. `.2`, `.3` ... follow for later turns."""
    turns: tuple[str, ...]
    """What the user says, in order; most prompts have one turn."""
    task: str
    """What kind of prompt it is, from the `task` or else the `category` column; empty if there is none."""
    answers: tuple[str, ...] = ()
    """What was answered to the first turns: the turn after them is the one to be answered now."""

    @property
    def text(self) -> str:
        """The turn to be answered."""
        return self.turns[len(self.answers)]

    @property
    def conversation(self) -> list[str]:
        """All that is said up to the turn to be answered, user and backbone in turn."""
        answered = zip(self.turns, self.answers, strict=False)
        return [text for pair in answered for text in pair] + [self.text]


Encoded = list[tuple[Prompt, list[int]]]


def load_prompts(prompts: Prompts, role: Role, seed: int = 0) -> list[Prompt]:
    """The prompts of `role`, without duplicates, in an order that only their texts and the seed decide.

    The first k are therefore a random subset. Only pocket's evaluate file keeps its own order, which is a
    balanced mix already. Raises UserError for a source that cannot be read, or that leaves nothing.
    """
    found = _prompts(prompts, role)
    if prompts.path == "pocket":
        return found if role == "evaluate" else _shuffled(found, seed)
    # By the first turn alone: generate answers no other, and it must not be answered here and measured there.
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


def count_tasks(prompts: list[Prompt]) -> dict[str, int]:
    """Task -> how many prompts; Spec-Bench's tasks first and in its order, others as they come."""
    counts = Counter(p.task for p in prompts)
    place = {task: i for i, task in enumerate(SPEC_BENCH)}
    return {task: counts[task] for task in sorted(counts, key=lambda task: place.get(task, len(place)))}


def encode(prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int) -> Encoded:
    """As `fitting`, but it is a UserError if there are prompts and none is left."""
    kept = fitting(prompts, tokenizer, settings, context, max_new_tokens)
    if prompts and not kept:
        raise UserError(
            f"{_section(settings)}.too_long=drop: no prompt is left; ask for fewer new tokens (max_new_tokens)."
        )
    return kept


def fitting(prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int) -> Encoded:
    """Each prompt with the token ids of its conversation, up to the turn to be answered.

    The ids are those of the chat template around it, or what tokenizer(text) gives, turns and answers joined by
    blank lines. A prompt whose ids and max_new_tokens exceed `context` (in tokens) is a UserError, or is dropped
    and counted in one printed line if `settings.too_long` is drop. The order is kept.
    """
    section = _section(settings)
    if not prompts:
        return []
    kept = []
    ids = _ids([p.conversation for p in prompts], tokenizer, settings)
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
    return kept


def _ids(conversations: list[list[str]], tokenizer: Any, settings: Prompts) -> list[list[int]]:
    if not settings.chat_template:
        return tokenizer(["\n\n".join(said) for said in conversations], verbose=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{_section(settings)}.chat_template=true: this tokenizer has no chat template; set it to false."
        )
    roles = ("user", "assistant")
    messages = [[{"role": roles[i % 2], "content": text} for i, text in enumerate(said)] for said in conversations]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def _section(prompts: Prompts) -> str:
    return "evaluate.prompts" if isinstance(prompts, EvaluatePrompts) else "prompts"


def _start(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")


def _share(text: str) -> float:
    """A number in [0, 1) of the text alone. Salted: `distill.held_out` and the order must not depend on it."""
    return int.from_bytes(hashlib.sha256(b"held out:" + text.encode()).digest()[:8]) / 2**64


def _shuffled(found: list[Prompt], seed: int) -> list[Prompt]:
    return sorted(found, key=lambda p: hashlib.sha256(f"order {seed}:{_joined(p.turns)}".encode()).digest())


def _joined(turns: tuple[str, ...]) -> str:
    """One text for all turns; of a single turn, itself."""
    return "\0".join(turns)


def _prompts(prompts: Prompts, role: Role) -> list[Prompt]:
    """All distinct prompts of the source in its order. Rows of blank text are skipped and counted."""
    key = f"{_section(prompts)}.path={prompts.path}"
    rows = _rows(prompts, role)
    if not rows:
        raise UserError(f"{key}: holds no prompts")
    column = _column(prompts, list(rows.values()))
    if missing := [place for place, row in rows.items() if not row.keys() & {column, "turns"}]:
        raise UserError(
            f"{key}: {missing[0]} has no {column} ({len(missing)} of {len(rows)} rows have none). "
            "Give each of them one, or take them out."
        )
    found: dict[str, Prompt] = {}
    blank = 0
    for place, row in rows.items():
        try:
            turns = _turns(row, column)
        except ValueError as error:
            raise UserError(f"{key}: {place}: {error}") from None
        if not turns:
            blank += 1
            continue
        name = hashlib.sha256(_joined(turns).encode()).hexdigest()[:16]
        found.setdefault(name, Prompt(name, turns, _task(row)))
    if blank:
        print(f"{key}: {blank} of {len(rows)} rows have an empty {column} and are skipped")
    if not found:
        raise UserError(f"{key}: every {column} is empty")
    return list(found.values())


def _turns(row: dict[str, Any], column: str) -> tuple[str, ...]:
    """What the user says in this row: its `column`, or `turns` where that is missing; () if the text is blank."""
    if row.get(column) is None and row.get("turns") is not None:
        column = "turns"
    said = row.get(column)
    if column == "turns":
        if not isinstance(said, list) or not said or not all(isinstance(t, str) and t.strip() for t in said):
            raise ValueError('turns must be a list of texts, none of them empty, such as ["first", "second"]')
        return tuple(said)
    if said is not None and not isinstance(said, str):
        raise ValueError(f"column {column} holds a {type(said).__name__}, a text is needed")
    return (said,) if said and said.strip() else ()


def _task(row: dict[str, Any]) -> str:
    if "task" in row:
        return str(row["task"] or "")
    category = str(row.get("category") or "")
    of_spec_bench = {"question_id", "turns"} <= row.keys()
    return "mt_bench" if of_spec_bench and category in MT_BENCH else category


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


def _rows(prompts: Prompts, role: Role) -> dict[str, dict[str, Any]]:
    """Where a row stands (`line 3`) -> the row, in their order."""
    if prompts.path == "pocket":
        return _read_jsonl(pocket.PROMPTS[role], f"{_section(prompts)}.path=pocket")
    if not _is_file(prompts):
        return _numbered(_load_dataset(prompts).to_list())
    path = Path(str(prompts.path))
    key = f"{_section(prompts)}.path={path}"
    if path.suffix == ".parquet":
        return _numbered(_read_parquet(path, key))
    if path.suffix == ".txt":
        return _numbered([{"text": line} for line in _text(path, key).splitlines() if line.strip()])
    return _read_jsonl(path, key)


def _numbered(rows: list[Any]) -> dict[str, Any]:
    return {f"row {number}": row for number, row in enumerate(rows, 1)}


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot be read as UTF-8 text: {error}") from None


def _read_jsonl(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """One JSON object a line; a .json file may also be one list of objects."""
    text = _text(path, key)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = _numbered(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: line {error.lineno}: not JSON: {error.msg}") from None
    else:
        rows = {}
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside strings
            if not line.strip():
                continue
            try:
                rows[f"line {number}"] = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{key}: line {number}: not JSON: {error.msg}") from None
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f'{key}: {place}: an object such as {{"prompt": "..."}} is needed')
    return rows


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
