"""What the README tells people to type is right: verbs, configs, keys, make targets, prompts and Python."""

import json
import re
import textwrap
from pathlib import Path

import pytest

from pipeline.cli import VERBS
from pipeline.config import load
from pipeline.prompts.sets import training_prompts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip() and not line.lstrip().startswith("#")
    for command in line.split("  #")[0].strip().split(" && ")
]


def test_commands_parse() -> None:
    ours = [c for c in COMMANDS if c.startswith("exit-heads ")]
    assert {c.split()[1] for c in ours} == set(VERBS), "every verb is shown once, and no other"
    for command in ours + [c.partition("slurm/distill.sh")[2] for c in COMMANDS if "slurm/distill.sh" in c]:
        words = command.split()
        config = ROOT / words[words.index("--config") + 1] if "--config" in words else None
        load(config, [w for w in words[1:] if "=" in w and not w.startswith("-")])


def test_packages_are_installed_at_the_versions_of_constraints() -> None:
    installs = [c for c in COMMANDS if "pip install" in c]
    assert installs and all("-c constraints.txt" in c for c in installs)


def test_the_first_screen_has_clone_install_and_demo() -> None:
    screen = "\n".join(README.splitlines()[:15])
    assert all(word in screen for word in ("git clone", "pip install", "exit-heads run --config"))


def test_the_prompts_that_are_shown_are_read_as_they_are(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, re.S)
    (tmp_path / "prompts.jsonl").write_text(block)
    config = load(ROOT / "configs/one-gpu.yaml", [f"prompts.path={tmp_path / 'prompts.jsonl'}"])
    prompts = training_prompts(config)  # all three: the hash of none puts it into the tenth that is held out
    assert {p.turns[0] for p in prompts} == {json.loads(line)["prompt"] for line in block.splitlines() if line.strip()}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_that_is_shown_compiles(code: str) -> None:
    compile(textwrap.dedent(code), "README.md", "exec")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {w for c in COMMANDS if c.startswith("make ") for w in c.split()[1:] if "=" not in w}
    assert {"demo", "test"} <= used <= targets


def test_python_commands_name_files_that_are_there() -> None:
    for command in COMMANDS:
        for word in command.split():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), command
