"""What a distillation step costs over the teacher's forward pass, against the FLOPs it cannot avoid.

    python benchmarks/training.py --layers 32 --hidden 512 --vocabulary 8192 --exit-layers 16

Random weights, one process, the very Engine that distill trains with. Teacher forward (with logits) and step
alternate; CPU time, as other work on the machine then counts less. Per token, with P parameters a layer, L
layers, D hidden, V vocabulary and H heads:

    teacher = 2 L P + 2 V D        step = teacher + H (6 P + 4 V D)

so the floor of step / teacher is 1 + H (6 P + 4 V D) / (2 L P + 2 V D). Also prints the peak memory of the chunked
linear KL over that of full logits (2048 rows, V 32000), each in a process of its own.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
from datetime import date

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Config
from pipeline.inference.exit_head import new_exit_layer
from pipeline.rundir import provenance
from pipeline.training.losses import LinearDistillation
from pipeline.training.module import Engine
from pipeline.training.sharding import shard_backbone, shard_engine, shard_head

ROWS, DIM, VOCABULARY = 2048, 1024, 32000


def build(args: argparse.Namespace) -> Engine:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29555", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    heads = args.hidden // 64 or 1
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.ffn or args.hidden * 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=args.length, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    exits = [new_exit_layer(model) for _ in args.exit_layers]
    shard_backbone(model, mesh)
    for head in exits:
        shard_head(head, mesh, torch.float32)
    engine = Engine(model, args.exit_layers, exits, Config())
    shard_engine(engine, exits, mesh)
    return engine


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
        LinearDistillation.apply(weight, teacher, {"kl": 1.0}, 1.0, 1.0, 256, None, student).sum().backward()
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
    positions, mask = torch.arange(args.length).expand_as(ids), torch.ones_like(ids, dtype=torch.bool)

    def teacher() -> None:
        with torch.no_grad():
            final_BTD, _ = engine(ids, positions, mask, teach_only=True)
            engine.backbone.lm_head(final_BTD)

    def step() -> None:
        engine(ids, positions, mask, 1 / mask.sum().item()).sum().backward()

    # The root must see its own forward first; calls to its parts are then allowed.
    step()
    teacher()
    seconds = np.zeros((args.repeats, 2))
    for i in range(args.repeats):
        for j, work in enumerate((teacher, step)):
            started = time.process_time()
            work()
            seconds[i, j] = time.process_time() - started
    layer = sum(p.numel() for p in engine.backbone.model.layers[0].parameters())
    logits = args.vocabulary * args.hidden
    floor = 1 + len(args.exit_layers) * (6 * layer + 4 * logits) / (2 * args.layers * layer + 2 * logits)
    ratios = seconds[:, 1] / seconds[:, 0]
    machine = provenance()["hardware"]
    print(
        f"{date.today()}, {machine['cpu']} ({machine['cores']} cores), {torch.get_num_threads()} threads, float32, "
        f"Python {platform.python_version()}, torch {torch.__version__}; `python {' '.join(sys.argv)}`\n"
    )
    print("| step / teacher forward (CPU time, best of each) | range over repeats | FLOP floor |\n|---|---|---|")
    best = seconds.min(0)
    print(f"| {best[1] / best[0]:.3f} | {ratios.min():.3f}-{ratios.max():.3f} | {floor:.3f} |\n")
    print("| linear KL, 2048 rows, V 32000 | peak MiB |\n|---|---|")
    print(f"| chunked (256 rows) | {chunked:.0f} |\n| full logits | {naive:.0f} |\n| ratio | {chunked / naive:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
