"""The folder of a published head: what is in it, that it loads in plain transformers, and that it leaks nothing.

What it decodes must be the model's own text. The gate is in test_gate.py, the draft model in test_draft_model.py.
"""

import copy
import getpass
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import forked
import pandas as pd
import pytest
import torch
import yaml
from helpers import make_run, tiny_backbone
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteriaList,
    TextStreamer,
)

import pipeline.inference
from pipeline.config import load
from pipeline.inference.canary import TOLERANCE, distance
from pipeline.inference.controllers import Fixed
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.publishing import card, head_folder, parity, pedigree, speculation_profile
from pipeline.publishing.modeling_exit_head import ExitHeadConfig, ExitHeadModel
from pipeline.runs.files import sha256_of
from pipeline.runs.folder import RunDir
from pipeline.stages import distill, evaluate, generate, publish

CODE = Path(pipeline.inference.__file__).parent
PROMPT = "prompt number 9"
SECRETS = {
    "host": "secret-host-7",
    "user": "secret-user-7",
    "token": "hf_secretsecretsecret",
    "server": "secret-node-7",
}


class Counting(Fixed):
    """fixed:K that keeps how many drafts each round accepted."""

    def __init__(self, k: int):
        super().__init__(k)
        self.accepted: list[int] = []

    def observe(self, round) -> None:
        self.accepted.append(round.accepted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Every stage, on a machine whose host, user and token have names that can be looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: SECRETS["host"])
        patch.setattr(getpass, "getuser", lambda: SECRETS["user"])
        patch.setenv("HF_TOKEN", SECRETS["token"])
        folder = tmp_path_factory.mktemp("publish")
        run = make_run(folder, "publish.min_speedup=0", f"machine.servers=[http://{SECRETS['server']}:8000/v1]",
                       "publish.licence=apache-2.0", "evaluate.temperatures=[0.0,1.0]")  # fmt: skip
        for run_stage in (generate.run, distill.run, evaluate.run, publish.run, publish.run_draft):
            run_stage(run)
    return run


@pytest.fixture(scope="module")
def served(run):
    """(model, tokenized prompt, hub folder) as a user has them."""
    folder = run.config.backbone.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer(PROMPT, return_tensors="pt"), str(run / "hub" / "2")


# ---- what is in it


def test_folder_holds_the_code_byte_for_byte(run) -> None:
    hub = run / "hub" / "2"
    assert {p.name for p in hub.iterdir()} == {
        "README.md", "acceptance-0.png", "acceptance-1.png", "config.json", "custom_generate", "generation_config.json",
        "model.safetensors", "modeling_exit_head.py", "provenance.json", "results.json", "speculation_profile.json",
        "trained_on.json", "training_config.yaml",
    }  # fmt: skip
    names = {p.name for p in CODE.glob("*.py")} | {"requirements.txt"}
    assert {p.name for p in (hub / "custom_generate").iterdir()} == {head_folder.PUBLISHED_AS.get(n, n) for n in names}
    for name in names:
        published = hub / "custom_generate" / head_folder.PUBLISHED_AS.get(name, name)
        assert published.read_bytes() == (CODE / name).read_bytes()
    assert json.loads((hub / "config.json").read_text())["controller"] in ("fixed:2", "thompson")
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in hub.rglob("*") if p.is_file()), "not for its owner alone"


def assert_nothing_of_this_machine(run) -> None:
    """No path, host, user, token or server in any file of hub/."""
    home = str(Path.home())
    words = [*SECRETS.values(), str(run.path), str(run.path.parent.parent), str(Path(head_folder.__file__).parent)]
    for file in (p for p in (run / "hub").rglob("*") if p.is_file()):
        content = file.read_bytes()
        found = [word for word in words if word.encode() in content]
        assert not found, f"{file.name} holds {found}"
        assert not re.search(rb"(?<![\w.])%s/" % re.escape(home.encode()), content), f"{file.name} holds {home}"


def test_nothing_of_this_machine_is_in_what_is_published(run) -> None:
    """Neither in the head's folder nor in the draft model's."""
    assert_nothing_of_this_machine(run)
    assert "secret-host-7" in (run / "run.json").read_text(), "the run folder itself knows: this test can fail"


