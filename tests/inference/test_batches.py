"""Several texts at once through the real passes: logits, texts, errors of single texts, and the store of places."""

import random
from itertools import product

import pytest
import torch
from family_cases import BRANCHING, GENERIC
from helpers import tiny_backbone
from oracles import head_for, load
from test_trees import SHAPES, grown

from pipeline.inference import layers as layers_module
from pipeline.inference import passes as passes_module
from pipeline.inference import places as places_module
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.batch_attention import MANY
from pipeline.inference.batch_controllers import Each, make_batch_controller
from pipeline.inference.batch_decoding import decode_batch
from pipeline.inference.batch_engine import CATCH_UP, BatchEngine
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.passes import Span
from pipeline.inference.places import Layout, Places, slots_for
from pipeline.inference.prefills import WORTH
from pipeline.inference.sampling import Sampler
from pipeline.inference.tree import Tree


@pytest.fixture(scope="module", params=BRANCHING)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load(tiny_backbone(folder, request.param, sharpness=4.0, **BRANCHING[request.param])).double()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> SplitBackbone:
    """Of float64, whose rounding cannot decide a near tie."""
    model = load(tiny_backbone(tmp_path_factory.mktemp("llama"), sharpness=4.0)).double()
    return SplitBackbone(model, head_for(model, 2), check=False)


@pytest.fixture(autouse=True)
def short_places(monkeypatch) -> int:
    """Short texts are in several stores too, and move between them."""
    monkeypatch.setattr(places_module, "SHORTEST", 16)
    return 16


def requests_of(seed: int, count: int, longest: int = 60, new: int = 40) -> list[Request]:
    """Half of the prompts begin as others do, with enough tokens to be copied, or not quite."""
    dice = random.Random(seed)
    ends = frozenset(dice.sample(range(256), 4))
    begins = [dice.randrange(256) for _ in range(24)]
    requests = []
    for _ in range(count):
        prompt = [dice.randrange(256) for _ in range(dice.randint(1, longest))]
        if dice.random() < 0.5:
            prompt = [*begins[: dice.randint(WORTH - 1, 24)], *prompt][: max(longest, 1)]
        requests.append(Request(prompt, dice.randint(1, new), ends))
    return requests


def decoded(engine, requests, name: str | None, places: int, sampler=lambda i: Sampler()) -> list:
    controller = None if name is None else make_batch_controller(name, greedy=sampler(0).greedy)
    jobs = ((request, sampler(i)) for i, request in enumerate(requests))
    return sorted(decode_batch(engine, jobs, controller, places), key=lambda text: text.number)


@pytest.mark.parametrize("name", [None, "fixed:2", "fixed:8", "confidence:0.2", "thompson", "tree:2x1", "tree:3x2x1"])
def test_every_family_gives_the_texts_of_transformers(model, name) -> None:
    """Prompts shorter and longer than the windows, places that are taken again, drafts accepted and not."""
    engine, ids = BatchEngine(SplitBackbone(model, head_for(model, 2), check=False)), torch.arange(3, 60, 3)
    prompts = [ids[: n + 1].tolist() for n in (0, 3, 7, 18, 11)]
    for text, prompt in zip(decoded(engine, [Request(p, 20) for p in prompts], name, 3), prompts, strict=True):
        ids_1T = torch.tensor([prompt])
        mask_1T = torch.ones_like(ids_1T)
        out = model.generate(ids_1T, attention_mask=mask_1T, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert text.generation.tokens == out[0, len(prompt) :].tolist() and text.error is None


def test_passes_of_many_rows_give_transformers_logits(model) -> None:
    """Texts of different lengths with 1, 3 and 4 new rows, in another order than their places."""
    engine = BatchEngine(SplitBackbone(model, head_for(model, 2), check=False))
    texts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 17, 9)]
    known = [3, 13, 8]
    engine.enter([text[:n] for text, n in zip(texts, known, strict=True)])
    engine.reserve(7)
    order = [2, 0, 1]
    spans = [Span(i, known[i], len(texts[i]) - known[i]) for i in order]
    with torch.inference_mode():
        logits_MV = engine.logits(engine.full([token for i in order for token in texts[i][known[i] :]], spans))
        expected = [model(torch.tensor([texts[i]])).logits[0, known[i] :].float() for i in order]
    torch.testing.assert_close(logits_MV, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [MANY, 2])
