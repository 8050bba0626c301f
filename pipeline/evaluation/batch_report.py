"""The words of evaluate.batch_sizes: up to how many texts at once drafting pays, for the report and the card.

Takes the dict of results.json; gives sentences and the report's section.
"""

from typing import Any

from . import plots
from .batches import WAVES
from .rendering import Block

HEADER = ["exit layer", "texts at once", "controller", "speedup", "95% interval", "predicted", "tokens/s", "ms a token",
          "drafts a token", "draft acceptance rate", "rows a text", "target efficiency"]  # fmt: skip


def entry_of(results: dict[str, Any], exit_layer: int) -> dict[str, Any] | None:
    """What was measured of a head with several texts at once; None if nothing was."""
    return next((e for e in results.get("batches") or () if e["exit_layer"] == exit_layer), None)


def named(results: dict[str, Any], entry: dict[str, Any]) -> str:
    """The controller to speak of: the judged one if it knows of several texts, else the default one, else any."""
    measured = list(entry["controllers"])
    return next((name for name in (results["best"]["controller"], "thompson") if name in measured), measured[0])


def sentence(results: dict[str, Any], exit_layer: int) -> str:
    """Up to how many texts at once the head pays; nothing if that was not measured."""
    entry = entry_of(results, exit_layer)
    if entry is None:
        return ""
    name = named(results, entry)
    c = entry["controllers"][name]
    sizes, most = {at["batch_size"]: at for at in c["sizes"]}, c["pays_up_to"]
    beyond = next((b for b in sizes if b > most), None)
    said = f"Several texts at once, `{name}` at temperature {entry['temperature']:g}: "
    if most == 0:
        return f"{said}drafting does not surely pay at {_at(sizes[beyond])}, the fewest measured."
    said += f"drafting pays up to {_at(sizes[most])}"
    return f"{said}, the most measured." if beyond is None else f"{said}, and not surely at {_at(sizes[beyond])}."


def summary(results: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Figures for tracking."""
    c = entry["controllers"][named(results, entry)]
    speedups = {f"evaluate/batches/speedup_{at['batch_size']}": at["speedup"] for at in c["sizes"]}
    return {"evaluate/batches/pays_up_to": c["pays_up_to"], **speedups}


def _at(at: dict[str, Any]) -> str:
    texts = f"{at['batch_size']} text{'s' if at['batch_size'] > 1 else ''}"
    return f"{texts} (speedup {at['speedup']:.2f}, 95 % interval {at['low']:.2f}-{at['high']:.2f})"


def lossless_part(results: dict[str, Any]) -> str:
    """What the proof of the texts that were decoded together found; nothing if there was none."""
    found = results["lossless"].get("batches")
    if found is None:
        return ""
    if "divergences" not in found:
        said = "follow" if found["passed"] else "do NOT follow"
        return f"{found['texts']} texts sampled several at once {said} it too (p-value {found['p_value']:.2g})"
    part = f"{found['identical']} of {found['texts']} greedy texts decoded several at once are so too"
    if found["divergences"]:
        near = sum(d["explained"] for d in found["divergences"])
        part += f", {near} of the {len(found['divergences'])} other ones leave it at a near tie"
    return part


def blocks(results: dict[str, Any]) -> list[Block]:
    """The section of the report; nothing if no number of texts was measured."""
    entries = results.get("batches") or []
    if not entries:
        return []
    first = entries[0]
    page: list[Block] = [
        ("h2", "Several texts at once"),
        (
            "p",
            f"Temperature {first['temperature']:g}. The prompts, {WAVES} texts for each place at least, pass through "
            "as many places as the table says, and a waiting text takes the place of a finished one; counted are the "
            "rounds in which all places are taken. Speedup is over autoregressive decoding of as many texts at once; "
            f"median of {first['repeats']} repeats in turns, with Student's interval of the repeats, which says how "
            "well the time is known and nothing of other prompts. A time per token is that of one text among the "
            "others.",
        ),
        *(("p", _paid(results, entry)) for entry in entries),
        *_pictures(results),
        ("table", [HEADER, *(row for entry in entries for row in _rows(entry))]),
        (
            "p",
            "Predicted: tokens of a round, by the acceptance of one text at a time, over its time, by the times of "
            "passes of as many rows; of thompson and goodput, those of the best K. Rows a text are what the deep "
            "layers verify in a full round, and target efficiency (MoESD, https://arxiv.org/abs/2505.19645) is the "
            "time of verifying one row of each text over that of these rows: at 1 drafts are verified for nothing.",
        ),
    ]
    found = results["lossless"].get("batches") or {}
    if found.get("divergences"):
        table = [["prompt", "exit layer", "controller", "first difference", "near tie"]]
        for d in found["divergences"]:
            table.append([d["prompt"], str(d["exit_layer"]), d["controller"], str(d["first_divergence"]),
                          "yes" if d["explained"] else "NO"])  # fmt: skip
        page += [("h3", "Texts that differ from those of one at a time"), ("table", table)]
    return page


def _paid(results: dict[str, Any], entry: dict[str, Any]) -> str:
    said = f"Exit layer {entry['exit_layer']}. {sentence(results, entry['exit_layer'])}"
    predicted, most = entry["controllers"][named(results, entry)]["predicted_up_to"], entry["batch_sizes"][-1]
    if predicted is None:
        return said
    where = "at no number of texts" if predicted == 0 else f"up to {predicted} text{'s' if predicted > 1 else ''}"
    return f"{said} Predicted was that it pays {where}{', the most looked at' if predicted == most else ''}."


def _pictures(results: dict[str, Any]) -> list[Block]:
    caption = "speedup over the number of texts at once, with intervals; dotted: predicted. Above 1 drafting pays"
    return [("image", (file, f"Exit layer {n}: {caption}.")) for n, file in plots.batch_files(results).items()]


def _rows(entry: dict[str, Any]) -> list[list[str]]:
    n, table = str(entry["exit_layer"]), []
    for i, plain in enumerate(entry["autoregressive"]):
        b = str(plain["batch_size"])
        table.append([n, b, "autoregressive", "1", "", "", f"{plain['tokens_per_second']:.0f}",
                      f"{1000 * plain['seconds_per_token']:.3g}", "", "", "", ""])  # fmt: skip
        for name, c in entry["controllers"].items():
            at = c["sizes"][i]
            rate = at["draft_acceptance_rate"]
            table.append(
                [n, b, name, f"{at['speedup']:.2f}", f"{at['low']:.2f}-{at['high']:.2f}", _number(at["predicted"]),
                 f"{at['tokens_per_second']:.0f}", f"{1000 * at['seconds_per_token']:.3g}",
                 f"{at['drafted_per_token']:.2f}", "-" if rate is None else f"{rate:.0%}",
                 _number(at["rows_per_text"]), _number(at["target_efficiency"])]
            )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
