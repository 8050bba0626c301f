"""Streamed text: never half a character, and altogether what the tokenizer makes of all ids at once."""

import random

import pytest
from helpers import END, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.generation.streaming import REPLACEMENT, TextStream
from pipeline.pocket.paths import BACKBONE

TEXT = "Grüße, naïve café: 東京は首都 🎉👩‍👩‍👧 — “ok”\n\n\tdef f(x):\n        return x  # ∑é"


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark for a space, which is dropped at the beginning of a text."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁Hello", "▁world", "s", "!", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def streamed(tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.put(token) for token in ids), stream.end()]


@pytest.mark.parametrize("name", ["bytes", "pocket"])
def test_no_piece_holds_a_part_of_a_character(name: str) -> None:
    tokenizer = byte_tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(BACKBONE)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert any(REPLACEMENT in tokenizer.decode([token]) for token in ids), "characters are split, or this tests nothing"
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT and not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == "" and sum(map(bool, pieces)) > 40, "nothing waits longer than for its own character"


def test_any_bytes_give_what_the_tokenizer_gives() -> None:
    """Bytes that are no text, and ends of texts in the middle, too."""
    tokenizer, draw = byte_tokenizer(), random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(257), k=draw.randrange(1, 12))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_cut_off_at_the_end_is_shown_as_the_tokenizer_shows_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a€")["input_ids"][:-1]
    assert streamed(tokenizer, ids) == ["a", "", "", REPLACEMENT]


def test_spaces_between_words_stay_where_a_decoder_drops_the_first() -> None:
    tokenizer = metaspace_tokenizer()
    assert streamed(tokenizer, [1, 2, 3, 4, 5]) == ["Hello", " world", "s", "!", "", ""]
    assert tokenizer.decode([1, 2, 3, 4]) == "Hello worlds!"


def test_a_special_token_has_no_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    a, b = tokenizer("ab")["input_ids"]
    assert streamed(tokenizer, [a, end, b, end]) == ["a", "", "b", "", ""]
