"""Splits the standard library of CPython 3.11 into training text and held-out modules for the pocket backbone.

`modules` takes the library's folder and gives the text of its files by role: `train`, `distill` (source of the prompts
for distillation) and `evaluate` (source of the evaluation prompts, and held-out loss). corpus.sha256 records the hash
of every file, and other sources are refused.
"""

import hashlib
import sysconfig
from pathlib import Path

from .paths import HOME

MANIFEST = HOME / "corpus.sha256"
PYTHON = "3.11.7"

# Left out: tests, bundled wheels, and folders that are tables of numbers or prose rather than code.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "ensurepip", "encodings", "pydoc_data"}

# Held out by name. No file of these two lists is ever trained on.
HELD_OUT = {
    "distill": """argparse.py asyncio/streams.py bdb.py bisect.py calendar.py cmd.py configparser.py csv.py
        difflib.py email/message.py filecmp.py fileinput.py glob.py heapq.py http/client.py imaplib.py ipaddress.py
        json/decoder.py json/encoder.py logging/config.py mailbox.py plistlib.py pstats.py queue.py sched.py
        shelve.py shlex.py shutil.py smtplib.py socketserver.py statistics.py string.py tarfile.py tempfile.py
        textwrap.py timeit.py tkinter/ttk.py trace.py turtle.py unittest/mock.py urllib/robotparser.py
        xml/dom/minidom.py xmlrpc/client.py zipfile.py""".split(),
    "evaluate": """_weakrefset.py cgi.py concurrent/futures/thread.py contextlib.py copy.py datetime.py fractions.py
        ftplib.py functools.py gzip.py http/cookies.py multiprocessing/pool.py netrc.py random.py symtable.py
        traceback.py uuid.py wave.py weakref.py wsgiref/handlers.py""".split(),
}


def modules(stdlib: Path | None = None, *, check: bool = True) -> dict[str, dict[str, str]]:
    """Role -> {path relative to the library: source text}.

    Raises ValueError when a file is missing or differs from the manifest, with the remedy.
    """
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, str]] = {"train": {}, "distill": {}, "evaluate": {}}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        generated = name.parts[0].startswith("config-") or name.name.startswith("_sysconfigdata")
        if generated or SKIPPED_FOLDERS & set(name.parts[:-1]):
            continue
        role = next((r for r, names in HELD_OUT.items() if name.as_posix() in names), "train")
        found[role][name.as_posix()] = path.read_text("utf-8")
    if check:
        _check(found, root)
    return found


def write_manifest(found: dict[str, dict[str, str]]) -> None:
    """Record `sha256  role  path` of every file, sorted by path."""
    lines = [f"{_sha(text)}  {role:8}  {name}" for role, files in found.items() for name, text in files.items()]
    MANIFEST.write_text(f"# CPython {PYTHON}, Lib/\n" + "\n".join(sorted(lines, key=lambda x: x.split()[2])) + "\n")


def _check(found: dict[str, dict[str, str]], root: Path) -> None:
    expected = {line.split()[2]: line.split()[0] for line in MANIFEST.read_text().splitlines()[1:]}
    present = {name: _sha(text) for files in found.values() for name, text in files.items()}
    wrong = sorted(n for n in expected.keys() | present.keys() if expected.get(n) != present.get(n))
    if wrong:
        raise ValueError(
            f"stdlib={root}: {len(wrong)} files differ from {MANIFEST.name}, the first is {wrong[0]}. "
            f"Give the Lib/ folder of CPython {PYTHON} with --stdlib."
        )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
