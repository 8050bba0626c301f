"""For how many texts at once drafting pays on a GPU: the formula against a count of every matrix, and its table."""

import json
import shlex
from math import prod

import numpy as np
import pytest

from pipeline import cli
from pipeline.config import load
from pipeline.planning import batches, memory, tables
from pipeline.planning.hardware import BANDWIDTH_SHARE, GPUS
from pipeline.stages.plan import make

DENSE, EXPERTS = "meta-llama/Llama-2-70b-chat-hf", "Qwen/Qwen3-30B-A3B"
WORDS = ["plan.gpu=H100", "distill.exit_layers=[2,6]", "plan.acceptance=[0.6,0.7]", "distill.sequence_length=1024",
         "generate.max_new_tokens=24", "evaluate.max_new_tokens=100"]  # fmt: skip
LENGTH = 1000 + 50


def plan(name: str, *words: str):
    return make(load(None, [f"backbone.name_or_path={name}", *WORDS, *words]))


class Counted:
    """Seconds of passes on an H100 in bfloat16, matrix by matrix and text by text."""

    def __init__(self, p):
        self.a = p.architecture

    def seconds(self, layers: int, vocabulary: int, texts: int, rows: int) -> float:
        a, read, flops = self.a, 0.0, 0.0
        for _ in range(layers):
            for shape in a.layer_shapes:
                if len(shape) == 3:  # experts, each read if some row chooses it
                    read += 2 * prod(shape) * (1 - (1 - a.experts_per_token / a.experts) ** (texts * rows))
                    flops += texts * rows * 2 * prod(shape[1:]) * a.experts_per_token
                else:
                    read += 2 * prod(shape)
                    flops += texts * rows * 2 * prod(shape) * (len(shape) == 2)
            for _ in range(texts):
                read += 2 * LENGTH * a.kv_heads * a.head_dim * 2  # keys and values
                flops += rows * 2 * 2 * LENGTH * a.heads * a.head_dim  # scores, and the sum that they weigh
        read += 2 * vocabulary * a.hidden
        flops += texts * rows * 2 * vocabulary * a.hidden
        return max(read / (3350e9 * BANDWIDTH_SHARE), flops / (989e12 * 0.4))

    def speedup(self, n: int, k: int, rate: float, texts: int) -> float:
        a, time, tokens, reached = self.a, 0.0, 0.0, 1.0
        for draft in range(k + 1):
            time += self.seconds(n, 0, texts, 1)
            time += self.seconds(1, 8192, texts, 1) if draft < k else 0  # of 32,000 or more tokens 8192 are drafted
            tokens, reached = tokens + reached, reached * rate
        time += self.seconds(a.layers - n, a.vocabulary, texts, k + 1)
        time += 0.05 * self.seconds(a.layers, a.vocabulary, 1, 1)
        return tokens * self.seconds(a.layers, a.vocabulary, texts, 1) / time


@pytest.mark.parametrize("name", [DENSE, EXPERTS])
def test_speedups_are_those_of_a_count_of_every_matrix(name) -> None:
    p = plan(name)
    counted = Counted(p)
    for c, prediction, rate in zip(p.batches, p.predictions, (0.6, 0.7), strict=True):
        assert c.k == prediction.best and list(c.speedups) == list(batches.SHOWN)
        for texts, speedup in c.speedups.items():
            assert speedup == pytest.approx(counted.speedup(c.exit_layer, c.k, rate, texts))
        for ranges, k in ((c.pays, c.k), (c.pays_of_one, 1)):
            for first, last in ranges:
                for texts, pays in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
                    if 1 <= texts <= batches.MOST and last < batches.MOST:
                        assert (counted.speedup(c.exit_layer, k, rate, texts) > 1) == pays, (texts, k)


def test_a_dense_backbone_stops_paying_and_experts_begin_to() -> None:
    """MoESD (arXiv 2505.19645): several texts read most experts anyway, so that further rows read few more."""
    dense, experts = plan(DENSE).batches[0], plan(EXPERTS).batches[0]
    ((first, last),) = dense.pays
    assert first == 1 and 64 < last < 256 and dense.pays_of_one[0][1] > last
    assert dense.speedups[256] < 1 < dense.speedups[64] < dense.speedups[1]
    assert experts.speedups[4] < 1 < experts.speedups[64] and experts.pays[-1][0] > 4


def test_a_slower_gpu_for_its_memory_stops_earlier() -> None:
    """Fewer operations for every byte: the RTX 4090's arithmetic is the bound from fewer texts on."""
    assert plan(DENSE, "plan.gpu=RTX-4090").batches[0].pays[0][1] < plan(DENSE).batches[0].pays[0][1]


def test_the_memory_holds_what_is_left_of_it() -> None:
    p = plan(DENSE)
    a, gpus = p.architecture, p.gpus_of(p.evaluate)
    text = 2048 * (2 * 81 * a.key + a.hidden) * 2  # 1,100 tokens; half is for copies
    left = (gpus * memory.usable(GPUS["H100"]) - 2 * (a.parameters + a.layer)) / 2
    assert p.batches[0].fit * text <= left < (p.batches[0].fit + 1) * text


def test_ranges() -> None:
    assert batches.ranges(np.array([1.1, 1.0, 0.9, 1.2, 1.3])) == [(1, 1), (4, 5)]
    assert batches.ranges(np.array([0.9, 1.0])) == [] and batches.ranges(np.array([2.0])) == [(1, 1)]
    assert tables._ranges([(1, 1), (4, 9)]) == "1, 4-9" and tables._ranges([]) == "none"
    assert tables._ranges([(3, batches.MOST)]) == "3 and more"


def test_nothing_is_predicted_without_a_gpu_or_an_acceptance() -> None:
    for words in (["plan.gpu=cpu"], ["plan.acceptance=[]"]):
        p = plan(DENSE, *words)
        assert p.batches == [] and not any("texts at once" in table.title for table in tables.full(p))


def test_it_is_printed_with_its_assumptions(capsys) -> None:
    words = shlex.join(f"{word}" for word in WORDS)
    assert cli.main(["plan", f"backbone.name_or_path={DENSE}", *shlex.split(words)]) == 0
    text = capsys.readouterr().out
    assert (
        "several texts at once; a pass reads its weights once and each text's keys and values, 1050 positions" in text
    )
    assert "| N | K | 1 text |" in text and "| 2 | 5 |" in text
    assert cli.main(["plan", f"backbone.name_or_path={DENSE}", *WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["batches"]
    assert [one["exit_layer"] for one in found] == [2, 6] and found[0]["speedups"]["1"] > 1


def test_batch_sizes_take_time_and_memory_of_evaluate() -> None:
    plain, asked = plan(DENSE), plan(DENSE, "evaluate.batch_sizes=[1,16]", "evaluate.controllers=[fixed:2]")
    sizes = {row.what: row.size for row in asked.evaluate}
    assert sizes["keys and values"] == 16 * next(row.size for row in plain.evaluate if row.what == "keys and values")
    (stage,) = [s for s in asked.stages if s.name == "evaluate"]
    # 24 prompts one at a time, 64 texts through 16 places; of 2 heads once to warm up, then 2 methods 3 times
    assert stage.how.endswith(f" + {2 * 7 * (24 + 64)} texts several at once")
