"""The text part of a model that reads images too is loaded, trained on and drafted for as if it stood alone."""

import pytest
import torch
from helpers import tiny_reader_of_images
from oracles import head_for
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pipeline.backbones.load import load_model
from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone
from pipeline.errors import UserError
from pipeline.inference import custom_generate
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.text_part import text_model
from pipeline.publishing import draft_model

IDS = [(7 * i * i) % 250 + 3 for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_reader_of_images(tmp_path_factory.mktemp("images"))


def test_only_its_text_part_is_loaded_and_gives_the_logits_of_the_whole(folder) -> None:
    backbone = Backbone(str(folder), dtype="float32")
    whole, part = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(backbone, torch.device("cpu"))
    assert type(whole).__name__ == "Gemma3ForConditionalGeneration" and type(part).__name__ == "Gemma3ForCausalLM"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert all(name.startswith(("language_model.", "vision_tower.", "multi_modal")) for name in file.keys())  # noqa: SIM118
    ids_1T = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(part(ids_1T).logits, whole(ids_1T).logits)
    assert fingerprint(part) == fingerprint(text_model(whole)) == fingerprint_of_files(backbone)
    own, shared = dict(whole.named_parameters()), dict(text_model(whole).named_parameters())
    assert all(any(w is other for other in own.values()) for w in shared.values()), "nothing is held twice"


def test_generate_drafts_for_the_whole_model(folder, tmp_path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    head_for(text_model(whole), 2).save(tmp_path / "head")
    ids_1T = torch.tensor([IDS])
    same = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids_1T)}
    drafting = {"model": whole, "exit_head": str(tmp_path / "head"), "controller": "fixed:2", **same}
    expected = whole.generate(ids_1T, **same)
    assert torch.equal(custom_generate.generate(ids_1T, **drafting), expected)
    assert torch.equal(custom_generate.generate(ids_1T, token_type_ids=torch.zeros_like(ids_1T), **drafting), expected)
    with pytest.raises(ValueError, match="they mark images"):
        custom_generate.generate(ids_1T, token_type_ids=torch.ones_like(ids_1T), **drafting)
    with pytest.raises(ValueError, match="pixel_values"):
        custom_generate.generate(ids_1T, pixel_values=torch.zeros(1, 3, 28, 28), **drafting)
    with torch.no_grad():
        whole.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert torch.equal(custom_generate.generate(ids_1T, **drafting), whole.generate(ids_1T, **same))


def test_its_files_make_no_draft_model(folder, tmp_path) -> None:
    backbone = Backbone(str(folder), dtype="float32")
    head = head_for(load_model(backbone, torch.device("cpu")), 2)
    with pytest.raises(UserError, match=r"reads images too.*without --as draft"):
        draft_model.export(tmp_path / "draft", backbone, head, 2)
    assert not (tmp_path / "draft").exists()
