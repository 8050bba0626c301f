"""The pictures of the report: a function for each kind of picture, and a file for each kind and temperature.

Takes the dict of results.json; gives PNG files.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from ..inference.controllers import branches

PARTS = {"shallow": "#56b4e9", "head": "#e69f00", "verify": "#0072b2", "rest": "#7f7f7f"}
STYLES = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#000000", "X")]
"""Colours that are safe for colour-blind readers (Okabe and Ito), and markers that need no colour at all."""

LENGTHS = "lengths.png"
BATCHES = "batches-"
"""There is not one of these for each temperature: the picture of the answers' lengths, and for each exit layer one of
several texts at once, at the first temperature."""
FEWEST = 10  # an acceptance rate is drawn only if at least so many rounds reached its position


def temperatures(results: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(h["temperature"] for h in results["heads"]))


def files(kind: str, results: dict[str, Any]) -> list[str]:
    """The files of one kind, one for each temperature."""
    return [f"{kind}-{t:g}.png" for t in temperatures(results)]


def batch_files(results: dict[str, Any]) -> dict[int, str]:
    """Exit layer -> the file of its picture of several texts at once; empty if none was measured."""
    return {entry["exit_layer"]: f"{BATCHES}{entry['exit_layer']}.png" for entry in results.get("batches") or ()}


def draw(file: str, results: dict[str, Any], path: Path) -> None:
    """Draw the picture named `file` and save it at `path`."""
    from matplotlib.figure import Figure

    if file.startswith(BATCHES):
        draw_batches(next(e for e in results["batches"] if f"{BATCHES}{e['exit_layer']}.png" == file), path)
        return
    if file == LENGTHS:
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        lengths(figure, results["responses"])
        _save(figure, path)
        return
    kind, t = file.removesuffix(".png").split("-", 1)
    entries = [h for h in results["heads"] if f"{h['temperature']:g}" == t]
    # Narrow, so that the text is legible on a phone.
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"temperature {t}", fontsize=11)
    best = next(h for h in entries if h["exit_layer"] == results["best"]["exit_layer"])
    DRAW[kind](figure, axes, entries, best)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Drawn once: `savefig` would lay the figure out and go through all its texts, and then do so again to draw it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(140)
    FigureCanvasAgg(figure).print_png(path)


def _legend_below(figure: Any, columns: int) -> None:
    """Put the legend under the picture, where it covers nothing."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
                  handlelength=2.2, columnspacing=1.0)  # fmt: skip


