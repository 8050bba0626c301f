"""The command line: exit-heads VERB --config FILE key=value ...

Takes the words after `exit-heads`, loads the config, runs one stage or all, and returns an exit code: 0 done, 130
interrupted, or one of errors.py. Any other exception is a bug and shows its traceback.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import NoReturn

from .config import Config, load
from .config_help import help_text
from .config_words import variations
from .errors import GateError, LostError, UserError
from .launchers import Launched, launched
from .runs.folder import STAGES, RunDir

VERBS = {
    "plan": (
        "Estimate the memory, disk and time that a run takes, and the speedup that it can give.",
        "Needs neither weights nor a GPU, and writes nothing; prints the estimates (docs/planning.md).",
        ["machine", "backbone", "generate", "distill", "evaluate", "publish", "plan"],
    ),
    "generate": (
        "Let the backbone answer prompts; exit heads are trained on its answers.",
        "Writes responses/. Any number of processes can share the work, on machines that share the run folder. If "
        "killed, the same command goes on with what is missing.",
        ["seed", "run", "machine", "backbone", "prompts", "generate"],
    ),
    "cache": (
        "Run the backbone once over the responses and keep its hidden states, for distill.teacher=cached.",
        "Writes cache/. Any number of processes can share the work, on machines that share the run folder. If "
        "killed, the same command goes on with what is missing. With distill.teacher=online it does nothing.",
        ["run", "machine", "backbone", "distill"],
    ),
    "pilot": (
        "Choose the exit layer N, for distill.exit_layers=auto: train short heads at several N and measure them.",
        "Writes pilot/ and pilot/choice.json, whose N distill, evaluate and publish then take. It takes minutes, and "
        "trains on the cache (distill.teacher=cached). With exit layers given it does nothing.",
        ["seed", "run", "machine", "backbone", "distill", "evaluate"],
    ),
    "distill": (
        "Train one exit head for each exit layer N on the responses; the backbone stays frozen.",
        "Writes heads/exit-<N>/ and metrics.jsonl. If it is killed, the same command goes on from the last checkpoint.",
        ["seed", "run", "machine", "backbone", "distill", "wandb"],
    ),
    "evaluate": (
        "Test that decoding with each head is lossless, and measure its speedup over autoregressive decoding.",
        "Writes eval/ (rounds.parquet, rivals.parquet, results.json) and report/. With --head it measures a published "
        "head, on the backbone that the head names, in a run folder named after the head.",
        ["seed", "run", "machine", "backbone", "prompts", "evaluate", "wandb"],
    ),
    "publish": (
        "Check the best head against the gate, and write the folder that transformers loads, or a draft model.",
        "Writes hub/<N>/, or with --as draft hub/<N>-draft/, a checkpoint for engines that take a draft model. With "
        "publish.target=hub it also pushes the folder as one commit and one tag, to a private repo unless --public is "
        "given. The exit code is 3 if the gate refuses the head.",
        ["run", "machine", "backbone", "publish"],
    ),
    "run": (
        "Run every stage except plan in order, skipping finished ones.",
        "The stages are generate, cache (with distill.teacher=cached), pilot (with distill.exit_layers=auto), distill, "
        "evaluate and publish. It ends with the table of results and the line of Python that uses the head.",
        ["seed", "run", "machine", "backbone", "prompts", "generate", "distill", "evaluate", "publish", "wandb"],
    ),
    "chat": (
        "Talk with a backbone in the terminal while an exit head drafts.",
        "Writes nothing. Accepted drafts are coloured, the backbone's own tokens are not. After each answer it prints "
        "tokens/s, acceptance length and draft acceptance rate; /compare measures the speedup over autoregressive "
        "decoding of the same answer. Ctrl-C ends an answer, Ctrl-D the conversation. In a pipe each line of stdin is "
        "a message, answers go to stdout and figures to stderr.",
        ["seed", "machine", "backbone", "chat"],
    ),
    "heads": (
        "List the runs in run.dir: backbone, exit layer, speedup, whether lossless, and where published.",
        "Writes nothing. Unfinished runs are listed too.",
        ["run"],
    ),
}

VARY = """\
to compare several values, with a row for each combination:
  exit-heads plan --config FILE --vary machine.nodes=[1,2,4] --vary distill.exit_layers=[[2],[4],[8]]

