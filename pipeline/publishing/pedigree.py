"""Where a head comes from, as it may be published: config, records, licences, what it was trained on and how far.

Takes a run folder, gives plain dicts without folders, hosts, users, servers or tokens in them (runs/anonymous.py).
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
"""Stages that a published head went through."""
TOLD = ("stage", "time", "seconds", "git", "git_dirty", "versions", "hardware", "inputs")
"""Of a record in run.json; host, user and command are nobody's business."""
LICENCE = ("license", "license_name", "license_link")
"""Of a model card's front matter."""


def config_of(run: RunDir) -> dict[str, Any]:
    """The config of each stage as that stage ran; what only says where (machine, run, wandb, publish) is left out."""
    sections: dict[str, Any] = {}
    for stage in MADE_BY:
        mark = run / "stages" / f"{stage}.json"
        if mark.exists():
            sections |= json.loads(mark.read_text())["config"]
    if "backbone" in sections:
        sections["backbone"]["name_or_path"] = public_name(Backbone(**sections["backbone"]))
    return anonymous(sections)


def records_of(run: RunDir) -> list[dict[str, Any]]:
    """One record a stage, the newest: when, with which code, versions and hardware, from inputs of which sha256."""
    newest = {r["stage"]: r for r in run.records()}
    told = [{key: newest[stage][key] for key in TOLD if key in newest[stage]} for stage in MADE_BY if stage in newest]
    return anonymous(told)


def trained(run: RunDir, exit_layer: int) -> dict[str, Any] | None:
    """What distill said of this head when it was done, and of its responses; None if it was distilled elsewhere."""
    records = [r for r in run.records() if r["stage"] == "distill"]
    head = records[-1].get("heads", {}).get(f"exit-{exit_layer}") if records else None
    return head and head | {"config": records[-1]["config"]["distill"], "tokens": records[-1].get("train_tokens")}


def responses(run: RunDir) -> dict[str, Any] | None:
    """The manifest of what it learned from, without its shards; None if it is not here."""
    path = run / "responses" / "manifest.json"
    return (
        anonymous({k: v for k, v in json.loads(path.read_text()).items() if k != "shards"}) if path.exists() else None
    )


def prompt_licences(run: RunDir) -> dict[str, str | None]:
    """Source of prompts -> licence, as recorded; None where nothing was said."""
    manifest = responses(run)
    if manifest is None:
        return {}
    record = manifest["prompts"]
    return {source["name"]: source.get("licence") for source in record.get("sources", [record])}


def datasets(run: RunDir) -> list[str]:
    """The sources of prompts that are datasets on the Hub, by their ids; of one that is used twice, once."""
    ids = (source.partition("#")[0] for source in prompt_licences(run))  # origins.Origin.name numbers namesakes
    return list(dict.fromkeys(name for name in ids if is_repo_id(name) and not name.startswith("pocket/")))


def licence(config: Config) -> dict[str, str]:
    """Front matter of the card: `publish.licence`, or what the backbone's own card says; {} if that says nothing."""
    if config.publish.licence is not None:
        return {"license": config.publish.licence}
    card = file_of(config.backbone, "README.md")
    try:
        front = ModelCard(card.read_text(), ignore_metadata_errors=True).data.to_dict() if card else {}
    except (ValueError, yaml.YAMLError):  # not a card
        return {}
    return {key: front[key] for key in LICENCE if front.get(key)}
