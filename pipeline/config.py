"""What a run is: dataclasses <- one YAML file <- key=value words, in this order of precedence.

Takes a file and a list of words, gives a checked Config; a mistyped key or value is a UserError that names
it and says what would be right. Knows nothing of stages; `help_text` is what `exit-heads VERB --help` prints.
"""

import difflib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config_rules
from .errors import UserError


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the sentence that --help shows."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Run:
    name: str = option("pocket", "name of the run folder")
    dir: str = option("runs", "folder that holds the run folders")


@dataclass
class Machine:
    """How the work is laid on this machine. Changing it never makes a finished stage stale."""

    device: str = option("auto", "auto, cpu, cuda; auto takes a GPU when there is one")
    device_map: str | None = option(
        None,
        "of generate, cache and evaluate, for a backbone larger than one GPU: auto, balanced or sequential, as in "
        "accelerate; a layer is never split",
    )
    cuda_graphs: bool = option(False, "evaluate: record the passes of the decoder as CUDA graphs; nothing on a CPU")
    threads: int = option(0, "CPU threads of every stage but evaluate; 0 leaves torch's choice")
    servers: list[str] = option(
        [], "engine server: OpenAI-compatible servers that hold this backbone, such as [http://node1:8000/v1]"
    )
    server_model: str | None = option(None, "engine server: the model's name there; default: the one that it lists")
    server_api: str = option(
        "auto", "engine server: completions, chat, or auto: token ids where the server takes them, else text"
    )
    server_timeout: float = option(600.0, "engine server: seconds that one answer may take")
    nodes: int = option(1, "nodes of the distill job")
    processes_per_node: int = option(1, "distill processes on each node; on GPUs, one per GPU")
    shard_degree: int = option(
        0,
        "distill processes that share one copy of the backbone; 0 = all. Fewer, such as the GPUs of a node, and every "
        "such group holds a copy of its own (HSDP): more memory, but weights are gathered inside a group only",
    )
    timeout: float = option(
        1800.0, "seconds that distill processes wait for one another before they say who is missing and stop"
    )

    @property
    def processes(self) -> int:
        """Of distill, on all nodes."""
        return self.nodes * self.processes_per_node

    def processes_of_a_copy(self) -> int:
        """Distill processes that share one copy of the backbone. Raises UserError if they cannot be divided so."""
        if self.shard_degree and self.processes % self.shard_degree:
            raise UserError(
                f"machine.shard_degree={self.shard_degree}: does not divide the {self.processes} processes "
                "(machine.nodes x machine.processes_per_node); take those of a node, "
                f"{self.processes_per_node}, or 0 for all"
            )
        return self.shard_degree or self.processes


@dataclass
class Backbone:
    name_or_path: str = option("pocket", "pocket (built in), a Hub id, or a checkpoint folder")
    revision: str | None = option(None, "Hub commit, tag or branch; pin a commit for a run that can be repeated")
    dtype: str = option("bfloat16", "float32 or bfloat16: the dtype of the frozen weights in every stage")
    trust_remote_code: bool = option(False, "run Python code that the checkpoint ships; off unless you trust it")
    end_tokens: list[Any] = option(
        [],
        "tokens that end a text beside the checkpoint's own, as texts or ids, such as ['<|im_end|>']: in every stage, "
        "and with the published head",
    )


@dataclass
class Source:
    """One source of a mixture."""

    path: str | None = option(None, "as prompts.path")
    weight: float = option(1.0, "its share among the first prompts, relative to the other sources'")
    name: str | None = option(None, "as prompts.name")
    revision: str | None = option(None, "as prompts.revision")
    split: str = option("train", "as prompts.split")
    column: str | None = option(None, "as prompts.column")
    licence: str | None = option(None, "as prompts.licence")
    task: str | None = option(None, "task of all its prompts; default: their column task or category")


