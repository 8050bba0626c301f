"""What the README tells people to type exists: every verb, config and key, every make target, every linked file."""

import re
from pathlib import Path

from pipeline.cli import VERBS
from pipeline.config import load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_commands_parse() -> None:
    ours = [c for c in COMMANDS if "exit-heads " in c]
    assert ours
    for command in ours:
        words = command.split("exit-heads ", 1)[1].split()
        assert words[0] in VERBS, command
        config = ROOT / words[words.index("--config") + 1] if "--config" in words else None
        load(config, [w for w in words[1:] if "=" in w and not w.startswith("-")])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {w for c in COMMANDS if c.startswith("make ") for w in c.split()[1:] if "=" not in w}
    assert {"demo", "test"} <= used <= targets


def test_python_commands_name_files_that_are_there() -> None:
    for command in COMMANDS:
        for word in command.split():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), command


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
