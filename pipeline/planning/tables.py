"""Formats plans as tables: one plan in full, or one row for each of several plans.

Takes Plans; gives titles, headings and rows of strings, drawn by rich on a terminal and as Markdown elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from ..config import to_dict
from ..evaluation.rendering import markdown_table
from . import batches, gain, memory
from .estimate import Plan
from .gain import DRAFTS, TARGETS, Prediction
from .hardware import BANDWIDTH_SHARE, LINK_SHARE, MARGIN
from .memory import GIB, Row, giga

ROWS = (1, 2, 3, 5, 9)
"""Widths of verifications that are shown."""


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def number(value: float) -> str:
    """The value with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


# ---- one plan


def opening(p: Plan) -> list[str]:
    """Lines on the backbone, the layout and the assumptions of a plan."""
    a, c = p.architecture, p.config
    lines = [
        f"{a.name}: {giga(a.parameters)} parameters, L = {a.layers}, D = {a.hidden}, V = {a.vocabulary}, "
        f"{c.backbone.dtype} ({a.source})",
        f"distill: {p.layout}; exit layers {c.distill.exit_layers}, teacher {c.distill.teacher}",
    ]
    if p.gpu is not None:
        network = c.plan.node_bandwidth or p.gpu.network
        lines.append(
            f"{c.plan.gpu}: {p.gpu.memory} GiB, {getattr(p.gpu, c.backbone.dtype)} TFLOP/s ({c.backbone.dtype}); GB/s: "
            f"memory {p.gpu.bandwidth}, link {p.gpu.link}, network {network:g}"
        )
        lines.append(
            f"assumed: {c.plan.mfu:.0%} of the peak is reached, {BANDWIDTH_SHARE:.0%} of the memory's rate, "
            f"{LINK_SHARE:.0%} of link and network; {MARGIN:.0%} of the memory stays free"
        )
    return lines


def full(p: Plan) -> list[Table]:
    """All tables of one plan."""
    moment = f"GPU memory of a distill process, at its largest moment: {p.distill.largest}"
    tables = [_sizes(moment, p.distill.rows), _sizes("GPU memory of generate, one copy", p.generate)]
    tables += [_sizes("GPU memory of evaluate, one copy", p.evaluate), _sizes("Host memory of a distill node", p.host)]
    tables += [_sizes("Disk", p.disk)]
    if p.step is not None:
        tables += [_step(p), _stages(p)]
    return [table for table in [*tables, _experts(p), _speedups(p), _batches(p)] if table.rows]


def _sizes(title: str, rows: list[Row]) -> Table:
    body = [[row.what, number(row.size / GIB), row.how] for row in rows if row.size]
    if body:
        body.append(["together", number(memory.total(rows) / GIB), ""])
    return Table(title, ["what", "GiB", "of what"], body)


def _step(p: Plan) -> Table:
    assert p.step is not None
    s, rate = p.step, p.step.tokens / p.step.seconds
    rows = [
        ["arithmetic", number(s.compute), f"{s.flops:.3g} FLOP over {p.layout.processes} GPUs"],
        ["collectives", number(s.network), f"{number(s.gathered / GIB)} GiB into each GPU"],
        ["step", number(s.seconds), f"{s.bound} is the bound; {s.tokens} tokens, {number(rate)} tokens/s"],
        ["step, if nothing overlaps", number(s.compute + s.network), ""],
    ]
    if s.cache_read:
        how = f"{number(s.cache_read / GIB)} GiB on each node; at {number(s.cache_read / s.seconds / 1e9)} GB/s"
        rows.append(["reading the cache", "?", f"{how} another {number(s.seconds)} s"])
    return Table("A step of distill", ["what", "seconds", "of what"], rows)


def _stages(p: Plan) -> Table:
    rows = [[s.name, number(s.gpu_hours), str(s.gpus), number(s.seconds / 3600), s.how] for s in p.stages]
    rows.append(["together", number(sum(s.gpu_hours for s in p.stages)), "", "", ""])
    return Table("Time", ["stage", "GPU-hours", "GPUs", "hours", "of what"], rows)


def _experts(p: Plan) -> Table:
    """What a wider verification reads of a mixture of experts; no rows of other backbones."""
    a, n = p.architecture, p.config.distill.exit_layers[0]
    rows = []
    for m in ROWS if a.is_mixture else ():
        efficiency = gain.target_efficiency(a, n, m)
        rows.append([str(m), f"{a.reached(m):.1f}", f"{a.read(m) / a.read():.2f}", f"{efficiency:.2f}"])
    title = f"Experts: a token is computed by {a.experts_per_token} of {a.experts}, and tokens choose independently"
    return Table(title, ["tokens verified", "experts read", "a layer reads", f"target efficiency, N = {n}"], rows)


