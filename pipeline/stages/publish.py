"""Gate the best head and write the folder that transformers loads: weights, the decoding code, card, results.

Takes eval/ and heads/exit-<N>/, gives hub/<N>/; refuses a head that is not lossless, not faster, or not in its folder
what it was when it was evaluated. Knows nothing of how anything was measured.
"""

from .. import publishing
from ..rundir import RunDir


def run(run: RunDir) -> None:
    """Write hub/<N>/ of the best head, or of publish.exit_layer. Raises GateError when the gate refuses it."""
    publishing.write(run, "head")
