"""The ways a run may end on purpose: the user must change something (2), the gate said no (3), another process is gone
(75, which sysexits.h has for "try again").

Anything else that is raised is a bug and shows its traceback. Knows nothing of who raises or who catches.
"""

import sys


class UserError(Exception):
    """A mistake of the user's: the message names the key, its value and the remedy. Exit code 2."""

    exit_code = 2


class GateError(Exception):
    """A head that must not be published: the message names every line of the gate that failed. Exit code 3."""

    exit_code = 3


class LostError(Exception):
    """Another process of this stage is gone without a word, or its node is: the message names it. Exit code 75."""

    exit_code = 75


def warn(stage: str, message: str) -> None:
    """One line on stderr, for what the user should know and need not act on."""
    print(f"{stage}: {message}", file=sys.stderr, flush=True)


def reason_of(error: BaseException, length: int = 400) -> str:
    """What another library says went wrong, in one line: all of it up to `length` characters, cut between words.

    Libraries put the cause in the first line as often as in the last."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length].rpartition(" ")[0] + " ..."
