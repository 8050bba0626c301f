"""Rows of prompt files: chats of both kinds, instructions, the source's own answers, and what cannot be used."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Prompts
from pipeline.errors import UserError
from pipeline.prompts.prompt import Prompt, prompt_id
from pipeline.prompts.records import source_record
from pipeline.prompts.sets import load_prompts


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path, **changes) -> list[Prompt]:
    return load_prompts(Prompts(path=str(path), held_out=0.0, **changes), "distill")


def one(tmp_path, row, **changes) -> Prompt:
    (prompt,) = read(write(tmp_path / "p.jsonl", [row]), **changes)
    return prompt


def openai(*said: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def sharegpt(*said: tuple[str, object]) -> dict:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in said]}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


# Each: the row -> (system, turns, originals).
CHATS = {
    "OpenAI": (
        openai(("system", "be brief"), ("user", "a?"), ("assistant", "A"), ("user", "b?"), ("assistant", "B")),
        ("be brief", ("a?", "b?"), ("A", "B")),
    ),
    "ShareGPT": (
        sharegpt(("system", "s"), ("human", "a?"), ("gpt", "A"), ("human", "b?")),
        ("s", ("a?", "b?"), ("A",)),
    ),
    "other names of speakers": (
        sharegpt(("user", "a?"), ("chatgpt", "A"), ("Human", "b?"), ("bing", "B"), ("human", "c?"), ("bard", "C")),
        ("", ("a?", "b?", "c?"), ("A", "B", "C")),
    ),
    "the assistant first": (
        sharegpt(("gpt", "hello"), ("gpt", "there"), ("human", "a?"), ("gpt", "A")),
        ("", ("a?",), ("A",)),
    ),
    "one speaker twice": (
        openai(("system", "s"), ("system", "t"), ("user", "a"), ("user", "b?"), ("assistant", "A"), ("assistant", "B")),
        ("s\n\nt", ("a\n\nb?",), ("A\n\nB",)),
    ),
    "content in parts": (openai(("user", parts("a", "b?")), ("assistant", parts("A"))), ("", ("a\n\nb?",), ("A",))),
    "an empty answer": (
        openai(("user", "a?"), ("assistant", ""), ("user", "b?"), ("assistant", "B")),
        ("", ("a?", "b?"), ("", "B")),
    ),
    "a conversation column": (
        {"conversation": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"}]},
        ("", ("a?",), ("A",)),
    ),
    "a prompt that is messages, and what was chosen": (
        {
            "prompt": [{"role": "user", "content": "a?"}],
            "chosen": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"}],
        },
        ("", ("a?",), ("A",)),
    ),
    "a chat says more than the prompt beside it": (
        {"prompt": "a?", **openai(("user", "a?"), ("assistant", "A"), ("user", "b?"))},
        ("", ("a?", "b?"), ("A",)),
    ),
    "an instruction": ({"instruction": "add", "output": "3"}, ("", ("add",), ("3",))),
    "an instruction with input": (
        {"instruction": "add", "input": "1, 2", "output": "3"},
        ("", ("add\n\n1, 2",), ("3",)),
    ),
    "an instruction with empty input": ({"instruction": "add", "input": ""}, ("", ("add",), ())),
    **{
        f"a prompt and its {name}": ({"prompt": "a?", name: "A"}, ("", ("a?",), ("A",)))
        for name in ("answer", "response", "output", "completion", "chosen")
    },
    "an answer that is no text": ({"question": "a?", "answer": 3}, ("", ("a?",), ())),
    "the first answer that says something": (
        {"question": "a?", "answer": " ", "response": "A", "output": "B"},
        ("", ("a?",), ("A",)),
    ),
    "turns have no answers here": ({"turns": ["a?", "b?"], "answer": "B"}, ("", ("a?", "b?"), ())),
}


SAID = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "it's A"},
    {"role": "user", "content": "b?"},
]
HUMAN = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "it's A"}, {"from": "human", "value": "b?"}]
AS_TEXT = {
    **{f"{name} as JSON": {name: json.dumps(SAID)} for name in ("messages", "conversations", "conversation", "prompt")},
    **{f"{name} as Python prints it": {name: str(HUMAN)} for name in ("messages", "conversations", "text")},
    "each message as JSON": {"messages": [json.dumps(message) for message in SAID]},
    "indented": {"messages": "\n " + json.dumps(SAID, indent=2)},
}


@pytest.mark.parametrize("row", AS_TEXT.values(), ids=AS_TEXT.keys())
def test_a_chat_written_as_text_is_a_chat(tmp_path, row) -> None:
    """Its answer must not become part of the prompt."""
    prompt = one(tmp_path, row)
    assert (prompt.turns, prompt.originals) == (("a?", "b?"), ("it's A",))


def test_other_lists_as_text(tmp_path) -> None:
    assert one(tmp_path, {"turns": '["a?", "b?"]'}).turns == ("a?", "b?")
    assert one(tmp_path, {"prompt": json.dumps(SAID[0])}).turns == ("a?",)
    chosen = {"prompt": "a?", "chosen": json.dumps(SAID[:2])}
    assert one(tmp_path, chosen).originals == ("it's A",)
    for text in ('[{"name": "Ann"}, {"name": "Bob"}]', "[1, 2]", "{x}", "[INST] a? [/INST]"):
        assert one(tmp_path, {"prompt": text}).turns == (text,), "a prompt about lists, or in brackets"


BROKEN_CHATS = {
    "cut off": ("messages", json.dumps(SAID)[:40]),
    "commas lost": ("conversations", str(HUMAN).replace("}, {", "}\n {")),
    "cut off, in prompt": ("prompt", json.dumps(SAID)[:40]),
    "rendered": ("messages", "User: a?\nAssistant: A"),
}


@pytest.mark.parametrize(("name", "text"), BROKEN_CHATS.values(), ids=BROKEN_CHATS.keys())
def test_text_that_should_be_a_chat_and_is_none_is_refused(tmp_path, name, text) -> None:
    with pytest.raises(UserError, match=f"column {name} holds text that is no list of messages"):
        one(tmp_path, {name: text})


MARKS = {
    "byte order mark": "\ufeffwhat is it?",
    "zero-width spaces around it": "\u200bwhat is it?\u2060\u200b",
    "a NUL": "what\0 is it?\0",
    "carriage returns": "what is it?\r\n",
}


@pytest.mark.parametrize("text", MARKS.values(), ids=MARKS.keys())
def test_marks_that_editors_leave_are_taken_out(tmp_path, capsys, text) -> None:
    expected = "what is it?\n" if text.endswith("\n") else "what is it?"
    rows = [{"prompt": text}, openai(("user", text), ("assistant", "A")), {"turns": [text, text]}]
    for row in rows:
        assert set(one(tmp_path, row).turns) == {expected}
        assert "are taken out of 1 of 1 rows" in capsys.readouterr().out
    assert one(tmp_path, {"prompt": "\u0e01\u200b\u0e02"}).text == "\u0e01\u200b\u0e02", "as in Thai"
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_a_file_that_begins_with_a_byte_order_mark(tmp_path, kind) -> None:
    text = {"jsonl": '{"prompt": "a"}\n\ufeff{"prompt": "b"}\n', "json": '[{"prompt": "a"}, {"prompt": "b"}]',
            "txt": "a\r\n\ufeffb\r\n"}[kind]  # fmt: skip
    (tmp_path / f"p.{kind}").write_bytes(("\ufeff" + text).encode())
    assert sorted(p.text for p in read(tmp_path / f"p.{kind}")) == ["a", "b"]


def test_prompts_that_cannot_be_seen_are_empty(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "\u200b \ufeff"}, {"prompt": "\u200e\u00ad"}])
    assert [p.text for p in read(path)] == ["a"]
    assert "2 of 3 rows have an empty prompt and are skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("row", "expected"), CHATS.values(), ids=CHATS.keys())
def test_what_a_row_says(tmp_path, row, expected) -> None:
    prompt = one(tmp_path, row)
    assert (prompt.system, prompt.turns, prompt.originals) == expected
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [prompt]


def test_a_named_column_may_hold_a_chat(tmp_path) -> None:
    row = {"prompt": "other", "talk": [{"role": "user", "content": "a?"}]}
    assert one(tmp_path, row, column="talk").turns == ("a?",)
    assert one(tmp_path, row).turns == ("other",)


def test_conversation_and_id(tmp_path) -> None:
    said = [("user", "a?"), ("assistant", "A"), ("user", "b?")]
    plain, led = one(tmp_path, openai(*said)), one(tmp_path, openai(("system", "s"), *said))
    assert plain.conversation == led.conversation == ["a?"], "nothing is answered by the source's own text"
    assert plain.id == one(tmp_path, {"turns": ["a?", "b?"]}).id == prompt_id(("a?", "b?"))
    assert led.id == prompt_id(("a?", "b?"), "s") != plain.id
    assert not hasattr(plain, "__dict__"), "slots: there may be millions"


def test_rows_of_blank_chats_are_skipped_and_counted(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", [openai(("user", "a?")), {"messages": []}, openai(("assistant", "A"))])
    assert [p.text for p in read(path)] == ["a?"]
    assert f"prompts.path={path}: 2 of 3 rows have an empty conversation and are skipped" in capsys.readouterr().out


UNUSABLE = {
    "not JSON": ('{"prompt": ', "not JSON: Expecting value"),
    "no object": (["a"], "an object such as"),
    "a column missing": ({"other": "a"}, "no prompt"),
    "a text of the wrong kind": ({"prompt": 3}, "column prompt holds a int"),
    "a tool": (openai(("user", "a?"), ("tool", "4")), "message 2 is of role tool; these are known: system, user"),
    "a function": (sharegpt(("human", "a?"), ("function_call", "f()")), "message 2 is of role function_call"),
    "no role": ({"messages": [{"content": "a?"}]}, "message 1 is of role None"),
    "no message": ({"messages": ["a?"]}, "message 1 is a str; role and content are needed"),
    "no content": (openai(("user", "a?"), ("assistant", None)), "message 2 has no text as its content"),
    "a picture": (openai(("user", [*parts("a?"), {"type": "image_url"}])), "message 1 has a part that is no text"),
    "a late system message": (openai(("user", "a?"), ("system", "s")), "message 2 is a system message after the first"),
    "nothing asked": (openai(("user", "a?"), ("assistant", "A"), ("user", " ")), "a user's message is empty"),
}


@pytest.mark.parametrize(("row", "why"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_row_that_cannot_be_used_stops_or_is_left_out(tmp_path, capsys, row, why) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, "", row, {"prompt": "b"}])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"prompts.path={path}: line 3: {why}")
    assert str(caught.value).endswith(
        ": 1 of 3 rows cannot be used. Mend them or take them out, or set prompts.bad_rows=skip to go on without them."
    )
    assert {p.text for p in read(path, bad_rows="skip")} == {"a", "b"}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"prompts.bad_rows=skip: 1 of 3 rows of p.jsonl are left out (line 3: {why}")
    record = source_record(Prompts(path=path, bad_rows="skip"))
    assert (record["rows"], record["bad_rows"]) == (3, 1)
    assert not capsys.readouterr().out, "said once, by what gives the prompts"


def test_the_first_unusable_rows_are_named_and_all_are_counted(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{i}"} if i % 2 else "{" for i in range(10)])
    why = "not JSON: Expecting property name enclosed in double quotes (column 2)"
    three = "; ".join(f"line {n}: {why}" for n in (1, 3, 5))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{three} ...: 5 of 10 rows cannot be used" in str(caught.value)
    assert len(read(path, bad_rows="skip")) == 5
    assert f"5 of 10 rows of p.jsonl are left out ({three} ...)\n" in capsys.readouterr().out


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_a_file_of_nothing_else_is_refused(tmp_path, bad_rows) -> None:
    path = write(tmp_path / "p.jsonl", ["{", "["])
    with pytest.raises(UserError, match=r"2 of 2 rows cannot be used\. Mend them or take them out\.$"):
        read(path, bad_rows=bad_rows)


def test_lines_that_are_not_utf8_are_bad_rows(tmp_path) -> None:
    for name, row in (("p.jsonl", b'{"prompt": "a"}'), ("p.txt", b"a")):
        (tmp_path / name).write_bytes(row + b"\n\xff\n")
        with pytest.raises(UserError, match=r"line 2: not UTF-8 text: invalid start byte: 1 of 2 rows"):
            read(tmp_path / name)
        assert [p.text for p in read(tmp_path / name, bad_rows="skip")] == ["a"]
    (tmp_path / "p.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"p\.json: cannot be read as UTF-8 text"):
        read(tmp_path / "p.json")


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n', newline="")
    assert {p.text for p in read(path)} == {"a\u2028b", "c"}
