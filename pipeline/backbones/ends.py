"""End tokens: the ids that end a text, by one rule for all stages, answerers and published heads.

Takes the `backbone` section and its tokenizer; gives token ids. The checkpoint's own end tokens come from
generation_config.json, else config.json, else the tokenizer: the first of them that names any. `backbone.end_tokens`
adds to these.
"""

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from ..config import Backbone
from ..errors import UserError
from .source import explained, load_config, source_of


def end_tokens(backbone: Backbone, tokenizer: Any) -> list[int]:
    """The ids that end a text, the checkpoint's own first; with [] every answer runs to max_new_tokens.

    Raises UserError for an entry of `backbone.end_tokens` that is no token of this backbone.
    """
    config, written = load_config(backbone), _as_written(backbone)
    own = (
        _ids(_generation_config(backbone))
        or _ids(written)
        or _ids(written.get("text_config"))
        or _ids({"eos_token_id": tokenizer.eos_token_id})
    )
    vocabulary = config.get_text_config().vocab_size
    named = [_token_id(entry, tokenizer, vocabulary) for entry in backbone.end_tokens]
    return list(dict.fromkeys(own + named))


def added_ends(backbone: Backbone, tokenizer: Any) -> list[int]:
    """The end tokens at which transformers' `generate` would not stop by itself; a published head's config has them."""
    generation = _generation_config(backbone)
    if generation is None:  # transformers derives one from config.json
        generation = GenerationConfig.from_model_config(load_config(backbone)).to_dict()
    known = _ids(generation)
    return [token for token in end_tokens(backbone, tokenizer) if token not in known]


def _generation_config(backbone: Backbone) -> dict[str, Any] | None:
    """The content of generation_config.json; None if the checkpoint has no such file."""
    try:
        return GenerationConfig.from_pretrained(source_of(backbone), revision=backbone.revision).to_dict()
    except OSError:
        return None


def _as_written(backbone: Backbone) -> dict[str, Any]:
    """config.json as written: a config class would fill a missing eos_token_id with a default of its family."""
    with explained(backbone):
        return PretrainedConfig.get_config_dict(source_of(backbone), revision=backbone.revision)[0]


def _ids(source: dict[str, Any] | None) -> list[int]:
    """eos_token_id as a list; some checkpoints write -1 or [] for no end token."""
    ids = (source or {}).get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else ids or []
    return [token for token in ids if token >= 0]


def _token_id(entry: Any, tokenizer: Any, vocabulary: int) -> int:
    """The token id of one entry of `backbone.end_tokens`, which is an id or the text of one token."""
    if isinstance(entry, int):
        if 0 <= entry < vocabulary:
            return entry
        raise UserError(f"backbone.end_tokens: {entry} is no id of this backbone; they run from 0 to {vocabulary - 1}")
    token = tokenizer.get_vocab().get(entry)
    if token is None:  # byte-level vocabularies write some characters differently, such as a line feed
        ids = tokenizer(entry, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"backbone.end_tokens: {entry!r} is {len(ids)} tokens of this tokenizer ({ids}), not one; give the "
                "text of one token, or an id"
            )
        token = ids[0]
    return int(token)
