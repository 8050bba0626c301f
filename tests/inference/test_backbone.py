"""The decoding engine against transformers' own logits and greedy text, and against stubs with obvious answers."""

import itertools
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load, transformers_greedy
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.inference import decoding, kernels
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed, make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.kernels import Product, onednn, packed, plain
from pipeline.inference.literature import Beta
from pipeline.inference.sampling import Sampler
from pipeline.inference.stopwatch import Stopwatch, stopwatch

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    extra = {"qwen3": {"head_dim": 16}, "qwen2": {"tie_word_embeddings": True}}.get(request.param, {})
    return load(tiny_backbone(tmp_path_factory.mktemp(request.param), request.param, sharpness=4.0, **extra))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tiny_backbone(tmp_path_factory.mktemp("llama"), sharpness=4.0))


@torch.no_grad()
def test_logits_are_transformers_own(model) -> None:
    for p in model.parameters():  # random biases too: qwen2 starts with zeros
        if p.ndim == 1 and p.abs().sum() == 0:
            p.normal_()
    ids = torch.tensor([PROMPT])
    before = model(ids).logits[0]
    engine = SplitBackbone(model, head_for(model, 2))
    assert torch.equal(model(ids).logits[0], before), "joining the weights must leave the model as it was"
    cache = engine.new_cache(32)
    whole = engine.logits(engine.full(PROMPT, 0, cache))
    torch.testing.assert_close(whole, before, rtol=1e-4, atol=1e-4)
    cache = engine.new_cache(32)  # the same in pieces: 3 rows, 1 row, the rest, split at N
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, len(PROMPT))):
        engine.shallow(PROMPT[start:end], start, cache)
        pieces.append(engine.logits(engine.deep(start, end, cache)))
    torch.testing.assert_close(torch.cat(pieces), before, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_transformers_own(model) -> None:
    expected = transformers_greedy(model, 30)
    request = Request(PROMPT, 30)
    for n in (1, 2, 3):
        engine = SplitBackbone(model, head_for(model, n))
        assert autoregressive(engine, request, Sampler()).tokens == expected
        for controller in (*map(Fixed, range(6)), Beta()):
            assert self_speculative(engine, request, Sampler(), controller).tokens == expected


def test_two_heads_share_the_backbones_memory(llama) -> None:
    one, two = SplitBackbone(llama, head_for(llama, 1)), SplitBackbone(llama, head_for(llama, 2))
    assert one.weights[0] is two.weights[0] and one.weights[-1] is not two.weights[-1]
    attention, joined = llama.model.layers[0].self_attn, one.weights[0].qkv.weight_IO
    assert attention.q_proj.weight.data_ptr() == joined.data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_perfect_head_is_always_accepted(llama, k: int) -> None:
    # After L-1 layers, a copy of the last layer is the rest of the backbone: every draft is its own choice.
    engine = SplitBackbone(llama, head_for(llama, 3))
    out = self_speculative(engine, Request(PROMPT, 1 + 4 * (k + 1)), Sampler(), Fixed(k))
    assert [(r.drafted, r.accepted, r.tokens) for r in out.rounds] == [(k, k, k + 1)] * 4


def test_a_contrary_head_is_never_accepted(llama, monkeypatch) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))
    honest = engine.draft_logits
    monkeypatch.setattr(engine, "draft_logits", lambda *args: -honest(*args))
    out = self_speculative(engine, Request(PROMPT, 9), Sampler(), Fixed(2))
    assert [(r.accepted, r.tokens) for r in out.rounds] == [(0, 1)] * 8
    assert out.tokens == autoregressive(engine, Request(PROMPT, 9), Sampler()).tokens


