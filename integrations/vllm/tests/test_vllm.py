"""A trained head in vLLM: the rounds that the simulation says, the text of vLLM without it, and memory for one layer
more.

Text alone would prove nothing: with any head it is the served model's own. Rounds and acceptances must be equal to
the last one. Where something is tried that vLLM can do besides (prefix caching, chunked prefill, preemption, stop
strings), the figures must stay the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm_serving
from vllm_serving import PYTHON, ROOT, Rounds, changed, greedy, serve, simulated

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import Backbone
from pipeline.evaluation.losslessness import ALARM, transform, uniform
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.pocket.paths import BACKBONE, PROMPTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: make test-vllm makes it"),
]
K, NEW = 3, 64


class Pocket:
    """The pocket backbone, a head at N = 2 and the draft model of it as published, and prompts."""

    def __init__(self, hub: Path):
        self.head, self.draft = hub / "2", hub / "2-draft"
        source = Backbone(name_or_path="pocket", dtype="float32")
        self.model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
        lines = PROMPTS["evaluate"].read_text().splitlines()
        self.prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[:12]]
        self.tokenizer = tokenizer

    def engine(self, head: Path | None = None) -> SplitBackbone:
        return SplitBackbone(self.model, ExitHead.load(head or self.head))

    def serve(self, calls: list[dict], head: Path | None = None, **llm) -> dict:
        return serve(BACKBONE, calls, head or self.head, **{"k": K, "enable_prefix_caching": False} | llm)


@pytest.fixture(scope="session")
def pocket(tmp_path_factory) -> Pocket:
    """The demo's run, published whatever its speedup is on this machine: nothing here is about time."""
    torch.set_num_threads(1)
    if ready := os.environ.get("EXIT_HEADS_VLLM_HUB"):
        return Pocket(Path(ready))
    folder = tmp_path_factory.mktemp("pocket")
    words = ["--config", "configs/pocket.yaml", "publish.force=true", f"run.dir={folder}", "publish.exit_layer=2"]
    for verb in (["run"], ["publish", "--as", "draft"]):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *verb, *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return Pocket(folder / "pocket" / "hub")


@pytest.fixture(scope="session")
def expected(pocket) -> Rounds:
    return simulated(pocket.engine(), pocket.prompts, NEW, [K])


