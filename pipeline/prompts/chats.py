"""Reads chats: from a list of messages to the system message, the user's turns and the source's answers.

Takes messages in the format of ShareGPT (`{"from": "human", "value": ...}`) or OpenAI (`{"role": "user", "content":
...}`); gives their texts. Raises ValueError for messages that are no conversation of a user and an assistant.
"""

from typing import Any

from .as_text import is_message, messages_in, parsed
from .stray_characters import is_blank

SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}


def chat(messages: list[Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(system, turns, originals). Consecutive messages of one speaker are joined by a blank line.

    An assistant's messages before the first turn answer nothing and are left out. Raises ValueError for an unknown
    role, content without text, an empty user's message, or a system message after the first turn.
    """
    system = ""
    turns: list[str] = []
    originals: list[str] = []
    for number, message in enumerate(messages, 1):
        speaker, text = _message(message, number)
        if speaker == "system":
            if turns:
                raise ValueError(f"message {number} is a system message after the first turn")
            system = _together(system, text)
        elif speaker == "user":
            if len(turns) > len(originals):
                turns[-1] = _together(turns[-1], text)
            else:
                turns.append(text)
        elif turns and len(originals) == len(turns):
            originals[-1] = _together(originals[-1], text)
        elif turns:
            originals.append(text)
    if any(map(is_blank, turns)):
        raise ValueError("a user's message is empty")
    return system, tuple(turns), tuple(originals)


def answer_in(value: Any) -> str:
    """The text of an answer column: a text, or the last of some messages if it is the assistant's; else empty."""
    if isinstance(value, str):
        value = messages_in(value) or value
    if isinstance(value, list) and value:
        try:
            speaker, value = _message(value[-1], len(value))
        except ValueError:
            return ""
        return value if speaker == "assistant" else ""
    return value if isinstance(value, str) else ""


def _message(message: Any, number: int) -> tuple[str, str]:
    """(speaker, text) of a message; the speaker is system, user or assistant. Raises ValueError for anything else."""
    if isinstance(message, str) and is_message(found := parsed(message)):
        message = found
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is a {type(message).__name__}; role and content are needed")
    role, content = _first(message, "role", "from"), _first(message, "content", "value")
    speaker = SPEAKERS.get(str(role).strip().lower())
    if speaker is None:
        raise ValueError(f"message {number} is of role {role}; these are known: {', '.join(SPEAKERS)}")
    if isinstance(content, list):
        content = "\n\n".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text as its content")
    return speaker, content


def _first(message: dict[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"message {number} has a part that is no text")


def _together(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text.strip())