def test_nor_in_what_is_published_by_force(run, tmp_path, monkeypatch, capfd) -> None:
    """A decoder whose error names the folder, which has the host's name in its own while it is tried."""
    code = tmp_path / "inference"
    shutil.copytree(CODE, code, ignore=shutil.ignore_patterns("__pycache__"))
    text = (code / "custom_generate.py").read_text()
    broken = text.replace(
        "    if source is None:\n", "    raise ValueError(f'{source} is broken')\n    if source is None:\n"
    )
    assert broken != text
    (code / "custom_generate.py").write_text(broken)
    monkeypatch.setattr(head_folder, "CODE", code)
    monkeypatch.setattr(socket, "gethostname", lambda: SECRETS["host"])
    monkeypatch.setattr(parity, "subprocess", forked)
    forced = copy_of(run, tmp_path, "publish.min_speedup=0", "publish.force=true")
    publish.run(forced)
    assert_nothing_of_this_machine(forced)
    line = "parity: the folder does not work in a fresh process: ValueError, return code 1"
    assert line in (forced / "hub" / "2" / "README.md").read_text()
    assert ".tmp-2@secret-host-7" in capfd.readouterr().err, "what was kept out of the folder is told to its maker"


def copy_of(run, folder: Path, *words: str) -> RunDir:
    """The run elsewhere, as it was before anything was published."""
    shutil.copytree(run.path, folder / "runs" / "t")
    shutil.copytree(run.config.backbone.name_or_path, folder / "tiny-llama")
    copy = make_run(folder, *words)
    for stage in ("publish", "draft"):
        copy.redo(stage)
    return copy


