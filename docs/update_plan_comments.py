"""Writes what `exit-heads plan` says into the comments of the configs of large backbones, and into docs/planning.md.

    python docs/update_plan_comments.py

A config's comment begins with `# plan: `; the rows of memory stand in its section distill, up to the line `together`.
tests/planning/test_plan.py fails where they are not up to date.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from pipeline.cli import main
from pipeline.config import load
from pipeline.planning import memory, tables
from pipeline.planning.architecture import facts
from pipeline.stages.plan import make

ROOT = Path(__file__).resolve().parent.parent
PRINTED = re.compile(
    r"(```bash\nexit-heads (plan [^\n]*)\n```\n\n(?:```text|<!-- printed -->)\n)(.*?)(```\n|<!-- end -->\n)", re.S
)


def comments(path: Path) -> str:
    p, text = make(load(path, [])), path.read_text()
    hours = ", ".join(f"{s.name} {tables.number(s.gpu_hours)}" for s in p.stages)
    size = tables.number(p.distill.total / memory.GIB)
    first = f"# plan: {size} GiB of each GPU; a step takes {tables.number(p.step.seconds)} s; GPU-hours: {hours}\n"
    rows = [
        f"  #{tables.number(row.size / memory.GIB):>7}  {row.what}: {row.how}\n"
        for row in filter(lambda row: row.size, p.distill.rows)
    ]
    rows.append(f"  #{size:>7}  together, at the {p.distill.largest}\n")
    text = re.sub(r"^# plan: .*\n", lambda _: first, text, count=1, flags=re.M)
    return re.sub(r"(?:^  # *[\d.]+  .*\n)+", lambda _: "".join(rows), text, count=1, flags=re.M)


def printed(found: re.Match) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(shlex.split(found[2])) == 0
    return found[1] + out.getvalue() + found[4]


if __name__ == "__main__":
    os.chdir(ROOT)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if load(path, []).backbone.name_or_path in facts():
            path.write_text(comments(path))
    page = ROOT / "docs" / "planning.md"
    page.write_text(PRINTED.sub(printed, page.read_text()))
