"""What evaluate will ask of its prompts, checked before the stages in front of it have worked for hours.

Takes the config, a tokenizer and the longest text that the decoder can measure; a prompt set that evaluate would
refuse is a UserError with a remedy that costs nothing yet.
"""

import contextlib
import io
from typing import Any

from ..config import Config
from .ids import encode
from .sets import evaluation_prompts, evaluation_settings, holds_out


def check_evaluation_prompts(config: Config, tokenizer: Any, context: int, limit: str) -> None:
    """Raises UserError if the first turns do not fit, cannot be read, or none are there; later turns show only then.

    `context`: tokens of prompt and answer together, of which `limit` says what it is. With nothing held out and no
    set of its own, nothing is to be evaluated, and nothing checked.
    """
    if not holds_out(config):
        return
    with contextlib.redirect_stdout(io.StringIO()):  # evaluate will say it when it does it
        chosen = evaluation_prompts(config)[: config.evaluate.num_prompts or None]
        new = config.evaluate.max_new_tokens
        encode(chosen, tokenizer, evaluation_settings(config), context, new, stage="evaluate", limit=limit)
