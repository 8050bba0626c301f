"""From prompts to token ids: lengths that are let in, and chat templates that would not make the backbone answer."""

from dataclasses import replace

import pytest
from helpers import byte_tokenizer
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing

from pipeline.config import EvaluatePrompts, Prompts
from pipeline.errors import UserError
from pipeline.prompts.ids import encode, fitting
from pipeline.prompts.prompt import Prompt
from pipeline.prompts.templates import warn_of_turn_end
from pipeline.prompts.turns import every_turn, next_turn

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}[assistant]{% endif %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LAST_THOUGHT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
NO_SYSTEM = TURNS.replace("[{{ m.role }}]", "{% if m.role != 'system' %}[{{ m.role }}]").replace(
    "{{ m.content }}", "{{ m.content }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def prompts(*texts: str, system: str = "") -> list[Prompt]:
    return [Prompt(f"id {text[:3]}", (text,), "", system=system) for text in texts]


def contexts(found, tokenizer, settings) -> list[str]:
    return [tokenizer.decode(ids) for _, ids in encode(found, tokenizer, settings, 256, 16)]


# ---- lengths


def test_lengths_that_are_let_in(tokenizer, capsys) -> None:
    found = prompts(*("x" * n for n in (1, 4, 5, 9, 10, 30, 60)))
    settings = EvaluatePrompts(min_tokens=5, max_tokens=9)
    assert [len(ids) for _, ids in encode(found, tokenizer, settings, 64, 8)] == [5, 9]
    assert capsys.readouterr().out == (
        "evaluate.prompts.max_tokens=9: 3 of 7 prompts dropped (longer than 9 tokens)\n"
        "evaluate.prompts.min_tokens=5: 2 of 7 prompts dropped (shorter than 5 tokens)\n"
    )
    settings = Prompts(min_tokens=5, too_long="drop")
    assert [len(ids) for _, ids in encode(found, tokenizer, settings, 64, 8)] == [5, 9, 10, 30]
    assert "prompts.too_long=drop: 1 of 7 prompts dropped (longer than 56 tokens)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has 60 tokens; with 8 new ones it does not fit into the context of 64"):
        encode(found, tokenizer, Prompts(min_tokens=5, max_tokens=60), 64, 8)


def test_no_prompt_of_the_right_length(tokenizer) -> None:
    with pytest.raises(UserError, match=r"^prompts\.min_tokens=5: no prompt is left"):
        encode(prompts("abc"), tokenizer, Prompts(min_tokens=5), 64, 8)
    with pytest.raises(UserError, match=r"^prompts\.too_long=drop, max_tokens=2: no prompt is left"):
        encode(prompts("abc"), tokenizer, Prompts(max_tokens=2, too_long="drop"), 64, 8)


def test_lengths_are_those_of_the_first_turn(tokenizer) -> None:
    talk = Prompt("abc", ("one?", "two?"), "")
    entries = every_turn([talk], tokenizer, Prompts(max_tokens=5), 64, 8, lambda ids: tokenizer("answer")["input_ids"])
    assert [p.id for p, _ in entries] == ["abc", "abc.2"] and len(entries[1][1]) > 5
    assert entries[1][0] == next_turn(talk, " answer\n")
    assert next_turn(talk, " answer\n").conversation == ["one?", "answer", "two?"]


def test_only_as_many_as_are_wanted(tokenizer, capsys) -> None:
    """What comes after them is neither judged nor counted."""
    found = prompts("a" * 4, "b" * 90, "c" * 5, "d" * 90, "e" * 3)
    settings = Prompts(too_long="drop")
    assert [p.text[0] for p, _ in encode(found, tokenizer, settings, 64, 8, wanted=2)] == ["a", "c"]
    assert "1 of 3 prompts dropped" in capsys.readouterr().out
    assert [p.text[0] for p, _ in fitting(found, tokenizer, settings, 64, 8, wanted=9)] == ["a", "c", "e"]
    assert [p.text[0] for p, _ in encode(found, tokenizer, Prompts(), 64, 8, wanted=1)] == ["a"]
    many = prompts(*(f"{i:04}" for i in range(2500)))
    assert [p for p, _ in encode(many, tokenizer, settings, 64, 8)] == many


# ---- chat templates


def test_plain_text_has_no_place_for_a_system_message(tokenizer, capsys) -> None:
    assert contexts(prompts("a?", "b?", system="s"), tokenizer, Prompts()) == ["a?", "b?"]
    assert capsys.readouterr().out.startswith("prompts.chat_template=none: 2 system messages are left out")


def test_the_tokenizers_template_and_one_from_a_file(tokenizer, tmp_path, capsys) -> None:
    tokenizer.chat_template = TURNS + GENERATION
    found = prompts("a?", "b?") + prompts("c?", system="s")
    expected = ["[user]a?[assistant]", "[user]b?[assistant]", "[system]s[user]c?[assistant]"]
    assert contexts(found, tokenizer, Prompts(chat_template="tokenizer")) == expected
    (tmp_path / "own.jinja").write_text("Q: " + tokenizer.chat_template)
    own = Prompts(chat_template=str(tmp_path / "own.jinja"))
    assert contexts(found, tokenizer, own) == ["Q: " + text for text in expected]
    tokenizer.chat_template = None
    assert contexts(found, tokenizer, own) == ["Q: " + text for text in expected], "a base model brings none"
    assert not capsys.readouterr().out


def test_a_template_that_closes_the_users_turn_is_right(tokenizer, capsys) -> None:
    tokenizer.chat_template = LLAMA_2
    assert contexts(prompts("a?"), tokenizer, Prompts(chat_template="tokenizer")) == ["[INST] a? [/INST]"]
    assert not capsys.readouterr().out


def test_a_template_that_thinks_while_it_answers_is_told_of(tokenizer, capsys) -> None:
    tokenizer.chat_template = LAST_THOUGHT.replace("<assistant><think>", "<assistant><think>\n")
    assert contexts(prompts("a?"), tokenizer, Prompts(chat_template="tokenizer")) == ["<user>a?<assistant><think>\n"]
    assert "chat_template=tokenizer: warning: an answered question does not begin as" in capsys.readouterr().out
    tokenizer.chat_template = LAST_THOUGHT  # <assistant><think> begins <assistant><think></think>: nothing to tell
    contexts(prompts("a?"), tokenizer, Prompts(chat_template="tokenizer"))
    assert not capsys.readouterr().out


def test_a_template_that_drops_system_messages_is_told_of(tokenizer, capsys) -> None:
    tokenizer.chat_template = NO_SYSTEM + GENERATION
    settings = Prompts(chat_template="tokenizer")
    assert contexts(prompts("a?"), tokenizer, settings) == ["[user]a?[assistant]"] and not capsys.readouterr().out
    assert contexts(prompts("a?", system="s"), tokenizer, settings) == ["[user]a?[assistant]"]
    assert "warning: this template leaves the prompts' system messages out" in capsys.readouterr().out


WRONG = {
    "no assistant turn": (
        "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}" + GENERATION,
        "the template has no assistant turn",
    ),
    "no generation prompt": (TURNS, "add_generation_prompt adds nothing, so nothing tells the backbone to answer"),
    "no generation prompt, and an end that moves": (TURNS + "[end]", "add_generation_prompt adds nothing"),
    "no user": ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}[me]",
                "the template leaves out what the user says"),
    "no template": ("{% for m in messages %}", "the template cannot be rendered: "),
    "refuses": ("{{ raise_exception('never') }}", "the template cannot be rendered: never. Mend it."),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_template_that_cannot_be_right(tokenizer, tmp_path, template, message) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(template)
    with pytest.raises(UserError) as caught:
        encode(prompts("a?"), tokenizer, EvaluatePrompts(chat_template=str(path)), 256, 16)
    assert str(caught.value).startswith(f"evaluate.prompts.chat_template={path}: {message}")


