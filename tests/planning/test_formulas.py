"""The formulas of plans against the real modules: parameters, shards, live bytes and FLOPs.

Large modules are built on the meta device and small ones on the CPU, in fake process groups. Nothing is downloaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.backbones.load import head_spec
from pipeline.config import Config, load
from pipeline.evaluation import losslessness
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.sampling import Sampler
from pipeline.planning import memory, work
from pipeline.planning.architecture import Architecture, facts
from pipeline.planning.gain import costs_by_weight
from pipeline.planning.hardware import GPUS, Layout
from pipeline.stages.plan import architecture_of, make
from pipeline.training.module import StepModel
from pipeline.training.sharding import make_mesh, shard_backbone, shard_head, shard_step_model

ROOT = Path(__file__).resolve().parents[2]
LARGE = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if load(p, []).backbone.name_or_path in facts()]
FACTS = yaml.safe_load((ROOT / "pipeline/planning/architectures.yaml").read_text())
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 1024,
         "tie_word_embeddings": False}  # fmt: skip


def on_meta(fields: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype).requires_grad_(False)


@contextmanager
def processes(world: int, rank: int = 0) -> Iterator[None]:
    """As if this were one of `world` processes: collectives leave their buffers as they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- architectures


@pytest.mark.parametrize("entry", FACTS, ids=lambda e: e["names"][0])
def test_shipped_facts_make_the_backbone_of_that_name(entry: dict[str, Any]) -> None:
    """The number of parameters is the published one, and the formula's shapes are the model's."""
    model = on_meta(entry["fields"])
    a = Architecture.of("x", "test", model.config)
    assert sum(p.numel() for p in model.parameters()) == a.parameters == entry["parameters"]
    assert sorted(tuple(p.shape) for p in model.model.layers[0].parameters()) == sorted(a.layer_shapes)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2"},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3", "tie_word_embeddings": True},
        {"model_type": "mistral", "head_dim": 48},
    ],
    ids=lambda f: f["model_type"],
)
def test_shapes_of_every_family(fields: dict[str, Any]) -> None:
    model = on_meta(SMALL | fields)
    a = Architecture.of("x", "test", model.config)
    assert sorted(tuple(p.shape) for p in model.model.layers[0].parameters()) == sorted(a.layer_shapes)
    assert sum(p.numel() for p in model.parameters()) == a.parameters


def test_a_checkpoint_that_is_here_speaks_for_itself() -> None:
    a = architecture_of(load(None, []).backbone)
    assert (a.layers, a.source) == (32, "its config.json")


def test_only_plan_reads_the_shipped_facts() -> None:
    users = [p for p in (ROOT / "pipeline").rglob("*.py") if "facts()" in p.read_text()]
    assert {p.name for p in users} == {"architecture.py", "plan.py"}


# ---- shards, as FSDP2 cuts them


def sharded_bytes(model: Any, config: Config, world: int, rank: int) -> tuple[int, int]:
    """(backbone, one exit head in float32): bytes that a process holds of the real modules, cut on the meta device."""
    with processes(world, rank):
        mesh = make_mesh("cpu", world, config.machine.shard_degree)
        with torch.device("meta"):
            head = head_spec(config.distill, model.config).build(type(model.model.layers[-1]), model.config).float()
        shard_backbone(model, mesh)
        shard_head(head, mesh, model.dtype)
        shard_step_model(model, [head], mesh)
        mine = [[p.to_local() for p in module.parameters()] for module in (model, head)]
        return tuple(sum(p.numel() * p.element_size() for p in ps) for ps in mine)  # type: ignore[return-value]


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_large_configs_hold_what_the_plan_says(path: Path) -> None:
    """The config, its meta model, its mesh and its plan agree, without weights."""
    config = load(path, [])
    p = make(config)
    assert p.architecture.source == "architecture as shipped with exit-heads"
    assert all(1 <= n < p.architecture.layers for n in config.distill.exit_layers)
    assert p.fits and len(p.stages) == 3
    assert p.best is not None or not config.plan.acceptance  # without rates nothing can be predicted
    world = config.machine.processes
    backbone, heads, *_ = p.distill.kept
    held, head = sharded_bytes(on_meta(facts()[config.backbone.name_or_path]), config, world, rank=0)
    assert held == backbone.size
    assert len(config.distill.exit_layers) * head * 4 == heads.size  # weight, gradient, two moments, as float32


def test_shares_are_those_of_the_process_that_holds_most() -> None:
    """Rows that do not divide: the first process has the planned share, the last less, none more."""
    fields = SMALL | {"model_type": "llama", "intermediate_size": 770, "vocab_size": 4099}
    config = load(None, ["machine.nodes=3", "machine.processes_per_node=2", "distill.sequences_per_step=6"])
    a = Architecture.of("x", "test", AutoConfig.for_model(**fields))
    planned = memory.distill(a, config, Layout.of(config.machine)).kept[0].size
    held = [sharded_bytes(on_meta(fields), config, 6, rank)[0] for rank in range(6)]
    assert held[0] == planned and max(held) == planned and held[-1] < planned


# ---- bytes alive and FLOPs done in the real step


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, whatever FSDP2 makes of them, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:  # weights in oneDNN's order have no storage
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage)
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        alive = sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in self.storages.values())
        self.peak = max(self.peak, alive)
        return out


def small_step_model(fields: dict[str, Any], config: Config) -> StepModel:
    """What distill trains, from random weights, on the processes that were set up."""
    dtype = getattr(torch, config.backbone.dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype).requires_grad_(False).eval()
    heads = [new_exit_layer(model) for _ in config.distill.exit_layers]
    mesh = make_mesh("cpu", dist.get_world_size(), config.machine.shard_degree)
    shard_backbone(model, mesh)
    step_model = StepModel(model, config.distill.exit_layers, heads, config)
    for head in heads:
        shard_head(head, mesh, dtype)
    shard_step_model(step_model, heads, mesh)
    return step_model


