"""Parses lists and messages that a file holds as text: JSON, or Python's notation.

Takes a text; gives the list or object in it. Tables and spreadsheets cannot hold lists, so chats are exported to them
in this form.
"""

import ast
import json
import re
from typing import Any

BEGINNING = re.compile(r"""\s*\[?\s*\{\s*["'](role|from)["']\s*:""")


def parsed(text: str) -> Any:
    """The list or object that the text denotes; None if it denotes neither."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text.strip())  # it accepts literals only and runs no code
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None


def messages_in(text: str) -> list[Any] | None:
    """The messages that the text denotes; None for any other text, such as a prompt about lists or objects."""
    value = parsed(text)
    messages = [value] if isinstance(value, dict) else value
    return messages if messages and all(map(is_message, messages)) else None


def begins_as_messages(text: str) -> bool:
    """Whether a text begins like messages, even if it cannot be parsed (cut off, or without its commas)."""
    return BEGINNING.match(text) is not None


def is_message(value: Any) -> bool:
    """Whether an object has a role and a content, as OpenAI's and ShareGPT's messages do."""
    return (
        isinstance(value, dict) and bool({"role", "from"} & value.keys()) and bool({"content", "value"} & value.keys())
    )
