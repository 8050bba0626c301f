"""Measures the time of a distillation step over that of its teacher forward pass, beside the ratio of their FLOPs.

    python benchmarks/training.py                                   every part, a backbone of 32 layers, D 512, V 8192
    python benchmarks/training.py --part step --exit-layers 4 8 16  one part, several heads
    python benchmarks/training.py --device cuda --dtype bfloat16 --hidden 4096 --ffn 14336 --vocabulary 128256

It runs the StepModel that distill trains with, on random weights. FLOPs per token, with P parameters in a layer, L
layers, hidden size D, vocabulary V and H heads:

    teacher = 2 L P + 2 V D        step = teacher + H (6 P + 4 V D)        step with a cached teacher = step - 2 L P

so step / teacher is at least 1 + H (6 P + 4 V D) / (2 L P + 2 V D). Each part runs what it compares in turn:

    step       step over teacher forward (logits included); on a CPU by CPU time, as other work then counts less
    heads      steps with 1, 2, ... of the exit layers: the cost of another head
    cached     steps with hidden states from a cache on disk over steps that run the backbone; bytes per token
    memory     peak memory of the chunked linear loss over that of full logits (2048 rows, V 32000), in a process each
    processes  tokens/s of two FSDP processes that share a step, over those of one, by wall clock
"""

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Config
from pipeline.inference.exit_head import new_exit_layer
from pipeline.runs.provenance import provenance
from pipeline.training.chunked_loss import LinearDistillation
from pipeline.training.fsdp_units import resharded
from pipeline.training.launch import find_free_network_port
from pipeline.training.packing import Packed
from pipeline.training.sharding import make_mesh, shard_backbone, shard_head, shard_step_model
from pipeline.training.step_model import StepModel
from pipeline.training.teacher_cache import CachedTeacher, TeacherCache, head_of

PARTS = ("step", "heads", "cached", "memory", "processes")
ROWS, DIM, VOCABULARY = 2048, 1024, 32000
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s from the manufacturer's data sheets; for other GPUs no share of the peak is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=0, help="default: 3 x hidden")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[16, 8, 4], help="the first is that of part step")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    machine = provenance()["hardware"]
    where = f"{machine['cpu']} ({machine['cores']} cores), {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        where = torch.cuda.get_device_name()
    print(
        f"{date.today()}, {where}, {args.dtype}, "
        f"Python {platform.python_version()}, torch {torch.__version__}; `python {' '.join(sys.argv)}`"
    )
    print(
        f"{args.layers} layers, D {args.hidden}, V {args.vocabulary}, {args.sequences} sequences of {args.length} "
        f"tokens, {args.repeats} repeats; ranges are over repeats\n"
    )
    if {"step", "heads", "cached"} & set(args.part):
        with group(args.device, 0, 1, find_free_network_port()):
            one_process(args)
    if "memory" in args.part:
        memory()
    if "processes" in args.part:
        if args.device.startswith("cuda") and torch.cuda.device_count() < 2:
            print(f"processes: left out: two processes need two GPUs, there is {torch.cuda.device_count()}")
        else:
            processes(args)


# ---- one process


def one_process(args: argparse.Namespace) -> None:
    bench = Bench(args, args.exit_layers)
    bench.step(1)  # FSDP initialises in the root's forward; only then may its parts be called alone
    if "step" in args.part:
        seconds = bench.in_turn([bench.teacher, lambda: bench.step(1)])
        rate, floor = bench.tokens / np.median(seconds[:, 1]), bench.flops(1) / bench.teacher_flops
        print("| step / teacher forward | range | FLOP floor | tokens/s (CPU time) | of the peak |")
        print("|---|---|---|---|---|")
        print(f"| {ratio(seconds, 1, 0)} | {floor:.3f} | {rate:.0f} | {bench.of_peak(rate, 1)} |\n")
    if "heads" in args.part:
        counts = range(1, len(args.exit_layers) + 1)
        seconds = bench.in_turn([lambda n=n: bench.step(n) for n in counts])  # type: ignore[misc]
        print("| heads | step / step with one head | range | FLOPs |\n|---|---|---|---|")
        for i, n in enumerate(counts):
            print(f"| {n} | {ratio(seconds, i, 0)} | {bench.flops(n) / bench.flops(1):.3f} |")
        print()
    if "cached" in args.part:
        with tempfile.TemporaryDirectory() as folder:
            cached_teacher, numbers = bench.keep(Path(folder)), list(range(args.sequences))
            cached = lambda: bench.step(1, cached_teacher(numbers, bench.device))  # noqa: E731
            seconds = bench.in_turn([lambda: bench.step(1), cached])
            bytes_ = sum(path.stat().st_size for path in Path(folder).glob("shard-*"))
        print("| cached step / online step | range | FLOPs | bytes a token |\n|---|---|---|---|")
        floor = 1 - bench.backbone_flops / bench.flops(1)
        print(f"| {ratio(seconds, 1, 0)} | {floor:.3f} | {bytes_ / bench.tokens:.0f} |\n")


