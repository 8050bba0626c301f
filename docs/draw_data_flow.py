"""Draws docs/data_flow.svg: who writes which file of the run folder, and who reads it.

Takes nothing, gives the picture of docs/architecture.md: `python docs/draw_data_flow.py`. The same bytes every
time, so a change of the picture is a change of this file.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

plt.rcParams["svg.hashsalt"] = "exit-heads"  # else every element gets a new random id

STAGE, FILES, OUTSIDE = "#dbe9f6", "#fdf3d8", "#e8e8e8"
STAGES = ["generate", "distill", "evaluate", "publish"]
DOES = [
    "the backbone answers\nthe prompts",
    "one head per exit layer\nlearns the answers",
    "lossless? how much\nfaster, and when?",
    "passes the gate,\npacks the head",
]
WRITES = [
    "responses/\nshard-*.parquet\nmanifest.json",
    "heads/exit-<N>/\ncheckpoints/\nmetrics.jsonl",
    "eval/*.parquet\neval/results.json\nreport/",
    "hub/<N>/\nweights, card, results,\ncustom_generate/",
]
X = [1.7, 5.0, 8.3, 11.6]
HIGH, MIDDLE, LOW = 5.1, 3.45, 1.35


def box(axes, x: float, y: float, text: str, color: str, width: float = 2.4, height: float = 1.0) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor="#444444", zorder=3)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=4)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#444444", connectionstyle=style)
    )


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(13.4, 5.8))
    axes.set(xlim=(0, 13.4), ylim=(-0.1, 5.6))
    axes.axis("off")

    folder = FancyBboxPatch(
        (0.2, 0.05), 13.0, 2.25, boxstyle="round,pad=0.02", facecolor="none", linestyle="--", edgecolor="#777777"
    )
    axes.add_patch(folder)
    axes.text(0.4, 0.22, "runs/<name>/", fontsize=10, family="monospace", va="center")
    marks = "config.yaml   run.json   stages/<stage>.json (begun or done, of which config and inputs)"
    axes.text(12.95, 0.22, marks, fontsize=8, ha="right", va="center", color="#444444")

    outside = ["prompts", "frozen backbone", "held-out prompts", "transformers: generate(\ncustom_generate=...)"]
    for x, text in zip(X, outside, strict=True):
        box(axes, x, HIGH, text, OUTSIDE, height=0.7)
    for x, stage, does, writes in zip(X, STAGES, DOES, WRITES, strict=True):
        box(axes, x, MIDDLE, "", STAGE, height=1.1)
        axes.text(x, MIDDLE + 0.28, stage, ha="center", va="center", fontsize=11, weight="bold", zorder=4)
        axes.text(x, MIDDLE - 0.17, does, ha="center", va="center", fontsize=8.5, zorder=4)
        box(axes, x, LOW, writes, FILES)
        arrow(axes, (x, MIDDLE - 0.57), (x, LOW + 0.53))
    for x in X[:-1]:  # each stage reads what the one before it wrote
        arrow(axes, (x + 1.22, LOW + 0.2), (x + 3.3 - 0.9, MIDDLE - 0.57))
    joins = (X[2] + 1.57, LOW + 0.2 + 0.35 * (MIDDLE - 0.77 - LOW) / 1.18)  # publish packs the head itself
    axes.plot([5.7, 5.7, joins[0], joins[0]], [LOW - 0.53, 0.55, 0.55, joins[1]], color="#444444", linewidth=1)
    arrow(axes, (X[0], HIGH - 0.37), (X[0], MIDDLE + 0.57))
    arrow(axes, (X[1] - 1.22, HIGH - 0.1), (X[0] + 0.7, MIDDLE + 0.57))
    arrow(axes, (X[1], HIGH - 0.37), (X[1], MIDDLE + 0.57))
    arrow(axes, (X[1] + 1.22, HIGH - 0.1), (X[2] - 0.7, MIDDLE + 0.57))
    arrow(axes, (X[2], HIGH - 0.37), (X[2], MIDDLE + 0.57))
    arrow(axes, (12.82, LOW + 0.2), (12.6, HIGH - 0.42), bend=0.22)

    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05, metadata=metadata, dpi=120, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("data_flow.svg"))
