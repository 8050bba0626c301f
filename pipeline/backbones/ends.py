"""Which tokens end a text: one rule for every stage, every answerer, and what is published.

Takes the `backbone` section and its tokenizer, gives token ids. The checkpoint's own end tokens are those of the first
of generation_config.json, config.json and the tokenizer that names any; `backbone.end_tokens` adds to them.
"""

from typing import Any

from transformers import GenerationConfig

from ..config import Backbone
from ..errors import UserError
from .load import load_config, source_of


def end_tokens(backbone: Backbone, tokenizer: Any) -> list[int]:
    """The ids that end a text, the checkpoint's own first; [] means that every answer has full length.

    Raises UserError for an entry of `backbone.end_tokens` that is no token of this backbone.
    """
    known = generate_ends(backbone)
    own = known or _ids(tokenizer)
    vocabulary = load_config(backbone).get_text_config().vocab_size
    named = [_token_id(entry, tokenizer, vocabulary) for entry in backbone.end_tokens]
    return list(dict.fromkeys(own + named))


def generate_ends(backbone: Backbone) -> list[int]:
    """Those at which transformers' `generate` ends by itself: of the generation config, else of the config."""
    config = load_config(backbone)
    try:
        generation = GenerationConfig.from_pretrained(source_of(backbone), revision=backbone.revision)
    except OSError:  # most checkpoints have one
        generation = None
    return _ids(generation) or _ids(config) or _ids(config.get_text_config())


def added_ends(backbone: Backbone, tokenizer: Any) -> list[int]:
    """Those at which `generate` goes on unless it is told: a published head names them in its config."""
    known = generate_ends(backbone)
    return [token for token in end_tokens(backbone, tokenizer) if token not in known]


def _ids(source: Any) -> list[int]:
    """eos_token_id of a config or tokenizer as a list; some checkpoints write -1 or [] for none."""
    ids = getattr(source, "eos_token_id", None)
    ids = [ids] if isinstance(ids, int) else ids or []
    return [token for token in ids if token >= 0]


def _token_id(entry: Any, tokenizer: Any, vocabulary: int) -> int:
    """The id of an entry of `backbone.end_tokens`: an id as it is, or the text of one token."""
    if isinstance(entry, int):
        if 0 <= entry < vocabulary:
            return entry
        raise UserError(f"backbone.end_tokens: {entry} is no id of this backbone; they run from 0 to {vocabulary - 1}")
    token = tokenizer.get_vocab().get(entry)
    if token is None:  # the text of a token may be written otherwise in the vocabulary, such as a line feed
        ids = tokenizer(entry, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"backbone.end_tokens: {entry!r} is {len(ids)} tokens of this tokenizer ({ids}), not one; give the "
                "text of one token, or an id"
            )
        token = ids[0]
    return int(token)
