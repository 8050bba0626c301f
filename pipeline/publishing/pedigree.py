"""The origin of a head in a form that can be published: config, records, licences, training data and progress.

Takes a run folder; gives plain dicts that contain no folders, hosts, users, servers or tokens (runs/anonymous.py).
"""

import json
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..backbones.load import public_name
from ..backbones.weight_files import file_of
from ..config import Backbone, Config
from ..config_rules import is_repo_id
from ..runs.anonymous import anonymous
from ..runs.folder import RunDir

MADE_BY = ("generate", "distill", "evaluate")
"""Stages whose configs and records are published."""
TOLD = ("stage", "time", "seconds", "git", "git_dirty", "versions", "hardware", "inputs")
"""Fields of a record in run.json that are published; host, user and command are private."""
LICENCE = ("license", "license_name", "license_link")
"""Fields of a model card's front matter."""


def config_of(run: RunDir) -> dict[str, Any]:
    """The config with which each stage ran, without sections that say only where (machine, run, wandb, publish)."""
    sections: dict[str, Any] = {}
    for stage in MADE_BY:
        mark = run / "stages" / f"{stage}.json"
        if mark.exists():
            sections |= json.loads(mark.read_text())["config"]
    if "backbone" in sections:
        sections["backbone"].pop("gguf_dir", None)
        sections["backbone"]["name_or_path"] = public_name(Backbone(**sections["backbone"]))
    return anonymous(sections)


def records_of(run: RunDir) -> list[dict[str, Any]]:
    """The newest record of each stage: time, code, versions, hardware, and the sha256 of its inputs."""
    newest = {r["stage"]: r for r in run.records()}
    told = [{key: newest[stage][key] for key in TOLD if key in newest[stage]} for stage in MADE_BY if stage in newest]
    return anonymous(told)


def trained(run: RunDir, exit_layer: int) -> dict[str, Any] | None:
    """distill's record of this head and of its training data; None if the run has none for it."""
    records = [r for r in run.records() if r["stage"] == "distill"]
    head = records[-1].get("heads", {}).get(f"exit-{exit_layer}") if records else None
    return head and head | {"config": records[-1]["config"]["distill"], "tokens": records[-1].get("train_tokens")}


def responses(run: RunDir) -> dict[str, Any] | None:
    """The manifest of the responses that the heads were trained on, without its shards; None if it is not there."""
    path = run / "responses" / "manifest.json"
    return (
        anonymous({k: v for k, v in json.loads(path.read_text()).items() if k != "shards"}) if path.exists() else None
    )


def prompt_licences(run: RunDir) -> dict[str, str | None]:
    """Source of prompts -> its licence as recorded, or None."""
    manifest = responses(run)
    if manifest is None:
        return {}
    record = manifest["prompts"]
    return {source["name"]: source.get("licence") for source in record.get("sources", [record])}


def datasets(run: RunDir) -> list[str]:
    """The ids of those sources of prompts that are datasets on the Hub, each once."""
    ids = (source.partition("#")[0] for source in prompt_licences(run))  # origins.Origin.name numbers namesakes
    return list(dict.fromkeys(name for name in ids if is_repo_id(name) and not name.startswith("pocket/")))


def licence(config: Config) -> dict[str, str]:
    """The licence for the card's front matter: `publish.licence`, or that of the backbone's card; {} if it has none."""
    if config.publish.licence is not None:
        return {"license": config.publish.licence}
    card = file_of(config.backbone, "README.md")
    try:
        front = ModelCard(card.read_text(), ignore_metadata_errors=True).data.to_dict() if card else {}
    except (ValueError, yaml.YAMLError):  # the file is not a card
        return {}
    return {key: front[key] for key in LICENCE if front.get(key)}