def test_the_record_has_the_sha256_of_the_folder(run) -> None:
    """Of a line a file, in order; what Python and a client leave there is no part of it."""
    records = {r["stage"]: r for r in json.loads((run / "run.json").read_text())}
    for stage, folder in (("publish", run / "hub" / "2"), ("draft", run / "hub" / "2-draft")):
        assert (run / records[stage]["folder"]) == folder
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not {"__pycache__", ".cache"} & {*p.parts})
        lines = [f"{p.relative_to(folder).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files]
        assert records[stage]["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_sha256_of_a_folder_is_that_of_what_is_published(tmp_path) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "a.py").write_text("1")
    (tmp_path / "custom_generate.txt").write_text("2")
    before = head_folder.digest_of(tmp_path)
    for junk in ("__pycache__/a.pyc", "custom_generate/__pycache__/a.pyc", ".cache/x/y", ".gitattributes"):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).write_text("junk")
    assert head_folder.digest_of(tmp_path) == before and len(before) == 64
    (tmp_path / "custom_generate" / "a.py").rename(tmp_path / "custom_generate" / "b.py")
    assert head_folder.digest_of(tmp_path) != before


def test_what_made_it_is_told(run) -> None:
    hub = run / "hub" / "2"
    config = yaml.safe_load((hub / "training_config.yaml").read_text())
    assert config["distill"]["max_steps"] == 4 and config["generate"]["num_prompts"] == 8
    assert config["backbone"]["name_or_path"] == "tiny-llama" and config["prompts"]["path"] == "prompts.jsonl"
    assert not {"machine", "run", "wandb", "publish"} & config.keys()
    load(hub / "training_config.yaml", [])  # as a config it is right
    told = json.loads((hub / "provenance.json").read_text())
    assert [r["stage"] for r in told["stages"]] == ["generate", "distill", "evaluate"]
    assert all(r["versions"]["torch"] and r["hardware"]["cpu"] for r in told["stages"])
    assert told["responses"]["prompts"]["name"] == "prompts.jsonl"


def test_the_profile_is_what_the_rounds_were(run) -> None:
    profile = json.loads((run / "hub" / "2" / "speculation_profile.json").read_text())
    figures = next(h for h in json.loads((run / "hub" / "2" / "results.json").read_text())["heads"]
                   if h["temperature"] == 0)["controllers"]["fixed:2"]  # fmt: skip
    assert (profile["schema_version"], profile["num_speculative_tokens"], profile["method"]) == ("1.0", 2, "exit_head")
    assert profile["conditional_accept_rates"] == pytest.approx(figures["conditional_rates"], abs=1e-6)
    assert profile["marginal_accept_rates"] == pytest.approx(figures["marginal_rates"], abs=1e-6)
    assert profile["mean_accept_length"] == pytest.approx(figures["acceptance_length"], abs=1e-6)
    assert profile["accept_length_model"] == "measured_per_k", "as NVIDIA's builder says of a method it does not know"
    assert profile["mean_accept_length"] == pytest.approx(1 + sum(profile["marginal_accept_rates"]), abs=1e-5)
    histogram = {int(x): n for x, n in profile["acceptance_length_histogram"].items()}
    assert sum(histogram.values()) == figures["rounds"]
    assert sum(x * n for x, n in histogram.items()) / figures["rounds"] == pytest.approx(figures["acceptance_length"])
    for task, c in profile["per_category"].items():
        assert c["mean_accept_length"] == pytest.approx(figures["tasks"][task]["acceptance_length"], abs=1e-6)
    draft_profile = json.loads((run / "hub" / "2-draft" / "speculation_profile.json").read_text())
    others = {key for key in profile if profile[key] != draft_profile[key]}
    assert others == {"method", "draft_checkpoint", "accept_length_model"}
    assert draft_profile["accept_length_model"] == "chain_analytic"


def test_the_card_says_what_and_how_much(run) -> None:
    text = (run / "hub" / "2" / "README.md").read_text()
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    best = results["best"]
    assert f"**Speedup {best['speedup']:.2f}**" in text and "Lossless: yes" in text
    assert "custom_generate=" in text.split("##")[0], "the use comes first"
    assert results["backbone"]["fingerprint"] in text and "6 of 6 greedy texts are those that were evaluated" in text
    low, high = best["acceptance_length_ci95"]
    assert f"{best['acceptance_length']:.2f} ({low:.2f}-{high:.2f})" in text
    assert (
        "| t0 | 2 |" in text
        and "in 4 steps of 2 sequences of 64 tokens" in text
        and "prompts.jsonl: not recorded" in text
    )
    for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (run / "hub" / "2" / file).read_bytes().startswith(b"\x89PNG")


def test_the_card_says_up_to_how_many_texts_at_once_it_pays(run) -> None:
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    assert "Several texts at once" not in "\n".join(card.render(run, results)), "it was not measured"
    at = [{"batch_size": b, "speedup": s, "low": s - 0.1, "high": s + 0.1} for b, s in ((1, 1.5), (4, 1.2), (16, 0.9))]
    results["batches"] = [
        {"exit_layer": 2, "temperature": 0, "controllers": {"thompson": {"sizes": at, "pays_up_to": 4}}}
    ]
    assert (
        "Several texts at once, `thompson` at temperature 0: drafting pays up to 4 texts (speedup 1.20, 95 % interval "
        "1.10-1.30), and not surely at 16 texts (speedup 0.90, 95 % interval 0.80-1.00)."
    ) in card.render(run, results)


def test_the_card_names_no_file_that_is_not_there(run) -> None:
    """Without any fixed:K there is no profile."""
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    assert "speculation_profile.json" in "\n".join(card.render(run, results))
    for entry in results["heads"]:
        del entry["controllers"]["fixed:2"]
    rounds = pd.read_parquet(run / "eval" / "rounds.parquet").query("controller != 'fixed:2'")
    assert speculation_profile.build(results, rounds, "exit_head", "x") is None
    assert "speculation_profile.json" not in "\n".join(card.render(run, results))


def test_the_card_says_how_vllm_drafts_with_it_where_it_can(run) -> None:
    """A published config.json has all that the plugin reads; the best fixed K is that of the evaluation."""
    config = json.loads((run / "hub" / "2" / "config.json").read_text())
    assert config["backbone_config"]["num_hidden_layers"] == 1 and config["backbone"]["fingerprint"]
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    config = '{"method": "draft_model", "model": "<this folder>", "num_speculative_tokens": 2}'
    assert f"--speculative-config '{config}'" in "\n".join(card.render(run, results))
    other = copy.deepcopy(results)
    other["backbone"]["model_type"] = "gemma3_text"
    assert "vllm" not in "\n".join(card.render(run, other))


def test_the_hub_reads_the_card(run, tmp_path) -> None:
    """Front matter as huggingface_hub checks it without a network; a backbone with a Hub id is the base model."""
    data = ModelCard.load(run / "hub" / "2" / "README.md").data
    assert data.license == "apache-2.0" and data.library_name == "transformers" and "custom_generate" in data.tags
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    named = RunDir(load(None, [f"run.dir={tmp_path}", "run.name=n", "backbone.name_or_path=org/some-model",
                               "publish.repo_id=me/head", "publish.licence=mit"]))  # fmt: skip
    text = "\n".join(card.render(named, results))
    front = ModelCard(text).data.to_dict()
    assert (front["base_model"], front["base_model_relation"]) == ("org/some-model", "adapter")
    assert 'custom_generate="me/head"' in text


def test_the_licence_is_that_of_the_backbones_card(tmp_path) -> None:
    config = load(None, [f"run.dir={tmp_path}", "backbone.name_or_path=pocket"])
    assert pedigree.licence(config) == {
        "license": "other", "license_name": "psf-2.0", "license_link": "https://docs.python.org/3/license.html"
    }  # fmt: skip
    (tmp_path / "bare").mkdir()
    config.backbone.name_or_path = str(tmp_path / "bare")
    assert pedigree.licence(config) == {}
    (tmp_path / "bare" / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert pedigree.licence(config) == {}


def test_automodel_loads_the_layer_and_no_code_is_needed_for_the_weights(run, served) -> None:
    model, _, hub = served
    loaded = AutoModel.from_pretrained(hub, trust_remote_code=True)
    head = ExitHead.load(Path(hub))
    plain = load_file(Path(hub) / "model.safetensors")
    assert plain.keys() == head.weights.keys() and "self_attn.q_proj.weight" in plain
    layer = new_exit_layer(model)
    layer.load_state_dict(plain)
    hidden_BTD = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None]
    expected = layer(hidden_BTD, attention_mask=None, position_ids=positions,
                     position_embeddings=model.model.rotary_emb(hidden_BTD, positions))  # fmt: skip
    assert torch.equal(loaded(hidden_BTD), expected)
    assert (loaded.config.exit_layer, loaded.config.num_layers) == (2, 4)
    assert GenerationConfig.from_pretrained(hub).eos_token_id == 256


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True,
                   "sliding_window": 8}),
    ],
)  # fmt: skip
def test_as_a_model_it_attends_as_the_layer_in_the_backbone(tmp_path, family, fields, attention) -> None:
    """To the last bit: no position sees a later one, nor one beyond the window."""
    folder = tiny_backbone(tmp_path, family, **fields)
    model = AutoModel.from_pretrained(folder, attn_implementation=attention)
    seen: dict = {}
    model.layers[-1].register_forward_hook(lambda _, args, out: seen.update(before=args[0], after=out))
    model(torch.arange(30)[None])
    config = ExitHeadConfig(exit_layer=2, num_layers=4, backbone_config=head_folder.one_layer(model.config))
    head = ExitHeadModel._from_config(config, attn_implementation=attention).eval()
    head.layer.load_state_dict(model.layers[-1].state_dict())
    assert head.layer.self_attn.config._attn_implementation == attention
    assert torch.equal(head(seen["before"]), seen["after"])


