"""Creates the answerer that generate.engine names.

Takes a config, the end tokens and a tokenizer; gives an answerer. The model is loaded only for an answerer that runs it
in this process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config import Config
from ...errors import UserError
from ...inference.exit_head import ExitHead
from .continuous import Continuous
from .interface import Answerer
from .original import Original
from .padded import Padded
from .server import Servers
from .speculative import Speculative


def make_answerer(config: Config, load_model: Callable[[], Any], tokenizer: Any, ends: list[int]) -> Answerer:
    """The answerer that generate.engine names; `ends` are the ids that end an answer.

    Raises UserError for a head or a server setting that cannot be used.
    """
    name, pack = config.generate.engine, config.machine.pack == "auto"
    if name == "original":
        return Original(tokenizer, ends)
    if name == "server":
        has_template = config.prompts.chat_template != "none"
        draws = any(config.generate.temperatures)
        return Servers(config.machine, tokenizer, ends, chat_template=has_template, draws=draws)
    if name == "speculative":
        head = _head(config)  # checked before a large model is loaded
        try:
            return Speculative(load_model(), head, config.generate.controller, ends, pack=pack)
        except ValueError as error:
            raise UserError(f"generate.exit_head={config.generate.exit_head}: {error}") from None
    if name == "continuous":
        return Continuous(load_model(), ends)
    return Padded(load_model(), ends, pack=pack)


def _head(config: Config) -> ExitHead:
    path = config.generate.exit_head
    if path is None:
        raise UserError(
            "generate.exit_head=null: generate.engine=speculative drafts with an exit head trained before; "
            "give its folder, such as runs/NAME/heads/exit-2"
        )
    try:
        return ExitHead.load(Path(path))
    except ValueError as error:
        raise UserError(f"generate.exit_head={error}") from None
