"""Lists and messages that a file holds as text: JSON, or as Python prints them.

Takes a text, gives what is written in it. Tables and spreadsheets can hold no lists, so whoever exports a chat to one
writes it so.
"""

import ast
import json
import re
from typing import Any

BEGINNING = re.compile(r"""\s*\[?\s*\{\s*["'](role|from)["']\s*:""")


def parsed(text: str) -> Any:
    """The list or object written in the text, None for a text that is neither."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text.strip())  # literals alone: nothing in the text is run
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None


def messages_in(text: str) -> list[Any] | None:
    """The messages written in the text; None for another text, which may be a prompt about lists or objects."""
    value = parsed(text)
    messages = [value] if isinstance(value, dict) else value
    return messages if messages and all(map(is_message, messages)) else None


def begins_as_messages(text: str) -> bool:
    """Whether a text was meant as messages, although it may not be readable as such (cut off, or commas lost)."""
    return BEGINNING.match(text) is not None


def is_message(value: Any) -> bool:
    """Whether an object has a speaker and something said, as OpenAI's and ShareGPT's messages do."""
    return (
        isinstance(value, dict) and bool({"role", "from"} & value.keys()) and bool({"content", "value"} & value.keys())
    )
