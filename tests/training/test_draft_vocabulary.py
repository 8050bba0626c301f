"""Draft vocabularies: which tokens are chosen, and what a head that drafts only these learns."""

import json

import pytest
import torch
from distilling import lines, prepare
from helpers import tiny_backbone
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.planning.architecture import Architecture
from pipeline.planning.gain import choose_draft_vocabulary
from pipeline.stages import distill
from pipeline.training.acceptance import draft_statistics
from pipeline.training.draft_vocabulary import coverage, ranked
from pipeline.training.packing import Packed


def packed(ids: list[int], answers: list[bool], length: int) -> Packed:
    """One sequence of which the first `length` tokens are real; answers: whether a token belongs to an answer."""
    mask_1T = torch.tensor([[*answers[1:], False]])
    return Packed(torch.tensor([ids]), torch.arange(len(ids))[None], mask_1T, torch.tensor([length]))


def test_tokens_of_answers_come_first_then_those_of_prompts_then_the_lower_ids() -> None:
    train = packed([5, 5, 5, 7, 2, 7, 3, 0, 0, 0], [False, False, False, True, True, True, True] + [False] * 3, 7)
    assert ranked(train, 9).tolist() == [7, 2, 3, 5, 0, 1, 4, 6, 8]
    validation = packed([1, 7, 7, 8, 5], [False, True, True, True, True], 5)
    assert [coverage(ranked(train, 9), validation, w) for w in (1, 3, 4, 9)] == [0.5, 0.5, 0.75, 1.0]


def test_the_size_of_the_largest_predicted_speedup_is_chosen() -> None:
    smollm = Architecture("SmolLM2-135M", "", 30, 576, 1536, 9, 3, 64, 49_152, True, 8192)
    assert choose_draft_vocabulary(smollm, [2], lambda w: 1.0) == 4096, "the smallest, if it loses nothing"
    assert choose_draft_vocabulary(smollm, [2], lambda w: 1.0 if w >= 16_384 else 0.7) == 16_384
    assert choose_draft_vocabulary(smollm, [2], lambda w: 0.3) == 0, "all tokens, if a part covers too little"
    small = Architecture("small", "", 6, 256, 512, 4, 4, 64, 16_000, True, 512)
    assert choose_draft_vocabulary(small, [2], lambda w: 1.0) == 0