def test_no_template_at_all(tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match=r"prompts\.chat_template=tokenizer: this tokenizer has no chat template"):
        encode(prompts("a?"), tokenizer, Prompts(chat_template="tokenizer"), 256, 16)
    with pytest.raises(UserError, match=r"prompts\.chat_template=.*none\.jinja: no such file"):
        encode(prompts("a?"), tokenizer, Prompts(chat_template=str(tmp_path / "none.jinja")), 256, 16)


def test_a_template_that_refuses_system_messages(tokenizer) -> None:
    tokenizer.chat_template = LLAMA_2
    settings = replace(Prompts(), chat_template="tokenizer")
    with pytest.raises(UserError) as caught:
        encode(prompts("a?") + prompts("b?", system="s"), tokenizer, settings, 256, 16)
    assert str(caught.value).startswith(
        "prompts.chat_template=tokenizer: some prompts have a system message, which this template does not take"
    )
    assert "System role not supported" in str(caught.value) and "take the system messages out" in str(caught.value)


# ---- what stands around a prompt


def adding(tokenizer, *, before: str = "", behind: str = ""):
    """A tokenizer that puts these special tokens around every text by itself."""
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, behind) if token]
    single = " ".join(filter(None, [before, "$A", behind]))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, pair=None, special_tokens=named)
    return tokenizer