def test_the_lagging_head_catches_up_exactly(llama) -> None:
    """Its logits are those of a head that saw every position at once, in transformers' own layer."""
    head = head_for(llama, 2)
    engine = SplitBackbone(llama, head)
    cache = engine.new_cache(32)
    engine.shallow(PROMPT, 0, cache)
    layer = new_exit_layer(llama)
    layer.self_attn.layer_idx = 0
    hidden = cache.hidden_TD[None, : len(PROMPT)]
    positions = torch.arange(len(PROMPT))[None]
    mask = torch.full((len(PROMPT), len(PROMPT)), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        rope = llama.model.rotary_emb(hidden, positions)
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        expected = llama.lm_head(llama.model.norm(out))[0]
        for end in (4, 5, 9, len(PROMPT)):  # lags of 4, 1, 4 and 2 positions
            torch.testing.assert_close(
                engine.draft_logits([end - 1], cache)[0], expected[end - 1], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("k", [0, 1, 4])
def test_end_token_ends_the_text_wherever_it_falls(llama, k: int) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))  # perfect drafts: the end token is itself drafted
    text = autoregressive(engine, Request(PROMPT, 16), Sampler()).tokens
    for end in set(text):
        request = Request(PROMPT, 16, frozenset([end]))
        expected = text[: text.index(end) + 1]
        for out in (autoregressive(engine, request, Sampler()), self_speculative(engine, request, Sampler(), Fixed(k))):
            assert out.tokens == expected and out.finish_reason == "stop"
            assert not out.rounds or 1 + sum(r.tokens for r in out.rounds) == len(out.tokens)


@pytest.mark.parametrize("new", [1, 2, 3, 8])
def test_length_limit_is_exact(llama, new: int) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))
    out = self_speculative(engine, Request(PROMPT, new), Sampler(), Fixed(5))
    assert len(out.tokens) == new and out.finish_reason == "length"
    assert all(r.drafted <= new - 2 for r in out.rounds), "drafts beyond the limit are wasted"


def test_streaming_gives_every_token_in_order_and_can_stop(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))
    seen: list[int] = []
    out = self_speculative(engine, Request(PROMPT, 12, on_token=seen.append), Sampler(), Fixed(3))
    assert seen == out.tokens
    stopped = self_speculative(engine, Request(PROMPT, 12, on_token=lambda t: t == out.tokens[4]), Sampler(), Fixed(3))
    assert stopped.tokens == out.tokens[: out.tokens.index(out.tokens[4]) + 1]


def test_fills_the_context_to_the_last_position(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 2))
    new = 256 - len(PROMPT)
    out = self_speculative(engine, Request(PROMPT, new), Sampler(), Fixed(4))
    assert out.tokens == autoregressive(engine, Request(PROMPT, new), Sampler()).tokens
    with pytest.raises(ValueError, match="257 positions are needed, the backbone's context is 256"):
        self_speculative(engine, Request(PROMPT, new + 1), Sampler(), Fixed(4))


def test_refuses_what_it_would_get_wrong(llama, tmp_path) -> None:
    good = head_for(llama, 2)
    other = load(tiny_backbone(tmp_path, seed=1))
    with pytest.raises(ValueError, match="belongs to tiny"):
        SplitBackbone(other, good)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"exit layer N={n}: must be from 1 to 3"):
            SplitBackbone(llama, ExitHead(n, 4, good.backbone, good.weights))
    dynamic = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="rope_type=dynamic"):
        SplitBackbone(dynamic, head_for(dynamic, 1))
    llama.config.model_type, kept = "gpt2", llama.config.model_type
    try:
        with pytest.raises(ValueError, match=r"its config is a .*, not the one of transformers"):
            SplitBackbone(llama, good)
    finally:
        llama.config.model_type = kept


def test_head_folder_round_trips(llama, tmp_path) -> None:
    head = head_for(llama, 2)
    head.save(tmp_path / "head")
    again = ExitHead.load(tmp_path / "head")
    assert (again.exit_layer, again.num_layers, again.backbone) == (2, 4, head.backbone)
    assert all(torch.equal(again.weights[k], w) for k, w in head.weights.items())
    with pytest.raises(ValueError, match="no exit head here"):
        ExitHead.load(tmp_path)


def test_fingerprint_knows_a_fine_tune_but_not_a_cast(llama, tmp_path) -> None:
    folder = tiny_backbone(tmp_path, sharpness=4.0)
    assert fingerprint(load(folder)) == fingerprint(llama)
    assert fingerprint(load(folder).bfloat16()) == fingerprint(llama)
    changed = load(folder)
    changed.model.layers[-1].mlp.down_proj.weight.data *= 1.01
    assert fingerprint(changed) != fingerprint(llama)


