"""What may leave this machine: configs, records and results without folders, servers, hosts and what URLs may hide.

`anonymous` takes any tree of dicts, lists and texts, gives the same tree with each path and URL cut to its last part.
W&B, cards, training_config.yaml, provenance.json and results.json hold nothing that did not pass through it.
"""

import re
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..config_rules import PROMPT_FILES, is_repo_id

PATHS = ("dir", "exit_head", "states", "pilot", "chat_template")
"""Keys whose values are files or folders, or a single word."""
PATHS_OR_IDS = ("name_or_path", "path", "head", "server_model")
"""Keys whose values are files, folders, or ids on the Hub."""
LICENCES = ("licence", "license", "license_link")
"""Keys whose values are meant for the public: an address there stays."""
SERVER = "server"
"""What stands in place of a server, and of a URL that has no path."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
REMOTE = re.compile(r"[\w.-]+@[\w.-]+:(?=.)")
"""How user@host:path begins, as scp and git take it."""
IN_TEXT = re.compile(r"(?<![^\s\"'=,;(\[])(?:~[\w.-]*)?/[^\s\"',;)\]]+")
"""A path from the root or a home folder, somewhere in a text."""


def anonymous(value: Any, key: str = "") -> Any:
    """`value` as it may be published: of a path or URL only its last part, no server, ids on the Hub whole.

    A path is told by its key and by its form: it need not be there, and the current folder may be any. Only a relative
    path of two parts, such as models/llama, looks like an id on the Hub, and stays whole where it is not there.
    """
    if isinstance(value, dict):
        return {k: anonymous(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(anonymous(v, key) for v in value)
    if not isinstance(value, str):
        return value
    if key == "servers":
        return SERVER
    text = URL.sub(_public if key in LICENCES else _last_of_url, value)
    if WINDOWS.match(text):
        return PureWindowsPath(text).name
    if REMOTE.match(text) or text.startswith(("/", "~")) or (text == value and _is_path(text, key)):
        return Path(_without_query(text)).name
    return IN_TEXT.sub(lambda found: Path(found[0]).name, text)


def _is_path(text: str, key: str) -> bool:
    if key in PATHS:
        return True
    path = Path(_without_query(text))
    is_id = is_repo_id(text.partition("@")[0]) and path.suffix.lower() not in PROMPT_FILES and not path.exists()
    return key in PATHS_OR_IDS and not is_id


def _without_query(text: str) -> str:
    return re.sub(r"[?#][^/]*=.*", "", text)


def _last_of_url(found: re.Match[str]) -> str:
    try:
        return Path(urlsplit(found[0]).path).name or SERVER
    except ValueError:  # brackets that do not close
        return SERVER


def _public(found: re.Match[str]) -> str:
    """The URL without user, password, query and fragment."""
    try:
        parts = urlsplit(found[0])
    except ValueError:
        return SERVER
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