@torch.inference_mode()
def test_rows_of_trees_are_computed_as_the_ends_of_their_paths(model, many: int, monkeypatch) -> None:
    """Texts of different lengths with a tree each, one with a chain, and one with its pending token only; level by
    level as in decoding, or all rows at once. Every path is run alone as a text, the exit head's logits too. many: with
    more rows than these texts are attended to one by one."""
    monkeypatch.setattr(passes_module, "MANY", many)
    one = SplitBackbone(model, head_for(model, 2), check=False)
    engine, known = BatchEngine(one), [3, 9, 14, 6, 11, 12]
    texts = [torch.randint(0, 256, (n + 1,), generator=torch.Generator().manual_seed(n)).tolist() for n in known]
    shapes = [*SHAPES.values(), [0, 1], [], [0, *range(11)]]  # the last is of paths longer than the windows
    trees = [grown(text[-1], shape, seed) for seed, (text, shape) in enumerate(zip(texts, shapes, strict=True))]
    engine.enter([text[:-1] for text in texts])
    engine.reserve(20)

    def spans(first: list[int], stop: list[int]) -> list[Span]:
        rows = zip(known, trees, first, stop, strict=True)
        return [Span.of(i, n + a, b - a, tree, n) for i, (n, tree, a, b) in enumerate(rows) if a < b]

    starts, ends = [0] * len(known), list(map(len, trees))
    head = {}
    for depth in range(max(max(tree.depths) for tree in trees) + 1):
        first = [sum(d < depth for d in tree.depths) for tree in trees]
        stop = [sum(d <= depth for d in tree.depths) for tree in trees]
        rows = {i: list(range(a, b)) for i, (a, b) in enumerate(zip(first, stop, strict=True)) if a < b}
        engine.shallow([trees[i].tokens[row] for i in rows for row in rows[i]], spans(first, stop))
        # not all rows of a level are asked about, and not all texts; the head reads the others later
        asked = {i: some for i in rows if (some := [row for row in rows[i] if row == 0 or (row + i) % 3])}
        if asked:
            found = engine.draft_logits([(i, trees[i], asked[i]) for i in asked])
            head |= dict(zip([(i, row) for i in asked for row in asked[i]], found, strict=True))
    deep = engine.logits(engine.deep(spans(starts, ends)))
    full = engine.logits(engine.full([token for tree in trees for token in tree.tokens], spans(starts, ends)))
    expected, compared = [], 0
    for i, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        for row in range(len(tree)):
            path = [*text, *tree.drafted(row)]
            cache = one.new_cache(40)
            one.shallow(path, 0, cache)
            expected.append(one.logits(one.deep(0, len(path), cache)[-1:]))
            if (i, row) in head:
                own_W = one.draft_logits([len(path) - 1], cache)[0]
                torch.testing.assert_close(head[i, row], own_W, rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared > 10
    for found in (deep, full):
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_prompts_that_begin_alike_are_read_once_from_there_on(model, monkeypatch) -> None:
    """Texts that enter together, and one that enters later: the rows that are computed are those that nobody has, and
    texts, drafts and acceptances are those of each text alone. The beginning is longer than the windows."""
    one = SplitBackbone(model, head_for(model, 2), check=False)
    engine, dice = BatchEngine(one), random.Random(2)
    begin = [dice.randrange(256) for _ in range(30)]
    prompts = [begin + [dice.randrange(256) for _ in range(n)] for n in (3, 1, 20, 2)]
    prompts += [prompts[2], [7] * 40]
    rows, honest = [], engine.full

    def full(ids, spans, store=False):
        if any(span.rows > 1 or span.base == 0 for span in spans) or len(ids) != len(engine.places.texts):
            rows.append(sorted(span.rows for span in spans))
        return honest(ids, spans, store)

    monkeypatch.setattr(engine, "full", full)
    requests = [Request(prompt, 12) for prompt in prompts]
    for text in decoded(engine, requests, "fixed:2", 5):
        alone = self_speculative(one, requests[text.number], Sampler(), make_controller("fixed:2"))
        assert text.generation.tokens == alone.tokens
        for mine, its in zip(text.generation.rounds, alone.rounds, strict=True):
            assert (mine.drafts, mine.accepted) == (its.drafts, its.accepted)
    # first one of them, then those that differ from it, then the one that has more in common with one of these
    assert rows == [[33], [1, 2, 20], [1], [40]]


@pytest.mark.parametrize("name", [None, "fixed:3", "tree:2x1"])
def test_attention_in_float32_is_torchs(tmp_path, name) -> None:
    """In float32 a CPU attends to few rows of each text in another way than in float64."""
    model = load(tiny_backbone(tmp_path, "mistral", sharpness=4.0, **BRANCHING["mistral"])).float()
    engine, worst, kinds = BatchEngine(SplitBackbone(model, head_for(model, 2), check=False)), 0.0, set()
    honest = layers_module.attend_together

    def both(q_MHC, keys, values, some, groups):
        nonlocal worst
        found = honest(q_MHC, keys, values, some, groups)
        expected = honest(q_MHC, keys, values, some._replace(bags=None), groups)
        worst = max(worst, (found - expected).abs().max().item())
        kinds.add((some.at_M is None, some.bags.sparse is not None))
        assert found.isfinite().all()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_module, "attend_together", both)
        for text in decoded(engine, requests_of(1, count=9), name, 4):
            assert text.error is None
    assert worst < 1e-5
    # texts with equally many rows or not, few enough for scores one by one or not
    assert kinds == ({(True, True)} if name is None else {*product([True, False], repeat=2)})


