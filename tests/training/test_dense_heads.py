"""Dense heads of mixtures of experts: what they start from, learn, write and decode."""

import json
import shutil
from typing import Any

import pytest
import torch
from distilling import finish, head_bytes, lines, prepare, start, unpack
from family_cases import GENERIC
from helpers import tiny_backbone
from oracles import dense_head_for, head_for, load
from safetensors.torch import load_file
from transformers import AutoConfig

from pipeline.backbones.load import head_spec
from pipeline.backbones.weight_files import WeightFiles, fingerprint_of_files
from pipeline.cli import main
from pipeline.config import Backbone
from pipeline.config import load as load_config
from pipeline.errors import UserError
from pipeline.generation.documents import read_documents, read_manifest, split, usable
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.dense_mlp import FAMILIES, DenseMLP
from pipeline.inference.exit_head import ExitHead, HeadSpec, experts_of
from pipeline.inference.sampling import Sampler
from pipeline.planning.architecture import Architecture
from pipeline.planning.gain import costs_by_weight
from pipeline.publishing import draft_model
from pipeline.stages import distill
from pipeline.training import dense_start, packing
from pipeline.training.dataloader import StepBatches
from pipeline.training.load_sharded import check_checkpoint
from pipeline.training.module import learning_rate_at
from pipeline.training.teacher import last_layer_arguments

LONG = [(7 * i * i + 3 * i) % 250 + 3 for i in range(40)]
STEPS = 12
DENSE = f"distill.head=dense distill.exit_layers=[1,2] distill.max_steps={STEPS} distill.learning_rate=5e-3".split()


def mixture(folder, family: str = "qwen3_moe"):
    return tiny_backbone(folder, family, sharpness=3.0, **GENERIC[family])


# ---- what they start from


def weights_of_start(folder, config, width: int) -> dict[str, torch.Tensor]:
    files, spec = WeightFiles(Backbone(str(folder), dtype="float32")), HeadSpec("dense", width)
    found = {}
    for name, source in dense_start.sources(files, 3, spec, config).items():
        rows = config.hidden_size if name.startswith("down") else width
        found[name] = torch.cat([source[slice(i, min(i + 5, rows))] for i in range(0, rows, 5)])  # as sharding cuts
    return found


def shared_of(block: Any, x: torch.Tensor) -> torch.Tensor:
    shared = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
    return shared(x) if shared is not None else torch.zeros_like(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_begins_as_the_mean_of_the_first_experts_and_the_shared_one(tmp_path, family: str) -> None:
    """By transformers' own experts, with a router that always chooses these, equally."""
    folder = mixture(tmp_path, family)
    model = load(folder)
    where, width = experts_of(model.config), experts_of(model.config).width
    mlp = DenseMLP(32, width, model.config.hidden_act, family == "gpt_oss")
    mlp.load_state_dict(weights_of_start(folder, model.config, width))
    block = getattr(model.model.layers[-1], where.name)
    x = torch.randn(7, 32)
    chosen = torch.arange(where.experts_per_token).expand(7, -1)
    with torch.no_grad():
        out = mlp(x)
        expected = block.experts(x, chosen, torch.full(chosen.shape, 1 / where.experts_per_token)) + shared_of(block, x)
    torch.testing.assert_close(out[0] if family == "gpt_oss" else out, expected, rtol=1e-4, atol=1e-5)


def test_a_wider_mlp_holds_more_experts_and_a_narrower_one_a_part(tmp_path) -> None:
    folder = mixture(tmp_path)
    model = load(folder)
    experts = model.model.layers[-1].mlp.experts
    assert experts_of(model.config).width == 2 * 24 and experts_of(model.config).widest == 4 * 24
    for width, count, factor in ((96, 4, 1 / 4), (60, 3, 1 / 2.5), (10, 1, 1.0)):
        found = weights_of_start(folder, model.config, width)
        gate, up = (torch.cat([half[e] for e in range(count)])[:width] for half in experts.gate_up_proj.chunk(2, 1))
        down = torch.cat([experts.down_proj[e] for e in range(count)], 1)[:, :width] * factor
        for name, expected in (("gate", gate), ("up", up), ("down", down)):
            torch.testing.assert_close(found[f"{name}_proj.weight"], expected)


def test_dense_heads_that_cannot_be_are_refused_by_name() -> None:
    tiny = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 258}
    dense, mixed = AutoConfig.for_model("llama", **tiny), AutoConfig.for_model("qwen3_moe", **tiny)
    unknown = AutoConfig.for_model("ernie4_5_moe", **tiny, moe_layer_start_index=0)
    for config, words, message in [
        (
            dense,
            ["distill.head=dense"],
            r"distill\.head=dense: model_type=llama: it is no mixture.*Set distill\.head=l",
        ),
        (unknown, ["distill.head=dense"], r"model_type=ernie4_5_moe: dense heads are known of glm4_moe, gpt_oss"),
        (mixed, ["distill.head=dense", "distill.dense_width=999999"], r"distill\.dense_width=999999: all experts"),
    ]:
        with pytest.raises(UserError, match=message):
            head_spec(load_config(None, words).distill, config)
    with pytest.raises(UserError, match=r"distill\.dense_width=64: distill\.head=layer is as wide"):
        load_config(None, ["distill.dense_width=64"])
    assert head_spec(load_config(None, []).distill, dense) == HeadSpec()


