"""The model card of a draft model: what it contains, how many drafts are accepted, and how each engine loads it.

Takes a run and the results of its head; writes README.md and its pictures.
"""

from pathlib import Path
from typing import Any

from ..backbones.load import public_name
from ..evaluation.metrics import of_fixed
from ..runs.folder import RunDir
from . import card, gate
from .card import code

LIMITS = """\
- Measured for one text at a time, with the exit head. Speed with this folder in an engine was not measured; in other
  hardware, dtypes and batches, neither.
- It drafts for that one backbone. With another, or one that was fine-tuned since, the text stays right and drafts are
  accepted less often; no engine warns of it.
- Engines draft a fixed number of tokens, whatever the text. The exit head's controllers do not travel with it.
- Equal rounds were found in float32. In bfloat16 near ties may be decided otherwise, in text and in drafts."""


def write(folder: Path, run: RunDir, results: dict[str, Any]) -> None:
    """Write README.md of hub/<N>-draft/, and its pictures."""
    card.draw(folder, results)
    (folder / "README.md").write_text("\n".join(render(run, results)) + "\n")


def render(run: RunDir, results: dict[str, Any]) -> list[str]:
    """The lines of the card."""
    n, name, k = results["best"]["exit_layer"], public_name(run.config.backbone), gate.best_fixed(results)
    assert k is not None  # build.write refuses to export without it
    repo = f"{run.config.publish.repo_id}-draft" if run.config.publish.repo_id else card.HERE
    return [
        *card.front_matter(run, ["draft-model", "early-exit"], "finetune"),
        f"# Draft model for {name}, from {card.first(n)} of it",
        "",
        *code("python", f'draft = AutoModelForCausalLM.from_pretrained("{repo}")',
              "model.generate(**inputs, assistant_model=draft)"),
        f"{card.first(n).capitalize()} of {name}, one trained layer, and the final norm and LM head of {name}: a plain "
        f"causal LM of {n + 1} layers, for any engine that takes a draft model. **It holds weights of {name}.** By "
        f"itself it writes poorly; with {name} verifying, the text is that of {name}.",
        "",
        *card.verdict(results),
        "That was measured with the exit head itself, which shares layers, keys and values with the backbone and "
        "drafts as many tokens as pay. An engine with this folder holds them twice, and drafts a fixed number of "
        f"tokens. {_acceptance(results)} **Best fixed number of drafts here: {k}.**",
        "",
        *_per_k(results),
        *("## Engines", "", *_engines(name, repo, k)),
        *card.backbone(results, name),
        *card.acceptance(results),
        *card.how_measured(run, results),
        *card.trained(run, results),
        *("## Limits", "", LIMITS, ""),
        *card.licences(run, f"this folder holds layers, embedding and LM head of {name}"),
        f"Made with exit-heads. The method is that of {card.PAPER}.",
    ]  # fmt: skip


def _acceptance(results: dict[str, Any]) -> str:
    if not card.draft_vocabulary(results):
        return "Acceptance is the same, speed is not."
    return (
        "Acceptance is about the same (the exit head drafts from a part of the vocabulary, and this model from all of "
        "it), speed is not."
    )


def _per_k(results: dict[str, Any]) -> list[str]:
    """A table of the acceptance of each fixed K that was measured, which is the same in any engine."""
    rows = []
    for entry in results["heads"]:
        for k, c in of_fixed(entry["controllers"]).items():
            rate, rates = c["draft_acceptance_rate"], ", ".join(f"{r:.2f}" for r in c["conditional_rates"])
            share = "-" if rate is None else f"{rate:.0%}"
            rows.append([str(k), f"{entry['temperature']:g}", card.length(c), share, rates])
    header = ["K", "temperature", "acceptance length (95 %)", "draft acceptance rate", "conditional rate at 1, 2, ..."]
    return card.table(header, rows)


def _engines(name: str, repo: str, k: int) -> list[str]:
    """The commands for each engine, and whether a folder like this one was tested with it."""
    config = f'{{"method": "draft_model", "model": "{repo}", "num_speculative_tokens": {k}}}'
    return [
        "*Tested* means: a folder exported as this one was took as many rounds in that engine as the exit head "
        "would. Text is no test: with any draft model it is the backbone's own.",
        "",
        "**transformers** (tested, 5.23.0, in every test run of exit-heads). `generation_config.json` sets the "
        f"number of drafts ({k}, constant) and takes away the threshold of confidence that would cut some short.",
        "",
        *code("python",
              f'draft = AutoModelForCausalLM.from_pretrained("{repo}", dtype=model.dtype, device_map=model.device)',
              "model.generate(**inputs, assistant_model=draft)"),
        "**OpenVINO GenAI** (tested, 2026.4.1, on a CPU in float32). Both models are converted first.",
        "",
        *code("bash", "optimum-cli export openvino --model path/to/this/folder --task text-generation-with-past \\",
              "  --weight-format fp32 draft-ov"),
        *code("python", 'draft = genai.draft_model("draft-ov", "CPU")',
              'pipe = genai.LLMPipeline("backbone-ov", "CPU", scheduler_config=genai.SchedulerConfig(), '
              "draft_model=draft)",
              f"config = genai.GenerationConfig(max_new_tokens=128, num_assistant_tokens={k})"),
        "**vLLM** (tested, 0.32.0, on a CPU in float32). Draft and backbone need the same tensor parallel size.",
        "",
        *code("bash", f"vllm serve {name} --speculative-config '{config}'"),
        "**SGLang** (not tested).",
        "",
        *code("bash", f"python -m sglang.launch_server --model-path {name} --speculative-algorithm STANDALONE \\",
              f"  --speculative-draft-model-path {repo} --speculative-num-steps {k} --speculative-eagle-topk 1 \\",
              f"  --speculative-num-draft-tokens {k + 1}"),
        "**TensorRT-LLM** (not tested).",
        "",
        *code("python", "from tensorrt_llm import LLM", "from tensorrt_llm.llmapi import DraftTargetDecodingConfig", "",
              f'drafting = DraftTargetDecodingConfig(max_draft_len={k}, speculative_model="{repo}")',
              f'llm = LLM("{name}", speculative_config=drafting, disable_overlap_scheduler=True)'),
        "**llama.cpp** (not tested). Before v0.5.0 the options are `--draft-max` and `--draft-min`.",
        "",
        *code("bash", "python convert_hf_to_gguf.py path/to/this/folder --outfile draft.gguf",
              f"llama-server -m backbone.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {k} "
              "--spec-draft-n-min 0"),
    ]  # fmt: skip
