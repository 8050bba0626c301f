"""Gate the best head and write the folder that transformers loads: weights, the decoding code, card, results.

Takes eval/ and heads/exit-<N>/, gives hub/<N>/; refuses a head that is not lossless, not faster, or not in its folder
what it was when it was evaluated. Knows nothing of how anything was measured.
"""

from ..config import Config
from ..publishing import build, hub
from ..runs.folder import RunDir


def run(run: RunDir) -> None:
    """hub/<N>/ of the best head, or of publish.exit_layer, pushed if asked for. Raises GateError when refused."""
    hub.publish(run, build.write(run, "head"), build.SUFFIXES["head"])


def check(config: Config) -> None:
    """What can be known before anything is made. Raises UserError where nothing could be pushed."""
    hub.check(config)
