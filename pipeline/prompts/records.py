"""Where prompts come from, for manifests, marks and cards: names, hashes, licences, counts.

Takes a `prompts` section, gives plain dicts without folders in them. Reads every source once, and so finds what is
wrong with it too. Knows nothing of which prompts are used.
"""

import hashlib
import json
from collections import deque
from typing import Any

from .. import pocket
from ..config import Prompts
from ..rundir import sha256_of
from .origins import Origin, file_of, load_dataset, origins
from .prompt import Role
from .reading import Reading
from .templates import template_file

POCKET_LICENCE = "PSF-2.0"


def source_record(prompts: Prompts, role: Role = "distill") -> dict[str, Any]:
    """name (no folders), sha256 of the file or revision and split of the dataset, licence if known, rows, bad_rows.

    Of a mixture these stand under `sources`, each with its weight, and its own sha256 is that of theirs. A chat
    template from a file is named with its sha256.
    """
    found = [_record(origin, prompts, role) for origin in origins(prompts)]
    if prompts.mixture:
        hashes = json.dumps([pins(record) for record in found])
        record = {
            "name": "mixture",
            "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "rows": sum(r["rows"] for r in found),
            "bad_rows": sum(r["bad_rows"] for r in found),
            "sources": [r | {"weight": s.weight} for r, s in zip(found, prompts.mixture, strict=True)],
        }
    else:
        record = found[0]
    if template := template_file(prompts):
        record["chat_template"] = {"name": template.name, "sha256": sha256_of(template)}
    return record


def pins(record: dict[str, Any]) -> dict[str, str]:
    """What of a source record changes with the texts that the backbone sees: equal pins, equal contexts."""
    pinned = {"prompts": record.get("sha256") or record["revision"]}
    if "chat_template" in record:
        pinned["chat_template"] = record["chat_template"]["sha256"]
    return pinned


def _record(origin: Origin, prompts: Prompts, role: Role) -> dict[str, Any]:
    reading = Reading(origin, prompts, role, None)
    deque(reading, maxlen=0)
    counts = {"rows": reading.rows, "bad_rows": reading.bad}
    licence = origin.source.licence
    if origin.is_pocket:
        file = pocket.PROMPTS[role]
        return {"name": f"pocket/{file.name}", "sha256": sha256_of(file), "licence": POCKET_LICENCE, **counts}
    if path := file_of(origin):
        return {"name": origin.name, "sha256": sha256_of(path), "licence": licence, **counts}
    licence = licence or load_dataset(origin).info.license or None
    where = {"revision": origin.source.revision, "split": origin.source.split}
    return {"name": origin.name, **where, "licence": licence, **counts}
