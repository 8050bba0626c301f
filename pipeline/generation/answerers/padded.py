"""The answerer `padded`: left-padded batches in this process, from which finished rows are removed.

Takes a transformers model; gives each question's new ids. The result of a call depends on its arguments alone. What the
prompts of a batch begin with in common, such as a system message, is computed once. On a CPU the model's linear layers
and its attention are computed by faster functions meanwhile (products.py, grouped_attention.py).

Letters: B rows still generating, R rows drawn for at once, T positions, V vocabulary.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ...inference.prefills import MOST, common
from ...inference.sampling import exact_dtype, inverted, outside_nucleus
from .grouped_attention import grouped_attention
from .interface import Answer, Question, Report, Sampling
from .products import fast_products

DRAWN = 32
"""Rows whose cumulative sums are computed at once, so that they stay in a CPU's cache."""


class Padded:
    """Answers in batches of questions of similar length, which need little padding; temperatures may be mixed.

    transformers' own generate copies its whole cache at every token and computes finished rows until the batch ends:
    see benchmarks/generation.py.
    """

    reproducible = True

    def __init__(self, model: nn.Module, ends: Collection[int], *, pack: bool = True):
        """`ends`: the ids that end an answer. pack: allow copies of the weights while questions are answered
        (products.py)."""
        self.model, self.ends, self.pack = model, frozenset(ends), pack

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].ids), i))
        answers: dict[int, Answer] = {}
        with torch.inference_mode(), grouped_attention(self.model), fast_products(self.model, pack=self.pack):
            for start in range(0, len(order), sampling.batch_size):
                rows = order[start : start + sampling.batch_size]
                found = _Batch(self.model, [questions[i] for i in rows], sampling, self.ends).run(generator, report)
                answers |= {i: Answer(ids, ids[-1] in self.ends) for i, ids in zip(rows, found, strict=True)}
        return [answers[i] for i in range(len(questions))]


