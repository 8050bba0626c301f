"""Gate the best head, then write the folder that transformers loads, or a draft model for other engines.

Takes eval/ and heads/exit-<N>/, gives hub/<N>/ or hub/<N>-draft/; refuses a head that is not lossless, not faster, or
not in its folder what it was when it was evaluated. Pushes the folder if publish.target asks for it.
"""

from ..config import Config
from ..publishing import build, hub
from ..runs.folder import RunDir


def run(run: RunDir) -> None:
    """hub/<N>/ of the best head, or of publish.exit_layer, pushed if asked for. Raises GateError when refused."""
    hub.publish(run, build.write(run, "head"), build.SUFFIXES["head"])


def run_draft(run: RunDir) -> None:
    """hub/<N>-draft/: the same head as a checkpoint that engines take as a draft model. Raises GateError."""
    folder = build.write(run, "draft")
    print(f"draft model: {folder}")
    hub.publish(run, folder, build.SUFFIXES["draft"])


def check(config: Config) -> None:
    """What can be known before anything is made. Raises UserError where nothing could be pushed."""
    hub.check(config)
