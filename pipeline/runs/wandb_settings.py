"""Resolves W&B's settings from the config, environment variables and W&B's own settings files.

Takes the `wandb` section of the config; gives mode, project, entity and folders. A key of the config wins over WANDB_*
variables, these over ./wandb/settings, that over ~/.config/wandb/settings, as with arguments of wandb.init. An empty
variable counts as unset. W&B is not imported.
"""

import configparser
import netrc
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from ..config import Wandb
from ..errors import warn

PROJECT = "exit-heads"
MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
         "disabled": "disabled"}  # fmt: skip
FOLDERS = {"WANDB_DIR": ".", "WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts"}
"""Variables that say where W&B writes -> the folder inside <run>/wandb that is used if the user sets none."""

OURS = "EXIT_HEADS_WANDB_FOLDER"
"""Variable with the folder that `set_folders` last used, in this process or its parent: not the user's choice."""


class InitArguments(NamedTuple):
    """Arguments for wandb.init; None leaves W&B's own default."""

    mode: str
    project: str
    entity: str | None
    base_url: str | None


def init_arguments(config: Wandb) -> InitArguments:
    settings = _settings()
    return InitArguments(
        wandb_mode(config),
        config.project or settings.get("project") or PROJECT,
        config.entity or settings.get("entity"),
        settings.get("base_url"),
    )


def wandb_mode(config: Wandb) -> str:
    """The mode: online, offline or disabled.

    `auto` is the mode of WANDB_DISABLED, WANDB_MODE or a settings file, else online if there is an API key
    (WANDB_API_KEY, a login in netrc), else offline.
    """
    if config.mode != "auto":
        return config.mode
    settings = _settings()
    if settings.get("disabled", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    if mode := settings.get("mode"):
        if mode not in MODES:
            warn("wandb", f"mode {mode} of WANDB_MODE or a settings file is not known; nothing is sent (offline)")
        return MODES.get(mode, "offline")
    has_key = any(settings.get(name) for name in ("api_key", "identity_token_file"))
    return "online" if has_key or _netrc_login(settings.get("base_url", "https://api.wandb.ai")) else "offline"


def wandb_root(folder: Path) -> Path:
    """The folder below which W&B puts the files of a run: the user's WANDB_DIR, else `folder`."""
    return Path(_given("WANDB_DIR") or folder).expanduser()


def set_folders(folder: Path) -> None:
    """Make W&B write all its files inside `folder`, except where the user's variables name other places."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value.strip()]:
        del os.environ[name]  # W&B would use the empty text as a value
    ours = {name: (folder / part).resolve() for name, part in FOLDERS.items() if not _given(name)}
    for name, path in ours.items():
        path.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(path)
    os.environ[OURS] = str(folder.resolve())


def _given(name: str) -> str | None:
    """The value of a variable that the user has set; None if it is unset or was set by `set_folders`."""
    value, ours = os.environ.get(name, "").strip(), os.environ.get(OURS)
    is_ours = ours is not None and name in FOLDERS and Path(value) == Path(ours) / FOLDERS[name]
    return value if value and not is_ours else None


def _settings() -> dict[str, str]:
    """Setting -> value, from the settings files and the WANDB_<NAME> variables."""
    root = Path(_given("WANDB_DIR") or ".").expanduser()
    local = root / (".wandb" if (root / ".wandb").exists() else "wandb") / "settings"
    shared = Path(_given("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    names = ("mode", "disabled", "project", "entity", "base_url", "api_key", "identity_token_file")
    variables = {name: value for name in names if (value := _given(f"WANDB_{name.upper()}"))}
    return _read(shared) | _read(local) | variables


def _read(path: Path) -> dict[str, str]:
    """The settings in one of W&B's files; {} if the file does not exist or cannot be read."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read(path)
        return {name: value for name, value in parser["default"].items() if value}
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        return {}


def _netrc_login(base_url: str) -> bool:
    host = urlparse(base_url).hostname or ""
    path = os.environ.get("NETRC")
    for candidate in [path] if path else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(os.path.expanduser(candidate)).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