# ---- it decodes


def test_a_folder_works_wherever_it_is_moved_to(served, tmp_path, monkeypatch) -> None:
    """And two of them, of equal code, in one process: each takes its own weights."""
    model, inputs, hub = served
    other = tmp_path / "elsewhere"
    shutil.copytree(hub, other)
    replace_weights(other, lambda w: torch.zeros_like(w))
    monkeypatch.chdir(tmp_path)
    kwargs = {"max_new_tokens": 24, "do_sample": False, "trust_remote_code": True}
    rounds = []
    for folder in (hub, "elsewhere"):
        counting = Counting(2)
        model.generate(**inputs, **kwargs, custom_generate=folder, controller=counting)
        rounds.append(counting.accepted)
    assert rounds[0] != rounds[1], "the same head was used twice"


def replace_weights(folder: Path, change) -> None:
    """Other weights, of which config.json knows."""
    file = folder / "model.safetensors"
    save_file({name: change(w) for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"sha256": sha256_of(file)}
    (folder / "config.json").write_text(json.dumps(config))


def test_origin_names_a_hub_id_and_its_tag(tmp_path) -> None:
    (tmp_path / "custom_generate").mkdir()
    written = tmp_path / "custom_generate" / "origin.py"
    head_folder.write_origin(tmp_path, "org/head", "v1")
    assert written.read_text().startswith((CODE / "origin.py").read_text().partition("HEAD")[0])
    names: dict = {}
    exec(written.read_text(), names)
    assert (names["HEAD"], names["REVISION"]) == ("org/head", "v1")


def test_greedy_through_transformers_is_plain_greedy(served) -> None:
    model, inputs, hub = served
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    for controller in (None, "none", "fixed:3", "beta", "thompson"):
        ours = {"controller": controller, "cuda_graphs": controller == "fixed:3"}
        drafted = model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            custom_generate=hub,
            trust_remote_code=True,
            **ours,
        )
        assert torch.equal(drafted, plain)