@pytest.fixture(scope="session")
def plain(pocket) -> dict:
    """vLLM without drafts."""
    calls = [{"prompts": pocket.prompts, "params": greedy(NEW)}]
    return serve(BACKBONE, calls, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def drafted(pocket) -> dict:
    """vLLM with the head: one by one, four in flight, and with two shallow layers swapped."""
    call = {"prompts": pocket.prompts, "params": greedy(NEW)}
    return pocket.serve([call | {"one_by_one": True}, call, call | {"swap": True}])


def assert_as(found: dict, wanted: Rounds) -> None:
    """Texts, rounds and acceptances by position."""
    assert found["ids"] == wanted.ids
    assert found["rounds"] == sum(wanted.of_each)
    assert found["by_position"] == wanted.by_position


# ---- rounds


def test_rounds_and_acceptances_are_those_of_the_simulation(drafted, expected, plain) -> None:
    one_by_one, in_flight, _ = drafted["calls"]
    assert plain["calls"][0]["ids"] == expected.ids
    assert one_by_one["rounds_of_each"] == expected.of_each
    assert_as(one_by_one, expected)
    assert_as(in_flight, expected)
    assert sum(expected.of_each) < 0.7 * NEW * len(expected.ids), "hardly a draft is accepted: this says nothing"


def test_rounds_tell_swapped_layers_and_another_head(pocket, drafted, expected, tmp_path) -> None:
    swapped = drafted["calls"][2]
    assert swapped["ids"] == expected.ids and swapped["rounds"] != sum(expected.of_each)
    other = changed(pocket.head, tmp_path / "noisy", noise=0.3)
    (found,) = pocket.serve([{"prompts": pocket.prompts, "params": greedy(NEW)}], other)["calls"]
    assert found["rounds"] != sum(expected.of_each)
    assert_as(found, simulated(pocket.engine(other), pocket.prompts, NEW, [K]))


def test_a_draft_vocabulary_is_drafted_from(pocket, tmp_path) -> None:
    ids = torch.cat([torch.arange(0, 300), torch.arange(301, 2048, 5)])
    head = changed(pocket.head, tmp_path / "subset", draft_ids=ids)
    wanted = simulated(pocket.engine(head), pocket.prompts, NEW, [K])
    (found,) = pocket.serve([{"prompts": pocket.prompts, "params": greedy(NEW)}], head)["calls"]
    assert_as(found, wanted)
    assert wanted.by_position != simulated(pocket.engine(), pocket.prompts, NEW, [K]).by_position


def test_lengths_that_change_from_step_to_step_leave_no_hole_in_the_cache(pocket) -> None:
    """K = 0 among them: what the exit layer's cache holds of such rounds decides about later drafts."""
    lengths = [3, 0, 0, 2, 1, 0, 0, 0, 4, 2]
    calls = [{"prompts": [p], "params": greedy(NEW), "lengths": lengths} for p in pocket.prompts[:6]]
    found = pocket.serve(calls, k=4)["calls"]
    for call, prompt in zip(found, pocket.prompts, strict=False):
        assert call["lengths"][0][:10] == lengths
        assert_as(call | {"by_position": call["by_position"][:4]}, simulated(pocket.engine(), [prompt], NEW, lengths))


def test_adaptive_lengths_leave_text_and_acceptances_as_they_are(pocket, expected) -> None:
    """Alone, every step's length is known, so the simulation can follow; in flight the text is left to compare."""
    calls = [{"prompts": [p], "params": greedy(NEW)} for p in pocket.prompts]
    calls += [{"prompts": pocket.prompts, "params": greedy(NEW)}]
    served = pocket.serve(calls, k=5, scheduler_cls="exit_heads_vllm.scheduler.AdaptiveScheduler")
    *alone, together = served["calls"]
    for i, (call, prompt) in enumerate(zip(alone, pocket.prompts, strict=True)):
        assert max(call["lengths"][0]) <= 5
        wanted = simulated(pocket.engine(), [prompt], NEW, call["lengths"][0])
        assert call["ids"] == [expected.ids[i]]
        assert (call["rounds"], call["by_position"][: len(wanted.by_position)]) == (
            wanted.of_each[0],
            wanted.by_position,
        )
    assert together["ids"] == expected.ids
    assert len({k for call in alone for k in call["lengths"][0]}) > 2, "it did not adapt"


# ---- memory


def test_weights_and_cache_grow_by_the_exit_layer_alone(pocket, plain, drafted) -> None:
    layer = sum(w.nbytes for w in ExitHead.load(pocket.head).weights.values())
    before, after = plain["memory"], drafted["memory"]
    scales = 16  # of the exit layer's attention, for caches that are quantised
    assert after["weights"] - before["weights"] == layer + scales
    assert (before["kv_layers"], after["kv_layers"]) == (32, 33)
    assert after["kv_bytes"] / after["kv_blocks"] == before["kv_bytes"] / before["kv_blocks"] * 33 / 32
    call = {"prompts": pocket.prompts, "params": greedy(NEW)}
    exported = pocket.serve([call], pocket.draft)
    assert exported["memory"]["kv_layers"] == 35
    assert exported["memory"]["weights"] - before["weights"] > 3 * layer
    assert exported["calls"][0]["ids"] == plain["calls"][0]["ids"], "an ordinary draft model is left as it was"


# ---- what vLLM can do besides


def test_prefix_caching_and_chunked_prefill(pocket) -> None:
    """Long prompts with a common beginning, in pieces; asked twice, the second time mostly from the cache."""
    common = [i for p in pocket.prompts for i in p][:150]
    prompts = [common + p[:40] for p in pocket.prompts[:6]]
    wanted = simulated(pocket.engine(), prompts, NEW, [K])
    call = {"prompts": prompts, "params": greedy(NEW), "one_by_one": True}
    settings = {"block_size": 32, "max_model_len": 512, "max_num_batched_tokens": 64}
    first, again = pocket.serve([call, call], enable_prefix_caching=True, **settings)["calls"]
    assert first["cached"][0] == 0 and min(first["cached"][1:]) >= 128 and min(again["cached"]) >= 128
    for found in (first, again):
        assert_as(found, wanted)
    call["one_by_one"] = False
    (chunked,) = pocket.serve([call], **settings)["calls"]
    assert_as(chunked, wanted)


def test_preemption(pocket) -> None:
    """Too few blocks for all requests: some are thrown out and begin again. Drafts that were pending then are lost."""
    prompts = [p for p in pocket.prompts if len(p) > 80] * 2
    call = {"prompts": prompts, "params": greedy(NEW)}
    settings = {"block_size": 32, "num_gpu_blocks_override": 16, "max_num_seqs": 8}
    (found,) = pocket.serve([call], **settings)["calls"]
    wanted = simulated(pocket.engine(), prompts, NEW, [K])
    assert found["preemptions"] > 0
    assert found["ids"] == wanted.ids
    assert abs(found["rounds"] - sum(wanted.of_each)) <= 2 * found["preemptions"]


def test_requests_of_different_lengths_and_stop_strings(pocket, expected) -> None:
    limits = [5, 64, 17, 1, 40, 2, 64, 9, 30, 3, 64, 11]
    stops = [None, ":", None, None, "(", None, "\n", None, None, None, ")", None]
    params = [greedy(new) | ({"stop": [stop]} if stop else {}) for new, stop in zip(limits, stops, strict=True)]
    free = [greedy(new) for new in limits]
    calls = [{"prompts": pocket.prompts, "params": params}, {"prompts": pocket.prompts, "params": free}]
    stopped, found = pocket.serve(calls)["calls"]
    assert_as(found, simulated(pocket.engine(), pocket.prompts, limits, [K]))
    wanted = serve(BACKBONE, calls[:1], enable_prefix_caching=False)["calls"][0]
    assert (stopped["texts"], stopped["ids"]) == (wanted["texts"], wanted["ids"])
    assert any(len(ids) < limit for ids, limit in zip(stopped["ids"], limits, strict=True)), "no stop string was met"


def test_requests_that_reach_the_longest_length(pocket) -> None:
    """Two end there while the others go on; these must not lose what their cache should hold."""
    longest = 112
    prompts = [p[: longest - 20] for p in pocket.prompts]
    limits = [longest - len(p) if len(p) > 60 else 40 for p in prompts]
    calls = [{"prompts": prompts, "params": [greedy(new) for new in limits]}]
    (found,) = pocket.serve(calls, max_model_len=longest)["calls"]
    (wanted,) = serve(BACKBONE, calls, enable_prefix_caching=False, max_model_len=longest)["calls"]
    assert found["ids"] == wanted["ids"]
    short = [i for i, p in enumerate(prompts) if len(p) <= 60]
    assert short and len(short) < len(prompts)


def test_drafts_beyond_the_longest_length_leave_the_cache_as_it_is(pocket, monkeypatch) -> None:
    """Of many drafts, near the end, all but a few are beyond it. Asked twice, the second time from cached prefixes;
    then with a longest length that vLLM fits to the memory, known only after the drafter was made."""
    longest, block, layers = 256, 32, 33
    tokens = [i for p in pocket.prompts for i in p]
    prompts = [(tokens * 2)[at : at + longest - 22] for at in range(0, 1200, 50)]
    call = {"prompts": prompts, "params": greedy(22), "one_by_one": True}
    settings = {"block_size": block, "enable_prefix_caching": True}
    (wanted,) = serve(BACKBONE, [call], **settings, max_model_len=longest)["calls"]
    first, again = pocket.serve([call, call], k=24, **settings, max_model_len=longest)["calls"]
    assert min(again["cached"]) > 0
    assert first["ids"] == wanted["ids"]
    assert again["ids"] == wanted["ids"]
    environment = vllm_serving.environment()
    del environment["VLLM_CPU_KVCACHE_SPACE"]
    monkeypatch.setattr(vllm_serving, "environment", lambda: environment)
    fits = (longest + block) * layers * 256  # one block is vLLM's own
    (fitted,) = pocket.serve([call], k=24, **settings, max_model_len=-1, kv_cache_memory_bytes=fits)["calls"]
    assert fitted["ids"] == wanted["ids"]


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_law_of_the_served_model(pocket, method) -> None:
    """By the transform of every evaluation, which is uniform only for tokens of the right law; texts at another
    temperature are found out by the same test."""
    params = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    prompts = pocket.prompts * 20
    calls = [{"prompts": prompts, "params": params}, {"prompts": prompts, "params": params | {"temperature": 0.8}}]
    right, wrong = pocket.serve(calls, spec={"draft_sample_method": method}, max_num_seqs=16)["calls"]
    assert sum(right["by_position"]) > 0.1 * right["rounds"] > 0, "hardly a draft is accepted: this says nothing"
    engine, dice = pocket.engine(), torch.Generator().manual_seed(0)
    p = {
        name: uniform(torch.cat([transform(engine, prompt, ids, Sampler(1.0), dice)
                                 for prompt, ids in zip(prompts, call["ids"], strict=True)]))["p_value"]
        for name, call in (("right", right), ("wrong", wrong))
    }  # fmt: skip
    assert p["right"] > ALARM and p["wrong"] < 1e-6, p


# ---- refused


def test_a_head_of_another_model_is_refused_by_vllm_when_it_starts(pocket, tmp_path) -> None:
    record = json.loads((pocket.head / "config.json").read_text())["backbone"] | {"fingerprint": "0" * 64}
    other = changed(pocket.head, tmp_path / "other", backbone=record)
    assert "this exit head belongs to" in pocket.serve([], other)["error"]
    cut = changed(pocket.head, tmp_path / "cut")
    (cut / "config.json").write_text((cut / "config.json").read_text().replace('"sha256": "', '"sha256": "0'))
    assert "sha256" in pocket.serve([], cut)["error"]
    family = changed(pocket.head, tmp_path / "family", backbone=record | {"model_type": "gemma3_text"})
    assert "gemma3_text" in pocket.serve([], family)["error"]
