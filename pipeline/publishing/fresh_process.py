"""What a user has: decode with a published folder where nothing but torch and transformers is imported.

Run by its path and never imported, as `python -P fresh_process.py`: it must work without the package it lies in. Takes
one JSON object on stdin (backbone, folder, its form, prompts as ids), gives one as the last line of stdout: of each
prompt the new tokens and the rounds they took, of the first one also the tokens with controllers of the folder's own,
and what the folder warned of; or the class of the error that ended it. Knows nothing of what is right.
"""

import json
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

NO_MEMORY = ("out of memory", "allocate memory")
"""In messages of a GPU's allocator and driver, and of the machine's own; not all have a class for it."""


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


def with_head(model: Any, folder: str) -> Any:
    """(ids, controller) -> ids and what follows, through custom_generate."""

    def decode(ids: torch.Tensor, controller: Any, **options: Any) -> torch.Tensor:
        return model.generate(ids, custom_generate=folder, trust_remote_code=True, controller=controller, **options)

    return decode


def with_draft(model: Any, draft: Any) -> Any:
    """The same, through assistant_model; a round is a call of the backbone. How many to draft, the folder says."""

    def decode(ids: torch.Tensor, counting: Counting, **options: Any) -> torch.Tensor:
        hook = model.register_forward_hook(lambda *_: counting.observe(None))
        out = model.generate(ids, assistant_model=draft, **options)
        hook.remove()
        return out

    return decode


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    where = {"revision": job["revision"], "trust_remote_code": job["trust_remote_code"]}
    model = load(job["backbone"], job, **where)
    model.generation_config = GenerationConfig()  # the checkpoint's own may hold a penalty; evaluate uses none
    folder = job["folder"]
    decode = with_head(model, folder) if job["form"] == "head" else with_draft(model, load(folder, job))
    ends = job["ends"]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": ends[0] if ends else 0}
    if ends:
        options["eos_token_id"] = ends

    def continued(prompt: dict[str, Any], controller: Any) -> list[int]:
        ids = torch.tensor([prompt["ids"]], device=model.device)
        more = {"max_new_tokens": prompt["max_new_tokens"], "attention_mask": torch.ones_like(ids)}
        return decode(ids, controller, **options, **more)[0, ids.shape[1] :].tolist()

    texts, own = [], {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for prompt in job["prompts"]:
            counting = Counting(job["k"])
            texts.append({"tokens": continued(prompt, counting), "rounds": counting.rounds})
        for name, controller in job["own"].items():
            own[name] = continued(job["prompts"][0], controller)
    told = [str(w.message) for w in caught if w.category.__name__ == "AnotherBackbone"]
    say({"texts": texts, "own": own, "warnings": told})


def say(result: dict[str, Any]) -> None:
    print("\n" + json.dumps(result))


def lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        say({"error": type(error).__name__, "lacks_memory": lacks_memory(error)})
        raise
