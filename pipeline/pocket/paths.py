"""Where the files of the built-in backbone and its prompts lie."""

from pathlib import Path

HOME = Path(__file__).parent


BACKBONE = HOME / "backbone"
BUILT_IN = {"pocket": BACKBONE}
"""Value of backbone.name_or_path -> the folder in this package that it stands for."""


PROMPTS = {"distill": HOME / "prompts" / "distill.jsonl", "evaluate": HOME / "prompts" / "evaluate.jsonl"}
