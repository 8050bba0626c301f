"""The pictures of the report, one function a file.

Takes the dict of results.json, gives PNG files. Knows nothing of how anything was measured.
"""

from pathlib import Path
from typing import Any

PARTS = ("shallow", "head", "verify", "rest")


def temperatures(results: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(h["temperature"] for h in results["heads"]))


def _figure(results: dict[str, Any], height: float) -> tuple[Any, list[tuple[Any, list[dict[str, Any]]]]]:
    """A figure, and (axes, heads) of one panel a temperature, side by side."""
    from matplotlib.figure import Figure

    ts = temperatures(results)
    figure = Figure(figsize=(5.2 * len(ts), height), layout="constrained")
    panels = []
    for i, t in enumerate(ts):
        axes = figure.add_subplot(1, len(ts), i + 1)
        axes.set_title(f"temperature {t:g}")
        panels.append((axes, [h for h in results["heads"] if h["temperature"] == t]))
    return figure, panels


def _best(results: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of the best exit layer."""
    return next(h for h in entries if h["exit_layer"] == results["best"]["exit_layer"])


def _legend_below(figure: Any, columns: int) -> None:
    """One legend for all panels, under them: each name once."""
    names: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            names.setdefault(name, handle)
    figure.legend(
        list(names.values()), list(names), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def speedup(results: dict[str, Any], path: Path) -> None:
    """Speedup with its interval for every controller, one colour an exit layer."""
    figure, panels = _figure(results, 3.6)
    for axes, entries in panels:
        for j, entry in enumerate(entries):
            figures = list(entry["controllers"].values())
            places = [i + (j - (len(entries) - 1) / 2) * 0.22 for i in range(len(figures))]
            values = [c["speedup"] for c in figures]
            errors = [
                [max(0, c["speedup"] - c["speedup_ci95"][0]) for c in figures],
                [max(0, c["speedup_ci95"][1] - c["speedup"]) for c in figures],
            ]
            axes.errorbar(places, values, yerr=errors, fmt="o", capsize=3, label=f"N = {entry['exit_layer']}")
            axes.set_xticks(range(len(figures)), list(entry["controllers"]))
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.set_ylabel("speedup over autoregressive")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def acceptance(results: dict[str, Any], path: Path) -> None:
    """Conditional acceptance by draft position, from the controller that drafted the most positions."""
    figure, panels = _figure(results, 3.4)
    for axes, entries in panels:
        for entry in entries:
            rates = max((c["conditional_rates"] for c in entry["controllers"].values()), key=len)
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=f"N = {entry['exit_layer']}")
        axes.set_ylim(0, 1)
        axes.set_xlabel("draft position")
        axes.set_ylabel("accepted, given all before were")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def drafted(results: dict[str, Any], path: Path) -> None:
    """Share of rounds by the number of tokens drafted, for every controller of the best exit layer."""
    figure, panels = _figure(results, 3.4)
    for axes, entries in panels:
        entry = _best(results, entries)
        count = len(entry["controllers"])
        for j, (name, c) in enumerate(entry["controllers"].items()):
            ks = [int(k) for k in c["drafted_histogram"]]
            shares = [n / c["rounds"] for n in c["drafted_histogram"].values()]
            axes.bar([k + (j - (count - 1) / 2) * 0.8 / count for k in ks], shares, 0.8 / count, label=name)
        axes.set_xlabel(f"tokens drafted in a round, N = {entry['exit_layer']}")
        axes.set_ylabel("share of rounds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def time(results: dict[str, Any], path: Path) -> None:
    """Time of a committed token by part, in autoregressive tokens: the shorter the bar, the faster."""
    rows = max(sum(len(h["controllers"]) for h in results["heads"] if h["temperature"] == t)
               for t in temperatures(results))  # fmt: skip
    figure, panels = _figure(results, 1.2 + 0.36 * rows)
    for axes, entries in panels:
        bars = [(f"N = {h['exit_layer']}, {name}", c["time_per_token"])
                for h in entries for name, c in h["controllers"].items()]  # fmt: skip
        left = [0.0] * len(bars)
        for part in PARTS:
            widths = [max(0.0, times[part]) for _, times in bars]
            axes.barh(range(len(bars)), widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=1, linestyle="--")
        axes.set_xlabel("time of a token, autoregressive = 1")
    _legend_below(figure, len(PARTS))
    figure.savefig(path, dpi=110)


def learned(results: dict[str, Any], path: Path) -> None:
    """Posterior mean acceptance of each confidence bin after each prompt, for the best exit layer."""
    figure, panels = _figure(results, 4.0)
    for axes, entries in panels:
        entry = _best(results, entries)
        for c in entry["controllers"].values():
            means = c.get("learned") or []
            for b in range(len(means[0]) if means else 0):
                line = [row[b] for row in means]
                label = f"confidence {b / len(means[0]):.2f} to {(b + 1) / len(means[0]):.2f}"
                axes.plot(range(1, len(line) + 1), line, color=f"C{b}", label=label)
        axes.set_ylim(0, 1)
        axes.set_xlabel(f"texts decoded, N = {entry['exit_layer']}")
        axes.set_ylabel("acceptance")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(figure, 4)
    figure.savefig(path, dpi=110)


DRAW = {f"{f.__name__}.png": f for f in (speedup, acceptance, drafted, time, learned)}
