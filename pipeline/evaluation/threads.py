"""How many CPU threads decoding runs with.

Takes an engine; gives the number of threads with which a pass of one token is fastest. A thick model reads its weights
faster with several threads; in a thin one they cost more to start than they save.
"""

import time

import torch

from ..inference.backbone import SplitBackbone

PASSES = 8
CLEARLY = 0.95
"""More threads are taken only if a pass then needs less than this share of the time."""


@torch.inference_mode()
def fastest(engine: SplitBackbone) -> int:
    """1, 2, 4, ... up to torch's own number of threads; 1 on a GPU, where the host only launches kernels."""
    if engine.device.type != "cpu":
        return 1
    most = torch.get_num_threads()
    counts = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    cache = engine.new_cache(PASSES + 1)
    least = dict.fromkeys(counts, float("inf"))
    for i in range(PASSES):  # in turns, as other processes may come and go
        for count in counts:
            with threads(count):
                engine.full([0], i, cache)  # the first pass with another number of threads starts them
                started = time.perf_counter()
                engine.logits(engine.full([0], i, cache))
                least[count] = min(least[count], time.perf_counter() - started)
    best = counts[0]
    for count in counts[1:]:
        if least[count] < CLEARLY * least[best]:
            best = count
    return best


class threads:
    """Sets the number of CPU threads inside the block, and restores it afterwards."""

    def __init__(self, count: int):
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self):
        torch.set_num_threads(self.count)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)
