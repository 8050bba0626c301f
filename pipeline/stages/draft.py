"""Export the best head as a draft model of its own: what engines load that know nothing of exit heads.

Takes eval/ and heads/exit-<N>/, gives hub/<N>-draft/; refused by the gate as the head itself is. Knows nothing of how
anything was measured.
"""

from .. import publishing
from ..rundir import RunDir


def run(run: RunDir) -> None:
    """Write hub/<N>-draft/ of the best head, or of publish.exit_layer. Raises GateError when the gate refuses it."""
    print(f"draft model: {publishing.write(run, 'draft')}")
