"""The stage `evaluate`: tests that decoding is lossless, and compares every head and controller with autoregressive
decoding.

Takes heads/exit-*/, or one published head, and held-out prompts. First everything is timed, and the measurements are
saved: eval/prompts.parquet, generations.parquet, rounds.parquet, rivals.parquet and measured.json, and with
evaluate.batch_sizes batches.parquet and batch_rounds.parquet. Then tests and
figures are computed from these files: eval/results.json and report/. A run that is interrupted in between resumes from
the files, on a machine with the same hardware and the same versions.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbones.ends import end_tokens
from ..backbones.load import device_of, engine_options, load_model, load_tokenizer
from ..backbones.source import load_config
from ..config import Config
from ..errors import UserError, warn
from ..evaluation import against_transformers, batch_sizes, bound, corpus, losslessness, report, rivals, texts, threads
from ..evaluation.intervals import FEWEST
from ..evaluation.measuring import Measured, Method, measure
from ..evaluation.metrics import beside, best, summarise
from ..evaluation.results import SCHEMA
from ..generation import inspection
from ..generation.leaks import check_not_published_as_trained_on, check_not_trained_on
from ..generation.repetition import LOOP
from ..inference import canary
from ..inference.backbone import SplitBackbone
from ..inference.controllers import make_controller
from ..inference.decoding import Request, autoregressive
from ..inference.exit_head import ExitHead
from ..inference.sampling import Sampler
from ..prompts.ids import Encoded
from ..prompts.origins import section_of
from ..prompts.prompt import Prompt, conversation_of, count_tasks
from ..prompts.records import pins, source_record
from ..prompts.sets import evaluation_prompts, evaluation_settings, holds_out
from ..prompts.templates import warn_of_turn_end
from ..prompts.turns import every_turn
from ..prompts.vocabulary import check_ids, check_prompts, has_ids_beyond
from ..publishing import draft_model, hub
from ..runs import tracking
from ..runs.files import atomic_path, atomic_write, sha256_of
from ..runs.folder import RunDir
from ..runs.provenance import environment


def run(run: RunDir) -> None:
    """Measure all heads of the run, or the published one. Raises UserError for wrong controllers, prompts or heads."""
    check(run.config)
    config = run.config.evaluate
    folders, inputs, published = _heads(run)
    settings = evaluation_settings(run.config)
    source = source_record(settings, "evaluate")
    outside = pins(source)
    if config.head is not None:
        outside["head"] = sha256_of(folders[0] / "model.safetensors")
    if config.states is not None:
        outside["states"] = sha256_of(Path(config.states))
    if config.corpus is not None:
        outside["corpus"] = sha256_of(Path(config.corpus))
    if not run.plan("evaluate", inputs, outside):
        print("evaluate: done already")
        return
    chosen = evaluation_prompts(run.config)[: config.num_prompts or None]
    _check_not_trained_on(run, chosen, folders[0])
    device = device_of(run.config.machine.device)
    tokenizer = load_tokenizer(run.config.backbone)
    ends = frozenset(end_tokens(run.config.backbone, tokenizer))
    warn_of_turn_end("evaluate", tokenizer, settings, ends)
    copied = corpus.read(config, tokenizer)
    vocab_size = load_config(run.config.backbone).vocab_size
    if has_ids_beyond(tokenizer, vocab_size):
        check_prompts(chosen, tokenizer, settings, vocab_size)
    model = load_model(run.config.backbone, device, run.config.machine.device_map)
    heads = [_head(folder) for folder in folders] if published is None else [published[0]]
    count = config.threads or threads.fastest(_engine(model, heads[0], folders[0], products="plain"))
    with threads.threads(count):  # kernels are timed with the threads that they will run with
        options = engine_options(run.config.machine, model.device)
        engines = {
            head.exit_layer: _engine(model, head, folder, **options)
            for head, folder in zip(heads, folders, strict=True)
        }
    _check_controllers(config.controllers, next(iter(engines.values())))
    drafts, others = _drafts(heads, model, config.rivals)
    hashes = {n: sha256_of(folder / "model.safetensors") for n, folder in zip(engines, folders, strict=True)}
    states = _states(config.states, hashes)
    together, knowing = batch_sizes.engines_of(config, engines)
    engine = next(iter(engines.values()))
    measured = _already_measured(run)
    encoded, compared = [], {}
    if measured is None:
        with threads.threads(count):
            encoded = _encode(run.config, chosen, engine, tokenizer, ends)
        compared = against_transformers.check(model, engines, encoded, config.max_new_tokens)
    with run.stage("evaluate", inputs, outside) as summary, threads.threads(count):
        if measured is None:
            asked = replace(config, rivals=others)
            found = measure(model, engines, encoded, ends, asked, run.config.seed, states, drafts, copied)
            with atomic_path(run / "eval") as folder:
                folder.mkdir()
                Measured.of(found, encoded, _about(engine, encoded, compared)).save(folder)
            measured = Measured.load(run / "eval")
            assert measured is not None  # read from the files, as in a resumed run
        if together:
            tables = batch_sizes.measured(
                run / "eval", together, knowing, measured.prompts, config, ends, run.config.seed
            )
        results = _results(run, model, engines, source, measured)
        if together:
            results["batches"] = batch_sizes.figures(tables, results["heads"], config.temperatures[0])
            results["lossless"]["batches"] = batch_sizes.losslessness(
                together, tables[0], measured, config, run.config.seed
            )
        results |= _identity(run.config, folders[0], heads[0])
        if published and published[1]:
            results["trained_for"] = published[1]
        results |= {"ends": sorted(ends), "canary": canary.record(engine)}
        written = measured.generations.query("controller == 'autoregressive'").tokens
        for entry in results["heads"]:
            entry["head_sha256"] = hashes[entry["exit_layer"]]
            entry["draft_vocabulary"] = _draftable(engines[entry["exit_layer"]], written)
        results["rivals"] = beside(measured.rivals, measured.generations)
        results["responses"] = inspection.figures(run)
        summary["best"] = results["best"]
        atomic_write(run / "eval" / "results.json", json.dumps(results, indent=1) + "\n")
        results["texts"] = texts.shown(measured, results["best"], tokenizer)
        report.write(results, run / "report")
    tracking.mirror_report(run, report.summary(results), report.blocks(results), run / "report")


def _heads(run: RunDir) -> tuple[list[Path], list[Path], tuple[ExitHead, dict[str, Any] | None] | None]:
    """Folders of the heads to measure, those of them that are in the run folder, and for a published head what
    `hub.load_head` gives."""
    own = sorted((run / "heads").glob("exit-*"), key=lambda p: int(p.name.split("-")[1]))
    head = run.config.evaluate.head
    if head is None:
        if not own:
            raise UserError(f"{run / 'heads'} holds no exit head: run distill first, or `exit-heads run`.")
        return own, own, None
    if own:
        raise UserError(
            f"evaluate.head={head}: {run.path} has heads of its own; give another run.name, "
            f"such as run.name={hub.run_name_of(head)}"
        )
    folder = hub.pull(head)
    published = hub.load_head(  # refuses another backbone's head before the backbone is loaded
        folder, head, run.config.backbone, allow_other=run.config.evaluate.allow_other_backbone
    )
    return [folder], [], published


def _head(folder: Path) -> ExitHead:
    try:
        return ExitHead.load(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _engine(model: Any, head: ExitHead, folder: Path, **options: Any) -> SplitBackbone:
    try:
        return SplitBackbone(model, head, **options)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _check_controllers(names: list[str], engine: SplitBackbone) -> None:
    for name in names:
        try:
            engine.check_controller(make_controller(name))
        except ValueError as error:
            raise UserError(f"evaluate.controllers={name}: {error}") from None


def _drafts(heads: list[ExitHead], model: Any, names: list[str]) -> tuple[dict[int, Any], list[str]]:
    """(exit layer -> draft model in memory, if one of the rivals needs it; the rivals that can be measured)."""
    needing = [name for name in names if name.startswith("assistant_model")]
    if not needing:
        return {}, names
    try:
        return {head.exit_layer: draft_model.in_memory(model, head) for head in heads}, names
    except ValueError as error:
        print(f"evaluate.rivals: {', '.join(needing)}: left out: {error}")
        return {}, [name for name in names if name not in needing]


def _states(path: str | None, heads: dict[int, str]) -> dict[Method, dict[str, Any]]:
    """States of controllers from the results of an earlier evaluation of these heads (exit layer -> sha256).

    Raises UserError if the file holds none, or states of other heads.
    """
    if path is None:
        return {}
    key = f"evaluate.states={path}"
    try:
        entries = json.loads(Path(path).read_text())["heads"]
        found = {
            Method(entry["exit_layer"], name, entry["temperature"]): (entry["head_sha256"], figures["state"])
            for entry in entries
            for name, figures in entry["controllers"].items()
            if "state" in figures
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{key}: not the results.json of an evaluation; give runs/NAME/eval/results.json") from None
    if not found:
        raise UserError(f"{key}: no controller there had anything to keep; thompson has")
    for method, (head, _) in found.items():
        if heads.get(method.exit_layer, head) != head:
            raise UserError(
                f"{key}: learned of another exit head {method.exit_layer} ({head[:12]}, not "
                f"{heads[method.exit_layer][:12]}); leave it out, a new head is learned anew"
            )
    return {method: state for method, (_, state) in found.items()}


def _check_not_trained_on(run: RunDir, chosen: list[Prompt], published: Path) -> None:
    """Raises UserError for prompts that the heads were trained on; warns where that cannot be determined."""
    head, folder = run.config.evaluate.head, run / "responses"
    section = section_of(evaluation_settings(run.config))
    if head is None and (folder / "manifest.json").exists():
        learned = next((r for r in reversed(run.records()) if r["stage"] == "distill"), None)
        if learned and learned["inputs"]["responses/manifest.json"] != sha256_of(folder / "manifest.json"):
            raise UserError(
                f"{run.path}: the heads learned from other responses than those that are in responses/ now, so whether "
                "they were trained on the prompts of evaluate is not known. Make them anew: --redo distill."
            )
        check_not_trained_on(folder, chosen, section)
        return
    if head is not None and check_not_published_as_trained_on(published, chosen, section):
        return
    missing = f"{folder} holds no responses" if head is None else f"evaluate.head={head} brings no training prompts"
    unknown = "whether some of the prompts that are evaluated on were trained on could not be checked"
    warn("evaluate", f"warning: {missing}: {unknown}")


def _encode(
    config: Config, chosen: list[Prompt], engine: SplitBackbone, tokenizer: Any, ends: frozenset[int]
) -> Encoded:
    """The chosen prompts encoded, with an entry for each turn. Earlier turns are answered greedily, whatever the
    temperatures to measure."""
    settings, new = evaluation_settings(config), config.evaluate.max_new_tokens

    def answer(ids: list[int]) -> list[int]:
        check_ids(ids, tokenizer, len(engine.embedding_VD), "a prompt")
        return autoregressive(engine, Request(ids, new, ends), Sampler()).tokens

    encoded = every_turn(chosen, tokenizer, settings, engine.max_context, new, answer)
    for prompt, ids in encoded:
        check_ids(ids, tokenizer, len(engine.embedding_VD), f"prompt {prompt.id}")
    if (count := _conversations(encoded)) < FEWEST:
        warn("evaluate", f"with {count} conversations the gate judges no speedup; it needs {FEWEST} of them")
    return encoded


def _conversations(encoded: Encoded) -> int:
    return len({conversation_of(prompt.id) for prompt, _ in encoded})


def _about(engine: SplitBackbone, encoded: Encoded, compared: dict[str, Any]) -> dict[str, Any]:
    """What the tables lack: device, threads, counts, hardware, versions, and the record `compared` of the comparison
    with transformers' logits."""
    prompts = [prompt for prompt, _ in encoded]
    return {
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "kernels": engine.kernels.table(),
        "transformers": compared,
        "prompts": {
            "count": len(prompts),
            "conversations": _conversations(encoded),
            "later_turns": sum(bool(p.answers) for p in prompts),
            "tasks": count_tasks(prompts),
        },
        **environment(),
    }


