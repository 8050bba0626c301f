"""The output at the end of `exit-heads run` and of `exit-heads evaluate`: the results, the paths of everything, and
after `run` the line that uses the head.

Takes a run folder that was evaluated, and published unless the gate refused it; prints to the terminal.
"""

from rich.console import Console
from rich.table import Table

from ..runs.folder import RunDir
from . import batch_report, overview, plots, report
from . import results as evaluated


def closing_table(run: RunDir, published: bool | None = True) -> None:
    """Print a table of all methods for each temperature, then the losslessness tests, the judged speedup and paths.

    `published`: False if the gate refused the head, so that there is no folder to use; None if nothing was to be
    published, as after `exit-heads evaluate`.
    """
    results = evaluated.read(run / "eval" / "results.json")
    console, best = Console(), results["best"]
    for t in plots.temperatures(results):
        table = Table(title=f"temperature {t:g}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(report.COLUMNS):  # headings are broken at spaces to fit the table into 80 columns
            table.add_column(name.replace(" ", "\n"), justify="left" if i == 1 else "right", no_wrap=True)
        for entry in (h for h in results["heads"] if h["temperature"] == t):
            for row in report.rows(entry):
                chosen = (entry["exit_layer"], row[1], t) == (
                    best["exit_layer"],
                    best["controller"],
                    best["temperature"],
                )
                table.add_row(*row, style="bold green" if chosen else None)
        console.print(table)
        for entry in (h for h in results["heads"] if h["temperature"] == t):
            for told in filter(None, (evaluated.of_oracle(entry), *evaluated.of_sources(entry))):
                console.print(told)
    console.print(f"lossless = {report.lossless_line(results)}")
    for _, text in report.foreign(results):
        console.print(text)
    console.print(
        f"best: exit layer {best['exit_layer']}, controller {best['controller']}, temperature {best['temperature']:g}: "
        f"{evaluated.headline(best)}, acceptance length {best['acceptance_length']:.2f}; {evaluated.basis(best)}"
    )
    if told := batch_report.sentence(results, best["exit_layer"]):
        console.print(told)
    paths = f"run folder: {run.path}   report: {run / 'report' / 'index.html'}"
    if not published:
        console.print(paths if published is None else f"{paths}   published: nothing")
        return
    folder = run / next(r["folder"] for r in reversed(run.records()) if r["stage"] == "publish")
    pushed = overview.pushed(run.path, folder)
    hub = pushed["repo_id"] if pushed else folder
    console.print(f"{paths}   published: {hub}")
    console.print(
        "use it:", f'model.generate(**inputs, custom_generate="{hub}", trust_remote_code=True)', soft_wrap=True
    )