class Bench:
    """A StepModel of random weights on one process of the group, and the work that is timed."""

    def __init__(self, args: argparse.Namespace, exit_layers: list[int]):
        self.args, self.device, dtype = args, torch.device(args.device), getattr(torch, args.dtype)
        torch.manual_seed(0)
        mesh = make_mesh(self.device.type, dist.get_world_size(), 0)
        heads = args.hidden // 64 or 1
        config = LlamaConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.ffn or args.hidden * 3,
            num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=args.length, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(self.device, dtype).requires_grad_(False).eval()
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        self.head_flops = 6 * layer + 4 * args.vocabulary * args.hidden
        self.backbone_flops = 2 * args.layers * layer
        self.teacher_flops = self.backbone_flops + 2 * args.vocabulary * args.hidden
        exits = [new_exit_layer(model) for _ in exit_layers]
        shard_backbone(model, mesh)
        for head in exits:
            shard_head(head, mesh, dtype)
        self.step_model = StepModel(model, exit_layers, exits, Config())
        shard_step_model(self.step_model, exits, mesh)
        self.names = list(self.step_model.heads)
        shape = args.sequences // dist.get_world_size(), args.length
        ids = torch.randint(args.vocabulary, shape, device=self.device)
        positions = torch.arange(args.length, device=self.device).expand_as(ids)
        self.inputs = ids, positions, torch.ones_like(ids, dtype=torch.bool)
        self.tokens = args.sequences * args.length
        """Tokens of a step on all processes."""

    def teacher(self) -> None:
        """The backbone's forward pass, and the logits of every token, computed in chunks as the loss does."""
        (final_BTD, _), _ = self._pass()
        with torch.no_grad():
            for rows in final_BTD.flatten(0, 1).split(self.step_model.chunk):
                self.step_model.backbone.lm_head(rows)  # type: ignore[operator]

    def step(self, heads: int, teacher_states: Any = None) -> None:
        """Forward and backward pass. The optimizer is left out: its cost is per weight, not per token."""
        with resharded(self.step_model):
            losses_H = self.step_model(
                *self.inputs, 1 / self.tokens, teacher_states=teacher_states, heads=self.names[:heads]
            )
            losses_H.sum().backward()

    def keep(self, folder: Path) -> CachedTeacher:
        """The first exit layer's cache of these sequences, as `exit-heads cache` would make it."""
        (final_BTD, hidden), _ = self._pass()
        n, lengths = self.args.exit_layers[0], torch.full((self.args.sequences,), self.args.length)
        config = Config()
        config.distill.exit_layers, config.distill.sequence_length = [n], self.args.length
        config.backbone.dtype = self.args.dtype
        sequences = Packed(*(tensor.cpu().contiguous() for tensor in self.inputs), lengths)
        cache = TeacherCache(folder)
        head = head_of(config, {}, self.args.hidden, sequences)
        cache.begin(head | {"sequences_per_shard": len(sequences)})
        states = {"final": final_BTD, f"hidden.{n}": hidden[n]}
        cache.put(
            *cache.names(), {name: state_BTD.flatten(0, 1).cpu() for name, state_BTD in states.items()}, {}, cache.of()
        )
        return CachedTeacher(cache, sequences, [n])

    def _pass(self) -> Any:
        assert self.step_model.teacher is not None
        with resharded(self.step_model):
            self.step_model.unshard()  # type: ignore[operator]  # the final norm, which lies in the root
            return self.step_model.teacher(*self.inputs[:2])

    def flops(self, heads: int) -> int:
        """FLOPs of a step per token."""
        return self.teacher_flops + heads * self.head_flops

    def in_turn(self, works: list[Callable[[], None]]) -> np.ndarray:
        """Seconds [repeats, works]. On a CPU it is CPU time, on which other work on the machine has less influence."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        seconds = np.zeros((self.args.repeats, len(works)))
        for i in range(self.args.repeats):
            for j, work in enumerate(works):
                self._wait()
                started = clock()
                work()
                self._wait()
                seconds[i, j] = clock() - started
        return seconds

    def of_peak(self, tokens_per_second: float, heads: int) -> str:
        """The share of the GPU's peak FLOP/s that a rate means, if the peak is known."""
        if self.device.type != "cuda":
            return "not known"
        name = torch.cuda.get_device_name()
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        return f"{tokens_per_second * self.flops(heads) / peak:.0%}" if peak else "not known"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ratio(seconds: np.ndarray, i: int, j: int) -> str:
    """`best of i / best of j | smallest-largest ratio`."""
    ratios, best = seconds[:, i] / seconds[:, j], seconds.min(0)
    return f"{best[i] / best[j]:.3f} | {ratios.min():.3f}-{ratios.max():.3f}"