def _already_measured(run: RunDir) -> Measured | None:
    """Measurements saved by an interrupted run of this stage with the same config and heads; None if there are none.

    The stage's record names the hardware and versions of the process that finishes it, so they must be the same.
    """
    measured = Measured.load(run / "eval") if run.is_begun("evaluate") else None
    if measured is None or any(measured.about[key] != value for key, value in environment().items()):
        return None
    print(f"evaluate: {run / 'eval'} holds what was measured before; the proofs go on from there")
    return measured


def _results(
    run: RunDir, model: Any, engines: dict[int, SplitBackbone], source: dict[str, Any], measured: Measured
) -> dict[str, Any]:
    config, generations, about = run.config.evaluate, measured.generations, measured.about
    heads, learned = summarise(generations, measured.rounds), measured.learned()
    ids = dict(zip(measured.prompts.prompt, measured.prompts.ids, strict=True))
    longest = max(map(len, ids.values())) + config.max_new_tokens

    def sampler_of(temperature: float) -> Sampler:
        return Sampler(temperature, config.top_k, config.top_p)

    for entry in heads:
        n, t = entry["exit_layer"], entry["temperature"]
        entry["memory"] = engines[n].extra_bytes(longest)
        # Else nothing is known of what a draft costs; and the bound is that of verifying drafts one by one.
        timed = entry["costs"]["head"] > 0 and not (t > 0 and config.block_verification)
        entry["oracle_speedup"] = None if not timed else bound.speedup(
            engines[n], ids, generations[generations.temperature == t], sampler_of(t), entry["costs"],
            config.max_new_tokens, run.config.seed,
        )  # fmt: skip
        for name, figures in entry["controllers"].items():
            if found := learned.get(Method(n, name, t)):
                figures["learned"] = [[round(m, 4) for m in row] for row in found["learned"]]
                figures["state"] = found["state"]

    return {
        "schema": SCHEMA,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": run.config.backbone.dtype,
        "device": about["device"],
        "threads": about["threads"],
        "kernels": about.get("kernels", {}),
        "transformers": about["transformers"],
        "prompts": about["prompts"]
        | {"source": source, "max_new_tokens": config.max_new_tokens, "repeats": config.repeats},
        "sampling": {"top_k": config.top_k, "top_p": config.top_p, "block_verification": config.block_verification},
        "lossless": {
            "greedy": losslessness.greedy(next(iter(engines.values())), ids, generations),
            "sampling": losslessness.sampling(engines, ids, generations, sampler_of, run.config.seed),
        },
        "heads": heads,
        "loop_ngram": LOOP,
        "best": best(heads, config.temperatures[0]),
    }


