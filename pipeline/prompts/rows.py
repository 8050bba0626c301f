"""Reads rows by the names of their columns: prompts, instructions, lists of turns, chats.

Takes rows (dicts); gives system message, turns, the source's own answers and the task. Raises ValueError for an
unusable row. Spec-Bench's question file can be read unchanged.
"""

import sys
from typing import Any, NamedTuple

from .as_text import begins_as_messages, messages_in, parsed
from .chats import answer_in, chat
from .stray_characters import is_blank, without_marks

CHATS = ("messages", "conversations", "conversation")
TEXTS = ("prompt", "question", "instruction", "text")
ANSWERS = ("answer", "response", "output", "completion", "chosen")

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories in Spec-Bench's file that make up its task mt_bench."""


class Said(NamedTuple):
    system: str
    turns: tuple[str, ...]
    originals: tuple[str, ...]


class Columns:
    """Finds the column of a source that holds its prompts: the requested one, or one that the rows have.

    Chats have priority. Of the columns of plain text, the first that is met is used for the whole source, as a column
    `text` beside prompts is rarely a prompt. `turns` are used if a row has nothing else.
    """

    def __init__(self, wanted: str | None):
        self.wanted = wanted
        self.text = wanted
        self.met: dict[str, None] = {}
        """All columns of all rows so far, in order."""
        self.found = False
        """True if some row had a column of prompts."""
        self.marked = 0
        """Number of rows from which stray characters were removed."""

    def said(self, row: dict[str, Any]) -> Said | None:
        """The content of a row; None if its column is empty. Raises ValueError if the row cannot be used."""
        self.met.update(dict.fromkeys(row))
        if self.text is None:
            self.text = next((name for name in TEXTS if name in row), None)
        names = [n for n in (*(() if self.wanted else CHATS), self.text, "turns") if n is not None and n in row]
        if not names:
            raise ValueError(f"no {self.text or 'prompt'}")
        self.found = True
        name = next((n for n in names if row[n] is not None), None)
        if name is None:
            return None
        read = {n: row[n] for n in (name, "input", *ANSWERS) if n in row}
        clean = without_marks(read)
        self.marked += clean[name] != read[name]
        return _said(clean, name, self.wanted)


def task_of(row: dict[str, Any]) -> str:
    task = _task(row)
    return sys.intern(task)  # all rows of a task share one string


def _said(row: dict[str, Any], name: str, wanted: str | None) -> Said | None:
    value = _written(row[name], name, wanted)
    system = ""
    turns: tuple[str, ...]
    originals: tuple[str, ...] = ()
    if name == "turns":
        if not isinstance(value, list) or not value or not all(isinstance(t, str) and not is_blank(t) for t in value):
            raise ValueError('turns must be a list of texts, none of them empty, such as ["first", "second"]')
        turns = tuple(value)
    elif isinstance(value, list):
        system, turns, originals = chat(value)
    elif isinstance(value, str):
        turns = (_with_input(row, value),) if name == "instruction" else (value,)
        turns = tuple(turn for turn in turns if not is_blank(turn))
    else:
        raise ValueError(f"column {name} holds a {type(value).__name__}; a text or a list of messages is needed")
    if not turns:
        return None
    if len(originals) == len(turns) - 1:
        answers = (answer_in(row.get(column)) for column in ANSWERS if column != name)
        originals += tuple(answer for answer in answers if answer.strip())[:1]
    return Said(system, turns, originals)


def _written(value: Any, name: str, wanted: str | None) -> Any:
    """The value, or the list that it denotes as text: any list in a column of chats or turns, else only messages."""
    if not isinstance(value, str):
        return value
    if messages := messages_in(value):
        return messages
    if name in (*CHATS, "turns") and isinstance(found := parsed(value), list):
        return found
    if (name in CHATS and name != wanted) or begins_as_messages(value):
        raise ValueError(f"column {name} holds text that is no list of messages as JSON has it")
    return value


def _with_input(row: dict[str, Any], instruction: str) -> str:
    """An instruction in Alpaca's format, joined with the input of another column if there is one."""
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"column input holds a {type(given).__name__}; a text is needed")
    return "\n\n".join(text for text in (instruction, given or "") if text.strip())


def _task(row: dict[str, Any]) -> str:
    if "task" in row:
        return str(row["task"] or "")
    category = str(row.get("category") or "")
    of_spec_bench = {"question_id", "turns"} <= row.keys()
    return "mt_bench" if of_spec_bench and category in MT_BENCH else category
