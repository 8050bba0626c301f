"""Estimates GPU memory: of each GPU in distill, and of all that hold one copy of the backbone in generate and evaluate.

Takes an architecture, the layout of processes and a config; gives rows of name, bytes, and the product that they come
from (docs/planning.md has the formulas). Letters as in this package's docstring.
"""

from dataclasses import dataclass
from math import prod

from ..config import Config
from ..evaluation.losslessness import CHUNK
from .architecture import Architecture, share
from .hardware import MARGIN, Gpu, Layout

GIB = 2**30


@dataclass(frozen=True)
class Row:
    what: str
    size: float
    """Bytes."""
    how: str


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU: the tensors that stay, and those added at each moment of a step; the moments alternate."""

    kept: list[Row]
    moments: dict[str, list[Row]]

    @property
    def largest(self) -> str:
        """Name of the moment that needs most memory."""
        return max(self.moments, key=lambda name: total(self.moments[name]))

    @property
    def rows(self) -> list[Row]:
        """The rows that stay and those of the largest moment."""
        return self.kept + self.moments[self.largest]

    @property
    def total(self) -> float:
        return total(self.rows)


def total(rows: list[Row]) -> float:
    return sum(row.size for row in rows)


def usable(gpu: Gpu) -> float:
    """Bytes of a GPU that a plan may use: its memory without MARGIN."""
    return gpu.memory * GIB * (1 - MARGIN)


def weight_bytes(config: Config) -> int:
    """w: bytes of a frozen weight, and of the heads' numbers in computation."""
    return {"float32": 4, "bfloat16": 2}[config.backbone.dtype]


def sequences_of_pass(config: Config, layout: Layout) -> int:
    """Number of packed sequences in one forward pass of a distill process."""
    share_of_step = config.distill.sequences_per_step // layout.processes
    return min(config.distill.sequences_per_pass or share_of_step, share_of_step)


def distill(a: Architecture, config: Config, layout: Layout) -> Memory:
    """Memory of one process of distill."""
    d, w, degree = config.distill, weight_bytes(config), layout.degree
    heads, sequences = len(d.exit_layers), sequences_of_pass(config, layout)
    n = sequences * d.sequence_length
    units = a.units[-2:] if d.teacher == "cached" else a.units  # then only LM head and final norm
    held = sum(share(unit, degree) for unit in units)
    largest = max(sum(map(prod, unit)) for unit in [*units, a.head_shapes])
    states = n * a.hidden
    activations = saved(a, config, sequences)
    buffers = 2 * largest * w if degree > 1 else 0
    kept = [
        Row("backbone, this GPU's share", held * w, f"{giga(held * degree)} x {w} B / {degree}"),
        Row("heads: weight, gradient, two moments", heads * share(a.head_shapes, degree) * 16,
            f"{heads} x {giga(a.head)} x 16 B / {degree}"),
        Row("gather buffers", buffers, f"2 x {giga(largest)} x {w} B: the largest unit and the next"),
    ]  # fmt: skip
    hidden = Row("hidden states of the teacher", (heads + 1) * states * w, f"{heads + 1} x {n} x {a.hidden} x {w} B")

    scores = []
    if a.scores:  # products, masked ones, and a softmax in float32
        size = sequences * a.heads * d.sequence_length**2 * (2 * w + 4)
        how = f"{sequences} x {a.heads} x {d.sequence_length}^2 x (2 x {w} + 4) B"
        scores = [Row("attention scores", size, how)]

    def of_heads(count: int, gradients: int) -> list[Row]:
        """Memory that `count` heads hold between their forward and backward passes."""
        return [
            Row("heads, whole", count * a.head * w, f"{count} x {giga(a.head)} x {w} B"),
            Row("heads, activations", count * activations, f"{count} x {n} x {activations / n / 1000:.0f} kB"),
            Row("heads, final hidden states", count * states * ((1 + gradients) * w + 4),
                f"{count} x {n} x {a.hidden} x ({1 + gradients} x {w} + 4) B"),
        ]  # fmt: skip

    moments = {
        "teacher's forward pass": [
            hidden,
            Row("unit at work", largest * w, f"{giga(largest)} x {w} B"),
            Row("inside a layer", n * (3 * a.ffn + 2 * a.hidden) * w, f"{n} x (3 x {a.ffn} + 2 x {a.hidden}) x {w} B"),
            Row("attention mask", sequences * d.sequence_length**2 * (1 + w),
                f"{sequences} x {d.sequence_length}^2 x (1 + {w}) B"),
            *scores,
        ],
        "loss": [
            hidden,
            *of_heads(heads, gradients=1),
            Row("LM head, whole", a.embedding * w, f"{giga(a.embedding)} x {w} B"),
            Row("rows of the teacher", states * w, f"{n} x {a.hidden} x {w} B"),
            *logits_of_a_chunk(a, config, min(d.loss_chunk, n)),
        ],
        "backward pass": [hidden, *of_heads(heads, gradients=2)],
        "gradient of a head": [
            hidden,
            *of_heads(heads - 1, gradients=2),
            Row("gradient, whole, twice", a.head * (w + 4), f"{giga(a.head)} x ({w} + 4) B: as computed, as summed"),
        ],
    }  # fmt: skip
    if d.teacher == "cached":
        del moments["teacher's forward pass"]
    return Memory(kept, moments)


