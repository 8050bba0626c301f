"""Text from token ids as they come, without ever giving a part of a character.

Takes ids one by one and a tokenizer; gives the text that each of them completes. All pieces together are the text that
the tokenizer makes of all ids at once, special tokens left out.
"""

from typing import Any

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no whole character."""


class TextStream:
    """The text of one answer, piece by piece.

    A token may hold some bytes of a character only (byte-level BPE), and a decoder may treat the first token of a text
    differently (SentencePiece drops its leading space). So the new ids are decoded behind the last ones that were
    given, and held back while the text ends with an incomplete character.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.given: list[int] = []
        """The ids of the piece that was given last."""
        self.held: list[int] = []
        """The ids that came since."""

    def put(self, token: int) -> str:
        """The text that this token completes; empty for a special token, and for a part of a character."""
        self.held.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT):
            return ""
        if piece:  # a special token has no text: what came before it stays the context of what follows
            self.given, self.held = self.held, []
        return piece

    def end(self) -> str:
        """What is held back when no token follows: the beginning of a character, as the tokenizer writes it."""
        piece = self._piece()
        self.held = []
        return piece

    def _piece(self) -> str:
        return self._decode(self.given + self.held)[len(self._decode(self.given)) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
