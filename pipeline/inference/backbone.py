"""A causal LM cut after layer N: shallow (embedding, layers 1..N), exit head, deep (layers N+1..L, norm, LM head).

Takes a transformers model, on one device or distributed over several by whole layers, and an exit head; returns hidden
states and logits of rows at absolute positions, and reads and writes a KVCache. What differs between model families is
in their `Family`: either the layers are computed here from the model's weights, which launches a third of the kernels
that transformers launches, or transformers' layers are called one by one. In the first case the modules are never
called, so a model with a changed module is refused (unmodified.py) or runs in the second way, and a config whose layers
compute something else is refused (families.py). Every matrix product is a `Product` with the kernel that is fastest
here (kernels.py).

M rows of this pass, D hidden, H query heads, G key/value heads, R = H/G, C channels of a head, V vocabulary,
T positions, W tokens that the head can draft (in fixed-width passes: rows); a row is the hidden state of one token
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exit_head import ExitHead, check_exit_layer, persistent_buffers
from .families import check_config, family_of, is_known
from .family import Family, Weights
from .family_generic import GENERIC, check_around
from .fixed_shapes import BRANCHED, Branches, Chain, FixedShapes, Where, rounded
from .generic_configs import check_fits
from .kernels import Kernels, Product
from .kv_cache import KVCache, allocate
from .law import DraftVocabulary, check_draft_ids
from .layers import Shape, run_layers
from .rounds import WIDTHS, Controller, spare_of
from .tree import WIDEST, Draft, Tree
from .unmodified import addresses, changes, check_unmodified


class Block(NamedTuple):
    """Consecutive layers on one device: all are shallow, all are deep, or the only one is the exit head."""

    start: int
    stop: int
    device: torch.device
    weights: list[Weights]


class SplitBackbone:
    """The model and one exit head, ready to decode. Weights are shared with `model`, which stays usable.

    check: refuse a head whose fingerprint is not that of `model`. Without, a model of a family that is computed here is
    taken too where something in it was changed (an adapter, quantised layers): its own layers are then called one by
    one. Whoever does so must compare logits (`canary.compare`), as nothing else tells.
    fixed_shapes: on a GPU, replay passes of fixed widths as CUDA graphs instead of launching every kernel. Then all
    texts share one cache, so only one text can be decoded at a time. It has no effect where transformers' layers run.
    products: how matrix products are chosen, by timing or otherwise (`kernels.CHOICES`).
    pack: allow copies of the weights in another order where kernels that read them are faster. They take as much memory
    as the weights, and are made only if twice as much is available.
    beyond_context: allow texts longer than max_position_embeddings, as transformers' generate does.

    Raises ValueError for a config or a module that is not computed exactly, N out of range, a head of another backbone,
    or a device map that splits or offloads a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        head: ExitHead,
        *,
        check: bool = True,
        fixed_shapes: bool = False,
        products: str = "timed",
        pack: bool = True,
        beyond_context: bool = False,
    ):
        config = model.config
        self.checked, self.family = check, _family(model, check)
        self.shape = Shape.of(config)
        check_exit_layer(head.exit_layer, config.num_hidden_layers)
        devices = [_device_of(layer, f"layer {i}") for i, layer in enumerate(model.model.layers)]
        for name, part in (("embed_tokens", model.model.embed_tokens), ("norm", model.model.norm)):
            _device_of(part, name)
        self.device = _device_of(model.lm_head, "lm_head")
        """The device of the LM head, on which logits are returned."""
        if check:
            head.check_fits(model)
        self.exit_layer, self.num_layers = head.exit_layer, config.num_hidden_layers
        self.hidden = config.hidden_size
        self.passes = self.family.passes(model, self.shape)
        self.embedding_VD = model.model.embed_tokens.weight.data
        self.final_norm = self.family.final_norm(model, self.shape, self.device)
        self.dtype = self.embedding_VD.dtype
        self.max_context = sys.maxsize if beyond_context else config.max_position_embeddings
        last = model.model.layers[-1]
        with torch.device("meta"):  # initialising weights would advance the user's random state
            exit_layer = head.spec.build(type(last), config).requires_grad_(False)
        try:
            kept = {name: x for name, x in persistent_buffers(last).items() if name in exit_layer.state_dict()}
            exit_layer.load_state_dict(kept | head.weights, assign=True)
        except RuntimeError as error:  # a name or a shape
            raise ValueError(f"the exit head's weights are not those of a layer of this backbone: {error}") from None
        self._shared = _products_of(model, self.family, products, pack)
        self.kernels, self.lm_head = self._shared.kernels, self._shared.lm_head
        for part in exit_layer.parameters():  # buffers keep their dtype, as in the backbone
            part.data = part.data.to(self.dtype)
        exit_weights = self.family.gather(exit_layer.to(self.device))
        self.weights = [*self._shared.weights, exit_weights.fitted(self.kernels)]
        """Of layers 1..L and of the exit layer."""
        self.draft_vocabulary: DraftVocabulary | None = None
        """The tokens that the head can draft; None if it can draft every token."""
        self.draft_lm_head = self.lm_head
        if head.draft_ids_W is not None:
            check_draft_ids(head.draft_ids_W, len(model.lm_head.weight))
            ids_W = head.draft_ids_W.to(self.device)
            self.draft_vocabulary = DraftVocabulary(ids_W, len(model.lm_head.weight))
            rows = Product(model.lm_head.weight.data.index_select(0, ids_W).t())
            self.draft_lm_head = Kernels([rows], products, pack=pack).fit(rows)
        self.has_fixed_shapes = fixed_shapes and self.family.is_fast
        self._fixed = FixedShapes(self.family.layer, self.shape) if self.has_fixed_shapes else None
        self._fixed_cache: KVCache | None = None
        self.blocks = self._cut([*devices, self.device])

    def _cut(self, devices: list[torch.device]) -> list[Block]:
        """Cut the layers into blocks, which end at layer N, at layer L, and where the device changes."""
        blocks, start = [], 0
        for stop in range(1, len(devices) + 1):
            if stop in (self.exit_layer, self.num_layers, len(devices)) or devices[stop] != devices[start]:
                blocks.append(Block(start, stop, devices[start], self.weights[start:stop]))
                start = stop
        return blocks

    def still_is(self, model: nn.Module) -> bool:
        """Whether the weights in use are still those of `model`, and its layers may still be computed as before.

        Raises ValueError if the model was changed in another way, for example by an adapter or a hook, unless this
        engine is one that takes such a model.
        """
        if self.family.is_fast:
            try:
                check_unmodified(model)
            except ValueError:
                if self.checked:
                    raise
                return False
        else:
            check_around(model)
        return self._shared.are_of(model) and self._draft_rows_are_of(model.lm_head)

    def _draft_rows_are_of(self, lm_head: nn.Module) -> bool:
        """Whether the copied rows of the draft vocabulary are those of the LM head, as far as some of them tell."""
        if self.draft_vocabulary is None:
            return True
        ids_W = self.draft_vocabulary.ids_W
        some = torch.arange(0, len(ids_W), max(1, len(ids_W) // 16), device=ids_W.device)
        return torch.equal(self.draft_lm_head.weight_IO.t()[some], lm_head.weight.data[ids_W[some]])

    # ---- what the decoder calls

    def new_cache(self, max_length: int, spare: int = 0) -> KVCache:
        """An empty cache for `max_length` positions, and `spare` slots for drafts that branch. Raises ValueError beyond
        the backbone's context, and for spare slots where passes know of no branches.

        With fixed shapes it is the one cache of this object, emptied.
        """
        if max_length > self.max_context:
            raise ValueError(f"{max_length} positions are needed, the backbone's context is {self.max_context}")
        if spare:
            self._check_branches()
        if self._fixed is None:
            return self._allocate(max_length + spare)
        if self._fixed_cache is None or self._fixed_cache.max_length < rounded(max_length, spare):
            # recordings are tied to their cache
            self._fixed, self._fixed_cache = FixedShapes(self.family.layer, self.shape), None
            self._fixed_cache = self._allocate(rounded(max_length, spare))
            for width in WIDTHS:  # record every width now, not in the middle of a text
                zeros_WD = torch.zeros(width, self.hidden, dtype=self.dtype, device=self.device)
                self._run(zeros_WD, 0, self.num_layers + 1, 0, self._fixed_cache)
            if spare:
                flat = Tree(0)  # of the most drafts, all after the pending token
                for _ in range(WIDEST):
                    flat.add(0, Draft(torch.zeros(1, dtype=torch.long)), None)
                for width in BRANCHED:
                    zeros_WD = torch.zeros(min(width, WIDEST), self.hidden, dtype=self.dtype, device=self.device)
                    self._run(zeros_WD, 0, self.num_layers + 1, 1, self._fixed_cache, flat)
        self._fixed_cache.length = self._fixed_cache.head_length = 0
        return self._fixed_cache

    def _allocate(self, max_length: int) -> KVCache:
        self.passes.allocate(max_length, {block.device for block in self.blocks})
        deep = next(b for b in self.blocks if b.start == self.exit_layer)
        hidden_TD = torch.zeros(max_length, self.hidden, dtype=self.dtype, device=deep.device)
        shape = 1, self.shape.kv_heads, max_length, self.shape.head_dim
        made = [allocate(len(b.weights), b.device, self.dtype, *shape) for b in self.blocks]
        keys, values = map(list, zip(*made, strict=True))
        return KVCache(keys, values, hidden_TD)

    def check_controller(self, controller: Controller) -> None:
        """Raises ValueError for a controller whose drafts branch, where passes know of no branches."""
        if spare_of(controller):
            self._check_branches()

    def _check_branches(self) -> None:
        if not self.family.is_fast:
            raise ValueError(
                "its drafts branch, which needs a family whose layers are computed here (README lists them); those of "
                "this backbone are called in transformers: use a controller without tree"
            )

    def extra_bytes(self, length: int) -> dict[str, int]:
        """Bytes of memory needed on top of autoregressive decoding.

        head_bytes: the head's weights; cache_bytes: its keys and values, and the stored hidden states, of `length`
        positions. packed_bytes: copies of weights in another order (kernels.py), from which the baseline gains too.
        """
        size = self.embedding_VD.element_size()
        numbers = 2 * self.shape.kv_heads * self.shape.head_dim + self.hidden
        return {
            "head_bytes": self.weights[-1].nbytes + self._draft_bytes(),
            "cache_bytes": numbers * length * size,
            "packed_bytes": sum(p.packed.nbytes for p in self.products() if p.packed is not None),
        }

    def _draft_bytes(self) -> int:
        """Bytes of the copied rows of the LM head."""
        return 0 if self.draft_vocabulary is None else self.draft_lm_head.nbytes

    def products(self) -> list[Product]:
        """The matrix products of all layers, the exit layer included, and of the LM head, also for drafts."""
        own = [] if self.draft_vocabulary is None else [self.draft_lm_head]
        return [*_of(self.weights), self.lm_head, *own]

    # In the passes of a round, `tree` is its drafts, whose pending token is in slot cache.length. It may be left out
    # where each row follows the one before it.

    def shallow(self, ids: list[int], base: int, cache: KVCache, tree: Tree | None = None) -> None:
        """Run layers 1..N on tokens in slots base..; their hidden states are stored in the cache."""
        hidden_MD = self._run(self.passes.embed(ids, base), 0, self.exit_layer, base, cache, tree)
        cache.hidden_TD.narrow(0, base, len(ids)).copy_(hidden_MD)

    def deep(self, base: int, end: int, cache: KVCache, tree: Tree | None = None) -> Tensor:
        """Run layers N+1..L on the stored hidden states of slots base..end-1; [M, D] before the final norm."""
        return self._run(cache.hidden_TD[base:end], self.exit_layer, self.num_layers, base, cache, tree)

    def full(self, ids: list[int], base: int, cache: KVCache) -> Tensor:
        """Run all L layers on tokens at positions base.., as autoregressive decoding does; [M, D]."""
        return self._run(self.passes.embed(ids, base), 0, self.num_layers, base, cache)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Apply the final norm and the LM head; [M, V] in float32."""
        return self._logits(hidden_MD, self.lm_head)

    def draft_logits(self, slots: list[int], cache: KVCache, tree: Tree | None = None) -> Tensor:
        """The exit head's logits [M, W] for the tokens that follow those in `slots`, which are in ascending order.

        The head's keys and values of tokens that it has not processed yet (the prompt, bonus tokens, drafts beside
        those it read) are computed first.
        """
        base, alone = cache.head_length, len(slots) == 1
        out_MD = self.draft_hidden(slots[-1], cache, tree, last_row=alone)
        return self.draft_logits_of(out_MD if alone else out_MD[[at - base for at in slots]])

    def draft_hidden(self, last: int, cache: KVCache, tree: Tree | None = None, last_row: bool = True) -> Tensor:
        """The exit head's output [M, D] in the slots that it has not processed yet, up to `last`; or of that alone."""
        base, slot = cache.head_length, self.num_layers
        cache.head_length = last + 1
        hidden_MD = cache.hidden_TD[base : last + 1].to(self.device)
        out_MD = self._run(hidden_MD, slot, slot + 1, base, cache, tree, last_row=last_row)
        return out_MD[-1:] if last_row else out_MD

    def draft_logits_of(self, hidden_MD: Tensor) -> Tensor:
        """Apply the final norm and the rows of the LM head of the tokens that the head can draft; [M, W] in float32."""
        return self._logits(hidden_MD, self.draft_lm_head)

    def _logits(self, hidden_MD: Tensor, lm_head: Product) -> Tensor:
        logits = lm_head(self.final_norm(hidden_MD.to(self.device))).float()
        if self.shape.logit_scale != 1:
            logits = logits.mul_(self.shape.logit_scale)
        cap = self.shape.logit_cap
        return logits if cap == 0 else logits.div_(cap).tanh_().mul_(cap)

    def draft_hidden_of_all(self, end: int, cache: KVCache) -> Tensor:
        """The exit head's output [end, D] at all positions 0..end-1 in one pass, for analysis."""
        slot = self.num_layers
        hidden_MD = self._run(cache.hidden_TD[:end], slot, slot + 1, 0, cache)
        cache.head_length = end
        return hidden_MD

    # ---- the passes

    def _run(
        self, hidden_MD: Tensor, start: int, stop: int, base: int, cache: KVCache, tree: Tree | None = None,
        last_row: bool = False,
    ) -> Tensor:  # fmt: skip
        """Run layers start..stop-1 (from 0; L is the exit head) on rows in slots base.., block by block.

        last_row: of the last layer, only the last row's output is of use; the others may be left out.
        """
        m = len(hidden_MD)
        tree = None if tree is None or tree.is_chain or base < cache.length else tree
        widths = WIDTHS if tree is None else BRANCHED
        fixed = self._fixed if m <= widths[-1] else None
        if fixed is not None:
            width = next(w for w in widths if w >= m)
            hidden_MD = F.pad(hidden_MD, (0, 0, 0, width - m))
        rows: list[Any] = []
        device = None
        for i, block in enumerate(self.blocks):
            if block.start < start or block.stop > stop:
                continue
            hidden_MD = hidden_MD.to(block.device)
            keys, values = cache.keys[i], cache.values[i]
            if fixed is not None:
                tables, kinds = self.passes.tables(block.device), self.passes.kinds[block.start : block.stop]
                if tree is None:
                    where: Where = Chain(tables.positions_T[base : base + width])
                elif block.device != device:
                    device = block.device
                    where = Branches.of(tree, cache.length, base - cache.length, width, device)
                hidden_MD = fixed(hidden_MD, where, tables, block.weights, kinds, keys, values)
                continue
            if block.device != device:
                branches = () if tree is None else (tree, cache.length)
                rows, device = self.passes.rows(base, m, block.device, *branches), block.device
            keys, values = keys.narrow(3, 0, base + m), values.narrow(3, 0, base + m)
            hidden_MD = run_layers(
                hidden_MD, self.family.layer, block.weights, self.shape, rows[block.start : block.stop], keys, values,
                at_end=True, last_row=last_row and block.stop == stop,
            )  # fmt: skip
        return hidden_MD if fixed is None else hidden_MD[:m]


def _family(model: nn.Module, check: bool) -> Family:
    """The family by which a model is computed. Raises ValueError for one that is not computed exactly."""
    config: Any = model.config
    try:
        check_config(config, quantised=not check)
        family = family_of(config)
        family.check(model)
        return family
    except ValueError as error:
        if not is_known(config):
            raise
        refused = error
    try:
        check_fits(config)
        GENERIC.check(model)
    except ValueError:
        raise refused from None
    if check:
        raise ValueError(
            f"{refused}. In transformers, generate(..., allow_other_backbone=True) decodes through the layers of such "
            "a model as they are, at less speed"
        )
    return GENERIC


def _device_of(part: nn.Module, name: str) -> torch.device:
    """The device of a layer or other module. Raises ValueError where accelerate's device map splits or offloads it."""
    found = {p.device for p in part.parameters()}
    offloaded = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in part.modules())
    if len(found) > 1 or offloaded:
        where = "offloaded" if offloaded else "split over " + ", ".join(sorted(map(str, found)))
        raise ValueError(f"{name} is {where}: a device map by whole layers that fit the devices is needed")
    return found.pop()


