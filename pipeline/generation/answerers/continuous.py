"""The answerer `continuous`: transformers' continuous batching in this process, with a bounded cache.

Takes a transformers model; gives each question's new ids. A manager of transformers has one temperature and one seed,
so each temperature gets a manager of its own.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from .interface import Answer, Question, Report, Sampling


class Continuous:
    """Answers with transformers' continuous batching: a finished question is replaced by the next one at once."""

    reproducible = True

    def __init__(self, model: nn.Module, ends: Collection[int]):
        """`ends`: the ids that end an answer."""
        self.model, self.ends = model, list(ends)

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for number, temperature in enumerate(sorted({q.temperature for q in questions})):
            rows = [i for i, q in enumerate(questions) if q.temperature == temperature]
            prompts = [questions[i].ids for i in rows]
            found = _one_manager(self.model, self.ends, prompts, temperature, sampling, sampling.seed + number, report)
            answers |= {i: Answer(ids, ids[-1] in self.ends) for i, ids in zip(rows, found, strict=True)}
        return [answers[i] for i in range(len(questions))]


def _one_manager(
    model: nn.Module,
    ends: list[int],
    prompts: list[list[int]],
    temperature: float,
    sampling: Sampling,
    seed: int,
    report: Report | None,
) -> list[list[int]]:
    hot = (
        {"do_sample": True, "temperature": temperature, "top_p": sampling.top_p, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends or -1,
        pad_token_id=0,
        **hot,
    )
    in_flight = min(sampling.batch_size, len(prompts))
    longest = max(map(len, prompts))
    page = 32
    # Without a bound the cache takes all free memory; this bound is what `in_flight` requests need, and one to spare.
    pages_each = -(-(longest + sampling.max_new_tokens) // page) + 1
    bounds = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages_each * (in_flight + 1),
        max_batch_tokens=max(in_flight, longest, 256),
        max_requests_per_batch=in_flight,
        allow_block_sharing=False,
        use_async_batching=False,
        seed=seed,
    )
    answers: dict[str, list[int]] = {}
    state = _global_random_state(model.device)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=bounds)
    try:
        # All requests are queued before the thread starts: otherwise timing would decide which of them share a batch.
        names = [
            manager.add_request(p, max_new_tokens=sampling.max_new_tokens, eos_token_id=config.eos_token_id)
            for p in prompts
        ]
        manager.start()
        while len(answers) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all prompts were answered")
            elif result.error is not None:
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            elif result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
                if report is not None:
                    report(1, len(result.generated_tokens))
    finally:
        manager.stop(block=True, timeout=30)
        manager.destroy()
        _set_global_random_state(model.device, state)
    return [answers[name] for name in names]


def _global_random_state(device: torch.device) -> list[Tensor]:
    """States of torch's global generators, to be restored afterwards, since the manager seeds these generators."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_global_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
