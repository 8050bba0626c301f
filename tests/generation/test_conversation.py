"""A conversation has the contexts of the pipeline and the tokens of the backbone, and survives what ends an answer."""

import time

import pytest
import torch
from helpers import make_run, plant_heads

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import Chat, Prompts
from pipeline.errors import UserError
from pipeline.generation.conversation import Conversation
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.prompt import Prompt
from pipeline.prompts.turns import every_turn

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An engine with an untrained head behind layer 2 of 4, of which some drafts are accepted, and a tokenizer."""
    run = make_run(tmp_path_factory.mktemp("chat"))
    plant_heads(run, 2)
    model = load_model(run.config.backbone, torch.device("cpu"))
    tokenizer = load_tokenizer(run.config.backbone)
    tokenizer.chat_template = TEMPLATE
    return SplitBackbone(model, ExitHead.load(run / "heads" / "exit-2")), tokenizer


def conversation(parts, *, plain: bool = True, controller: str = "fixed:2", **settings) -> Conversation:
    engine, tokenizer = parts
    chat = Chat(**{"max_new_tokens": 24} | settings)
    prompts = Prompts(chat_template="none" if plain else "tokenizer")
    held = make_controller(controller, greedy=chat.temperature == 0)
    return Conversation(engine, held, tokenizer, frozenset({256}), prompts, chat)


def shown_nowhere(text: str, accepted: bool) -> None:
    pass


@pytest.mark.parametrize("plain", [True, False], ids=["text", "template"])
def test_every_turn_is_what_the_pipeline_decodes(parts, plain: bool) -> None:
    """Contexts are those of evaluate, turn by turn, and greedy ids are those of autoregressive decoding."""
    engine, tokenizer = parts
    talk = conversation(parts, plain=plain, system="" if plain else "be short")
    turns = ("tell me", "and then?", "  why \n")

    def answer(ids: list[int]) -> list[int]:
        return autoregressive(engine, Request(ids, 24, frozenset({256})), Sampler()).tokens

    asked = Prompt("p", turns, "", system=talk.settings.system)
    expected = every_turn([asked], tokenizer, talk.prompts, engine.max_context, 24, answer)
    rounds = []
    for message, (_, ids) in zip(turns, expected, strict=True):
        given = talk.answer(message, shown_nowhere)
        assert given.ids == ids and given.out.tokens == answer(ids)
        rounds += given.out.rounds
    assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds), "or this tests nothing"


def test_drafts_are_copied_from_the_conversation_too(parts) -> None:
    talk = conversation(parts, controller="none+lookup", max_new_tokens=60)
    given = talk.answer("tell me, tell me, tell me, tell me, ", shown_nowhere)
    assert any(r.source == "lookup" and r.accepted for r in given.out.rounds)


def test_drafts_branch_in_a_conversation_too(parts) -> None:
    talk = conversation(parts, controller="tree:2x2+lookup", max_new_tokens=40)
    given = talk.answer("tell me, tell me, ", shown_nowhere)
    assert any(r.parents and r.accepted for r in given.out.rounds)
    plain, differ = talk.compare()
    assert differ == 0 and plain.tokens == given.out.tokens


class Named:
    """A tokenizer whose tokens have names, so that pieces of text tell which token they come from."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def __call__(self, *given, **how):
        return self.tokenizer(*given, **how)

    def decode(self, ids: list[int], **how) -> str:
        return "".join(f"<{token}>" for token in ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepted_drafts_and_the_backbones_own_tokens_are_told_apart(parts, temperature: float) -> None:
    talk = conversation((parts[0], Named(parts[1])), temperature=temperature)
    seen: list[tuple[str, bool]] = []
    out = talk.answer("tell me", lambda text, accepted: seen.append((text, accepted))).out
    expected = [False]  # the first token follows the prompt
    for r in out.rounds:
        expected += ([True] * r.accepted + [False])[: r.tokens]
    assert seen == [(f"<{token}>", draft) for token, draft in zip(out.tokens, expected, strict=True)]
    assert True in expected


def test_text_is_shown_while_it_is_decoded(parts) -> None:
    """After every round, not at the end: the backbone has run as often as there are rounds before each piece."""
    engine, _ = parts
    talk = conversation((engine, Named(parts[1])))
    rounds = [0]
    observe = talk.controller.observe
    talk.controller.observe = lambda r: (rounds.append(rounds[-1] + 1), observe(r))
    at: list[int] = []
    out = talk.answer("tell me", lambda text, accepted: at.append(rounds[-1])).out
    assert at == [0, *(i for i, r in enumerate(out.rounds, start=1) for _ in range(r.tokens))]


def test_an_answer_that_is_stopped_stays_in_the_conversation(parts) -> None:
    _, tokenizer = parts
    talk = conversation(parts)
    whole = conversation(parts).answer("tell me", shown_nowhere).out.tokens
    asked = iter([False] * 4 + [True] * 2)
    given = talk.answer("tell me", shown_nowhere, lambda: next(asked))
    assert given.out.tokens == whole[:5] and next(asked), "the first yes ends it"
    then = talk.answer("go on", shown_nowhere)
    text = "\n\n".join(["tell me", tokenizer.decode(whole[:5]).strip(), "go on"])
    assert then.ids == tokenizer(text)["input_ids"]


def test_what_breaks_off_an_answer_leaves_the_conversation_as_it_was(parts) -> None:
    talk, other = conversation(parts), conversation(parts)
    for one in (talk, other):
        one.answer("tell me", shown_nowhere)

    def broken(text: str, accepted: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer("lost", broken)
    assert talk.answer("go on", shown_nowhere).ids == other.answer("go on", shown_nowhere).ids


def test_a_controller_learns_over_the_whole_conversation(parts) -> None:
    talk = conversation(parts, controller="thompson")
    talk.warm_up()
    assert talk.controller.rounds == 0, "not from slow first passes"
    count = len(talk.answer("tell me", shown_nowhere).out.rounds)
    talk.reset()
    count += len(talk.answer("tell me", shown_nowhere).out.rounds)
    assert talk.controller.rounds == count > 0


def test_a_full_context_is_said_and_reset_is_the_remedy(parts) -> None:
    talk = conversation(parts, max_new_tokens=500)
    talk.ends = frozenset()
    given = talk.answer("x" * 230, shown_nowhere)
    assert given.full and len(given.ids) + len(given.out.tokens) == parts[0].max_context == 256
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens.* context is 256.*/reset"):
        talk.answer("more", shown_nowhere)
    talk.reset()
    assert talk.answer("x" * 230, shown_nowhere).out.tokens == given.out.tokens
    talk.reset()
    with pytest.raises(UserError, match=r"this message has 300 tokens.*shorter"):
        talk.answer("x" * 300, shown_nowhere)
    with pytest.raises(UserError, match="no token"):
        talk.answer("", shown_nowhere)
    assert not conversation(parts, max_new_tokens=3).answer("tell me", shown_nowhere).full


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_comparison_decodes_the_same_answer_and_changes_nothing(parts, temperature: float) -> None:
    talk, other = (conversation(parts, temperature=temperature) for _ in range(2))
    with pytest.raises(UserError, match="/compare"):
        talk.compare()
    answers = [one.answer("tell me", shown_nowhere).out for one in (talk, other)]
    plain, differ = talk.compare()
    assert plain.tokens == answers[0].tokens == answers[1].tokens and plain.seconds > 0
    assert (differ == 0) == (temperature == 0), "greedy it chooses the same; when sampling it draws other numbers"
    assert talk.answer("go on", shown_nowhere).out.tokens == other.answer("go on", shown_nowhere).out.tokens


def test_time_spent_on_showing_is_no_time_of_decoding(parts) -> None:
    out = conversation(parts).answer("tell me", lambda text, accepted: time.sleep(0.05)).out
    rounds = sum(r.seconds for r in out.rounds)
    assert len(out.tokens) == 24 and out.seconds < rounds + 0.5, "24 naps are 1.2 s"