@torch.inference_mode()
def test_a_pass_of_one_text_is_that_of_the_decoder_of_one(tmp_path) -> None:
    """To the last bit in float32, also beside other texts that have no rows in it."""
    model = load(tiny_backbone(tmp_path, sharpness=4.0)).float()
    one = SplitBackbone(model, head_for(model, 2), check=False)
    engine, prompt, cache = BatchEngine(one), list(range(20, 31)), one.new_cache(40)
    engine.enter([prompt])
    engine.enter([[5, 6, 7]])
    engine.reserve(4)
    one.shallow(prompt, 0, cache)
    one.deep(0, len(prompt), cache)
    cache.commit(len(prompt))
    tree = grown(9, [0, 0, 1], seed=1)
    span = Span.of(0, len(prompt), len(tree), tree, len(prompt))
    engine.shallow(tree.tokens, [span])
    one.shallow(tree.tokens, len(prompt), cache, tree)
    assert torch.equal(engine.draft_logits([(0, tree, [1, 2])]), one.draft_logits([12, 13], cache, tree))
    assert torch.equal(engine.deep([span]), one.deep(len(prompt), len(prompt) + len(tree), cache, tree))
    for store in (False, True):
        assert torch.equal(engine.full(tree.tokens, [span], store), engine.deep([span])), "of a tree too"
        assert torch.equal(engine.full([3, 4], [Span(0, 11, 2)], store), one.full([3, 4], 11, cache))
        engine.shallow(tree.tokens, [span])


