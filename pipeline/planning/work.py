"""Estimates the time of a step of distill, bound by arithmetic or by the network, and the GPU-hours of every stage.

Takes an architecture, the layout of processes, a GPU and a config; gives lower bounds under the assumptions of
docs/planning.md. Letters as in this package's docstring.
"""

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from ..config import Config
from ..evaluation.batch_sizes import REPEATS as BATCH_REPEATS
from ..evaluation.batches import WAVES
from ..evaluation.rivals import rivals_of
from ..inference.batch_controllers import is_of_batches
from .architecture import Architecture
from .hardware import BANDWIDTH_SHARE, Gpu, Layout
from .memory import giga, mean_positions, prompt_tokens, sequences_of_pass, weight_bytes
from .storage import cached_bytes, set_tokens


@dataclass(frozen=True)
class Step:
    """One optimizer step of all processes."""

    tokens: int
    flops: float
    gathered: float
    """Bytes that every process receives."""
    compute: float
    """Seconds of arithmetic, on every GPU."""
    network: float
    """Seconds of collectives."""
    cache_read: float
    """Bytes of the teacher's cache that every node reads in a step; 0 with an online teacher."""

    @property
    def seconds(self) -> float:
        """Seconds if arithmetic and collectives overlap completely, as FSDP tries, and reading the cache is free."""
        return max(self.compute, self.network)

    @property
    def bound(self) -> str:
        return "compute" if self.compute >= self.network else "network"


@dataclass(frozen=True)
class Stage:
    name: str
    gpus: int
    """GPUs that work at the same time, on one copy of the backbone or on all copies of distill."""
    seconds: float
    how: str

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


# ---- FLOPs per token: multiplying by matrices of M parameters takes 2 M, and twice that in the backward pass


def teacher_flops(a: Architecture, length: int) -> float:
    """FLOPs per token through L layers: 2 x matrices + 4 T Q.

    Attention covers the whole packed sequence, as its mask is explicit.
    """
    return a.layers * (2 * _matrices(a) + 4 * length * a.query)


def logits_flops(a: Architecture, vocabulary: int) -> float:
    """FLOPs of the logits of one token, of a vocabulary of this size."""
    return 2 * vocabulary * a.hidden


def head_flops(a: Architecture, length: int, vocabulary: int) -> float:
    """FLOPs per token of one head, forward and backward, with its logits and their gradient.

    6 x matrices + 14 T Q + 4 W D, with W tokens of the draft vocabulary (V without one): the backward pass of fused
    attention recomputes the scores, so it takes 10 T Q after the forward pass's 4.
    """
    return 6 * a.head_matrices + 14 * length * a.query + 2 * logits_flops(a, vocabulary)


def _matrices(a: Architecture) -> int:
    return sum(map(prod, a.matrices))


# ---- distill


def step(a: Architecture, config: Config, layout: Layout, gpu: Gpu) -> Step:
    """The step if every position were learned from. Prompts are not, unless distill.learn_from=all, so the logits take
    less in practice."""
    d, w, heads = config.distill, weight_bytes(config), len(config.distill.exit_layers)
    tokens = d.sequences_per_step * d.sequence_length
    online = d.teacher == "online"
    drafted = a.draft_vocabulary(d.draft_vocabulary)
    per_token = logits_flops(a, drafted) + heads * head_flops(a, d.sequence_length, drafted)
    per_token += teacher_flops(a, d.sequence_length) * online
    passes = ceil(d.sequences_per_step / layout.processes / sequences_of_pass(config, layout))
    backbone = _unit_parameters(a, layers=online) * w
    network = config.plan.node_bandwidth or gpu.network
    seconds = layout.gather_seconds(backbone + heads * a.head * w, gpu, network)
    seconds += layout.gather_seconds(heads * a.head * 4, gpu, network)  # reduce-scatter of the gradients
    seconds += layout.sum_seconds(heads * a.head * 4 / layout.degree, gpu, network)
    flops = tokens * per_token
    return Step(
        tokens=tokens,
        flops=flops,
        gathered=passes * (backbone + heads * a.head * (w + 4)) * (layout.degree - 1) / layout.degree,
        compute=flops / layout.processes / rate(config, gpu),
        network=passes * seconds,
        cache_read=0 if online else tokens * cached_bytes(a, heads, w) * layout.per_node / layout.processes,
    )


def rate(config: Config, gpu: Gpu) -> float:
    """FLOP/s that a GPU is assumed to reach when arithmetic is the bound."""
    return getattr(gpu, config.backbone.dtype) * 1e12 * config.plan.mfu


def _unit_parameters(a: Architecture, layers: bool = True) -> int:
    return sum(prod(shape) for unit in (a.units if layers else a.units[-2:]) for shape in unit)


def distill(a: Architecture, config: Config, layout: Layout, gpu: Gpu) -> Stage:
    """The steps and validations of all processes."""
    d, one = config.distill, step(a, config, layout, gpu)
    seconds, how = d.max_steps * one.seconds, f"{d.max_steps} steps x {one.seconds:.3g} s"
    if tokens := set_tokens(config):
        # A validation is a step without the heads' backward pass, which is about two thirds of the heads' work.
        forward = one.seconds - 2 / 3 * one.seconds * _share_of_heads(a, config)
        times = ceil(d.max_steps / d.validate_every) + 1
        seconds += times * d.held_out * tokens / one.tokens * forward
        how += f" + {times} validations of {giga(d.held_out * tokens)} tokens"
    return Stage("distill", layout.processes, seconds, how)


