"""Times every method on every prompt, interleaved, and keeps the measurements as tables in files.

Takes engines of one backbone, encoded prompts and the evaluate section; gives a table with a row for each text and one
with a row for each round. The order of the methods rotates from prompt to prompt, so that changes of the machine's
speed affect all of them alike.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from tqdm import tqdm

from ..config import Evaluate
from ..errors import UserError
from ..inference.backbone import SplitBackbone
from ..inference.controllers import make_controller, thompson_in
from ..inference.decoding import Generation, Request, autoregressive, self_speculative
from ..inference.rounds import memory_of, spare_of
from ..inference.sampling import Sampler
from ..prompts.ids import Encoded
from . import rivals
from .metrics import BASELINE

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One way of decoding that is timed: a head and a controller, or the baseline (exit_layer 0)."""

    exit_layer: int
    controller: str
    temperature: float


TABLES = ("prompts", "generations", "rounds", "rivals")
LISTS = {"prompts": ["ids"], "generations": ["tokens"], "rounds": ["drafts", "parents", "path"], "rivals": ["tokens"]}
"""Columns that hold lists."""


@dataclass
class Found:
    """Rows of the tables while measuring, and what the controllers learned."""

    texts: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    rival_texts: list[dict[str, Any]] = field(default_factory=list)
    learned: dict[Method, list[list[float]]] = field(default_factory=dict)
    """What thompson had learned after each text: the mean acceptance of each bin."""
    states: dict[Method, dict[str, Any]] = field(default_factory=dict)
    """thompson's state at the end, from which a later evaluation or a published head can start."""


