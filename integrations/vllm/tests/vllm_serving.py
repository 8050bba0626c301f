"""vLLM in its own environment, and the simulation of what it must do: what the tests marked `vllm` share.

EXIT_HEADS_VLLM_PYTHON names the interpreter of an environment with vLLM and this plugin; `make test-vllm` makes one in
.venv-vllm. The pipeline runs in the tests' own process.

T tokens of a text, V vocabulary
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_child import MARK

from pipeline.evaluation.losslessness import teacher_forced
from pipeline.evaluation.metrics import CostModel
from pipeline.evaluation.simulation import Trace, acceptance, replay
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.sampling import Sampler
from pipeline.runs.files import sha256_of

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(os.environ.get("EXIT_HEADS_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
CHILD = Path(__file__).parent / "vllm_child.py"
FREE = CostModel({"shallow": 1.0, "head": 1.0, "rest": 0.0, "verify": {"1": 1.0}})
"""Times do not matter here."""


def environment() -> dict[str, str]:
    """Of a process with vLLM, which needs Intel's OpenMP on a CPU."""
    library = PYTHON.parent.parent / "lib/libiomp5.so"
    return os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | (
        {"LD_PRELOAD": str(library)} if library.exists() else {}
    )  # fmt: skip


class Engine:
    """vLLM with a model and, if wanted, a head or a draft model, in a process of its own. `error` is what it says if it
    does not start; `memory` what it took (vllm_child.py)."""

    def __init__(
        self, model: Path | str, head: Path | str | None = None, k: int = 3, spec: dict | None = None, **llm: Any
    ):
        asked = {"model": str(model), "max_model_len": 256, "max_num_seqs": 4} | llm
        if head is not None:
            drafting = {"method": "draft_model", "model": str(head), "num_speculative_tokens": k}
            asked["speculative_config"] = drafting | (spec or {})
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(PYTHON), "-B", str(CHILD)], env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        about = self._ask(asked)
        self.error, self.memory, self.scheduler = (about.get(key) for key in ("error", "memory", "scheduler"))

    def call(self, **call: Any) -> dict:
        return self._ask(call)

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, asked: dict) -> dict:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.log.seek(0)
        raise RuntimeError(self.log.read()[-4000:])


def serve(model: Path | str, calls: list[dict], *head: Any, **settings: Any) -> dict:
    """What an `Engine` does with these calls, one after the other."""
    engine = Engine(model, *head, **settings)
    found = {"error": engine.error, "memory": engine.memory, "calls": [engine.call(**call) for call in calls]}
    engine.close()
    return found


def greedy(new: int) -> dict:
    return {"temperature": 0.0, "max_tokens": new, "ignore_eos": True}


class Rounds(NamedTuple):
    """What the simulation says of some texts."""

    ids: list[list[int]]
    of_each: list[int]
    by_position: list[int]


class Lengths:
    """Draft lengths of rounds in turn, whatever happens; fixed K is a list of one."""

    def __init__(self, lengths: Iterable[int]):
        self.lengths = cycle(lengths)
        self.now = next(self.lengths)

    def peek(self, k: int) -> bool:
        return k < self.now

    def draft(self, k: int, confidence: object) -> bool:
        return True

    def observe(self, made: object) -> None:
        self.now = next(self.lengths)


def simulated(engine: SplitBackbone, prompts: list[list[int]], new: int | list[int], lengths: list[int]) -> Rounds:
    """Rounds with these draft lengths in turn along the backbone's greedy texts, from the head's own predictions.

    vLLM drafts beyond the last token that a request may have and counts what would be accepted there, so the
    simulated text is longer than the limit. A round of no drafts is none for vLLM's counter.
    """
    found = Rounds([], [], [0] * max(lengths))
    for i, prompt in enumerate(prompts):
        limit = new if isinstance(new, int) else new[i]
        text = autoregressive(engine, Request(prompt, limit + max(lengths) + 1), Sampler()).tokens
        p_TV, q_TV = teacher_forced(engine, prompt, text, Sampler())
        chance_T = acceptance(p_TV, q_TV, text, Sampler()).numpy()
        trace = Trace.of(str(i), len(text), chance_T)
        t = rounds = 0
        for made in replay(Lengths(lengths), trace, chance_T > 0, FREE):
            if t + 1 >= limit:
                break
            t += made.tokens
            rounds += made.drafted > 0
            for place in range(made.accepted):
                found.by_position[place] += 1
        found.ids.append(text[:limit])
        found.of_each.append(rounds)
    return found


def changed(head: Path, target: Path, *, draft_ids: Tensor | None = None, noise: float = 0.0, **fields: Any) -> Path:
    """A copy of a published head's folder: with a draft vocabulary, other weights, or other fields in config.json; its
    sha256 is that of its weights."""
    shutil.copytree(head, target)
    weights = load_file(head / "model.safetensors")
    if draft_ids is not None:
        weights["draft_ids"] = draft_ids.to(torch.int32)
        fields["draft_vocabulary"] = len(draft_ids)
    if noise:
        dice = torch.Generator().manual_seed(0)
        name = "mlp.down_proj.weight"
        weights[name] += noise * weights[name].std() * torch.randn(weights[name].shape, generator=dice)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((head / "config.json").read_text()) | {"sha256": sha256_of(target / "model.safetensors")}
    (target / "config.json").write_text(json.dumps(config | fields))
    return target