def _rows(figure: Any, axes: Any, names: list[str], each: float) -> None:
    """Label the rows of a picture, which has one for each name, from top to bottom."""
    figure.set_figheight(1.5 + each * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def speedup(figure: Any, axes: Any, entries: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Speedup with its interval for every controller, in a colour for each exit layer."""
    _rows(figure, axes, list(best["controllers"]), 0.2 + 0.16 * len(entries))
    for j, entry in enumerate(entries):
        figures = list(entry["controllers"].values())
        places = [i + (j - (len(entries) - 1) / 2) * 0.7 / len(entries) for i in range(len(figures))]
        values = [c["speedup"] for c in figures]
        errors = [
            [max(0, c["speedup"] - c["speedup_ci95"][0]) for c in figures],
            [max(0, c["speedup_ci95"][1] - c["speedup"]) for c in figures],
        ]
        colour, marker = STYLES[j % len(STYLES)]
        label = f"N = {entry['exit_layer']}"
        axes.errorbar(values, places, xerr=errors, fmt=marker, color=colour, capsize=3, markersize=5, label=label)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("speedup; autoregressive = 1")
    _legend_below(figure, 4)


def time(figure: Any, axes: Any, entries: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Time of a committed token by part, in autoregressive tokens: the shorter the bar, the faster."""
    bars = [(f"N = {h['exit_layer']}, {name}", c["time_per_token"])
            for h in entries for name, c in h["controllers"].items()]  # fmt: skip
    _rows(figure, axes, [name for name, _ in bars], 0.28)
    left = [0.0] * len(bars)
    for part, colour in PARTS.items():
        widths = [max(0.0, times[part]) for _, times in bars]
        axes.barh(range(len(bars)), widths, left=left, label=part, color=colour, edgecolor="white", linewidth=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("time of a token; autoregressive = 1")
    _legend_below(figure, len(PARTS))


def acceptance(figure: Any, axes: Any, entries: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Acceptance by draft position, of the controller that drafted the most positions."""
    furthest = 1
    for j, entry in enumerate(entries):
        every = entry["controllers"]
        heads_own = {name: c for name, c in every.items() if "sources" not in c and not branches(name)} or every
        name, c = max(heads_own.items(), key=lambda item: len(item[1]["conditional_rates"]))
        reached = [share * c["rounds"] for share in (1.0, *c["marginal_rates"])]
        count = sum(n >= FEWEST for n in reached[: len(c["conditional_rates"])])  # `reached` decreases
        furthest = max(furthest, count)
        colour, marker = STYLES[j % len(STYLES)]
        label = f"N = {entry['exit_layer']}, {name}"
        for kind, line in (("conditional", "-"), ("marginal", "--")):
            rates = c[f"{kind}_rates"][:count]
            axes.plot(range(1, count + 1), rates, line, marker=marker, color=colour, label=f"{label}: {kind}")
    axes.set_ylim(0, 1.03)
    axes.set_xticks(range(1, furthest + 1))
    axes.set_xlabel("draft position")
    axes.set_ylabel("accepted")
    _legend_below(figure, 2)


def drafted(figure: Any, axes: Any, entries: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Share of rounds by the number of tokens drafted, for every controller of the best exit layer."""
    controllers = best["controllers"]
    width = 1 + max(int(k) for c in controllers.values() for k in c["drafted_histogram"])
    shares = [[100 * {int(k): n for k, n in c["drafted_histogram"].items()}.get(k, 0) / c["rounds"]
               for k in range(width)] for c in controllers.values()]  # fmt: skip
    _rows(figure, axes, list(controllers), 0.34)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share > 0 and width <= 12:  # trees have too many columns for words
                text = f"{share:.0f}" if share >= 0.5 else "<1"
                axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if share > 50 else "black")
    axes.set_xticks(range(0, width, 1 + width // 13))
    axes.set_xlabel(f"tokens drafted in a round, N = {best['exit_layer']}; cells: % of rounds")


def learned(figure: Any, axes: Any, entries: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Posterior mean acceptance of each confidence bin after each prompt, for the best exit layer."""
    from matplotlib import colormaps

    figure.set_figheight(4.2)
    for c in best["controllers"].values():
        means = c.get("learned") or []
        bins = len(means[0]) if means else 0
        for b in range(bins):
            line = [row[b] for row in means]
            label, colour = f"{b / bins:.2f}-{(b + 1) / bins:.2f}", colormaps["viridis"](0.9 * b / bins)
            axes.plot(range(1, len(line) + 1), line, marker=".", color=colour, label=label)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"texts decoded, N = {best['exit_layer']}; colours: confidence of the head")
    axes.set_ylabel("learned acceptance")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(figure, 4)


def lengths(figure: Any, responses: dict[str, Any]) -> None:
    """Histograms of the contexts' and the answers' lengths."""
    pairs = [("contexts", responses["prompt_lengths"]), ("answers", responses["response_lengths"])]
    for axes, (name, found), (colour, _) in zip(figure.subplots(1, 2), pairs, STYLES, strict=False):
        edges = found["edges"]
        axes.bar(edges[:-1], found["counts"], [b - a for a, b in pairwise(edges)], align="edge",
                 color=colour)  # fmt: skip
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)


def draw_batches(entry: dict[str, Any], path: Path) -> None:
    """Draw speedup over the number of texts at once, measured with intervals and predicted, of every controller of an
    entry of `batches` in results.json, and save it at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes, sizes = figure.add_subplot(), entry["batch_sizes"]
    axes.set_title(f"N = {entry['exit_layer']}, temperature {entry['temperature']:g}", fontsize=11)
    for j, (name, c) in enumerate(entry["controllers"].items()):
        colour, marker = STYLES[j % len(STYLES)]
        places = [b * 1.02 ** (j - (len(entry["controllers"]) - 1) / 2) for b in sizes]  # side by side
        speedup = [at["speedup"] for at in c["sizes"]]
        errors = [[max(0, at["speedup"] - at["low"]) for at in c["sizes"]],
                  [max(0, at["high"] - at["speedup"]) for at in c["sizes"]]]  # fmt: skip
        axes.errorbar(places, speedup, yerr=errors, marker=marker, color=colour, capsize=3, markersize=5, label=name)
        if all(at["predicted"] is not None for at in c["sizes"]):
            axes.plot(sizes, [at["predicted"] for at in c["sizes"]], ":", color=colour, linewidth=1.2)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(b) for b in sizes])
    axes.set_xlabel("texts at once")
    axes.set_ylabel("speedup; autoregressive = 1")
    _legend_below(figure, 3)
    _save(figure, path)


DRAW = {f.__name__: f for f in (speedup, time, acceptance, drafted, learned)}
