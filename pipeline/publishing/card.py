"""The model card of a published head, from results and pedigree alone; the draft model's card shares its parts.

Takes a run and the results of its head; writes README.md with the Hub's front matter, and its pictures. The card names
no folder, host, user or token.
"""

from pathlib import Path
from typing import Any

import yaml

from ..backbones.load import public_name
from ..evaluation import batch_report, plots, report
from ..evaluation import results as evaluated
from ..evaluation.rendering import markdown_table
from ..runs.folder import RunDir
from . import gate, head_folder, pedigree

PAPER = (
    "Liu et al., *Speculative Decoding via Early-exiting for Faster LLM Inference with Thompson Sampling Control "
    "Mechanism*, Findings of ACL 2024, [arXiv 2406.03853](https://arxiv.org/abs/2406.03853)"
)
HERE = "<this folder>"
"""Used in place of a Hub id if none is configured."""

LIMITS = """\
- Other hardware, dtypes, kinds of text and numbers of texts at once than those named here were not measured.
- No beams, no `return_dict_in_generate`. The attention is the decoder's own.
- In bfloat16, passes over one and over several tokens round differently, so near ties may be decided otherwise;
  in float32 greedy text is identical.
- `trust_remote_code=True` lets the code in `custom_generate/` run on your machine. It imports torch, transformers (5.17
  or newer) and safetensors."""

LAYER = """\
- `model.safetensors`: one decoder layer of the backbone's class, under its own names; `safetensors.torch.load_file`
  reads it without any code."""

DENSE = """\
- `model.safetensors`: one decoder layer, with attention and norms under the names that the backbone's class gives them,
  and a dense MLP (`gate_proj`, `up_proj`, `down_proj`) in place of its experts; `safetensors.torch.load_file` reads it
  without any code."""

FILES = """\
- `custom_generate/`: the decoder, byte for byte the one that was measured.
- `results.json`: what was measured.
- `training_config.yaml`, `provenance.json`: what made it, with which code, versions and hardware.
- `trained_on.json`, where there is one: hashes of the prompts that it learned from, so that `exit-heads evaluate`
  can refuse to measure it on them."""

MODEL = """\
- `config.json`, `modeling_exit_head.py`: `AutoModel.from_pretrained(..., trust_remote_code=True)` gives that layer as a
  model from hidden state to hidden state."""

PROFILE = "- `speculation_profile.json`: acceptance by draft position, in the schema of NVIDIA's Model-Optimizer."


def write(folder: Path, run: RunDir, results: dict[str, Any]) -> None:
    """Write README.md of hub/<N>/, and its pictures."""
    draw(folder, results)
    (folder / "README.md").write_text("\n".join(render(run, results)) + "\n")


def draw(folder: Path, results: dict[str, Any]) -> None:
    """Draw the pictures that `acceptance` refers to."""
    for file in plots.files("acceptance", results):
        plots.draw(file, results, folder / file)


def render(run: RunDir, results: dict[str, Any]) -> list[str]:
    """The lines of the card."""
    best, n, name = results["best"], results["best"]["exit_layer"], public_name(run.config.backbone)
    repo = run.config.publish.repo_id or HERE
    return [
        *front_matter(run, ["custom_generate", "early-exit", "exit-head"], "adapter"),
        f"# Exit head for {name}, exit layer {n}",
        "",
        *code("python", f'model.generate(**inputs, custom_generate="{repo}", trust_remote_code=True)'),
        f"One decoder layer for one backbone, {name}. With it the frozen backbone drafts several tokens by "
        f"{first(n)} of its own {results['num_layers']} and verifies them in one pass of the others. The text is the "
        "backbone's own, token for token in greedy decoding and in distribution when sampling; only the time "
        "changes.",
        "",
        *verdict(results),
        f'Default controller `{best["controller"]}`; `controller="thompson"`, `"fixed:2"`, `"beta"` or `"none"` (no '
        "drafts) choose another. Sampling, stopping criteria and streamers work as in `generate`, and so do logits "
        "processors that keep nothing between calls; others (`guidance_scale`, SynthID watermarks) are refused. A "
        "processor of your own is called for drafts that may be rejected: if it depends on nothing but `input_ids` and "
        "`scores`, declare it by `stateless = True`. The rows of a batch are decoded together, each with an end "
        "of its own, where controller and backbone know of several texts at once, else one after the other.",
        "",
        *_example(run, repo, results["backbone"].get("gguf")),
        *_in_vllm(results, name, repo),
        *backbone(results, name),
        *_measured(results),
        *_together(results),
        *acceptance(results),
        *how_measured(run, results),
        *trained(run, results),
        *("## Limits", "", LIMITS, ""),
        *licences(run, f"the exit layer was trained with the backbone{_began(run)}"),
        *("## Files", "", DENSE if _is_dense(run) else LAYER, FILES),
        *([MODEL] if head_folder.has_model(results["backbone"]["model_type"]) else []),
        *([PROFILE] if gate.best_fixed(results) else []),
        "",
        f"Made with exit-heads. The method is that of {PAPER}.",
    ]  # fmt: skip


