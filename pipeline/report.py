"""Results in, words and tables out: report.md, the self-contained index.html, and the table that ends a run.

Takes the dict of results.json, gives report/ with the pictures of plots.py. Knows nothing of how anything was
measured, and measures nothing itself.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import plots
from .losslessness import ALARM
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


def lossless_line(results: dict[str, Any]) -> str:
    """One sentence for both proofs."""
    greedy, sampling = results["lossless"]["greedy"], results["lossless"]["sampling"]
    verdicts = [proof["passed"] for proof in (greedy, sampling) if proof is not None]
    parts = []
    if greedy is not None:
        parts.append(
            f"{greedy['identical']} of {greedy['texts']} greedy texts ({greedy['prompts']} prompts) are token for "
            f"token those of autoregressive decoding, {results['dtype']}"
        )
        if greedy["divergences"]:
            near = sum(d["explained"] for d in greedy["divergences"])
            parts.append(f"{near} of the {len(greedy['divergences'])} others leave it at a near tie")
    if sampling is not None:
        tokens = sum(t["tokens"] for t in sampling["tests"])
        parts.append(
            f"{tokens} sampled tokens follow the backbone's distribution (smallest p-value of "
            f"{len(sampling['tests'])} chi-square tests {sampling['p_value']:.2g})"
            if sampling["passed"]
            else f"sampled tokens do NOT follow the backbone's distribution (p-value {sampling['p_value']:.2g})"
        )
    return f"{'yes' if all(verdicts) else 'no'}: " + "; ".join(parts)


Block = tuple[str, Any]
"""("h1" | "h2" | "p" | "table" | "image", text | [header, *rows] | (file, caption))"""


def blocks(results: dict[str, Any]) -> list[Block]:
    """The whole report, from the verdict to the details."""
    prompts, best = results["prompts"], results["best"]
    low, high = best["speedup_ci95"]
    page: list[Block] = [
        ("h1", f"{results['backbone']['name']}: exit heads measured"),
        (
            "p",
            f"Best: exit layer {best['exit_layer']}, controller {best['controller']}, speedup {best['speedup']:.2f} "
            f"(95 % interval {low:.2f}-{high:.2f}) at temperature {best['temperature']:g}. "
            + ("Drafting pays." if low > 1 else "Drafting does not surely pay: the interval touches 1."),
        ),
        ("p", f"Lossless: {lossless_line(results)}."),
        ("image", ("speedup.png", "Speedup of every head and controller, with 95 % intervals")),
        ("image", ("time.png", "Where the time of a token goes; autoregressive decoding is 1")),
        (
            "p",
            f"{prompts['count']} held-out prompts of {prompts['source']['name']}, {prompts['max_new_tokens']} new "
            f"tokens each, {results['device']}, {results['threads']} threads, {results['dtype']}. Speedup is tokens "
            "per second over autoregressive decoding on the same engine, interleaved; intervals by bootstrap over "
            "prompts." + _later_turns(prompts["later_turns"]),
        ),
    ]
    for t in plots.temperatures(results):
        page += _temperature(results, t) + _by_task(results, t)
    page += _rivals(results)
    page += [
        ("h2", "Acceptance"),
        ("image", ("acceptance.png", "How often draft i is accepted, given that all before it were")),
        ("image", ("drafted.png", "How many tokens the controllers drafted in a round")),
    ]
    if any(c.get("learned") for h in results["heads"] for c in h["controllers"].values()):
        page.append(("image", ("learned.png", "What thompson learned: acceptance of each confidence bin, by prompt")))
    return page + _losslessness(results)


def _temperature(results: dict[str, Any], t: float) -> list[Block]:
    entries = [h for h in results["heads"] if h["temperature"] == t]
    base = entries[0]["baseline"]
    page: list[Block] = [
        ("h2", f"Temperature {t:g}"),
        (
            "p",
            f"Autoregressive: {base['tokens_per_second']:.0f} tokens/s; {base['prompts_that_loop']:.0%} of its texts "
            f"repeat an {results['loop_ngram']}-gram, {base['share_after_first_loop']:.0%} of the tokens lie behind "
            "the first repeat.",
        ),
        ("table", [COLUMNS, *(row for entry in entries for row in rows(entry))]),
        ("p", "Cost of the parts in autoregressive tokens, and memory on top of the backbone:"),
    ]
    costs = [["exit layer", "shallow", "head", "verify 1 / 2 / 3 / 5 tokens", "rest", "head, MiB", "cache, MiB"]]
    for entry in entries:
        c, memory = entry["costs"], entry["memory"]
        widths = {int(w): cost for w, cost in c["verify"].items()}
        verify = " / ".join(f"{widths[w]:.2f}" if w in widths else "-" for w in (1, 2, 3, 5))
        sizes = [f"{memory[key] / 2**20:.2f}" for key in ("head_bytes", "cache_bytes")]
        costs.append([str(entry["exit_layer"]), f"{c['shallow']:.3f}", f"{c['head']:.3f}", verify,
                      f"{c['rest']:.3f}", *sizes])  # fmt: skip
    return [*page, ("table", costs)]


def _later_turns(count: int) -> str:
    if not count:
        return ""
    return (
        f" {count} of the prompts are later turns, each behind the earlier ones and the backbone's own greedy answers."
    )


def _by_task(results: dict[str, Any], t: float) -> list[Block]:
    tasks = list(results["prompts"]["tasks"])
    if len(tasks) < 2:
        return []
    table = [["exit layer", "controller", *tasks, "overall"]]
    for entry in (h for h in results["heads"] if h["temperature"] == t):
        for name, c in entry["controllers"].items():
            cells = [_speedup_and_length(figures) for figures in (*(c["tasks"][task] for task in tasks), c)]
            table.append([str(entry["exit_layer"]), name, *cells])
    return [("p", "Speedup by task, and acceptance length in brackets:"), ("table", table)]


def _speedup_and_length(figures: dict[str, Any]) -> str:
    length = figures["acceptance_length"]
    return f"{figures['speedup']:.2f} ({'-' if length is None else f'{length:.2f}'})"


def _rivals(results: dict[str, Any]) -> list[Block]:
    """What transformers offers, in the same run; nothing if none of it was measured."""
    if not results["rivals"]:
        return []
    best = results["rivals"][0]["best"]  # the same beside all

    def ratio(figures: dict[str, Any] | None) -> str:
        if figures is None:
            return "-"
        low, high = figures["speedup_ci95"]
        return f"{figures['speedup']:.2f} ({low:.2f}-{high:.2f})"

    fastest = f"{best['controller']} at exit layer {best['exit_layer']}"
    table = [["rival", "exit layer", "tokens/s", "over autoregressive", "over generate", f"{fastest} over it",
              "texts that differ"]]  # fmt: skip
    for r in results["rivals"]:
        ratios = [ratio(r["over_autoregressive"]), ratio(r["over_generate"]), ratio(r["best"])]
        table.append([r["rival"], str(r["exit_layer"] or "-"), f"{r['tokens_per_second']:.0f}", *ratios,
                      f"{r['differ']} of {r['texts']}"])  # fmt: skip
    text = (
        "What transformers itself offers, greedy, interleaved with the above on the same weights and prompts; unlike "
        "above, every time here includes prefill, which generate cannot leave out: over autoregressive decoding on the "
        f"engine of the exit heads, over transformers' own loop (generate), and {fastest}, the fastest here, over each."
    )
    return [("h2", "Beside transformers"), ("p", text), ("table", table)]


def _losslessness(results: dict[str, Any]) -> list[Block]:
    """Each test of the sampled texts, and each greedy text that differs."""
    greedy, sampling = results["lossless"]["greedy"], results["lossless"]["sampling"]
    page: list[Block] = [("h2", "Losslessness")]
    if greedy is not None and greedy["divergences"]:
        table = [["prompt", "exit layer", "controller", "first difference", "top-2 gap", "logit noise", "near tie"]]
        for d in greedy["divergences"]:
            table.append([d["prompt"], str(d["exit_layer"]), d["controller"], str(d["first_divergence"]),
                          f"{d['top2_gap']:.3g}", f"{d['logit_noise']:.3g}",
                          "yes" if d["explained"] else "NO"])  # fmt: skip
        page += [("p", "Greedy texts that differ from autoregressive decoding:"), ("table", table)]
    if sampling is not None:
        page.append(
            (
                "p",
                f"Sampled texts: {sampling['test']}. Under losslessness the p-values are uniform; the test fails "
                f"below {ALARM:g} in all. The backbone's distribution in one pass and token by token differs by at "
                f"most {sampling['largest_p_difference']:.1g}.",
            )
        )
        table = [["temperature", "exit layer", "controller", "tokens", "chi-square", "p-value"]]
        for test in sampling["tests"]:
            table.append([f"{test['temperature']:g}", str(test["exit_layer"] or "-"), test["controller"],
                          str(test["tokens"]), f"{test['statistic']:.1f}", f"{test['p_value']:.3f}"])  # fmt: skip
        page.append(("table", table))
    return page


def markdown(page: list[Block]) -> str:
    """The blocks as Markdown."""
    lines = []
    for kind, content in page:
        if kind == "table":
            header, *body = content
            lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
        elif kind == "image":
            lines += [f"![{content[1]}]({content[0]})", ""]
        else:
            lines += [{"h1": "# ", "h2": "## ", "p": ""}[kind] + content, ""]
    return "\n".join(lines)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde6; }
h1 + p { font-size: 1.15rem; background: #eaf5ec; border-left: 4px solid #2e8b57; padding: .6rem .9rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #5a6473; font-size: .9rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ee; white-space: nowrap; }
th { text-align: right; font-weight: 600; color: #5a6473; vertical-align: bottom; white-space: normal; }
"""