@dataclass
class Prompts:
    path: str | None = option("pocket", "pocket (built in), a .jsonl, .json, .txt or .parquet file, or a datasets id")
    name: str | None = option(None, "datasets id only: one of its configurations, such as main; default: the only one")
    revision: str | None = option(None, "datasets id only: commit to pin")
    split: str = option("train", "datasets id only: split to read")
    column: str | None = option(
        None,
        "column of the prompt; default: a chat in messages, conversations or conversation; prompt, question, "
        "instruction (and input) or text; turns",
    )
    licence: str | None = option(None, "licence of the prompts, for the records; default: what the dataset says")
    mixture: list[Source] = option([], "several sources instead of path, such as [{path: a.jsonl, weight: 2}, ...]")
    held_out: float = option(0.1, "share of the prompts, by hash of the first turn, that only evaluate may see")
    bad_rows: str = option("stop", "rows that cannot be read: stop, or skip: leave them out and count them")
    min_tokens: int = option(0, "shorter prompts are dropped; 0 = off")
    max_tokens: int = option(0, "longer prompts are dropped; 0 = off")
    too_long: str = option("error", "prompts that leave no room for an answer: error or drop")
    chat_template: str = option(
        "none", "none (plain text), tokenizer (the chat template it brings) or the path of a .jinja file"
    )


@dataclass
class EvaluatePrompts(Prompts):
    path: str | None = option(None, "prompts of evaluate; default: the held-out share of prompts.path")
    held_out: float = option(0.0, "unused here: every prompt of this set is evaluated on")


@dataclass
class Generate:
    engine: str = option(
        "padded",
        "who answers: in process padded (padded batches), continuous (transformers' continuous batching) or "
        "speculative (one by one, drafted by an exit head trained before); server (machine.servers); original (nobody: "
        "the answers that the prompts' source gives)",
    )
    exit_head: str | None = option(None, "of engine speculative: the head's folder, such as runs/NAME/heads/exit-2")
    controller: str = option(
        "fixed:2", "of engine speculative: fixed:K, confidence:T or entropy:T, which learn nothing"
    )
    num_prompts: int = option(384, "prompts to answer, the first of the shuffled set; 0 = all")
    max_new_tokens: int = option(128, "longest response, in tokens")
    temperatures: list[float] = option([0.0, 1.0], "mixed over the prompts in turn; 0 is greedy")
    top_p: float = option(1.0, "nucleus of the sampled responses")
    batch_size: int = option(64, "prompts answered together")
    shard_size: int = option(
        128, "prompts of a shard: what a process claims, and makes anew if another was killed at it"
    )


