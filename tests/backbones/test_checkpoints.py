"""Checkpoints that cannot be used, and names that may not be published: one sentence, whichever library failed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_run, tiny_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import check_python_requirements

from pipeline.backbones.load import load_model, load_tokenizer, public_name
from pipeline.backbones.source import load_config
from pipeline.backbones.weight_files import WeightFiles, check_weights, fingerprint_of_files
from pipeline.config import Backbone
from pipeline.errors import UserError, reason
from pipeline.inference.fingerprint import fingerprint
from pipeline.publishing import head_folder
from pipeline.stages import generate, plan
from pipeline.training import load_sharded

CPU = torch.device("cpu")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"
PAGE = "<!DOCTYPE html><html><title>504 Gateway Time-out</title></html>"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("whole"), sharpness=4.0)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny-llama"))


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def cut_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def longer(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"abc")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / WEIGHTS).write_text(LFS), "model.safetensors: is a git-lfs pointer.*git lfs pull"),
        (lambda f: (f / WEIGHTS).write_text(PAGE), "model.safetensors: is a web page"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors: is empty"),
        (lambda f: (f / WEIGHTS).write_text('{"error": "x"}'), "model.safetensors: is text, not tensors"),
        (lambda f: torch.save({}, f / WEIGHTS), "model.safetensors: is a pickled or packed file"),
        (lambda f: (f / WEIGHTS).write_bytes(bytes(64)), "model.safetensors: is no safetensors file"),
        (cut, r"model.safetensors: was cut short, at \d+ of \d+ bytes: fetch it again"),
        (cut_in_the_header, "model.safetensors: was cut short, at 100 bytes"),
        (longer, "model.safetensors: has 3 bytes behind its last tensor"),
        (lambda f: edit_weights(f, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
         "no tensor lm_head.weight in it: give a complete"),
        (lambda f: edit_weights(f, lambda w: {k.replace("up_proj.weight", "up_proj.qweight"): v for k, v in w.items()}),
         r"it has model\.layers\.0\.mlp\.up_proj\.qweight instead, as quantised checkpoints have"),
        (lambda f: edit_weights(f, lambda w: {k: v.to(torch.uint8) if "q_proj" in k else v for k, v in w.items()}),
         r"q_proj\.weight is U8: give a checkpoint that is not quantised"),
        (lambda f: edit_config(f, intermediate_size=80), r"by config\.json it should be"),
        (lambda f: (f / "config.json").write_text(LFS), "config.json: is a git-lfs pointer"),
        (lambda f: (f / "config.json").write_text(PAGE), "config.json: is a web page"),
        (lambda f: (f / "config.json").write_text('{"model_type": "lla'), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text(""), "config.json: is empty"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
        (lambda f: edit_config(f, hidden_size="much"), "cannot be loaded: .*hidden_size"),
        (lambda f: edit_config(f, num_attention_heads=0), "cannot be loaded"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "cannot be loaded"),
        (lambda f: edit_config(f, hidden_act="relu"), "hidden_act=relu"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "quantization_config: gptq"),
        (lambda f: (f / "quantize_config.json").write_text('{"bits": 4}'), "quantize_config.json says that"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type=dynamic"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_is_one_sentence_in_every_stage(folder, tmp_path, spoil, message) -> None:
    spoil(folder)
    backbone = Backbone(str(folder), dtype="float32")
    run = make_run(tmp_path)
    for attempt in (
        lambda: load_model(backbone, CPU),
        lambda: plan.architecture_of(backbone),
        lambda: load_sharded.check_checkpoint(backbone, "", [1], "last"),
        lambda: generate.run(run),
    ):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not list((run / "stages").glob("*")), "nothing was begun"


def test_a_broken_index_and_tokenizer_are_one_sentence(folder) -> None:
    backbone = Backbone(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not JSON"):
        load_tokenizer(backbone)
    (folder / "tokenizer.json").unlink()
    (folder / WEIGHTS).unlink()
    index = folder / "model.safetensors.index.json"
    for text, message in (("{", "is not JSON"), ("{}", "cannot be loaded: 'weight_map'"), (LFS, "git-lfs pointer")):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            WeightFiles(backbone)


def test_a_class_of_its_own_is_refused_where_it_would_run(folder) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    load_config(Backbone(str(folder)))  # transformers' own class is taken
    with pytest.raises(UserError, match=r"trust_remote_code=true: .* \(modeling_mine\.Mine\)"):
        load_config(Backbone(str(folder), trust_remote_code=True))


# ---- whether LM head and embedding are one tensor, the files decide


def without(weights: dict, name: str) -> dict:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize("stored", ["own head", "two equal ones", "embedding alone", "head alone"])
def test_the_files_decide_what_the_lm_head_is(folder, stored: str) -> None:
    edit_config(folder, tie_word_embeddings=True)
    if stored != "own head":
        edit_weights(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    if stored == "embedding alone":
        edit_weights(folder, lambda w: without(w, "lm_head.weight"))
    if stored == "head alone":
        edit_weights(folder, lambda w: without(w, "model.embed_tokens.weight"))
    backbone = Backbone(str(folder), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    files, config = check_weights(backbone), load_config(backbone)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(files.rows(files.tensor_of(name, config))[:], model.get_parameter(name)), name
    assert fingerprint_of_files(backbone) == fingerprint(model)
    tied = stored != "own head"
    assert files.ties_embeddings(config) is tied is plan.architecture_of(backbone).tied
    load_sharded.check_checkpoint(backbone, fingerprint(model), [1], "last")
    skeleton, heads = load_sharded._on_meta(backbone, 1)
    wanted = load_sharded._wanted(files, skeleton, heads, [1], "last")
    source = next(name for name, filled in wanted.items() if any(p is skeleton.lm_head.weight for p in filled))
    assert torch.equal(files.rows(source)[:], model.lm_head.weight), "distill learns from the head that decodes"


# ---- tokens beyond the vocabulary

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@pytest.mark.parametrize("how", ["template", "prompt", "harmless"])
def test_ids_beyond_the_vocabulary_are_named_before_the_backbone_is_loaded(folder, tmp_path, monkeypatch, how) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    if how == "prompt":
        text = "".join(json.dumps({"prompt": f"say <|im_start|> {i}"}) + "\n" for i in range(40))
        (tmp_path / "prompts.jsonl").write_text(text)
    run = make_run(tmp_path, "prompts.chat_template=tokenizer" if how == "template" else "prompts.chat_template=none")
    if how == "harmless":
        generate.run(run)
        return
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("the backbone was loaded"))
    with pytest.raises(UserError, match=r"token id 258 \('<\|im_start\|>'\), but the backbone's vocab_size is 258"):
        generate.run(run)
    assert not list((run / "stages").glob("*"))


# ---- what is published of it, and what is said


def test_a_snapshot_of_the_hub_has_its_repositorys_name(tmp_path) -> None:
    for repository, name in (("models--org--some-7B", "org/some-7B"), ("models--gpt2", "gpt2")):
        snapshot = tmp_path / "hub" / repository / "snapshots" / "3f2a9c"
        snapshot.mkdir(parents=True)
        link = tmp_path / f"link-{repository}"
        link.symlink_to(snapshot)
        for path in (snapshot, f"{snapshot}/", link):
            assert public_name(Backbone(str(path))) == name
    other = tmp_path / "snapshots" / "mine"
    other.mkdir(parents=True)
    assert public_name(Backbone(str(other))) == "mine" and public_name(Backbone("org/name")) == "org/name"


def test_the_whole_reason_is_kept() -> None:
    assert reason(ValueError("Config name is missing.\nPick one among:\n ['a', 'b']")) == (
        "Config name is missing. Pick one among: ['a', 'b']"
    )
    assert reason(KeyError()) == "KeyError"
    long = reason(ValueError("word " * 200))
    assert len(long) <= 604 and long.endswith("word ...")


def test_an_older_transformers_is_told_which_one_is_needed(tmp_path, root, monkeypatch) -> None:
    """By transformers' own check, which every version that knows custom_generate makes before it imports the code."""
    head_folder.write_code(tmp_path)
    where = {"requirements_file": "custom_generate/requirements.txt"}
    check_python_requirements(str(tmp_path), **where)
    needed = (tmp_path / "custom_generate" / "requirements.txt").read_text().strip()
    assert f'"{needed},<6"' in (root / "pyproject.toml").read_text()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=rf"{needed} \(installed: 4\.57\.1\)"):
        check_python_requirements(str(tmp_path), **where)
