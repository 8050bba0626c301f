"""The errors that a command ends with on purpose, each with its exit code, and warnings.

Exit code 2: the user must change something. 3: the gate refused the head. 75: another process of the stage was lost,
and the same command may be tried again (EX_TEMPFAIL of sysexits.h). cli.py prints the message and no traceback; any
other exception is a bug and shows its traceback.
"""

import sys


class UserError(Exception):
    """The user must change something: the message names the key, its value and the remedy. Exit code 2."""

    exit_code = 2


class GateError(Exception):
    """The gate refused to publish a head: the message names every condition that failed. Exit code 3."""

    exit_code = 3


class LostError(Exception):
    """Another process of this stage ended without an error of its own, or its node is down: the message names it. The
    same command goes on from the last checkpoint. Exit code 75."""

    exit_code = 75


def reason(error: BaseException, length: int = 600) -> str:
    """What another library's exception says, on one line, cut between words behind `length` characters.

    The cause stands in its first line as often as the remedy in its last.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length].rpartition(" ")[0] + " ..."


def warn(stage: str, message: str) -> None:
    """Print one line on stderr: something that the user should know and need not act on."""
    print(f"{stage}: {message}", file=sys.stderr, flush=True)
