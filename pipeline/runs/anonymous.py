"""The config as it may be published: without folders of this machine.

Takes a resolved config, gives the same with local paths cut to their last part; W&B, cards and published folders
hold nothing else of it.
"""

import difflib
import json
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ..errors import UserError
from ..config_rules import PROMPT_FILES, is_repo_id


# Of the keys below, for what is told to others.
PATHS = ("dir", "exit_head", "states", "pilot", "chat_template")
"""Keys whose values are files or folders, or a single word."""


PATHS_OR_IDS = ("name_or_path", "path", "head", "server_model")
"""Keys whose values are that too, or ids on the Hub."""


def without_folders(value: Any, key: str = "") -> Any:
    """The config as it may be published: of a path on this machine only its last part, ids on the Hub whole.

    Told by the key and by the form of the value: what is named need not be there, and the current folder may be any.
    Only a folder of two parts, such as models/llama, looks like an id, and stays whole where it is not there.
    """
    if isinstance(value, dict):
        return {k: without_folders(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_folders(v, key) for v in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    is_id = is_repo_id(value.partition("@")[0]) and path.suffix not in PROMPT_FILES and not path.exists()
    is_path = key in PATHS or (key in PATHS_OR_IDS and not is_id) or path.is_absolute() or value.startswith("~")
    return path.name if is_path else value
