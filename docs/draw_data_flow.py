"""Draws docs/data_flow.svg: the stages, and who reads and writes which file of the run folder.

Takes nothing, gives the picture in README.md and docs/architecture.md: `python docs/draw_data_flow.py`. It writes the
same bytes every time, so a change of the picture is a change of this file.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

plt.rcParams["svg.hashsalt"] = "exit-heads"  # otherwise every element gets a new random id

STAGE, FILES, OUTSIDE = "#dbe9f6", "#fdf3d8", "#e8e8e8"
STAGES = ["generate", "cache", "pilot", "distill", "evaluate", "publish"]
DOES = [
    "the backbone answers\nthe prompts",
    "optional: keeps the\nteacher's hidden states",
    "optional: chooses N by\nshort heads, measured",
    "one head per exit layer\nlearns from the answers",
    "is it lossless,\nand how much faster?",
    "gate, then the folder\nthat others load",
]
WRITES = [
    "responses/\nshard-*.parquet\nmanifest.json",
    "cache/\nshard-*.safetensors\nmanifest.json",
    "pilot/heads/exit-<N>/\npilot/choice.json",
    "heads/exit-<N>/\ncheckpoints/\nmetrics.jsonl",
    "eval/*.parquet\neval/results.json\nreport/",
    "hub/<N>/\nweights, card, results,\ncustom_generate/",
]
X = [1.6, 4.5, 7.4, 10.3, 13.2, 16.1]
STEP, WIDTH = 2.9, 2.3
HIGH, MIDDLE, LOW = 5.1, 3.45, 1.35


def box(axes, x: float, y: float, text: str, color: str, width: float = WIDTH, height: float = 1.0, line="-") -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=style, facecolor=color, edgecolor="#444444", linestyle=line, zorder=3
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=4)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#444444", connectionstyle=style)
    )


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(17.9, 5.8))
    axes.set(xlim=(0, 17.9), ylim=(-0.1, 5.6))
    axes.axis("off")

    folder = FancyBboxPatch(
        (0.2, 0.05), 17.5, 2.25, boxstyle="round,pad=0.02", facecolor="none", linestyle="--", edgecolor="#777777"
    )
    axes.add_patch(folder)
    axes.text(0.4, 0.22, "runs/<name>/", fontsize=10, family="monospace", va="center")
    marks = "config.yaml   run.json   stages/<stage>.json (begun or done, of which config and inputs)"
    axes.text(17.45, 0.22, marks, fontsize=8, ha="right", va="center", color="#444444")

    backbone = X[2]
    box(axes, X[0], HIGH, "prompts", OUTSIDE, height=0.7)
    box(axes, backbone, HIGH, "frozen backbone", OUTSIDE, width=WIDTH + 2 * STEP, height=0.7)
    box(axes, X[4], HIGH, "held-out prompts", OUTSIDE, height=0.7)
    box(axes, X[5], HIGH, "transformers: generate(\ncustom_generate=...)", OUTSIDE, height=0.7)
    for x, stage, does, writes in zip(X, STAGES, DOES, WRITES, strict=True):
        line = "--" if stage in ("cache", "pilot") else "-"
        box(axes, x, MIDDLE, "", STAGE, height=1.1, line=line)
        axes.text(x, MIDDLE + 0.28, stage, ha="center", va="center", fontsize=11, weight="bold", zorder=4)
        axes.text(x, MIDDLE - 0.17, does, ha="center", va="center", fontsize=8.5, zorder=4)
        box(axes, x, LOW, writes, FILES, line=line)
        arrow(axes, (x, MIDDLE - 0.57), (x, LOW + 0.53))
    start, end = (WIDTH / 2 + 0.02, LOW + 0.2), (STEP - 0.85, MIDDLE - 0.57)  # from a file to the next stage
    for x in X[:-1]:  # each stage reads what the one before it wrote
        arrow(axes, (x + start[0], start[1]), (x + end[0], end[1]))
    joins = [first + 0.3 * (last - first) for first, last in zip(start, end, strict=True)]
    for writer, last in ((0, 2), (1, 2), (3, 4)):  # distill also reads responses and cache, and publish the head
        right = X[last] + joins[0]
        points = [(X[writer] + 0.7, LOW - 0.53), (X[writer] + 0.7, 0.55), (right, 0.55), (right, joins[1])]
        axes.plot(*zip(*points, strict=True), color="#444444", linewidth=1)
    arrow(axes, (X[0], HIGH - 0.37), (X[0], MIDDLE + 0.57))
    arrow(axes, (X[1] - WIDTH / 2 - 0.02, HIGH - 0.1), (X[0] + 0.7, MIDDLE + 0.57))
    arrow(axes, (X[1], HIGH - 0.37), (X[1], MIDDLE + 0.57))
    arrow(axes, (X[2], HIGH - 0.37), (X[2], MIDDLE + 0.57))
    arrow(axes, (X[3], HIGH - 0.37), (X[3], MIDDLE + 0.57))
    arrow(axes, (X[3] + WIDTH / 2 + 0.02, HIGH - 0.1), (X[4] - 0.7, MIDDLE + 0.57))
    arrow(axes, (X[4], HIGH - 0.37), (X[4], MIDDLE + 0.57))
    arrow(axes, (X[5] + WIDTH / 2 + 0.02, LOW + 0.2), (X[5] + 1.0, HIGH - 0.42), bend=0.22)

    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05, metadata=metadata, dpi=120, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("data_flow.svg"))
