"""generate: the backbone answers prompts; its answers are what the exit heads learn from.

Takes the config's backbone and prompts, gives responses/shard-*.parquet and manifest.json. A shard is a pure
function of the config and its number, so a killed run goes on at the first shard that is missing and ends with
the same responses. Knows nothing of exit heads.
"""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from ..backbones import device_of, load_config, load_model, load_tokenizer, public_name
from ..config import Config, to_dict
from ..errors import UserError
from ..generation import ENGINES, Report, Sampling, end_tokens
from ..inference.exit_head import fingerprint
from ..prompts import Prompt, encode, load_prompts, source_record
from ..rundir import RunDir, atomic_path, atomic_write, sha256_of

SCHEMA = 1
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
    ]
)
REPEATED = 8
"""A response that holds some run of this many tokens twice has begun to loop."""

Row = tuple[Prompt, list[int]]


def run(run: RunDir) -> None:
    config = run.config
    must_run = run.plan("generate", [])
    manifest = _read_manifest(run)
    if not must_run:
        _check_source(config, manifest, gone_is_fine=True)
        print("generate: done already")
        return
    # All that a user can get wrong comes before the stage is marked as begun: a mark would ask for --redo.
    _check_source(config, manifest)
    rows = _rows(config)
    if config.machine.threads > 0:
        torch.set_num_threads(config.machine.threads)
    model = load_model(config.backbone, device_of(config.machine.device), config.machine.device_map)
    manifest = _go_on(run, manifest, model)
    with run.stage("generate", []) as summary:
        _write_manifest(run, manifest)
        speed = _answer_shards(run, manifest, model, rows)
        summary |= _summary(manifest, speed)
    _print_summary(summary)


# ---- what is asked


def _rows(config: Config) -> list[Row]:
    """Prompts and their ids in the order of the shards."""
    found = load_prompts(config.prompts, "distill", config.seed)
    wanted = config.generate.num_prompts
    context = load_config(config.backbone).max_position_embeddings
    # Dropping the too long ones first keeps the number of prompts what was asked for.
    first = found if config.prompts.too_long == "drop" or not wanted else found[:wanted]
    tokenizer = load_tokenizer(config.backbone)
    rows = encode(first, tokenizer, config.prompts, context, config.generate.max_new_tokens)
    if several := sum(len(prompt.turns) > 1 for prompt, _ in rows):
        print(f"prompts.path={config.prompts.path}: {several} prompts have more turns; only the first is answered")
    if wanted > len(rows):
        print(f"generate.num_prompts={wanted}: there are {len(rows)} prompts; all of them are answered")
    return rows[:wanted] if wanted else rows


def shard_seed(seed: int, index: int) -> int:
    """Of one shard's sampling: below 2^53, so that JSON readers keep it exactly."""
    return int.from_bytes(hashlib.sha256(f"generate {seed} {index}".encode()).digest()[:8]) >> 11


# ---- the manifest: which shards are there, and of what


def _read_manifest(run: RunDir) -> dict[str, Any] | None:
    path = run / "responses" / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def _check_source(config: Config, manifest: dict[str, Any] | None, *, gone_is_fine: bool = False) -> None:
    """Raises UserError if the prompts are no longer those that the responses were begun with."""
    if manifest is None:
        return
    try:
        now = source_record(config.prompts)
    except UserError:
        if gone_is_fine:  # a finished stage needs its prompts no more, and may lie on another machine
            return
        raise
    old = manifest["prompts"]
    if old.get("sha256") != now.get("sha256"):
        raise UserError(
            f"prompts.path={config.prompts.path}: the file has changed since the responses were begun (sha256 was "
            f"{str(old.get('sha256'))[:12]}..., is {str(now.get('sha256'))[:12]}...). "
            "Restore it, give another run.name, or --redo generate."
        )


def _go_on(run: RunDir, old: dict[str, Any] | None, model: Any) -> dict[str, Any]:
    """The manifest to go on with: of an interrupted run, those shards that are whole.

    Raises UserError if that run had other weights.
    """
    config = run.config
    backbone = {
        "name": public_name(config.backbone),
        "revision": config.backbone.revision,
        "fingerprint": fingerprint(model),
        "model_type": model.config.model_type,
    }
    if old is not None and old["backbone"]["fingerprint"] != backbone["fingerprint"]:
        raise UserError(
            f"backbone.name_or_path={config.backbone.name_or_path}: its weights have changed since the responses were "
            "begun. Restore them, give another run.name, or --redo generate."
        )
    kept = [s for s in (old["shards"] if old else []) if _is_whole(run / "responses" / s["file"], s["sha256"])]
    return {
        "schema": SCHEMA,
        "shards": kept,
        "complete": False,
        "backbone": backbone,
        "sampling": {"seed": config.seed} | to_dict(config.generate),
        "prompts": source_record(config.prompts),
        "responses": {},
    }


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _write_manifest(run: RunDir, manifest: dict[str, Any]) -> None:
    manifest["shards"].sort(key=lambda s: s["file"])
    total: Counter[str] = Counter()
    for shard in manifest["shards"]:
        total.update(shard["counts"])
    manifest["responses"] = dict(total)
    atomic_write(run / "responses" / "manifest.json", json.dumps(manifest, indent=1) + "\n")


