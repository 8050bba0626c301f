"""The report of an evaluation: report.md and the self-contained index.html, from the verdict to the details.

Takes the dict of results.json; writes report/ with the pictures of plots.py.
"""

from pathlib import Path
from typing import Any

from ..runs.files import atomic_path
from . import batch_report, plots, texts
from .losslessness import ALARM
from .metrics import best as fastest
from .rendering import Block, html_page, markdown
from .results import basis, headline, is_lossless, of_oracle, of_sources

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
    """One sentence on the tests of greedy and of sampled texts."""
    greedy, sampling = results["lossless"]["greedy"], results["lossless"]["sampling"]
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
    parts += filter(None, [batch_report.lossless_part(results)])
    return f"{'yes' if is_lossless(results) else 'no'}: " + "; ".join(parts)


def blocks(results: dict[str, Any]) -> list[Block]:
    """The whole report, from the verdict to the details."""
    prompts = results["prompts"]
    page: list[Block] = [
        ("h1", f"{results['backbone']['name']}: exit heads measured"),
        verdict(results),
        *foreign(results),
        ("p", _why(results)),
        *_elsewhere(results),
        ("p", f"Lossless: {lossless_line(results)}."),
        *_images(
            results,
            "speedup",
            "speedup and 95 % interval of each method by itself; right of the dashed line drafting pays",
        ),
        *_images(results, "time", "where the time of a token goes; left of the dashed line drafting pays"),
        (
            "p",
            f"{prompts['count']} held-out prompts of {prompts['source']['name']}, {prompts['max_new_tokens']} new "
            f"tokens each, {results['device']}, threads: {results['threads']}, {results['dtype']}."
            + _later_turns(prompts["later_turns"]),
        ),
        ("h2", "Words"),
        ("words", _words(results)),
    ]
    for t in plots.temperatures(results):
        page += _temperature(results, t) + _by_task(results, t)
    page += _rivals(results) + batch_report.blocks(results)
    page += [
        ("h2", "Acceptance"),
        *_images(results, "acceptance", "how often draft i is accepted, by the controller that drafted furthest: of "
                 "the rounds that reached it (conditional) and of all rounds (marginal)"),
        *_images(results, "drafted", "how many tokens the controllers drafted in a round"),
    ]  # fmt: skip
    if any(c.get("learned") for h in results["heads"] for c in h["controllers"].values()):
        page += _images(results, "learned", "what thompson learned: mean acceptance by confidence of the head")
    return page + texts.blocks(results.get("texts", [])) + _losslessness(results) + _responses(results)


def foreign(results: dict[str, Any]) -> list[Block]:
    """Says that the head was trained for another backbone (evaluate.allow_other_backbone)."""
    if "trained_for" not in results:
        return []
    of, name = results["trained_for"], results["backbone"]["name"]
    return [
        (
            "p",
            f"{results['published_head']} was trained for {of['name']} (fingerprint {of['fingerprint'][:12]}) and "
            f"drafts here for {name}, because of allow_other_backbone: the texts are those of {name}, and acceptance "
            "and speedup hold for this pair alone.",
        )
    ]


def _images(results: dict[str, Any], kind: str, caption: str) -> list[Block]:
    """One picture for each temperature."""
    names = zip(plots.temperatures(results), plots.files(kind, results), strict=True)
    return [("image", (file, f"Temperature {t:g}: {caption}.")) for t, file in names]


