"""The corpus of evaluate: a text file from which controllers with `+memory` copy drafts, before any text is measured.

Takes the evaluate section and a tokenizer; gives token ids.
"""

from pathlib import Path
from typing import Any

from ..config import Evaluate
from ..errors import UserError
from ..inference.controllers import remembers


def check(config: Evaluate) -> None:
    """Raises UserError where a corpus or a memory cannot be used."""
    remembering = [name for name in config.controllers if remembers(name)]
    if remembering and config.repeats > 1:
        raise UserError(
            f"evaluate.repeats={config.repeats}: {remembering[0]} would copy from its own earlier answer to the same "
            "prompt; give evaluate.repeats=1"
        )
    if config.corpus is None:
        return
    if not remembering:
        raise UserError(
            f"evaluate.corpus={config.corpus}: no controller copies from it; name one that ends in +memory in "
            "evaluate.controllers"
        )
    if not Path(config.corpus).is_file():
        raise UserError(f"evaluate.corpus={config.corpus}: no such file; give a text file in UTF-8")


def read(config: Evaluate, tokenizer: Any) -> list[int]:
    """The ids of the corpus; none without one. Raises UserError for a file that is no text or an empty one."""
    if config.corpus is None:
        return []
    try:
        text = Path(config.corpus).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluate.corpus={config.corpus}: not a text file in UTF-8: {error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise UserError(f"evaluate.corpus={config.corpus}: it is empty; give a text file, or null")
    return list(ids)
