"""Decodes with a published folder as a user would, with only torch and transformers imported.

It is run by its path, as `python -P fresh_process.py`, and never imported, because it must work without this package.
It takes one JSON object on stdin (backbone, folder, its form, prompts as ids) and prints one as the last line of
stdout: for each prompt the new tokens and the number of rounds, for the first one also the tokens with the folder's own
controllers, and the folder's warnings; or the class of the error that ended it.
"""

import json
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

NO_MEMORY = ("out of memory", "allocate memory")
"""Parts of the messages by which a GPU's allocator or driver, or the host, report a lack of memory. Not all of them
have an exception class of their own."""


class Counting:
    """A controller like fixed:K that counts its rounds, given as an object as a user may do."""

    def __init__(self, k: int):
        self.k, self.rounds = k, 0

    def peek(self, k: int) -> bool:
        return k < self.k

    def draft(self, k: int, confidence: Any) -> bool:
        return True

    def observe(self, round: Any) -> None:
        self.rounds += 1


def load(source: str, job: dict[str, Any], **where: Any) -> Any:
    """A model in the dtype of the job, on its device or distributed over several."""
    dtype, device_map = getattr(torch, job["dtype"]), job["device_map"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **where)
    return model if device_map else model.to(job["device"])


def with_head(model: Any, folder: str) -> Any:
    """A function (ids [1, T], controller) -> ids with the new tokens, which decodes through custom_generate."""

    def decode(ids: torch.Tensor, controller: Any, **options: Any) -> torch.Tensor:
        return model.generate(ids, custom_generate=folder, trust_remote_code=True, controller=controller, **options)

    return decode


def with_draft(model: Any, draft: Any) -> Any:
    """The same through assistant_model: each call of the backbone counts as a round, and the folder's generation config
    sets the number of drafts."""

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