def verdict(results: dict[str, Any]) -> Block:
    """Whether decoding is lossless and whether drafting certainly pays. The words say it too, not the colour alone."""
    best = results["best"]
    figures = (
        f"{headline(best)} at temperature {best['temperature']:g}, with exit layer {best['exit_layer']} and controller "
        f"{best['controller']}; {basis(best)}."
    )
    if not is_lossless(results):
        return (
            "bad",
            f"NOT lossless: the texts are not the backbone's own, so the speedup counts for nothing: {figures}",
        )
    if best["speedup_ci95"] is None:
        return "unsure", f"Lossless, but there were too few conversations to say whether drafting pays: {figures}"
    low, high = best["speedup_ci95"]
    if low > 1:
        return "good", f"Lossless, and drafting pays: {figures}"
    if high < 1:
        return "bad", f"Lossless, but drafting does NOT pay: it is slower than autoregressive decoding. Best {figures}"
    return "unsure", f"Lossless, but drafting does not surely pay: the interval touches 1. Best {figures}"


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The verdict as figures for tracking; without an interval if too few conversations were measured."""
    names = ("speedup", "acceptance_length", "exit_layer", "controller", "temperature", "methods", "conversations")
    ends = dict(zip(("low", "high"), results["best"]["speedup_ci95"] or (), strict=False))
    together = batch_report.entry_of(results, results["best"]["exit_layer"])
    return {
        **({} if together is None else batch_report.summary(results, together)),
        **{f"evaluate/{name}": results["best"][name] for name in names},
        **{f"evaluate/speedup_ci95_{end}": value for end, value in ends.items()},
        "evaluate/lossless": is_lossless(results),
    }


def _why(results: dict[str, Any]) -> str:
    """How many tokens a round of the best controller yields, and what it costs; their ratio is the speedup."""
    best = results["best"]
    entry = next(h for h in results["heads"]
                 if (h["exit_layer"], h["temperature"]) == (best["exit_layer"], best["temperature"]))  # fmt: skip
    c = entry["controllers"][best["controller"]]
    drafts = sum(int(k) * n for k, n in c["drafted_histogram"].items()) / c["rounds"]
    cost, times = c["acceptance_length"] / c["speedup"], c["time_per_token"]
    parts = ", ".join(f"{part} {cost * times[part] / sum(times.values()):.2f}" for part in plots.PARTS)
    return (
        f"Why: a round drafts {drafts:.2f} tokens, of which {c['acceptance_length'] - 1:.2f} are accepted; with the "
        f"bonus token it yields {c['acceptance_length']:.2f} tokens. It takes the time of {cost:.2f} autoregressive "
        f"tokens ({parts})."
    )


def _elsewhere(results: dict[str, Any]) -> list[Block]:
    """The fastest method at each other temperature, judged among all of that temperature."""
    page: list[Block] = []
    for t in plots.temperatures(results):
        if t != results["best"]["temperature"]:
            best = fastest(results["heads"], t)
            page.append(("p", f"At temperature {t:g} the best is exit layer {best['exit_layer']} with "
                              f"{best['controller']}: {headline(best)}, {basis(best)}."))  # fmt: skip
    return page


def _words(results: dict[str, Any]) -> list[tuple[str, str]]:
    n, loop = results["num_layers"], results["loop_ngram"]
    return [
        ("exit layer", f"N: the exit head drafts from the hidden state after the first N of {n} layers (shallow)"),
        ("controller", "decides after each draft whether another is worth its cost; fixed:K always drafts K"),
        ("speedup", "tokens per second over autoregressive decoding on the same engine, interleaved with it"),
        (
            "95 % interval",
            "by bootstrap over conversations. In tables and pictures it is of each method by itself: right for a "
            "method named beforehand, too hopeful for the fastest of many. The interval of the best, at the top, holds "
            "for all methods at once; drafting pays if it lies above 1",
        ),
        ("before loops", f"speedup up to a text's first repeated {loop}-gram: repetitions are easy to draft"),
        ("acceptance length", "tokens that a round yields, bonus token included"),
        ("draft acceptance rate", "accepted over drafted; where drafts branch, one path of a tree at most"),
        ("verify", "the deep layers, once over all drafts of a round"),
    ]


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
        *(("p", told) for entry in entries for told in (of_oracle(entry), *of_sources(entry)) if told),
        *_costs(entries),
        *_predicted(entries),
    ]
    return page


def _later_turns(count: int) -> str:
    if not count:
        return ""
    return (
        f" {count} of the prompts are later turns, each behind the earlier ones and the backbone's own greedy answers."
    )


def _by_task(results: dict[str, Any], t: float) -> list[Block]:
    tasks = results["prompts"]["tasks"]
    if len(tasks) < 2:
        return []
    heads = [f"{name}, n = {count}" for name, count in tasks.items()]
    table = [["exit layer", "controller", *heads, "overall"]]
    for entry in (h for h in results["heads"] if h["temperature"] == t):
        for name, c in entry["controllers"].items():
            cells = [_speedup_and_length(figures) for figures in (*(c["tasks"][task] for task in tasks), c)]
            table.append([str(entry["exit_layer"]), name, *cells])
    return [("h3", "Speedup by task (acceptance length, n prompts)"), ("table", table)]


def _speedup_and_length(figures: dict[str, Any]) -> str:
    length = figures["acceptance_length"]
    return f"{figures['speedup']:.2f} ({'-' if length is None else f'{length:.2f}'})"


def _rivals(results: dict[str, Any]) -> list[Block]:
    """The comparison with transformers' own ways of decoding; nothing if none was measured."""
    if not results["rivals"]:
        return []
    best = results["rivals"][0]["best"]  # the same method in every entry

    def ratio(figures: dict[str, Any] | None) -> str:
        if figures is None:
            return "-"
        low, high = figures["speedup_ci95"]
        return f"{figures['speedup']:.2f} ({low:.2f}-{high:.2f})"

    ours = f"{best['controller']} at exit layer {best['exit_layer']}"
    table = [["rival", "exit layer", "tokens/s", "over autoregressive", "over generate", f"{ours} over it",
              "texts that differ"]]  # fmt: skip
    for r in results["rivals"]:
        ratios = [ratio(r["over_autoregressive"]), ratio(r["over_generate"]), ratio(r["best"])]
        table.append([r["rival"], str(r["exit_layer"] or "-"), f"{r['tokens_per_second']:.0f}", *ratios,
                      f"{r['differ']} of {r['texts']}"])  # fmt: skip
    text = (
        "What transformers itself offers, greedy, interleaved with the above on the same weights and prompts; unlike "
        "above, every time here includes prefill, which generate cannot leave out: over autoregressive decoding on the "
        f"engine of the exit heads, over transformers' own loop (generate), and {ours}, the fastest here, over each. "
        "It was chosen on the same prompts, which these intervals do not allow for."
    )
    return [("h2", "Beside transformers"), ("p", text), ("table", table)]


