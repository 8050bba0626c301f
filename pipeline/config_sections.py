"""The sections of the config: every key with its type, default and the sentence that --help shows.

config.py makes a Config of them and loads it; config_rules.py checks the values.
"""

from dataclasses import dataclass, field
from typing import Any

from .errors import UserError


def option(default: Any, text: str, is_path: bool = False) -> Any:
    """A dataclass field with its default and the sentence that --help shows.

    `is_path`: the value may be a file or folder of this machine, and a ~ that it begins with is expanded.
    """
    metadata = {"help": text, "is_path": is_path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


OTHER_BACKBONE = (
    "take a head that was trained for other weights of the same model, such as unquantised ones "
    "(--allow-other-backbone): the output is the given backbone's own, drafts may be accepted less often"
)


@dataclass
class Run:
    name: str = option("pocket", "name of the run folder")
    dir: str = option("runs", "folder that holds the run folders", is_path=True)


@dataclass
class Machine:
    """On which devices and processes the work is done. Changing it never makes a finished stage stale."""

    device: str = option("auto", "auto, cpu or cuda; auto takes a GPU if there is one")
    device_map: str | None = option(
        None,
        "generate, cache and evaluate: how a backbone larger than one GPU is spread over the GPUs: auto, balanced or "
        "sequential, as in accelerate; a layer is never split",
    )
    cuda_graphs: bool = option(
        False,
        "evaluate: record the decoder's passes as CUDA graphs; no effect on a CPU, and on families that run through "
        "transformers' layers",
    )
    pack: str = option(
        "auto",
        "auto or off: generate (engines padded and speculative), evaluate and chat copy the weights into the order "
        "that oneDNN reads fastest (float32 on a CPU), which doubles their memory; auto does so where it helps and "
        "twice as much memory is free",
    )
    threads: int = option(0, "CPU threads of every stage except evaluate (evaluate.threads); 0 = torch's default")
    servers: list[str] = option(
        [], "generate.engine=server: OpenAI-compatible servers of this backbone, such as [http://node1:8000/v1]"
    )
    server_model: str | None = option(
        None, "generate.engine=server: name of the model there; default: the model that the server lists"
    )
    server_api: str = option(
        "auto",
        "generate.engine=server: completions, chat, or auto, which sends token ids if the server takes them, else text",
    )
    server_timeout: float = option(600.0, "generate.engine=server: seconds to wait for one answer")
    nodes: int = option(1, "number of nodes of the distill job")
    processes_per_node: int = option(1, "number of distill processes on each node; on GPUs, one for each GPU")
    shard_degree: int = option(
        0,
        "number of distill processes that share one copy of the backbone; 0 = all. With fewer, such as the GPUs of a "
        "node, each group holds its own copy (HSDP): more memory is taken, but weights are gathered inside groups only",
    )
    timeout: float = option(
        1800.0, "seconds that distill processes wait for one another before they name the missing ones and stop"
    )

    @property
    def processes(self) -> int:
        """Number of distill processes on all nodes together."""
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
    name_or_path: str = option("pocket", "pocket (built in), a Hub id, a checkpoint folder or a .gguf file", True)
    gguf_file: str | None = option(None, "name of a .gguf file in the folder or Hub repository of name_or_path")
    gguf_dir: str = option("${run.dir}/backbones", "folder of the checkpoints that GGUF files are dequantised to", True)
    revision: str | None = option(None, "Hub commit, tag or branch; a commit makes the run repeatable")
    dtype: str = option("bfloat16", "dtype of the frozen weights in every stage: float32 or bfloat16")
    trust_remote_code: bool = option(
        False, "whether Python code that the checkpoint contains may run; set it only if you trust it"
    )
    end_tokens: list[Any] = option(
        [],
        "tokens that end a text beside the checkpoint's own, as texts or ids, such as ['<|im_end|>']: in every stage, "
        "and with the published head",
    )


@dataclass
class Source:
    """One source of a mixture."""

    path: str | None = option(None, "as prompts.path", is_path=True)
    weight: float = option(1.0, "share of this source among the first prompts, relative to the weights of the others")
    name: str | None = option(None, "as prompts.name")
    revision: str | None = option(None, "as prompts.revision")
    split: str = option("train", "as prompts.split")
    column: str | None = option(None, "as prompts.column")
    licence: str | None = option(None, "as prompts.licence")
    task: str | None = option(None, "task of all prompts of this source; default: their column task or category")


@dataclass
class Prompts:
    path: str | None = option(
        "pocket", "pocket (built in), a .jsonl, .json, .txt or .parquet file, or the id of a dataset on the Hub", True
    )
    name: str | None = option(None, "configuration of a dataset on the Hub, such as main; default: the only one")
    revision: str | None = option(None, "commit of a dataset on the Hub; it must be given for one")
    split: str = option("train", "split of a dataset on the Hub")
    column: str | None = option(
        None,
        "column that holds the prompt; default: the first that is there of messages, conversations and conversation "
        "(chats), prompt, question, instruction (with input) and text, turns",
    )
    licence: str | None = option(
        None, "licence of the prompts, as the card will name it; default: what the dataset says"
    )
    mixture: list[Source] = option([], "several sources instead of path, such as [{path: a.jsonl, weight: 2}, ...]")
    held_out: float = option(0.1, "share of the prompts, chosen by a hash of the first turn, that only evaluate uses")
    bad_rows: str = option("stop", "what to do at a row that cannot be read: stop, or skip (leave it out and count it)")
    min_tokens: int = option(0, "prompts of fewer tokens are dropped; 0 = none")
    max_tokens: int = option(0, "prompts of more tokens are dropped; 0 = none")
    too_long: str = option("error", "what to do with prompts that leave no room for an answer: error or drop")
    chat_template: str = option(
        "none", "none (plain text), tokenizer (its own chat template) or the path of a .jinja file", is_path=True
    )


@dataclass
class EvaluatePrompts(Prompts):
    path: str | None = option(None, "prompts of evaluate; default: the held-out share of prompts.path", is_path=True)
    held_out: float = option(0.0, "no effect: every prompt of this set is used by evaluate")


@dataclass
class Generate:
    engine: str = option(
        "padded",
        "how prompts are answered: padded (padded batches in this process), continuous (transformers' continuous "
        "batching), speculative (several prompts at once, drafted by an exit head trained before), server "
        "(machine.servers), or original (the answers given in the prompts' source are taken)",
    )
    exit_head: str | None = option(
        None, "generate.engine=speculative: folder of the exit head, such as runs/NAME/heads/exit-2", is_path=True
    )
    controller: str = option(
        "fixed:2",
        "generate.engine=speculative: fixed:K, tree:AxB, confidence:T or entropy:T, the controllers that learn "
        "nothing; or K by the number of texts that are decoded at once, as in table:1=2,8=1,16=0",
    )
    num_prompts: int = option(384, "number of prompts to answer, the first of the shuffled set; 0 = all")
    max_new_tokens: int = option(128, "largest number of tokens of a response")
    temperatures: list[float] = option([0.0, 1.0], "temperatures, assigned to the prompts in turn; 0 is greedy")
    top_p: float = option(1.0, "probability mass of the nucleus that responses are sampled from; 1 = off")
    batch_size: int = option(64, "number of prompts answered together")
    shard_size: int = option(
        128, "number of prompts of a shard, the unit that one process claims and that is lost if it is killed"
    )


@dataclass
class Distill:
    exit_layers: list[int] = option(
        [2], "exit layers N, 1 <= N < L, with a head for each; auto (an empty list): `exit-heads pilot` chooses one"
    )
    teacher: str = option(
        "online",
        "online (the backbone runs in every step) or cached (`exit-heads cache` runs it once over all sequences and "
        "keeps its hidden states on disk)",
    )
    init: str = option(
        "last", "initial weights of a head: last (the backbone's last layer), layer (its layer N) or random"
    )
    head: str = option(
        "layer",
        "what a head is: layer (a decoder layer as the backbone has them) or dense (of a mixture of experts: a layer "
        "with a dense MLP in place of its experts)",
    )
    dense_width: int = option(
        0, "distill.head=dense: width of the MLP; 0 = that of the experts which compute one token together"
    )
    loss: list[str] = option(
        ["kl"],
        "terms of the loss, each NAME or WEIGHT*NAME, such as [kl, 0.1*ce]: kl (the backbone's whole distribution), ce "
        "(its most probable token), tvd (the rejection rate), tvd++ (the same with normalised gradients), overlap "
        "(minus the log of the acceptance rate)",
    )
    draft_vocabulary: str = option(
        "auto",
        "tokens that a head can draft: the W that the answers use most, 0 (all), or auto (the W that shall pay most)",
    )
    learn_from: str = option(
        "responses", "tokens whose distributions are learned: responses, or all (the tokens of the prompts too)"
    )
    truncated: str = option("drop", "what to do with answers cut off by generate.max_new_tokens: drop or keep")
    repeated_share: float = option(
        0.5, "answers are left out if more than this share of their 8-grams are repetitions; 1 keeps all answers"
    )
    max_steps: int = option(120, "number of optimizer steps")
    sequence_length: int = option(256, "number of tokens of a packed sequence")
    sequences_per_step: int = option(16, "number of packed sequences of a step, over all processes")
    sequences_per_pass: int = option(
        0,
        "number of packed sequences that a process passes through the model at once; 0 = all of its step. Fewer take "
        "less memory; gradients are accumulated over the step",
    )
    learning_rate: float = option(2e-3, "peak learning rate; after a linear warm-up it falls by a cosine to a tenth")
    warmup_steps: int = option(10, "number of steps of the linear warm-up")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip_norm: float = option(1.0, "largest gradient norm of each head")
    temperature: float = option(1.0, "softmax temperature of teacher and head in the loss")
    loss_chunk: int = option(512, "number of rows of logits that the loss holds at once")
    held_out: float = option(0.05, "share of the responses, chosen by a hash, that is kept for validation")
    validate_every: int = option(40, "number of steps between validations")
    patience: int = option(
        0, "a head stops learning after so many validations without a longer expected acceptance length; 0 = never"
    )
    checkpoint_every: int = option(40, "number of steps between resumable checkpoints")


@dataclass
class Evaluate:
    prompts: EvaluatePrompts = field(default_factory=EvaluatePrompts)
    num_prompts: int = option(24, "number of prompts measured, each with all its turns; 0 = all")
    max_new_tokens: int = option(128, "number of tokens decoded for each prompt")
    temperatures: list[float] = option([0.0, 1.0], "temperatures measured, each in a table of its own; 0 is greedy")
    top_k: int = option(0, "top-k of the sampling, for backbone and exit head alike; 0 = off")
    top_p: float = option(1.0, "top-p of the sampling, for backbone and exit head alike; 1 = off")
    controllers: list[str] = option(
        ["thompson", "fixed:1", "fixed:2", "fixed:4", "beta"],
        "how many tokens a round drafts: thompson (learns while it decodes what pays), fixed:K, confidence:T and "
        "entropy:T (until the head is less sure than T), beta and calibration (those of the EESD paper), goodput and "
        "others (of other papers and engines: docs/control.md); thompson+tree also drafts further candidates for a "
        "place where that pays, tree:2x2x1 always 2 for the first draft, 2 after each of them, and 1 after these; with "
        "+lookup behind any name, drafts are also copied from the text where that pays, with +memory also from the "
        "texts measured before",
    )
    corpus: str | None = option(
        None,
        "a text file that controllers with +memory copy from too, such as the document that the prompts are about; of "
        "a long one the last 32767 tokens",
    )
    rivals: list[str] = option(
        ["generate", "generate:static", "early_exit", "assistant_model:2", "prompt_lookup"],
        "methods of transformers, measured for comparison at temperature 0; early_exit (drafts of the first N layers) "
        "and assistant_model:K (the head as a draft model, K drafts a round) at each exit layer; [] for none",
    )
    head: str | None = option(
        None,
        "published head to measure (--head) instead of the run's own: org/name, org/name@revision or a folder",
        is_path=True,
    )
    block_verification: bool = option(
        False,
        "in sampling, verify the drafts of a round together (Sun et al., ICLR 2025) instead of one by one: it accepts "
        "no fewer on average, and as many with one draft a round",
    )
    allow_other_backbone: bool = option(False, OTHER_BACKBONE)
    states: str | None = option(
        None,
        "eval/results.json of an earlier evaluation of the same heads; thompson starts from what it had learned there",
        is_path=True,
    )
    repeats: int = option(1, "number of interleaved passes over the prompts")
    batch_sizes: list[int] = option(
        [],
        "numbers of texts that are decoded together, such as [1, 4, 16]: speedup over autoregressive decoding of as "
        "many, at the first of the temperatures; [] = not measured",
    )
    threads: int = option(0, "CPU threads of decoding; 0 = the fastest number, found by timing a pass of one token")


@dataclass
class Plan:
    """What `exit-heads plan` assumes. No stage reads this section."""

    gpu: str = option("H100", "GPU of every process: A100-40GB, A100-80GB, H100, H200, L40S, RTX-4090, or cpu")
    mfu: float = option(0.4, "assumed share of the GPU's peak that training and prefill reach")
    node_bandwidth: float | None = option(
        None, "bandwidth between nodes in GB/s for each GPU, one way; default: the usual one, such as 50 for an H100"
    )
    acceptance: list[float] = option(
        [], "expected draft acceptance rate at each of distill.exit_layers, such as [0.6, 0.7]; [] = not known"
    )
    pilot: str | None = option(
        None,
        "run folder of a smaller run; its eval/results.json gives the acceptance, and for the same backbone the costs",
        is_path=True,
    )


@dataclass
class Publish:
    repo_id: str | None = option(None, "org/name of the published head on the Hub, which the card names")
    target: str = option(
        "folder",
        "folder (write hub/<N>/) or hub (push that folder to publish.repo_id too, with the token of HF_TOKEN or of "
        "`hf auth login`)",
    )
    public: bool = option(False, "publish.target=hub: whether everyone may read the repo (--public)")
    exit_layer: int | None = option(None, "exit layer of the head to publish; default: that of the best head")
    licence: str | None = option(
        None, "licence named on the card, such as apache-2.0; default: what the backbone's card says"
    )
    min_speedup: float = option(
        1.0, "speedup that the 95 % interval of the best controller must lie above for the head to be published"
    )
    force: bool = option(
        False, "whether to publish a head that the gate refused; the card then says why it was refused"
    )


@dataclass
class Chat:
    head: str | None = option(
        None, "exit head that drafts (--head): a folder, as runs/NAME/hub/N, or org/name[@revision] on the Hub", True
    )
    allow_other_backbone: bool = option(False, OTHER_BACKBONE)
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")
    top_k: int = option(0, "top-k of the sampling, for backbone and exit head alike; 0 = off")
    top_p: float = option(1.0, "top-p of the sampling, for backbone and exit head alike; 1 = off")
    controller: str = option("thompson", "how many tokens to draft, as one of evaluate.controllers, or none: no drafts")
    max_new_tokens: int = option(512, "largest number of tokens of an answer")
    system: str = option("", "system message, for backbones with a chat template")
    compare: bool = option(
        False, "whether every answer is decoded autoregressively too, to measure the speedup; /compare does it for one"
    )


@dataclass
class Wandb:
    mode: str = option(
        "auto",
        "auto (what WANDB_MODE or W&B's settings file says, else online with a key and offline without), online, "
        "offline or disabled",
    )
    project: str | None = option(
        None, "W&B project; default: what WANDB_PROJECT or W&B's settings file says, else exit-heads"
    )
    entity: str | None = option(
        None, "W&B user or team; default: what WANDB_ENTITY or W&B's settings file says, else your own"
    )