def test_generation_arguments_work_as_ever(served) -> None:
    model, inputs, hub = served
    ours = {"custom_generate": hub, "trust_remote_code": True}
    for extra in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}, {"max_length": 40}):
        kwargs = {"do_sample": False, "max_new_tokens": 20} | extra
        kwargs = {k: v for k, v in kwargs.items() if not (k == "max_new_tokens" and "max_length" in extra)}
        assert torch.equal(model.generate(**inputs, **kwargs, **ours), model.generate(**inputs, **kwargs)), extra
    text = AutoTokenizer.from_pretrained(model.name_or_path)
    stop = {"stop_strings": [text.decode(model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, -1])]}
    stop |= {"tokenizer": text, "do_sample": False, "max_new_tokens": 20}
    assert torch.equal(model.generate(**inputs, **stop, **ours), model.generate(**inputs, **stop))
    criteria = StoppingCriteriaList()
    criteria.append(lambda ids, scores: torch.full((ids.shape[0],), ids.shape[1] >= inputs["input_ids"].shape[1] + 5))
    stopped = model.generate(**inputs, do_sample=False, max_new_tokens=20, stopping_criteria=criteria, **ours)
    assert stopped.shape[1] == inputs["input_ids"].shape[1] + 5


def test_rows_of_a_left_padded_batch_are_those_of_generate(served, run) -> None:
    model, _, hub = served
    tokenizer = AutoTokenizer.from_pretrained(run.config.backbone.name_or_path, padding_side="left")
    batch = tokenizer([PROMPT, "a", "prompt"], return_tensors="pt", padding=True)
    kwargs = {"do_sample": False, "max_new_tokens": 12}
    drafted = model.generate(**batch, **kwargs, custom_generate=hub, trust_remote_code=True)
    assert torch.equal(drafted, model.generate(**batch, **kwargs))