def _costs(entries: list[dict[str, Any]]) -> list[Block]:
    """The cost of each part of a round, of verification by its width, and the memory that the head needs."""
    parts = [["exit layer", "shallow", "head", "rest", "head, MiB", "cache, MiB"]]
    widths = sorted({int(w) for entry in entries for w in entry["costs"]["verify"]})
    verify = [["exit layer", "tokens verified at once", *map(str, widths)]]
    for entry in entries:
        c, n = entry["costs"], str(entry["exit_layer"])
        sizes = [f"{entry['memory'][key] / 2**20:.2f}" for key in ("head_bytes", "cache_bytes")]
        parts.append([n, *(f"{c[part]:.3f}" for part in ("shallow", "head", "rest")), *sizes])
        for name, key in (("cost", "verify"), ("target efficiency", "target_efficiency")):
            at = {int(w): f"{value:.2f}" for w, value in c[key].items()}  # keys are strings in JSON
            verify.append([n, name, *(at.get(w, "-") for w in widths)])
    unit = 1000 * entries[0]["costs"]["unit_seconds"]
    return [
        ("h3", "Cost of the parts"),
        ("p", f"In autoregressive tokens ({unit:.3g} ms each): shallow a token, head a pass, rest a round; and the "
              "memory that head and cache take on top of the backbone."),
        ("table", parts),
        ("h3", "Cost of verification"),
        ("p", "In autoregressive tokens. Target efficiency is the cost of the smallest width over that of each: at 1 "
              "more tokens are verified for nothing."),
        ("table", verify),
    ]  # fmt: skip


