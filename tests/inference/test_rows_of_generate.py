"""Batches of rows through custom_generate: every row is that of transformers' own `generate`."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_backbone
from oracles import head_for, load
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed

from pipeline.inference import custom_generate
from pipeline.inference.batch_controllers import make_batch_controller
from pipeline.inference.batch_engine import BatchEngine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, folder of an untrained head, left-padded batch of five prompts)."""
    folder = tmp_path_factory.mktemp("rows")
    model = load(tiny_backbone(folder, sharpness=4.0))
    head_for(model, 2).save(folder / "head")
    prompts = [[7, 8, 9, 7, 8], [5], [200, 3, 3, 3, 3, 3, 3, 90], [11, 12], [250, 1, 17]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return model, str(folder / "head"), {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


def ours(tiny, **options) -> torch.Tensor:
    model, head, batch = tiny
    return custom_generate.generate(model=model, exit_head=head, **{**batch, **options})


@pytest.mark.parametrize("controller", [None, "thompson", "fixed:3", "table:1=3,3=1", "tree:2x2", "thompson+lookup"])
@pytest.mark.parametrize("ends", [None, [3, 30, 33, 60, 99, 120, 121, 222]])
def test_greedy_rows_are_those_of_generate(tiny, controller, ends) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends}
    expected = tiny[0].generate(**tiny[2], **options)
    with torch.no_grad():
        found = ours(tiny, controller=controller, **options)
    assert torch.equal(found, expected)


def test_the_rows_are_decoded_together_where_that_is_known(tiny, monkeypatch) -> None:
    passes, full = [], BatchEngine.deep
    monkeypatch.setattr(BatchEngine, "deep", lambda self, spans: passes.append(len(spans)) or full(self, spans))
    kinds = [("fixed:1", True), ("tree:2x2", True), ("thompson+tree", False), (make_batch_controller("thompson"), True)]
    for controller, together in kinds:
        passes.clear()
        ours(tiny, controller=controller, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert bool(passes) == together and (not passes or max(passes) == 5)
    one = {name: value[:1] for name, value in tiny[2].items() if name != "pad_token_id"}
    ours(tiny, controller=make_batch_controller("fixed:1"), max_new_tokens=8, do_sample=False, **one)
    ours(tiny, controller="table:1=3", max_new_tokens=8, do_sample=False, **one)
    for controller in ("table:1=3", make_batch_controller("fixed:1")):
        with pytest.raises(ValueError, match="cannot be decoded with a streamer"):
            ours(
                tiny,
                controller=controller,
                streamer=SimpleNamespace(put=id, end=id),
                max_new_tokens=8,
                do_sample=False,
                **one,
            )


def test_a_criterion_stops_its_own_row(tiny) -> None:
    class Even(StoppingCriteria):
        """After the second even token of a row."""

        def __call__(self, input_ids, scores, **kwargs):
            new = input_ids[:, 8:]
            return ((new % 2 == 0).sum(1) >= 2) & (new[:, -1:] % 2 == 0).any(1)

    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 255}  # without, transformers pads no row
    expected = tiny[0].generate(**tiny[2], **options, stopping_criteria=StoppingCriteriaList([Even()]))
    found = ours(tiny, controller="fixed:3", **options, stopping_criteria=StoppingCriteriaList([Even()]))
    assert len({int((row != 0).sum()) for row in found}) > 1 and torch.equal(found, expected)


def test_sampled_rows_are_repeated_by_a_seed_and_differ_from_each_other(tiny) -> None:
    same = {name: value[:1].repeat(4, 1) for name, value in tiny[2].items() if name != "pad_token_id"}
    found = []
    for seed in (1, 1, 2):
        set_seed(seed)
        found.append(ours(tiny, controller="fixed:2", max_new_tokens=16, do_sample=True, eos_token_id=None, **same))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len({tuple(row.tolist()) for row in found[0]}) == 4


def test_more_rows_than_memory_holds_are_decoded_in_turns_and_that_is_said_once(tiny, monkeypatch) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    monkeypatch.setattr(BatchEngine, "fitting", lambda self, length: 2)
    with pytest.warns(UserWarning, match="the memory that is free holds 2 of these 5 rows") as caught:
        found = ours(tiny, controller="fixed:2", **options)
    assert len(caught) == 1 and torch.equal(found, tiny[0].generate(**tiny[2], **options))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(tiny, controller="fixed:2", **options)


def test_a_rows_error_ends_the_call(tiny) -> None:
    class Breaks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ours(tiny, controller="fixed:2", max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Breaks()]))
