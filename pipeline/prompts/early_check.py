"""Checks evaluate's prompts early, before the earlier stages have worked for hours.

Takes the config, a tokenizer and the context length. A prompt set that evaluate would refuse raises UserError while the
remedy still costs nothing.
"""

import contextlib
import io
from typing import Any

from ..config import Config
from .ids import encode
from .sets import evaluation_prompts, evaluation_settings, holds_out


def check_evaluation_prompts(config: Config, tokenizer: Any, context: int) -> None:
    """Raises UserError if evaluate's prompts cannot be read, if there are none, or if a first turn is too long.

    `context`: the most tokens of prompt and answer together. Later turns cannot be
    checked yet, as they follow the backbone's answers. Nothing is checked if the config has no prompts to evaluate on.
    """
    if not holds_out(config):
        return
    with contextlib.redirect_stdout(io.StringIO()):  # evaluate will print these lines itself
        chosen = evaluation_prompts(config)[: config.evaluate.num_prompts or None]
        new = config.evaluate.max_new_tokens
        encode(chosen, tokenizer, evaluation_settings(config), context, new, stage="evaluate")