def test_they_are_refused_before_any_prompt_is_answered(tmp_path, capsys) -> None:
    """And by plan: the pocket backbone is a Llama."""
    for verb in ("run", "plan"):
        assert main([verb, f"run.dir={tmp_path}", "wandb.mode=disabled", "distill.head=dense"]) == 2
        assert "distill.head=dense: model_type=llama" in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("*/responses"))


def test_a_layer_without_experts_is_no_start(tmp_path) -> None:
    """The first layers of glm4_moe are dense."""
    folder = mixture(tmp_path, "glm4_moe")
    backbone = Backbone(str(folder), dtype="float32")
    spec = HeadSpec.of("dense", 0, AutoConfig.from_pretrained(folder))
    for exit_layers, init in (([2], "layer"), ([1, 2], "last")):
        check_checkpoint(backbone, fingerprint_of_files(backbone), exit_layers, init, spec)
    with pytest.raises(UserError, match=r"distill\.init=layer: layer 1 has no experts to start from"):
        check_checkpoint(backbone, fingerprint_of_files(backbone), [1, 2], "layer", spec)


# ---- training


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"))


def plain_losses(run, folder, exit_layer: int) -> list[float]:
    """The losses of a loop without FSDP, Lightning and packing; the head is made here of transformers' modules."""
    d, model = run.config.distill, load(folder).requires_grad_(False)
    documents, _ = read_documents(run / "responses", read_manifest(run / "responses"), d.truncated, 0.5)
    train, _ = split(usable(documents, d.sequence_length), d.held_out)
    packed = packing.pack(train, d.sequence_length)
    head, _ = dense_head_for(model, exit_layer)
    experts = model.model.layers[-1].mlp.experts
    with torch.no_grad():
        head.mlp.gate_proj.weight.copy_(experts.gate_up_proj[:2, :24].flatten(0, 1))
        head.mlp.up_proj.weight.copy_(experts.gate_up_proj[:2, 24:].flatten(0, 1))
        head.mlp.down_proj.weight.copy_(torch.cat([experts.down_proj[0], experts.down_proj[1]], 1) / 2)
    optimizer = torch.optim.AdamW(head.requires_grad_(True).parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, batch in enumerate(StepBatches(len(packed), d.sequences_per_step, STEPS, 0)):
        total, rows = torch.zeros(()), 0
        for tokens, first, end in unpack(packed, batch):
            hidden = model.model(tokens[None], output_hidden_states=True, use_cache=False).hidden_states
            angles = model.model.rotary_emb(hidden[0], torch.arange(len(tokens))[None])
            drafted = model.model.norm(head(hidden[exit_layer], position_embeddings=angles))
            log_p, log_q = (model.lm_head(h[0, first:end]).log_softmax(-1) for h in (hidden[-1], drafted))
            total = total + (log_p.exp() * (log_p - log_q)).sum()
            rows += end - first
        optimizer.zero_grad()
        (total / rows).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), d.clip_norm)
        losses.append(total.item() / rows)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, d.learning_rate, d.warmup_steps, STEPS)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone):
    run = prepare(tmp_path_factory.mktemp("trained"), backbone, *DENSE)
    distill.run(run)
    return run


@pytest.fixture(scope="module")
def plain(trained, backbone) -> dict[int, list[float]]:
    return {n: plain_losses(trained, backbone, n) for n in (1, 2)}


def losses_of(run, n: int) -> list[float]:
    return [line[f"train/exit-{n}/loss"] for line in lines(run) if "learning_rate" in line]


def test_losses_are_those_of_a_plain_loop(trained, plain) -> None:
    for n, expected in plain.items():
        assert losses_of(trained, n) == pytest.approx(expected, rel=1e-5)
        assert expected[-1] < 0.7 * expected[0]