def _speedups(p: Plan) -> Table:
    """The needed acceptance rates of each exit layer, and its predicted speedups for each K with the best marked.

    The speedups are left out if no acceptance is given.
    """
    expected = any(one.expected for one in p.predictions)
    header = ["N", "a draft costs", *(f"acceptance for {target:.1f}" for target in TARGETS), "at most"]
    header += ["acceptance", *(f"K={k}" for k in DRAFTS)] * expected
    rows = [_needs(one) + _speedup(one) * expected for one in p.predictions]
    costs = "as the pilot measured them, else " if any(one.measured for one in p.predictions) else ""
    costs += f"every pass reads its weights once, a round has {gain.ROUND} more"
    return Table(f"Predicted speedup of fixed K; costs in autoregressive tokens: {costs}", header, rows)


def _needs(p: Prediction) -> list[str]:
    least = ["none" if p.needed[target] is None else f"{p.needed[target]:.2f}" for target in TARGETS]
    return [str(p.exit_layer), f"{p.draft:.3f}", *least, f"{p.ceiling:.2f}"]


def _speedup(p: Prediction) -> list[str]:
    if p.expected is None:
        return ["?"] * (1 + len(DRAFTS))
    acceptance = ", ".join(f"{rate:.2f}" for rate in p.expected.rates)
    if p.expected.temperature is not None:
        acceptance += f" at temperature {p.expected.temperature:g}"
    return [acceptance, *(f"{s:.2f}{'*' if k == p.best else ''}" for k, s in p.speedups.items())]


def _batches(p: Plan) -> Table:
    """Speedups by the number of texts at once, and up to how many drafting pays; no rows without a GPU or an
    acceptance."""
    rows = []
    for c in p.batches:
        shown = [f"{speedup:.2f}" for speedup in c.speedups.values()]
        where = str(c.exit_layer) + ("" if c.temperature is None else f" at temperature {c.temperature:g}")
        rows.append([where, str(c.k), *shown, _ranges(c.pays), _ranges(c.pays_of_one), str(c.fit)])
    header = ["N", "K", *(f"{b} text{'s' if b > 1 else ''}" for b in batches.SHOWN), "pays at", "with K=1 at"]
    header += ["memory holds"]
    title = (
        "Predicted speedup of several texts at once; a pass reads its weights once and each text's keys and values, "
        f"{memory.mean_positions(p.config):.0f} positions, or takes the time of its arithmetic"
    )
    return Table(title, header, rows)


def _ranges(found: list[tuple[int, int]]) -> str:
    ends = {batches.MOST: " and more"}
    return ", ".join(f"{a}" + ends.get(b, f"-{b}" if b > a else "") for a, b in found) or "none"


# ---- several plans, one row each


def comparison(plans: Sequence[Plan], keys: Sequence[str]) -> Table:
    """One row for each plan; `keys` are the config keys in which the plans differ."""
    header = [*(key.rpartition(".")[2] for key in keys), "GPUs", "copies", "GiB a GPU", "fits", "arithmetic, s"]
    header += ["collectives, s", "tokens/s", "generate, GPU-h", "distill, GPU-h", "best N", "K", "speedup"]
    return Table("", header, [[*(_value(p, key) for key in keys), *_row(p)] for p in plans])


def _value(p: Plan, key: str) -> str:
    value = to_dict(p.config)
    for part in key.split("."):
        value = value[part]
    return str(value)


def _row(p: Plan) -> list[str]:
    hours = {s.name: number(s.gpu_hours) for s in p.stages}
    row = [str(p.layout.processes), str(p.layout.copies), f"{p.distill.total / GIB:.1f}"]
    row.append({True: "yes", False: "no", None: "?"}[p.fits])
    if p.step is None:
        row += ["?"] * 3
    else:
        row += [number(p.step.compute), number(p.step.network), number(p.step.tokens / p.step.seconds)]
    row += [hours.get("generate", "?"), hours.get("distill", "?")]
    if (best := p.best) is None:
        return [*row, *["?"] * 3]
    return [*row, str(best.exit_layer), str(best.best), f"{best.speedups[best.best]:.2f}"]


# ---- output


def show(tables: Sequence[Table], console: Console | None = None) -> None:
    """Print the tables: drawn by rich on a terminal, as Markdown elsewhere."""
    console = console or Console()
    for table in tables:
        if not console.is_terminal:
            print(markdown(table))
            continue
        drawn = RichTable(title=table.title or None, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if i == 0 or name == "of what" else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        console.print()


def markdown(table: Table) -> str:
    """A Markdown table with aligned columns, readable as plain text too."""
    left = [i == 0 or name == "of what" for i, name in enumerate(table.header)]
    title = [table.title, ""] if table.title else []
    return "\n".join([*title, *markdown_table(table.header, *table.rows, left=left), ""])
