"""GGUF files as backbones: the same model bit for bit, made once, and refused by name where it would be another.

The files are written with gguf's writer; oracles are the checkpoints that they were written from, gguf's own
dequantisation and transformers' own way of reading them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from ggufs import TEMPLATE, in_pairs, stored_name, tiny_gguf
from helpers import byte_tokenizer, make_run, tiny_backbone
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.backbones import gguf_checkpoint, gguf_files, gguf_header, gguf_model
from pipeline.backbones.ends import end_tokens
from pipeline.backbones.gguf_files import gguf_record
from pipeline.backbones.load import load_model, load_tokenizer, public_name
from pipeline.backbones.source import load_config, source_of
from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.cli import main
from pipeline.config import Backbone, load, to_dict
from pipeline.errors import UserError
from pipeline.inference.families import FAMILIES
from pipeline.inference.fingerprint import fingerprint
from pipeline.publishing import hub
from pipeline.runs.anonymous import anonymous
from pipeline.runs.files import TEMPORARY, sha256_of
from pipeline.stages import generate, plan

CPU = torch.device("cpu")
IDS = torch.arange(40)[None] * 7 % 260


def config_file(run, folder: Path) -> Path:
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    return folder / "config.yaml"


def backbone_of(path: Path, home: Path, **more) -> Backbone:
    return Backbone(str(path), gguf_dir=str(home / "backbones"), dtype="float32", **more)


def made(home: Path) -> list[Path]:
    """What lies in the folder of dequantised checkpoints, under final and temporary names; locks apart."""
    return [path for path in (home / "backbones").glob("*") if not path.name.endswith(".lock")] + list(
        (home / "backbones").glob(f"{TEMPORARY}*")
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("llama"), sharpness=4.0, vocab_size=260)


@pytest.fixture(scope="module")
def q8(llama, tmp_path_factory) -> Path:
    return tiny_gguf(llama, tmp_path_factory.mktemp("q8") / "tiny.Q8_0.gguf", "Q8_0", general__file_type=7)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "F32"), ("qwen2", "F32"), ("qwen3", "F32"), ("llama", "F16"), ("qwen3", "BF16")]
)
def test_unquantised_it_is_the_checkpoint_bit_for_bit(tmp_path, family, kind) -> None:
    assert family in FAMILIES and gguf_model.KINDS[family].model_type == family
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, vocab_size=260, tie_word_embeddings=kind == "BF16")
    backbone = backbone_of(tiny_gguf(folder, tmp_path / "x.gguf", kind), tmp_path)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    found, original = load_file(f"{source_of(backbone)}/model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(found[name], weight.to(dtype if weight.ndim == 2 else torch.float32)), name
    if kind == "F32":
        model, same = load_model(backbone, CPU), load_model(Backbone(str(folder), dtype="float32"), CPU)
        assert torch.equal(model(IDS).logits, same(IDS).logits)


def test_a_gemma_is_what_transformers_reads(tmp_path) -> None:
    """Its file keeps no types of layers, no rotary embedding of those with a window, and norms with 1 added."""
    folder = tiny_backbone(tmp_path, "gemma3_text", sharpness=4.0, vocab_size=260, num_hidden_layers=7,
                           sliding_window=4, head_dim=256, tie_word_embeddings=True)  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    weights |= {name: torch.linspace(-0.5, 0.5, len(w)) for name, w in weights.items() if "norm" in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = backbone_of(tiny_gguf(folder, tmp_path / "x.gguf"), tmp_path)
    model, original = load_model(backbone, CPU), load_model(Backbone(str(folder), dtype="float32"), CPU)
    assert (
        model.config.layer_types
        == original.config.layer_types
        == ["sliding_attention"] * 5
        + [
            "full_attention",
            "sliding_attention",
        ]
    )
    for field in ("rope_parameters", "sliding_window", "query_pre_attn_scalar", "head_dim", "rms_norm_eps"):
        found, wanted = getattr(model.config, field), getattr(original.config, field)
        assert found == pytest.approx(wanted) if isinstance(found, float) else found == wanted, field
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)


def test_a_gemma_without_its_window_is_refused(tmp_path) -> None:
    folder = tiny_backbone(tmp_path, "gemma3_text", vocab_size=260, sliding_window=4, tie_word_embeddings=True)
    path = tiny_gguf(folder, tmp_path / "x.gguf", without=("gemma3.attention.sliding_window",))
    with pytest.raises(UserError, match=r"attention\.sliding_window: one number is needed, not None"):
        load_config(backbone_of(path, tmp_path))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_it_is_what_gguf_and_transformers_dequantise(llama, tmp_path, kind) -> None:
    path = tiny_gguf(llama, tmp_path / "x.gguf", kind)
    backbone = backbone_of(path, tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in load_file(f"{source_of(backbone)}/model.safetensors").items():
        tensor, values = stored[stored_name(name)], weight.numpy()
        heads = 4 if "q_proj" in name else 2
        pairs = in_pairs(values, heads) if "q_proj" in name or "k_proj" in name else values
        assert weight.dtype == torch.float32
        assert np.array_equal(pairs, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)), (
            name
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert torch.equal(load_model(backbone, CPU)(IDS).logits, model(IDS).logits)
    assert fingerprint_of_files(backbone) == fingerprint(model)


def test_a_checkpoint_of_several_files_is_the_same_model(llama, tmp_path, monkeypatch) -> None:
    path = tiny_gguf(llama, tmp_path / "x.gguf")
    monkeypatch.setattr(gguf_checkpoint, "LARGEST_FILE", 60_000)
    folder = Path(source_of(backbone_of(path, tmp_path)))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 62_000 for file in files)
    assert (
        json.loads((folder / gguf_checkpoint.INDEX).read_text())["weight_map"].keys()
        == load_file(llama / "model.safetensors").keys()
    )
    same = load_model(Backbone(str(llama), dtype="float32"), CPU)
    assert torch.equal(load_model(backbone_of(path, tmp_path), CPU)(IDS).logits, same(IDS).logits)


def test_tokenizer_template_and_end_tokens_are_those_of_the_file(llama, q8, tmp_path) -> None:
    backbone = backbone_of(q8, tmp_path)
    tokenizer, bytes_alone = load_tokenizer(backbone), byte_tokenizer()
    text = "Größe 12:\n\tcd  cb<|endoftext|>"
    assert tokenizer(text)["input_ids"] == bytes_alone(text)["input_ids"] and 256 in tokenizer(text)["input_ids"]
    assert tokenizer("cab")["input_ids"] == [*bytes_alone("c")["input_ids"], 258], "the file's one merge"
    assert tokenizer.chat_template == TEMPLATE
    assert end_tokens(backbone, tokenizer) == [256] and tokenizer.pad_token_id == 257
    more = tiny_gguf(llama, tmp_path / "eot.gguf", tokenizer__ggml__eot_token_id=65)
    other = backbone_of(more, tmp_path)
    assert end_tokens(other, load_tokenizer(other)) == [256, 65]
    folder = Path(source_of(backbone))
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) == 7 and not any(str(tmp_path) in text or str(q8.parent) in text for text in texts)


def test_digits_are_split_as_the_file_says_and_an_unknown_split_is_warned_of(llama, tmp_path, capsys) -> None:
    digits = {"tokenizer__ggml__merges": ["1 2"], "tokenizer__ggml__tokens": [
        *sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|pad|>", "12", "bc"]}  # fmt: skip
    ids = {}
    for split in ("gpt-2", "smollm", "of-tomorrow"):
        path = tiny_gguf(llama, tmp_path / f"{split}.gguf", tokenizer__ggml__pre=split, **digits)
        ids[split] = load_tokenizer(backbone_of(path, tmp_path))("12")["input_ids"]
        assert ("tokenizer.ggml.pre=of-tomorrow is not known" in capsys.readouterr().err) == (split == "of-tomorrow")
    assert ids == {"gpt-2": [258], "smollm": byte_tokenizer()("12")["input_ids"], "of-tomorrow": [258]}


def test_the_scaled_frequencies_of_a_llama_3_are_recognised(llama, tmp_path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    wide = tiny_backbone(tmp_path, head_dim=64, vocab_size=260, rope_parameters=rope, rope_theta=10000.0)
    config = AutoConfig.from_pretrained(wide)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)[0]
    divisors = (10000.0 ** -(torch.arange(0, 64, 2) / 64) / scaled).numpy()
    assert divisors.max() > 31 and ((divisors > 1.1) & (divisors < 31)).any(), "all three regions"
    path = tiny_gguf(wide, tmp_path / "l3.gguf", **{"rope_freqs.weight": divisors})
    model, same = load_model(backbone_of(path, tmp_path), CPU), load_model(Backbone(str(wide), dtype="float32"), CPU)
    assert model.config.rope_parameters["factor"] == pytest.approx(32)
    assert torch.allclose(model.model.rotary_emb.inv_freq, scaled, rtol=1e-5)
    assert torch.allclose(model(IDS).logits, same(IDS).logits, atol=1e-4)
    path = tiny_gguf(wide, tmp_path / "other.gguf", **{"rope_freqs.weight": divisors**2})
    with pytest.raises(UserError, match=r"rope_freqs\.weight: the frequencies are not scaled as in Llama 3"):
        source_of(backbone_of(path, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general__architecture": "gemma2"}, r"general\.architecture=gemma2: not supported; .*llama, qwen2, qwen3"),
        ({"general__type": "adapter"}, r"general\.type=adapter: is not a model by itself"),
        ({"split__count": 3}, r"is one of 3 parts of a split model; join them first"),
        ({"without": ("tokenizer.ggml.tokens",)}, r"holds no tokenizer"),
        ({"tokenizer__ggml__model": "none"}, r"holds no tokenizer"),
        ({"without": ("llama.block_count",)}, r"llama\.block_count: one number is needed"),
        ({"without": ("blk.2.ffn_up.weight",)}, r"no tensor blk\.2\.ffn_up\.weight in it"),
        ({"without": ("token_embd.weight",)}, r"no tensor token_embd\.weight in it"),
        ({"llama__feed_forward_length": 96}, r"blk\.0\.ffn_gate\.weight is \[64, 32\], by its .* \[96, 32\]"),
        ({"llama__attention__head_count_kv": 3}, r"num_key_value_heads=3: does not divide"),
        ({"llama__rope__scaling__type": "yarn"}, r"llama\.rope\.scaling\.type=yarn: .*not supported"),
        ({"llama__expert_count": 8}, r"llama\.expert_count=8: .*not supported"),
        ({"llama__logit_scale": 0.5}, r"llama\.logit_scale=0\.5: .*not supported"),
        ({"llama__rope__dimension_count": 4}, r"llama\.rope\.dimension_count=4: a head has 8 channels"),
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, r"blk\.0\.attn_q\.bias: a llama .* nothing with this tensor"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_another_kind_of_file_is_refused_by_name_before_anything_is_written(llama, tmp_path, change, message) -> None:
    backbone = backbone_of(tiny_gguf(llama, tmp_path / "x.gguf", **change), tmp_path)
    for attempt in (lambda: source_of(backbone), lambda: plan.architecture_of(backbone)):
        with pytest.raises(UserError, match=f"backbone.name_or_path={tmp_path}/x.gguf: x.gguf: .*{message}") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not made(tmp_path)


def test_a_stage_that_is_refused_has_begun_nothing(llama, tmp_path, capsys) -> None:
    path = tiny_gguf(llama, tmp_path / "x.gguf", tokenizer__ggml__model="words")
    run = make_run(tmp_path, f"backbone.name_or_path={path}")
    words = ["--config", str(config_file(run, tmp_path))]
    assert main(["generate", *words]) == 2
    assert "x.gguf: its tokenizer cannot be read: " in capsys.readouterr().err
    assert not made(tmp_path / "runs") and not list((run / "stages").glob("*.json"))


def test_a_vocabulary_alone_and_a_type_without_dequantisation_are_refused(llama, tmp_path) -> None:
    names = tuple(stored_name(name) for name in load_file(llama / "model.safetensors"))
    path = tiny_gguf(llama, tmp_path / "vocab.gguf", without=names)
    with pytest.raises(UserError, match=r"vocab\.gguf: holds a vocabulary alone, no weights"):
        source_of(backbone_of(path, tmp_path))
    path = tiny_gguf(llama, tmp_path / "x.gguf")
    content = path.read_bytes()
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # behind the rank and one dimension
    path.write_bytes(content[:at] + (26).to_bytes(4, "little") + content[at + 4 :])  # I32
    with pytest.raises(UserError, match="its tensors are I32: not supported"):
        source_of(backbone_of(path, tmp_path))
    assert not made(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"PK\x03\x04" + bytes(64), "is no GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(64), "it is of version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(64), "it is written for big-endian machines"),
    ],
)
def test_what_is_no_gguf_is_one_sentence(tmp_path, content, message) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=f"x.gguf: .*{message}"):
        source_of(backbone_of(tmp_path / "x.gguf", tmp_path))
    assert not made(tmp_path)


def test_a_file_that_is_cut_or_damaged_anywhere_is_refused_or_read_and_never_an_other_error(q8, tmp_path) -> None:
    content, path = q8.read_bytes(), tmp_path / "x.gguf"
    header = min(stored.start for stored in gguf_header.read_header(q8, "").tensors.values())
    for length in [*range(1, header, header // 60), *range(header, len(content), len(content) // 10)]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut short at|cut short, at|is no GGUF file"):
            gguf_header.read_header(path, "where")
    draw = np.random.default_rng(0)
    for at in draw.integers(4, header, 300):
        damaged = bytearray(content)
        damaged[at] = int(draw.integers(256))
        path.write_bytes(damaged)
        try:
            gguf_model.config_of(gguf_header.read_header(path, "where"))
        except UserError as error:
            assert str(error).startswith("where: x.gguf: ")
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"was cut short, at {len(content) - 1} of"):
        source_of(backbone_of(path, tmp_path))
    assert not made(tmp_path)


def test_which_file_is_meant(llama, q8, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(q8, folder / "a.gguf")
    once = source_of(backbone_of(folder, tmp_path))
    assert Path(once).name == f"a-{sha256_of(q8)[:12]}" and public_name(backbone_of(folder, tmp_path)) == "a.gguf"
    shutil.copy(q8, folder / "b.gguf")
    wrong = {
        (folder, None): r"holds 2 GGUF files and no config.json; name one: backbone.gguf_file=a.gguf \(or b.gguf\)",
        (folder, "c.gguf"): "backbone.gguf_file=c.gguf: no such file in .*; it has a.gguf, b.gguf",
        (llama, "c.gguf"): "it has no GGUF files: set backbone.gguf_file=null",
        (folder / "a.gguf", "b.gguf"): "is a file itself; set backbone.gguf_file=null",
        (tmp_path / "none.gguf", None): "none.gguf: no such file; a GGUF on the Hub is named by",
        (Path("pocket"), "c.gguf"): "pocket is built in",
        (Path("org/none"), "c.gguf"): "backbone.gguf_file=c.gguf: cannot be fetched",
    }
    for (name, file), message in wrong.items():
        with pytest.raises(UserError, match=message):
            source_of(backbone_of(name, tmp_path, gguf_file=file))
    with pytest.raises(
        UserError, match=r"cannot be loaded: .*; if GGUF files lie there, name one, as backbone\.gguf_file"
    ):
        load_config(backbone_of(Path("org/none-GGUF"), tmp_path))
    for text in ("../x.gguf", "/x.gguf", "x.bin"):
        with pytest.raises(UserError, match=r"backbone\.gguf_file=.*: the name of a \.gguf file in"):
            load(None, [f"backbone.gguf_file={text}"])
    assert Path(source_of(backbone_of(folder, tmp_path, gguf_file="b.gguf"))).name.startswith("b-")
    both = shutil.copytree(llama, tmp_path / "both")
    shutil.copy(q8, both / "x.gguf")
    assert source_of(backbone_of(both, tmp_path)) == str(both), "an ordinary checkpoint with a GGUF beside it"
    cache = tmp_path / "cache" / "models--org--tiny-GGUF"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots" / ("0" * 40) / "q").mkdir(parents=True)
    shutil.copy(q8, cache / "snapshots" / ("0" * 40) / "q" / "x.gguf")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    on_hub = backbone_of(Path("org/tiny-GGUF"), tmp_path, gguf_file="q/x.gguf")
    assert Path(source_of(on_hub)).name.startswith("x-") and public_name(on_hub) == "org/tiny-GGUF"
    assert gguf_record(on_hub) == {
        "file": "q/x.gguf", "sha256": sha256_of(q8), "quantisation": "Q8_0", "name": "Tiny test model"
    }  # fmt: skip
    head = tmp_path / "head"
    head.mkdir()
    record = {"name": "org/tiny-GGUF", "revision": "0" * 40, "gguf": gguf_record(on_hub)}
    (head / "config.json").write_text(json.dumps({"backbone": record}))
    defaults = hub.defaults_of(head, "head")["backbone"]
    assert defaults == {"name_or_path": "org/tiny-GGUF", "revision": "0" * 40, "gguf_file": "q/x.gguf"}


def test_it_is_made_once_and_what_a_killed_process_left_is_swept(q8, tmp_path, monkeypatch, capsys) -> None:
    backbone, name = backbone_of(q8, tmp_path), f"{q8.stem}-{sha256_of(q8)[:12]}"
    left = tmp_path / "backbones" / f"{TEMPORARY}{name}@elsewhere-1"
    other = tmp_path / "backbones" / f"{TEMPORARY}other-0@elsewhere-1"
    for folder in (left, other):
        folder.mkdir(parents=True)
    run = make_run(tmp_path, f"backbone.name_or_path={q8}", f"backbone.gguf_dir={tmp_path}/empty")
    assert plan.architecture_of(run.config.backbone).layers == 4
    assert not (tmp_path / "empty").exists(), "plan reads the header alone"
    monkeypatch.setattr(gguf_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GB; 0\.00 GB are free\. Make room, or name a folder on another disk"):
        source_of(backbone)
    monkeypatch.undo()
    assert not (tmp_path / "backbones" / name).exists()
    assert "dequantising" not in capsys.readouterr().out
    folder = Path(source_of(backbone))
    assert not left.exists() and other.exists() and folder.name == name
    line = capsys.readouterr().out
    assert line.startswith(f"backbone: dequantising tiny.Q8_0.gguf (Q8_0) -> {folder}, ") and line.count("\n") == 1
    monkeypatch.setattr(gguf_checkpoint, "write", None)
    assert source_of(backbone) == str(folder)


def test_a_damaged_checkpoint_of_a_gguf_is_to_be_removed_not_fetched(q8, tmp_path) -> None:
    backbone = backbone_of(q8, tmp_path)
    folder = Path(source_of(backbone))
    weights = folder / "model.safetensors"
    mode = (folder / "config.json").stat().st_mode
    assert weights.stat().st_mode == mode, "other users of a cluster may read it, as the umask says"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(
        UserError, match=r"made of it is damaged: model.safetensors.*Remove .*; it is made again"
    ) as told:
        load_model(backbone, CPU)
    assert "fetch it" not in str(told.value) and str(folder) in str(told.value)
    shutil.rmtree(folder)
    load_model(backbone, CPU)
    assert weights.read_bytes() == whole
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"is damaged: .*config.json.*Remove .*; it is made again"):
        load_config(backbone)


def test_without_a_chat_template_the_rule_is_that_of_every_tokenizer(llama, tmp_path) -> None:
    path = tiny_gguf(llama, tmp_path / "x.gguf", without=("tokenizer.chat_template",))
    run = make_run(tmp_path, f"backbone.name_or_path={path}", "prompts.chat_template=tokenizer")
    with pytest.raises(UserError, match=r"prompts\.chat_template=tokenizer: .*no chat template"):
        generate.run(run)
    assert not (run / "responses").exists()


def test_paths_of_files_are_not_published() -> None:
    assert anonymous({"name_or_path": "models/x.gguf", "gguf_dir": "my/place"}) == {
        "name_or_path": "x.gguf", "gguf_dir": "place"
    }  # fmt: skip


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_checkpoint(q8, tmp_path) -> None:
    code = (
        "import sys; from pipeline.config import Backbone; from pipeline.backbones import gguf_checkpoint, source\n"
        "write = gguf_checkpoint.write\n"
        "def counted(*given): print('WRITES', flush=True); write(*given)\n"
        "gguf_checkpoint.write = counted\n"
        "sys.stdin.readline(); print(source.source_of(Backbone(sys.argv[1], gguf_dir=sys.argv[2])))"
    )
    words = [sys.executable, "-c", code, str(q8), str(tmp_path / "backbones")]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    outputs = [worker.communicate("\n")[0].split("\n") for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert sum(output.count("WRITES") for output in outputs) == 1
    assert {output[-2] for output in outputs} == {str(path) for path in made(tmp_path)}


@pytest.mark.slow
def test_the_whole_road_on_a_gguf(q8, tmp_path, capsys) -> None:
    secret = tmp_path / "secret-place"
    secret.mkdir()
    shutil.copy(q8, secret / "tiny.gguf")
    run = make_run(tmp_path, f"backbone.name_or_path={secret}/tiny.gguf", "publish.min_speedup=0",
                   "distill.teacher=cached", "generate.temperatures=[0.0]", "evaluate.temperatures=[0.0]")  # fmt: skip
    words = ["run", "--config", str(config_file(run, tmp_path))]
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("dequantising") == 1
    hashed, folder = sha256_of(q8), run / "hub" / "2"
    record = {"file": "tiny.gguf", "sha256": hashed, "quantisation": "Q8_0", "name": "Tiny test model"}
    for file in (run / "heads" / "exit-2" / "config.json", folder / "config.json", folder / "results.json"):
        found = json.loads(file.read_text())["backbone"]
        assert found["name"] == "tiny.gguf" and found["gguf"] == record, file
    assert json.loads((folder / "provenance.json").read_text())["responses"]["backbone"]["gguf"] == record
    card = (folder / "README.md").read_text()
    assert f"Measured on the weights dequantised from `tiny.gguf` (Q8_0, sha256 `{hashed}`)" in card
    assert "license: apache-2.0" in card and 'gguf_file="tiny.gguf"' in card
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"secret-place" in text or str(tmp_path).encode() in text for text in texts)
    theirs = AutoModelForCausalLM.from_pretrained(secret, gguf_file="tiny.gguf", dtype=torch.float32)
    del theirs.config.quantization_config  # as the card says
    ids = torch.tensor([[65, 66, 67]])
    drafted = theirs.generate(ids, max_new_tokens=20, custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(drafted, theirs.generate(ids, max_new_tokens=20, do_sample=False))
    assert main(["publish", "--as", "draft", *words[1:]]) == 0
    assert AutoModelForCausalLM.from_pretrained(run / "hub" / "2-draft").config.num_hidden_layers == 3
    moved = shutil.copytree(run.config.backbone.gguf_dir, tmp_path / "moved")
    capsys.readouterr()
    assert main([*words, f"backbone.gguf_dir={moved}"]) == 0
    assert capsys.readouterr().out.count("done already") == 5, "where it is kept makes nothing stale"