@torch.inference_mode()
def test_a_pass_without_branches_has_the_mask_of_chains(backbone, monkeypatch) -> None:
    """Also where a text's tree is a chain: nothing is computed for trees then."""
    engine, known = BatchEngine(backbone), [3, 7]
    engine.enter([[5] * n for n in known])
    engine.reserve(20)
    chains = [grown(1, [0, 1, 2], seed=n) for n in known]
    spans = [Span.of(i, n, 4, tree, n) for i, (n, tree) in enumerate(zip(known, chains, strict=True))]
    assert spans == [Span(0, 3, 4), Span(1, 7, 4)]
    monkeypatch.setattr(type(chains[0]), "path", None)
    engine.full([token for tree in chains for token in tree.tokens], spans)


@pytest.mark.parametrize("name", ["tree:2", "tree:2x1", "tree:3x2x1"])
def test_trees_of_several_texts_are_those_of_one(model, name, monkeypatch) -> None:
    """Greedy and sampled texts, with the same drafts and accepted paths. The head is right but for its two best tokens,
    which are exchanged: so most accepted paths move keys, values and hidden states."""
    one, branched = SplitBackbone(model, head_for(model, 3), check=False), 0
    requests, honest = requests_of(5, count=6, longest=30, new=24), one.draft_logits_of

    def exchanged(hidden_MD):
        logits_MW = honest(hidden_MD)
        values, at = logits_MW.topk(2)
        return logits_MW.scatter(1, at, values.flip(1))

    monkeypatch.setattr(one, "draft_logits_of", exchanged)
    for temperature in (0.0, 1.0):

        def sampler(i: int, temperature=temperature) -> Sampler:
            return Sampler(temperature, generator=torch.Generator().manual_seed(i))

        for text in decoded(BatchEngine(one), requests, name, 4, sampler):
            alone = self_speculative(one, requests[text.number], sampler(text.number), make_controller(name))
            assert text.error is None and text.generation.tokens == alone.tokens
            for mine, its in zip(text.generation.rounds, alone.rounds, strict=True):
                assert (mine.drafts, mine.parents, mine.path) == (its.drafts, its.parents, its.path)
                branched += bool(mine.path) and mine.path[-1] != mine.accepted
    assert branched > 10


def test_random_schedules_through_the_real_passes(backbone) -> None:
    engine = BatchEngine(backbone)
    for seed in range(10):
        requests = requests_of(seed, count=12)
        expected = [autoregressive(backbone, request, Sampler()) for request in requests]
        name = [None, "fixed:1", "fixed:4", "thompson", "goodput", "confidence:0.3", "table:1=4,3=1", "fixed:0",
                "tree:2x1", "tree:3x2x1"][seed]  # fmt: skip
        for text, one in zip(decoded(engine, requests, name, 1 + seed), expected, strict=True):
            assert text.generation.tokens == one.tokens and text.generation.finish_reason == one.finish_reason


@pytest.mark.slow
def test_300_schedules_through_the_real_passes(backbone) -> None:
    engine = BatchEngine(backbone)
    for seed in range(100, 400):
        requests, dice = requests_of(seed, count=8), random.Random(seed)
        name = dice.choice([None, "fixed:1", "fixed:3", "thompson", "goodput", "confidence:0.3", "tree:2", "tree:3x2"])
        for text, request in zip(decoded(engine, requests, name, dice.randint(2, 8)), requests, strict=True):
            assert text.generation.tokens == autoregressive(backbone, request, Sampler()).tokens


def test_sampled_texts_are_those_of_their_own_seeds(backbone) -> None:
    requests = requests_of(3, count=9)

    def sampler(i: int) -> Sampler:
        return Sampler(1.0, top_p=0.9, generator=torch.Generator().manual_seed(i))

    for text, request in zip(decoded(BatchEngine(backbone), requests, "fixed:2", 4, sampler), requests, strict=True):
        one = self_speculative(backbone, request, sampler(text.number), make_batch_controller("fixed:2").rule)
        assert text.generation.tokens == one.tokens
        assert [r.accepted for r in text.generation.rounds] == [r.accepted for r in one.rounds]


