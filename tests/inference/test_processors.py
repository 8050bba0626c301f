"""Logits processors shape drafts as `generate` shapes tokens: for every row of a batch, and only those without a state.

The oracle is transformers' own greedy `generate` on the same left-padded batch.
"""

import warnings

import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TopKLogitsWarper,
    WatermarkingConfig,
)

from pipeline.inference import custom_generate
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.processors import Prefix, for_row
from pipeline.inference.sampling import Sampler

PAD, END = 256, 257
SHORT = [9, 40, 41]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, folder of an untrained head, left-padded batch of two prompts)."""
    folder = tmp_path_factory.mktemp("processors")
    model = load(tiny_backbone(folder, sharpness=4.0, pad_token_id=PAD, eos_token_id=END))
    head_for(model, 2).save(folder / "head")
    rows = [[PAD] * (len(PROMPT) - len(SHORT)) + SHORT, PROMPT]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[0, : len(PROMPT) - len(SHORT)] = 0
    return model, str(folder / "head"), {"input_ids": ids, "attention_mask": mask}


def both(tiny, batch=None, **options) -> tuple[list, list]:
    """(new ids of `generate`, new ids of ours) with these options."""
    model, head, two = tiny
    batch = batch or two
    found = []
    for ours in (False, True):
        made = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD} | options
        if ours:
            out = custom_generate.generate(model=model, exit_head=head, controller="fixed:3", **batch, **made)
        else:
            out = model.generate(**batch, **made)
        found.append(out[:, batch["input_ids"].shape[1] :].tolist())
    return found[0], found[1]


class OfRow(LogitsProcessor):
    """Forbids another token in each row of its batch."""

    stateless = True

    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        assert len(scores) == len(self.tokens)
        scores = scores.clone()
        scores[range(len(scores)), self.tokens] = float("-inf")
        return scores


@pytest.fixture(scope="module")
def plain(tiny) -> list[list[int]]:
    theirs, ours = both(tiny)
    assert theirs == ours
    return theirs


OPTIONS = {
    "repetition_penalty": lambda text: {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": lambda text: {"encoder_no_repeat_ngram_size": 2, "sequence_bias": [[[33], 40.0]]},
    "encoder_repetition_penalty": lambda text: {"encoder_repetition_penalty": 3.0},
    "min_new_tokens": lambda text: {"min_new_tokens": 6, "eos_token_id": text[0][8]},
    "min_length": lambda text: {"min_length": len(PROMPT) + 9, "eos_token_id": text[0][8]},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": END},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": [text[0][0], text[1][0]]},
    "suppress_tokens": lambda text: {"suppress_tokens": [text[0][2], text[1][2]]},
    "bad_words_ids": lambda text: {"bad_words_ids": [text[0][1:3], text[1][3:5]]},
    "sequence_bias": lambda text: {"sequence_bias": [[text[0][1:3], -9.0]]},
    "exponential_decay": lambda text: {"exponential_decay_length_penalty": (4, 1.9)},
    "prefix_allowed_tokens_fn": lambda text: {"prefix_allowed_tokens_fn": lambda row, ids: [100 + row, 200 + row]},
    "watermark": lambda text: {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "renormalize": lambda text: {"renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.3},
    "own, one token for each row": lambda text: {"logits_processor": [OfRow([text[0][0], text[1][1]])]},
    "own, of transformers": lambda text: {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_row_of_a_padded_batch_is_that_of_generate(tiny, plain, name: str) -> None:
    theirs, ours = both(tiny, **OPTIONS[name](plain))
    assert ours == theirs
    if name != "renormalize":
        assert theirs != plain, "an option without effect would prove nothing"


def test_options_of_the_generation_config_count_too(tiny, plain, monkeypatch) -> None:
    monkeypatch.setattr(tiny[0].generation_config, "repetition_penalty", 1.5)
    theirs, ours = both(tiny)
    assert ours == theirs != plain


def test_rows_of_one_prompt_are_numbered_as_in_generate(tiny) -> None:
    """num_return_sequences repeats rows, and sampling from one allowed token leaves nothing to chance."""
    one = {name: value[1:] for name, value in tiny[2].items()}
    theirs, ours = both(tiny, one, do_sample=True, num_return_sequences=3,
                        prefix_allowed_tokens_fn=lambda row, ids: [100 + row])  # fmt: skip
    assert ours == theirs == [[100] * 14, [101] * 14, [102] * 14]


class Every3rd(LogitsProcessor):
    """As grammars do: each call is one step further."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + 9.0 * (self.calls % 3 == 0)


class Warmer(TopKLogitsWarper):
    """A subclass of a processor that is allowed."""


def counts(input_ids, scores):
    return scores