def test_fixed_shapes_give_the_same_text(model) -> None:
    """Padded rows, a mask over the whole cache, one cache for text after text."""
    fixed = SplitBackbone(model, head_for(model, 2), fixed_shapes=True)
    expected = transformers_greedy(model, 30)
    assert autoregressive(fixed, Request(PROMPT, 30), Sampler()).tokens == expected
    for controller in (*map(Fixed, (0, 1, 2, 3, 5, 8)), Beta()):
        assert self_speculative(fixed, Request(PROMPT, 30), Sampler(), controller).tokens == expected
    assert fixed.new_cache(40) is fixed.new_cache(100), "recorded passes know the cache by its address"
    before, passes = fixed.new_cache(100), fixed._fixed
    assert fixed.new_cache(250) is not before and fixed._fixed is not passes, "they go with the cache they belong to"
    assert autoregressive(fixed, Request(PROMPT, 30), Sampler()).tokens == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_same_text(llama) -> None:
    on_gpu = load(llama.config._name_or_path).to("cuda")
    engine = SplitBackbone(on_gpu, head_for(on_gpu, 2), fixed_shapes=True)
    expected = autoregressive(SplitBackbone(on_gpu, head_for(on_gpu, 2)), Request(PROMPT, 30), Sampler()).tokens
    assert autoregressive(engine, Request(PROMPT, 30), Sampler()).tokens == expected
    for k, room in ((1, 30), (2, 30), (4, 250), (8, 250)):  # the cache grows on the way
        engine.new_cache(room)
        assert self_speculative(engine, Request(PROMPT, 30), Sampler(), Fixed(k)).tokens == expected
    for name in ("tree:2x2x1", "tree:4x3", "thompson+tree"):
        assert self_speculative(engine, Request(PROMPT, 30), Sampler(), make_controller(name)).tokens == expected


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_kernels_compute_the_same(rows: int, bias: bool) -> None:
    x, b, residual = torch.randn(rows, 24), torch.randn(16) if bias else None, torch.randn(rows, 16)
    product = Product(torch.randn(16, 24).t(), b)
    product.pack()
    for kernel in (plain, onednn, packed):
        for r in (None, residual):
            before = residual.clone()
            expected = x @ product.weight_IO + (b if bias else 0) + (0 if r is None else r)
            torch.testing.assert_close(kernel(product, x, r), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(residual, before), "the residual is read, not written"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a kernel seems to take for one row, and for more: by the table that a test writes."""
    table: dict = {}

    def seconds(products, candidates, x_MI):
        return {kernel: table[kernel][len(x_MI) > 1] for kernel in candidates}

    monkeypatch.setattr(kernels, "_seconds", seconds)
    return table


def test_the_kernel_that_was_timed_faster_is_taken(llama, clock) -> None:
    clock |= {plain: (1.0, 3.0), onednn: (0.97, 2.0), packed: (0.96, 1.0)}
    fresh = load(llama.config._name_or_path)  # a model's kernels are chosen once, with its first engine
    engine = SplitBackbone(fresh, head_for(fresh, 1))
    for product in engine.products():
        assert product.kernels == [plain, plain] + [packed] * 9, "clearly faster from two rows on, not at one"
        assert product.packed is not None
    copied = sum(product.weight_IO.nbytes for product in engine.products())
    assert copied <= engine.extra_bytes(8)["packed_bytes"] < 1.5 * copied, "blocks are padded"
    expected = transformers_greedy(llama, 20)
    assert autoregressive(engine, Request(PROMPT, 20), Sampler()).tokens == expected, "the text stays what it is"
    assert self_speculative(engine, Request(PROMPT, 20), Sampler(), Fixed(3)).tokens == expected
    again = SplitBackbone(fresh, head_for(fresh, 2))
    assert again.lm_head is engine.lm_head and again.weights[0] is engine.weights[0], "copies are made once"


def test_weights_are_packed_only_where_it_is_allowed_and_there_is_memory(llama, clock, monkeypatch) -> None:
    clock |= {plain: (1.0, 3.0), onednn: (1.0, 2.0), packed: (0.1, 0.1)}

    def kernels_of(**options):
        fresh = load(llama.config._name_or_path)
        engine = SplitBackbone(fresh, head_for(fresh, 1), **options)
        assert (engine.extra_bytes(8)["packed_bytes"] > 0) == (packed in engine.lm_head.kernels)
        return engine.lm_head.kernels

    assert kernels_of() == [plain] + [packed] * 10
    assert kernels_of(pack=False) == [plain, plain] + [onednn] * 9
    assert kernels_of(products="plain") == [plain] * 11
    assert kernels_of(products="repeatable") == [plain] * 11, "these are small"
    monkeypatch.setattr(kernels, "FEWEST_WEIGHTS", 1)
    assert kernels_of(products="repeatable") == [plain, plain] + [packed] * 9
    assert kernels_of(products="repeatable", pack=False) == [plain, plain] + [onednn] * 9
    with pytest.raises(ValueError, match="products=fast: must be one of timed, repeatable, plain"):
        kernels_of(products="fast")
    size = sum(p.numel() for p in llama.parameters()) * 4
    monkeypatch.setattr(kernels, "available_bytes", lambda: size)
    assert packed not in kernels_of(), "as much again must be left"
    monkeypatch.setattr(kernels, "available_bytes", lambda: 3 * size)
    assert packed in kernels_of()
    with pytest.warns(UserWarning, match="cannot reorder weights"):
        monkeypatch.setattr(kernels.torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=None))
        assert kernels_of() == [plain, plain] + [onednn] * 9
    monkeypatch.undo()
    half = load(llama.config._name_or_path).bfloat16()
    engine = SplitBackbone(half, head_for(half, 1))
    assert engine.lm_head.kernels == [plain] * 11 and not engine.kernels.chosen, "in bfloat16 nothing is timed"


@pytest.mark.parametrize("through_data", [False, True])
def test_a_weight_changed_in_place_is_packed_anew(llama, clock, through_data: bool) -> None:
    """As merging an adapter does (through .data, which torch does not count), or load_state_dict."""
    clock |= {plain: (1.0, 3.0), onednn: (1.0, 2.0), packed: (0.1, 0.1)}
    model = load(llama.config._name_or_path)
    engine = SplitBackbone(model, head_for(model, 1))
    assert engine.still_is(model)
    weight = model.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        if through_data:
            weight.data.mul_(-1)
        else:
            weight[3].mul_(-20)
    assert not engine.still_is(model)
    again = SplitBackbone(model, head_for(model, 1), check=False)
    assert again.still_is(model)
    expected = transformers_greedy(model, 20)
    assert expected != transformers_greedy(llama, 20)
    assert autoregressive(again, Request(PROMPT, 20), Sampler()).tokens == expected


def test_blocks_follow_the_devices(llama) -> None:
    """Layers on a second device: the hidden state moves there, keys and values live there, logits come from there."""
    mapped = load(llama.config._name_or_path)
    head = head_for(mapped, 1)
    for part in (*mapped.model.layers[2:], mapped.model.norm, mapped.lm_head):
        part.to("meta")
    engine = SplitBackbone(mapped, head, check=False, products="plain")
    assert [(b.start, b.stop, b.device.type) for b in engine.blocks] == [
        (0, 1, "cpu"), (1, 2, "cpu"), (2, 4, "meta"), (4, 5, "meta")
    ]  # fmt: skip
    cache = engine.new_cache(32)
    assert [keys.device.type for keys in cache.keys] == ["cpu", "cpu", "meta", "meta"]
    engine.shallow(PROMPT, 0, cache)
    whole = SplitBackbone(llama, head_for(llama, 1), products="plain")
    same = whole.new_cache(32)
    whole.shallow(PROMPT, 0, same)
    assert torch.equal(cache.hidden_TD, same.hidden_TD), "what stays on the first device is computed as ever"
    logits = engine.logits(engine.deep(0, len(PROMPT), cache))
    assert logits.device.type == "meta" and logits.shape == (len(PROMPT), llama.config.vocab_size)
    assert engine.draft_logits([len(PROMPT) - 1], cache).device == engine.device == torch.device("meta")
    whole.deep(0, len(PROMPT), same)
    assert torch.equal(cache.keys[1], same.keys[1][:1]), "the first deep layer is on the first device too"


def test_logits_are_where_the_lm_head_is(llama) -> None:
    """A map may leave the LM head on another device than the last layer and the final norm."""
    mapped = load(llama.config._name_or_path)
    head = head_for(mapped, 1)
    mapped.lm_head.to("meta")
    engine = SplitBackbone(mapped, head, check=False)
    cache = engine.new_cache(32)
    assert engine.full(PROMPT, 0, cache).device.type == "cpu"
    assert engine.logits(engine.full(PROMPT, 0, cache)).device == engine.device == torch.device("meta")
    engine.shallow(PROMPT, 0, cache)
    assert engine.draft_logits([len(PROMPT) - 1], cache).device == engine.device


def test_an_offloaded_layer_is_refused(llama, tmp_path) -> None:
    """As accelerate leaves it when memory runs out; said before anything reads the weights that are not there."""
    mapped = load(llama.config._name_or_path)
    head = head_for(mapped, 1)
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", *(f"model.layers.{i}" for i in range(4))]
    places = dict.fromkeys(names, "cpu") | {"lm_head": "disk"}
    mapped = dispatch_model(mapped, places, offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ValueError, match="lm_head is offloaded: a device map by whole layers that fit the devices"):
        SplitBackbone(mapped, head)


def test_a_map_that_splits_a_layer_is_refused(llama) -> None:
    mapped = load(llama.config._name_or_path)
    head = head_for(mapped, 1)
    mapped.model.layers[2].mlp.to("meta")
    with pytest.raises(ValueError, match="layer 2 is split over cpu, meta: a device map by whole layers"):
        SplitBackbone(mapped, head, check=False)


# ---- what the host waits for, and how long


class Host:
    """Counts the numbers that it asks a device for (`reads`) and brings to one (`uploads`): on a GPU both are waits."""

    def __init__(self, monkeypatch):
        self.reads = self.uploads = 0
        for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, self._counted("reads", getattr(torch.Tensor, name)))
        monkeypatch.setattr(torch, "tensor", self._counted("uploads", torch.tensor))

    def _counted(self, kind: str, call):
        def counted(*args, **kwargs):
            setattr(self, kind, getattr(self, kind) + 1)
            return call(*args, **kwargs)

        return counted


class Watched:
    """A controller that notes a count at the end of each round."""

    def __init__(self, controller, count):
        self.peek, self.draft, self.learn, self.count = controller.peek, controller.draft, controller.observe, count
        self.counts: list[int] = []

    def observe(self, round) -> None:
        self.counts.append(self.count())
        self.learn(round)

    def each(self) -> list[int]:
        return [after - before for before, after in itertools.pairwise(self.counts)]


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0), Sampler(0.7, top_k=40, top_p=0.9)], ids=["0", "1", "0.7"])
@pytest.mark.parametrize("name", ["none", "fixed:3", "confidence:0.5", "entropy:0.6", "calibration", "thompson"])
def test_the_host_reads_once_a_head_pass_and_once_a_verification(
    llama, monkeypatch, name: str, sampler: Sampler, fixed_shapes: bool
) -> None:
    """A head pass: what the controller asks for, the draft with it. A verification: how many, and the bonus token."""
    engine = SplitBackbone(llama, head_for(llama, 2), fixed_shapes=fixed_shapes)
    sampler.generator = torch.Generator().manual_seed(0)
    host = Host(monkeypatch)
    watched = Watched(make_controller(name, greedy=sampler.greedy), lambda: host.reads)
    uploads = Watched(watched, lambda: host.uploads)
    out = self_speculative(engine, Request(PROMPT, 60), sampler, uploads)
    assert watched.each() == [r.head_passes + 1 for r in out.rounds[1:]]
    assert host.reads == 1 + sum(r.head_passes + 1 for r in out.rounds), "the first token is drawn without a round"
    assert uploads.each() == [0] * (len(out.rounds) - 1)
    if name.startswith(("confidence", "entropy")):
        assert any(r.head_passes > r.drafted for r in out.rounds), "a draft that is refused is among them"


@pytest.mark.parametrize("name", ["tree:3", "tree:4x3x2", "tree:1x2"])
def test_a_level_of_a_greedy_tree_is_read_at_once(llama, monkeypatch, name: str) -> None:
    engine = SplitBackbone(llama, head_for(llama, 2))
    controller = make_controller(name)
    host = Host(monkeypatch)
    out = self_speculative(engine, Request(PROMPT, 60), Sampler(), controller)
    assert host.reads == 1 + sum(r.head_passes + 1 for r in out.rounds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_host_reads_once_a_token_of_autoregressive_decoding(llama, monkeypatch, temperature: float) -> None:
    engine = SplitBackbone(llama, head_for(llama, 2))
    host = Host(monkeypatch)
    autoregressive(engine, Request(PROMPT, 20), Sampler(temperature))
    assert (host.reads, host.uploads) == (20, 1), "the prompt is brought to the device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_is_waited_for_as_often_as_the_host_reads(llama, temperature: float) -> None:
    on_gpu = load(llama.config._name_or_path).to("cuda")
    engine = SplitBackbone(on_gpu, head_for(on_gpu, 2), fixed_shapes=True)
    decode = partial(self_speculative, engine, Request(PROMPT, 60), Sampler(temperature))
    decode(Fixed(3))  # records the passes
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        watched = Watched(make_controller("confidence:0.2"), lambda: len(waits))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rounds = decode(watched).rounds
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watched.each() == [r.head_passes + 1 for r in rounds[1:]]


def test_parts_of_a_round_are_marked_in_order_and_read_behind_it(llama, monkeypatch) -> None:
    log: list[str] = []

    class Logged(Stopwatch):
        def mark(self, part: str) -> None:
            log.append(part)
            super().mark(part)

        def read(self):
            log.append("read")
            return super().read()

    monkeypatch.setattr(decoding, "_stopwatch", lambda backbone: Logged(itertools.count().__next__))
    engine = SplitBackbone(llama, head_for(llama, 3))  # perfect drafts
    out = self_speculative(engine, Request(PROMPT, 4), Sampler(), Fixed(2))
    draft = ["shallow", "rest", "head"]
    assert log == ["prefill", *draft, *draft, "shallow", "rest", "verify", "rest", "read", "decoding", "read"]
    (round,) = out.rounds
    assert (round.shallow_seconds, round.head_seconds, round.verify_seconds, round.seconds) == (3, 2, 1, 10)
    assert (out.prefill_seconds, out.seconds) == (1, 1)


def test_one_gpu_is_timed_by_its_own_events(monkeypatch) -> None:
    log, milliseconds = [], iter([100, 110, 115, 135, 136])

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream) -> None:
            self.at = next(milliseconds)
            log.append(f"record in {stream}")

        def synchronize(self) -> None:
            log.append(f"wait for {self.at}")

        def elapsed_time(self, after) -> float:
            assert log[-1] == f"wait for {after.at}", "an event not yet passed has no time"
            return after.at - self.at

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    watch = stopwatch([torch.device("cuda:1")] * 4, Event)
    for part in ("shallow", "head", "shallow", "rest"):
        watch.mark(part)
    assert log == ["record in the stream of cuda:1"] * 5, "nothing is waited for before the times are read"
    assert watch.read() == pytest.approx({"shallow": 0.030, "head": 0.005, "rest": 0.001})
    assert log[5:] == [f"wait for {at}" for at in (110, 115, 135, 136)]


@pytest.mark.parametrize("others", [["cuda:1"], ["cpu"], ["cpu", "cuda:1"]])
def test_several_devices_are_waited_for_at_every_mark(monkeypatch, others: list[str]) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(str(device)))
    watch = stopwatch(map(torch.device, ["cuda:0", *others]))
    gpus = sorted({"cuda:0", *others} - {"cpu"})
    assert sorted(waits) == gpus, "at the start"
    watch.mark("shallow")
    assert sorted(waits) == sorted(gpus * 2)
    assert watch.read()["shallow"] >= 0 and len(waits) == 2 * len(gpus)


def test_without_a_gpu_nothing_is_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    watch = stopwatch([torch.device("cpu"), torch.device("meta")])
    watch.mark("shallow")
    assert set(watch.read()) == {"shallow"}