@pytest.mark.slow
def test_two_processes_learn_the_same_and_a_killed_run_ends_alike(tmp_path, backbone, trained, plain) -> None:
    two = prepare(tmp_path / "two", backbone, *DENSE, "machine.processes_per_node=2")
    finish(start(two), two)
    for n, expected in plain.items():
        assert losses_of(two, n) == pytest.approx(expected, rel=1e-5)
    killed = prepare(tmp_path / "killed", backbone, *DENSE)
    (process,) = start(killed, "die,all,7,before")
    assert process.wait() != 0 and not (killed / "heads").exists()
    finish(start(killed), killed)
    for name in ("exit-1", "exit-2"):
        assert head_bytes(killed, name) == head_bytes(trained, name)


# ---- files


def test_a_folder_says_what_kind_of_head_it_holds(tmp_path, backbone, trained) -> None:
    folder = trained / "heads" / "exit-2"
    config = json.loads((folder / "config.json").read_text())
    assert (config["schema"], config["head"]) == (3, {"kind": "dense", "width": 48})
    names = load_file(folder / "model.safetensors").keys()
    assert not any("experts" in name for name in names) and "mlp.gate_proj.weight" in names
    assert ExitHead.load(folder).spec == HeadSpec("dense", 48)
    shutil.copytree(folder, tmp_path / "head")
    for fields in ({"kind": "medusa", "width": 3}, {"kind": "dense", "layers": 2}, "dense"):
        (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"head": fields}))
        with pytest.raises(ValueError, match=r"config\.json: head=.*the kinds layer and dense are known here"):
            ExitHead.load(tmp_path / "head")
    head_for(load(backbone), 2).save(tmp_path / "old")
    old = json.loads((tmp_path / "old" / "config.json").read_text())
    assert old.pop("head") == {"kind": "layer", "width": 0}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old | {"schema": 2}))
    assert ExitHead.load(tmp_path / "old").spec == HeadSpec()


def test_it_is_exported_as_no_draft_model(tmp_path, backbone, trained) -> None:
    head = ExitHead.load(trained / "heads" / "exit-2")
    with pytest.raises(UserError, match=r"distill\.head=dense: such a head is not a layer of a qwen3_moe"):
        draft_model.export(tmp_path / "draft", Backbone(str(backbone), dtype="float32"), head, 2)
    with pytest.raises(ValueError, match="no draft model"):
        draft_model.in_memory(load(backbone), head)


# ---- decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_drafts_what_the_layer_says_and_gives_the_backbones_text(tmp_path, family: str) -> None:
    model = load(mixture(tmp_path, family))
    layer, head = dense_head_for(model, 2)
    engine = SplitBackbone(model, head)
    with torch.inference_mode():
        cache = engine.new_cache(len(LONG))
        engine.shallow(LONG, 0, cache)
        hidden_1TD, positions_1T = cache.hidden_TD[None], torch.arange(len(LONG))[None]
        expected = layer(hidden_1TD, **last_layer_arguments(model, layer, hidden_1TD, positions_1T))
        expected_TD = (expected[0] if isinstance(expected, tuple) else expected)[0]
        torch.testing.assert_close(engine.draft_hidden_of_all(len(LONG), cache), expected_TD, rtol=1e-4, atol=1e-5)
        request = Request(LONG[:11], 20)
        drafted = self_speculative(engine, request, Sampler(), make_controller("fixed:3"))
        assert drafted.tokens == autoregressive(engine, request, Sampler()).tokens
    assert sum(round.drafted for round in drafted.rounds) > 15


def test_weights_of_another_kind_are_refused(backbone, trained) -> None:
    model, head = load(backbone), ExitHead.load(trained / "heads" / "exit-2")
    for spec in (HeadSpec(), HeadSpec("dense", 47)):
        with pytest.raises(ValueError, match="are not those of a layer of this backbone"):
            SplitBackbone(model, ExitHead(2, 4, head.backbone, head.weights, None, spec), check=False)


# ---- planning


def test_plan_counts_a_dense_head(backbone, trained) -> None:
    config = AutoConfig.from_pretrained(backbone)
    layer, dense = (Architecture.of("x", "", config, HeadSpec.of(kind, 0, config)) for kind in ("layer", "dense"))
    weights = load_file(trained / "heads" / "exit-2" / "model.safetensors")
    assert dense.head == sum(w.numel() for w in weights.values()) < layer.head == layer.layer
    assert dense.layer == layer.layer and dense.parameters == layer.parameters
    assert dense.head_matrices == sum(w.numel() for w in weights.values() if w.ndim == 2)
    router = 4 * 32  # which a dense head lacks
    assert layer.head_matrices - dense.head_matrices == router
    whole = 4 * dense.read(1) + dense.embedding
    assert costs_by_weight(dense, 2, 100)["head"] == pytest.approx((dense.head + 3200) / whole)
    assert costs_by_weight(dense, 2, 100)["verify"] == costs_by_weight(layer, 2, 100)["verify"]
