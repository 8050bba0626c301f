"""The import arrows of docs/architecture.md, read from the source by AST: nothing is imported to check them.

A room is a folder (or file) right under pipeline/. Arrows point down only, so no room can come to depend on one
that depends on it; the files of inference/ are held to what lets them be published as they are.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pipeline"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Room -> the rooms it may import. A new room is added here and to docs/architecture.md, on purpose.
FOUNDATION = {"config", "config_rules", "errors", "launchers"}
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"stages", "publishing", "evaluation", "generation", "runs", "config_help", "config_words"}
    | FOUNDATION,
    "stages": {"publishing", "evaluation", "training", "generation", "prompts", "backbones", "inference", "planning",
               "runs"} | FOUNDATION,
    "publishing": {"evaluation", "generation", "backbones", "inference", "runs"} | FOUNDATION,
    "evaluation": {"generation", "prompts", "inference", "runs"} | FOUNDATION,
    "planning": {"evaluation", "inference", "config", "errors"},
    "training": {"generation", "backbones", "inference", "runs", "config", "errors", "launchers"},
    "generation": {"prompts", "backbones", "inference", "runs", "config", "errors"},
    "prompts": {"pocket", "runs"} | FOUNDATION,
    "backbones": {"inference", "pocket", "runs", "config", "errors"},
    "inference": set(),
    "pocket": set(),
    "smollm2": {"stages", "publishing", "generation", "inference", "backbones", "runs", "config", "errors"},
    "runs": FOUNDATION,
    "config_help": {"config", "config_paths"},
    "config": {"config_paths", "config_rules", "config_sections", "config_words", "errors"},
    "config_sections": {"errors"},
    "config_paths": {"errors"},
    "config_rules": {"errors"},
    "config_words": {"errors"},
    "launchers": {"errors"},
    "errors": set(),
}  # fmt: skip

# One noun, one file: these names belong to stages/, where a file is a verb.
VERBS = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}

# `exit-heads --help` and a mistyped key must answer at once: no import at the top of these that takes seconds.
QUICK_TO_IMPORT = [PACKAGE / f"{name}.py" for name in (
    "__init__", "__main__", "cli", "config", "config_help", "config_paths", "config_rules",
    "config_sections", "config_words", "errors",
    "launchers", "runs/folder", "runs/files", "runs/provenance"
)]  # fmt: skip
HEAVY = {"torch", "transformers", "lightning", "datasets", "accelerate", "wandb", "matplotlib", "pandas", "pyarrow"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """(absolute dotted name, statement) of everything that a file imports; relative names are resolved."""
    tree = ast.parse(path.read_text(), str(path))
    here = path.relative_to(ROOT).parts[:-1]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield ".".join([*base, *filter(None, [node.module]), alias.name]), node


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    for name, node in imports(path):
        parts = name.split(".")
        if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in ARROWS:
            yield parts[1], node.lineno


def test_every_room_has_its_arrows_written_down() -> None:
    rooms = {room_of(p) for p in SOURCES}
    assert rooms <= ARROWS.keys(), f"no arrows for {sorted(rooms - ARROWS.keys())}: add them to ARROWS and the docs"


def test_a_verb_names_one_file_only() -> None:
    twins = [p.relative_to(ROOT).as_posix() for p in SOURCES if p.stem in VERBS and p.parent.name != "stages"]
    assert not twins, f"also a verb in stages/: {twins}"


def test_no_file_is_longer_than_four_screens() -> None:
    long = {p.relative_to(ROOT).as_posix(): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines, split them: {long}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_a_package_says_what_it_is_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) <= 1, f"{path.relative_to(ROOT)}: an __init__ holds a docstring only; import from the files"


def test_the_arrows_written_down_have_no_circle() -> None:
    resolved: set[str] = set()
    while left := {room for room in ARROWS if room not in resolved}:
        ready = {room for room in left if ARROWS[room] <= resolved}
        assert ready, f"circle among {sorted(left)}"
        resolved |= ready


def test_arrows_point_down_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in SOURCES
        for target, line in rooms_imported(path)
        if target not in ARROWS.get(room_of(path), set()) | {room_of(path)}
    ]
    assert not wrong, "\n".join(wrong)


def test_stages_never_import_each_other() -> None:
    stages = {p.stem for p in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for path in (PACKAGE / "stages").glob("*.py")
        for name, node in imports(path)
        if name.startswith("pipeline.stages.") and name.split(".")[2] in stages
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted((PACKAGE / "inference").glob("*.py")), ids=lambda p: p.name)
def test_inference_can_be_published_as_it_is(path: Path) -> None:
    """transformers' loader of custom_generate follows `from .sibling import name` on one line, and nothing else."""
    siblings = {p.stem for p in path.parent.glob("*.py")} | {"origin"}  # origin.py is generated beside them
    for name, node in imports(path):
        where = f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{where}: only siblings can be imported"
            assert node.module in siblings, f"{where}: write `from .sibling import name`"
            assert node.lineno == node.end_lineno, f"{where}: the loader reads one line per import"
        else:
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or top in {"torch", "transformers", "safetensors"}
            assert allowed, f"{where}: {top} is not installed where the head is used"


def test_inference_is_one_flat_folder() -> None:
    assert not [p for p in (PACKAGE / "inference").rglob("*.py") if p.parent != PACKAGE / "inference"]


def test_help_and_config_errors_wait_for_nothing_heavy() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for path in SOURCES
        if path in QUICK_TO_IMPORT
        for name, node in imports(path, top_level_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_every_third_party_import_is_a_declared_dependency() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[<>=!~\[; ]", line)[0].lower().replace("-", "_") for line in lines}
    known = (declared - {"pyyaml"}) | {"yaml", "pipeline"} | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for path in SOURCES
        for name, node in imports(path)
        if name.split(".")[0].lower() not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    names = {name.lower().replace("_", "-") for name in pins}
    missing = [d for d in wanted if re.split(r"[<>=!~\[; ]", d)[0].lower().replace("_", "-") not in names]
    assert not missing
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", v) for v in pins.values()), "a local or direct version cannot be shared"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_module_says_first_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{path.relative_to(ROOT)} needs an opening docstring"
