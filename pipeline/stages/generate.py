"""The stage `generate`: lets the backbone answer prompts; exit heads are trained on its answers.

Takes the config's backbone and prompts; writes responses/ (generation/responses.py). Any number of processes can share
the work, shard by shard, and a killed one loses only its current shard.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..backbones.ends import end_tokens
from ..backbones.gguf_files import gguf_record
from ..backbones.load import device_of, load_model, load_tokenizer, public_name, rounds_by
from ..backbones.source import load_config
from ..backbones.weight_files import fingerprint_of_files
from ..config import Config, to_dict
from ..errors import UserError
from ..generation.answerers.interface import Answerer
from ..generation.answerers.registry import make_answerer
from ..generation.responses import Responses
from ..generation.shard_answers import AnswerWorker
from ..prompts.early_check import check_evaluation_prompts
from ..prompts.ids import encoding
from ..prompts.prompt import Prompt, count_sources
from ..prompts.records import pins, source_pins, source_record
from ..prompts.sets import training_prompts
from ..prompts.templates import warn_of_turn_end
from ..prompts.vocabulary import check_ids, check_prompts, has_ids_beyond
from ..runs.files import sha256_of
from ..runs.folder import RunDir


def run(run: RunDir) -> None:
    """Answer the prompts that have no answers yet. Raises UserError for mistakes in the config, the prompts or the
    backbone, and for inputs that have changed since the responses were begun."""
    config, responses = run.config, Responses(run / "responses")
    must_run = run.plan("generate", [])
    manifest = responses.manifest()
    if not must_run and responses.is_complete():
        _check_source(config, manifest, gone_is_fine=True)
        print("generate: done already")
        return
    # These checks precede the mark, so that a mistake found here can be corrected without --redo.
    _check_source(config, manifest)
    tokenizer, architecture = load_tokenizer(config.backbone), load_config(config.backbone)
    ends = end_tokens(config.backbone, tokenizer)
    if manifest is None:
        warn_of_turn_end("generate", tokenizer, config.prompts, ends)
        check_evaluation_prompts(config, tokenizer, architecture.max_position_embeddings)
        if has_ids_beyond(tokenizer, architecture.vocab_size):  # before the backbone is loaded
            first = training_prompts(config)[: config.generate.num_prompts or None]
            check_prompts(first, tokenizer, config.prompts, architecture.vocab_size)
    prompts = source_record(config.prompts) if manifest is None else manifest["prompts"]  # before a model is loaded
    answerer = _answerer(config, tokenizer, ends)
    head = _head(config, architecture, answerer) | {"prompts": prompts}
    _check_backbone(config, manifest, head)
    with run.stage("generate", [], shared=True) as summary:
        if manifest is None:
            responses.ask(head, _in_shards(_asked(config, tokenizer, architecture), config.generate.shard_size))
        responses.check_asked()
        by = rounds_by(device_of(config.machine.device))
        context = architecture.max_position_embeddings
        worker = AnswerWorker(config, responses, answerer, tokenizer, context, architecture.vocab_size, by)
        summary |= _summary(responses, worker.work())
    _print_summary(summary)


# ---- what is asked, and who answers


def _asked(config: Config, tokenizer: Any, architecture: Any) -> Iterator[tuple[Prompt, list[int]]]:
    """Yields prompts and their ids in the order of the shards."""
    g, context = config.generate, architecture.max_position_embeddings
    taken: list[Prompt] = []
    found = encoding(training_prompts(config), tokenizer, config.prompts, context, g.max_new_tokens, g.num_prompts)
    for prompt, ids in found:
        check_ids(ids, tokenizer, architecture.vocab_size, f"prompt {prompt.id}")
        taken.append(prompt)
        yield prompt, ids
    if g.num_prompts > len(taken):
        print(f"generate.num_prompts={g.num_prompts}: there are {len(taken)} prompts; all of them are answered")
    if config.prompts.mixture:
        print(f"prompts.mixture: {', '.join(f'{n} of {name}' for name, n in count_sources(taken).items())}")


def _in_shards(asked: Iterator[tuple[Prompt, list[int]]], size: int) -> Iterator[list[tuple[str, list[int]]]]:
    while part := list(islice(asked, size)):
        yield [(json.dumps(asdict(prompt), ensure_ascii=False), ids) for prompt, ids in part]


def _answerer(config: Config, tokenizer: Any, ends: list[int]) -> Answerer:
    if config.machine.threads > 0:
        torch.set_num_threads(config.machine.threads)
    device = device_of(config.machine.device)
    return make_answerer(
        config, partial(load_model, config.backbone, device, config.machine.device_map), tokenizer, ends
    )


def _head(config: Config, architecture: Any, answerer: Answerer) -> dict[str, Any]:
    """The manifest's record of the backbone and the sampling that make the responses."""
    sampling: dict[str, Any] = {"seed": config.seed, "reproducible": answerer.reproducible}
    sampling |= to_dict(config.generate)
    folder, controller = sampling.pop("exit_head"), sampling.pop("controller")
    if config.generate.engine == "speculative":  # the head is recorded by its hash, not by a local path
        sampling |= {"head_sha256": sha256_of(Path(folder)), "controller": controller}
    return {
        "backbone": {
            "name": public_name(config.backbone),
            "revision": config.backbone.revision,
            "fingerprint": fingerprint_of_files(config.backbone),
            "model_type": architecture.model_type,
            **({"gguf": gguf} if (gguf := gguf_record(config.backbone)) else {}),
        },
        "sampling": sampling,
    }


