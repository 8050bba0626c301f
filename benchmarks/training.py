"""What a distillation step costs over the teacher's forward pass, against the FLOPs it cannot avoid; and from a cache.

    python benchmarks/training.py --layers 32 --hidden 512 --vocabulary 8192 --exit-layers 16

Random weights, one process, the very Engine that distill trains with. Teacher forward (with logits), step, and step
of distill.teacher=cached (which reads its hidden states from a file) take turns; CPU time, as other work on the machine
then counts less. FLOPs per token, with P parameters a layer, L layers, D hidden, V vocabulary and H heads:

    teacher = 2 L P + 2 V D        step = teacher + H (6 P + 4 V D)        cached step = step - 2 L P

so the floor of step / teacher is 1 + H (6 P + 4 V D) / (2 L P + 2 V D). Also prints the peak memory of the chunked
linear KL over that of full logits (2048 rows, V 32000), each in a process of its own.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Config
from pipeline.inference.exit_head import new_exit_layer
from pipeline.rundir import provenance
from pipeline.training.cache import Lessons, TeacherCache, head_of
from pipeline.training.data import Packed
from pipeline.training.losses import LinearKL
from pipeline.training.module import Engine
from pipeline.training.sharding import shard_engine

ROWS, DIM, VOCABULARY = 2048, 1024, 32000


def build(args: argparse.Namespace) -> Engine:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # no port to be taken
    mesh = init_device_mesh("cpu", (1,))
    heads = args.hidden // 64 or 1
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.ffn or args.hidden * 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=args.length, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    exits = [new_exit_layer(model) for _ in args.exit_layers]
    for unit in (model.model.embed_tokens, *model.model.layers, model.lm_head):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    engine = Engine(model, args.exit_layers, exits, Config())
    shard_engine(engine, exits, mesh)
    return engine


def keep(engine: Engine, sequences: Packed, exit_layers: list[int], hidden: int, folder: Path) -> Lessons:
    """What the teacher says of these sequences, as `exit-heads cache` would keep it."""
    config = Config()
    config.backbone.dtype, config.distill.exit_layers = "float32", exit_layers
    config.distill.sequence_length = sequences.ids_ST.shape[1]
    head, cache = head_of(config, {}, hidden, sequences), TeacherCache(folder)
    cache.begin(head | {"sequences_per_shard": len(sequences)})
    engine.unshard()  # the final norm, which is the root's
    (final_BTD, states), _ = engine.teacher(sequences.ids_ST, sequences.positions_ST)
    tensors = {"final": final_BTD} | {f"hidden.{n}": state_BTD for n, state_BTD in states.items()}
    cache.put(cache.names()[0], {name: state_BTD.flatten(0, 1) for name, state_BTD in tensors.items()}, {})
    return Lessons(cache, sequences, exit_layers)


def peak_mib(naive: bool) -> float:
    """Peak resident memory of one forward and backward of the loss above what was there before, in MiB."""
    torch.manual_seed(0)
    teacher, weight = torch.randn(ROWS, DIM), torch.randn(VOCABULARY, DIM) * DIM**-0.5
    student = torch.randn(ROWS, DIM, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if naive:
        log_q, log_p = ((h @ weight.t()).log_softmax(-1) for h in (student, teacher))
        torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").backward()
    else:
        LinearKL.apply(weight, teacher, 1.0, 1.0, 256, None, student).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=0, help="default: 3 x hidden")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[16])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:  # a peak can only rise: one process a measurement
        chunked, naive = pool.map(peak_mib, [False, True], chunksize=1)

    torch.manual_seed(0)
    engine = build(args)
    ids = torch.randint(args.vocabulary, (args.sequences, args.length))
    positions, mask = torch.arange(args.length).repeat(args.sequences, 1), torch.ones_like(ids, dtype=torch.bool)

    def teacher() -> None:
        with torch.no_grad():
            engine.unshard()
            (final_BTD, _), _ = engine.teacher(ids, positions)
            engine.backbone.lm_head(final_BTD)

    def step(taught: Any = None) -> None:
        engine(ids, positions, mask, 1 / mask.sum().item(), taught=taught).sum().backward()

    def cached_step() -> None:
        step(lessons(list(range(len(ids))), ids.device))

    # The root must see its own forward first; calls to its parts are then allowed.
    step()
    lengths = torch.full((args.sequences,), args.length)
    with tempfile.TemporaryDirectory() as folder:
        lessons = keep(engine, Packed(ids, positions, mask, lengths), args.exit_layers, args.hidden, Path(folder))
        bytes_ = sum(path.stat().st_size for path in Path(folder).glob("shard-*"))
        works = (teacher, step, cached_step)
        for work in works:
            work()
        seconds = np.zeros((args.repeats, len(works)))
        for i in range(args.repeats):
            for j, work in enumerate(works):
                started = time.process_time()
                work()
                seconds[i, j] = time.process_time() - started
    layer = sum(p.numel() for p in engine.backbone.model.layers[0].parameters())
    logits = args.vocabulary * args.hidden
    layers, heads = 2 * args.layers * layer, len(args.exit_layers) * (6 * layer + 4 * logits)
    pairs = {  # work over work, and the floor of it
        "step / teacher forward": (1, 0, 1 + heads / (layers + 2 * logits)),
        "cached step / step": (2, 1, (2 * logits + heads) / (layers + 2 * logits + heads)),
    }
    machine = provenance()["hardware"]
    print(
        f"{date.today()}, {machine['cpu']} ({machine['cores']} cores), {torch.get_num_threads()} threads, float32, "
        f"Python {platform.python_version()}, torch {torch.__version__}; `python {' '.join(sys.argv)}`\n"
    )
    print("| CPU time | best over best | range over repeats | FLOPs |\n|---|---|---|---|")
    best = seconds.min(0)
    for name, (over, under, floor) in pairs.items():
        ratios = seconds[:, over] / seconds[:, under]
        print(f"| {name} | {best[over] / best[under]:.3f} | {ratios.min():.3f}-{ratios.max():.3f} | {floor:.3f} |")
    print(f"\nThe cache takes {bytes_ / lengths.sum():.0f} bytes a token.\n")
    print("| linear KL, 2048 rows, V 32000 | peak MiB |\n|---|---|")
    print(f"| chunked (256 rows) | {chunked:.0f} |\n| full logits | {naive:.0f} |\n| ratio | {chunked / naive:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
