"""The gate refuses, the folder loads in plain transformers, and what it decodes is the model's own text."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_run, plant_heads
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextStreamer

import pipeline.inference
from pipeline import head_folder
from pipeline.errors import GateError
from pipeline.inference.controllers import Fixed
from pipeline.stages import evaluate, publish
from pipeline.stages.publish import gate

CODE = Path(pipeline.inference.__file__).parent
PROMPT = "prompt number 9"


class Counting(Fixed):
    """fixed:K that keeps how many drafts each round accepted."""

    def __init__(self, k: int):
        super().__init__(k)
        self.accepted: list[int] = []

    def observe(self, round) -> None:
        self.accepted.append(round.accepted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("publish"), "publish.min_speedup=0.01")
    plant_heads(run, 2)
    evaluate.run(run)
    publish.run(run)
    return run


@pytest.fixture(scope="module")
def served(run):
    """(model, tokenized prompt, hub folder) as a user has them."""
    folder = run.config.backbone.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer(PROMPT, return_tensors="pt"), str(run / "hub" / "2")


def test_folder_holds_the_code_byte_for_byte(run) -> None:
    hub = run / "hub" / "2"
    assert {p.name for p in hub.iterdir()} == {
        "README.md",
        "config.json",
        "custom_generate",
        "model.safetensors",
        "results.json",
    }
    names = {p.name for p in CODE.glob("*.py")}
    assert {p.name for p in (hub / "custom_generate").iterdir()} == names
    for name in names:
        assert (hub / "custom_generate" / name).read_bytes() == (CODE / name).read_bytes()
    assert json.loads((hub / "config.json").read_text())["controller"] in ("fixed:2", "thompson")


def test_card_says_what_and_how_much_and_leaks_nothing(run) -> None:
    card = (run / "hub" / "2" / "README.md").read_text()
    results = json.loads((run / "hub" / "2" / "results.json").read_text())
    assert f"**Speedup {results['best']['speedup']:.2f}**" in card and "Lossless: yes" in card
    assert "custom_generate=" in card.split("##")[0], "the use comes first"
    for text in (card, json.dumps(results), (run / "hub" / "2" / "config.json").read_text()):
        assert str(run.path.parent) not in text and "/tmp" not in text


def test_a_folder_works_wherever_it_is_moved_to(served, tmp_path, monkeypatch) -> None:
    """And two of them, of equal code, in one process: each takes its own weights."""
    model, inputs, hub = served
    other = tmp_path / "elsewhere"
    shutil.copytree(hub, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: torch.zeros_like(w) for name, w in weights.items()}, other / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    kwargs = {"max_new_tokens": 24, "do_sample": False, "trust_remote_code": True}
    rounds = []
    for folder in (hub, "elsewhere"):
        counting = Counting(2)
        model.generate(**inputs, **kwargs, custom_generate=folder, controller=counting)
        rounds.append(counting.accepted)
    assert rounds[0] != rounds[1], "the same head was used twice"


def test_origin_names_a_hub_id_and_its_tag(tmp_path) -> None:
    (tmp_path / "custom_generate").mkdir()
    written = tmp_path / "custom_generate" / "origin.py"
    head_folder.write_origin(tmp_path, None, None)
    assert written.read_bytes() == (CODE / "origin.py").read_bytes(), "as write_code leaves it"
    head_folder.write_origin(tmp_path, "org/head", "v1")
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


def test_batches_rows_one_by_one_with_left_padding(served, run) -> None:
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
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(one[0, inputs["input_ids"].shape[1] :]).rstrip("\n")


def test_clear_errors(served) -> None:
    model, inputs, hub = served
    ours = {"custom_generate": hub, "trust_remote_code": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="must be thompson, fixed:K"):
        model.generate(**inputs, **ours, controller="fast")
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(**inputs, **ours, num_beams=2)
    stranger = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="this exit head belongs to tiny"):
        stranger.generate(**inputs, **ours)


def test_the_gate_names_every_reason() -> None:
    good = {
        "dtype": "float32",
        "lossless": {
            "greedy": {"prompts": 4, "texts": 8, "identical": 8, "divergences": [], "passed": True},
            "sampling": None,
        },
        "best": {"exit_layer": 2, "controller": "beta", "speedup_ci95": [1.2, 1.4]},
    }
    assert gate(good, 1.0) == []
    slow = good | {"best": good["best"] | {"speedup_ci95": [0.99, 1.4]}}
    greedy = good["lossless"]["greedy"] | {"identical": 7, "passed": False}
    wrong = slow | {"lossless": {"greedy": greedy, "sampling": {"passed": False, "p_value": 1e-9}}}
    assert [r.split(":")[0] for r in gate(wrong, 1.0)] == ["lossless", "lossless", "speedup"]
    assert "begins at 0.990" in gate(slow, 1.0)[0]
    assert "nothing greedy" in gate(good | {"lossless": {"greedy": None, "sampling": None}}, 1.0)[0]


def test_a_refused_head_is_not_written_unless_forced(run, tmp_path) -> None:
    shutil.copytree(run.path, tmp_path / "runs" / "t")
    shutil.copytree(run.config.backbone.name_or_path, tmp_path / "tiny-llama")
    strict = make_run(tmp_path, "publish.min_speedup=50")
    strict.redo("publish")
    with pytest.raises(GateError, match=r"exit layer 2:\n  - speedup"):
        publish.run(strict)
    assert not (strict / "hub").exists()
    forced = make_run(tmp_path, "publish.min_speedup=50", "publish.force=true")
    publish.run(forced)
    assert "did not pass the gate and was published by force" in (forced / "hub" / "2" / "README.md").read_text()


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
