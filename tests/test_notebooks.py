"""The notebooks teach by what they do: stripped in git, in small steps, and each runs from beginning to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 16  # lines


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def test_both_are_there() -> None:
    assert [p.name for p in NOTEBOOKS] == ["tour.ipynb", "use_a_head.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_nothing_of_a_run_is_in_git(notebook: Path) -> None:
    for cell in cells(notebook):
        assert not cell["metadata"], (
            "jupyter nbconvert --clear-output --ClearMetadataPreprocessor.enabled=True --inplace"
        )
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_small_steps_each_after_a_word_on_it(notebook: Path) -> None:
    kinds = [cell["cell_type"] for cell in cells(notebook)]
    assert kinds[0] == "markdown" and kinds.count("markdown") * 2 >= kinds.count("code")
    assert all(len(cell["source"]) <= LONGEST_CELL for cell in cells(notebook) if cell["cell_type"] == "code")


def test_using_a_head_needs_only_torch_and_transformers() -> None:
    code = "".join(
        "".join(c["source"]) + "\n" for c in cells(ROOT / "notebooks" / "use_a_head.ipynb") if c["cell_type"] == "code"
    )
    imported = {line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"torch", "transformers", *sys.stdlib_module_names}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs(notebook: Path, pocket_run: Path) -> None:
    head = pocket_run / "hub" / "2"
    environment = os.environ | {
        "EXIT_HEADS_RUN": str(pocket_run), "EXIT_HEADS_HEAD": str(head), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(notebook)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:]