@dataclass
class Measured:
    """The measurements as saved in files: every figure and test can be computed from them without measuring again."""

    prompts: pd.DataFrame
    """Columns: prompt, task, ids."""
    generations: pd.DataFrame
    rounds: pd.DataFrame
    rivals: pd.DataFrame
    about: dict[str, Any]
    """Hardware, versions and settings of the measurement; under `controllers`, what the learning ones had learned."""

    @classmethod
    def of(cls, found: Found, encoded: Encoded, about: dict[str, Any]) -> "Measured":
        """Make the tables from all rows. `about` must be convertible to JSON."""
        columns = ["rival", "exit_layer", "prompt", "task", "repeat", "tokens", "seconds"]  # also without rows
        learned = [
            asdict(method) | {"learned": means, "state": found.states[method]}
            for method, means in found.learned.items()
        ]
        return cls(
            pd.DataFrame([{"prompt": prompt.id, "task": prompt.task, "ids": ids} for prompt, ids in encoded]),
            pd.DataFrame(found.texts),
            pd.DataFrame(found.rounds),
            pd.DataFrame(found.rival_texts, columns=columns),
            about | {"controllers": learned},
        )

    def save(self, folder: Path) -> None:
        """Write one parquet file for each table, and measured.json."""
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet")
        (folder / "measured.json").write_text(json.dumps(self.about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Measured | None":
        """Read what `save` wrote; None if the folder holds no measurements."""
        if not (folder / "measured.json").exists():
            return None
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
        if "parents" not in tables["rounds"]:
            return None  # of a version that did not record them: measured anew
        for name, columns in LISTS.items():
            for column in columns:
                tables[name][column] = [row.tolist() for row in tables[name][column]]  # parquet gives arrays for lists
        return cls(**tables, about=json.loads((folder / "measured.json").read_text()))

    def learned(self) -> dict[Method, dict[str, Any]]:
        """Method -> `learned` and `state`, for each controller that learns."""
        rows = [dict(row) for row in self.about["controllers"]]
        names = ("exit_layer", "controller", "temperature")
        return {Method(*(row.pop(name) for name in names)): row for row in rows}


def in_turns(count: int, methods: list[T], repeats: int = 1, label: str = "") -> Iterator[tuple[int, int, T]]:
    """Yields (repeat, prompt, method) for every prompt 0..count-1; each prompt starts with the next method in the list.

    Garbage is collected between prompts only, so that its time does not count for any method.
    """
    gc.disable()
    try:
        with tqdm(total=count * repeats * len(methods), desc=label, unit="text") as bar:
            for turn in range(count * repeats):
                first = turn % len(methods)
                for method in methods[first:] + methods[:first]:
                    yield turn // count, turn % count, method
                    bar.update()
                gc.collect()
    finally:
        gc.enable()


class Decoders:
    """Decodes token ids by each method. Its controllers keep what they learn from text to text."""

    def __init__(
        self,
        engines: dict[int, SplitBackbone],
        config: Evaluate,
        ends: frozenset[int],
        seed: int,
        states: dict[Method, dict[str, Any]],
        corpus: Sequence[int] = (),
    ):
        self.engines, self.config, self.ends, self.seed = engines, config, ends, seed
        self.any_engine = next(iter(engines.values()))
        self.methods = [
            Method(n, name, t)
            for t in config.temperatures
            for n, names in ((0, [BASELINE]), *((n, config.controllers) for n in engines))
            for name in names
        ]
        drafting = [m for m in self.methods if m.exit_layer]
        self.controllers = {m: make_controller(m.controller, seed, m.temperature == 0) for m in drafting}
        for method, controller in self.controllers.items():
            if (learning := thompson_in(controller)) and method in states:
                learning.load_state_dict(states[method])
            if corpus and (memory := memory_of(controller)) is not None:
                memory.add(list(corpus))

    def decode(self, method: Method, ids: list[int], draws: int, max_new_tokens: int | None = None) -> Generation:
        """Decode with a method. `draws` is added to the seed, so that each prompt and repeat has its own random
        numbers, the same for all methods."""
        generator = torch.Generator(self.any_engine.device).manual_seed(self.seed + draws)
        c = self.config
        sampler = Sampler(method.temperature, c.top_k, c.top_p, generator, block=c.block_verification)
        request = Request(ids, max_new_tokens or self.config.max_new_tokens, self.ends)
        if method.exit_layer == 0:
            return autoregressive(self.any_engine, request, sampler)
        return self_speculative(self.engines[method.exit_layer], request, sampler, self.controllers[method])


def measure(
    model: Any,
    engines: dict[int, SplitBackbone],
    encoded: Encoded,
    ends: frozenset[int],
    config: Evaluate,
    seed: int,
    states: dict[Method, dict[str, Any]],
    drafts: dict[int, Any],
    corpus: Sequence[int] = (),
) -> Found:
    """Time all methods and rivals on all prompts.

    states: states from which controllers start. drafts: exit layer -> draft model, for the rivals that take one.
    corpus: tokens that controllers with a memory copy from.
    Raises UserError if nothing could be drafted at some temperature.
    """
    decoders = Decoders(engines, config, ends, seed, states, corpus)
    others = _rivals(config, list(engines))
    longest = max((ids for _, ids in encoded), key=len)
    spare = max(map(spare_of, decoders.controllers.values()))
    for engine in engines.values():  # passes of fixed shapes are recorded for the longest text
        engine.new_cache(len(longest) + config.max_new_tokens, spare)
    warm = Decoders(engines, config, ends, seed, {})  # own controllers: the real ones must not learn slow first passes
    for m in warm.methods:
        warm.decode(m, encoded[0][1], 0, min(32, config.max_new_tokens))
    for rival in others:  # on the longest: transformers never shrinks its static cache, and compiles anew when it grows
        rivals.decode(model, rival, longest, config.max_new_tokens, ends, drafts)
    found = Found()
    every: list[Method | rivals.Rival] = [*decoders.methods, *others]
    for repeat, i, method in in_turns(len(encoded), every, config.repeats, "evaluate"):
        prompt, ids = encoded[i]
        key = asdict(method) | {"prompt": prompt.id, "task": prompt.task, "repeat": repeat}
        if isinstance(method, rivals.Rival):
            tokens, seconds = rivals.decode(model, method, ids, config.max_new_tokens, ends, drafts)
            found.rival_texts.append(key | {"tokens": tokens, "seconds": seconds})
            continue
        out = decoders.decode(method, ids, i + 1000 * repeat)
        figures = {name: getattr(out, name) for name in ("tokens", "finish_reason", "seconds", "prefill_seconds")}
        found.texts.append(key | figures)
        found.rounds += [key | {"round": j, "levels": r.levels} | asdict(r) for j, r in enumerate(out.rounds)]
        if method in decoders.controllers and (learning := thompson_in(decoders.controllers[method])):
            found.learned.setdefault(method, []).append(learning.acceptance())
            found.states[method] = learning.state_dict()
    if silent := [t for t in config.temperatures if t not in {r["temperature"] for r in found.rounds}]:
        raise UserError(
            f"evaluate.temperatures={silent}: the backbone ended every text with its first token, so nothing was "
            "drafted; check that the prompts fit the backbone (chat_template, column)."
        )
    return found


def _rivals(config: Evaluate, exit_layers: list[int]) -> list[rivals.Rival]:
    """The rivals that the config names; none, with a message, where nothing greedy is measured."""
    if config.rivals and 0 not in config.temperatures:
        print(f"evaluate: rivals are greedy and evaluate.temperatures={config.temperatures} has no 0: none measured")
        return []
    return rivals.rivals_of(config.rivals, exit_layers)
