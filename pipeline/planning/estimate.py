"""The plan of one config: memory, times and predicted speedups, and the verdicts that follow from them.

`make` takes a config and the backbone's architecture and collects the estimates of the other files in a Plan;
`verdicts` says in sentences whether it fits the GPUs, which change would make it fit, and whether a head will pay.
"""

import copy
import itertools
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ..config import Config, to_dict
from . import batches, gain, memory, storage, work
from .architecture import Architecture
from .batches import Crossover
from .gain import Prediction
from .hardware import Gpu, Layout, gpu_of
from .memory import GIB, Memory, Row
from .work import Stage, Step

SMALL_CHUNK = 128
"""The smallest number of rows in a chunk of logits that still keeps a GPU busy."""


@dataclass(frozen=True)
class Plan:
    config: Config
    architecture: Architecture
    gpu: Gpu | None
    """None for plan.gpu=cpu: without known peaks there are no times, and no memory to compare with."""
    layout: Layout
    distill: Memory
    generate: list[Row]
    evaluate: list[Row]
    host: list[Row]
    disk: list[Row]
    step: Step | None
    stages: list[Stage]
    predictions: list[Prediction]
    batches: list[Crossover]
    """Empty without a GPU, or without an expected acceptance."""

    @property
    def fits(self) -> bool | None:
        """True if distill fits the memory of its GPUs; None without a GPU."""
        return None if self.gpu is None else self.distill.total <= memory.usable(self.gpu)

    def gpus_of(self, rows: list[Row]) -> int:
        """The least number of GPUs whose memory holds `rows`: one copy of the backbone in generate or evaluate."""
        return 1 if self.gpu is None else max(1, ceil(memory.total(rows) / memory.usable(self.gpu)))

    @property
    def best(self) -> Prediction | None:
        """The prediction with the largest speedup; None without an expected acceptance."""
        able = [p for p in self.predictions if p.speedups]
        return max(able, key=lambda p: p.speedups[p.best]) if able else None

    def as_json(self) -> dict[str, Any]:
        """The whole plan, with the terms of every sum of bytes and seconds."""
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("generate", "evaluate", "host", "disk")}
        summary = {"largest": self.distill.largest, "total": self.distill.total, "fits": self.fits}
        return {
            "config": to_dict(self.config),
            "architecture": asdict(self.architecture),
            "gpu": None if self.gpu is None else self.gpu._asdict(),
            "layout": asdict(self.layout),
            "memory": {"distill": asdict(self.distill) | summary, **rows},
            "step": None if self.step is None else asdict(self.step) | {"seconds": self.step.seconds},
            "stages": [asdict(stage) | {"gpu_hours": stage.gpu_hours} for stage in self.stages],
            "predictions": [asdict(p) for p in self.predictions],
            "batches": [asdict(crossover) for crossover in self.batches],
            "verdicts": verdicts(self),
        }


def make(config: Config, a: Architecture) -> Plan:
    """The plan of a config. Raises UserError for an unknown plan.gpu, a machine.shard_degree that does not divide the
    processes, and a wrong plan.acceptance or plan.pilot."""
    gpu, layout = gpu_of(config.plan.gpu), Layout.of(config.machine)
    plan = Plan(
        config=config,
        architecture=a,
        gpu=gpu,
        layout=layout,
        distill=memory.distill(a, config, layout),
        generate=memory.generate(a, config),
        evaluate=memory.evaluate(a, config),
        host=storage.host(a, config, layout),
        disk=storage.disk(a, config),
        step=None if gpu is None else work.step(a, config, layout, gpu),
        stages=[],
        predictions=gain.predict(a, config),
        batches=[],
    )
    if gpu is not None:
        stages = [
            work.generate(a, config, gpu, plan.gpus_of(plan.generate)),
            work.cache(a, config, gpu, plan.gpus_of(plan.evaluate)),
            work.distill(a, config, layout, gpu),
            work.evaluate(a, config, gpu, plan.gpus_of(plan.evaluate)),
        ]
        plan.stages.extend(stage for stage in stages if stage is not None)
        plan.batches.extend(batches.crossovers(a, config, gpu, plan.gpus_of(plan.evaluate), plan.predictions))
    return plan


