"""The exported draft model is the exit head: its logits, and the rounds that an engine needs with it.

Text is no test of a draft model: any gives the backbone's own. The number of rounds is one: it must be that of fixed K
simulated along the backbone's greedy text from the exit head itself, and it is another where the export is wrong.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
from helpers import make_run, plant_heads, tiny_backbone
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pipeline.backbones.load import load_model
from pipeline.config import Backbone
from pipeline.evaluation.losslessness import teacher_forced
from pipeline.evaluation.results import is_lossless as lossless
from pipeline.evaluation.rivals import Rival, decode
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.sampling import Sampler
from pipeline.publishing import draft_model, gate, parity
from pipeline.stages import evaluate, publish

N, DRAFTS, NEW = 2, 3, 60
THETA = {"rope_type": "default", "rope_theta": 500000.0}
PROMPTS = [[60, 61, 62, 60, 61, 62, 60], [9, 8, 7], [100, 20, 30, 40, 50], [77]]


class Case:
    """A backbone whose deep layers change little, so that a head may agree with it, and an exported draft of it."""

    def __init__(self, folder: Path, family: str = "llama", **fields):
        self.source = Backbone(
            name_or_path=str(tiny_backbone(folder, family, sharpness=3.0, **fields)), dtype="float32"
        )
        model = AutoModelForCausalLM.from_pretrained(self.source.name_or_path)
        with torch.no_grad():
            for layer in model.model.layers[N:]:
                layer.self_attn.o_proj.weight.mul_(0.25)
                layer.mlp.down_proj.weight.mul_(0.25)
        model.save_pretrained(self.source.name_or_path)
        self.model = load_model(self.source, torch.device("cpu"))
        record = {"name": "tiny", "revision": None, "fingerprint": fingerprint(self.model), "model_type": family}
        self.head = ExitHead(N, len(self.model.model.layers), record, new_exit_layer(self.model).state_dict())
        self.draft = folder / "draft"
        draft_model.export(self.draft, self.source, self.head, DRAFTS)

    def rounds(self, folder: Path) -> list[int]:
        """Passes of the backbone over each prompt with the draft of a folder, as the folder says how many to draft."""
        draft = AutoModelForCausalLM.from_pretrained(folder)
        passes = []
        for ids in PROMPTS:
            calls = []
            hook = self.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            row = torch.tensor([ids])
            self.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False,
                                eos_token_id=None, pad_token_id=0, assistant_model=draft)  # fmt: skip
            hook.remove()
            passes.append(len(calls))
        return passes

    def simulated(self) -> list[int]:
        """The same from the exit head, which transformers has never seen: no round before the first token here."""
        engine = SplitBackbone(self.model, self.head)
        passes = []
        for ids in PROMPTS:
            text = autoregressive(engine, Request(ids, NEW), Sampler()).tokens
            _, q_TV = teacher_forced(engine, ids, text, Sampler())
            passes.append(rounds_of_fixed((q_TV.argmax(-1) == torch.tensor(text)).tolist(), DRAFTS))
        return passes


def rounds_of_fixed(right: list[bool], k: int) -> int:
    """Rounds over a text, `right` saying of each token whether the head would draft it behind the true ones."""
    t = rounds = 0
    while t < len(right):
        drafts = right[t : min(t + k, len(right) - 1)]  # the last token can only be a bonus token
        t += 1 + (drafts.index(False) if False in drafts else len(drafts))
        rounds += 1
    return rounds


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    """Another rope theta than any default, and an LM head of its own."""
    return Case(tmp_path_factory.mktemp("draft"), rope_parameters=THETA)


def test_a_round_ends_at_the_first_wrong_draft() -> None:
    assert rounds_of_fixed([True] * 8, 3) == 2
    assert rounds_of_fixed([False] * 5, 3) == 5
    assert rounds_of_fixed([True, False, True, True, True, True, False, True], 2) == 4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_shallow_and_head(tmp_path, family, tied) -> None:
    """To the last bit, against transformers' own layers; and the model in memory is the model in the folder."""
    case = Case(tmp_path, family, rope_parameters=THETA, tie_word_embeddings=tied)
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    seen = {}
    hook = case.model.model.layers[N].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0], rest=kwargs), with_kwargs=True
    )
    case.model(ids)
    hook.remove()
    exit_layer = new_exit_layer(case.model)
    hidden_BTD = exit_layer(seen["hidden"], **seen["rest"] | {"past_key_values": None})
    expected = case.model.lm_head(case.model.model.norm(hidden_BTD))
    exported = AutoModelForCausalLM.from_pretrained(case.draft)
    assert torch.equal(exported(ids).logits, expected)
    assert torch.equal(draft_model.in_memory(case.model, case.head)(ids).logits, expected)
    names = load_file(case.draft / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied and exported.config.tie_word_embeddings is tied


def test_rounds_are_those_of_the_exit_head(llama) -> None:
    assert llama.rounds(llama.draft) == llama.simulated()
    assert any(r < 0.8 * NEW for r in llama.simulated()), "hardly a draft is accepted: this says nothing"


def changed(draft: Path, target: Path, *, fields: dict | None = None, swap: bool = False) -> Path:
    shutil.copytree(draft, target)
    config = json.loads((target / "config.json").read_text()) | (fields or {})
    (target / "config.json").write_text(json.dumps(config))
    if swap:
        weights = load_file(target / "model.safetensors")
        one, two = "model.layers.0.", "model.layers.1."
        other = {one: two, two: one}
        swapped = {other.get(name[:15], name[:15]) + name[15:]: w for name, w in weights.items()}
        save_file(swapped, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_rounds_tell_a_wrong_export(llama, tmp_path) -> None:
    """Two layers swapped, or the rope theta forgotten: the text stays, the rounds do not."""
    right = llama.simulated()
    assert llama.rounds(changed(llama.draft, tmp_path / "swapped", swap=True)) != right
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0}
    assert llama.rounds(changed(llama.draft, tmp_path / "theta", fields=theta)) != right


def test_the_config_says_it_in_old_names_too(tmp_path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    case = Case(tmp_path, rope_parameters=scaling | {"rope_theta": 500000.0})
    config = json.loads((case.draft / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == scaling
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["num_hidden_layers"] == N + 1
    fields = {k: v for k, v in config.items() if k != "rope_parameters"}
    (case.draft / "config.json").write_text(json.dumps(fields))
    assert AutoModelForCausalLM.from_pretrained(case.draft).config.rope_parameters == case.model.config.rope_parameters


def test_layer_types_are_cut_and_the_exit_layer_keeps_that_of_the_last(tmp_path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    case = Case(tmp_path, "qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=16)
    exported = AutoModelForCausalLM.from_pretrained(case.draft)
    assert exported.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    ids = torch.arange(60)[None]
    assert torch.equal(exported(ids).logits, draft_model.in_memory(case.model, case.head)(ids).logits)


def test_the_tokenizer_and_the_settings_travel_with_it(llama) -> None:
    names = {p.name for p in llama.draft.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (llama.draft, llama.source.name_or_path))
    assert ours.get_vocab() == theirs.get_vocab()
    settings = AutoModelForCausalLM.from_pretrained(llama.draft).generation_config
    assert (settings.num_assistant_tokens, settings.num_assistant_tokens_schedule) == (DRAFTS, "constant")
    assert settings.assistant_confidence_threshold == 0.0 and settings.eos_token_id == 256


def test_folders_of_whoever_saved_the_tokenizer_stay_behind(llama, tmp_path) -> None:
    source = tmp_path / "old"
    shutil.copytree(llama.source.name_or_path, source)
    file = source / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"chat_template": "{{ 'é' }}"}
    places = dict.fromkeys(("name_or_path", "tokenizer_file", "special_tokens_map_file"), "/home/ada/model")
    file.write_text(json.dumps(places | fields))
    draft_model.export(tmp_path / "draft", Backbone(name_or_path=str(source)), llama.head, DRAFTS)
    assert json.loads((tmp_path / "draft" / "tokenizer_config.json").read_text()) == fields
    assert not [p.name for p in (tmp_path / "draft").iterdir() if b"/home/ada" in p.read_bytes()]


def test_a_large_draft_is_written_in_parts(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(draft_model, "SHARD", 40_000)
    draft_model.export(tmp_path / "parts", llama.source, llama.head, DRAFTS)
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 50_000 for f in files)
    ids = torch.arange(40)[None]
    whole, parts = (AutoModelForCausalLM.from_pretrained(f) for f in (llama.draft, tmp_path / "parts"))
    assert torch.equal(whole(ids).logits, parts(ids).logits)


def test_a_backbone_in_bfloat16_gives_a_draft_in_bfloat16(llama, tmp_path) -> None:
    """Split over several files, of which those of the deep layers are not opened."""
    source = tmp_path / "half"
    shutil.copytree(llama.source.name_or_path, source)
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama.source.name_or_path, dtype=torch.bfloat16).save_pretrained(
        source, max_shard_size="20KB"
    )
    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if "layers.2" not in name and "layers.3" not in name}
    for file in set(places.values()) - needed:
        (source / file).write_bytes(b"not read")
    draft_model.export(tmp_path / "draft", Backbone(name_or_path=str(source)), llama.head, DRAFTS)
    assert {w.dtype for w in load_file(tmp_path / "draft" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["dtype"] == "bfloat16"
    assert set(places.values()) - needed, "every file holds something that is needed: this says nothing"


def test_as_a_rival_it_decodes_the_same_text_in_the_simulated_rounds(llama) -> None:
    engine = SplitBackbone(llama.model, llama.head)
    drafts = {N: draft_model.in_memory(llama.model, llama.head)}
    found = []
    for ids in PROMPTS:
        calls: list[int] = []
        hook = llama.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tokens, _ = decode(llama.model, Rival(f"assistant_model:{DRAFTS}", N), ids, NEW, frozenset(), drafts)
        hook.remove()
        assert tokens == autoregressive(engine, Request(ids, NEW), Sampler()).tokens
        found.append(len(calls))
    assert found == llama.simulated()


# ---- the stage


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Evaluated with two fixed lengths, and exported: a head that is the last layer behind all others, always right."""
    run = make_run(tmp_path_factory.mktemp("export"), "publish.min_speedup=0",
                   "evaluate.controllers=[fixed:1,fixed:3]", "evaluate.temperatures=[0.0,1.0]")  # fmt: skip
    plant_heads(run, 3)
    evaluate.run(run)
    publish.run_draft(run)
    return run


def test_the_stage_gives_a_whole_folder_that_was_tried(run) -> None:
    """In a process of its own, the rounds behind the first token are to the last one those that were evaluated."""
    folder = run / "hub" / "3-draft"
    results = json.loads((folder / "results.json").read_text())
    k = gate.best_fixed(results)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["num_assistant_tokens"] == k and k in (1, 3)
    found = results["gate"]["parity"]
    assert results["gate"]["passed"] and found["identical"] == found["texts"] == 4
    assert found["tokens_per_round"] == pytest.approx(found["evaluated"], abs=1e-12)
    assert not (run / "hub" / "3").exists(), "the head is published by itself"


def test_its_card_has_a_line_for_every_engine_with_the_best_length(run) -> None:
    text = (run / "hub" / "3-draft" / "README.md").read_text()
    k = gate.best_fixed(json.loads((run / "hub" / "3-draft" / "results.json").read_text()))
    for line in ("assistant_model=draft", f'"num_speculative_tokens": {k}', f"--speculative-num-steps {k}",
                 f"max_draft_len={k}", f"num_assistant_tokens={k}", f"--spec-draft-n-max {k}"):  # fmt: skip
        assert line in text, line
    assert "**It holds weights of tiny-llama.**" in text and "## Limits" in text
    marks = dict(re.findall(r"^\*\*(.+)\*\* \((tested|not tested)[,)]", text, re.MULTILINE))
    assert marks == {"transformers": "tested", "OpenVINO GenAI": "tested", "vLLM": "tested", "SGLang": "not tested",
                     "TensorRT-LLM": "not tested", "llama.cpp": "not tested"}  # fmt: skip
    assert "| 1 | 0 |" in text and "| 3 | 1 |" in text, "acceptance of every length that was measured"
    assert ModelCard.load(run / "hub" / "3-draft" / "README.md").data.tags[0] == "speculative-decoding"


@pytest.mark.slow
def test_a_head_with_a_draft_vocabulary_is_published_in_both_forms(tmp_path) -> None:
    """As a head it drafts from two thirds of the tokens; as a draft model it has the whole LM head, and is the backbone
    itself, so every draft is accepted there and only there."""
    run = make_run(tmp_path, "publish.min_speedup=0", "evaluate.controllers=[fixed:3]",
                   "evaluate.temperatures=[0.0,1.0]", "publish.force=true")  # fmt: skip
    plant_heads(run, 3)
    head = ExitHead.load(run / "heads" / "exit-3")
    dataclasses.replace(head, draft_ids_W=torch.tensor([i for i in range(258) if i % 3])).save(run / "heads" / "exit-3")
    evaluate.run(run)
    publish.run(run)
    publish.run_draft(run)
    as_head, as_draft = (json.loads((run / "hub" / name / "results.json").read_text()) for name in ("3", "3-draft"))
    assert lossless(as_head) and as_head["lossless"]["sampling"]
    assert as_head["heads"][0]["draft_vocabulary"]["size"] == 172
    said, found = as_head["gate"]["parity"], as_draft["gate"]["parity"]
    assert said["tokens_per_round"] == pytest.approx(said["evaluated"], abs=1e-12)
    assert found["tokens_per_round"] == pytest.approx(found["evaluated"], abs=1e-12)
    assert said["tokens_per_round"] < found["tokens_per_round"] and found["identical"] == found["texts"]
    assert "drafts 172 of the backbone's 258 tokens" in (run / "hub" / "3" / "README.md").read_text()
    assert "from a part of the vocabulary" in (run / "hub" / "3-draft" / "README.md").read_text()
    loaded = AutoModel.from_pretrained(run / "hub" / "3", trust_remote_code=True)
    assert loaded.draft_ids.tolist() == [i for i in range(258) if i % 3]


def test_a_wrong_export_is_refused(run, tmp_path, monkeypatch) -> None:
    """Two layers swapped: the same texts in other rounds."""
    monkeypatch.setattr(parity, "subprocess", forked)
    results = json.loads((run / "hub" / "3-draft" / "results.json").read_text())
    swapped = changed(run / "hub" / "3-draft", tmp_path / "swapped", swap=True)
    figures, failed = parity.check(run, results, swapped, "draft", gate.best_fixed(results))
    assert figures["identical"] == 4 and ["tokens a round" in line for line in failed] == [True]
