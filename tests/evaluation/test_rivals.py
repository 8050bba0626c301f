"""What transformers offers, beside ours: the same ids, a table of its own, and a model left as it was found."""

import json

import pandas as pd
import pytest
import torch
from helpers import make_run, plant_heads, tiny_backbone
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from pipeline.backbones.load import load_model
from pipeline.cli import main
from pipeline.config import Backbone, Config
from pipeline.errors import UserError
from pipeline.evaluation.rivals import Rival, _options, decode, rivals_of
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.sampling import Sampler
from pipeline.publishing.draft_model import in_memory
from pipeline.stages import evaluate

PROMPT = [60, 61, 62, 60, 61, 62, 60]  # repeats itself, so that prompt lookup has something to find
NAMES = ["generate", "generate:static", "early_exit", "assistant_model:2", "prompt_lookup"]
ALL = 'evaluate.rivals=["generate","generate:static","early_exit","assistant_model:2","prompt_lookup"]'


def model_and_engine(folder):
    model = load_model(Backbone(name_or_path=str(folder), dtype="float32"), torch.device("cpu"))
    record = {
        "name": "tiny",
        "revision": None,
        "fingerprint": fingerprint(model),
        "model_type": model.config.model_type,
    }
    heads = [ExitHead(n, len(model.model.layers), record, new_exit_layer(model).state_dict()) for n in (1, 2, 3)]
    engine = SplitBackbone(model, heads[1])  # joins weights; what is shared with the drafts must not mind
    return model, engine, {head.exit_layer: in_memory(model, head) for head in heads}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_and_engine(tiny_backbone(tmp_path_factory.mktemp("rivals"), sharpness=4.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("rivals"), ALL, "evaluate.num_prompts=2", "evaluate.max_new_tokens=12",
                   "evaluate.repeats=2", "evaluate.controllers=[fixed:2]")  # fmt: skip
    plant_heads(run, 2, 3)
    evaluate.run(run)
    return run


def test_the_default_is_every_rival_and_those_that_exit_come_once_per_exit_layer() -> None:
    assert Config().evaluate.rivals == NAMES
    assert rivals_of(["early_exit", "generate", "assistant_model:3"], [1, 4]) == [
        Rival("early_exit", 1), Rival("early_exit", 4), Rival("generate"), Rival("assistant_model:3", 1),
        Rival("assistant_model:3", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_ids_are_those_of_the_autoregressive_loop(tmp_path, family) -> None:
    """On the very model whose joined weights the engine reads; to the full length and to an end token."""
    model, engine, drafts = model_and_engine(tiny_backbone(tmp_path, family, sharpness=4.0))
    whole = autoregressive(engine, Request(PROMPT, 40), Sampler()).tokens
    end = next(t for i, t in enumerate(whole) if i >= 8 and t not in whole[:i])
    for rival in rivals_of(NAMES, [1, 3]):
        assert decode(model, rival, PROMPT, 40, frozenset(), drafts)[0] == whole, rival
        assert decode(model, rival, PROMPT, 1, frozenset(), drafts)[0] == whole[:1], rival
        tokens, seconds = decode(model, rival, PROMPT, 40, frozenset({end, 257}), drafts)
        assert tokens == whole[: whole.index(end) + 1] and seconds > 0, rival


def test_settings_of_the_checkpoint_change_nothing(llama) -> None:
    model, engine, drafts = llama
    expected = autoregressive(engine, Request(PROMPT, 30), Sampler()).tokens
    own = model.generation_config
    own.repetition_penalty, own.num_assistant_tokens_schedule = 50.0, "heuristic"
    try:
        for rival in rivals_of(NAMES, [2]):
            assert decode(model, rival, PROMPT, 30, frozenset(), drafts)[0] == expected, rival
        assert model.generation_config is own and own.num_assistant_tokens is None
    finally:
        own.repetition_penalty = own.num_assistant_tokens_schedule = None


def test_the_model_is_as_before_when_drafting_is_interrupted(llama, monkeypatch) -> None:
    model, *_ = llama
    own, seen = model.generation_config, []

    def interrupted(self, *args, **kwargs):
        seen.append(model.config.num_hidden_layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(model, Rival("early_exit", 2), PROMPT, 8, frozenset())
    assert seen == [2], "transformers lowers it while it drafts; if no more, nothing needs to be restored"
    assert model.config.num_hidden_layers == 4 and model.generation_config is own


def test_the_static_cache_is_compiled_on_a_gpu_only() -> None:
    static = Rival("generate:static")
    assert _options(static, torch.device("cpu"), {}) == {"cache_implementation": "static", "disable_compile": True}
    assert _options(static, torch.device("cuda"), {}) == {"cache_implementation": "static", "disable_compile": False}


def test_the_table_has_a_row_for_every_rival_prompt_and_repeat(run) -> None:
    table = pd.read_parquet(run / "eval" / "rivals.parquet")
    assert list(table) == ["rival", "exit_layer", "prompt", "task", "repeat", "tokens", "seconds"]
    counts = table.groupby(["rival", "exit_layer"]).size().to_dict()
    exits = [("generate", 0), ("generate:static", 0), ("early_exit", 2), ("early_exit", 3), ("assistant_model:2", 2),
             ("assistant_model:2", 3), ("prompt_lookup", 0)]  # fmt: skip
    assert counts == dict.fromkeys(exits, 2 * 2)
    generations = pd.read_parquet(run / "eval" / "generations.parquet")
    assert len(generations) == 2 * 2 * (1 + 2), "2 prompts, 2 repeats; rivals are not among ours"
    greedy = generations[(generations.exit_layer == 0) & (generations.temperature == 0)]
    expected = {(r.prompt, r.repeat): (list(r.tokens), r.task) for r in greedy.itertuples()}
    assert all((list(r.tokens), r.task) == expected[r.prompt, r.repeat] for r in table.itertuples())


def test_results_and_report_show_them(run) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    found = [(r["rival"], r["exit_layer"], r["texts"], r["differ"]) for r in results["rivals"]]
    assert found == [("generate", None, 4, 0), ("generate:static", None, 4, 0), ("early_exit", 2, 4, 0),
                     ("early_exit", 3, 4, 0), ("assistant_model:2", 2, 4, 0), ("assistant_model:2", 3, 4, 0),
                     ("prompt_lookup", None, 4, 0)]  # fmt: skip
    text = (run / "report" / "report.md").read_text()
    section = text.partition("## Beside transformers\n")[2].partition("\n## ")[0]
    assert section.count("0 of 4 |") == 7 and "| early_exit | 3 |" in section and "prefill" in section


def test_none_without_greedy_texts_and_it_is_said(tmp_path, capsys) -> None:
    run = make_run(tmp_path, ALL, "evaluate.temperatures=[1.0]", "evaluate.num_prompts=2")
    plant_heads(run, 2)
    evaluate.run(run)
    said = "evaluate: rivals are greedy and evaluate.temperatures=[1.0] has no 0: none measured\n"
    assert capsys.readouterr().out.count(said) == 1
    assert json.loads((run / "eval" / "results.json").read_text())["rivals"] == []
    assert len(pd.read_parquet(run / "eval" / "rivals.parquet")) == 0
    assert "Beside transformers" not in (run / "report" / "report.md").read_text()


def test_a_wrong_name_is_refused_before_anything_is_made(tmp_path, capsys) -> None:
    run = make_run(tmp_path, "evaluate.rivals=[generate,vllm]")
    message = r"evaluate.rivals=\['generate', 'vllm'\]: 'vllm' is not one of generate, generate:static, early_exit, .*"
    with pytest.raises(UserError, match=message):
        evaluate.run(run)
    with pytest.raises(UserError, match=r"evaluate\.rivals=.*'assistant_model:0' is not one of .*; \[\] for none"):
        rivals_of(["assistant_model:0"], [1])
    assert main(["run", f"run.dir={tmp_path / 'runs'}", "run.name=wrong", "evaluate.rivals=[vllm]"]) == 2
    assert "'vllm' is not one of" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "wrong").exists()