def _share_of_heads(a: Architecture, config: Config) -> float:
    length, online = config.distill.sequence_length, config.distill.teacher == "online"
    drafted = a.draft_vocabulary(config.distill.draft_vocabulary)
    heads = len(config.distill.exit_layers) * head_flops(a, length, drafted)
    return heads / (heads + logits_flops(a, drafted) + online * teacher_flops(a, length))


def cache(a: Architecture, config: Config, gpu: Gpu, gpus: int) -> Stage | None:
    """The teacher's pass over the whole set, on GPUs that share the layers; None if its states are not cached."""
    tokens = set_tokens(config)
    if config.distill.teacher != "cached" or not tokens:
        return None
    flops = tokens * teacher_flops(a, config.distill.sequence_length)
    return Stage("cache", gpus, flops / rate(config, gpu), f"{giga(tokens)} tokens, {flops:.3g} FLOP")


# ---- decoding: every token reads all weights


def token_seconds(a: Architecture, config: Config, gpu: Gpu, texts: int, positions: float) -> float:
    """Seconds to decode one token of each of `texts` texts with `positions` positions of keys and values.

    GPUs that share the layers work one after the other, so their number does not matter.
    """
    return float(pass_seconds(a, config, gpu, a.layers, a.vocabulary, np.array(texts), 1, positions))


def pass_seconds(
    a: Architecture, config: Config, gpu: Gpu, layers: int, vocabulary: int, texts: np.ndarray, rows: int,
    positions: float, is_head: bool = False,
) -> np.ndarray:  # fmt: skip
    """Seconds of a pass through some layers and the logits of a vocabulary, of `rows` rows of each of `texts` texts.

    The time to read the weights once and every text's keys and values once, or the time of the arithmetic, if longer.
    is_head: the layer is the exit head, which may have a dense MLP where layers have experts.
    """
    w, every = weight_bytes(config), texts * rows
    weights, matrices = (a.head, a.head_matrices) if is_head and a.dense_head else (a.read(every), _matrices(a))
    read = (layers * weights + vocabulary * a.hidden) * w + texts * positions * 2 * layers * a.key * w
    flops = every * (layers * (2 * matrices + 4 * positions * a.query) + logits_flops(a, vocabulary))
    return np.maximum(read / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE), flops / rate(config, gpu))


def generate(a: Architecture, config: Config, gpu: Gpu, gpus: int) -> Stage | None:
    """The stage if every answer had generate.max_new_tokens tokens.

    A server is assumed to have its weights on as many GPUs, all at work. None if the number of prompts is unknown, or
    if the backbone does not answer.
    """
    g = config.generate
    if not g.num_prompts or g.engine == "original":
        return None
    texts = 1 if g.engine == "speculative" else min(g.batch_size, g.num_prompts)
    prompt = prompt_tokens(config)
    one = token_seconds(a, config, gpu, texts, prompt + g.max_new_tokens / 2)
    seconds = g.num_prompts / texts * g.max_new_tokens * one
    seconds += g.num_prompts * prompt * teacher_flops(a, prompt) / rate(config, gpu)
    tokens = f"{giga(g.num_prompts * g.max_new_tokens)} tokens"
    if g.engine == "server":
        return Stage("generate", gpus, seconds / gpus, f"{tokens}, {texts} texts at once, by servers")
    return Stage("generate", gpus, seconds, f"{tokens}, {texts} texts at once, {texts / one:.3g} tokens/s a copy")


def evaluate(a: Architecture, config: Config, gpu: Gpu, gpus: int) -> Stage | None:
    """The stage if all decoding were as slow as autoregressive decoding; None without a number of prompts.

    Each rival counts like a controller; some rivals run once for each head. Several texts at once
    (evaluate.batch_sizes) are counted by their own token's time.
    """
    e, heads = config.evaluate, len(config.distill.exit_layers)
    if not e.num_prompts:
        return None
    texts = len(e.temperatures) * (1 + heads * len(e.controllers))
    texts += len(rivals_of(e.rivals, config.distill.exit_layers)) * (0 in e.temperatures)
    texts *= e.num_prompts * e.repeats
    positions = mean_positions(config)
    one = token_seconds(a, config, gpu, 1, positions)
    how = f"{texts} texts x {e.max_new_tokens} tokens x {one * 1000:.3g} ms"
    seconds = texts * e.max_new_tokens * one
    if e.batch_sizes:
        methods = 1 + sum(map(is_of_batches, e.controllers))
        runs = heads * (1 + methods * max(BATCH_REPEATS, e.repeats))  # one warms up
        decoded = {b: runs * max(e.num_prompts, WAVES * b) for b in e.batch_sizes}
        each = {b: e.max_new_tokens * token_seconds(a, config, gpu, b, positions) / b for b in e.batch_sizes}
        seconds += sum(decoded[b] * each[b] for b in e.batch_sizes)
        how += f" + {sum(decoded.values())} texts several at once"
    return Stage("evaluate", gpus, seconds, how)