# ---- checks that the inputs have not changed


def _check_source(config: Config, manifest: dict[str, Any] | None, *, gone_is_fine: bool = False) -> None:
    """Raises UserError if the prompts are no longer those that the responses were begun with."""
    if manifest is None:
        return
    try:
        now = source_pins(config.prompts)
    except UserError:
        if gone_is_fine:  # a finished stage no longer needs its prompts, which may be on another machine
            return
        raise
    was = pins(manifest["prompts"])
    keys = {
        "prompts": "prompts.mixture" if config.prompts.mixture else f"prompts.path={config.prompts.path}",
        "chat_template": f"prompts.chat_template={config.prompts.chat_template}",
    }
    for what, key in keys.items():
        if was.get(what) != now.get(what):
            raise UserError(
                f"{key}: the file has changed since the responses were begun (sha256 was "
                f"{str(was.get(what))[:12]}..., is {str(now.get(what))[:12]}...). "
                "Restore it, give another run.name, or --redo generate."
            )


def _check_backbone(config: Config, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Raises UserError if the responses were begun with other weights."""
    if old is None:
        return
    if old["backbone"]["fingerprint"] != new["backbone"]["fingerprint"]:
        raise UserError(
            f"backbone.name_or_path={config.backbone.name_or_path}: its weights have changed since the responses were "
            "begun. Restore them, give another run.name, or --redo generate."
        )
    if old["sampling"].get("head_sha256") != new["sampling"].get("head_sha256"):
        raise UserError(
            f"generate.exit_head={config.generate.exit_head}: another head than the one that the responses were begun "
            "with. Restore it, give another run.name, or --redo generate."
        )


# ---- summary


def _summary(responses: Responses, tokens_per_second: float) -> dict[str, Any]:
    manifest = responses.manifest()
    assert manifest is not None
    total = manifest["responses"]
    if not total["rows"]:
        raise UserError(
            "prompts.chat_template: the backbone answered every prompt with its end token alone; "
            "check that the prompts fit the backbone (chat_template, column)."
        )
    return {
        "rows": total["rows"],
        "empty": total["empty"],
        "unanswered": total["unanswered"],
        "inexact": total["inexact"],
        "tokens": total["tokens"],
        "tokens_per_second": tokens_per_second,
        "finish_reasons": {reason: total[reason] for reason in ("stop", "length")},
        "looping_share": round(total["looping"] / total["rows"], 4),
    }


def _print_summary(s: dict[str, Any]) -> None:
    reasons = ", ".join(f"{n} {reason}" for reason, n in s["finish_reasons"].items())
    dropped = f", {s['empty']} empty ones dropped" if s["empty"] else ""
    dropped += f", {s['unanswered']} turns not reached" if s["unanswered"] else ""
    speed = f" at {s['tokens_per_second']:.0f} tokens/s in this process" if s["tokens_per_second"] else ""
    print(
        f"generate: {s['rows']} responses ({reasons}{dropped}), {s['tokens']} tokens{speed}; "
        f"{s['looping_share']:.0%} repeat some 8 tokens"
    )
    if s["inexact"]:
        print(
            f"generate: {s['inexact']} of {s['rows']} responses are a server's text encoded anew, not the ids it drew"
        )
