"""Draws docs/rooms.svg: which room of pipeline/ may import which.

Takes the table "room, may import, its job" of docs/architecture.md, which tests/test_docs.py compares with the arrows
that tests/test_architecture.py enforces; gives the picture above it: `python docs/draw_rooms.py`. An arrow is left out
where others lead to the same room, and the files config_*.py share a box with config. The same table gives the same
bytes.
"""

import re
import textwrap
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

plt.rcParams["svg.hashsalt"] = "exit-heads"  # otherwise every element gets a new random id

HERE = Path(__file__).parent
WIDTH, HEIGHT = 3.7, 0.86
# Where each room stands: column, row (0 is the top). Every arrow must lead to a lower row.
PLACES = {
    "cli": (1.0, 0), "stages": (1.0, 1), "publishing": (0.0, 2), "training": (2.0, 2), "planning": (1.0, 2),
    "evaluation": (0.5, 3), "generation": (1.0, 4), "smollm2": (2.0, 0), "prompts": (0.5, 5), "backbones": (1.5, 5),
    "inference": (2.0, 6), "pocket": (1.0, 6), "runs": (0.0, 6), "config": (1.5, 7), "launchers": (0.5, 7),
    "errors": (1.0, 8),
}  # fmt: skip
# Green: stands alone, imports nothing of the rest. Grey: what all others stand on.
COLORS = {"inference": "#d9efd9", "pocket": "#d9efd9"} | dict.fromkeys(
    ("runs", "config", "launchers", "errors"), "#e8e8e8"
)


def boxes() -> tuple[dict[str, set[str]], dict[str, str]]:
    """Box -> the boxes below it, and box -> the jobs in it, from the table in docs/architecture.md."""
    rows = re.findall(r"^\| `(\w+)` \| ([\w, -]+) \| (.+) \|$", (HERE / "architecture.md").read_text(), re.M)
    arrows: dict[str, set[str]] = {}
    jobs: dict[str, list[str]] = {}
    for room, may, job in rows:
        box = box_of(room)
        arrows[box] = arrows.get(box, set()) | {box_of(other) for other in may.split(", ")} - {"-", box}
        jobs.setdefault(box, []).append(job.replace("`", ""))
    return arrows, {box: "; ".join(parts) for box, parts in jobs.items()}


def box_of(room: str) -> str:
    return "config" if room.startswith("config_") else room


def direct(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(room: str) -> set[str]:
        return arrows[room].union(*(below(other) for other in arrows[room]))

    return [
        (room, other)
        for room, others in arrows.items()
        for other in sorted(others)
        if not any(other in below(between) for between in others)
    ]


def draw(path: Path) -> None:
    arrows, jobs = boxes()
    if arrows.keys() != PLACES.keys():
        raise SystemExit(f"give these rooms a place, or take it away: {sorted(arrows.keys() ^ PLACES.keys())}")
    x = {room: 4.1 * column for room, (column, _) in PLACES.items()}
    y = {room: -1.3 * row for room, (_, row) in PLACES.items()}
    figure, axes = plt.subplots(figsize=(12.4, 9.6))
    axes.set(xlim=(-2.0, 10.3), ylim=(-11.0, 0.6))
    axes.axis("off")
    for room, other in direct(arrows):
        if y[other] >= y[room]:
            raise SystemExit(f"the arrow {room} -> {other} does not point down: move one of them")
        start, end = (x[room], y[room] - HEIGHT / 2), (x[other], y[other] + HEIGHT / 2)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="#555555", zorder=3))
    for room, job in jobs.items():
        corner = (x[room] - WIDTH / 2, y[room] - HEIGHT / 2)
        style = "round,pad=0.02,rounding_size=0.12"
        color = COLORS.get(room, "#dbe9f6")
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=color, edgecolor="#444444"))
        axes.text(x[room], y[room] + 0.22, room, ha="center", va="center", fontsize=11, weight="bold")
        words = textwrap.fill(job, 50)
        axes.text(x[room], y[room] - 0.15, words, ha="center", va="center", fontsize=7.5)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05, metadata=metadata, dpi=100, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(HERE / "rooms.svg")
