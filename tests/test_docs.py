"""What the documents say of the tree is true: named files exist, links lead somewhere, rooms are as enforced."""

import re
from pathlib import Path

import pytest
from test_architecture import ARROWS, SOURCES

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = ("benchmarks", "configs", "docs", "integrations", "notebooks", "pipeline", "slurm", "tests")
FILES = [f"/{p.relative_to(ROOT).as_posix()}" for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
# Files that a user writes, or that lie in a published folder or in another project.
ELSEWHERE = {"my.yaml", "own.jinja", "config.yaml", "training_config.yaml", "custom_generate/origin.py",
             "convert_hf_to_gguf.py"}  # fmt: skip


def anchors(path: Path) -> set[str]:
    """The names by which GitHub links to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_of_the_tree() -> set[str]:
    """The files of pipeline/ that stand in the tree of docs/architecture.md, by their indentation."""
    (tree,) = re.findall(r"^pipeline/\n(.*?)^configs/", ARCHITECTURE, re.M | re.S)
    folders, found = ["pipeline"], set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(folders))
    return found


def test_every_file_that_answers_a_question_is_there() -> None:
    section = ARCHITECTURE.partition("## Where is ...?")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", section, re.M)
    assert len(rows) == 20
    for question, answer in rows:
        files = re.findall(r"`([^`]+)`", answer)
        assert files and all((ROOT / file).is_file() for file in files), question


def test_the_tree_has_every_file_of_the_pipeline() -> None:
    there = {p.relative_to(ROOT).as_posix() for p in SOURCES if not p.name.startswith("__")}
    assert files_of_the_tree() == there, "docs/architecture.md, Rooms: a line for every file"


def test_the_table_of_rooms_has_the_arrows_that_are_enforced() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w, -]+) \|", ARCHITECTURE, re.M)
    written = {room: set(may.split(", ")) - {"-"} for room, may in rows}
    assert written == {room: may for room, may in ARROWS.items() if not room.startswith("__")}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if not file.startswith("https://"):
            there = path.parent / file if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path: Path) -> None:
    """A path may be shortened from its left end: inference/layers.py, or layers.py."""
    pattern = r"(?<![\w/.*<>-])((?:[\w-]+/)*[\w-]+\.(?:py|yaml|jinja|ipynb|sh))(?![\w/*])"
    named = set(re.findall(pattern, path.read_text())) - ELSEWHERE
    assert not sorted(name for name in named if not any(file.endswith(f"/{name}") for file in FILES))
