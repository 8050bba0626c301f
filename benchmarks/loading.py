"""Measures what loading the frozen backbone costs each process: memory above its shard, and time.

    python benchmarks/loading.py

Writes a random Llama of about 1 GB of float32 in several safetensors files, then loads it with one exit head at world
size 1, 2 and 4, in float32 and bfloat16: with the loader of distill, and with from_pretrained in every process followed
by sharding. Every load runs in fresh processes of one thread, whose memory is read from /proc every millisecond. The
figures are what a load adds to the memory of a process that has imported everything, joined the group and built the
model on the meta device, in the kernel's two kinds:

    anonymous   memory without a file behind it: it must fit, or the kernel kills the process
    mapped      pages of the weights' files: the kernel takes them back when memory is short

Each figure is the largest over the processes of a load. The aim is shard + 64 MiB of anonymous memory. The last table
is computed, not measured: the largest tensors of a 70B backbone.
"""

import argparse
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from pipeline.backbones.load import load_model
from pipeline.backbones.source import load_config
from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone
from pipeline.inference.exit_head import new_exit_layer
from pipeline.runs.provenance import provenance
from pipeline.training import load_sharded
from pipeline.training.sharding import make_mesh, shard_backbone, shard_head

MIB = 2**20
WAYS = ("shard by shard", "from_pretrained, then shard")
BIG = {  # vocabulary, hidden size, intermediate size
    "Llama-2-70B": (32000, 8192, 28672),
    "Llama-3-70B": (128256, 8192, 28672),
}


class Watch(threading.Thread):
    """Largest anonymous and file-mapped resident memory of this process, in bytes, until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base, self.peak, self.going = resident(), resident(), True

    def run(self) -> None:
        while self.going:
            self.peak = tuple(map(max, self.peak, resident()))
            time.sleep(0.001)

    def stop(self) -> list[int]:
        self.going = False
        self.join()
        return [peak - base for peak, base in zip(self.peak, self.base, strict=True)]


def resident() -> tuple[int, ...]:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def write_checkpoint(folder: str, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def load(rank: int, world: int, folder: str, dtype: str, way: str, store: str, found: Any) -> None:
    """One process of a load; puts (bytes of its shard, anonymous, mapped; seconds) into `found`."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    backbone, device, mesh = Backbone(folder, dtype=dtype), torch.device("cpu"), make_mesh("cpu", world, 0)
    n = load_config(backbone).num_hidden_layers // 2
    fingerprint = fingerprint_of_files(backbone)
    load_sharded.check_checkpoint(backbone, fingerprint, [n], "last")
    dist.barrier()
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    if way == WAYS[0]:
        model, heads = load_sharded.load_sharded_backbone(backbone, device, mesh, fingerprint, [n])
    else:
        model = load_model(backbone, device)
        heads = [new_exit_layer(model)]
        shard_backbone(model, mesh)
        shard_head(heads[0], mesh, model.dtype)
    seconds = time.perf_counter() - started
    used = watch.stop()
    shard = sum(local(p).nbytes for module in (model, *heads) for p in module.parameters())
    found.put((shard, *used, seconds))
    dist.barrier()
    dist.destroy_process_group()


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def measure(world: int, *what: str) -> list[float]:
    """The largest of each figure over the processes of one load."""
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world, *what, f"{folder}/store", found) for rank in range(world)]
        processes = [spawn.Process(target=load, args=a) for a in arguments]
        for process in processes:
            process.start()
        figures = [found.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    return [max(column) for column in zip(*figures, strict=True)]


def print_big() -> None:
    print("\n| 70B, bfloat16, MiB | largest tensors | shard over 8 | over 16 |\n|---|---|---|---|")
    for name, (vocabulary, hidden, intermediate) in BIG.items():
        for tensor, elements in (("LM head", vocabulary * hidden), ("down_proj", hidden * intermediate)):
            size = elements * 2 / MIB
            print(f"| {name} {tensor} | {size:.0f} | {size / 8:.0f} | {size / 16:.0f} |")
    print(
        f"\nBeyond its shard the loader holds at most {load_sharded.PIECE * 4 // MIB} MiB, whatever the tensor:\n"
        "a piece that is drawn at random, or whose dtype changes on the way to a GPU.\n"
        "On a CPU rows go from the mapped file straight to the shard."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=16, help="layers of 49 MiB, beside 250 MiB of embedding and LM head"
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    machine = provenance()["hardware"]
    print(
        f"{date.today()}, {machine['cpu']} ({machine['cores']} cores), one thread a process, float32 files, Python "
        f"{platform.python_version()}, torch {torch.__version__}; `python {' '.join(sys.argv)}`. MiB; s is wall time.\n"
    )
    print(
        "| dtype | world | loaded | shard | peak anonymous | above the shard | peak mapped | s |\n" + "|---" * 8 + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, args.layers))
        writer.start()
        writer.join()
        for dtype in args.dtypes:
            for world in args.worlds:
                for way in WAYS:
                    *sizes, seconds = measure(world, folder, dtype, way)
                    shard, anonymous, mapped = (size / MIB for size in sizes)
                    row = f"| {dtype} | {world} | {way} | {shard:.0f} | {anonymous:.0f} | {anonymous - shard:.0f} | "
                    print(f"{row}{mapped:.0f} | {seconds:.1f} |", flush=True)
    print_big()


if __name__ == "__main__":
    main()
