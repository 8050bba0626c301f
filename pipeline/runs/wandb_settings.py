"""What W&B is told by its own means, and obeys: environment variables first, then its settings files.

Takes the `wandb` section of the config, gives mode, project, entity and folders. A key of the config wins over WANDB_*
variables, these over ./wandb/settings, that over ~/.config/wandb/settings, as with arguments of wandb.init. An empty
variable counts as one that is not set. W&B is not imported.
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
"""Variables that say where W&B writes -> folder inside <run>/wandb, where the user names none."""

OURS = "EXIT_HEADS_WANDB_FOLDER"
"""Variable that holds the folder whose parts were set here, for an earlier run of this process or of its parent."""


class Told(NamedTuple):
    """For wandb.init. None: W&B's own default."""

    mode: str
    project: str
    entity: str | None
    base_url: str | None


def told(config: Wandb) -> Told:
    settings = _settings()
    return Told(
        wandb_mode(config),
        config.project or settings.get("project") or PROJECT,
        config.entity or settings.get("entity"),
        settings.get("base_url"),
    )


def wandb_mode(config: Wandb) -> str:
    """online, offline or disabled. `auto`: what WANDB_DISABLED, WANDB_MODE or a settings file says, else online if a
    key can be found without asking for one (WANDB_API_KEY, a login in netrc)."""
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
    """The folder below which W&B puts the files of a run: `folder`, or what the user's WANDB_DIR says."""
    return Path(_given("WANDB_DIR") or folder).expanduser()


def set_folders(folder: Path) -> None:
    """Keep every file that W&B writes inside `folder`, except where a variable of the user's names another place."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value.strip()]:
        del os.environ[name]  # W&B would take the empty text for a value
    ours = {name: (folder / part).resolve() for name, part in FOLDERS.items() if not _given(name)}
    for name, path in ours.items():
        path.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(path)
    os.environ[OURS] = str(folder.resolve())


def _given(name: str) -> str | None:
    """What a variable says, if the user set it and not `set_folders`."""
    value, ours = os.environ.get(name, "").strip(), os.environ.get(OURS)
    is_ours = ours is not None and name in FOLDERS and Path(value) == Path(ours) / FOLDERS[name]
    return value if value and not is_ours else None


def _settings() -> dict[str, str]:
    """Name -> value of what the settings files and WANDB_<NAME> say."""
    root = Path(_given("WANDB_DIR") or ".").expanduser()
    local = root / (".wandb" if (root / ".wandb").exists() else "wandb") / "settings"
    shared = Path(_given("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    names = ("mode", "disabled", "project", "entity", "base_url", "api_key", "identity_token_file")
    variables = {name: value for name in names if (value := _given(f"WANDB_{name.upper()}"))}
    return _read(shared) | _read(local) | variables


def _read(path: Path) -> dict[str, str]:
    """The settings in a file of W&B's; a file that is not there or cannot be read says nothing."""
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