def _draftable(engine: SplitBackbone, texts: Iterable[list[int]]) -> dict[str, Any]:
    """How many tokens the head can draft, of how many, and which share of the tokens of `texts` they are."""
    size = len(engine.embedding_VD)
    if engine.draft_vocabulary is None:
        return {"size": size, "of": size, "coverage": 1.0}
    known, tokens = engine.draft_vocabulary.ids_W.tolist(), np.concatenate([*texts])
    return {"size": len(known), "of": size, "coverage": float(np.isin(tokens, known).mean())}


def _identity(config: Config, folder: Path, head: ExitHead) -> dict[str, Any]:
    """The backbone, which is the same for all measured heads, and for a published head its origin."""
    published = {} if config.evaluate.head is None else {"published_head": hub.source_of(config.evaluate.head, folder)}
    return {"backbone": head.backbone, "num_layers": head.num_layers, **published}


def check(config: Config) -> None:
    """Checks the config before anything is loaded. Raises UserError for a controller or rival that does not exist, for
    an unusable evaluate.states, and if there are no prompts to evaluate on."""
    if not holds_out(config):
        raise UserError(
            f"prompts.held_out={config.prompts.held_out:g}: no prompt is left to evaluate on. Give a share above 0 "
            "before the responses are generated, or a set of its own: evaluate.prompts.path."
        )
    names = config.evaluate.controllers
    for name in names:
        try:
            make_controller(name)
        except ValueError as error:
            raise UserError(f"evaluate.controllers={names}: {error}") from None
    corpus.check(config.evaluate)
    if config.evaluate.states is not None:
        path = Path(config.evaluate.states).resolve()
        if not path.is_file():
            raise UserError(f"evaluate.states={config.evaluate.states}: no such file; give runs/NAME/eval/results.json")
        if path.is_relative_to((Path(config.run.dir) / config.run.name / "eval").resolve()):
            raise UserError(
                f"evaluate.states={config.evaluate.states}: lies in this run's own eval/, which evaluate replaces; "
                "copy it to another place first"
            )
    rivals.rivals_of(config.evaluate.rivals, [])