# ---- parts of both cards


def front_matter(run: RunDir, tags: list[str], relation: str) -> list[str]:
    """The YAML front matter that the Hub reads. relation: how this repo relates to the backbone, in the Hub's words."""
    name = public_name(run.config.backbone)
    front: dict[str, Any] = {"library_name": "transformers", **pedigree.licence(run.config)}
    if "/" in name:
        front |= {"base_model": name, "base_model_relation": relation}
    if datasets := pedigree.datasets(run):
        front["datasets"] = datasets
    front["tags"] = ["speculative-decoding", *tags]
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]


def code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def first(n: int) -> str:
    return "the first layer" if n == 1 else f"the first {n} layers"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [*markdown_table(header, *rows), ""]


def verdict(results: dict[str, Any]) -> list[str]:
    """The speedup, whether decoding is lossless, and a warning if the gate refused the head."""
    best = results["best"]
    lines = [
        f"**Speedup {best['speedup']:.2f}** ({evaluated.span(best)}) at temperature {best['temperature']:g} with "
        f"`{best['controller']}`, {evaluated.basis(best)}. Acceptance length {length(best)}. Lossless: "
        f"{report.lossless_line(results)}.",
        "",
    ]
    if not results["gate"]["passed"]:
        reasons = [f"> - {reason}" for reason in results["gate"]["reasons"]]
        lines += ["> **This head did not pass the gate and was published by force:**", *reasons, ""]
    return lines


def length(figures: dict[str, Any]) -> str:
    """Acceptance length and its interval, as text."""
    if figures["acceptance_length"] is None:
        return "-"
    low, high = figures["acceptance_length_ci95"]
    return f"{figures['acceptance_length']:.2f} ({low:.2f}-{high:.2f})"


def backbone(results: dict[str, Any], name: str) -> list[str]:
    """The section that identifies the exact backbone."""
    record = results["backbone"]
    return [
        "## Backbone",
        "",
        f"{name}, revision {record.get('revision') or 'not pinned'}, {record['model_type']} of {results['num_layers']} "
        f"layers, fingerprint `{record['fingerprint']}` (architecture, vocabulary and a sample of the weights).",
        "",
        *_dequantised(record.get("gguf")),
    ]


def _dequantised(gguf: dict[str, Any] | None) -> list[str]:
    """The paragraph on the GGUF file that the backbone's weights come from, if they do."""
    if gguf is None:
        return []
    called = f", which calls itself {gguf['name']}" if gguf["name"] else ""
    return [
        f"Measured on the weights dequantised from `{gguf['file']}` ({gguf['quantisation']}, sha256 "
        f"`{gguf['sha256']}`){called}. The checkpoint that the file was quantised from is another backbone, with "
        "another fingerprint: `allow_other_backbone=True` in `generate` lets the head draft for it all the same, "
        "with an acceptance that was not measured here.",
        "",
    ]


def acceptance(results: dict[str, Any]) -> list[str]:
    """The section with the pictures of acceptance by draft position."""
    lines = ["## Acceptance by draft position", ""]
    for t, file in zip(plots.temperatures(results), plots.files("acceptance", results), strict=True):
        lines += [f"![Share of drafts accepted, by position, at temperature {t:g}]({file})", ""]
    return [
        *lines,
        "Of the rounds that reached the position (conditional) and of all rounds (marginal), by the controller that "
        "drafted furthest.",
        "",
        *draft_vocabulary(results),
    ]