def saved(a: Architecture, config: Config, sequences: int) -> float:
    """Bytes that autograd keeps from one head's forward pass.

    For each token these are w (4 F + 4 Q + 4 D), the inputs and outputs of the parts of MLP and attention, and 4 D of
    the second norm, which computes in float32; norms of queries and keys (Qwen3) add (w + 4) (Q + G). Each sequence
    adds its attention mask; where attention is not fused, also its scores after the softmax, in float32 and in w.
    """
    length, w = config.distill.sequence_length, weight_bytes(config)
    token = w * 4 * (a.head_ffn + a.query + a.hidden) + 4 * a.hidden
    if a.qk_norm:
        token += (w + 4) * (a.query + a.key)
    scores = a.heads * (w + 4) if a.scores else 0
    return sequences * (length * token + length**2 * (w + scores))


def logits_of_a_chunk(a: Architecture, config: Config, chunk: int) -> list["Row"]:
    """Of `chunk` rows. With a draft vocabulary, a step has logits of W tokens; a validation has two buffers of V for
    the teacher, four of W for the heads, and the products that fill them."""
    each, w = logit_bytes(config), weight_bytes(config)
    drafted = a.draft_vocabulary(config.distill.draft_vocabulary)
    if drafted == a.vocabulary:
        return [Row("logits of a chunk", chunk * drafted * each, f"{chunk} x {drafted} x {each} B")]
    rows = Row("LM head, draft vocabulary", drafted * a.hidden * w, f"{drafted} x {a.hidden} x {w} B")
    step, validation = drafted * each, a.vocabulary * 12 + drafted * 20
    if step > validation:
        return [rows, Row("logits of a chunk", chunk * step, f"{chunk} x {drafted} x {each} B")]
    return [
        rows,
        Row(
            "logits of a validation's chunk", chunk * validation, f"{chunk} x ({a.vocabulary} x 12 + {drafted} x 20) B"
        ),
    ]


def logit_bytes(config: Config) -> int:
    """Bytes for each entry of a chunk of logits: four buffers in float32 (five for a loss of several terms), the
    product that fills them, and the gradient in the LM head's dtype."""
    w, buffers = weight_bytes(config), 4 if len(config.distill.loss) == 1 else 5
    return (buffers + 1) * 4 + (w if w < 4 else 0)


# ---- the whole backbone, distributed over GPUs by whole layers


def generate(a: Architecture, config: Config) -> list[Row]:
    """Memory of all GPUs together that hold one copy, or that serve it; [] if the backbone does not answer."""
    g, w = config.generate, weight_bytes(config)
    if g.engine == "original":
        return []
    batch = 1 if g.engine == "speculative" else g.batch_size
    prompt = prompt_tokens(config)
    rows = [_weights(a, w), _cache(a, batch, prompt + g.max_new_tokens, w)]
    if g.engine == "speculative":
        rows.append(Row("exit head", a.head * w, f"{giga(a.head)} x {w} B"))
    return [*rows, _prefill(a, batch * prompt, w)]


def evaluate(a: Architecture, config: Config) -> list[Row]:
    """Memory of all GPUs together that hold one copy, with all heads.

    One text is decoded at a time, or the largest of evaluate.batch_sizes. The proofs of losslessness pass a whole text
    through the layers at once, and compute the distributions of CHUNK rows at once.
    """
    new, heads, w = config.evaluate.max_new_tokens, len(config.distill.exit_layers), weight_bytes(config)
    prompt, rows, each = prompt_tokens(config), min(CHUNK, new), proof_bytes(config)
    texts = max([1, *config.evaluate.batch_sizes])
    return [
        _weights(a, w),
        Row("exit heads", heads * a.head * w, f"{heads} x {giga(a.head)} x {w} B"),
        _cache(a, texts, prompt + new, w, extra_layers=1),
        Row("distributions, to prove losslessness", rows * a.vocabulary * each, f"{rows} x {a.vocabulary} x {each} B"),
        _prefill(a, prompt + new, w),
    ]


def proof_bytes(config: Config) -> int:
    """Bytes for each entry of a chunk in the proof of sampled text; 0 if all text is greedy.

    The buffers are p, q and a mask of the previous chunk, p of this one, q as logits and as a shaped distribution, and
    a mask; top_p adds those of sorting.
    """
    if not any(t > 0 for t in config.evaluate.temperatures):
        return 0
    return 41 if config.evaluate.top_p < 1 else 22


def mean_positions(config: Config) -> float:
    """Positions of keys and values that a token of evaluate attends to, on average: a prompt and half of its answer."""
    return prompt_tokens(config) + config.evaluate.max_new_tokens / 2


def prompt_tokens(config: Config) -> int:
    """Assumed tokens of a prompt: as no prompt is read here, each fills a packed sequence together with its answer."""
    return max(1, config.distill.sequence_length - config.generate.max_new_tokens)


def _weights(a: Architecture, w: int) -> Row:
    return Row("backbone", a.parameters * w, f"{giga(a.parameters)} x {w} B")


def _cache(a: Architecture, texts: int, positions: int, w: int, extra_layers: int = 0) -> Row:
    layers = a.layers + extra_layers
    size = texts * positions * 2 * layers * a.key * w
    return Row("keys and values", size, f"{texts} x {positions} x 2 x {layers} x {a.key} x {w} B")


def _prefill(a: Architecture, tokens: int, w: int) -> Row:
    return Row("prefill, inside a layer", tokens * (3 * a.ffn + 2 * a.hidden) * w,
               f"{tokens} x (3 x {a.ffn} + 2 x {a.hidden}) x {w} B")  # fmt: skip


def giga(count: float) -> str:
    """A count with its unit, G or M."""
    return f"{count / 1e9:.2f} G" if count >= 1e7 else f"{count / 1e6:.2f} M"
