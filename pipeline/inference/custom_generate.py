"""The entry point of transformers' `generate(custom_generate=...)`: decodes prompts with drafts of an exit head.

Takes the arguments of `generate`, and besides `controller=` (`thompson`, `fixed:3`, `none`, ...), `exit_head=` (a
folder or a Hub id; default: the head this file was published with), `revision=`, `token=`, `cache_dir=`,
`local_files_only=` (for a Hub id, as in `from_pretrained`) and `cuda_graphs=True` (fewer kernel launches on a GPU).
Sampling, stopping criteria and streamers work as in `generate`, and so do logits processors that keep no state between
calls (processors.py); other processors are refused. The rows of a batch are decoded together, or one after the other
where several texts at once cannot be (`_batch_of`).
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.utils import cached_file

from .backbone import SplitBackbone
from .batch_controllers import is_of_batches, learned_batch_controller
from .batch_decoding import decode_batch
from .batch_engine import BatchEngine
from .canary import TOLERANCE, compare, distance, rounding
from .controllers import COPYING, learned_controller, make_controller
from .decoding import Request, self_speculative
from .exit_head import ExitHead
from .origin import HEAD, REVISION
from .processors import check_stateless, for_row
from .rounds import Controller
from .sampling import Sampler
from .text_part import text_model


class AnotherBackbone(UserWarning):
    """The backbone has the fingerprint of the measured one, but gives other probabilities."""


# The decoder applies these criteria itself, because it must know them before it drafts.
OWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")

# Options for downloads from the Hub, which transformers passes on among the arguments of generate.
FETCHING = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


def generate(
    inputs=None,
    *,
    model,
    exit_head: str | None = None,
    controller: str | Controller | None = None,
    revision: str | None = None,
    cuda_graphs: bool = False,
    allow_other_backbone: bool = False,
    block_verification: bool | None = None,
    **kwargs,
):
    """`model.generate` with self-speculative decoding; returns ids [B, T] as plain `generate` does.

    A controller given by name is kept on the model and goes on learning in later calls; one given as an object, of one
    text or of several (`BatchController`), is used as it is.

    With `allow_other_backbone` another version of the head's backbone is taken too, such as its unquantised or
    quantised weights, or one with an adapter; a changed one is decoded through its own layers, which takes longer. The
    text is that version's own, and a warning says by how much it differs. With `block_verification` the drafts of a
    sampled round are verified together instead of one by one (`Sampler.block`); by default as they were when the head
    was measured.

    Raises ValueError for a backbone that the head was not trained for, or, in families that are computed here and
    without `allow_other_backbone`, one that was changed since transformers loaded it (by an adapter, a hook,
    quantisation), an unknown controller, beam search, return_dict_in_generate, or a logits processor that may keep a
    state.
    """
    kwargs.pop("use_model_defaults", None)
    given, model = model, text_model(model)
    if model is not given:  # a processor of images and text gives them for text alone too
        kinds = kwargs.pop("token_type_ids", None)
        if kinds is not None and bool(torch.as_tensor(kinds).any()):
            raise ValueError("token_type_ids: they mark images, and only text is decoded here")
    fetching = {key: kwargs.pop(key) for key in FETCHING if key in kwargs}
    source = exit_head or _source(_named_by_caller())
    if exit_head is None and revision is None:
        revision = REVISION
    backbone, config, controllers = _engine(model, source, revision, cuda_graphs, allow_other_backbone, fetching)
    if controller is None or isinstance(controller, str):
        name = controller or _default(config.get("controller", "thompson"), backbone)
        if not is_of_batches(name):
            backbone.check_controller(make_controller(name))  # refuses an unknown one before anything is computed
    else:
        name = None
    # transformers 5.23 passes neither the streamer nor stop_strings on to `loop`, so both are read here.
    streamer = kwargs.get("streamer")
    _stop_at_strings(kwargs)
    _end_where_measured(model, kwargs, config.get("end_tokens", []))

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        _refuse(generation_config)
        check_stateless(logits_processor)
        block = config.get("block_verification", False) if block_verification is None else block_verification
        own = [c for c in stopping_criteria if type(c).__name__ not in OWN_CRITERIA]
        end = generation_config.eos_token_id
        ends = frozenset([end] if isinstance(end, int) else [] if end is None else torch.as_tensor(end).tolist())
        pad = generation_config.pad_token_id
        mask = model_kwargs.get("attention_mask")
        jobs: list[tuple[Request, Sampler]] = []
        for i, row in enumerate(input_ids):
            prompt = (row if mask is None else row[mask[i].bool()]).tolist()
            request = Request(
                prompt=prompt,
                max_new_tokens=generation_config.max_length - input_ids.shape[1],
                end_tokens=ends,
                on_token=_watch(row, own, streamer),
            )
            sampler = Sampler(
                temperature=1.0 if generation_config.do_sample else 0.0,
                processors=for_row(logits_processor, i, len(input_ids)),
                shown=row.tolist(),
                block=block,
            )
            jobs.append((request, sampler))
        greedy = not generation_config.do_sample  # acceptance differs between greedy and sampled texts
        together = None
        only_together = hasattr(controller, "begin") or (name or "").startswith("table:")
        if streamer is None and (len(jobs) > 1 or only_together):  # streamers take one row
            together = _batch_of(backbone, controller, name, config, greedy, controllers)
        if together is None and only_together:
            raise ValueError(
                "this controller is one of several texts at once, which cannot be decoded with a streamer, with "
                "cuda_graphs, or through transformers' layers: give one of a single text, such as thompson"
            )
        if together is not None:
            rows = _decode_together(backbone, jobs, together)
        else:
            if name is not None and (name, greedy) not in controllers:
                controllers[name, greedy] = learned_controller(name, config, greedy=greedy)
            decide = controller if name is None else controllers[name, greedy]
            rows = [self_speculative(backbone, request, sampler, decide).tokens for request, sampler in jobs]
        for (request, _), tokens in zip(jobs, rows, strict=True):
            _warn_beyond_context(model, len(request.prompt) + len(tokens))
        if streamer is not None:
            streamer.end()
        longest = max(len(tokens) for tokens in rows)
        filler = next(iter(ends), 0) if pad is None else int(pad)
        padded = [tokens + [filler] * (longest - len(tokens)) for tokens in rows]
        return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], 1)

    return GenerationMixin.generate(model, inputs, custom_generate=loop, **kwargs)


def _batch_of(backbone: SplitBackbone, controller, name: str | None, config: dict[str, Any], greedy: bool, known: dict):
    """The controller of several rows at once; None where rows are decoded one after the other: in families whose layers
    are called in transformers, with cuda_graphs, and with a controller that is for one text at a time. Of the head's
    own controller, copies are left out, and trees, which were measured with one text: rows of several cost more."""
    if not backbone.family.is_fast or backbone.has_fixed_shapes:
        return None
    if name is None:
        return controller if hasattr(controller, "begin") else None
    if controller is None:
        name = "thompson" if name.startswith("tree:") else name.partition("+")[0]
    if not is_of_batches(name):
        return None
    key = name, greedy, "batch"
    if key not in known:
        known[key] = learned_batch_controller(name, config, greedy)
    return known[key]


def _decode_together(backbone: SplitBackbone, jobs: list[tuple[Request, Sampler]], controller) -> list[list[int]]:
    """The new tokens of each row. A row's error ends the call, as it does in `generate`."""
    for _, sampler in jobs:  # a stream of its own for each row
        if not sampler.greedy:
            seed = int(torch.randint(1 << 62, ()))
            sampler.generator = torch.Generator(backbone.device).manual_seed(seed)
    engine = BatchEngine(backbone)
    longest = max(len(request.prompt) + request.max_new_tokens for request, _ in jobs)
    places = min(len(jobs), engine.fitting(longest))
    if places < len(jobs):
        warnings.warn(
            f"the memory that is free holds {places} of these {len(jobs)} rows: they are decoded in turns", stacklevel=2
        )
    rows: list[list[int]] = [[] for _ in jobs]
    for text in decode_batch(engine, jobs, controller, places):
        if text.error is not None:
            raise text.error
        rows[text.number] = text.generation.tokens
    return rows