STATEFUL = {
    "guidance_scale": (lambda: {"guidance_scale": 1.5}, r"UnbatchedClassifierFreeGuidance\w+ \(guidance_scale\)"),
    "synthid": (lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400], ngram_len=4)},
                r"SynthIDTextWatermark\w+ \(watermarking_config="),
    "own class": (lambda: {"logits_processor": LogitsProcessorList([Every3rd()])}, "Every3rd.stateless = True"),
    "subclass": (lambda: {"logits_processor": LogitsProcessorList([Warmer(3)])}, "Warmer.stateless = True"),
    "own function": (lambda: {"logits_processor": LogitsProcessorList([counts])}, "counts.stateless = True"),
    "plain list": (lambda: {"logits_processor": [Every3rd()]}, "Every3rd.stateless = True"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEFUL)
def test_processors_that_may_keep_a_state_are_refused_by_name(tiny, name: str) -> None:
    model, head, batch = tiny
    options, named = STATEFUL[name]
    for controller in ("fixed:2", "none"):
        with pytest.raises(ValueError, match=named):
            custom_generate.generate(model=model, exit_head=head, controller=controller, **batch, **options(),
                                     max_new_tokens=3, do_sample=False)  # fmt: skip


def test_a_function_can_be_declared(tiny, plain) -> None:
    def forbids(input_ids, scores):
        scores[:, plain[1][0]] = float("-inf")  # in place, as some do
        return scores

    forbids.stateless = True
    theirs, ours = both(tiny, logits_processor=LogitsProcessorList([forbids]))
    assert ours == theirs != plain


# ---- the ids that processors see


class Counted(list):
    """A prompt that counts how often it is copied."""

    copies = 0

    def __add__(self, other):
        self.copies += 1
        return super().__add__(other)


def test_ids_are_right_in_every_call_and_the_prompt_is_copied_once(tiny) -> None:
    model = tiny[0]
    engine, prompt, seen = SplitBackbone(model, head_for(model, 2)), Counted(PROMPT), []

    def penalty(ids, scores):
        seen.append(ids[0].tolist())
        return RepetitionPenaltyLogitsProcessor(1.5)(ids, scores)

    plain = autoregressive(engine, Request(PROMPT, 24), Sampler(processors=penalty)).tokens
    expected = [PROMPT + plain[:i] for i in range(24)]
    assert seen == expected
    seen.clear()
    assert self_speculative(engine, Request(prompt, 24), Sampler(processors=penalty), Fixed(3)).tokens == plain
    assert all(prefix in seen for prefix in expected) and all(ids[: len(PROMPT)] == PROMPT for ids in seen)
    assert prompt.copies == 1


def test_one_sampler_may_serve_text_after_text(tiny) -> None:
    """Lists of another text, of the same length too, are told apart."""
    model = tiny[0]
    engine, sampler = (
        SplitBackbone(model, head_for(model, 2)),
        Sampler(processors=RepetitionPenaltyLogitsProcessor(1.5)),
    )
    prompts = [PROMPT, PROMPT[::-1], PROMPT]
    found = [self_speculative(engine, Request(p, 12), sampler, Fixed(2)).tokens for p in prompts]
    fresh = [autoregressive(engine, Request(p, 12), Sampler(processors=sampler.processors)).tokens for p in prompts]
    assert found == fresh and found[0] == found[2] != found[1]


def test_the_buffer_grows_and_forgets_drafts() -> None:
    prefix, prompt, tokens, cpu = Prefix(), [1, 2], [], torch.device("cpu")
    assert prefix.ids(prompt, tokens, [3, 4], cpu).tolist() == [[1, 2, 3, 4]]
    tokens += [5]
    assert prefix.ids(prompt, tokens, [], cpu).tolist() == [[1, 2, 5]]
    tokens += range(6, 40)
    assert prefix.ids(prompt, tokens, [0], cpu).tolist() == [[1, 2, *range(5, 40), 0]]


def test_no_processors_cost_nothing() -> None:
    assert for_row([], 0, 2) is None


# ---- past the context


def test_past_the_context_the_text_is_that_of_generate_with_a_warning(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, sharpness=4.0, max_position_embeddings=16, eos_token_id=None))
    head_for(model, 2).save(tmp_path / "head")
    batch = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long)}
    tiny = model, str(tmp_path / "head"), batch
    with pytest.warns(UserWarning, match="maximum length of 16"):
        theirs, ours = both(tiny, eos_token_id=None)
    assert ours == theirs and len(ours[0]) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both(tiny, eos_token_id=None, max_new_tokens=16 - len(PROMPT))
        both(tiny, eos_token_id=ours[0][2])  # room for more is asked for, and the text ends by itself


def test_texts_go_on_beyond_a_sliding_window(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, "mistral", sharpness=4.0, sliding_window=8, eos_token_id=None))
    head_for(model, 2).save(tmp_path / "head")
    batch = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long)}
    theirs, ours = both((model, str(tmp_path / "head"), batch), eos_token_id=None)
    assert ours == theirs and len(ours[0]) == 14