# ---- the shards


def _answer_shards(run: RunDir, manifest: dict[str, Any], model: Any, rows: list[Row]) -> float:
    """Make what is missing; returns the tokens/s of what was made now (0 if nothing was).

    The manifest holds no time of day and no speed: equal responses have equal manifests, and so the stages that
    read them stay done.
    """
    size = run.config.generate.shard_size
    shards = {f"shard-{at // size:05d}.parquet": rows[at : at + size] for at in range(0, len(rows), size)}
    there = {s["file"] for s in manifest["shards"]}
    started, tokens = time.time(), 0
    bar = tqdm(total=len(rows), desc="generate", unit="response", initial=sum(len(shards[f]) for f in there))

    def report(finished: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        bar.update(finished)
        bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tokens/s", refresh=False)

    with bar:
        for index, (file, part) in enumerate(shards.items()):
            if file in there:
                continue
            table, counts = answer_shard(run.config, model, part, index, report)
            path = run / "responses" / file
            with atomic_path(path) as temporary:
                pq.write_table(table, temporary)
            manifest["shards"].append(
                {"file": file, "rows": table.num_rows, "sha256": sha256_of(path), "counts": counts}
            )
            _write_manifest(run, manifest)
    seconds = time.time() - started
    manifest["complete"] = True
    _write_manifest(run, manifest)
    return round(tokens / seconds, 1) if tokens else 0.0


def answer_shard(
    config: Config, model: Any, rows: list[Row], index: int, report: Report | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """The table of one shard and its counts: a pure function of the config, the weights and the shard's number."""
    g = config.generate
    seed = shard_seed(config.seed, index)
    first = index * g.shard_size  # in turn over all prompts, not anew in each shard
    temperatures = [g.temperatures[(first + i) % len(g.temperatures)] for i in range(len(rows))]
    sampling = Sampling(g.max_new_tokens, g.top_p, g.batch_size, seed)
    answers = ENGINES[g.engine](model, [ids for _, ids in rows], temperatures, sampling, report)
    ends = set(end_tokens(model))
    counts = {"rows": 0, "empty": 0, "tokens": 0, "stop": 0, "length": 0, "looping": 0}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    for (prompt, prompt_ids), answer, temperature in zip(rows, answers, temperatures, strict=True):
        counts["tokens"] += len(answer)
        if not answer or (len(answer) == 1 and answer[0] in ends):
            counts["empty"] += 1
            continue
        reason = "stop" if answer[-1] in ends else "length"
        counts["rows"] += 1
        counts[reason] += 1
        counts["looping"] += repeats_itself(answer)
        row = (prompt.id, prompt.text, prompt_ids, answer, reason, temperature, seed)
        for name, value in zip(COLUMNS.names, row, strict=True):
            columns[name].append(value)
    return pa.Table.from_pydict(columns, schema=COLUMNS), counts


def repeats_itself(ids: list[int]) -> bool:
    """Whether some 8 consecutive tokens occur twice."""
    runs = [tuple(ids[i : i + REPEATED]) for i in range(len(ids) - REPEATED + 1)]
    return len(set(runs)) < len(runs)


# ---- what is told


def _summary(manifest: dict[str, Any], tokens_per_second: float) -> dict[str, Any]:
    total = manifest["responses"]
    if not total["rows"]:
        raise UserError(
            "prompts.chat_template: the backbone answered every prompt with its end token alone; "
            "check that the prompts fit the backbone (chat_template, column)."
        )
    return {
        "rows": total["rows"],
        "empty": total["empty"],
        "tokens": total["tokens"],
        "tokens_per_second": tokens_per_second,
        "finish_reasons": {reason: total[reason] for reason in ("stop", "length")},
        "looping_share": round(total["looping"] / total["rows"], 4),
    }


def _print_summary(s: dict[str, Any]) -> None:
    reasons = ", ".join(f"{n} {reason}" for reason, n in s["finish_reasons"].items())
    empty = f", {s['empty']} empty ones dropped" if s["empty"] else ""
    print(
        f"generate: {s['rows']} responses ({reasons}{empty}), {s['tokens']} tokens at {s['tokens_per_second']:.0f} "
        f"tokens/s; {s['looping_share']:.0%} repeat some {REPEATED} tokens"
    )
