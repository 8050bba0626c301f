"""Where the files of the built-in backbone and its prompts lie."""

from pathlib import Path

HOME = Path(__file__).parent


BACKBONE = HOME / "backbone"


PROMPTS = {"distill": HOME / "prompts" / "distill.jsonl", "evaluate": HOME / "prompts" / "evaluate.jsonl"}
