"""generate: the backbone answers prompts; its answers are what the exit heads learn from.

Takes the config's backbone and prompts, gives responses/ (responses.py). A shard is a pure function of the config and
its number, so any number of processes share the work, and a killed one loses no more than the shard it was at. Each
turn of a conversation is answered in its own context, behind the backbone's answers to the turns before. Knows nothing
of exit heads, but that an engine may draft with one.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..backbones.load import device_of, load_model, load_tokenizer, public_name, rounds_by
from ..backbones.source import load_config
from ..backbones.weight_files import fingerprint_of_files
from ..config import Config, to_dict
from ..errors import UserError
from ..generation.answerers.interface import Answer, Answerer, Question, Report, Sampling
from ..generation.answerers.registry import make_answerer
from ..generation.repetition import repeated_share
from ..generation.responses import COUNTS, Responses
from ..prompts.ids import contexts, encoding
from ..prompts.prompt import Prompt, count_sources
from ..prompts.records import pins, source_pins, source_record
from ..prompts.sets import training_prompts
from ..prompts.turns import next_turn
from ..prompts.vocabulary import check_ids, check_prompts, has_ids_beyond
from ..runs.files import sha256_of
from ..runs.folder import RunDir
from ..runs.shards import made


def run(run: RunDir) -> None:
    responses = Responses(run / "responses")
    must_run = run.plan("generate", [])
    manifest = responses.manifest()
    if not must_run and responses.is_complete():
        _check_source(run.config, manifest, gone_is_fine=True)
        print("generate: done already")
        return
    # All that a user can get wrong comes before the stage is marked as begun: a mark would ask for --redo.
    _check_source(run.config, manifest)
    prompts = source_record(run.config.prompts) if manifest is None else manifest["prompts"]  # before a model is loaded
    if manifest is None:
        _check_vocabulary(run.config)
    worker = Worker(run.config, responses)
    head = worker.head() | {"prompts": prompts}
    _check_backbone(run.config, manifest, head)
    with run.stage("generate", [], shared=True) as summary:
        if manifest is None:
            asked = _asked(run.config, worker.tokenizer, worker.context, worker.vocab_size)
            responses.ask(head, _in_shards(asked, run.config.generate.shard_size))
        speed = worker.work()
        summary |= _summary(responses, speed)
    _print_summary(summary)


# ---- what is asked


def _check_vocabulary(config: Config) -> None:
    """Raises UserError, before the backbone is loaded, for prompts with token ids that it does not have."""
    tokenizer, vocab_size = load_tokenizer(config.backbone), load_config(config.backbone).vocab_size
    if has_ids_beyond(tokenizer, vocab_size):
        first = training_prompts(config)[: config.generate.num_prompts or None]
        check_prompts(first, tokenizer, config.prompts, vocab_size)


def _asked(config: Config, tokenizer: Any, context: int, vocab_size: int) -> Iterator[tuple[Prompt, list[int]]]:
    """Prompts and their ids in the order of the shards."""
    g = config.generate
    taken: list[Prompt] = []
    found = encoding(training_prompts(config), tokenizer, config.prompts, context, g.max_new_tokens, g.num_prompts)
    for prompt, ids in found:
        check_ids(ids, tokenizer, vocab_size, f"prompt {prompt.id}")
        taken.append(prompt)
        yield prompt, ids
    if g.num_prompts > len(taken):
        print(f"generate.num_prompts={g.num_prompts}: there are {len(taken)} prompts; all of them are answered")
    if config.prompts.mixture:
        print(f"prompts.mixture: {', '.join(f'{n} of {name}' for name, n in count_sources(taken).items())}")


def _in_shards(asked: Iterator[tuple[Prompt, list[int]]], size: int) -> Iterator[list[tuple[str, list[int]]]]:
    while part := list(islice(asked, size)):
        yield [(json.dumps(asdict(prompt), ensure_ascii=False), ids) for prompt, ids in part]


def _prompt(text: str) -> Prompt:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return Prompt(**fields)


# ---- is it still what was begun?


def _check_source(config: Config, manifest: dict[str, Any] | None, *, gone_is_fine: bool = False) -> None:
    """Raises UserError if the prompts are no longer those that the responses were begun with."""
    if manifest is None:
        return
    try:
        now = source_pins(config.prompts)
    except UserError:
        if gone_is_fine:  # a finished stage needs its prompts no more, and may lie on another machine
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


# ---- one process at work


class Worker:
    """What one process needs to answer shards: an answerer, a tokenizer, and the folder all of them share."""

    def __init__(self, config: Config, responses: Responses):
        if config.machine.threads > 0:
            torch.set_num_threads(config.machine.threads)
        self.config, self.responses = config, responses
        self.tokenizer = load_tokenizer(config.backbone)
        model_config = load_config(config.backbone)
        self.context, self.model_type = model_config.max_position_embeddings, model_config.model_type
        self.vocab_size = model_config.vocab_size
        self.device = device_of(config.machine.device)
        self.answerer: Answerer = make_answerer(
            config, partial(load_model, config.backbone, self.device, config.machine.device_map), self.tokenizer
        )

    def head(self) -> dict[str, Any]:
        """What the manifest says of who makes the responses, and how."""
        config = self.config
        sampling: dict[str, Any] = {"seed": config.seed, "reproducible": self.answerer.reproducible}
        sampling |= to_dict(config.generate)
        folder, controller = sampling.pop("exit_head"), sampling.pop("controller")
        if config.generate.engine == "speculative":  # of a folder of this machine nothing is said but what is in it
            sampling |= {"head_sha256": sha256_of(Path(folder)), "controller": controller}
        return {
            "backbone": {
                "name": public_name(config.backbone),
                "revision": config.backbone.revision,
                "fingerprint": fingerprint_of_files(config.backbone),
                "model_type": self.model_type,
            },
            "sampling": sampling,
        }

    def work(self) -> float:
        """Make what is missing, together with whoever else is at it, until all is there; returns the tokens/s of this
        process (0 if there was nothing left for it)."""
        self.responses.check_asked()
        manifest = self.responses.manifest()
        assert manifest is not None
        started, tokens = time.time(), 0
        bar = tqdm(total=manifest["asked"]["prompts"], desc="generate", unit="prompt")

        def report(finished: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tokens/s", refresh=False)
            bar.update(0)

        self.responses.compare(rounds_by(self.device))
        with bar:
            for entry in self.responses.complete(partial(self._make, report)):
                bar.update(entry["counts"]["prompts"])
        return round(tokens / (time.time() - started), 1) if tokens else 0.0

    def _make(self, report: Report, index: int, name: str) -> None:
        started = time.time()
        asked = [(_prompt(text), ids) for text, ids in self.responses.asked(index)]
        rows, counts = self.answer_shard(asked, index, report)
        self.responses.put(name, rows, counts, made(started, rounds_by(self.device)))

    def answer_shard(
        self, asked: list[tuple[Prompt, list[int]]], index: int, report: Report | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The rows of one shard and its counts: a pure function of config, weights, prompts and the shard's number.

        Turn by turn: all first turns, then all second turns, and so on. A conversation ends early at an empty answer,
        and where the next turn leaves no room for one. Behind an answer that was cut it goes on, as it would for a
        user: distill decides whether cut answers are learned from.
        """
        g = self.config.generate
        first = index * g.shard_size  # in turn over all prompts, not anew in each shard
        temperatures = [g.temperatures[(first + i) % len(g.temperatures)] for i in range(len(asked))]
        counts: Counter[str] = Counter(prompts=len(asked), turns=sum(len(p.turns) for p, _ in asked))
        rows: list[tuple[int, dict[str, Any]]] = []
        now = [(place, prompt, ids) for place, (prompt, ids) in enumerate(asked)]
        turn = 1
        while now:
            seed = shard_seed(self.config.seed, index, turn)
            questions = [
                Question(list(ids), prompt.conversation, temperatures[place], prompt.system, prompt.original)
                for place, prompt, ids in now
            ]
            answers = self.answerer.answer(questions, Sampling(g.max_new_tokens, g.top_p, g.batch_size, seed), report)
            later: list[tuple[int, Prompt]] = []
            for (place, prompt, _), question, answer in zip(now, questions, answers, strict=True):
                check_ids(answer.ids, self.tokenizer, self.vocab_size, f"the answer to prompt {prompt.id}")
                counts["tokens"] += len(answer.ids)
                left = len(prompt.turns) - len(prompt.answers) - 1
                if len(answer.ids) <= answer.finished:  # nothing, or an end token alone
                    counts.update(empty=1, unanswered=left)
                    continue
                rows.append((place, self._row(prompt, question, answer, seed)))
                counts.update(rows=1, inexact=not answer.exact, looping=repeated_share(answer.ids) > 0)
                counts["stop" if answer.finished else "length"] += 1
                if left:
                    text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
                    later.append((place, next_turn(prompt, text)))
            now = []
            with_ids = contexts([prompt for _, prompt in later], self.tokenizer, self.config.prompts)
            for (place, _), (prompt, ids) in zip(later, with_ids, strict=True):
                check_ids(ids, self.tokenizer, self.vocab_size, f"prompt {prompt.id}")
                if len(ids) <= self.context - g.max_new_tokens:
                    now.append((place, prompt, ids))
                else:
                    counts["unanswered"] += len(prompt.turns) - len(prompt.answers)
            turn += 1
        rows.sort(key=lambda entry: entry[0])  # stable: the turns of a conversation stay in their order
        return [row for _, row in rows], {name: int(counts[name]) for name in COUNTS}

    def _row(self, prompt: Prompt, question: Question, answer: Answer, seed: int) -> dict[str, Any]:
        return {
            "id": prompt.id,
            "prompt": prompt.text,
            "prompt_ids": question.ids,
            "response_ids": answer.ids,
            "finish_reason": "stop" if answer.finished else "length",
            "temperature": question.temperature,
            "seed": seed,
            "source": prompt.source,
            "exact": answer.exact,
            "reproducible": self.answerer.reproducible,
        }


def shard_seed(seed: int, index: int, turn: int = 1) -> int:
    """Of one shard's sampling: below 2^53, so that JSON readers keep it exactly."""
    later = f" turn {turn}" if turn > 1 else ""
    return int.from_bytes(hashlib.sha256(f"generate {seed} {index}{later}".encode()).digest()[:8]) >> 11


# ---- what is told


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
