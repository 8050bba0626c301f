"""The built-in tiny backbone: a deep and thin Llama trained on the Python standard library.

Takes nothing, gives the folder of a real transformers checkpoint and two prompt files, so that the
whole pipeline runs on a laptop without a network. Knows nothing of exit heads. How the weights were
made: `python -m pipeline.pocket --help`.
"""

from pathlib import Path

HOME = Path(__file__).parent
BACKBONE = HOME / "backbone"
PROMPTS = {"distill": HOME / "prompts" / "distill.jsonl", "evaluate": HOME / "prompts" / "evaluate.jsonl"}
