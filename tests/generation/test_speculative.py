"""The speculative answerer: what it answers does not depend on how many questions it answers at once."""

import pytest
from helpers import tiny_backbone
from oracles import head_for, load

from pipeline.config import load as load_config
from pipeline.generation.answerers import registry
from pipeline.generation.answerers.interface import Question, Sampling
from pipeline.generation.answerers.speculative import Speculative
from pipeline.inference import kernels
from pipeline.inference.batch_engine import BatchEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny_backbone(tmp_path_factory.mktemp("speculative"), sharpness=4.0)).double()


QUESTIONS = [Question([i + 3, 7, 9, *range(i)], [], temperature=i % 2) for i in range(9)]


def answers(model, controller: str, batch_size: int, seed: int = 5) -> list[list[int]]:
    head, told = head_for(model.float(), 2), []
    answerer = Speculative(model.double(), head, controller, {3, 60, 99})
    found = answerer.answer(QUESTIONS, Sampling(20, 0.95, batch_size, seed), lambda done, new: told.append((done, new)))
    assert sum(done for done, _ in told) == len(QUESTIONS)
    assert sum(new for _, new in told) == sum(len(answer.ids) for answer in found)
    assert all(answer.finished == (answer.ids[-1] in {3, 60, 99}) for answer in found)
    return [answer.ids for answer in found]


@pytest.mark.parametrize("controller", ["fixed:2", "confidence:0.2", "tree:2x1"])
def test_any_number_at_once_gives_the_same_answers(model, controller: str, monkeypatch) -> None:
    texts, full = [], BatchEngine.deep
    monkeypatch.setattr(BatchEngine, "deep", lambda self, spans: texts.append(len(spans)) or full(self, spans))
    one, some = answers(model, controller, 1), answers(model, controller, 4)
    assert one == some and max(texts) == 4
    other = answers(model, controller, 4, seed=6)
    assert [a == b for a, b in zip(one, other, strict=True)][::2] == [True] * 5 and one != other  # the greedy ones


def test_greedy_answers_do_not_depend_on_whether_drafts_branch(model) -> None:
    assert answers(model, "tree:2x1", 4)[::2] == answers(model, "fixed:1", 4)[::2]


def test_a_table_drafts_by_the_number_of_texts(model, monkeypatch) -> None:
    """Of four at once nobody drafts, until fewer are left. Equal calls give equal answers, sampled ones too."""
    drafted, full = set(), BatchEngine.draft_logits
    monkeypatch.setattr(
        BatchEngine, "draft_logits", lambda self, asked: drafted.add(len(self.places.texts)) or full(self, asked)
    )
    name = "table:1=2,4=0"
    found = answers(model, name, 4)
    assert found == answers(model, name, 4) and drafted and drafted <= {1, 2, 3}
    assert found[::2] == answers(model, "fixed:1", 4)[::2]
    assert answers(model, name, 1) == answers(model, "fixed:2", 1), "one at a time"


@pytest.mark.parametrize("pack", ["auto", "off"])
def test_weights_are_copied_only_where_that_is_allowed(model, pack: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(registry, "_head", lambda config: head_for(model.float(), 2))
    config = load_config(None, ["generate.engine=speculative", f"machine.pack={pack}"])
    answerer = registry.make_answerer(config, lambda: model.float(), None, [3])
    assert (answerer.backbone.extra_bytes(8)["packed_bytes"] > 0) == (pack == "auto")