def html_page(page: list[Block], folder: Path) -> str:
    """The blocks as one self-contained page; pictures are read from `folder` and put into it."""
    parts = []
    for kind, content in page:
        if kind == "table":
            header, *body = content
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
            parts.append(f'<div class="table"><table><tr>{head}</tr>{"".join(lines)}</table></div>')
        elif kind == "image":
            file, caption = content
            data = base64.b64encode((folder / file).read_bytes()).decode()
            alt = html.escape(caption)
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">'
                         f"<figcaption>{alt}</figcaption></figure>")  # fmt: skip
        else:
            parts.append(f"<{kind}>{html.escape(content)}</{kind}>")
    title = html.escape(next(content for kind, content in page if kind == "h1"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write(results: dict[str, Any], folder: Path) -> None:
    """report.md, index.html and the pictures, all or nothing."""
    page = blocks(results)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in (content[0] for kind, content in page if kind == "image"):
            plots.DRAW[file](results, temporary / file)
        (temporary / "report.md").write_text(markdown(page))
        (temporary / "index.html").write_text(html_page(page, temporary))


def closing_table(run: RunDir) -> None:
    """What a run ends with: the results, where everything lies, and the line that uses the head."""
    results = json.loads((run / "eval" / "results.json").read_text())
    console = Console()
    for t in plots.temperatures(results):
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
    console.print(f"run folder: {run.path}   report: {run / 'report' / 'index.html'}   published: {hub}")
    console.print(
        "use it:", f'model.generate(**inputs, custom_generate="{hub}", trust_remote_code=True)', soft_wrap=True
    )
