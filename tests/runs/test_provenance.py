"""Which git repository a record names: the package's own, or none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ASK = "from pipeline.runs.provenance import _git; import json; print(json.dumps(_git()))"
WHO = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | WHO).stdout.strip()


def asked(folder: Path, **more: str) -> str:
    """What a copy of the package in `folder` says of itself."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | more
    done = subprocess.run([sys.executable, "-P", "-c", ASK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_repository_around_the_package_is_not_its_own(tmp_path: Path, root: Path) -> None:
    """As with a wheel in a virtual environment inside a project that is under git."""
    (tmp_path / "README").write_text("somebody else's")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "README")
    git(tmp_path, "commit", "-q", "-m", "theirs")
    site = tmp_path / "venv" / "site-packages"
    for name in ("__init__.py", "runs/__init__.py", "runs/provenance.py"):
        (site / "pipeline" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "pipeline" / name, site / "pipeline" / name)
    nothing = '{"git": null, "git_dirty": null}'
    assert asked(site) == nothing
    assert asked(site, GIT_DIR=str(tmp_path / ".git"), GIT_WORK_TREE=str(site)) == nothing, "as in a hook of git's"
    git(site, "add", ".")
    git(site, "commit", "-q", "-m", "now it is tracked")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / ".gitignore").write_text("*\n")
    assert asked(site) == f'{{"git": "{head}", "git_dirty": false}}'
    assert asked(site, GIT_DIR="/nowhere") == f'{{"git": "{head}", "git_dirty": false}}'
    (site / "pipeline" / "__init__.py").write_text("# changed")
    assert asked(site) == f'{{"git": "{head}", "git_dirty": true}}'
    assert asked(site, PATH="/nowhere") == nothing
