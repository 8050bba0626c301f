"""Export the best head as a draft model of its own: what engines load that know nothing of exit heads.

Takes eval/ and heads/exit-<N>/, gives hub/<N>-draft/; refused by the gate as the head itself is. Knows nothing of how
anything was measured.
"""

from ..config import Config
from ..publishing import build, hub
from ..runs.folder import RunDir


def run(run: RunDir) -> None:
    """hub/<N>-draft/ of the best head, or of publish.exit_layer, pushed if asked for. Raises GateError when refused."""
    folder = build.write(run, "draft")
    print(f"draft model: {folder}")
    hub.publish(run, folder, build.SUFFIXES["draft"])


def check(config: Config) -> None:
    """What can be known before anything is made. Raises UserError where nothing could be pushed."""
    hub.check(config)
