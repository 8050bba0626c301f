"""Measures the stage `generate`: speed of the answerers, and robustness, scaling and memory of the command line.

Each part prints a Markdown table:

    padded     the answerer `padded` against another version of its file (--old), in turns in one process
    answerers  tokens/s of every answerer and of transformers' generate, interleaved in one process, and the ratios
    kills      `exit-heads generate` killed twenty times against an undisturbed run
    processes  one and two processes that share a run
    memory     peak memory with 1,000 and with 20,000 prompts

  python benchmarks/generation.py                      all, on the pocket backbone: 25 minutes on 2 cores
  git show COMMIT:pipeline/generation/answerers/padded.py > old.py
  python benchmarks/generation.py --part padded --old old.py backbone.name_or_path=... prompts.path=...
  python benchmarks/generation.py --part answerers generate.exit_head=runs/NAME/heads/exit-1
  python benchmarks/generation.py --part answerers backbone.name_or_path=... machine.device=cuda backbone.dtype=bfloat16
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.backbones.ends import end_tokens
from pipeline.backbones.load import device_of, load_model, load_tokenizer, public_name
from pipeline.config import Config, load
from pipeline.generation.answerers.continuous import Continuous
from pipeline.generation.answerers.interface import Question, Sampling
from pipeline.generation.answerers.padded import Padded
from pipeline.generation.answerers.speculative import Speculative
from pipeline.generation.responses import Responses
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.launchers import own_command
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import load_prompts
from pipeline.runs.provenance import provenance

Ids = list[list[int]]
BASELINE = "one by one, transformers' generate"


# ---- answerers


def transformers_generate(
    model: torch.nn.Module, ends: list[int], prompts: Ids, temperature: float, sampling: Sampling
) -> Ids:
    """transformers' own generate on left-padded batches of `sampling.batch_size`, sorted by length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: Ids = [[] for _ in prompts]
    torch.manual_seed(sampling.seed)
    for at in range(0, len(order), sampling.batch_size):
        rows = order[at : at + sampling.batch_size]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=model.device
        )
        hot = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=0,
            **hot,
        )
        for i, row in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[:end]
    return answers


def answerers(
    model: torch.nn.Module, config: Config, temperature: float, args: argparse.Namespace
) -> dict[str, Callable[[Ids, int], Ids]]:
    """Name -> a function (prompts, seed) -> answers; without batches, only of the first --sequential prompts."""

    def sampling(seed: int, batch_size: int = args.batch_size) -> Sampling:
        return Sampling(args.new_tokens, 1.0, batch_size, seed)

    def ours(answerer, prompts: Ids, seed: int) -> Ids:
        return [a.ids for a in answerer.answer([Question(ids, [], temperature) for ids in prompts], sampling(seed))]

    ends = end_tokens(config.backbone, load_tokenizer(config.backbone))
    padded, continuous = Padded(model, ends), Continuous(model, ends)
    found: dict[str, Callable[[Ids, int], Ids]] = {
        BASELINE: lambda p, s: transformers_generate(model, ends, p[: args.sequential], temperature, sampling(s, 1)),
        "padded batches, transformers' generate": lambda p, s: transformers_generate(
            model, ends, p, temperature, sampling(s)
        ),
        "`padded`": lambda p, s: ours(padded, p, s),
        "`continuous`": lambda p, s: ours(continuous, p, s),
    }
    if config.generate.exit_head is not None:
        head = ExitHead.load(Path(config.generate.exit_head))
        plain = SplitBackbone(model, head, products="repeatable")
        speculative = Speculative(model, head, config.generate.controller, ends)

        def one_by_one(prompts: Ids, seed: int) -> Ids:
            sampler = Sampler(temperature, generator=torch.Generator(model.device).manual_seed(seed))
            asked = [Request(ids, args.new_tokens, frozenset(ends)) for ids in prompts]
            return [autoregressive(plain, request, sampler).tokens for request in asked]

        found["one by one, our decoder without the head"] = lambda p, s: one_by_one(p[: args.sequential], s)
        found[f"`speculative` ({config.generate.controller}, N = {head.exit_layer})"] = lambda p, s: ours(
            speculative, p, s
        )
    return found