@contextmanager
def group(device: str, rank: int, world: int, port: int) -> Iterator[None]:
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- memory of the loss


def memory() -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:  # a peak never falls, so each measurement has a process of its own
        chunked, naive = pool.map(peak_mib, [False, True], chunksize=1)
    print(f"| linear loss (KL), {ROWS} rows, D {DIM}, V {VOCABULARY} | peak MiB |\n|---|---|")
    print(f"| chunked (256 rows) | {chunked:.0f} |\n| full logits | {naive:.0f} |\n| ratio | {chunked / naive:.2f} |\n")


def peak_mib(naive: bool) -> float:
    """Peak resident memory of one forward and backward of the loss above what was there before, in MiB."""
    torch.manual_seed(0)
    # Scaled in place: a temporary copy of the weight would raise the peak before the measurement.
    teacher, weight = torch.randn(ROWS, DIM), torch.randn(VOCABULARY, DIM).mul_(DIM**-0.5)
    student = torch.randn(ROWS, DIM, requires_grad=True)
    before = peak_rss()
    if naive:
        log_q, log_p = ((h @ weight.t()).log_softmax(-1) for h in (student, teacher))
        torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").backward()
    else:
        LinearDistillation.apply(weight, teacher, {"kl": 1.0}, 1.0, 1.0, 256, 0.0, None, student).sum().backward()
    return (peak_rss() - before) / 1024


def peak_rss() -> int:
    """Peak resident memory in KiB. getrusage's figure would include that of the parent process."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


# ---- several processes


def processes(args: argparse.Namespace) -> None:
    """Runs of one and of two processes in turn; every process has one thread."""
    spawn = multiprocessing.get_context("spawn")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for world, found in rates.items():
            port, queue = find_free_network_port(), spawn.SimpleQueue()
            torch.multiprocessing.spawn(steps, (args, world, port, queue), world)  # raises as soon as one fails
            found.append(min(queue.get() for _ in range(world)))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print("| processes | tokens/s (median of 3 runs) | over one | range |\n|---|---|---|---|")
    print(f"| 1 | {np.median(rates[1]):.0f} | | |")
    print(f"| 2 | {np.median(rates[2]):.0f} | {np.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |\n")


def steps(rank: int, args: argparse.Namespace, world: int, port: int, found: Any) -> None:
    """One process of a run; puts the tokens/s of the whole step, over all processes, into `found`."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if args.device.startswith("cuda") else args.device
    if device.startswith("cuda"):
        torch.cuda.set_device(rank)
    with group(device, rank, world, port):
        bench = Bench(argparse.Namespace(**{**vars(args), "device": device}), args.exit_layers[:1])
        bench.step(1)
        seconds = []
        for _ in range(args.repeats):
            dist.barrier()
            started = time.perf_counter()
            bench.step(1)
            bench._wait()
            dist.barrier()
            seconds.append(time.perf_counter() - started)
        found.put(bench.tokens / float(np.median(seconds)))
        dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
