"""What ends a text: one rule for generate, evaluate and the published head, whichever file names the end token."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_run, plant_heads, tiny_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.backbones.ends import added_ends, end_tokens
from pipeline.backbones.load import load_tokenizer
from pipeline.config import Backbone
from pipeline.errors import UserError
from pipeline.generation.responses import rows_of
from pipeline.inference import custom_generate
from pipeline.publishing import head_folder
from pipeline.stages import evaluate, generate

END, PAD = 256, 257


def says(folder: Path, **files: object) -> Backbone:
    """The backbone, with eos_token_id in these of its files alone (generation_config, config, tokenizer_config)."""
    for name in ("generation_config", "config"):
        path = folder / f"{name}.json"
        fields = json.loads(path.read_text()) if path.exists() else {}
        fields.pop("eos_token_id", None)
        path.write_text(json.dumps(fields | ({"eos_token_id": files[name]} if name in files else {})))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": files.get("tokenizer_config")}))
    return Backbone(name_or_path=str(folder), dtype="float32")


RULES = {
    "the generation config first": ({"generation_config": [3, 5], "config": 7}, [3, 5], []),
    "then the config": ({"config": [7, 8], "tokenizer_config": "<|pad|>"}, [7, 8], [7, 8]),
    "then the tokenizer": ({"tokenizer_config": "<|pad|>"}, [PAD], [PAD]),
    "an empty list names none": ({"generation_config": [], "config": 7}, [7], [7]),
    "nor does -1": ({"config": -1, "tokenizer_config": "<|pad|>"}, [PAD], [PAD]),
    "a config class has a default that nobody wrote": ({}, [], []),
}
"""Files that name an end token -> what ends a text, and what of it transformers' generate does not know."""


@pytest.mark.parametrize(("files", "expected", "added"), RULES.values(), ids=RULES.keys())
def test_who_says_what_ends_a_text(tmp_path, files, expected, added) -> None:
    backbone = says(tiny_backbone(tmp_path), **files)
    tokenizer = load_tokenizer(backbone)
    assert end_tokens(backbone, tokenizer) == expected and added_ends(backbone, tokenizer) == added
    backbone.end_tokens = [9, "<|endoftext|>", "Q"]
    q = tokenizer("Q")["input_ids"][0]
    assert end_tokens(backbone, tokenizer) == [*expected, 9, END, q]
    assert added_ends(backbone, tokenizer) == [*added, 9, END, q]


@pytest.mark.parametrize(
    ("entry", "message"),
    [("<|im_end|>", r"'<\|im_end\|>' is 10 tokens of this tokenizer"), (258, r"258 is no id .* from 0 to 257")],
)
def test_an_end_token_that_is_none_is_refused(tmp_path, entry, message) -> None:
    backbone = says(tiny_backbone(tmp_path), config=END)
    backbone.end_tokens = [entry]
    with pytest.raises(UserError, match=rf"^backbone\.end_tokens: {message}"):
        end_tokens(backbone, load_tokenizer(backbone))


@pytest.fixture(scope="module")
def often(tmp_path_factory) -> Path:
    """A folder with a backbone that often draws END, which its tokenizer alone names, and 40, which none of its files
    does: each has the mean direction of other tokens, made longer."""
    folder = tmp_path_factory.mktemp("often")
    backbone = tiny_backbone(folder, sharpness=4.0)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    for token in (END, 40):
        model.lm_head.weight.data[token] = model.lm_head.weight.data[100:140].mean(0) * 10
    model.save_pretrained(backbone)
    says(backbone, tokenizer_config="<|endoftext|>")
    return folder


WORDS = ["backbone.end_tokens=[40]", "generate.max_new_tokens=60", "evaluate.controllers=[fixed:2]",
         "evaluate.num_prompts=1"]  # fmt: skip


@pytest.mark.parametrize("name", ["padded", "continuous", "speculative"])
def test_every_answerer_ends_texts_alike(often, name) -> None:
    run = make_run(often, *WORDS, f"run.name={name}", f"generate.engine={name}", "generate.num_prompts=4",
                   "generate.temperatures=[0.0]", f"generate.exit_head={often}/runs/heads/heads/exit-2")  # fmt: skip
    plant_heads(make_run(often, *WORDS, "run.name=heads"), 2)
    generate.run(run)
    rows = [row for path in sorted((run / "responses").glob("shard-*.parquet")) for row in rows_of(path)]
    stopped = {row["response_ids"][-1] for row in rows if row["finish_reason"] == "stop"}
    assert stopped and stopped <= {40, END}
    assert not any({40, END} & set(row["response_ids"][:-1]) for row in rows)


def test_evaluate_and_the_published_head_end_texts_so_too(often, tmp_path) -> None:
    run = make_run(often, *WORDS)
    plant_heads(run, 2)
    evaluate.run(run)
    assert json.loads((run / "eval" / "results.json").read_text())["ends"] == [40, END]
    with pytest.raises(UserError, match=r"backbone\.end_tokens was \[40\], is \[\].*--redo evaluate"):
        evaluate.run(make_run(often, *WORDS, "backbone.end_tokens=[]"))
    head_folder.write_generation_config(tmp_path, run.config.backbone)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [END, 40]
    assert head_folder.added_ends_of(run.config.backbone) == {"end_tokens": [END, 40]}


def test_the_published_head_ends_where_texts_ended(tmp_path) -> None:
    run = make_run(tmp_path)
    plant_heads(run, 2)
    head = run / "heads" / "exit-2"
    model = AutoModelForCausalLM.from_pretrained(run.config.backbone.name_or_path).eval()
    ids = AutoTokenizer.from_pretrained(run.config.backbone.name_or_path)(
        "prompt number 9", return_tensors="pt"
    ).input_ids
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    plain = model.generate(ids, **how)[0].tolist()
    end = plain[ids.shape[1] + 5]
    at = plain.index(end, ids.shape[1])

    def decode(**more) -> list[int]:
        decoded = custom_generate.generate(ids, model=model, exit_head=str(head), controller="fixed:2", **how, **more)
        return decoded[0].tolist()

    assert decode() == plain
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"end_tokens": [end]}))
    model.__dict__.pop("_exit_heads")
    assert decode() == plain[: at + 1]
    assert decode(eos_token_id=END) == plain, "what the caller says stands"
