"""The model card of a published head, from its results.

Takes results.json and the config, gives Markdown with the Hub's front matter; names no folder, host or token.
Knows nothing of how anything was measured.
"""

import platform
from typing import Any

import torch
import transformers
import yaml

from . import plots, report
from .backbones import public_name
from .config import Config


def render(results: dict[str, Any], config: Config) -> str:
    """The whole README.md of hub/<N>/."""
    best, n = results["best"], results["best"]["exit_layer"]
    name = public_name(config.backbone)
    repo = config.publish.repo_id or "<this folder>"
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["custom_generate", "speculative-decoding", "early-exit", "exit-head", "draft-model"],
    }
    if "/" in name:
        front |= {"base_model": name, "base_model_relation": "adapter"}
    low, high = best["speedup_ci95"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# Exit head for {name}, exit layer {n}",
        "",
        f"One decoder layer that lets the frozen backbone draft several tokens with its own first {n} of "
        f"{results['num_layers']} layers and verify them in one pass of the rest. The output is the backbone's own.",
        "",
        "```python",
        f'model.generate(**inputs, custom_generate="{repo}", trust_remote_code=True)',
        "```",
        "",
        f'Default controller `{best["controller"]}`; `controller="fixed:2"`, `"beta"` or `"none"` choose another. '
        "Rows of a batch are decoded one after the other.",
        "",
        f"**Speedup {best['speedup']:.2f}** (95 % interval {low:.2f}-{high:.2f}) at temperature "
        f"{best['temperature']:g}, acceptance length {best['acceptance_length']:.2f}. Lossless: "
        f"{report.lossless_line(results)}.",
        "",
    ]
    if not results["gate"]["passed"]:
        lines += [
            "> **This head did not pass the gate and was published by force:**",
            *(f"> - {r}" for r in results["gate"]["reasons"]),
            "",
        ]
    for t in plots.temperatures(results):
        lines += [
            f"## Temperature {t:g}",
            "",
            "| " + " | ".join(report.COLUMNS) + " |",
            "|" + "---|" * len(report.COLUMNS),
        ]
        for entry in (h for h in results["heads"] if h["temperature"] == t):
            lines += ["| " + " | ".join(row) + " |" for row in report.rows(entry)]
        lines.append("")
    prompts, backbone = results["prompts"], results["backbone"]
    lines += [
        "## How it was measured",
        "",
        f"{prompts['count']} held-out prompts of {prompts['source']['name']}, {prompts['max_new_tokens']} new tokens, "
        f"batch 1, {results['device']}, {results['threads']} threads, {results['dtype']}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}. Speedup is tokens per second "
        "over autoregressive decoding on the same engine, interleaved, prefill left out. Acceptance length counts "
        f"the bonus token.",
        "",
        "## Backbone",
        "",
        f"{name}, revision {backbone.get('revision') or 'not pinned'}, fingerprint `{backbone['fingerprint']}`. "
        "Another backbone, also a fine-tuned copy, is refused. The backbone's licence and the licence of the "
        f"prompts apply.",
        "",
        "Made with exit-heads; method after Liu et al., *Speculative Decoding via Early-exiting for Faster LLM "
        "Inference with Thompson Sampling Control Mechanism*, Findings of ACL 2024.",
        "",
    ]
    return "\n".join(lines)