def step_inputs(fields: dict[str, Any], config: Config) -> list[torch.Tensor]:
    """Sequences of two documents each, every position learned."""
    length = config.distill.sequence_length
    shape = (memory.sequences_of_pass(config, Layout.of(config.machine)), length)
    positions = (torch.arange(length) % (length // 2)).expand(shape)
    return [torch.randint(fields["vocab_size"], shape), positions, torch.ones(shape, dtype=torch.bool)]


def small_config(*words: str) -> Config:
    base = ["machine.processes_per_node=4", "distill.exit_layers=[2,4]", "distill.sequences_per_step=16",
            "distill.sequence_length=64", "distill.loss_chunk=64", "backbone.dtype=float32"]  # fmt: skip
    return load(None, [*base, *words])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", ["distill.sequence_length=256"]),
        ("llama", ["backbone.dtype=bfloat16"]),
        ("llama", ["distill.exit_layers=[1,2,4]", "distill.loss_chunk=256"]),
        ("qwen3", ["distill.exit_layers=[2]"]),
        ("llama", ["distill.exit_layers=[3]", "distill.sequences_per_pass=1"]),
    ],
)
def test_memory_of_a_step_is_what_was_planned(family: str, words: list[str]) -> None:
    """Of one of four processes, weights, gradients and moments included. The plan is not below, and above by no more
    than what a GPU has besides: memory of their own for gather buffers, and for the product of a chunk of logits."""
    fields, config = SMALL | {"model_type": family}, small_config(*words)
    planned = memory.distill(Architecture.of("x", "t", AutoConfig.for_model(**fields)), config, Layout(4, 4, 4))
    besides = planned.kept[2].size + 4 * config.distill.loss_chunk * fields["vocab_size"]
    with processes(4):
        step_model = small_step_model(fields, config)
        optimizer = torch.optim.AdamW([p for p in step_model.parameters() if p.requires_grad], foreach=True)
        inputs = step_inputs(fields, config)

        def step() -> None:
            step_model(*inputs, 1e-3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the moments
        with Live() as live:
            moments = [value for state in optimizer.state.values() for value in state.values()]
            for tensor in (*step_model.parameters(), *moments):  # what is there before the step
                tensor.detach()
            step()
    assert (planned.total - besides) / 1.1 <= live.peak <= planned.total


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_of_a_step_are_those_of_the_formula(family: str) -> None:
    """The counter knows no fused attention of CPUs, and the plain one keeps its scores: 8 T Q backward, not 10."""
    fields, config = SMALL | {"model_type": family}, small_config("machine.processes_per_node=1")
    a = Architecture.of("x", "test", AutoConfig.for_model(**fields))
    with processes(1), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step_model, inputs = small_step_model(fields, config), step_inputs(fields, config)
        step_model(*inputs, 1e-3).sum().backward()
    step = work.step(a, config, Layout(1, 1, 1), GPUS["H100"])
    scores = step.tokens * 2 * config.distill.sequence_length * a.query * len(config.distill.exit_layers)
    assert counter.get_total_flops() == pytest.approx(step.flops - scores, rel=1e-3)


@pytest.mark.parametrize("shape", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_the_proof_of_sampled_text_is_what_was_planned(dtype: str, shape: dict[str, float]) -> None:
    """Of the distributions, for a text and a prompt of several chunks; hidden states are small beside them here."""
    words = [f"evaluate.{key}={value}" for key, value in shape.items()]
    config = load(None, [f"backbone.dtype={dtype}", "evaluate.max_new_tokens=100", *words])
    fields = SMALL | {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 16384}
    model_config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    weights = new_exit_layer(model).to(model.dtype).state_dict()
    engine = SplitBackbone(model, ExitHead(1, 3, {"model_type": "llama"}, weights), check=False)
    tokens, draw = torch.randint(fields["vocab_size"], (200,)).tolist(), torch.Generator().manual_seed(0)
    with Live() as live:
        for tensor in model.parameters():
            tensor.detach()
        there = live.peak
        losslessness.transform(engine, tokens[:100], tokens[100:], Sampler(1.0, **shape), draw)  # type: ignore[arg-type]
    rows = memory.evaluate(Architecture.of("x", "test", model_config), config)
    planned = next(row.size for row in rows if row.what.startswith("distributions"))
    assert planned / 1.1 <= live.peak - there <= planned * 1.05


def test_greedy_text_needs_no_distributions() -> None:
    config = load(None, ["evaluate.temperatures=[0.0]"])
    rows = memory.evaluate(architecture_of(config.backbone), config)
    assert [row.size for row in rows if row.what.startswith("distributions")] == [0]


def test_wider_passes_read_more_experts() -> None:
    """With 4 experts of which a token takes 2, one token reads half of them, two tokens 3 of 4 and many all."""
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=258, **fields,
    )  # fmt: skip
    a = Architecture.of("tiny", "", config)
    experts, shared = 4 * 3 * 32 * 24, a.layer - 4 * 3 * 32 * 24
    assert a.experts == 4 and a.experts_per_token == 2
    assert [a.read(rows) for rows in (1, 2, 100)] == pytest.approx(
        [shared + experts / 2, shared + 3 / 4 * experts, a.layer]
    )
    verify = costs_by_weight(a, 2, 258)["verify"]
    whole = 4 * a.read(1) + a.embedding
    assert verify[1] == pytest.approx((2 * a.read(1) + a.embedding) / whole)
    assert verify[2] == pytest.approx((2 * a.read(2) + a.embedding) / whole)
    assert all(verify[m] < verify[m + 1] for m in range(1, 9))