# ---- sentences


def verdicts(plan: Plan) -> list[str]:
    """The conclusions as sentences: memory first, then each exit layer."""
    lines = _memory_verdicts(plan)
    if storage.set_tokens(plan.config) is None:
        lines.append("generate.num_prompts=0, all: how many is not known before they are read, so generate's time and "
                     "whatever grows with the responses are left out")  # fmt: skip
    return lines + _experts(plan) + [_verdict(p, plan.config.publish.min_speedup) for p in plan.predictions]


def _experts(plan: Plan) -> list[str]:
    """Why drafts cost more in a mixture of experts than elsewhere; [] of other backbones."""
    a, rows = plan.architecture, 5
    if not a.is_mixture:
        return []
    efficiency = gain.target_efficiency(a, plan.config.distill.exit_layers[0], rows)
    return [
        f"{rows} tokens in a pass read {a.reached(rows):.0f} of {a.experts} experts, one reads {a.experts_per_token}: "
        f"verifying 4 drafts costs {1 / efficiency:.1f} times as much as one token (target efficiency {efficiency:.2f})"
    ]


def _memory_verdicts(plan: Plan) -> list[str]:
    if plan.gpu is None:
        return ["plan.gpu=cpu: no peak known, so no times, and no verdict on memory"]
    name, room = plan.config.plan.gpu, memory.usable(plan.gpu)
    needs = f"{plan.distill.total / GIB:.1f} of {room / GIB:.1f} GiB of each {name}"
    lines = [f"distill fits: {needs}" if plan.fits else f"distill does not fit: {needs}; {what_would_fit(plan)}"]
    for stage, rows in (("generate", plan.generate), ("evaluate", plan.evaluate)):
        if (gpus := plan.gpus_of(rows)) > 1:
            laid = plan.config.machine.device_map or (stage == "generate" and plan.config.generate.engine == "server")
            remedy = "" if laid else ": machine.device_map=auto lays it over them"
            lines.append(f"{stage} needs {gpus} {name} for one copy of the backbone{remedy}")
    return lines


def what_would_fit(plan: Plan) -> str:
    """The smallest change of config keys that makes distill fit: each key is tried alone, then in combination."""
    config, room = plan.config, memory.usable(plan.gpu) if plan.gpu else 0.0
    changes = []
    if memory.sequences_of_pass(config, plan.layout) > 1:
        changes.append(("distill", "sequences_per_pass", 1))
    if config.distill.loss_chunk > SMALL_CHUNK:
        changes.append(("distill", "loss_chunk", SMALL_CHUNK))
    if plan.layout.copies > 1:
        changes.append(("machine", "shard_degree", 0))
    for count in range(1, len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            other = copy.deepcopy(config)
            for section, key, value in chosen:
                setattr(getattr(other, section), key, value)
            needs = memory.distill(plan.architecture, other, Layout.of(other.machine)).total
            if needs <= room:
                words = " ".join(f"{section}.{key}={value}" for section, key, value in chosen)
                return f"it would with {words}: {needs / GIB:.1f} GiB"
    return "give it more GPUs (machine.nodes), shorter sequences (distill.sequence_length) or fewer exit layers"


def _verdict(p: Prediction, min_speedup: float) -> str:
    """One sentence: will this exit layer give the speedup that publish.min_speedup demands?"""
    goal = max(1.0, min_speedup)
    where = f"exit layer {p.exit_layer}"
    if p.expected and p.expected.temperature is not None:
        where += f" at temperature {p.expected.temperature:g}"
    needed = gain.needed(p.costs, goal)
    if needed is None or p.ceiling <= goal:
        return f"{where} will not pay: even if every draft were accepted, it would be {p.ceiling:.2f} times as fast"
    if not p.speedups:
        return f"{where} will pay if more than {needed:.0%} of its drafts are accepted, and no acceptance is given"
    value = f"{p.speedups[p.best]:.2f} times as fast with K = {p.best}"
    if p.speedups[p.best] <= goal:
        return f"{where} will not pay: {value} is predicted; it would need an acceptance of {needed:.0%}"
    return f"{where} should pay: {value} is predicted"