@dataclass
class Distill:
    exit_layers: list[int] = option([2], "exit layers N, 1 <= N < L; one head is trained for each")
    teacher: str = option(
        "online",
        "online: the backbone runs in every step; cached: `exit-heads cache` runs it once over all sequences and keeps "
        "its hidden states on disk",
    )
    init: str = option("last", "weights a head starts from: last (the backbone's last layer), layer (layer N), random")
    loss: list[str] = option(
        ["kl"], "terms of the loss, each NAME or WEIGHT*NAME: kl, tvd, tvd++, overlap, ce; such as [kl, 0.1*ce]"
    )
    learn_from: str = option(
        "responses", "responses, or all: the prompts' tokens too, of which the teacher gives the distributions for free"
    )
    truncated: str = option("drop", "answers cut off by generate.max_new_tokens: drop, or keep to learn from them too")
    repeated_share: float = option(
        0.5, "an answer of which more than this share of the 8-grams occurred before in it is left out; 1 keeps all"
    )
    max_steps: int = option(120, "optimizer steps")
    sequence_length: int = option(256, "tokens of a packed sequence")
    sequences_per_step: int = option(16, "packed sequences of a step, over all processes")
    sequences_per_pass: int = option(
        0,
        "packed sequences that a process takes through the model at once; 0 = all of its step. Fewer save memory: "
        "their gradients add up to those of the step",
    )
    learning_rate: float = option(2e-3, "peak; warm-up is linear, then a cosine to a tenth")
    warmup_steps: int = option(10, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW weight decay")
    clip_norm: float = option(1.0, "largest gradient norm of each head")
    temperature: float = option(1.0, "softmax temperature of teacher and head in the loss")
    loss_chunk: int = option(512, "rows of logits alive at once in the loss")
    held_out: float = option(0.05, "share of the responses, by hash, kept for validation")
    validate_every: int = option(40, "steps between validations")
    patience: int = option(
        0, "validations without a longer expected acceptance length after which a head stops learning; 0 = never"
    )
    checkpoint_every: int = option(40, "steps between resumable checkpoints")


@dataclass
class Evaluate:
    prompts: EvaluatePrompts = field(default_factory=EvaluatePrompts)
    num_prompts: int = option(24, "prompts measured, each with all its turns; 0 = all")
    max_new_tokens: int = option(128, "tokens decoded for each prompt")
    temperatures: list[float] = option([0.0, 1.0], "0 is greedy; each is a table of its own")
    top_k: int = option(0, "applied to backbone and exit head alike; 0 = off")
    top_p: float = option(1.0, "applied to backbone and exit head alike; 1 = off")
    controllers: list[str] = option(
        ["thompson", "fixed:1", "fixed:2", "fixed:4", "beta"],
        "who decides how many tokens to draft: thompson, fixed:K, confidence:T, entropy:T, beta, calibration",
    )
    rivals: list[str] = option(
        ["generate", "generate:static", "early_exit", "assistant_model:2", "prompt_lookup"],
        "what transformers offers, measured beside at temperature 0; early_exit (the layers below N alone) and "
        "assistant_model:K (the head as a draft model, K drafts a round) at each exit layer; [] for none",
    )
    head: str | None = option(
        None, "measure this published head (--head) instead of the run's own: org/name, org/name@revision or a folder"
    )
    states: str | None = option(
        None, "eval/results.json of an earlier evaluation of the same heads: start from what thompson had learned there"
    )
    repeats: int = option(1, "interleaved passes over the prompts")
    threads: int = option(1, "CPU threads while decoding: one token at a time rarely profits from more")


@dataclass
class Plan:
    """What `exit-heads plan` assumes. No stage reads it."""

    gpu: str = option("H100", "GPU of every process: A100-40GB, A100-80GB, H100, H200, L40S, RTX-4090, or cpu")
    mfu: float = option(0.4, "share of the GPU's peak that training and prefill are assumed to reach")
    node_bandwidth: float | None = option(
        None, "GB/s between nodes for each GPU, one way; default: usual for the GPU, such as 50 (400 Gbit/s) for H100"
    )
    acceptance: list[float] = option(
        [], "draft acceptance rate expected at each of distill.exit_layers, such as [0.6, 0.7]; []: not known"
    )
    pilot: str | None = option(
        None, "run folder of a smaller run whose eval/results.json gives acceptance, and costs if of the same backbone"
    )


@dataclass
class Publish:
    repo_id: str | None = option(None, "org/name the head will live under; written into the card")
    target: str = option(
        "folder",
        "folder: write hub/<N>/ and stop there; hub: push it to publish.repo_id too, with the token of HF_TOKEN or of "
        "`hf auth login`",
    )
    public: bool = option(False, "target hub: a repo that everyone can read (--public); default: a private one")
    exit_layer: int | None = option(None, "exit layer of the head to publish; default: that of the best")
    licence: str | None = option(
        None, "licence on the card, as the Hub names it, such as apache-2.0; default: what the backbone's card says"
    )
    min_speedup: float = option(1.0, "the gate: the best controller's 95 % interval must lie above this")
    force: bool = option(False, "publish a head that the gate refused; the card then says why it was refused")


@dataclass
class Wandb:
    mode: str = option("auto", "auto (online with a key, else offline), online, offline, disabled")
    project: str = option("exit-heads", "W&B project")
    entity: str | None = option(None, "W&B user or team")


@dataclass
class Config:
    seed: int = option(0, "of every random choice in the run")
    run: Run = field(default_factory=Run)
    machine: Machine = field(default_factory=Machine)
    backbone: Backbone = field(default_factory=Backbone)
    prompts: Prompts = field(default_factory=Prompts)
    generate: Generate = field(default_factory=Generate)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    publish: Publish = field(default_factory=Publish)
    plan: Plan = field(default_factory=Plan)
    wandb: Wandb = field(default_factory=Wandb)


def load(path: str | Path | None, words: list[str], instead: dict[str, Any] | None = None) -> Config:
    """The Config of `--config path word ...`. Raises UserError for anything that is not right in it.

    `instead` holds defaults, by section and key, that take the place of the dataclasses' own.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config()), instead or {})
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--config {path}: no such file. Start from one in configs/.")
        try:
            loaded = OmegaConf.load(path)
        except Exception as error:  # YAML's own errors carry the line
            raise UserError(f"--config {path}: not YAML: {error}") from None
        if not OmegaConf.is_dict(loaded):
            raise UserError(f"--config {path}: `key: value` lines are needed. See configs/.")
        merged = _merge(merged, loaded, f"--config {path}")
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not key=value. Example: distill.max_steps=200")
        try:
            parsed = OmegaConf.from_dotlist([word])
        except Exception as error:
            raise UserError(f"{word!r} cannot be read: {error}") from None
        merged = _merge(merged, parsed, word)
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${a.reference} to nothing
        where = words if path is None else ["--config", str(path), *words]
        raise UserError(f"{' '.join(where)}: key {error.full_key}: {str(error).splitlines()[0]}") from None
    config_rules.check(config)
    return config


def variations(word: str) -> list[str]:
    """key=[a,b] -> key=a, key=b. Raises UserError for a word that is no list."""
    key, equals, values = word.partition("=")
    try:
        parsed = yaml.safe_load(values)
    except yaml.YAMLError:
        parsed = None
    if not key or not equals or not isinstance(parsed, list) or not parsed:
        raise UserError(f"--vary {word}: a key and a list of values is needed, such as machine.nodes=[1,2,4]")
    return [f"{key}={json.dumps(value)}" for value in parsed]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as they go to YAML, JSON and checkpoints."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def _merge(base: Any, new: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, new)
    except (OmegaConfBaseException, TypeError) as error:
        known = [f.name for f in fields(Config)] + _keys(Config)
        key = getattr(error, "full_key", None) or where.partition("=")[0]
        if getattr(error, "object_type", None) is Source:  # omegaconf forgets which list a source stands in
            key = ("evaluate." if where.startswith("evaluate.") else "") + f"prompts.mixture[].{key}"
        close = [] if key.rstrip("[]0123456789") in known else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else "See exit-heads VERB --help."
        first = str(getattr(error, "msg", None) or error).splitlines()[0].partition(" Did you mean")[0].rstrip(".")
        raise UserError(f"{where}: key {key}: {first}. {remedy}") from None


def _keys(kind: type, prefix: str = "") -> list[str]:
    names = []
    for f in fields(kind):
        if is_dataclass(f.type):
            names += _keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            names.append(prefix + f.name)
        for entry in _entries(f.type):
            names += _keys(entry, f"{prefix}{f.name}[].")
    return names


def _entries(kind: Any) -> list[type]:
    """The dataclass that a list is of, if it is one."""
    return [entry for entry in get_args(kind) if is_dataclass(entry)]  # type: ignore[misc]


def help_text(sections: list[str]) -> str:
    """`key  default  sentence` of every key in these sections, for --help."""
    lines = []
    defaults = to_dict(Config())

    def walk(kind: type, values: dict, prefix: str) -> None:
        for f in fields(kind):
            if is_dataclass(f.type):
                if prefix or f.name in sections:
                    walk(f.type, values[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
            elif prefix or f.name in sections:
                value = "null" if values[f.name] is None else values[f.name]
                lines.append(f"  {prefix + f.name}={value}\n      {f.metadata['help']}")
                for entry in _entries(f.type):
                    walk(entry, to_dict(entry), f"{prefix}{f.name}[].")

    walk(Config, defaults, "")
    return "\n".join(lines)
