"""Removes stray characters that editors and exports leave in files, such as byte order marks.

Takes a text, or a row's value of any type; gives the same without them.
"""

import re
import unicodedata
from typing import Any

NOWHERE = re.compile("[\ufeff\0]|\r(?=\n)")
"""Removed everywhere: byte order marks, NULs, and the carriage returns of Windows' line ends."""
NOT_AROUND = re.compile("^[\u200b\u2060]+|[\u200b\u2060]+$")
"""Removed around a text only: zero-width spaces and word joiners, which some scripts need between words."""


def without_marks(value: Any) -> Any:
    """The value without stray characters in its texts; lists and dicts are cleaned recursively."""
    if isinstance(value, str):
        return NOT_AROUND.sub("", NOWHERE.sub("", value))
    if isinstance(value, list):
        return [without_marks(part) for part in value]
    if isinstance(value, dict):
        return {name: without_marks(part) for name, part in value.items()}
    return value


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only white space, control and format characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)