def draft_vocabulary(results: dict[str, Any]) -> list[str]:
    """Which tokens the head can draft; nothing if it can draft all."""
    found = results["heads"][0].get("draft_vocabulary", {"size": 0, "of": 0})
    if found["size"] == found["of"]:
        return []
    return [
        f"The head drafts {found['size']:,} of the backbone's {found['of']:,} tokens, which are "
        f"{found['coverage']:.1%} of the tokens of the measured texts. The others come from the backbone alone, so the "
        "text has them as often as ever.",
        "",
    ]


def how_measured(run: RunDir, results: dict[str, Any]) -> list[str]:
    """The section on prompts, hardware, dtype, versions and command, and on the parity check of the folder."""
    prompts = results["prompts"]
    lines = [
        "## How it was measured",
        "",
        f"{prompts['count']} held-out prompts of {prompts['source']['name']}, {prompts['max_new_tokens']} new "
        f"tokens, batch 1, {results['dtype']}, {_hardware(run, results)}. Speedup is tokens per second over "
        "autoregressive decoding on the same engine, dtype and prompts, interleaved, prefill left out on both "
        "sides; intervals by bootstrap over conversations. In the tables each is of the method by itself; the one at "
        "the top allows for the choice of the fastest. Acceptance length counts the bonus token; before loops: up to a "
        f"text's first repeated {results['loop_ngram']}-gram. Again: `exit-heads run --config training_config.yaml`.",
        "",
    ]
    if parity := results["gate"]["parity"]:
        low, high = parity["evaluated_ci95"]
        lines += [
            f"Through this folder, in a process with torch and transformers alone: {parity['identical']} of "
            f"{parity['texts']} greedy texts are those that were evaluated, {parity['tokens_per_round']:.2f} "
            f"tokens a round with `{parity['controller']}` (evaluated: {parity['evaluated']:.2f}, "
            f"{low:.2f}-{high:.2f}).",
            "",
        ]
    return lines


def _hardware(run: RunDir, results: dict[str, Any]) -> str:
    where = f"{results['device']}, {results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    record = next((r for r in pedigree.records_of(run) if r["stage"] == "evaluate"), None)
    if record is None:
        return where
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "python"))
    return f"{', '.join(record['hardware']['gpus']) or record['hardware']['cpu']} ({where}), {versions}"


def trained(run: RunDir, results: dict[str, Any]) -> list[str]:
    """The section on training data, loss and progress, as far as the run folder has records of them."""
    manifest, head = pedigree.responses(run), pedigree.trained(run, results["best"]["exit_layer"])
    lines = ["## How it was trained", ""]
    if manifest is not None:
        found, temperatures = manifest["responses"], manifest["sampling"]["temperatures"]
        lines.append(
            f"On {found['rows']} answers ({found['tokens']} tokens) that the backbone gave to {found['prompts']} "
            f"prompts of {', '.join(pedigree.prompt_licences(run))}, at temperatures "
            f"{', '.join(f'{t:g}' for t in temperatures)}."
        )
    if head is not None:
        d, terms = head["config"], ", ".join(head["config"].get("loss", ["kl"]))
        before, after = head["before"]["expected_acceptance_length"], head["expected_acceptance_length"]
        lines.append(
            f"The backbone stays frozen; the layer learns its distribution (loss: {terms}) in {d['max_steps']} steps "
            f"of {d['sequences_per_step']} sequences of {d['sequence_length']} tokens, by AdamW with a peak learning "
            f"rate of {d['learning_rate']:g}. The expected acceptance length on validation responses went from "
            f"{before:.2f} to {after:.2f}, at its best at step {head['best_step']}."
        )
    if manifest is None and head is None:
        lines.append("Elsewhere: the run that published it holds no record of it.")
    return [*lines, ""]


