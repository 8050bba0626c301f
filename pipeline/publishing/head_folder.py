"""Writes the folder of a published head, hub/<N>/, except for its card.

Takes a run, the results of its head and a folder; writes these files (build.py adds results.json):

    config.json               backbone, N, default controller and what it learned, canary, added end tokens; the
                              auto_map for AutoModel
    model.safetensors         the decoder layer, under its own names
    modeling_exit_head.py     the class that AutoModel loads; not for every family
    custom_generate/          the decoder, byte for byte what was evaluated; a push writes its origin.py
    generation_config.json    the backbone's own, with all tokens that end a text
    training_config.yaml      the config that made it, for exit-heads run --config training_config.yaml
    provenance.json           time, code, versions and hardware of each stage, and the sha256 of its inputs
    trained_on.json           hashes of the prompts that it learned from
    speculation_profile.json  acceptance per draft position, in NVIDIA's schema
    results.json              the measurements, and the result of the gate
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
from ..generation import leaks
from ..inference.families import FAMILIES
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
    """Write weights, configs and code of the head into a new folder."""
    folder.mkdir(parents=True)
    n = results["best"]["exit_layer"]
    head = run / "heads" / f"exit-{n}"
    shutil.copyfile(head / "model.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", config_of(json.loads((head / "config.json").read_text()), run, results))
    write_code(folder, has_model(load_config(run.config.backbone).model_type))
    write_generation_config(folder, run.config.backbone)


def config_of(head: dict[str, Any], run: RunDir, results: dict[str, Any]) -> dict[str, Any]:
    """config.json: what distill wrote, the best controller and its state, and what transformers needs to load it."""
    backbone = load_config(run.config.backbone)
    model = {"architectures": ["ExitHeadModel"], "auto_map": AUTO_MAP, "backbone_config": one_layer(backbone)}
    return (
        head
        | {
            "controller": results["best"]["controller"],
            "block_verification": results["sampling"].get("block_verification", False),
            "states": states(results),
            "canary": results["canary"],
        }
        | added_ends_of(run.config.backbone)
        | (model if has_model(backbone.model_type) else {})
    )


def has_model(model_type: str) -> bool:
    """Whether AutoModel can load a head of this family. One layer alone is called alike only in those that are computed
    here; in others a layer's type, place or arguments differ."""
    return model_type in FAMILIES


def added_ends_of(backbone: Backbone) -> dict[str, Any]:
    """`end_tokens`, if texts end at ids that transformers' generate would not stop at by itself."""
    more = added_ends(backbone, load_tokenizer(backbone))
    return {"end_tokens": more} if more else {}


def ends_of_texts(backbone: Backbone) -> dict[str, Any]:
    """`eos_token_id` for a generation config, if the backbone's own does not name all tokens that end a text."""
    tokenizer = load_tokenizer(backbone)
    return {"eos_token_id": end_tokens(backbone, tokenizer)} if added_ends(backbone, tokenizer) else {}


def write_generation_config(folder: Path, backbone: Backbone) -> None:
    """Write generation_config.json: the backbone's own, completed if it does not name all tokens that end a text."""
    settings, more = file_of(backbone, "generation_config.json"), ends_of_texts(backbone)
    if more:
        write_json(folder / "generation_config.json", (json.loads(settings.read_text()) if settings else {}) | more)
    elif settings:
        shutil.copyfile(settings, folder / "generation_config.json")


def one_layer(config: Any) -> dict[str, Any]:
    """The backbone's config reduced to the exit layer, which has the type of the last layer, without local paths."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "architectures")}
    if kinds := fields.get("layer_types"):
        fields["layer_types"] = kinds[-1:]
    return fields | {"num_hidden_layers": 1}


def states(results: dict[str, Any]) -> dict[str, Any]:
    """The state of thompson after the evaluation, under `greedy` and `sampled`, from which users start.

    If several temperatures above 0 were evaluated, `sampled` is the state of the one nearest 1; if several controllers
    learned, that of the best one.
    """
    best = results.get("best", {}).get("controller")
    learned = [
        (-abs(entry["temperature"] - 1), name == best, entry["temperature"], figures["state"])
        for entry in results["heads"]
        for name, figures in entry["controllers"].items()
        if "state" in figures
    ]
    return {"greedy" if t == 0 else "sampled": state for *_, t, state in sorted(learned, key=lambda x: x[:2])}


def write_code(folder: Path, model: bool = True) -> None:
    """Write the code that transformers loads: the model, if there is one, and in custom_generate/ the decoder, byte for
    byte what was evaluated, with requirements.txt, which transformers reads before it imports the code, so that a
    version that is too old is reported."""
    if model:
        shutil.copyfile(MODELING, folder / MODELING.name)
    code = folder / "custom_generate"
    code.mkdir()
    for file in sorted([*CODE.glob("*.py"), CODE / "requirements.txt"]):
        shutil.copyfile(file, code / PUBLISHED_AS.get(file.name, file.name))


def write_origin(folder: Path, repo_id: str, revision: str) -> None:
    """Write into custom_generate/origin.py the Hub id and tag from which users download the weights."""
    docstring = (CODE / "origin.py").read_text().partition("HEAD")[0]
    values = f"HEAD: str | None = {json.dumps(repo_id)}\nREVISION: str | None = {json.dumps(revision)}\n"
    atomic_write(folder / "custom_generate" / "origin.py", docstring + values)


def write_pedigree(folder: Path, run: RunDir) -> None:
    """Write training_config.yaml, provenance.json and, while the responses are there, trained_on.json."""
    (folder / "training_config.yaml").write_text(yaml.safe_dump(pedigree.config_of(run), sort_keys=False))
    records = {"stages": pedigree.records_of(run), "responses": pedigree.responses(run)}
    write_json(folder / "provenance.json", records)
    if (run / "responses" / "manifest.json").exists():
        write_json(folder / leaks.PUBLISHED, leaks.hashes_of(run / "responses"))


def write_profile(folder: Path, run: RunDir, results: dict[str, Any], rounds: pd.DataFrame, suffix: str) -> None:
    """Write speculation_profile.json, if any fixed:K was measured in greedy decoding. suffix: of the repo's name."""
    name = run.config.publish.repo_id or f"{public_name(run.config.backbone)}-exit-{results['best']['exit_layer']}"
    method = "draft_model" if suffix else "exit_head"
    if profile := speculation_profile.build(results, rounds, method, name + suffix):
        write_json(folder / PROFILE, profile)


def files_of(folder: Path) -> dict[str, Path]:
    """Name in the folder -> file, for the files to publish: not hidden files or Python's caches."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part == "__pycache__" or part.startswith(".") for part in name.parts)
    }


def digest_of(folder: Path) -> str:
    """The sha256, 64 hex digits, of a published folder; equal folders have equal digests.

    It is taken over one line `name sha256` for each file, in the order of `files_of`.
    """
    lines = (f"{name} {sha256_of(path)}\n" for name, path in files_of(folder).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
