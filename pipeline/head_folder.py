"""The folder of a published head, hub/<N>/: what lies in it besides the weights.

Takes a folder and what is known of the head, gives files in it. Knows nothing of gates, of how anything was measured,
or of how a folder gets to the Hub.
"""

import json
import shutil
from pathlib import Path

from .rundir import atomic_write

CODE = Path(__file__).parent / "inference"


def write_code(folder: Path) -> None:
    """custom_generate/: the decoder, byte for byte what was evaluated."""
    code = folder / "custom_generate"
    code.mkdir()
    for file in sorted(CODE.glob("*.py")):
        shutil.copyfile(file, code / file.name)


def write_origin(folder: Path, repo_id: str | None, revision: str | None) -> None:
    """Say in custom_generate/origin.py where the weights of this folder lie: a Hub id and its tag.

    Without a Hub id the code takes the weights from the folder that holds it, as `write_code` leaves it.
    """
    docstring = (CODE / "origin.py").read_text().partition("HEAD")[0]
    values = (f"{name}: str | None = {'None' if value is None else json.dumps(value)}\n"
              for name, value in (("HEAD", repo_id), ("REVISION", revision)))  # fmt: skip
    atomic_write(folder / "custom_generate" / "origin.py", docstring + "".join(values))
