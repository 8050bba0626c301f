"""The verb `chat`: a conversation in the terminal with a backbone and an exit head that drafts; it writes nothing.

Takes the chat section and lines of stdin; gives the answers on stdout, as they are decoded, and figures, questions of
the program and errors on stderr. On a terminal accepted drafts are coloured, a command begins with a slash, and Ctrl-C
ends an answer. In a pipe the answers are plain text, and the first mistake ends the command.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ..backbones.ends import end_tokens
from ..backbones.load import device_of, engine_options, load_model, load_tokenizer, public_name
from ..config import Backbone, Config, Prompts
from ..errors import UserError
from ..generation.conversation import Answered, Conversation
from ..inference.backbone import SplitBackbone
from ..inference.controllers import learned_controller, make_controller
from ..inference.exit_head import ExitHead
from ..prompts.templates import check_template, warn_of_turn_end
from ..publishing import hub

HELP = """\
/compare   decode the last answer again without drafts, and say how much faster drafting was
/reset     begin a new conversation
/quit      end (or Ctrl-D)
/help      this list
Ctrl-C     end the answer that is being written; what was written stays in the conversation
A line that ends with a backslash goes on in the next line."""

ACCEPTED = Style.parse("green")
# Characters by which a text could steer the terminal: all control characters but line feed and tab.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd") | {ord("\r"): ""}


def head_folder(config: Config) -> Path:
    """The folder of chat.head, downloaded if it is on the Hub. Raises UserError for a mistake that shows by now."""
    if config.chat.head is None:
        raise UserError(
            "chat.head=null: name the exit head that drafts, such as --head runs/pocket/hub/2 or --head org/my-head"
        )
    try:
        make_controller(config.chat.controller)
    except ValueError as error:
        raise UserError(f"chat.{error}") from None
    return hub.pull(config.chat.head, "chat.head")


def defaults(config: Config, folder: Path) -> dict[str, Any]:
    """Defaults of the config for talking with this head: its backbone unless one was given, the backbone's own chat
    template, and float32 on a CPU, where bfloat16 is mostly emulated. Raises UserError if the folder holds no head."""
    assert config.chat.head is not None  # head_folder looked
    its_own = hub.defaults_of(folder, config.chat.head, "chat.head").get("backbone", {})
    given = config.backbone.name_or_path != Backbone().name_or_path
    on_cpu = device_of(config.machine.device).type == "cpu"
    backbone = ({} if given else its_own) | ({"dtype": "float32"} if on_cpu else {})
    return {"backbone": backbone, "prompts": {"chat_template": "tokenizer"}}


def run(config: Config, folder: Path) -> None:
    """Talk until the input ends. Raises UserError for a head, backbone or setting that cannot be used; without a
    terminal also for the first message that cannot be answered."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # bytes that are no text must not end a conversation
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    screen = Screen()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers alone
        conversation = begin(config, folder, screen)
    for line in screen.lines():
        try:
            if not _obey(line, conversation, screen):
                _answer(line, conversation, screen)
        except _Quit:
            break
        except UserError as error:
            if not screen.interactive:
                raise
            screen.say(str(error), "red")


def begin(config: Config, folder: Path, screen: "Screen") -> Conversation:
    """Load everything and warm it up. Raises UserError for a head of another backbone and for unusable settings."""
    named = str(config.chat.head)
    head, belongs = hub.load_head(folder, named, config.backbone, "chat.head", config.chat.allow_other_backbone)
    if belongs:
        screen.say(
            f"{named} was trained for {belongs['name']} (fingerprint {belongs['fingerprint'][:12]}) and drafts for "
            f"{head.backbone['name']}, because of allow_other_backbone: the answers are those of the latter"
        )
    device = device_of(config.machine.device)
    tokenizer = load_tokenizer(config.backbone)
    ends = frozenset(end_tokens(config.backbone, tokenizer))
    prompts = _template(config, tokenizer, ends, screen)
    if config.machine.threads > 0:
        torch.set_num_threads(config.machine.threads)
    model = load_model(config.backbone, device, config.machine.device_map)
    greedy = config.chat.temperature == 0
    try:
        engine = SplitBackbone(model, head, **engine_options(config.machine, device))
        its_config = json.loads((folder / "config.json").read_text())
        controller = learned_controller(config.chat.controller, its_config, config.seed, greedy)
        engine.check_controller(controller)
    except ValueError as error:
        raise UserError(f"chat.head={config.chat.head}: {error}") from None
    conversation = Conversation(engine, controller, tokenizer, ends, prompts, config.chat, config.seed)
    conversation.warm_up()
    if screen.interactive:
        screen.say(_opening(config, head, device, screen))
    return conversation


def _template(config: Config, tokenizer: Any, ends: frozenset[int], screen: "Screen") -> Prompts:
    """The prompts section, whose chat template is tried; without one texts are continued, and the user is told."""
    prompts = config.prompts
    if prompts.chat_template == "tokenizer" and not getattr(tokenizer, "chat_template", None):
        prompts = replace(prompts, chat_template="none")
        screen.say("this tokenizer has no chat template: the backbone does not answer, it continues the text")
    if prompts.chat_template != "none":
        check_template(tokenizer, prompts, with_system=bool(config.chat.system))
        warn_of_turn_end("chat", tokenizer, prompts, ends)
    elif config.chat.system:
        raise UserError(f"chat.system={config.chat.system}: plain text without a chat template has no place for it")
    return prompts