def test_a_head_that_read_nothing_for_long_catches_up(backbone) -> None:
    """Nothing is drafted until the text is longer than what is read together with others."""

    class Late:
        limit = 2

        def begin(self, count):
            self.rounds = getattr(self, "rounds", 0) + 1

        def peek(self, level, places):
            return places if level < 2 and self.rounds > CATCH_UP + 3 else []

        def draft(self, level, laws):
            self.tops = getattr(self, "tops", {}) | {(self.rounds, p, level): law.top for p, law in laws.items()}
            return list(laws)

        def observe(self, round):
            pass

    late, requests = Late(), [Request([5, 6, 7], 60), Request([9], 60)]
    texts = list(decode_batch(BatchEngine(backbone), [(r, Sampler()) for r in requests], late, 2))
    for text in texts:
        assert text.generation.tokens == autoregressive(backbone, requests[text.number], Sampler()).tokens
        first = next(r for r in text.generation.rounds if r.drafted)
        before = text.generation.tokens[: 1 + text.generation.rounds.index(first)]
        cache = backbone.new_cache(100)
        ids = requests[text.number].prompt + before
        with torch.inference_mode():
            backbone.shallow(ids, 0, cache)
            q_W = backbone.draft_logits([len(ids) - 1], cache)[0].softmax(-1)
        assert late.tops[CATCH_UP + 4, text.number, 0] == pytest.approx(float(q_W.max()))


# ---- errors of single texts


def test_what_a_text_raises_ends_that_text_alone(backbone) -> None:
    def fails_after(tokens: int, error: Exception):
        seen = []

        def call(*args):
            seen.append(args)
            if len(seen) > tokens:
                raise error
            return args[1] if len(args) == 2 else False

        return call

    ends = frozenset[int]()
    requests = [
        Request([1, 2], 20, ends),
        Request([1, 2, 3], 20, ends, fails_after(4, OSError("the client is gone"))),
        Request([4] * 240, 20, ends),
        Request([7], 20, ends),
        Request([8, 8], 20, ends),
    ]
    samplers = {3: Sampler(processors=fails_after(6, ZeroDivisionError("in a processor")))}
    for name in (None, "fixed:2", "thompson"):
        if name is not None:  # their callbacks anew
            requests[1].on_token = fails_after(4, OSError("the client is gone"))
            samplers[3].processors = fails_after(6, ZeroDivisionError("in a processor"))
        texts = decoded(BatchEngine(backbone), requests, name, 3, lambda i: samplers.get(i, Sampler()))
        assert [type(text.error) for text in texts] == [type(None), OSError, ValueError, ZeroDivisionError, type(None)]
        assert "260 positions are needed, the backbone's context is 256" in str(texts[2].error)
        alone = [
            autoregressive(backbone, Request(r.prompt, 20), Sampler()).tokens if i != 2 else []
            for i, r in enumerate(requests)
        ]
        assert texts[0].generation.tokens == alone[0] and texts[4].generation.tokens == alone[4]
        for i in (1, 3):  # what was committed before
            found = texts[i].generation.tokens
            assert 0 < len(found) < 20 and found == alone[i][: len(found)]


@pytest.mark.parametrize("name", ["fixed:2", "thompson", "goodput", "confidence:0.2"])
def test_the_only_text_that_could_draft_fails(backbone, name) -> None:
    """Its processors raise where the head is asked; the other text has room for no draft at all."""

    def fails(ids, logits):
        if ids.shape[1] > 4:
            raise ZeroDivisionError("in a processor")
        return logits

    samplers = [Sampler(), Sampler(processors=fails)]
    texts = decoded(BatchEngine(backbone), [Request([1, 2], 2), Request([1, 2, 3], 9)], name, 2, samplers.__getitem__)
    assert isinstance(texts[1].error, ZeroDivisionError)
    assert texts[0].error is None and len(texts[0].generation.tokens) == 2


