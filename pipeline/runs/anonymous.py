"""Anonymises configs, records and results before they leave this machine: no folders, servers, hosts or credentials.

`anonymous` takes any tree of dicts, lists and texts; it gives the same tree with each path and URL cut to its last
part. Everything in W&B, model cards, training_config.yaml, provenance.json and results.json has passed through it.
"""

import re
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..config_rules import PROMPT_FILES, is_repo_id

PATHS = ("dir", "gguf_dir", "exit_head", "states", "pilot", "chat_template")
"""Keys whose values are files or folders, or a single word."""
PATHS_OR_IDS = ("name_or_path", "path", "head", "server_model")
"""Keys whose values are files, folders, or ids on the Hub."""
LICENCES = ("licence", "license", "license_link")
"""Keys whose values are meant for the public: a URL there is kept."""
SERVER = "server"
"""Replaces a server's URL, and any URL without a path."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
REMOTE = re.compile(r"[\w.-]+@[\w.-]+:(?=.)")
"""The beginning of user@host:path, as scp and git accept it."""
IN_TEXT = re.compile(r"(?<![^\s\"'=,;(\[])(?:~[\w.-]*)?/[^\s\"',;)\]]+")
"""An absolute path, or one from a home folder, within a text."""


def anonymous(value: Any, key: str = "") -> Any:
    """`value` as it may be published: only the last part of a path or URL, no server; Hub ids stay whole.

    Paths are recognised by their key and their form, whether or not they exist here. One case is ambiguous: a relative
    path of two parts, such as models/llama, looks like a Hub id and stays whole unless it exists.
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
    is_id = (
        is_repo_id(text.partition("@")[0]) and path.suffix.lower() not in (*PROMPT_FILES, ".gguf") and not path.exists()
    )
    return key in PATHS_OR_IDS and not is_id


def _without_query(text: str) -> str:
    return re.sub(r"[?#][^/]*=.*", "", text)


def _last_of_url(found: re.Match[str]) -> str:
    try:
        return Path(urlsplit(found[0]).path).name or SERVER
    except ValueError:  # unbalanced brackets
        return SERVER


def _public(found: re.Match[str]) -> str:
    """The URL without user, password, query and fragment."""
    try:
        parts = urlsplit(found[0])
    except ValueError:
        return SERVER
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