"""

CHATTING = """\
  exit-heads chat --head runs/pocket/hub/2                 a head published here, on the backbone that it names
  exit-heads chat --head org/my-head --temperature 0.7     one on the Hub, sampled
  exit-heads chat --head runs/mine/heads/exit-4 --backbone my/checkpoint     a head that was only distilled
  echo "Why is the sky blue?" | exit-heads chat --head org/my-head > answer.txt

With --config FILE, backbone and prompts.chat_template are the file's. Otherwise the backbone is the one that the head
names if it is on the Hub, else pocket; it is float32 on a CPU, and its tokenizer's chat template is used. A backbone
without one continues the text.

"""
CHOICES = {"head": "exit head: a folder or org/name", "temperature": "0 is greedy", "top-p": "nucleus",
           "controller": "how many tokens to draft, such as fixed:3", "max-new-tokens": "longest answer"}  # fmt: skip
"""Options of chat that are keys of its section too."""

OVERVIEW = """\
Train early-exit draft heads for a frozen language model, test that decoding with them is lossless, measure how much
faster it is, and publish them.

  exit-heads run --config configs/pocket.yaml              everything, on the built-in tiny backbone
  exit-heads plan --config configs/llama2-70b.yaml         memory, time and speedup of a run, before it starts
  exit-heads distill --config my.yaml distill.max_steps=500     one stage, one key changed
  exit-heads evaluate --help                               every key that the stage reads
  exit-heads chat --head runs/pocket/hub/2                 talk with a backbone while an exit head drafts
  exit-heads heads                                         the results of all runs in ./runs
