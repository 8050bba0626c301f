"""Checks which logits processors may be applied to drafts, and adapts them to single rows of a batch.

Takes the processors that transformers' `generate` made and those that the user gave; gives, for one row, processors
that can be called with that row alone, or refuses one by name. A processor is called for drafts that may be rejected
and for several positions of a round, in no fixed order and more than once, so it must be a function of
(input_ids, scores) alone.

T tokens of a row, V vocabulary
"""

import copy

import torch
from torch import Tensor
from transformers import LogitsProcessorList

STATELESS = frozenset({
    "EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "EpsilonLogitsWarper",
    "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
    "WatermarkLogitsProcessor",
})  # fmt: skip
"""Classes of transformers.generation.logits_process (5.23) that keep no state between calls."""

OPTIONS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config=SynthIDTextWatermarkingConfig(...)",
}
"""Refused processor -> the option of `generate` by which a user asks for it."""


def check_stateless(processors: list) -> None:
    """Raises ValueError naming the first processor that is neither known nor declared to be stateless.

    A user declares a processor of their own by the attribute `stateless = True` on its class, object or function. For
    transformers' processors the exact class must be listed, because a subclass may keep a state.
    """
    for processor in processors:
        if not _is_known(processor) and getattr(processor, "stateless", False) is not True:
            kind = type(processor)
            name = getattr(processor, "__qualname__", kind.__qualname__)
            if kind.__module__ == _MODULE:
                of = f" ({OPTIONS[name]})" if name in OPTIONS else ""
                why = "it keeps a state between calls, or is not known to keep none"
                remedy = "leave it out"
            else:
                of, why = "", "it is not known whether it keeps a state between calls"
                remedy = f"if it is a function of (input_ids, scores) alone, say so: `{name}.stateless = True`"
            raise ValueError(
                f"logits processor {name}{of}: {why}. Drafts are shaped by the processors too, and some of them are "
                f"rejected, so a state would see tokens that are not in the text. Either {remedy}, or call generate "
                "without custom_generate="
            )


def for_row(processors: list, row: int, rows: int) -> LogitsProcessorList | None:
    """The processors for row `row` of a batch of `rows`, to be called with ids [1, T] and scores [1, V]; None if there
    are none.

    Processors of transformers that hold data for each row are reduced to this row's. A user's own processor is called
    with the row repeated to a batch of `rows`, and its result for this row is used.
    """
    if not len(processors):
        return None
    if rows == 1:
        return LogitsProcessorList(processors)
    return LogitsProcessorList([_of_row(p, row, rows) if _is_known(p) else _InBatch(p, row, rows) for p in processors])


_MODULE = "transformers.generation.logits_process"


def _is_known(processor) -> bool:
    kind = type(processor)
    return kind.__module__ == _MODULE and kind.__qualname__ in STATELESS


def _of_row(processor, row: int, rows: int):
    mine, kind = copy.copy(processor), type(processor).__qualname__
    if kind == "RepetitionPenaltyLogitsProcessor":
        if isinstance(mine.prompt_ignore_length, Tensor):
            mine.prompt_ignore_length = mine.prompt_ignore_length[row : row + 1]
    elif kind == "EncoderRepetitionPenaltyLogitsProcessor":
        at = row // max(1, rows // len(mine.encoder_input_ids))
        mine.encoder_input_ids = mine.encoder_input_ids[at : at + 1]
    elif kind == "EncoderNoRepeatNGramLogitsProcessor":
        mine.generated_ngrams = [mine.generated_ngrams[row // max(1, rows // mine.batch_size)]]
        mine.batch_size = 1
    elif kind == "PrefixConstrainedLogitsProcessor":
        allowed, at = mine._prefix_allowed_tokens_fn, row // mine._num_beams
        mine._prefix_allowed_tokens_fn, mine._num_beams = (lambda _, ids: allowed(at, ids)), 1
    return mine


class _InBatch:
    """Calls a user's own processor, which may hold data for each row, with a batch of the size that it expects."""

    def __init__(self, processor, row: int, rows: int):
        self.processor, self.row, self.rows = processor, row, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        batch = self.processor(input_ids.repeat(self.rows, 1), scores.repeat(self.rows, 1))
        return batch[self.row : self.row + 1]


class Prefix:
    """The ids before the next token as a tensor on the device of the logits, to which only new ids are copied.

    It follows one text: `tokens` may only grow from call to call. `drafted` may change and is copied in every call.
    """

    def __init__(self) -> None:
        self.prompt: list[int] | None = None
        self.tokens: list[int] | None = None
        self.ids_1T = torch.empty(1, 0, dtype=torch.long)
        self.written = 0
        """How many ids of prompt and tokens are in the buffer."""

    def ids(self, prompt: list[int], tokens: list[int], drafted: list[int], device: torch.device) -> Tensor:
        """prompt + tokens + drafted as ids [1, T], a view that the next call overwrites."""
        known = len(prompt) + len(tokens)
        same = self.prompt is prompt and self.tokens is tokens and self.ids_1T.device == device
        if not same or self.written > known:
            self.prompt, self.tokens, self.written = prompt, tokens, 0
        new = (prompt if self.written == 0 else []) + tokens[max(0, self.written - len(prompt)) :] + drafted
        end = known + len(drafted)
        if end > self.ids_1T.shape[1] or self.ids_1T.device != device:
            grown_1T = torch.empty(1, 2 * end, dtype=torch.long, device=device)
            grown_1T[:, : self.written] = self.ids_1T[:, : self.written]
            self.ids_1T = grown_1T
        if new:
            # non_blocking: else the host would wait for the GPU
            self.ids_1T[0, end - len(new) : end].copy_(torch.tensor(new), non_blocking=True)
        self.written = known
        return self.ids_1T[:, :end]
