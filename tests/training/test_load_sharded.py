"""Sharded loading against from_pretrained: the same weights in every family, dtype and number of processes, or one
UserError in all of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from family_cases import ALL, GENERIC, OWN, slow_but
from helpers import tiny_backbone
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone, Config, load
from pipeline.errors import UserError
from pipeline.inference.families import FAMILIES
from pipeline.inference.fingerprint import fingerprint
from pipeline.training import load_sharded
from pipeline.training.chunked_loss import LinearDistillation
from pipeline.training.sharding import make_mesh, shard_step_model
from pipeline.training.step_model import StepModel
from pipeline.training.teacher import last_layer_arguments

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def checkpoint(
    parent: Path, family: str = "llama", tied: bool = False, split: bool = True, stored: str = "float32"
) -> Path:
    """A tiny backbone, all of whose tensors differ (norms and biases too), in one or several safetensors files.

    The last of four processes has no row of the MLP's nine.
    """
    folder = tiny_backbone(parent, family, tie_word_embeddings=tied, intermediate_size=9)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, stored))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB" if split else "5GB")
    assert (folder / INDEX).exists() == split
    return folder


@pytest.fixture
def pieces(monkeypatch) -> None:
    """Every tensor is read in several pieces, whose ends are not those of the shards."""
    monkeypatch.setattr(load_sharded, "PIECE", 7 * 32)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield make_mesh("cpu", 1, 0)
    dist.destroy_process_group()


def load_checkpoint(folder: Path, mesh: DeviceMesh, dtype: str = "float32", *args: Any, **kwargs: Any) -> Any:
    backbone = Backbone(str(folder), dtype=dtype)
    return load_sharded.load_sharded_backbone(
        backbone, CPU, mesh, fingerprint_of_files(backbone), [1, 2], *args, **kwargs
    )


def full_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> the whole tensor, on every process."""
    parameters = ((name, p.detach()) for name, p in module.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in parameters}


def assert_same_weights(module: torch.nn.Module, plain: torch.nn.Module) -> None:
    weights = full_weights(module)
    assert len(weights) >= len(dict(plain.named_parameters()))
    for name, weight in weights.items():
        expected = plain.get_parameter(name)
        assert weight.dtype == expected.dtype and torch.equal(weight, expected), name