"""


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("exit-heads", description=OVERVIEW, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (does, writes, sections) in VERBS.items():
        keys = "keys (key=default), given as key=value or in the YAML file:\n" + help_text(sections)
        epilog = {"plan": VARY, "chat": CHATTING}.get(verb, "") + keys
        sub = verbs.add_parser(verb, help=does, description=f"{does}\n{writes}", epilog=epilog, formatter_class=raw)
        sub.add_argument("--config", metavar="FILE", help="YAML file with values of keys; examples are in configs/")
        if verb == "plan":
            sub.add_argument(
                "--vary",
                action="append",
                default=[],
                metavar="KEY=[A,B]",
                help="make a plan for each value; may be given several times",
            )
            sub.add_argument("--json", action="store_true", help="print all figures as JSON, in bytes and seconds")
        if verb == "run" or verb in STAGES:
            stages = (*STAGES, "draft") if verb == "publish" else STAGES
            sub.add_argument(
                "--redo",
                choices=stages,
                metavar="STAGE",
                help="remove what this stage wrote and run it anew (verb run: and all stages after it)",
            )
        if verb == "publish":
            sub.add_argument(
                "--as", dest="form", choices=("head", "draft"), default="head",
                help="what to write: head (default), or draft, a checkpoint of shallow layers, head, norm and LM head"
            )  # fmt: skip
            sub.add_argument(
                "--force",
                dest="asked",
                action="append_const",
                const="publish.force=true",
                help="the same as publish.force=true",
            )
        if verb == "generate":
            looks = sub.add_mutually_exclusive_group()
            looks.add_argument(
                "--status", action="store_true", help="print progress, the processes at work, rate and time left"
            )
            looks.add_argument(
                "--verify", action="store_true", help="check every shard against its hash and count every turn"
            )
            looks.add_argument(
                "--show", type=int, metavar="N", help="print the first N documents as distill will learn from them"
            )
        if verb == "run":
            sub.add_argument(
                "--show-config",
                nargs="*",
                metavar="KEY",
                help="print the values of these keys, or of all, and run nothing",
            )
        if verb == "evaluate":
            sub.add_argument(
                "--head", dest="asked", action="append", type="evaluate.head={}".format,
                help="published head to measure: org/name, org/name@revision or a folder",
            )  # fmt: skip
        if verb in ("evaluate", "chat"):
            sub.add_argument(
                "--allow-other-backbone", dest="asked", action="append_const",
                const=f"{verb}.allow_other_backbone=true",
                help=f"take a head of another version of this backbone (the same as {verb}.allow_other_backbone=true)",
            )  # fmt: skip
        if verb == "chat":
            options = {name: (f"chat.{name.replace('-', '_')}", text) for name, text in CHOICES.items()}
            options["backbone"] = "backbone.name_or_path", "pocket, a Hub id, or a checkpoint folder"
            for name, (key, text) in options.items():
                sub.add_argument(
                    f"--{name}", dest="asked", action="append", type=f"{key}={{}}".format, metavar="VALUE",
                    help=f"{text} (the same as {key}=VALUE)",
                )  # fmt: skip
        if verb in ("publish", "run"):
            sub.add_argument(
                "--public", dest="asked", action="append_const", const="publish.public=true",
                help="let everyone read the repo (the same as publish.public=true)",
            )  # fmt: skip
        sub.add_argument("words", nargs="*", metavar="key=value", help="value of a key; it wins over the file")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, more = parser.parse_known_args(argv)  # argparse does not collect words after an option that follows words
    if options := [word for word in more if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(options)} (keys are given as key=value, without dashes)")
    args.words += more + (getattr(args, "asked", None) or [])
    # Threads of torch and the tokenizer must not compete for cores, and a waiting thread must not spin.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        config = load(args.config, args.words)
        if args.verb == "plan":
            plan(args, config)
        elif args.verb == "heads":
            list_heads(config)
        elif args.verb == "chat":
            chat(config, args.config, args.words)
        elif args.verb == "generate" and (args.status or args.verify or args.show is not None):
            look(config, args.status, args.verify, args.show)
        elif args.verb == "run" and args.show_config is not None:
            show_config(config, args.show_config)
        else:
            if config.evaluate.head is not None:
                config = config_for(args.verb, config.evaluate.head, args.config, args.words)
            stage = "draft" if getattr(args, "form", "head") == "draft" else args.verb
            run_verb(stage, config, args.redo)
    except (UserError, GateError, LostError) as error:
        print(f"exit-heads {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"exit-heads {args.verb}: interrupted; run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def run_verb(verb: str, config: Config, redo: str | None) -> None:
    """Run one stage, or all. redo: a stage whose results are removed first (with `run`, also those of later stages).

    Raises UserError for mistakes in the config or the command.
    """
    chosen = stages_of(config) if verb == "run" else (verb,)
    if redo is not None and redo not in chosen:
        said, use = ("publish --as draft" if name == "draft" else name for name in (verb, redo))
        raise UserError(
            f"--redo {redo}: exit-heads {said} does not run that stage. Use `exit-heads {use} --redo {redo}`."
        )
    by = launched()
    if by is not None and by.processes > 1:
        _check_several(verb, redo, by)
    stages = {name: _stage(name) for name in chosen}
    for stage in stages.values():  # before --redo removes anything, and before an early stage runs for an hour
        if hasattr(stage, "check"):
            stage.check(config)
        if verb == "run" and hasattr(stage, "check_layers"):  # of the backbone, which the first stage asks for anyway
            stage.check_layers(config)
    run = RunDir(config)
    if redo is not None:
        run.redo(*chosen[chosen.index(redo) :])
    refusal = None
    try:
        for name, stage in stages.items():
            if name == "pilot":
                _train_pilot(run)
            elif name not in ("generate", "cache"):
                run = _stage("pilot").chosen(run, must_fit=name == "distill")
            with run.at(name):
                (stage.run_draft if name == "draft" else stage.run)(run)
    except GateError as error:  # of the last stage: everything was measured, and the table shows it
        refusal = error
    if verb in ("run", "evaluate"):
        from .evaluation.closing import closing_table

        closing_table(run, published=None if verb == "evaluate" else refusal is None)
    if refusal is not None:
        raise refusal


def _train_pilot(run: RunDir) -> None:
    """Train the heads among which the stage pilot chooses, unless the exit layers are given or chosen."""
    if candidates := _stage("pilot").prepare(run):
        with run.presence.alone("pilot"):  # meanwhile --redo cannot remove the cache that it reads
            _stage("distill").run(candidates)


def _check_several(verb: str, redo: str | None, by: Launched) -> None:
    """Raises UserError for `run` and --redo when a launcher has started several processes."""
    unset = f"Unset {by.variable} if no launcher started this process."
    if verb == "run":
        raise UserError(
            f"{by.launcher} started {by.processes} processes ({by.variable}), and each would run every stage. Start "
            "the stages one by one, as slurm/distill.sh does: only generate, cache and distill take several. " + unset
        )
    if redo is not None:
        raise UserError(
            f"--redo {redo}: {by.launcher} started {by.processes} processes ({by.variable}), and a late one would "
            f"remove what the others have begun. Run `exit-heads {verb} --redo {redo}` once without a launcher, or "
            f"give another run.name. {unset}"
        )


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of the verb `run`; `cache` is one of them only with distill.teacher=cached, and `pilot` only with
    distill.exit_layers=auto."""
    left_out = {"cache": config.distill.teacher != "cached", "pilot": bool(config.distill.exit_layers)}
    return tuple(name for name in STAGES if not left_out.get(name, False))


