"""The stage `publish`: checks the best head against the gate, and writes a folder for transformers, or a draft model.

Takes eval/ and heads/exit-<N>/; writes hub/<N>/ or hub/<N>-draft/. It refuses a head that is not lossless, not faster,
or whose folder does not decode as evaluated. It pushes the folder if publish.target asks for it.
"""

from ..config import Config
from ..publishing import build, hub
from ..runs.folder import RunDir


def run(run: RunDir) -> None:
    """Write hub/<N>/ of the best head, or publish.exit_layer, and push it if asked for. Raises GateError if refused."""
    hub.publish(run, build.write(run, "head"), build.SUFFIXES["head"])


def run_draft(run: RunDir) -> None:
    """Write hub/<N>-draft/, the same head as a checkpoint that engines load as a draft model. Raises GateError if
    refused."""
    folder = build.write(run, "draft")
    print(f"draft model: {folder}")
    hub.publish(run, folder, build.SUFFIXES["draft"])


def check(config: Config) -> None:
    """Check early what a push needs. Raises UserError if nothing could be pushed."""
    hub.check(config)
