"""The model families whose decoder layers this engine computes exactly.

Takes a model_type, raises ValueError for one that is not known.
"""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def check_family(model_type: str) -> None:
    """Raises ValueError for architectures whose layers this code does not know."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type}: not supported; these are: {', '.join(FAMILIES)}")