def show_config(config: Config, keys: list[str]) -> None:
    """Print the values of the keys, one per line; without keys, the whole config as YAML."""
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(config)
    for key in keys:
        if OmegaConf.select(tree, key, default="missing") == "missing":
            raise UserError(f"--show-config {key}: there is no such key; without any it prints all")
    print("\n".join(str(OmegaConf.select(tree, key)) for key in keys) if keys else OmegaConf.to_yaml(tree).rstrip())


def plan(args: argparse.Namespace, config: Config) -> None:
    """Print the plan of the config, or with --vary of every combination of the values given there."""
    combinations = list(itertools.product(*map(variations, args.vary)))
    configs = [load(args.config, [*args.words, *words]) for words in combinations] if args.vary else [config]
    _stage("plan").show(configs, [word.partition("=")[0] for word in args.vary], args.json)


def config_for(verb: str, head: str, file: str | None, words: list[str]) -> Config:
    """The config for measuring a published head.

    Its run is named after the head even if the file names one, because that run has its own heads; `run.name=` on the
    command line wins. Its backbone is the head's unless file or command line name one.
    """
    if verb != "evaluate":
        raise UserError(f"evaluate.head={head}: only `exit-heads evaluate` measures published heads")
    from .publishing import hub

    return load(file, [f"run.name={hub.run_name_of(head)}", *words], hub.defaults_of(hub.pull(head), head))


def chat(config: Config, file: str | None, words: list[str]) -> None:
    """Talk with the backbone. Its head gives defaults, which file and words override."""
    stage = _stage("chat")
    folder = stage.head_folder(config)
    stage.run(load(file, words, stage.defaults(config, folder)), folder)


def list_heads(config: Config) -> None:
    """Print the table of all heads of the runs in run.dir; writes nothing."""
    from .evaluation import overview

    if not Path(config.run.dir).is_dir():
        raise UserError(f"run.dir={config.run.dir}: no such folder; give the one that holds the run folders")
    overview.show(Path(config.run.dir))


def look(config: Config, status: bool, verify: bool, show: int | None) -> None:
    """Print the state, a check or a sample of the responses; writes nothing."""
    from .generation import inspection

    if not (Path(config.run.dir) / config.run.name).is_dir():
        raise UserError(f"run.name={config.run.name}: there is no run folder {config.run.dir}/{config.run.name}")
    run = RunDir(config, look_only=True)
    if status:
        for line in inspection.status(run):
            print(line)
    elif verify:
        print(inspection.verify(run))
    elif show is not None:
        inspection.show(run, show)


def _stage(name: str):
    """The module of a stage, imported only when it is needed: --help and mistyped keys must not wait for torch."""
    import importlib

    return importlib.import_module(f"pipeline.stages.{'publish' if name == 'draft' else name}")


def process() -> NoReturn:
    """What the process `exit-heads` does: `main`. One that still has a process group, as workers do, then ends at once:
    while an interpreter is taken down, gloo's threads may abort it, and its exit code would say that it failed."""
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    process()
