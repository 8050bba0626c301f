"""Characters that editors and exports leave in files and nobody means: taken out before a text is used.

Takes a text, or whatever a row holds, gives the same without them.
"""

import re
import unicodedata
from typing import Any

NOWHERE = re.compile("[\ufeff\0]|\r(?=\n)")
"""Byte order marks, NULs and the carriage returns of Windows' line ends mean nothing anywhere."""
NOT_AROUND = re.compile("^[\u200b\u2060]+|[\u200b\u2060]+$")
"""Zero-width spaces and word joiners: some scripts need them between words, none around a text."""


def without_marks(value: Any) -> Any:
    """A text without them; of lists and objects, every text in them."""
    if isinstance(value, str):
        return NOT_AROUND.sub("", NOWHERE.sub("", value))
    if isinstance(value, list):
        return [without_marks(part) for part in value]
    if isinstance(value, dict):
        return {name: without_marks(part) for name, part in value.items()}
    return value


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: white space, control and format characters alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)
