"""Results in, tables and pictures out: Markdown, PNG, and the table that ends a run.

Takes the dict of results.json, gives report/report.md with its pictures. Knows nothing of how anything was
measured, and measures nothing itself.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .rundir import RunDir, atomic_path

COLUMNS = [
    "exit layer",
    "controller",
    "speedup",
    "95% interval",
    "before loops",
    "tokens/s",
    "acceptance length",
    "draft acceptance rate",
]


def rows(entry: dict[str, Any]) -> list[list[str]]:
    """One row of strings per controller of one exit layer and temperature, under COLUMNS."""
    table = []
    for name, c in entry["controllers"].items():
        low, high = c["speedup_ci95"]
        rate = c["draft_acceptance_rate"]
        table.append(
            [
                str(entry["exit_layer"]),
                name,
                f"{c['speedup']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{c['speedup_before_loop']:.2f}",
                f"{c['tokens_per_second']:.0f}",
                f"{c['acceptance_length']:.2f}",
                "-" if rate is None else f"{rate:.0%}",
            ]
        )
    return table


def temperatures(results: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(h["temperature"] for h in results["heads"]))


def lossless_line(results: dict[str, Any]) -> str:
    greedy = results["lossless"]["greedy"]
    if greedy is None:
        return "not measured (nothing greedy was evaluated)"
    verdict = "yes" if greedy["identical"] == greedy["texts"] else "no"
    return (
        f"{verdict}: {greedy['identical']} of {greedy['texts']} greedy texts ({greedy['prompts']} prompts) are "
        f"token for token those of autoregressive decoding, {results['dtype']}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    prompts = results["prompts"]
    lines = [
        f"# {results['backbone']['name']}: exit heads measured",
        "",
        f"Lossless: {lossless_line(results)}.",
        "",
        f"{prompts['count']} held-out prompts of {prompts['source']['name']}, {prompts['max_new_tokens']} new "
        f"tokens each, {results['device']}, {results['threads']} threads, {results['dtype']}. Speedup is tokens per "
        f"second over "
        "autoregressive decoding on the same engine, interleaved; intervals by bootstrap over prompts.",
    ]
    for t in temperatures(results):
        entries = [h for h in results["heads"] if h["temperature"] == t]
        base = entries[0]["baseline"]
        lines += ["", f"## Temperature {t:g}", ""]
        lines += [
            f"Autoregressive: {base['tokens_per_second']:.0f} tokens/s; {base['prompts_that_loop']:.0%} of its texts "
            f"repeat an {results['loop_ngram']}-gram, {base['share_after_first_loop']:.0%} of the tokens lie behind "
            f"the "
            "first repeat.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
        ]
        lines += ["| " + " | ".join(row) + " |" for entry in entries for row in rows(entry)]
        lines += [
            "",
            "Cost of the parts in autoregressive tokens:",
            "",
            "| exit layer | shallow | head | verify 1 / 2 / 3 / 5 tokens | rest |",
            "|---|---|---|---|---|",
        ]
        for entry in entries:
            c = entry["costs"]
            verify = " / ".join(
                f"{c['verify'][str(w)] if str(w) in c['verify'] else c['verify'].get(w, float('nan')):.2f}"
                for w in (1, 2, 3, 5)
            )
            lines.append(
                f"| {entry['exit_layer']} | {c['shallow']:.3f} | {c['head']:.3f} | {verify} | {c['rest']:.3f} |"
            )
    lines += [
        "",
        "![Speedup of every head and controller](speedup.png)",
        "",
        "![Acceptance by draft position](acceptance.png)",
        "",
    ]
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> None:
    """report.md, speedup.png and acceptance.png, all or nothing."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "report.md").write_text(markdown(results))
        draw_speedup(results, temporary / "speedup.png")
        draw_acceptance(results, temporary / "acceptance.png")


def draw_speedup(results: dict[str, Any], path: Path) -> None:
    """Speedup with its interval for every controller, one panel a temperature, one colour an exit layer."""
    from matplotlib.figure import Figure

    panels = temperatures(results)
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for panel, t in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), panel + 1)
        entries = [h for h in results["heads"] if h["temperature"] == t]
        for j, entry in enumerate(entries):
            names = list(entry["controllers"])
            figures = list(entry["controllers"].values())
            places = [i + (j - (len(entries) - 1) / 2) * 0.22 for i in range(len(names))]
            values = [c["speedup"] for c in figures]
            errors = [
                [max(0, c["speedup"] - c["speedup_ci95"][0]) for c in figures],
                [max(0, c["speedup_ci95"][1] - c["speedup"]) for c in figures],
            ]
            axes.errorbar(places, values, yerr=errors, fmt="o", capsize=3, label=f"N = {entry['exit_layer']}")
            axes.set_xticks(range(len(names)), names)
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.set_title(f"temperature {t:g}")
        axes.set_ylabel("speedup over autoregressive")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_acceptance(results: dict[str, Any], path: Path) -> None:
    """Conditional acceptance by draft position, from the controller that drafted the most positions."""
    from matplotlib.figure import Figure

    panels = temperatures(results)
    figure = Figure(figsize=(5.2 * len(panels), 3.4), layout="constrained")
    for panel, t in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), panel + 1)
        for entry in (h for h in results["heads"] if h["temperature"] == t):
            rates = max((c["conditional_rates"] for c in entry["controllers"].values()), key=len)
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=f"N = {entry['exit_layer']}")
        axes.set_ylim(0, 1)
        axes.set_xlabel("draft position")
        axes.set_ylabel("accepted, given all before were")
        axes.set_title(f"temperature {t:g}")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def closing_table(run: RunDir) -> None:
    """What a run ends with: the results, where everything lies, and the line that uses the head."""
    results = json.loads((run / "eval" / "results.json").read_text())
    console = Console()
    for t in temperatures(results):
        table = Table(title=f"temperature {t:g}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(COLUMNS):  # headings broken at spaces: the table must fit 80 columns
            table.add_column(name.replace(" ", "\n"), justify="left" if i == 1 else "right", no_wrap=True)
        for entry in (h for h in results["heads"] if h["temperature"] == t):
            for row in rows(entry):
                best = results["best"]
                chosen = (entry["exit_layer"], row[1], t) == (
                    best["exit_layer"],
                    best["controller"],
                    best["temperature"],
                )
                table.add_row(*row, style="bold green" if chosen else None)
        console.print(table)
    console.print(f"lossless = {lossless_line(results)}")
    best = results["best"]
    low, high = best["speedup_ci95"]
    console.print(
        f"best: exit layer {best['exit_layer']}, controller {best['controller']}: speedup {best['speedup']:.2f} "
        f"(95 % interval {low:.2f}-{high:.2f}), acceptance length {best['acceptance_length']:.2f}"
    )
    hub = run / "hub" / str(best["exit_layer"])
    console.print(f"run folder: {run.path}   report: {run / 'report' / 'report.md'}   published: {hub}")
    console.print(
        "use it:", f'model.generate(**inputs, custom_generate="{hub}", trust_remote_code=True)', soft_wrap=True
    )
