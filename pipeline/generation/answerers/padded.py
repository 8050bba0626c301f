"""The answerer `padded`: left-padded batches in this process, from which finished rows are removed.

Takes a transformers model; gives each question's new ids. The result of a call depends on its arguments alone.

Letters: B rows still generating, T positions, V vocabulary.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ...inference.sampling import outside_nucleus
from .interface import Answer, Question, Report, Sampling


class Padded:
    """Answers in batches of questions of similar length, which need little padding; temperatures may be mixed.

    transformers' own generate copies its whole cache at every token and computes finished rows until the batch ends:
    see benchmarks/generation.py.
    """

    reproducible = True

    def __init__(self, model: nn.Module, ends: Collection[int]):
        """`ends`: the ids that end an answer."""
        self.model, self.ends = model, frozenset(ends)

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].ids), i))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), sampling.batch_size):
            rows = order[start : start + sampling.batch_size]
            found = _Batch(self.model, [questions[i] for i in rows], sampling, self.ends).run(generator, report)
            answers |= {i: Answer(ids, ids[-1] in self.ends) for i, ids in zip(rows, found, strict=True)}
        return [answers[i] for i in range(len(questions))]


class _Batch:
    """One left-padded batch, its cache and the answers so far."""

    def __init__(self, model: nn.Module, questions: list[Question], sampling: Sampling, ends: frozenset[int]):
        self.model, self.sampling, self.ends = model, sampling, ends
        prompts = [q.ids for q in questions]
        longest = max(map(len, prompts))
        pad = [longest - len(p) for p in prompts]
        device = model.device
        # The padding's id does not matter: the mask hides it.
        self.ids_BT = torch.tensor([[0] * n + p for n, p in zip(pad, prompts, strict=True)], device=device)
        self.room = longest + sampling.max_new_tokens
        self.mask_BT = torch.ones(len(prompts), self.room, dtype=torch.long, device=device)
        for row, n in enumerate(pad):
            self.mask_BT[row, :n] = 0
        self.pad_B = torch.tensor(pad, device=device)
        self.has_padding = any(pad)
        self.temperatures_B = torch.tensor([q.temperature for q in questions], device=device)
        self.layers = [RoomyLayer(self.room) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))
        """Index of the answer that each row of the tensors belongs to."""

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
        """Float32 logits [B, V] after the last of `ids_BT`, whose first position in the cache is `length`."""
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
        """Keep only these rows of the batch."""
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
    """A layer of the KV cache that is allocated for the whole answer and written in place, not grown by copying."""

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
    """One id for each row, [B]: the argmax at temperature 0, else a sample from the top-p nucleus."""
    chosen_B = logits_BV.argmax(-1)
    hot = temperatures_B > 0
    if hot.any():
        logits_BV = logits_BV[hot] / temperatures_B[hot, None]
        p_BV = logits_BV.softmax(-1)
        if top_p < 1:
            p_BV = p_BV.masked_fill(outside_nucleus(logits_BV, top_p), 0)
        chosen_B[hot] = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    return chosen_B