def measure_answerers(config: Config, args: argparse.Namespace) -> None:
    model = load_model(config.backbone, device_of(config.machine.device))
    found = load_prompts(config.prompts, "distill")[: args.prompts]
    context = model.config.max_position_embeddings
    tokenizer = load_tokenizer(config.backbone)
    prompts = [ids for _, ids in encode(found, tokenizer, config.prompts, context, args.new_tokens)]
    for temperature in args.temperature or [0.0, 1.0]:
        speeds: dict[str, list[float]] = {}
        chosen = answerers(model, config, temperature, args)
        if args.only:
            chosen = {n: c for n, c in chosen.items() if n == BASELINE or any(part in n for part in args.only)}
        for repeat in range(-1, args.repeats):  # the round before the first warms up
            for name, answer in chosen.items():
                started = time.perf_counter()
                answers = answer(prompts[:8] if repeat < 0 else prompts, max(repeat, 0))
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 0:
                    speeds.setdefault(name, []).append(sum(map(len, answers)) / (time.perf_counter() - started))
        print_facts(config, model.device.type, f"{len(prompts)} prompts ({args.sequential} where one by one), "
                    f"{args.new_tokens} new tokens, batches of {args.batch_size}, temperature {temperature:g}, "
                    f"{args.repeats} interleaved repeats")  # fmt: skip
        print(f"| answerer | tokens/s | range | over {BASELINE} | range |\n|---|---|---|---|---|")
        for name, each in speeds.items():
            ratios = [a / b for a, b in zip(each, speeds[BASELINE], strict=True)]
            print(
                f"| {name} | {statistics.median(each):.0f} | {min(each):.0f}-{max(each):.0f} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |"
            )


def measure_padded(config: Config, args: argparse.Namespace) -> None:
    """tokens/s of two versions of `padded`, half of the prompts greedy and half at T = 1."""
    if args.old is None:
        print("part padded: left out, as no --old FILE was given", file=sys.stderr)
        return
    spec = importlib.util.spec_from_file_location("pipeline.generation.answerers.padded_old", args.old)
    assert spec is not None and spec.loader is not None
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    model = load_model(config.backbone, device_of(config.machine.device))
    tokenizer = load_tokenizer(config.backbone)
    found = load_prompts(config.prompts, "distill")[: args.prompts]
    context = model.config.max_position_embeddings
    prompts = [ids for _, ids in encode(found, tokenizer, config.prompts, context, args.new_tokens)]
    questions = [Question(ids, [], float(i % 2)) for i, ids in enumerate(prompts)]
    ends = end_tokens(config.backbone, tokenizer)
    versions = {"old": old.Padded(model, ends), "new": Padded(model, ends)}
    speeds: dict[str, list[float]] = {name: [] for name in versions}
    answers: dict[str, list] = {name: [] for name in versions}
    for repeat in range(args.repeats):
        for name, answerer in versions.items():
            started, worked = time.perf_counter(), time.process_time()
            rows = args.old_batch_size if name == "old" else args.batch_size
            given = answerer.answer(questions, Sampling(args.new_tokens, 1.0, rows, repeat))
            speeds[name].append(sum(len(a.ids) for a in given) / (time.perf_counter() - started))
            answers[name].append(given)
            print(
                f"{name} {speeds[name][-1]:.1f} tokens/s, {time.process_time() - worked:.0f} s of all threads",
                file=sys.stderr,
                flush=True,
            )
    lm_head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    pairs = zip(answers["old"][0][::2], answers["new"][0][::2], strict=True)
    same = sum(a.ids == b.ids for a, b in pairs)
    print_facts(config, model.device.type, f"{len(prompts)} prompts of {statistics.mean(map(len, prompts)):.0f} "
                f"tokens on average, {args.new_tokens} new tokens, batches of {args.old_batch_size} (old) and "
                f"{args.batch_size} (new), "
                f"{args.repeats} turns")  # fmt: skip
    print(f"A new token takes {2e-6 * (layers + lm_head):.0f} MFLOP of products with weights, a prompt's token "
          f"{2e-6 * layers:.0f}. {same} of {len(questions[::2])} greedy answers are equal.\n")  # fmt: skip
    print("| version | tokens/s | range | over old | range | cut off | mean length |\n|---|---|---|---|---|---|---|")
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, speeds["old"], strict=True)]
        every = [a for given in answers[name] for a in given]
        print(f"| {name} | {statistics.median(each):.0f} | {min(each):.0f}-{max(each):.0f} | "
              f"{statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} | "
              f"{sum(not a.finished for a in every) / len(every):.1%} | "
              f"{statistics.mean(len(a.ids) for a in every):.1f} |")  # fmt: skip


