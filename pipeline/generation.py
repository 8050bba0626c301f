"""Batched generation: two engines that let a backbone answer many prompts at once.

Takes a transformers model, prompts as token ids and a Sampling, gives each prompt's new token ids; one call is
a pure function of its arguments, whatever ran before it. Knows nothing of text, files or shards.

B rows still generating, T positions, V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer

Report = Callable[[int, int], None]
"""Told after a while: (finished responses, new tokens) since the last call."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; the temperature comes with each prompt."""

    max_new_tokens: int
    top_p: float
    batch_size: int
    """Prompts in flight at once."""
    seed: int


def end_tokens(model: nn.Module) -> list[int]:
    """The ids that end a response, as the checkpoint says; none means that every response has full length."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def answer_padded(
    model: nn.Module,
    prompts: list[list[int]],
    temperatures: list[float],
    sampling: Sampling,
    report: Report | None = None,
) -> list[list[int]]:
    """New ids of every prompt, the end token included, from left-padded batches.

    Prompts of like length share a batch, so that little of it is padding; temperatures may be mixed. A row
    leaves its batch when it is finished. transformers' own generate grows its cache by copying all of it at
    every token and keeps finished rows to the end of the batch: see benchmarks/generation.py.
    """
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), sampling.batch_size):
        rows = order[start : start + sampling.batch_size]
        batch = _Batch(model, [prompts[i] for i in rows], [temperatures[i] for i in rows], sampling)
        for i, answer in zip(rows, batch.run(generator, report), strict=True):
            answers[i] = answer
    return answers


class _Batch:
    """One left-padded batch on its way through the model."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], temperatures: list[float], sampling: Sampling):
        self.model, self.sampling = model, sampling
        self.ends = set(end_tokens(model))
        longest = max(map(len, prompts))
        pad = [longest - len(p) for p in prompts]
        device = model.device
        # Any id will do for padding: the mask hides it.
        self.ids_BT = torch.tensor([[0] * n + p for n, p in zip(pad, prompts, strict=True)], device=device)
        self.room = longest + sampling.max_new_tokens
        self.mask_BT = torch.ones(len(prompts), self.room, dtype=torch.long, device=device)
        for row, n in enumerate(pad):
            self.mask_BT[row, :n] = 0
        self.pad_B = torch.tensor(pad, device=device)
        self.has_padding = any(pad)
        self.temperatures_B = torch.tensor(temperatures, device=device)
        self.layers = [RoomyLayer(self.room) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))
        """Which answer each row of the tensors belongs to."""

    @torch.inference_mode()
    def run(self, generator: torch.Generator, report: Report | None) -> list[list[int]]:
        length, step_ids = 0, self.ids_BT
        for step in range(self.sampling.max_new_tokens):
            logits_BV = self._forward(step_ids, length)
            length += step_ids.shape[1]
            new_ids = sample(logits_BV, self.temperatures_B, self.sampling.top_p, generator)
            finished = []
            for at, token in enumerate(new_ids.tolist()):
                answer = self.answers[self.rows[at]]
                answer.append(token)
                finished.append(token in self.ends or step == self.sampling.max_new_tokens - 1)
            if report is not None:
                report(sum(finished), len(finished))
            if all(finished):
                break
            step_ids = new_ids[:, None]
            if any(finished):
                keep = [at for at, done in enumerate(finished) if not done]
                step_ids = step_ids[keep]
                self._keep(keep)
        return self.answers

    def _forward(self, ids_BT: Tensor, length: int) -> Tensor:
        """Float32 logits [B, V] after the last of these ids, which begin at cache position `length`."""
        end = length + ids_BT.shape[1]
        slots_T = torch.arange(length, end, device=ids_BT.device)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT[:, :end] if self.has_padding else None,
            position_ids=(slots_T - self.pad_B[:, None]).clamp_(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _keep(self, keep: list[int]) -> None:
        """Drop the other rows from the batch."""
        self.rows = [self.rows[at] for at in keep]
        index = torch.tensor(keep, device=self.pad_B.device)
        self.mask_BT, self.pad_B, self.temperatures_B = (
            self.mask_BT[index],
            self.pad_B[index],
            self.temperatures_B[index],
        )
        for layer in self.layers:
            layer.keep_rows(index)


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for the whole answer, written in place instead of grown by copying."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, channels = key_states.shape
            self.buffers = key_states.new_empty(2, rows, heads, self.room, channels)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.buffers[0, :, :, start:end] = key_states
        self.buffers[1, :, :, start:end] = value_states
        self._view(end)
        return self.keys, self.values

    def keep_rows(self, index: Tensor) -> None:
        end = self.get_seq_length()
        self.buffers = self.buffers[:, index]
        self._view(end)

    def _view(self, end: int) -> None:
        self.keys, self.values = self.buffers[0, :, :, :end], self.buffers[1, :, :, :end]


def sample(logits_BV: Tensor, temperatures_B: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One id a row, [B]: argmax where the temperature is 0, else a draw from the nucleus at that temperature."""
    chosen_B = logits_BV.argmax(-1)
    hot = temperatures_B > 0
    if hot.any():
        p_BV = (logits_BV[hot] / temperatures_B[hot, None]).softmax(-1)
        if top_p < 1:
            ordered, order = p_BV.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses the line stays
            p_BV = p_BV.masked_fill(outside.scatter(-1, order, outside), 0)
        chosen_B[hot] = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    return chosen_B


def answer_continuous(
    model: nn.Module,
    prompts: list[list[int]],
    temperatures: list[float],
    sampling: Sampling,
    report: Report | None = None,
) -> list[list[int]]:
    """New ids of every prompt, the end token included, by transformers' continuous batching.

    Its sampler has one temperature and one seed per manager, so each temperature gets a manager of its own.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for number, temperature in enumerate(sorted(set(temperatures))):
        rows = [i for i, t in enumerate(temperatures) if t == temperature]
        found = _one_manager(model, [prompts[i] for i in rows], temperature, sampling, sampling.seed + number, report)
        for i, answer in zip(rows, found, strict=True):
            answers[i] = answer
    return answers


def _one_manager(
    model: nn.Module, prompts: list[list[int]], temperature: float, sampling: Sampling, seed: int, report: Report | None
) -> list[list[int]]:
    hot = (
        {"do_sample": True, "temperature": temperature, "top_p": sampling.top_p, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=end_tokens(model) or -1, pad_token_id=0, **hot
    )
    in_flight = min(sampling.batch_size, len(prompts))
    longest = max(map(len, prompts))
    page = 32
    # Unbounded, the cache takes what memory is free; this is what `in_flight` requests can need, and one to spare.
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
        # All requests wait before the thread starts: otherwise the clock would decide which of them share a batch.
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
    """The manager seeds torch's global generators; the caller's stream of random numbers must not notice."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_global_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


ENGINES = {"padded": answer_padded, "continuous": answer_continuous}
