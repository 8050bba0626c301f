"""What a user has: decode with a published folder where nothing but torch and transformers is imported.

Run by its path and never imported, as `python -P fresh_process.py`: it must work without the package it lies in. Takes
one JSON object on stdin (backbone, folder, its form, prompts as ids), gives one as the last line of stdout: of each
prompt the new tokens and the rounds they took, and what the folder warned of. Knows nothing of what is right.
"""

import json
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class Counting:
    """fixed:K that counts its rounds; a controller given as an object, as a user may write one."""

    def __init__(self, k: int):
        self.k, self.rounds = k, 0

    def peek(self, k: int) -> bool:
        return k < self.k

    def draft(self, k: int, confidence: Any) -> bool:
        return True

    def observe(self, round: Any) -> None:
        self.rounds += 1


def load(source: str, job: dict[str, Any], **where: Any) -> Any:
    """A model in the dtype of the job, on its device or laid over several."""
    dtype, device_map = getattr(torch, job["dtype"]), job["device_map"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **where)
    return model if device_map else model.to(job["device"])


def with_head(model: Any, folder: str, k: int) -> Any:
    """ids -> (ids and what follows, rounds), through custom_generate."""

    def decode(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
        counting = Counting(k)
        out = model.generate(ids, custom_generate=folder, trust_remote_code=True, controller=counting, **options)
        return out, counting.rounds

    return decode


def with_draft(model: Any, draft: Any) -> Any:
    """The same, through assistant_model; a round is a call of the backbone. How many to draft, the folder says."""

    def decode(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
        calls: list[None] = []
        hook = model.register_forward_hook(lambda *_: calls.append(None))
        out = model.generate(ids, assistant_model=draft, **options)
        hook.remove()
        return out, len(calls)

    return decode


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    where = {"revision": job["revision"], "trust_remote_code": job["trust_remote_code"]}
    model = load(job["backbone"], job, **where)
    model.generation_config = GenerationConfig()  # the checkpoint's own may hold a penalty; evaluate uses none
    if job["form"] == "head":
        decode = with_head(model, job["folder"], job["k"])
    else:
        decode = with_draft(model, load(job["folder"], job))
    ends = job["ends"]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": ends[0] if ends else 0}
    if ends:
        options["eos_token_id"] = ends
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt["ids"]], device=model.device)
            options |= {"max_new_tokens": prompt["max_new_tokens"], "attention_mask": torch.ones_like(ids)}
            out, rounds = decode(ids, **options)
            texts.append({"tokens": out[0, ids.shape[1] :].tolist(), "rounds": rounds})
    told = [str(w.message) for w in caught if w.category.__name__ == "AnotherBackbone"]
    print("\n" + json.dumps({"texts": texts, "warnings": told}))


if __name__ == "__main__":
    main()
