"""The folder of a published head, hub/<N>/: every file in it but the card.

Takes a run, the results of its head and a folder, gives the files. Knows nothing of gates, of how anything was
measured, or of how a folder gets to the Hub.

    config.json               which backbone, which N, default controller, what it learned, canary, added end tokens;
                              AutoModel's auto_map
    model.safetensors         the decoder layer, under its own names
    modeling_exit_head.py     the class that AutoModel loads
    custom_generate/          the decoder, byte for byte what was evaluated; origin.py, written by a push
    generation_config.json    the backbone's own, with all tokens that ended a text here
    training_config.yaml      what made it: exit-heads run --config training_config.yaml
    provenance.json           when, with which code, versions and hardware, from inputs of which sha256
    speculation_profile.json  acceptance per draft position, in NVIDIA's schema
    results.json              what was measured, and what the gate said
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..backbones.ends import added_ends, end_tokens
from ..backbones.load import load_tokenizer, public_name
from ..backbones.source import load_config
from ..backbones.weight_files import file_of
from ..config import Backbone
from ..runs.files import atomic_write, sha256_of
from ..runs.folder import RunDir
from . import pedigree, speculation_profile

HERE = Path(__file__).parent
CODE = HERE.parent / "inference"
MODELING = HERE / "modeling_exit_head.py"
PUBLISHED_AS = {"custom_generate.py": "generate.py"}  # the name by which transformers finds it in custom_generate/
PROFILE = "speculation_profile.json"
AUTO_MAP = {"AutoConfig": "modeling_exit_head.ExitHeadConfig", "AutoModel": "modeling_exit_head.ExitHeadModel"}


def write(folder: Path, run: RunDir, results: dict[str, Any]) -> None:
    """What the head is and how it decodes, into a new folder."""
    folder.mkdir(parents=True)
    n = results["best"]["exit_layer"]
    head = run / "heads" / f"exit-{n}"
    shutil.copyfile(head / "model.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", config_of(json.loads((head / "config.json").read_text()), run, results))
    shutil.copyfile(MODELING, folder / MODELING.name)
    write_code(folder)
    write_generation_config(folder, run.config.backbone)


def config_of(head: dict[str, Any], run: RunDir, results: dict[str, Any]) -> dict[str, Any]:
    """What distill wrote, how it was measured best, and what transformers needs to load it as a model."""
    return (
        head
        | {
            "architectures": ["ExitHeadModel"],
            "auto_map": AUTO_MAP,
            "backbone_config": one_layer(load_config(run.config.backbone)),
            "controller": results["best"]["controller"],
            "states": states(results),
            "canary": results["canary"],
        }
        | added_ends_of(run.config.backbone)
    )


def added_ends_of(backbone: Backbone) -> dict[str, Any]:
    """`end_tokens`, where texts ended at ids at which transformers' generate would go on by itself."""
    more = added_ends(backbone, load_tokenizer(backbone))
    return {"end_tokens": more} if more else {}


def ends_of_texts(backbone: Backbone) -> dict[str, Any]:
    """`eos_token_id` for a generation config, where the backbone's own does not name all tokens that end a text."""
    tokenizer = load_tokenizer(backbone)
    return {"eos_token_id": end_tokens(backbone, tokenizer)} if added_ends(backbone, tokenizer) else {}


def write_generation_config(folder: Path, backbone: Backbone) -> None:
    """The backbone's own file; where more tokens ended a text than it names, with all of them."""
    settings, more = file_of(backbone, "generation_config.json"), ends_of_texts(backbone)
    if more:
        write_json(folder / "generation_config.json", (json.loads(settings.read_text()) if settings else {}) | more)
    elif settings:
        shutil.copyfile(settings, folder / "generation_config.json")


def one_layer(config: Any) -> dict[str, Any]:
    """The backbone's config cut to the exit layer, which has the type of the last, without what a machine put there."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "architectures")}
    if kinds := fields.get("layer_types"):
        fields["layer_types"] = kinds[-1:]
    return fields | {"num_hidden_layers": 1}


def states(results: dict[str, Any]) -> dict[str, Any]:
    """What thompson learned of the head while it was measured, so that users do not start from nothing.

    Of several temperatures above 0 the one nearest 1.
    """
    learned = [
        (entry["temperature"], figures["state"])
        for entry in results["heads"]
        for figures in entry["controllers"].values()
        if "state" in figures
    ]
    return {"greedy" if t == 0 else "sampled": state for t, state in sorted(learned, key=lambda x: -abs(x[0] - 1))}


def write_code(folder: Path) -> None:
    """custom_generate/: the decoder, byte for byte what was evaluated, and which transformers it needs.

    transformers reads requirements.txt before it imports the code, which an older one could not."""
    code = folder / "custom_generate"
    code.mkdir()
    for file in sorted([*CODE.glob("*.py"), CODE / "requirements.txt"]):
        shutil.copyfile(file, code / PUBLISHED_AS.get(file.name, file.name))


def write_origin(folder: Path, repo_id: str, revision: str) -> None:
    """Say in custom_generate/origin.py where the weights lie: a Hub id and its tag, no longer the folder itself."""
    docstring = (CODE / "origin.py").read_text().partition("HEAD")[0]
    values = f"HEAD: str | None = {json.dumps(repo_id)}\nREVISION: str | None = {json.dumps(revision)}\n"
    atomic_write(folder / "custom_generate" / "origin.py", docstring + values)


def write_pedigree(folder: Path, run: RunDir) -> None:
    """training_config.yaml and provenance.json."""
    (folder / "training_config.yaml").write_text(yaml.safe_dump(pedigree.config_of(run), sort_keys=False))
    records = {"stages": pedigree.records_of(run), "responses": pedigree.responses(run)}
    write_json(folder / "provenance.json", records)


def write_profile(folder: Path, run: RunDir, results: dict[str, Any], rounds: pd.DataFrame, suffix: str) -> None:
    """speculation_profile.json, if any fixed:K was measured in greedy decoding; `suffix` of the repo's name."""
    name = run.config.publish.repo_id or f"{public_name(run.config.backbone)}-exit-{results['best']['exit_layer']}"
    method = "draft_model" if suffix else "exit_head"
    if profile := speculation_profile.build(results, rounds, method, name + suffix):
        write_json(folder / PROFILE, profile)


def files_of(folder: Path) -> dict[str, Path]:
    """Name in the folder -> file, of what is published of it: not what Python or a client left there."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part == "__pycache__" or part.startswith(".") for part in name.parts)
    }


def digest_of(folder: Path) -> str:
    """sha256, 64 hex digits, over the names and the sha256 of a published folder's files: equal folders, equal digits.

    Of one line a file, `name sha256`, in the order of `files_of`.
    """
    lines = (f"{name} {sha256_of(path)}\n" for name, path in files_of(folder).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
