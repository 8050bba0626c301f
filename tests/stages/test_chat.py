"""The verb chat as it is typed: on a terminal, in a pipe, and every mistake in one message."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import make_run, plant_heads, tiny_backbone

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.cli import main
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.stages import chat

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a backbone, tiny-llama, and heads behind its layer 2: runs/t/heads/exit-2."""
    place = tmp_path_factory.mktemp("talk")
    plant_heads(make_run(place), 2)
    return place


def words(place: Path, *more: str) -> list[str]:
    head = place / "runs" / "t" / "heads" / "exit-2"
    return ["chat", "--head", str(head), "--backbone", str(place / "tiny-llama"), "--max-new-tokens", "24",
            "--controller", "fixed:2", "machine.device=cpu", *more]  # fmt: skip


def pipe(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Let `text` be what comes through stdin."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


@pytest.fixture(scope="module")
def expected(place: Path):
    """message -> the text with which the backbone goes on, by autoregressive decoding."""
    config = make_run(place).config
    model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
    engine = SplitBackbone(model, ExitHead.load(place / "runs" / "t" / "heads" / "exit-2"))

    def answer(message: str) -> str:
        request = Request(tokenizer(message)["input_ids"], 24, frozenset({tokenizer.eos_token_id}))
        return tokenizer.decode(autoregressive(engine, request, Sampler()).tokens, skip_special_tokens=True)

    return answer


def test_in_a_pipe_answers_go_to_stdout_and_all_else_to_stderr(place, expected, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    pipe(monkeypatch, "tell me\n\n/compare\n/reset\nand \\\nthen\n/quit\nnever asked\n")
    assert main(words(place)) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{expected(message)}\n" for message in ("tell me", "and \nthen"))
    assert "\x1b" not in out + err and err.count("tokens/s (first after") == 2
    assert "acceptance length" in err and "draft acceptance rate" in err and "no chat template" in err
    assert err.count("speedup") == 1 and "which chooses the same tokens" in err


def test_every_answer_is_compared_where_that_is_asked_for(place, monkeypatch, capsys) -> None:
    pipe(monkeypatch, b"tell me\ncaf\xff")  # bytes that are no text, and no line end, do not matter
    assert main(words(place, "chat.compare=true", "--temperature", "0.8", "--top-p", "0.9", "seed=3")) == 0
    out, err = capsys.readouterr()
    assert err.count("speedup") == 2 and "chooses" not in err and out


def test_nothing_asked_is_no_mistake(place, monkeypatch, capsys) -> None:
    pipe(monkeypatch, "\n \n")
    assert main(words(place)) == 0 and not capsys.readouterr().out


MISTAKES = {
    "no head": (["--head"], ["chat.head=null", "--head"]),
    "a folder without a head": (["--head", "{place}"], ["chat.head={place}", "holds no exit head"]),
    "neither folder nor id": (["--head", "nowhere"], ["chat.head=nowhere", "org/name"]),
    "head of another backbone": (["--backbone", "pocket"], ["backbone.name_or_path=pocket", "belongs to tiny"]),
    "no such backbone": (["--backbone", "{place}/none"], ["backbone.name_or_path={place}/none"]),
    "unknown controller": (["--controller", "fast"], ["chat.controller=fast", "thompson"]),
    "temperature below 0": (["--temperature", "-1"], ["chat.temperature=-1", "0 (greedy)"]),
    "temperature of words": (["--temperature", "hot"], ["chat.temperature", "hot"]),
    "top-p above 1": (["--top-p", "1.5"], ["chat.top_p=1.5"]),
    "no new token": (["--max-new-tokens", "0"], ["chat.max_new_tokens=0", "at least 1"]),
    "template without a file": (["prompts.chat_template=no.jinja"], ["no.jinja", "no such file"]),
    "system message without a template": (["chat.system=Be short."], ["chat.system=Be short.", "chat template"]),
}


@pytest.mark.parametrize(("changed", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(place, changed: list[str], named: list[str], monkeypatch, capsys) -> None:
    pipe(monkeypatch, "tell me\n")
    before = sorted(place.rglob("*"))
    told = words(place)[1:]
    if changed == ["--head"]:
        told, changed = told[2:], []
    try:
        code = main(["chat", *told, *(word.format(place=place) for word in changed)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    last = [line for line in err.splitlines() if line.startswith("exit-heads chat: ")]
    assert code == 2 and not out and len(last) == 1 and "Traceback" not in err
    for part in named:
        assert part.format(place=place) in last[0]
    assert sorted(place.rglob("*")) == before, "chat writes nothing"


@pytest.mark.parametrize(
    ("message", "named"),
    {"/compress": "/compress: no such command", "x" * 300: "the conversation has "}.items(),
    ids=["/", "x"],
)
def test_a_mistake_in_a_pipe_ends_it(place, message: str, named: str, monkeypatch, capsys) -> None:
    pipe(monkeypatch, f"tell me\n{message}\ntell me\n")
    assert main(words(place)) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") >= 1 and f"exit-heads chat: {named}" in err
    assert err.count("tokens/s (first after") == 1


def test_thompson_starts_from_what_a_published_head_brings(place, tmp_path, monkeypatch, capsys) -> None:
    """A state of another kind is refused by name: so the state is read."""
    head = tmp_path / "head"
    head.mkdir()
    for file in (place / "runs" / "t" / "heads" / "exit-2").iterdir():
        (head / file.name).write_bytes(file.read_bytes())
    told = json.loads((head / "config.json").read_text()) | {"states": {"greedy": {"kind": "other"}}}
    (head / "config.json").write_text(json.dumps(told))
    pipe(monkeypatch, "tell me\n")
    assert main(words(place, "--head", str(head), "--controller", "thompson")) == 2
    assert "kind=other" in capsys.readouterr().err


def test_a_backbone_with_a_template_is_asked_by_it(place, tmp_path, monkeypatch, capsys) -> None:
    folder = tiny_backbone(tmp_path, sharpness=4.0)
    for file in (place / "tiny-llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    pipe(monkeypatch, "tell me\n")
    assert main(words(place, "--backbone", str(folder))) == 0
    first, err = capsys.readouterr()
    assert "no chat template" not in err
    pipe(monkeypatch, "<tell me>A:\n")
    assert main(words(place)) == 0
    assert capsys.readouterr().out == first, "the same ids, written by hand"


# ---- on a terminal


class Terminal:
    """A process on a pseudo-terminal: types, and reads what is shown."""

    def __init__(self, argv: list[str], **environment: str):
        here, there = pty.openpty()
        self.end, self.shown = here, ""
        unset = {"NO_COLOR", "FORCE_COLOR", "COLORTERM"}
        plain = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = subprocess.Popen(
            argv, stdin=there, stdout=there, stderr=there, close_fds=True, start_new_session=True,
            preexec_fn=_take_terminal, env=plain | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment,
        )  # fmt: skip
        os.close(there)

    def wait_for(self, text: str, limit: float = 200.0) -> str:
        """What is shown up to and with `text`."""
        assert self.shows(text, limit), f"{text!r} is not in {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def shows(self, text: str, limit: float) -> bool:
        """Whether `text` is shown within so many seconds."""
        until = time.monotonic() + limit
        while text not in self.shown and time.monotonic() < until:
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.end, 65536).decode(errors="replace")
                except OSError:
                    break  # the other side was closed
        return text in self.shown

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal


@pytest.mark.slow
def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C ends an answer and not the conversation, mistakes are said and end nothing, /quit ends."""
    context = 16384
    tiny_backbone(tmp_path, sharpness=4.0, max_position_embeddings=context)
    plant_heads(make_run(tmp_path), 2)
    terminal = Terminal([sys.executable, "-m", "pipeline", *words(tmp_path, "--max-new-tokens", "1000000")])
    try:
        _converse(terminal, context)
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.end)


def _converse(terminal: Terminal, context: int) -> None:
    opening = terminal.wait_for("> ")
    assert "exit head after layer 2 of 4, fixed:2, greedy. Green: accepted drafts" in opening
    terminal.type("tell me\n")
    terminal.wait_for("\x1b[32m")
    terminal.type("\x03")
    figures = terminal.wait_for("draft acceptance rate")
    tokens = int(re.findall(r"(\d+) tokens, ", figures)[-1])
    assert 1 < tokens < context - 100, "it was ended, not full"
    terminal.wait_for("> ")
    terminal.type("/nothing\n")
    terminal.wait_for("/nothing: no such command")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("a new conversation")
    terminal.wait_for("> ")
    terminal.type("/quit\n")


def test_colours_only_where_they_are_wanted_and_no_steering_of_the_terminal(monkeypatch, capsys) -> None:
    for name in ("NO_COLOR", "COLORTERM", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def shown() -> str:
        screen = chat.Screen()
        screen.show("a\t\x1b[2J\r\n", accepted=True)
        screen.show(" b", accepted=False)
        screen.end_of_answer()
        return capsys.readouterr().out

    assert shown() == "a\t\x1b[2J\r\n b\n", "a pipe gets the text as it is"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert shown() == "\x1b[32ma\t\ufffd[2J\n\x1b[0m b\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "a\t\ufffd[2J\n b\n"
