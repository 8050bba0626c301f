"""Which tokens are learned, in words: on every kind of chat template, decoding them gives the answers and nothing else.

Rows are laid out as `generate` lays them out: a turn's prompt is what the template makes of the conversation so far,
its response is what was drawn, end token included.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import END, byte_tokenizer

from pipeline.generation.documents import read_documents, read_manifest, usable
from pipeline.runs.files import sha256_of
from pipeline.training.packing import Packed, pack

TEMPLATES = Path(__file__).parent / "templates"
LENGTH = 2048


@dataclass(frozen=True)
class Family:
    """A kind of template, tests/templates/<name>.jinja, and how many of the two later turns are joined."""

    end: str
    special: tuple[str, ...]
    lead: str
    """What such a backbone begins an answer with, as the generation prompt leaves it out."""
    joined: dict[str, int]


FAMILIES = {
    # trims an answer and puts a space on either side: never as it was drawn
    "llama2": Family("</s>", ("<s>",), " ", {"smooth": 0, "spaced": 0, "pieces": 0, "system": 0}),
    "llama3": Family(
        "<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"), "",
        {"smooth": 2, "spaced": 0, "pieces": 1, "system": 2},
    ),
    # the system text moves to the newest turn
    "mistral": Family("</s>", ("<s>", "[INST]", "[/INST]"), " ", {"smooth": 2, "spaced": 0, "pieces": 1, "system": 0}),
    "chatml": Family("<|im_end|>", ("<|im_start|>",), "", {"smooth": 2, "spaced": 2, "pieces": 1, "system": 2}),
    # the empty thought is in the generation prompt only
    "qwen3": Family(
        "<|im_end|>", ("<|im_start|>", "<think>", "</think>"), "",
        {"smooth": 0, "spaced": 0, "pieces": 0, "system": 0},
    ),
    "vicuna": Family("</s>", ("<s>",), " ", {"smooth": 2, "spaced": 0, "pieces": 1, "system": 2}),
    "zephyr": Family("</s>", (), "", {"smooth": 2, "spaced": 2, "pieces": 1, "system": 2}),
    # no end token in the past
    "plain": Family(END, (), "", {"smooth": 0, "spaced": 0, "pieces": 0, "system": 0}),
}  # fmt: skip

RENDERED = {
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] b </s><s>[INST] C [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] A[/INST] b</s>[INST] S\n\nC[/INST]",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n b<|im_end|>\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n b<|im_end|>\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "vicuna": "S USER: A ASSISTANT: b</s>USER: C ASSISTANT:",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\n b</s>\n<|user|>\nC</s>\n<|assistant|>\n",
    "plain": "S\n\nA\n\n b\n\nC",
}


def tokenizer_of(name: str) -> Any:
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(LENGTH)
    named = {"eos_token": family.end} | ({"bos_token": family.special[0]} if family.special else {})
    tokenizer.add_special_tokens(named | {"extra_special_tokens": list(family.special)})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def conversations(family: Family) -> dict[str, tuple[list[dict[str, str]], list[tuple[str, str]]]]:
    """Name -> (messages before the first question, what is asked and answered)."""
    mark, lead = family.end, family.lead
    smooth = [("One?", f"{lead}one, of course"), ("Zwei?", f"{lead}zwölf ☃ 你好 👍🏽"), ("Trois?", f"{lead}trois!")]
    spaced = [("One?", "\n  one \n\n"), ("Zwei? ", "   "), (" Trois?", "\ttrois\n")]
    pieces = [smooth[0], ("Write the mark.", f"{lead}it is {mark}, {mark}{mark}."), smooth[2]]
    # What a thinking backbone writes, and what a template may drop from the past.
    single = [("Think.", f"{lead}<think>\nhm, {mark}\n</think>\n\nyes ")]
    return {
        "smooth": ([], smooth),
        "spaced": ([], spaced),
        "pieces": ([], pieces),
        "system": ([{"role": "system", "content": "Be brief."}], smooth),
        "single": ([], single),
    }


def rows(name: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    for id_, (messages, turns) in conversations(FAMILIES[name]).items():
        for number, (question, answer) in enumerate(turns, 1):
            messages = [*messages, {"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            drawn = tokenizer(answer, split_special_tokens=True)["input_ids"]
            assert max(drawn) < 256, "the text of a special token is drawn in pieces"
            yield {
                "id": id_ if number == 1 else f"{id_}.{number}",
                "prompt_ids": prompt,
                "response_ids": [*drawn, tokenizer.eos_token_id],
                "finish_reason": "stop",
            }
            messages = [*messages, {"role": "assistant", "content": answer}]


def write(folder: Path, found: list[dict[str, Any]]) -> None:
    path = folder / "shard-00000.parquet"
    pq.write_table(pa.Table.from_pylist(found), path)
    shard = {"file": path.name, "rows": len(found), "sha256": sha256_of(path)}
    (folder / "manifest.json").write_text(json.dumps({"shards": [shard], "complete": True}))


def expected_texts(name: str) -> list[list[str]]:
    """Of every document, the answers with their end tokens: turns that are joined lie in one document."""
    family, documents = FAMILIES[name], []
    for id_, (_, turns) in conversations(family).items():
        texts = [answer + family.end for _, answer in turns]
        joined = family.joined.get(id_, 0)  # always the first ones: what was once changed stays so
        documents += [texts[: joined + 1], *([text] for text in texts[joined + 1 :])]
    return documents


def learned_ids(packed: Packed) -> Iterator[list[list[int]]]:
    """Of every document, the tokens whose prediction is learned, cut where one in between is not."""
    for s in range(len(packed)):
        length = int(packed.lengths_S[s])
        starts = [t for t in range(length) if packed.positions_ST[s, t] == 0]
        for start, end in pairwise([*starts, length]):
            spans: list[list[int]] = []
            for t in range(start, end):
                if packed.mask_ST[s, t]:
                    if t == start or not packed.mask_ST[s, t - 1]:
                        spans.append([])
                    spans[-1].append(int(packed.ids_ST[s, t + 1]))
            yield spans
    assert not packed.mask_ST[:, -1].any(), "nothing follows the last place"


def check(packed: Packed, tokenizer: Any, expected: list[list[str]]) -> None:
    found = list(learned_ids(packed))
    assert sorted([tokenizer.decode(ids) for ids in spans] for spans in found) == sorted(expected)
    assert all(ids[-1] == tokenizer.eos_token_id for spans in found for ids in spans)


@pytest.fixture(params=FAMILIES)
def laid_out(request, tmp_path) -> tuple[str, Any, Path]:
    tokenizer = tokenizer_of(request.param)
    write(tmp_path, list(rows(request.param, tokenizer)))
    return request.param, tokenizer, tmp_path


def test_the_learned_tokens_are_the_answers_with_their_end_tokens(laid_out):
    name, tokenizer, folder = laid_out
    documents, counts = read_documents(folder, read_manifest(folder), "drop", 1.0)
    joined = sum(FAMILIES[name].joined.values())
    assert counts == {"answers": 13, "truncated": 0, "repeating": 0, "joined": joined, "alone": 8 - joined}
    packed = pack(usable(documents, LENGTH), LENGTH)
    assert len(packed) < len(documents), "some share a sequence"
    check(packed, tokenizer, expected_texts(name))
    assert int(packed.mask_ST.sum()) == sum(len(row["response_ids"]) for row in rows(name, tokenizer))


@pytest.mark.parametrize("wrong", ["early", "late", "without the end token", "with the token after it"])
def test_a_mask_that_is_one_off_is_found(laid_out, wrong):
    name, tokenizer, folder = laid_out
    documents, _ = read_documents(folder, read_manifest(folder), "drop", 1.0)
    packed = pack(documents, LENGTH)
    mask_ST = packed.mask_ST
    before, after = mask_ST.roll(-1, 1), mask_ST.roll(1, 1)
    wrong_ST = {
        "early": before,
        "late": after,
        "without the end token": mask_ST & before,
        "with the token after it": mask_ST | after,
    }[wrong]
    stub = Packed(packed.ids_ST, packed.positions_ST, wrong_ST, packed.lengths_S)
    with pytest.raises(AssertionError):
        check(stub, tokenizer, expected_texts(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_render_as_their_family_does(name):
    tokenizer = tokenizer_of(name)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": " b"},
        {"role": "user", "content": "C"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == RENDERED[name]
