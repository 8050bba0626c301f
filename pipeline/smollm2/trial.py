"""Shows what the exit head of the repository does: the same answers, plain and drafted, side by side, with their speed.

Takes the file that `fetch` keeps and the folder head/ beside this module: a published head without its code, which is
that of the installed package. Gives text on stdout; `assemble` also gives a whole published folder, which everything
takes that takes a head.
"""

import json
import shutil
from itertools import chain, zip_longest
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..config import load
from ..generation.conversation import Answered, Conversation
from ..inference.decoding import Generation, Request, autoregressive
from ..inference.sampling import Sampler
from ..publishing import head_folder
from ..runs.files import atomic_path
from ..stages import chat

HEAD = Path(__file__).with_name("head")
FOLDER = Path("runs/smollm2-135m-head")
"""Where `try` assembles it, from the root of the repository."""
QUESTIONS = Path(__file__).with_name("prompts") / "evaluate.jsonl"


def assemble(folder: Path) -> Path:
    """Write the published folder of the head of the repository, with the code of this package; returns its path."""
    with atomic_path(folder) as new:
        shutil.copytree(HEAD, new)
        head_folder.write_code(new)
    return folder


def run(backbone: Path, folder: Path, *, questions: int, new_tokens: int, controller: str, screen: Console) -> bool:
    """Answer the questions greedily, plainly and with drafts, and show both. True if all texts are identical."""
    settings = {
        "backbone": {"name_or_path": str(backbone), "gguf_dir": str(backbone.parent), "dtype": "float32"},
        "prompts": {"chat_template": "tokenizer"},
        "chat": {
            "head": str(assemble(folder)),
            "max_new_tokens": new_tokens,
            "temperature": 0.0,
            "controller": controller,
        },
    }
    config = load(None, [], settings)
    conversation = chat.begin(config, folder, chat.Screen())
    plains: list[Generation] = []
    drafts: list[Generation] = []
    for question in first_of_each_task(questions):
        answered, coloured = _drafted(conversation, question)
        plain = _plainly(conversation, answered)
        plains.append(plain)
        drafts.append(answered.out)
        screen.print(_side_by_side(question, conversation, plain, answered, coloured))
    identical = sum(plain.tokens == drafted.tokens for plain, drafted in zip(plains, drafts, strict=True))
    times = _seconds(plains) / _seconds(drafts)
    screen.print(
        f"{_speed(plains)} plain and {_speed(drafts)} drafted: {times:.2f} times as fast; {identical} of "
        f"{len(plains)} texts identical. Green: accepted drafts.\n"
        f"Talk to it: exit-heads chat --head {folder} --backbone {backbone}"
    )
    return identical == len(plains)


def first_of_each_task(count: int) -> list[str]:
    """Questions that the head was not trained on: one of each task in turn, in the order of their file."""
    tasks: dict[str, list[str]] = {}
    for line in QUESTIONS.read_text().splitlines():
        row = json.loads(line)
        tasks.setdefault(row["task"], []).append(row["prompt"])
    in_turn = chain.from_iterable(zip_longest(*tasks.values()))
    return [question for question in in_turn if question][:count]


def _drafted(conversation: Conversation, question: str) -> tuple[Answered, Text]:
    """The answer, and its text with accepted drafts in green."""
    text = Text()
    conversation.reset()

    def show(piece: str, accepted: bool) -> None:
        text.append(piece, "green" if accepted else None)

    return conversation.answer(question, show), text


def _plainly(conversation: Conversation, answered: Answered) -> Generation:
    """The same question by autoregressive decoding on the same engine, which has the same fast kernels; unlike
    `Conversation.compare`, which decodes a text that is there, it chooses every token anew."""
    request = Request(answered.ids, conversation.settings.max_new_tokens, conversation.ends)
    return autoregressive(conversation.engine, request, Sampler())


def _side_by_side(
    question: str, conversation: Conversation, plain: Generation, answered: Answered, drafted: Text
) -> Group:
    text = conversation.tokenizer.decode(plain.tokens, skip_special_tokens=True)
    table = Table(expand=True)
    table.add_column(f"plain, {_speed([plain])}", ratio=1)
    table.add_column(f"drafted, {_speed([answered.out])}", ratio=1)
    table.add_row(Text(text), drafted)
    return Group(Panel(Text(question)), table, Text(chat.figures(answered), "dim"))


def _seconds(texts: list[Generation]) -> float:
    """Without prefill, which is the same with drafts and without."""
    return sum(text.seconds for text in texts)


def _speed(texts: list[Generation]) -> str:
    return f"{sum(len(text.tokens) for text in texts) / _seconds(texts):.1f} tokens/s"