def _default(name: str, backbone: SplitBackbone) -> str:
    """The controller of the head's config; where drafts cannot branch in this backbone, the same without branches."""
    if backbone.family.is_fast:
        return name
    ending = next((ending for ending in COPYING if name.endswith(ending)), "")
    return "thompson" + ending if name.startswith("tree:") else name.replace("+tree", "")


def _source(named: str | None) -> str | None:
    """Where the weights are: the folder that the caller named if it holds them, else the id they were pushed to."""
    return named if named and (Path(named) / "model.safetensors").is_file() else HEAD or named


def _named_by_caller() -> str | None:
    """The folder or Hub id that the caller gave as custom_generate=; None if it was not a string.

    transformers runs a copy of this file from its own cache and does not say where it was copied from, so the name is
    read from the stack frame of the `GenerationMixin.generate` that called `generate` here. A published folder
    therefore contains no path and can be moved.
    """
    name = sys._getframe(2).f_locals.get("custom_generate")
    return name if isinstance(name, str) else None


def _engine(
    model, source: str | None, revision: str | None, cuda_graphs: bool, any_backbone: bool, fetching: dict[str, Any]
) -> tuple[SplitBackbone, dict[str, Any], dict]:
    """The split backbone, the head's config and the controllers made so far. The first call loads them and stores them
    on the model; later calls reuse them unless the model's weights were replaced."""
    if source is None:
        raise ValueError("no exit head: give exit_head=<folder or Hub id>")
    known = model.__dict__.setdefault("_exit_heads", {})
    key = (source, revision, model.device, model.dtype, cuda_graphs, any_backbone)
    if key not in known or not known[key][0].still_is(model):  # an adapter may have been added since the last call
        where = {"revision": revision, **fetching}
        paths = [Path(cached_file(source, name, **where)) for name in ("config.json", "model.safetensors")]
        head, config = ExitHead.load(paths[0].parent), json.loads(paths[0].read_text())
        recorded = cuda_graphs and model.device.type == "cuda"
        if any_backbone and (model.config.model_type, model.config.num_hidden_layers) != (
            head.backbone.get("model_type"),
            head.num_layers,
        ):
            raise ValueError(
                f"allow_other_backbone=True: this is a {model.config.model_type} of {model.config.num_hidden_layers} "
                f"layers, the head was trained for a {head.backbone.get('model_type')} of {head.num_layers}"
            )
        engine = SplitBackbone(model, head, check=not any_backbone, fixed_shapes=recorded, beyond_context=True)
        if not engine.family.is_fast:
            _check_logits(engine, model)
        _warn_of_another(model, config)
        known[key] = engine, config, {}
    return known[key]