# ---- the command line


class Run:
    """Runs of `exit-heads generate` in one temporary folder."""

    def __init__(self, folder: Path, name: str, words: list[str]):
        self.folder = folder / name / "responses"
        self.command = own_command("generate", *words, f"run.dir={folder}", f"run.name={name}")
        self.responses = Responses(self.folder)

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def seconds(self, processes: int = 1) -> float:
        """Seconds from the start of `processes` processes of this run to the end of the last."""
        started = time.perf_counter()
        for process in [self.start() for _ in range(processes)]:
            if process.wait():
                raise SystemExit(f"failed: {shlex.join(self.command)}")
        return time.perf_counter() - started

    def counts(self) -> dict[str, int]:
        manifest = self.responses.manifest()
        assert manifest is not None and manifest["complete"]
        return manifest["responses"]

    def making(self) -> float:
        """Seconds spent on shards, summed over all processes."""
        return sum(self.responses.entry(name)["made"].get("seconds", 0.0) for name in self.responses.names())


def cli_words(config: Config, args: argparse.Namespace) -> list[str]:
    return [*args.words, "wandb.mode=disabled", f"generate.num_prompts={args.cli_prompts}", "generate.shard_size=16",
            "generate.batch_size=16", f"generate.max_new_tokens={args.new_tokens}"]  # fmt: skip