def assert_loads_as_transformers_does(folder: Path, mesh: DeviceMesh, dtype: str) -> None:
    """Weights, logits (of weights that no checkpoint holds: the rotary angles), and heads from layers L and N."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for init in ("last", "layer"):
        model, heads = load_checkpoint(folder, mesh, dtype, init)
        assert_same_weights(model, plain)
        for n, head in zip((1, 2), heads, strict=True):
            assert_same_weights(head, stored.model.layers[3 if init == "last" else n - 1])
            assert all(p.requires_grad for p in head.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    shard_degree = mesh.size(mesh.ndim - 1)
    for name, parameter in [*model.named_parameters(), *heads[0].named_parameters()]:
        if not name.startswith("model.norm."):  # the root's
            assert len(parameter.to_local()) <= -(-len(parameter) // shard_degree)
    shard_step_model(model, [], mesh)
    ids_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, plain(ids_BT).logits)


@pytest.mark.parametrize(
    ("tied", "split", "stored", "dtype"),
    [
        (False, False, "float32", "float32"),
        (True, True, "float32", "bfloat16"),
        (False, True, "bfloat16", "float32"),
        (True, False, "float16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_loads_what_transformers_loads(tmp_path, mesh, pieces, family, tied, split, stored, dtype) -> None:
    folder = checkpoint(tmp_path, family, tied, split, stored)
    (folder / "consolidated.safetensors").write_bytes(b"another format, which lies beside the checkpoint of some")
    assert_loads_as_transformers_does(folder, mesh, dtype)


@pytest.mark.parametrize(
    "family",
    slow_but(["gemma3_text", "granitemoe", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"], ALL[len(OWN) :]),
)
def test_other_families_too(tmp_path, mesh, pieces, family: str) -> None:
    """Their buffers, and experts that the checkpoint holds one by one; of glm4_moe the last layers only are alike."""
    folder = tiny_backbone(tmp_path, family, **GENERIC[family])
    if family == "glm4_moe":
        backbone, plain = Backbone(str(folder), dtype="float32"), AutoModelForCausalLM.from_pretrained(folder)
        model, heads = load_sharded.load_sharded_backbone(
            backbone, CPU, mesh, fingerprint_of_files(backbone), [1], "last"
        )
        assert_same_weights(model, plain)
        name = "mlp.gate.e_score_correction_bias"
        assert torch.equal(heads[0].get_buffer(name), plain.model.layers[-1].get_buffer(name))
        return
    assert_loads_as_transformers_does(folder, mesh, "float32")


def test_a_random_start_is_refused_where_it_is_not_known(tmp_path, mesh) -> None:
    folder = tiny_backbone(tmp_path, "gemma3_text", **GENERIC["gemma3_text"])
    with pytest.raises(UserError, match=r"distill\.init=random: how a gemma3_text is initialised is not known"):
        load_checkpoint(folder, mesh, "float32", "random")


@pytest.mark.gpu
def test_a_gpu_is_filled_as_a_cpu_is(tmp_path, pieces) -> None:
    folder = checkpoint(tmp_path, "qwen3", tied=True)
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        backbone, mesh = Backbone(str(folder), dtype="bfloat16"), make_mesh("cuda", 1, 0)
        expected = fingerprint_of_files(backbone)
        model, _ = load_sharded.load_sharded_backbone(backbone, torch.device("cuda", 0), mesh, expected, [1])
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        assert_same_weights(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    finally:
        dist.destroy_process_group()


def test_of_one_file_and_an_index_the_file_is_read_as_by_transformers(tmp_path, mesh) -> None:
    folder = checkpoint(tmp_path / "old", split=True)
    shutil.copy(checkpoint(tmp_path / "new", split=False, stored="bfloat16") / "model.safetensors", folder)
    assert_loads_as_transformers_does(folder, mesh, "float32")


# ---- several processes


def spawn(work: Any, world: int, *args: Any) -> None:
    torch.multiprocessing.spawn(joined, (world, work, *args), nprocs=world)


def joined(rank: int, world: int, work: Any, folder: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    load_sharded.PIECE = 7 * 32
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(folder / "store"), world))
    work(rank, folder, *args)
    dist.barrier()
    # At once: threads of torch and gloo may abort a process whose interpreter is being taken down.
    sys.stdout.flush()
    os._exit(0)


def load_in_company(rank: int, folder: Path, shard_degree: int) -> None:
    mesh = make_mesh("cpu", dist.get_world_size(), shard_degree)
    for family, dtype in zip(FAMILIES, ("float32", "bfloat16") * 2, strict=True):
        assert_loads_as_transformers_does(folder / f"tiny-{family}", mesh, dtype)
    drawn = full_weights(load_checkpoint(folder / "tiny-qwen2", mesh, "bfloat16", "random", seed=5)[1][0])
    for name, weight in load_file(folder / "drawn.safetensors").items():
        assert torch.equal(drawn[name], weight), name
    fail_together(rank, folder)


def fail_together(rank: int, folder: Path) -> None:
    """A file that only the last process cannot read stops all processes, and their group still works afterwards."""
    world = dist.get_world_size()
    last, mesh = rank == world - 1, make_mesh("cpu", world, 0)
    expected = fingerprint_of_files(Backbone(str(folder / "tiny-llama")))
    seen = Backbone(str(folder / "incomplete") if last else str(folder / "tiny-llama"))
    with pytest.raises(UserError, match=r"incomplete: model-00002-of-000\d\d\.safetensors is missing"):
        load_sharded.load_sharded_backbone(seen, CPU, mesh, expected, [1])
    with pytest.raises(OSError if last else RuntimeError, match="input/output error"), load_sharded.fail_on_all_ranks():
        if last:
            raise OSError("input/output error")
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == world


def prepare_company(folder: Path, mesh: DeviceMesh) -> None:
    for family in FAMILIES:
        checkpoint(folder, family, tied=family in ("mistral", "qwen3"))
    shutil.copytree(folder / "tiny-llama", folder / "incomplete")
    next((folder / "incomplete").glob("model-00002-*")).unlink()
    _, (head, _) = load_checkpoint(folder / "tiny-qwen2", mesh, "bfloat16", "random", seed=5)
    save_file(full_weights(head), folder / "drawn.safetensors")


@pytest.mark.slow
def test_two_processes_load_draw_and_fail_alike(tmp_path, mesh, pieces) -> None:
    prepare_company(tmp_path, mesh)
    spawn(load_in_company, 2, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("shard_degree", [0, 1, 2])
def test_four_processes_hold_quarters_wholes_or_halves(tmp_path, mesh, pieces, shard_degree) -> None:
    prepare_company(tmp_path, mesh)
    spawn(load_in_company, 4, tmp_path, shard_degree)


def test_a_degree_that_does_not_divide_the_processes_is_refused() -> None:
    words = ["machine.nodes=2", "machine.processes_per_node=4"]
    for degree in (0, 1, 2, 4, 8):
        load(None, [*words, f"machine.shard_degree={degree}"]).machine.processes_of_a_copy()
    for degree in (3, 16):
        with pytest.raises(UserError, match=rf"machine\.shard_degree={degree}: does not divide the 8 processes"):
            load(None, [*words, f"machine.shard_degree={degree}"]).machine.processes_of_a_copy()


# ---- heads


@pytest.mark.parametrize("family", FAMILIES)
def test_random_heads_are_as_the_family_initialises_a_layer(tmp_path, mesh, family) -> None:
    folder = checkpoint(tmp_path, family)
    _, heads = load_checkpoint(folder, mesh, "bfloat16", "random", seed=1)
    _, again = load_checkpoint(folder, mesh, "bfloat16", "random", seed=1)
    _, others = load_checkpoint(folder, mesh, "bfloat16", "random", seed=2)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    fresh = dict(AutoModelForCausalLM.from_config(config).model.layers[-1].named_parameters())
    first, second, repeated, other = map(full_weights, (*heads, again[0], others[0]))
    assert first.keys() == fresh.keys()
    for name, weight in first.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, repeated[name])
        if weight.ndim == 1:
            assert torch.equal(weight, fresh[name])
        else:
            assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
            assert abs(weight.mean().item()) < config.initializer_range / 5
            assert not torch.equal(weight, second[name]) and not torch.equal(weight, other[name])


def test_a_head_of_a_bfloat16_backbone_computes_as_the_layer_it_is_copied_from(tmp_path, mesh) -> None:
    """The forward pass equals one in bfloat16 bit for bit; weights and gradients are float32."""
    folder = checkpoint(tmp_path, "qwen3", tied=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False).eval()
    model, heads = load_checkpoint(folder, mesh, "bfloat16")
    step_model = StepModel(model, [1, 2], heads, Config())
    shard_step_model(step_model, heads, mesh)
    ids_BT = torch.arange(40).view(2, 20)
    positions_BT, mask_BT = torch.arange(20).expand(2, 20), torch.ones(2, 20, dtype=torch.bool)
    losses_H = step_model(ids_BT, positions_BT, mask_BT, 1.0)
    losses_H.sum().backward()

    hidden = plain.model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    angles = plain.model.rotary_emb(hidden[0], positions_BT)
    students = [plain.model.norm(plain.model.layers[-1](hidden[n], position_embeddings=angles)) for n in (1, 2)]
    rows = [states.flatten(0, 1) for states in (hidden[-1], *students)]
    expected_H = LinearDistillation.apply(
        plain.lm_head.weight, rows[0], {"kl": 1.0}, 1.0, 1.0, 512, 0.0, None, *rows[1:]
    )
    assert torch.equal(losses_H.detach(), expected_H) and (expected_H > 0).all()
    for head in heads:
        for parameter in head.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32 and isinstance(parameter, DTensor)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_without_layers_hidden_states_still_become_logits(tmp_path, mesh, family) -> None:
    folder = tiny_backbone(tmp_path, family, **({"sliding_window": 8} if family == "mistral" else {}))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, heads = load_checkpoint(folder, mesh, "float32", "layer", layers=False)
    assert {name for name, _ in model.named_parameters()} == {"model.norm.weight", "lm_head.weight"}
    assert_same_weights(heads[1], plain.model.layers[1])
    hidden_BTD, positions_BT = torch.randn(2, 20, 32), torch.arange(20).expand(2, 20)
    arguments, expected = (
        last_layer_arguments(m, plain.model.layers[-1], hidden_BTD, positions_BT) for m in (model, plain)
    )
    torch.testing.assert_close(arguments, expected, rtol=0, atol=0)
    with torch.no_grad():
        logits, expected_logits = (m.lm_head(m.model.norm(hidden_BTD)) for m in (model, plain))
    assert torch.equal(logits, expected_logits)


# ---- checkpoints that cannot be used


def drop_file(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def cut_file(folder: Path) -> None:
    file = next(folder.glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-1])


def drop_from_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def change_tensor(folder: Path, change: Any, name: str = "model.layers.2.mlp.up_proj.weight") -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, file, metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    change_tensor(folder, lambda _: None)


def to_int8(folder: Path) -> None:
    change_tensor(folder, lambda weight: weight.to(torch.int8))


def to_float8(folder: Path) -> None:
    change_tensor(folder, lambda weight: weight.to(torch.float8_e4m3fn))


def shorten(folder: Path) -> None:
    change_tensor(folder, lambda weight: weight[:-1].clone())


def change_tuned(folder: Path) -> None:
    change_tensor(folder, lambda weight: weight + 1, "model.norm.weight")


def only_bin(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_file, r"model-00002-of-000\d\d\.safetensors is missing, where its index has model\..*: fetch it again"),
        (cut_file, r"model-00002-of-000\d\d\.safetensors: was cut short, at \d+ of \d+ bytes: fetch it again"),
        (drop_from_index, r"index .* has no tensor model\.layers\.2\.mlp\.up_proj\.weight: give a complete"),
        (drop_tensor, r"safetensors: no tensor model\.layers\.2\.mlp\.up_proj\.weight in it: give a complete"),
        (to_int8, r"model\.layers\.2\.mlp\.up_proj\.weight is I8: give a checkpoint that is not quantised"),
        (to_float8, r"model\.layers\.2\.mlp\.up_proj\.weight is F8_E4M3: give a checkpoint that is not quantised"),
        (shorten, r"up_proj\.weight is \[8, 32\], by config\.json it should be \[9, 32\]: give"),
        (change_tuned, r"its fingerprint is \w+, the responses come from \w+: give the backbone"),
        (only_bin, r"no safetensors files.*from_pretrained"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_used_is_refused_before_it_is_loaded(tmp_path, spoil, message) -> None:
    folder = checkpoint(tmp_path)
    expected = fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    spoil(folder)
    with pytest.raises(UserError, match=rf"backbone\.name_or_path={folder}: .*{message}"):
        load_sharded.check_checkpoint(Backbone(str(folder)), expected, [1], "last")


# ---- memory


@pytest.mark.slow
def test_a_process_holds_little_beyond_its_shard(root) -> None:
    """By the benchmark, on a smaller model, where one process's whole copy would still be seen."""
    words = "benchmarks/loading.py --layers 4 --worlds 1 2 --dtypes float32 bfloat16".split()
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "shard by shard" in line]
    assert len(rows) == 4
    for row in rows:
        shard, above = float(row[3]), float(row[5])
        assert above <= 64 < shard, row


# ---- checkpoints of the Hub

FETCHES = """
import sys
from pipeline.config import Backbone
from pipeline.training import load_sharded
load_sharded.check_checkpoint(Backbone("org/tiny"), sys.argv[1], [1], "last")
"""


def test_two_processes_fetch_a_hub_checkpoint_once_and_nothing_they_do_not_need(tmp_path) -> None:
    """From a server on this machine that serves a folder as the Hub does, and counts."""
    folder = checkpoint(tmp_path)
    for stray in ("pytorch_model.bin", "consolidated.safetensors"):
        (folder / stray).write_bytes(b"not to be fetched")
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            file = folder / self.path.rpartition("/")[2]
            self.send_response(200 if file.is_file() else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
            if not file.is_file():
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            file = folder / self.path.rpartition("/")[2]
            if file.is_file():
                fetched.append(file.name)
                self.wfile.write(file.read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    env["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", FETCHES, fingerprint_of_files(Backbone(str(folder)))]
    processes = [forked.Popen(command, env=env, stderr=tmp_path / "said") for _ in range(2)]
    for process in processes:
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    server.shutdown()
    weights = sorted(file.name for file in folder.glob("model-*.safetensors"))
    assert sorted(fetched) == sorted([*weights, INDEX, "config.json"])