@pytest.mark.parametrize("chunk", [5, 64])
def test_figures_are_those_of_the_whole_p_and_a_q_that_is_zero_elsewhere(chunk: int) -> None:
    torch.manual_seed(0)
    weight, teacher, student = (torch.randn(n, 8, dtype=torch.float64) for n in (20, 12, 12))
    ids = torch.tensor([1, 4, 5, 6, 11, 12, 13, 19])
    p, q = (teacher @ weight.t()).softmax(-1), torch.zeros(12, 20, dtype=torch.float64)
    q[:, ids] = (student @ weight[ids].t()).softmax(-1)
    inside = p[:, ids] / p[:, ids].sum(-1, keepdim=True)
    found = draft_statistics(weight, teacher, [student], chunk, ids)
    expected = {
        "overlap": torch.minimum(p, q).sum(-1),
        "match": (p.argmax(-1) == q.argmax(-1)).double(),
        "lost_mass": 1 - p[:, ids].sum(-1),
        "loss": (inside * (inside.log() - q[:, ids].log())).sum(-1),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name][0].double(), values, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a backbone, a run that distilled heads which draft 40 of its 258 tokens)"""
    folder = tmp_path_factory.mktemp("vocabulary")
    backbone = tiny_backbone(folder, sharpness=5)
    run = prepare(folder, backbone, "distill.draft_vocabulary=40", "distill.exit_layers=[2]", "distill.max_steps=20",
                  "distill.learning_rate=3e-3")  # fmt: skip
    distill.run(run)
    return backbone, run


def test_a_head_learns_only_what_it_can_draft_and_its_record_says_what_that_loses(trained) -> None:
    _, run = trained
    record = json.loads((run / "run.json").read_text())[-1]
    said, figures = record["draft_vocabulary"], record["heads"]["exit-2"]
    assert (said["size"], said["of"]) == (40, 258) and 0 < said["coverage"] < 1
    assert 0 < figures["lost_mass"] == figures["before"]["lost_mass"] < 1, "the teacher's alone"
    assert figures["overlap"] <= 1 - figures["lost_mass"]
    losses = [line["train/exit-2/loss"] for line in lines(run) if "train/exit-2/loss" in line]
    assert losses[-1] < losses[0] / 2


def test_its_text_is_the_backbones_and_its_drafts_are_of_its_vocabulary(trained) -> None:
    backbone, run = trained
    model, head = AutoModelForCausalLM.from_pretrained(backbone), ExitHead.load(run / "heads" / "exit-2")
    assert head.draft_ids_W is not None
    engine, request = SplitBackbone(model, head), Request([72, 5, 33, 190], 40)
    drafted = []

    class Watching(Sampler):
        def accept(self, drafts, q, p_logits_MV):
            drafted.extend(draft.token for draft in drafts)
            return super().accept(drafts, q, p_logits_MV)

    out = self_speculative(engine, request, Watching(), Fixed(2))
    assert out.tokens == autoregressive(engine, request, Sampler()).tokens
    assert len(drafted) > 20 and set(drafted) <= set(head.draft_ids_W.tolist())
    cache = engine.new_cache(8)
    engine.shallow([72, 5, 33, 190], 0, cache)
    few_W = engine.draft_logits([3], cache)[0]
    whole = SplitBackbone(model, ExitHead(2, 4, head.backbone, head.weights))
    again = whole.new_cache(8)
    whole.shallow([72, 5, 33, 190], 0, again)
    torch.testing.assert_close(few_W, whole.draft_logits([3], again)[0][head.draft_ids_W])
    assert engine.still_is(model)
    more = engine.extra_bytes(8)["head_bytes"] - whole.extra_bytes(8)["head_bytes"]
    assert more == 40 * 32 * 4
    model.lm_head.weight.data[head.draft_ids_W] *= 2  # in place, unnoticed by torch
    assert not engine.still_is(model)


def test_a_vocabulary_that_is_not_the_backbones_is_refused(trained, tmp_path) -> None:
    backbone, run = trained
    model, head = AutoModelForCausalLM.from_pretrained(backbone), ExitHead.load(run / "heads" / "exit-2")
    assert head.draft_ids_W is not None
    for wrong, message in [
        (head.draft_ids_W + 258, "belongs to another tokenizer"),
        (head.draft_ids_W.flip(0), "no ascending list"),
        (head.draft_ids_W.float(), "no ascending list"),
    ]:
        with pytest.raises(ValueError, match=message):
            SplitBackbone(model, ExitHead(2, 4, head.backbone, head.weights, wrong))
    head.save(tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"draft_vocabulary": 0}))
    with pytest.raises(ValueError, match=r"says draft_vocabulary=0, model\.safetensors holds 40 ids"):
        ExitHead.load(tmp_path / "head")
    ExitHead(2, 4, head.backbone, head.weights).save(tmp_path / "old")
    old = json.loads((tmp_path / "old" / "config.json").read_text())
    del old["draft_vocabulary"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(old | {"schema": 1}))
    assert ExitHead.load(tmp_path / "old").draft_ids_W is None


def test_more_tokens_than_there_are_and_all_of_them(trained, tmp_path) -> None:
    backbone, _ = trained
    with pytest.raises(UserError, match="draft_vocabulary=259: the backbone's vocabulary has 258 tokens"):
        distill.run(prepare(tmp_path / "more", backbone, "distill.draft_vocabulary=259"))
    run = prepare(tmp_path / "all", backbone, "distill.draft_vocabulary=258", "distill.max_steps=1")
    distill.run(run)
    assert ExitHead.load(run / "heads" / "exit-1").draft_ids_W is None