def test_an_end_token_that_the_tokenizer_adds_is_left_out_behind_a_prompt(tokenizer, capsys) -> None:
    adding(tokenizer, behind="<|endoftext|>")
    assert tokenizer("a?")["input_ids"][-1] == 256
    assert contexts(prompts("a?", "b?"), tokenizer, Prompts()) == ["a?", "b?"]
    assert capsys.readouterr().out.startswith("prompts: the tokenizer ends every text with <|endoftext|>; behind a")
    talk = Prompt("abc", ("one?", "two?"), "")
    turns = every_turn([talk], tokenizer, Prompts(), 64, 8, lambda ids: [65, 66, 256])
    assert all(256 not in ids for _, ids in turns) and len(turns) == 2


def test_a_begin_token_is_given_once(tokenizer, capsys) -> None:
    adding(tokenizer, before="<|pad|>")
    found = prompts("<|pad|>a?", "b?", "<|pad|><|pad|>c?")
    assert contexts(found, tokenizer, Prompts()) == ["<|pad|>a?", "<|pad|>b?", "<|pad|>c?"]
    assert (
        "prompts: 2 prompts begin with the token that the tokenizer begins every text with" in capsys.readouterr().out
    )


@pytest.mark.parametrize("before", ["", "<|pad|>"])
def test_a_prompt_without_tokens_of_its_own_is_skipped(tokenizer, capsys, before) -> None:
    tokenizer._tokenizer.normalizer = Replace("~", "")
    adding(tokenizer, before=before)
    assert [p.text for p, _ in encode(prompts("a?", "~~"), tokenizer, Prompts(), 64, 8)] == ["a?"]
    assert "prompts: 1 of 2 prompts have no token of their own and are skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^prompts: no prompt is left"):
        encode(prompts("~~"), tokenizer, Prompts(), 64, 8)


def test_an_end_token_in_the_prompts_own_text_is_warned_of(tokenizer, capsys) -> None:
    encode(prompts("a?<|endoftext|>", "b?"), tokenizer, Prompts(), 64, 8)
    assert "prompts: warning: 1 prompts end with <|endoftext|>, which ends a text" in capsys.readouterr().out


def test_prompts_that_were_rendered_already_are_warned_of(tokenizer, capsys) -> None:
    tokenizer.chat_template = TURNS + GENERATION
    encode(prompts("<|pad|>user: a?", "b?"), tokenizer, Prompts(chat_template="tokenizer"), 64, 8)
    assert "warning: 1 prompts begin with a special token, as if a template" in capsys.readouterr().out


@pytest.mark.parametrize(("length", "remedy"), [(60, ""), (48, ""), (44, " or evaluate.max_new_tokens=4")])
def test_evaluates_remedy_for_a_long_prompt_leaves_generate_as_it_is(tokenizer, length, remedy) -> None:
    """No number of new tokens is a remedy for a prompt that alone fills the context."""
    with pytest.raises(UserError) as caught:
        every_turn(prompts("x" * length), tokenizer, Prompts(), 48, 8, list)
    end = f"context of 48. Set evaluate.prompts.too_long=drop{remedy}. Other stages stay done."
    assert str(caught.value).endswith(end)


# ---- where an answer ends

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_whose_turns_end_nothing_is_warned_of(tokenizer, tmp_path, capsys) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = CHATML
    settings = Prompts(chat_template="tokenizer")
    warn_of_turn_end("generate", tokenizer, settings, [256])
    told = capsys.readouterr().err
    assert f"ends an answer with <|im_end|> (id {end}), which ends no text" in told
    assert "<|endoftext|> (id 256)" in told and "backbone.end_tokens=['<|im_end|>']" in told
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    warn_of_turn_end("generate", tokenizer, settings, [256])
    assert "writes '</s>' behind an answer, 4 tokens of this tokenizer" in capsys.readouterr().err
    tokenizer.chat_template = CHATML
    warn_of_turn_end("generate", tokenizer, settings, [256, end])
    warn_of_turn_end("generate", tokenizer, Prompts(), [256])  # plain text has no turns
    tokenizer.chat_template = TURNS + GENERATION  # nothing behind an answer
    warn_of_turn_end("generate", tokenizer, settings, [256])
    assert not capsys.readouterr().err