def test_sampling_is_seeded_and_streaming_streams(served, run, capsys) -> None:
    model, inputs, hub = served
    kwargs = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 12}
    # fixed: thompson looks at the clock, so a seed gives another text of the same distribution each time
    kwargs |= {"custom_generate": hub, "trust_remote_code": True, "controller": "fixed:2"}
    torch.manual_seed(3)
    one = model.generate(**inputs, **kwargs)
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(run.config.backbone.name_or_path)
    two = model.generate(**inputs, **kwargs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert torch.equal(one, two)
    torch.manual_seed(3)
    block = model.generate(**inputs, **kwargs, block_verification=True)
    assert block.shape == one.shape and not torch.equal(block, one), "it takes one random number a round, not K"
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(one[0, inputs["input_ids"].shape[1] :]).rstrip("\n")


def test_clear_errors(served) -> None:
    model, inputs, hub = served
    ours = {"custom_generate": hub, "trust_remote_code": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="must be thompson, fixed:K"):
        model.generate(**inputs, **ours, controller="fast")
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(**inputs, **ours, num_beams=2)
    with pytest.raises(ValueError, match="no exit head: give exit_head="):
        model.load_custom_generate(hub, trust_remote_code=True)(model=model, **inputs, max_new_tokens=4)
    stranger = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="this exit head belongs to tiny"):
        stranger.generate(**inputs, **ours)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with pytest.warns(UserWarning, match="not quite the tiny-llama that the exit head was trained for"):
        drafted = stranger.generate(**inputs, **ours | greedy, allow_other_backbone=True)
    assert torch.equal(drafted, stranger.generate(**inputs, **greedy)), "the stranger's own text"
    deeper = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    deeper.config.num_hidden_layers += 2
    with pytest.raises(ValueError, match="this is a llama of 6 layers, the head was trained for a llama of 4"):
        deeper.generate(**inputs, **ours | greedy, allow_other_backbone=True)


def test_a_backbone_fine_tuned_since_is_told_once(served, run) -> None:
    """In a layer that the fingerprint does not sample: the text is its own, and there is one warning."""
    model, inputs, hub = served
    canary = json.loads((run / "hub" / "2" / "config.json").read_text())["canary"]
    assert distance(model, canary) < 1e-4 < TOLERANCE
    assert distance(AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.bfloat16), canary) < TOLERANCE
    tuned = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        weight = tuned.model.layers[1].mlp.down_proj.weight
        weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    kwargs = {"max_new_tokens": 16, "do_sample": False}
    plain = tuned.generate(**inputs, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            drafted = tuned.generate(**inputs, **kwargs, custom_generate=hub, trust_remote_code=True)
            assert torch.equal(drafted, plain)
        model.generate(**inputs, **kwargs, custom_generate=hub, trust_remote_code=True)
    told = [str(w.message) for w in caught if w.category.__name__ == "AnotherBackbone"]
    assert len(told) == 1 and "log-probabilities differ by" in told[0]


def test_changed_weights_are_refused(served, tmp_path) -> None:
    model, inputs, hub = served
    shutil.copytree(hub, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="changed or cut short since it was saved"):
        model.generate(**inputs, max_new_tokens=4, custom_generate=str(tmp_path / "cut"), trust_remote_code=True)


FRESH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
backbone, hub = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(backbone)
inputs = AutoTokenizer.from_pretrained(backbone)("prompt number 9", return_tensors="pt")
plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
drafted = model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=hub, trust_remote_code=True)
assert drafted.tolist() == plain.tolist()
assert not [m for m in sys.modules if m.split(".")[0] in ("pipeline", "omegaconf", "lightning", "wandb", "pandas")]
print("same")
"""


def test_works_in_a_fresh_process_without_this_package(run, tmp_path) -> None:
    """From another folder, where `import pipeline` is not even tried: only the published files are used."""
    arguments = [str(Path(run.config.backbone.name_or_path).resolve()), str((run / "hub" / "2").resolve())]
    out = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert out.stdout.strip() == "same", out.stderr[-2000:]


def test_thompson_begins_with_what_the_evaluation_learned(served, run) -> None:
    model, inputs, hub = served
    states = json.loads((run / "hub" / "2" / "config.json").read_text())["states"]
    assert states["greedy"]["greedy"] and not states["sampled"]["greedy"]
    fresh = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    for sampled in (False, True):
        fresh.generate(
            **inputs, max_new_tokens=8, do_sample=sampled, custom_generate=hub, trust_remote_code=True,
            controller="thompson",
        )  # fmt: skip
    ((_, _, controllers),) = fresh._exit_heads.values()
    for greedy, name in ((True, "greedy"), (False, "sampled")):
        assert controllers["thompson", greedy].rounds > states[name]["rounds"] > 0