def _predicted(entries: list[dict[str, Any]]) -> list[Block]:
    """The speedups of fixed:K as predicted from acceptance and costs, beside the measured ones."""
    table = [["exit layer", "controller", "predicted", "measured", "95% interval"]]
    for entry in entries:
        for name, c in entry["controllers"].items():
            if (predicted := c.get("predicted_speedup")) is not None:
                low, high = c["speedup_ci95"]
                measured = [f"{predicted:.2f}", f"{c['speedup']:.2f}", f"{low:.2f}-{high:.2f}"]
                table.append([str(entry["exit_layer"]), name, *measured])
    if len(table) == 1:
        return []
    text = "Conditional rates and costs of one half of the conversations predict the speedup on the other half."
    return [("h3", "Predicted against measured speedup"), ("p", text), ("table", table)]


def _losslessness(results: dict[str, Any]) -> list[Block]:
    """Each test of the sampled texts, and each greedy text that differs."""
    greedy, sampling = results["lossless"]["greedy"], results["lossless"]["sampling"]
    page: list[Block] = [("h2", "Losslessness")]
    if greedy is not None and greedy["divergences"]:
        table = [["prompt", "exit layer", "controller", "first difference", "logit gap", "logit noise", "near tie"]]
        for d in greedy["divergences"]:
            table.append([d["prompt"], str(d["exit_layer"]), d["controller"], str(d["first_divergence"]),
                          *("-" if d[key] is None else f"{d[key]:.3g}" for key in ("logit_gap", "logit_noise")),
                          "yes" if d["explained"] else "NO"])  # fmt: skip
        page += [("h3", "Greedy texts that differ from autoregressive decoding"), ("table", table)]
    if sampling is not None:
        page.append(("h3", "Sampled texts"))
        page.append(
            (
                "p",
                f"Test: {sampling['test']}. Under losslessness the p-values are uniform; the test fails "
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


def _responses(results: dict[str, Any]) -> list[Block]:
    """The responses that the heads were trained on, if the run folder held them when the heads were measured."""
    found = results.get("responses")
    if found is None:
        return []
    rows, turns = found["rows"], found["turns"]
    temperatures = ", ".join(f"{n} at temperature {t}" for t, n in found["temperatures"].items())
    table = [
        ["responses", "how many", "share"],
        ["ended by themselves", str(found["stop"]), f"{found['stop'] / rows:.1%}"],
        ["cut at the longest length", str(found["length"]), f"{found['length'] / rows:.1%}"],
        ["repeat some 8 tokens", str(found["looping"]), f"{found['looping'] / rows:.1%}"],
        ["equal to another", str(found["duplicates"]), f"{found['duplicates'] / rows:.1%}"],
        ["encoded anew from a server's text", str(found["inexact"]), f"{found['inexact'] / rows:.1%}"],
        ["empty turns, left out", str(found["empty"]), f"{found['empty'] / turns:.1%}"],
        ["turns not reached", str(found["unanswered"]), f"{found['unanswered'] / turns:.1%}"],
    ]
    table += [[f"from {name or 'unnamed'}", str(n), f"{n / rows:.1%}"] for name, n in found["sources"].items()]
    workers, speed = found["workers"], found["tokens_per_second"]
    made = f" at {speed:.0f} tokens/s a process" if speed else ""
    by = f" by {workers} process{'es' if workers > 1 else ''}" if workers else ""
    again = "" if found["reproducible"] else "; they cannot be made again to the same rows"
    return [
        ("h2", "Responses learned from"),
        (
            "p",
            f"{rows} answers to {found['prompts']} prompts, {found['tokens']} tokens, by engine {found['engine']}{by}"
            f"{made}{again}; {temperatures}.",
        ),
        ("table", table),
        ("image", (plots.LENGTHS, "Lengths in tokens: of the contexts that were answered, and of the answers.")),
    ]


def write(results: dict[str, Any], folder: Path) -> None:
    """Write report.md, index.html and the pictures into a folder, atomically."""
    page = blocks(results)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in (content[0] for kind, content in page if kind == "image"):
            plots.draw(file, results, temporary / file)
        (temporary / "report.md").write_text(markdown(page))
        (temporary / "index.html").write_text(html_page(page, temporary))