def _opening(config: Config, head: ExitHead, device: torch.device, screen: "Screen") -> str:
    c = config.chat
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    drawn = f"temperature {c.temperature:g}" if c.temperature else "greedy"
    legend = " Green: accepted drafts; plain: the backbone's own tokens." if screen.colours else ""
    return (
        f"{public_name(config.backbone)} ({config.backbone.dtype} on {device.type}{threads}), exit head after layer "
        f"{head.exit_layer} of {head.num_layers}, {c.controller}, {drawn}.{legend} /help lists the commands."
    )


# ---- one line of input


class _Quit(Exception):
    """The user wants to end."""


def _obey(line: str, conversation: Conversation, screen: "Screen") -> bool:
    """Do what a command says; False if the line is a message. Raises UserError for an unknown command."""
    if not re.fullmatch(r"/\w+", command := line.strip()):
        return False
    if command == "/quit":
        raise _Quit
    if command == "/help":
        screen.say(HELP)
    elif command == "/reset":
        conversation.reset()
        screen.say("a new conversation")
    elif command == "/compare":
        _compare(conversation, screen)
    else:
        raise UserError(f"{command}: no such command; /help lists them.")
    return True


def _answer(message: str, conversation: Conversation, screen: "Screen") -> None:
    with screen.interruptible() as stop:
        try:
            answered = conversation.answer(message, screen.show, stop)
        except KeyboardInterrupt:
            if not screen.interactive:
                raise
            screen.end_of_answer()
            screen.say("interrupted; the message is taken back")
            return
    screen.end_of_answer()
    screen.say(figures(answered))
    settings = conversation.settings
    if answered.full:
        screen.say(f"cut off: the backbone's context of {conversation.engine.max_context} tokens is full; "
                   "/reset begins a new conversation", "yellow")  # fmt: skip
    elif answered.out.finish_reason == "length":
        screen.say(f"cut off by chat.max_new_tokens={settings.max_new_tokens}")
    if settings.compare:
        _compare(conversation, screen)


def _compare(conversation: Conversation, screen: "Screen") -> None:
    try:
        plain, differ = conversation.compare()
    except KeyboardInterrupt:
        if not screen.interactive:
            raise
        screen.say("/compare: interrupted")
        return
    assert conversation.last is not None  # it was just compared
    out = conversation.last.out
    line = f"speedup {plain.seconds / out.seconds:.2f} over autoregressive decoding of this answer"
    line += f" ({len(plain.tokens) / plain.seconds:.1f} tokens/s)"
    if conversation.settings.temperature == 0:
        same = "which chooses the same tokens"
        line += f", {same}" if not differ else f", which would choose {differ} other tokens (near ties of rounding)"
    screen.say(line)


def figures(answered: Answered) -> str:
    """One line on an answer: how fast it was, without prefill and without showing it, and what drafting gave."""
    out = answered.out
    if not out.rounds:
        return "1 token, which follows the message: no round, nothing to draft"
    drafted, accepted = sum(r.drafted for r in out.rounds), sum(r.accepted for r in out.rounds)
    length = f"{sum(r.tokens for r in out.rounds) / len(out.rounds):.2f}"
    rate = f"{accepted / drafted:.0%}" if drafted else "-"
    return (
        f"{len(out.tokens)} tokens, {len(out.tokens) / out.seconds:.1f} tokens/s (first after "
        f"{out.prefill_seconds:.2f} s), acceptance length {length}, draft acceptance rate {rate}"
    )


# ---- the terminal


class Screen:
    """Where lines come from and texts go to: a terminal, or a pipe."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        """Whether somebody types: then mistakes and Ctrl-C do not end the command."""
        self.out, self.err = Console(highlight=False), Console(stderr=True, highlight=False)
        self.open_line = False
        """Whether the text shown last did not end its line."""

    @property
    def colours(self) -> bool:
        return self.out.color_system is not None and not self.out.no_color

    def lines(self) -> Iterator[str]:
        """The messages and commands, without empty ones, until the input ends."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then has line editing and a history
        prompt = "> " if self.interactive and self.out.is_terminal else ""
        parts: list[str] = []
        while True:
            try:
                parts.append(input(prompt if not parts else prompt and ". "))
            except EOFError:
                if self.interactive:
                    self.say("")
                elif parts:
                    yield "\n".join(parts)
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                parts = []
                self.say("\n/quit or Ctrl-D ends the conversation")
                continue
            if parts[-1].endswith("\\"):
                parts[-1] = parts[-1][:-1]
                continue
            if (message := "\n".join(parts)).strip():
                yield message
            parts = []

    def show(self, text: str, accepted: bool) -> None:
        """Write a piece of an answer. On a terminal, text cannot do more than be read."""
        if self.out.is_terminal:
            text = text.translate(CONTROLS)
        self.open_line = bool(text) and not text.endswith("\n")
        self.out.print(Segments([Segment(text, ACCEPTED if accepted else None)]), end="", crop=False)

    def end_of_answer(self) -> None:
        """What follows begins on a new line."""
        if self.open_line:
            self.out.print()
        self.open_line = False

    def say(self, line: str, style: str = "dim") -> None:
        """A line of the program's own."""
        self.err.print(Text(line, style), soft_wrap=True)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Inside, the first Ctrl-C makes the function that is given return True, and only the second raises
        KeyboardInterrupt: a round that has begun is finished. In a pipe Ctrl-C does what it always does."""
        pressed: list[int] = []

        def note(number: int, _: Any) -> None:
            if pressed:
                raise KeyboardInterrupt
            pressed.append(number)

        before = signal.signal(signal.SIGINT, note) if self.interactive else None
        try:
            yield lambda: bool(pressed)
        finally:
            if self.interactive:
                signal.signal(signal.SIGINT, before)
