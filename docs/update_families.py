"""Writes the table of docs/families.md: which model families are decoded how, and what the tests prove of each.

    python docs/update_families.py

The lists come from tests/family_cases.py, by which the tests themselves are parametrised; tests/inference/
test_families.py fails where the table is not up to date.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
sys.path.insert(0, str(ROOT / "tests"))

import family_cases as cases  # noqa: E402

HEADER = ["model_type", "layers", "dense head", "whole road", "draft export"]
REAL = {"llama": "SmolLM2-135M", "gemma3_text": "Gemma 3 270M"}
"""Families of which a pretrained model went the whole road."""


def row(family: str) -> list[str]:
    whole = "yes" if family in [*cases.OWN, *cases.WHOLE] else ""
    export = "refused" if family in cases.MIXTURES else whole
    dense = "yes" if family in cases.MIXTURES else "refused"
    if family in cases.DENSE_WHOLE:
        dense = "yes, whole road"
    if family in REAL:
        whole += f", {REAL[family]} too"
    layers = "own" if family in cases.OWN else "transformers'"
    return [family, layers, dense, whole, export]


def table() -> str:
    families = sorted(cases.ALL, key=lambda family: (family not in cases.OWN, family))
    lines = [HEADER, ["---"] * len(HEADER), *map(row, families)]
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def refused() -> str:
    rows = "".join(f"| {family} | {why} |\n" for family, why in cases.REFUSED.items())
    return f"| model_type | its refusal says |\n| --- | --- |\n{rows}"


def page(text: str) -> str:
    tables = iter((table(), refused()))
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{next(tables)}{END}", text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