def _products_of(model: nn.Module, family: Family, choice: str, pack: bool) -> "_Products":
    """Kernels, weights of the layers, and the LM head. They are kept on the model for its other heads, so that all of
    them and their baseline use the same; chosen anew for another number of threads, and for weights that were replaced.
    """
    layers = [family.gather(layer) for layer in model.model.layers]
    lm_head = Product(model.lm_head.weight.data.t())
    key = torch.get_num_threads(), choice, pack, family.is_fast
    known = model.__dict__.setdefault("_products", {})
    if key not in known or not known[key].are_of(model):
        kernels = Kernels([*_of(layers), lm_head], choice, pack=pack)
        fitted = [w.fitted(kernels) for w in layers], kernels.fit(lm_head)
        known[key] = _Products(addresses(model), changes(model), kernels, *fitted)
    return known[key]


class _Products(NamedTuple):
    """A model's weights with their kernels, as its engines share them."""

    addresses: tuple[int, ...]
    changes: tuple[int, ...]
    kernels: Kernels
    weights: list[Weights]
    lm_head: Product

    def are_of(self, model: nn.Module) -> bool:
        """Whether these are the weights of `model`; False once any was replaced, or changed in place while a packed
        copy of it is in use."""
        if self.addresses != addresses(model):
            return False
        copies = [product for product in [*_of(self.weights), self.lm_head] if product.packed is not None]
        return not copies or (self.changes == changes(model) and all(product.is_current() for product in copies))


def _of(weights: list[Weights]) -> list[Product]:
    return [product for w in weights for product in w.products()]
