"""Tiny random backbones for tests: real transformers checkpoints of 4 thin layers, with a tokenizer of bytes.

Takes a folder and a family name; gives the checkpoint's folder in under a second, without network. Also makes run
folders on such a backbone, with untrained heads.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer(context: int = 256) -> PreTrainedTokenizerFast:
    """256 byte tokens, ids 0-255 (in the byte-level alphabet's order), END = 256 = eos, PAD = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, END, PAD])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def tiny_backbone(tmp_path: Path, family: str = "llama", *, seed: int = 0, sharpness: float = 1.0, **overrides) -> Path:
    """Save a random checkpoint of a family, by its model_type, in float32; returns its folder.

    4 layers, D = 32, V = 258, context 256; `overrides` are fields of the transformers config. `sharpness`
    scales the LM head: at 1 the next token is nearly uniform, at 20 it is nearly certain.
    """
    tokenizer = byte_tokenizer(overrides.get("max_position_embeddings", 256))
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | overrides
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:  # transformers' std of 0.02 would leave every layer close to the identity
                    weight.normal_(std=1.0 if "embed" in name else weight.shape[-1] ** -0.5)
            model.get_output_embeddings().weight.mul_(sharpness)
    folder = Path(tmp_path) / f"tiny-{family}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_reader_of_images(tmp_path: Path, sharpness: float = 4.0) -> Path:
    """Save a random Gemma 3 that reads images too, its text part as small as `tiny_backbone`; returns the folder."""
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "query_pre_attn_scalar": 12, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    places = {"image_token_index": 255, "boi_token_index": 253, "eoi_token_index": 254, "mm_tokens_per_image": 4}
    ends = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **places, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=sharpness / 6 if "embed" in name else weight.shape[-1] ** -0.5)
    folder = Path(tmp_path) / "tiny-gemma3"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(tmp_path: Path, *words: str):
    """A run folder `<tmp_path>/runs/t` on a tiny llama with peaked distributions; `words` are key=value settings.

    Only greedy texts are evaluated: a temperature more doubles the time and the pictures of evaluate.
    """
    from pipeline.config import load
    from pipeline.runs.folder import RunDir

    folder = tmp_path / "tiny-llama"
    if not folder.exists():
        tiny_backbone(tmp_path, sharpness=4.0)
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(f'{{"prompt": "prompt number {i * i}", "task": "t{i % 2}"}}\n' for i in range(40)))
    base = [
        f"run.dir={tmp_path / 'runs'}", "run.name=t", f"backbone.name_or_path={folder}", "backbone.dtype=float32",
        f"prompts.path={prompts}", "prompts.held_out=0.3", "machine.device=cpu", "wandb.mode=disabled",
        "generate.num_prompts=8", "generate.max_new_tokens=16", "generate.batch_size=4", "generate.shard_size=4",
        "distill.exit_layers=[2]", "distill.max_steps=4", "distill.sequence_length=64", "distill.sequences_per_step=2",
        "distill.validate_every=2", "distill.checkpoint_every=2", "distill.truncated=keep",
        "distill.repeated_share=1.0", "evaluate.num_prompts=4",
        "evaluate.max_new_tokens=20", "evaluate.temperatures=[0.0]",
        'evaluate.controllers=["fixed:2","thompson"]', "evaluate.rivals=[]",
    ]  # fmt: skip
    return RunDir(load(None, [*base, *words]))


def plant_heads(run, *exit_layers: int) -> None:
    """Save untrained heads, copies of the backbone's last layer, where distill would write them."""
    from pipeline.backbones.load import load_model
    from pipeline.inference.exit_head import ExitHead, new_exit_layer
    from pipeline.inference.fingerprint import fingerprint

    model = load_model(run.config.backbone, torch.device("cpu"))
    record = {"name": "tiny", "revision": None, "fingerprint": fingerprint(model), "model_type": "llama"}
    for n in exit_layers:
        ExitHead(n, len(model.model.layers), record, new_exit_layer(model).state_dict()).save(
            run / "heads" / f"exit-{n}"
        )