def measure_kills(config: Config, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        calm = Run(Path(folder), "calm", cli_words(config, args))
        calm_seconds = calm.seconds()
        rough, r = Run(Path(folder), "rough", cli_words(config, args)), random.Random(0)
        start_up = calm_seconds - calm.making()
        started, kills, redone = time.perf_counter(), 0, 0
        while kills < args.kills:
            process = rough.start()
            time.sleep(start_up + r.uniform(-0.2, 0.6) * calm.making() / args.kills)
            if process.poll() is not None:
                raise SystemExit(f"all was answered after {kills} kills: give more --cli-prompts")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            for name in rough.responses.claims.holders():
                redone += len(rough.responses.asked(int(name[6:11]))) if name.startswith("shard-") else 0
        rough.seconds()
        rough_seconds = time.perf_counter() - started
        same = (calm.folder / "manifest.json").read_bytes() == (rough.folder / "manifest.json").read_bytes()
        print_facts(config, "cpu", f"{args.cli_prompts} prompts in shards of 16, {args.new_tokens} new tokens")
        print("| run | seconds | of them starting | prompts begun again | manifest |\n|---|---|---|---|---|")
        print(f"| undisturbed | {calm_seconds:.0f} | {start_up:.0f} | 0 | |")
        print(f"| killed {kills} times | {rough_seconds:.0f} | about {start_up * (kills + 1):.0f} | {redone} of "
              f"{args.cli_prompts} | {'equal' if same else 'DIFFERENT'} |")  # fmt: skip


def measure_processes(config: Config, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print_facts(config, "cpu", f"{args.cli_prompts} prompts in shards of 16, {args.new_tokens} new tokens")
        print("| processes | seconds in all | shards a process | tokens/s at work | over one |\n|---|---|---|---|---|")
        alone = 0.0
        for count in (1, 2):
            run = Run(Path(folder), f"by-{count}", cli_words(config, args))
            seconds = run.seconds(count)
            by: dict[str, int] = {}
            for name in run.responses.names():
                worker = run.responses.entry(name)["made"]["worker"]
                by[worker] = by.get(worker, 0) + 1
            speed = run.counts()["tokens"] / (run.making() / len(by))
            alone = alone or speed
            print(
                f"| {count} | {seconds:.0f} | {' + '.join(map(str, by.values()))} | {speed:.0f} | {speed / alone:.2f} |"
            )


def measure_memory(config: Config, args: argparse.Namespace) -> None:
    """Peak memory of one process for two numbers of prompts, on a backbone so small that its memory is negligible."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(load(None, []).backbone)
        thin = AutoConfig.for_model("llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                    max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        AutoModelForCausalLM.from_config(thin).save_pretrained(f"{folder}/thin")
        tokenizer.save_pretrained(f"{folder}/thin")
        words = [f"backbone.name_or_path={folder}/thin", "backbone.dtype=float32", "machine.threads=1",
                 "generate.num_prompts=0", "generate.max_new_tokens=8", "generate.batch_size=128",
                 "wandb.mode=disabled", "prompts.held_out=0"]  # fmt: skip
        print_facts(
            config,
            "cpu",
            "a random llama of 2 layers x 32, prompts of about 100 tokens, 8 new tokens, one process each",
        )
        print("| prompts | peak memory, MiB | seconds |\n|---|---|---|")
        r = random.Random(0)
        for count in (1_000, 20_000):
            path = Path(folder) / f"{count}.jsonl"
            with path.open("w") as file:
                for _ in range(count):
                    text = " ".join(
                        f"{r.choice(['sum', 'value', 'index', 'name'])}_{r.randrange(1000)}" for _ in range(20)
                    )
                    file.write(json.dumps({"prompt": text}) + "\n")
            run = Run(Path(folder), f"of-{count}", [*words, f"prompts.path={path}"])
            started = time.perf_counter()
            process = run.start()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"failed: {shlex.join(run.command)}")
            print(f"| {count:,} | {usage.ru_maxrss / (1 << 20 if sys.platform == 'darwin' else 1 << 10):.0f} "
                  f"| {time.perf_counter() - started:.0f} |")  # fmt: skip


def print_facts(config: Config, device: str, what: str) -> None:
    """Prints when, where and on what the table below it was measured."""
    where = provenance()
    hardware = ", ".join(where["hardware"]["gpus"]) if device == "cuda" else where["hardware"]["cpu"]
    versions = ", ".join(f"{p} {where['versions'][p]}" for p in ("python", "torch", "transformers"))
    threads = config.machine.threads or torch.get_num_threads()
    facts = [where["time"][:10], f"{hardware}, {where['hardware']['cores']} cores, {threads} threads a process",
             versions, f"{public_name(config.backbone)} in {config.backbone.dtype}", what]  # fmt: skip
    print(f"\n{'; '.join(facts)}.  \n`{shlex.join(['python', *sys.argv])}`\n", flush=True)


PARTS = {
    "padded": measure_padded,
    "answerers": measure_answerers,
    "kills": measure_kills,
    "processes": measure_processes,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given again")
    parser.add_argument("--old", help="part padded: another version of pipeline/generation/answerers/padded.py")
    parser.add_argument("--old-batch-size", type=int, default=64, help="part padded: batches of the other version")
    parser.add_argument("--prompts", type=int, default=128, help="prompts answered by each batched answerer")
    parser.add_argument("--sequential", type=int, default=6, help="prompts answered one by one")
    parser.add_argument("--only", nargs="+", help="part answerers: only those whose names contain one of these")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, action="append", help="default: 0 and 1")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds over all answerers")
    parser.add_argument("--cli-prompts", type=int, default=512, help="prompts of the runs that are killed or shared")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the config: backbone.*, machine.* ...")
    args = parser.parse_intermixed_args()
    args.words = ["backbone.dtype=float32", "machine.threads=1", *args.words]
    config = load(None, args.words)
    torch.set_num_threads(config.machine.threads)
    for part in args.part or PARTS:
        PARTS[part](config, args)


if __name__ == "__main__":
    main()