def _check_logits(engine: SplitBackbone, model) -> None:
    """Raises ValueError unless the engine gives the model's own logits: of families that are not computed here, nothing
    else tells."""
    ids = [(7 * i * i + 3 * i) % len(engine.embedding_VD) for i in range(12)]
    found = compare(engine, model, ids)
    if not found.largest <= rounding(engine.dtype, engine.num_layers):
        raise ValueError(
            f"the decoder's logits differ from this model's by {found.largest:.2g} of their spread: it cannot draft "
            "for it. Call generate without custom_generate="
        )


def _warn_of_another(model, config: dict[str, Any]) -> None:
    moved = distance(model, config["canary"]) if config.get("canary") else 0.0
    if moved > TOLERANCE:
        warnings.warn(
            f"this is not quite the {config['backbone']['name']} that the exit head was trained for (fine-tuned?): "
            f"log-probabilities differ by {moved:.2g} nats. The text is this backbone's own all the same, but fewer "
            "drafts may be accepted than the card says",
            AnotherBackbone,
            stacklevel=2,
        )


def _stop_at_strings(kwargs: dict[str, Any]) -> None:
    """Replace stop_strings= and tokenizer= by the stopping criterion that transformers would make of them."""
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    if strings:
        if tokenizer is None:
            raise ValueError("stop_strings needs tokenizer=")
        criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])


def _end_where_measured(model, kwargs: dict[str, Any], more: list[int]) -> None:
    """Add the end tokens stored with the head (backbone.end_tokens), unless the caller gives eos_token_id=."""
    if more and "eos_token_id" not in kwargs:
        ends = getattr(kwargs.get("generation_config"), "eos_token_id", None)
        ends = model.generation_config.eos_token_id if ends is None else ends
        known = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        kwargs["eos_token_id"] = list(dict.fromkeys([*known, *more]))


def _watch(prompt_row, criteria: list, streamer):
    """A function to be called with each committed token, which feeds the streamer and returns whether one of the user's
    stopping criteria is met; None if there is neither."""
    if not criteria and streamer is None:
        return None
    ids = prompt_row[None]

    def on_token(token: int) -> bool:
        nonlocal ids
        new = torch.tensor([[token]], device=ids.device)
        if streamer is not None:
            streamer.put(new[0].cpu())
        if not criteria:
            return False
        ids = torch.cat([ids, new], 1)
        return any(bool(torch.as_tensor(c(ids, None)).all()) for c in criteria)

    return on_token


def _warn_beyond_context(model, length: int) -> None:
    """Warn of a text longer than max_position_embeddings, as transformers' generate does, without stopping."""
    limit = model.config.max_position_embeddings
    if length > limit:
        warnings.warn(
            f"the text has {length} tokens, more than the backbone's maximum length of {limit}: it is what generate "
            "gives, which may be worth less there",
            stacklevel=2,
        )


def _refuse(config) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams={config.num_beams}: beams cannot be drafted; use greedy or sampling")
    if config.return_dict_in_generate:
        raise ValueError("return_dict_in_generate=True: only ids are returned here")