def test_ids_beyond_the_vocabulary_end_their_text_alone(backbone) -> None:
    requests = [Request([1, 2], 5), Request([1, 99_999], 5), Request([3, -1], 5), Request([4], 5)]
    texts = decoded(BatchEngine(backbone), requests, "fixed:2", 2)
    assert [text.error is None for text in texts] == [True, False, False, True]
    assert "ids from 1 to 99999, the vocabulary ends at" in str(texts[1].error)


def test_prefills_that_fail_free_their_places(backbone, monkeypatch) -> None:
    engine = BatchEngine(backbone)
    with monkeypatch.context() as patch:
        patch.setattr(BatchEngine, "full", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(decode_batch(engine, [(Request([1], 5), Sampler()), (Request([2], 5), Sampler())], None, 2))
    assert engine.places.caches == []
    first = decode_batch(engine, [(Request([i], 5 + i), Sampler()) for i in range(3)], None, 3)
    next(first)
    with pytest.raises(ValueError, match="decoding other texts"):
        next(decode_batch(engine, [(Request([1], 5), Sampler())], None, 2))
    with pytest.raises(ValueError, match="places=0: at least 1"):
        next(decode_batch(engine, [], None, 0))


def test_a_controller_that_chooses_what_it_was_not_asked_about_is_refused(backbone) -> None:
    class Wrong:
        limit = 2

        def begin(self, count):
            pass

        def peek(self, level, places):
            assert level < 2
            return places

        def draft(self, level, laws):
            return [*laws, 7] if level else list(laws)

    with pytest.raises(ValueError, match="each at most once"):
        list(decode_batch(BatchEngine(backbone), [(Request([1], 9), Sampler())], Wrong(), 1))


@pytest.mark.parametrize("spare", [0, 2])
def test_more_candidates_than_there_are_slots_for_are_refused(backbone, spare) -> None:
    """They would be written into the next text's place."""
    rule = make_controller("tree:4x1")
    rule.spare = spare
    with pytest.raises(ValueError, match="as often as its `spare` allows"):
        list(decode_batch(BatchEngine(backbone), [(Request([1], 9), Sampler())] * 2, Each(rule, 2), 2))


def test_a_caller_that_wants_no_more_leaves_no_text_behind(backbone) -> None:
    engine = BatchEngine(backbone)
    texts = decode_batch(engine, [(Request([i + 1], 5 + i), Sampler()) for i in range(6)], None, 3)
    next(texts)
    texts.close()
    assert engine.places.caches == []
    again = decoded(engine, [Request([1], 5)], "fixed:2", 2)
    assert again[0].generation.tokens == autoregressive(backbone, Request([1], 5), Sampler()).tokens


def test_engines_that_know_of_one_text_only_are_refused(backbone, tmp_path) -> None:
    folder = tiny_backbone(tmp_path, "gemma3_text", **GENERIC["gemma3_text"])
    model = load(folder)
    with pytest.raises(ValueError, match="called in transformers: decode one text after the other"):
        BatchEngine(SplitBackbone(model, head_for(model, 2), check=False))
    recorded = SplitBackbone(
        load(tiny_backbone(tmp_path, "llama")).eval(), backbone_head(tmp_path), check=False, fixed_shapes=True
    )
    with pytest.raises(ValueError, match="cuda_graphs"):
        BatchEngine(recorded)


def backbone_head(tmp_path):
    return head_for(load(tmp_path / "tiny-llama"), 2)


# ---- devices


def test_rows_follow_the_layers_to_their_devices(tmp_path) -> None:
    """Layers on a second device: hidden states move there, keys and values live there, logits come from there."""
    model = load(tiny_backbone(tmp_path))
    head, whole = head_for(model, 1), BatchEngine(SplitBackbone(model, head_for(model, 1), products="plain"))
    mapped = load(tmp_path / "tiny-llama")
    for part in (*mapped.model.layers[2:], mapped.model.norm, mapped.lm_head):
        part.to("meta")
    engine = BatchEngine(SplitBackbone(mapped, head, check=False, products="plain"))
    ids, spans = [3, 9, 4], [Span(1, 0, 1), Span(0, 0, 2)]
    with torch.inference_mode():
        for one in (whole, engine):
            one.places.enter([[0] * 2, [0] * 20])  # in two stores
            one.reserve(2)
            one.shallow(ids, spans)
        for mine, other in zip(engine.places.caches, whole.places.caches, strict=True):
            assert torch.equal(mine.hidden_TD, other.hidden_TD), "what stays on the first device is computed as ever"
            assert [keys.device.type for keys in mine.keys] == ["cpu", "cpu", "meta", "meta"]
        logits_MV = engine.logits(engine.deep(spans))
        assert logits_MV.device.type == "meta" and len(logits_MV) == 3
        asked = [(place, Tree(id), [0]) for place, id in ((1, 3), (0, 9))]
        assert engine.draft_logits(asked).device.type == "meta"
        assert engine.full(ids, spans, store=True).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_cpu", [0, 2])
def test_several_texts_on_a_gpu(tmp_path, on_cpu: int) -> None:
    """All layers on it, or the last ones on the CPU as a device map may lay them."""
    model = load(tiny_backbone(tmp_path, sharpness=4.0)).double()
    requests = requests_of(5, count=9)
    expected = [
        t.generation.tokens for t in decoded(BatchEngine(SplitBackbone(model, head_for(model, 2))), requests, None, 4)
    ]
    mapped, head = load(tmp_path / "tiny-llama").double().to("cuda"), head_for(model, 2)
    if on_cpu:
        for part in (*mapped.model.layers[-on_cpu:], mapped.model.norm, mapped.lm_head):
            part.to("cpu")
    engine = BatchEngine(SplitBackbone(mapped, head, check=False))
    for name in (None, "fixed:2", "tree:2x1", "thompson"):
        assert [t.generation.tokens for t in decoded(engine, requests, name, 4)] == expected, name


# ---- places


def test_2000_texts_pass_through_16_places(backbone) -> None:
    """Random lengths, ends and cancellations: every text once, with its own tokens, and the store does not grow."""
    engine, dice, sizes, started = BatchEngine(backbone), random.Random(0), [], []
    prompts = [[dice.randrange(256), dice.randrange(256)] for _ in range(40)]
    known = {tuple(p): autoregressive(backbone, Request(p, 6), Sampler()).tokens for p in prompts}

    def jobs():
        for number in range(2000):
            started.append(number)
            sizes.append(engine.places.nbytes)
            cancel = dice.randint(1, 12)
            tokens = iter(range(1, 100))
            yield (
                Request(dice.choice(prompts), dice.randint(1, 6), on_token=lambda _, t=tokens, c=cancel: next(t) == c),
                Sampler(),
            )

    asked = []

    def noted():
        for request, sampler in jobs():
            asked.append(request)
            yield request, sampler

    seen = set()
    for text in decode_batch(engine, noted(), make_batch_controller("thompson"), 16):
        assert text.number not in seen and text.error is None
        seen.add(text.number)
        found = text.generation.tokens
        assert found == known[tuple(asked[text.number].prompt)][: len(found)]
        assert len(started) - len(seen) <= 16
    assert seen == set(range(2000))
    assert max(sizes[100:]) == max(sizes[:100]) and engine.places.nbytes == 0


def test_places_keep_what_is_in_them_when_they_grow_and_move(backbone, short_places) -> None:
    engine = BatchEngine(backbone)
    places = engine.places
    engine.enter([list(range(n)) for n in (3, 5, 7, 9)])
    before = {c: (c.keys[0].clone()[..., : c.length, :], c.hidden_TD[: c.length].clone()) for c in places.caches}
    first, second, third, fourth = places.caches

    def stores() -> dict[int, tuple[int, int]]:
        return {slots: (len(store.taken), store.places) for slots, store in places.stores.items()}

    def check(*texts) -> None:
        assert places.caches == list(texts)
        for c in texts:
            keys, hidden_TD = before[c]
            assert torch.equal(c.keys[0][..., : c.length, :], keys) and torch.equal(c.hidden_TD[: c.length], hidden_TD)

    assert stores() == {short_places: (4, 4)}
    engine.reserve(short_places - 6)  # two of them outgrow their places
    assert stores() == {short_places: (2, 2), 2 * short_places: (2, 2)}
    check(first, second, third, fourth)
    assert second.max_length == short_places and third.max_length == 2 * short_places
    engine.leave(0)
    check(fourth, second, third)
    engine.leave(0)
    check(third, second)
    assert stores() == {short_places: (1, 2), 2 * short_places: (1, 2)}, "others may come before the next round"
    engine.reserve(1)
    check(third, second)
    assert stores() == {short_places: (1, 1), 2 * short_places: (1, 1)}, "half of the places are no longer needed"
    engine.leave_all()
    assert stores() == {} and places.nbytes == 0


@pytest.mark.parametrize("leaving", [0, 2])
@torch.inference_mode()
def test_an_overflow_of_a_text_that_left_reaches_no_other(backbone, leaving: int) -> None:
    """Neither the last text, which moves to its place, nor the next one that enters there."""
    engine = BatchEngine(backbone)
    engine.enter([[*range(13)], [*range(12)], [7]])
    engine.reserve(2)
    cache = engine.places.caches[leaving]
    for part in (*cache.keys, *cache.values):
        part[..., : cache.length + 2, :] = torch.inf
    engine.leave(leaving)
    if leaving == 2:
        engine.enter([[9]])
    engine.reserve(1)
    spans = [Span(i, cache.length, 1) for i, cache in enumerate(engine.places.caches)]
    assert engine.full([3] * len(spans), spans).isfinite().all()


def test_memory_follows_the_tokens_that_there_are(short_places) -> None:
    """Texts of 1 to 4,000 tokens, most of them short: not all of them take what the longest takes."""
    places = Places(Layout([(2, torch.device("cpu"))], 1, 4, (8, torch.device("cpu"), torch.float32)))
    dice, slot = random.Random(0), 2 * 2 * 4 * 4 + 8 * 4
    for step in range(400):
        if places.texts and (step % 3 == 0 or len(places.texts) == 24):
            places.leave(dice.randrange(len(places.texts)))
        else:
            length = dice.choice([40] * 6 + [300] * 6 + [700] * 2 + [4000])
            places.enter([[0] * length])[0].cache.commit(length)
        places.reserve(1)
        for place in places.texts:  # every text writes and grows a little
            place.cache.commit(place.cache.length + 1)
        tokens = sum(max(cache.length, short_places) for cache in places.caches)
        assert places.nbytes <= 2 * 2 * tokens * slot
    assert 3 * places.nbytes < len(places.texts) * slots_for(4000) * slot


def test_texts_of_very_different_lengths_decode_as_alone(backbone) -> None:
    """In several stores at once, and from one to the next while they are decoded."""
    engine, dice = BatchEngine(backbone), random.Random(1)
    lengths = [14, 3, 60, 30, 120, 13, 9]
    requests = [Request([dice.randrange(256) for _ in range(n)], 16) for n in lengths]
    expected = [autoregressive(backbone, request, Sampler()).tokens for request in requests]
    for name in (None, "fixed:3", "thompson"):
        seen = set()
        controller = None if name is None else make_batch_controller(name)
        jobs = [(request, Sampler()) for request in requests]
        for text in decode_batch(engine, jobs, controller, 5, lambda _, s=seen: s.update(engine.places.stores)):
            assert text.generation.tokens == expected[text.number], name
        assert seen == {16, 32, 64, 128, 256}