class _Batch:
    """One left-padded batch of questions sorted by length, its cache and the answers so far."""

    def __init__(self, model: nn.Module, questions: list[Question], sampling: Sampling, ends: frozenset[int]):
        self.model, self.sampling, self.ends = model, sampling, ends
        self.prompts = [q.ids for q in questions]
        self.longest = max(map(len, self.prompts))
        self.pad = [self.longest - len(p) for p in self.prompts]
        device = model.device
        room = self.longest + sampling.max_new_tokens
        self.pad_B = torch.tensor(self.pad, device=device)
        self.mask_BT = (torch.arange(room, device=device) >= self.pad_B[:, None]).long()
        self.has_padding = any(self.pad)
        self.temperatures_B = torch.tensor([q.temperature for q in questions], device=device)
        self.layers = [RoomyLayer(len(questions), room) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.answers: list[list[int]] = [[] for _ in questions]
        self.rows = list(range(len(questions)))
        """Index of the answer that each row of the tensors belongs to."""

    def run(self, generator: torch.Generator, report: Report | None) -> list[list[int]]:
        logits_BV = self._prefill()
        for step in range(self.sampling.max_new_tokens):
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
                kept = _without(finished)
                step_ids = step_ids[kept]
                self._keep(kept)
            logits_BV = self._forward(step_ids, slice(None), self.longest + step)
        return self.answers

    def _prefill(self) -> Tensor:
        """Float32 logits [B, V] after the prompts. What all prompts begin with is computed once, for the longest."""
        device = self.model.device
        # The padding's id does not matter: the mask hides it.
        ids = [[0] * n + p for n, p in zip(self.pad, self.prompts, strict=True)]
        ids_BT = torch.tensor(ids, device=device)
        shared = _common_beginning(self.prompts)
        if shared:
            self._forward(ids_BT[-1:, :shared], slice(len(ids) - 1, len(ids)), 0)
            for layer in self.layers:
                layer.repeat_last(shared, self.pad)
        logits, first = [], 0
        while first < len(ids):
            stop = first + 1
            tokens = len(self.prompts[first]) - shared
            while stop < len(ids):
                tokens += len(self.prompts[stop]) - shared
                if device.type == "cpu" and tokens > MOST:
                    break
                stop += 1
            start = self.pad[stop - 1] + shared  # of the longest: the prompts are sorted
            logits.append(self._forward(ids_BT[first:stop, start:], slice(first, stop), start))
            first = stop
        return torch.cat(logits)

    def _forward(self, ids_BT: Tensor, rows: slice, start: int) -> Tensor:
        """Float32 logits [B, V] after the last of `ids_BT`, which belong to these rows, from position `start` on."""
        end = start + ids_BT.shape[1]
        for layer in self.layers:
            layer.aim(rows, start)
        slots_T = torch.arange(start, end, device=ids_BT.device)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT[rows, :end] if self.has_padding else None,
            position_ids=(slots_T - self.pad_B[rows, None]).clamp_(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _keep(self, kept: list[int]) -> None:
        """Keep only these rows of the batch, in this order; all but a few are where they were (`_without`)."""
        self.rows = [self.rows[at] for at in kept]
        index = torch.tensor(kept, device=self.pad_B.device)
        self.mask_BT, self.pad_B, self.temperatures_B = (
            self.mask_BT[index],
            self.pad_B[index],
            self.temperatures_B[index],
        )
        for layer in self.layers:
            layer.keep_rows(kept)


def _without(finished: list[bool]) -> list[int]:
    """The rows that are not finished, of which the last take the places of finished ones, so that few must be moved."""
    kept = [at for at, done in enumerate(finished) if not done]
    count = len(kept)
    return [kept.pop() if finished[at] else at for at in range(count)]


def _common_beginning(prompts: list[list[int]]) -> int:
    """Number of tokens that all prompts begin with; less than each has, because the logits after its last are needed.
    0 for a single prompt, as nothing is gained."""
    if len(prompts) == 1:
        return 0
    shared = common(min(prompts), max(prompts))  # in lexical order: what these two share, all share
    return min(shared, min(map(len, prompts)) - 1)


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache that is allocated for all rows and the whole answer, and written in place.

    A pass computes the rows and the first position that `aim` was given.
    """

    def __init__(self, rows: int, room: int):
        super().__init__()
        self.rows, self.room = rows, room

    def aim(self, rows: slice, start: int) -> None:
        self.at, self.start = rows, start

    def get_seq_length(self) -> int:
        return self.start

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            _, heads, _, channels = key_states.shape
            # Zeros, because what the mask hides must be finite.
            self.buffers = key_states.new_zeros(2, self.rows, heads, self.room, channels)
        end = self.start + key_states.shape[-2]
        self.keys, self.values = self.buffers[:, self.at, :, :end]
        self.keys[:, :, self.start :] = key_states
        self.values[:, :, self.start :] = value_states
        return self.keys, self.values

    def repeat_last(self, length: int, begins: list[int]) -> None:
        """Copy the first `length` positions of the last row to each row, from its own of `begins` on."""
        for row, begin in enumerate(begins[:-1]):
            self.buffers[:, row, :, begin : begin + length] = self.buffers[:, -1, :, :length]

    def keep_rows(self, kept: list[int]) -> None:
        """Keep these rows in this order; a row may move only to the place of one that is not kept."""
        for at, row in enumerate(kept):
            if row != at:
                self.buffers[:, at] = self.buffers[:, row]
        self.buffers = self.buffers[:, : len(kept)]


def sample(logits_BV: Tensor, temperatures_B: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One id for each row, [B]: the argmax at temperature 0, else a sample from the top-p nucleus."""
    chosen_B = logits_BV.argmax(-1)
    hot = temperatures_B > 0
    if hot.any():
        logits_BV = logits_BV[hot].div_(temperatures_B[hot, None])
        p_BV = logits_BV.softmax(-1)
        if top_p < 1:
            p_BV = p_BV.masked_fill(outside_nucleus(logits_BV, top_p), 0)
        chosen_B[hot] = draw(p_BV, generator)
    return chosen_B


def draw(p_BV: Tensor, generator: torch.Generator) -> Tensor:
    """An index for each row, [B], drawn with the row's probabilities."""
    u_B1 = torch.rand(len(p_BV), 1, generator=generator, device=p_BV.device, dtype=exact_dtype(p_BV.device))
    parts = zip(p_BV.split(DRAWN), u_B1.split(DRAWN), strict=True)
    return torch.cat([inverted(p_RV, u_R1)[:, 0] for p_RV, u_R1 in parts])