def licences(run: RunDir, why: str) -> list[str]:
    """The section on licences of weights, prompts and code. why: how the weights depend on the backbone."""
    found = pedigree.licence(run.config)
    name = found.get("license_name") or found.get("license")
    link = f" ({found['license_link']})" if "license_link" in found else ""
    weights = f"{name}{link}" if name else "that of the backbone, which its files do not name: look it up there"
    prompts = [f"{source}: {licence or 'not recorded'}" for source, licence in pedigree.prompt_licences(run).items()]
    lines = ["## Licences", "", f"- Weights: {weights}; {why}."]
    if prompts:
        lines.append(f"- Prompts of training, which are not in this folder: {'; '.join(prompts)}.")
    return [*lines, "- Code: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0), by the exit-heads authors.", ""]


# ---- parts of the head's card


def _example(run: RunDir, repo: str, gguf: dict[str, Any] | None) -> list[str]:
    name, revision = public_name(run.config.backbone), run.config.backbone.revision
    pinned = f', revision="{revision}"' if revision else ""
    plain: list[str] = []
    if gguf is not None:
        name = name if "/" in name else "folder/of/the/file"
        pinned += f', gguf_file="{gguf["file"]}"'
        plain = ["del model.config.quantization_config  # the weights are dequantised, and nothing else is quantised"]
    return code(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{pinned}, dtype="{run.config.backbone.dtype}")',
        *plain,
        f'inputs = AutoTokenizer.from_pretrained("{name}"{pinned})("...", return_tensors="pt")',
        f'out = model.generate(**inputs, max_new_tokens=128, custom_generate="{repo}", trust_remote_code=True)',
    )


def _in_vllm(results: dict[str, Any], name: str, repo: str) -> list[str]:
    """How vLLM drafts with this folder; nothing for a family that its plugin does not know, or without any fixed K."""
    k = gate.best_fixed(results)
    if k is None or not head_folder.has_model(results["backbone"]["model_type"]):
        return []
    served = name if "/" in name else "folder/of/the/backbone"
    config = f'{{"method": "draft_model", "model": "{repo}", "num_speculative_tokens": {k}}}'
    return [
        "In vLLM, with the plugin exit-heads-vllm, which shares the backbone's layers and cache with the drafter "
        "(rounds were compared on a CPU; speed there is not that of this card):",
        "",
        *code("bash", f"vllm serve {served} --speculative-config '{config}'"),
    ]


def _measured(results: dict[str, Any]) -> list[str]:
    """For each temperature a table of all controllers, and one of the fastest by task."""
    lines = ["## Measured", ""]
    columns = [*report.COLUMNS[:6], "acceptance length (95 %)", report.COLUMNS[7]]
    for entry in results["heads"]:
        rows = report.rows(entry)
        for row, figures in zip(rows, entry["controllers"].values(), strict=True):
            row[6] = length(figures)
        lines += [f"Temperature {entry['temperature']:g}:", "", *table(columns, rows)]
        if len(results["prompts"]["tasks"]) > 1:
            lines += _by_task(entry)
    return lines


def _together(results: dict[str, Any]) -> list[str]:
    """Up to how many texts at once the head pays, if that was measured."""
    told = batch_report.sentence(results, results["best"]["exit_layer"])
    return [told, ""] if told else []


def _by_task(entry: dict[str, Any]) -> list[str]:
    name, figures = max(entry["controllers"].items(), key=lambda item: item[1]["speedup"])
    rows = []
    for task, c in figures["tasks"].items():
        low, high = c["speedup_ci95"]
        rows.append([str(task), str(c["prompts"]), f"{c['speedup']:.2f}", f"{low:.2f}-{high:.2f}", length(c)])
    header = ["task", "prompts", "speedup", "95% interval", "acceptance length (95 %)"]
    return [f"By task, temperature {entry['temperature']:g}, `{name}`:", "", *table(header, rows)]


def _began(run: RunDir) -> str:
    """A clause for `licences` if training started from the backbone's weights; else nothing."""
    init = pedigree.config_of(run).get("distill", {}).get("init", "last")
    what = "its attention and norms began as copies of those" if _is_dense(run) else "began as a copy"
    return "" if init == "random" else f", and {what} of one of its layers"


def _is_dense(run: RunDir) -> bool:
    return pedigree.config_of(run).get("distill", {}).get("head") == "dense"
