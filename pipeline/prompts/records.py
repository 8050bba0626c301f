"""Records of the prompts' sources, for manifests, done marks and model cards: names, hashes, licences, counts.

Takes a `prompts` section; gives plain dicts without folders. A record takes one pass over every source, which also
raises the errors of reading.
"""

import hashlib
import json
from collections import deque
from typing import Any

from ..config import Prompts
from ..pocket.paths import PROMPTS
from ..runs.files import sha256_of
from .origins import Origin, file_of, load_dataset, origins
from .prompt import Role
from .reading import Reading
from .templates import template_file

POCKET_LICENCE = "PSF-2.0"


def source_pins(prompts: Prompts, role: Role = "distill") -> dict[str, str]:
    """The `pins` of the current sources, without reading their rows."""
    return pins(_join(prompts, [_identity(origin, role) for origin in origins(prompts)]))


def source_record(prompts: Prompts, role: Role = "distill") -> dict[str, Any]:
    """A source's name (without folders), sha256 or revision and split, licence if known, rows and bad_rows.

    A mixture lists its sources under `sources`, each with its weight; its own sha256 is a hash of theirs. A chat
    template file is recorded with its sha256. Raises UserError for a source that cannot be read.
    """
    found = [_identity(origin, role) | _contents(origin, prompts, role) for origin in origins(prompts)]
    record = _join(prompts, found)
    if prompts.mixture:
        record |= {name: sum(r[name] for r in found) for name in ("rows", "bad_rows")}
    return record


def _join(prompts: Prompts, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One record for all sources and the chat template."""
    record = found[0]
    if prompts.mixture:
        hashes = json.dumps([pins(record) for record in found])
        record = {
            "name": "mixture",
            "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "sources": [r | {"weight": s.weight} for r, s in zip(found, prompts.mixture, strict=True)],
        }
    if template := template_file(prompts):
        record["chat_template"] = {"name": template.name, "sha256": sha256_of(template)}
    return record


def pins(record: dict[str, Any]) -> dict[str, str]:
    """The part of a source record that determines the backbone's input: equal pins mean equal contexts."""
    pinned = {"prompts": record.get("sha256") or " ".join([record["revision"], *filter(None, [record.get("config")])])}
    if "chat_template" in record:
        pinned["chat_template"] = record["chat_template"]["sha256"]
    return pinned


def _identity(origin: Origin, role: Role) -> dict[str, Any]:
    if origin.is_pocket:
        file = PROMPTS[role]
        return {"name": f"pocket/{file.name}", "sha256": sha256_of(file)}
    if path := file_of(origin):
        return {"name": origin.name, "sha256": sha256_of(path)}
    source = origin.source
    which = {} if source.name is None else {"config": source.name}
    return {"name": origin.name, **which, "revision": source.revision, "split": source.split}


def _contents(origin: Origin, prompts: Prompts, role: Role) -> dict[str, Any]:
    reading = Reading(origin, prompts, role, None)
    deque(reading, maxlen=0)
    licence = POCKET_LICENCE if origin.is_pocket else origin.source.licence
    if licence is None and not origin.is_pocket and not file_of(origin):
        licence = load_dataset(origin).info.license or None
    return {"licence": licence, "rows": reading.rows, "bad_rows": reading.bad}
