"""A published head is measured again as any other, in a run folder of its own; and what all the run folders give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from helpers import make_run, plant_heads, tiny_backbone
from loopback_hub import LoopbackHub
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.config import load, to_dict
from pipeline.evaluation import closing, overview
from pipeline.publishing import parity, pedigree
from pipeline.runs.files import atomic_write, sha256_of
from pipeline.runs.folder import RunDir
from pipeline.stages import evaluate, publish

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with config.yaml, the backbone, and a run `t` that is published in runs/t/hub/2.

    What is compared here is the same each time, because all its texts are greedy.
    """
    place = tmp_path_factory.mktemp("pull")
    run = make_run(place, "publish.min_speedup=0")
    plant_heads(run, 2)
    evaluate.run(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "subprocess", forked)
        publish.run(run)
    (place / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    return place


def measure(place: Path, head: Path, *words: str) -> int:
    return main(["evaluate", "--config", str(place / "config.yaml"), "--head", str(head), *words])


def sign(head: Path) -> None:
    """As if its weights had been saved so."""
    config = json.loads((head / "config.json").read_text())
    config["sha256"] = sha256_of(head / "model.safetensors")
    (head / "config.json").write_text(json.dumps(config))


def test_it_is_measured_as_it_was(place, capsys) -> None:
    """Greedy rounds of fixed:2 are a function of backbone, head and prompts: measured again they are the same."""
    head = place / "runs" / "t" / "hub" / "2"
    assert measure(place, head) == 0
    run = place / "runs" / "t--hub--2"
    assert (run / "report" / "index.html").exists() and not (run / "heads").exists()
    before, after = (json.loads((f / "eval" / "results.json").read_text()) for f in (place / "runs" / "t", run))
    assert after["published_head"] == "2" and after["backbone"] == before["backbone"]
    first, second = (r["heads"][0]["controllers"]["fixed:2"] for r in (before, after))
    for figure in ("acceptance_length", "conditional_rates", "drafted_histogram"):
        assert first[figure] == second[figure]
    assert before["heads"][0]["head_sha256"] == after["heads"][0]["head_sha256"]
    assert measure(place, head) == 0
    assert "evaluate: done already" in capsys.readouterr().out


def test_another_head_under_that_name_is_noticed(place, tmp_path, capsys) -> None:
    head = tmp_path / "head"
    shutil.copytree(place / "runs" / "t" / "hub" / "2", head)
    words = [f"run.dir={tmp_path / 'runs'}", "run.name=again"]
    assert measure(place, head, *words) == 0
    assert (tmp_path / "runs" / "again" / "eval").is_dir(), "a name given wins"
    weights = load_file(head / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, head / "model.safetensors")
    sign(head)
    assert measure(place, head, *words) == 2
    assert "head was" in capsys.readouterr().err


def test_weights_that_are_no_head_are_named(place, tmp_path, capsys) -> None:
    head = tmp_path / "head"
    shutil.copytree(place / "runs" / "t" / "hub" / "2", head)
    weights = load_file(head / "model.safetensors")
    file = head / "model.safetensors"
    words = [f"run.dir={tmp_path / 'runs'}", "run.name=tampered"]
    whole = file.read_bytes()
    damaged = {
        "changed or cut short": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "cannot be read": lambda: sign(head),
        "not those of a layer": lambda: (save_file({"q_proj.weight": next(iter(weights.values()))}, file), sign(head)),
        "No such file": file.unlink,
    }
    for message, damage in damaged.items():
        damage()
        assert measure(place, head, *words) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_the_wrong_backbone_is_named_before_it_is_loaded(place, tmp_path, capsys) -> None:
    other = tiny_backbone(tmp_path, seed=1)
    head = place / "runs" / "t" / "hub" / "2"
    words = [f"run.dir={tmp_path / 'runs'}", f"backbone.name_or_path={other}"]
    assert measure(place, head, *words) == 2
    err = capsys.readouterr().err
    assert f"backbone.name_or_path={other}: not the backbone of" in err and "belongs to tiny" in err
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_another_version_of_the_backbone_may_be_allowed(place, tmp_path, capsys) -> None:
    """As between a quantised checkpoint and the Hub's. The texts are those of the backbone given, and all say so."""
    other = tiny_backbone(tmp_path, sharpness=4.0, seed=1)
    head = place / "runs" / "t" / "hub" / "2"
    words = [f"run.dir={tmp_path / 'runs'}", "run.name=there", f"backbone.name_or_path={other}"]
    assert measure(place, head, *words) == 2
    assert "--allow-other-backbone" in capsys.readouterr().err
    assert measure(place, head, *words, "--allow-other-backbone") == 0
    said = "2 was trained for tiny (fingerprint"
    assert said in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "runs" / "there" / "eval" / "results.json").read_text())
    trained = json.loads((head / "config.json").read_text())["backbone"]
    assert results["trained_for"] == trained != results["backbone"] and results["backbone"]["name"] == other.name
    assert results["lossless"]["greedy"]["identical"] == results["lossless"]["greedy"]["texts"] > 0
    assert said in (tmp_path / "runs" / "there" / "report" / "report.md").read_text()


def test_a_backbone_of_another_size_is_never_allowed(place, tmp_path, capsys) -> None:
    other = tiny_backbone(tmp_path, num_hidden_layers=6)
    words = [f"run.dir={tmp_path / 'runs'}", f"backbone.name_or_path={other}", "--allow-other-backbone"]
    assert measure(place, place / "runs" / "t" / "hub" / "2", *words) == 2
    assert "a llama of 6 layers and that a llama of 4" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_the_head_brings_its_own_backbone(place, tmp_path, capsys, monkeypatch) -> None:
    """One that has a name on the Hub is loaded from there (here: looked for, offline); file and words win over it."""
    monkeypatch.chdir(tmp_path)
    head = tmp_path / "head"
    shutil.copytree(place / "runs" / "t" / "hub" / "2", head)
    config = json.loads((head / "config.json").read_text())
    config["backbone"] |= {"name": "org/backbone", "revision": "c0"}
    atomic_write(head / "config.json", json.dumps(config))
    assert main(["evaluate", "--head", str(head)]) == 2
    assert "backbone.name_or_path=org/backbone: cannot be loaded" in capsys.readouterr().err
    assert main(["evaluate", "--head", str(head), "backbone.name_or_path=elsewhere"]) == 2
    assert "backbone.name_or_path=elsewhere" in capsys.readouterr().err


def test_a_run_with_heads_of_its_own_is_left_alone(place, capsys) -> None:
    assert measure(place, place / "runs" / "t" / "hub" / "2", "run.name=t") == 2
    assert "has heads of its own; give another run.name, such as run.name=t--hub--2" in capsys.readouterr().err


def test_a_folder_without_a_head(place, tmp_path, capsys) -> None:
    assert measure(place, tmp_path) == 2
    assert "holds no exit head" in capsys.readouterr().err
    assert measure(place, "nowhere") == 2
    assert "evaluate.head=nowhere: neither a folder here nor org/name" in capsys.readouterr().err


# ---- used by those who may see it

PUSH = """
import sys
from pathlib import Path
from pipeline.publishing import hub
print(hub.push(Path(sys.argv[1]), "org/private", "t")["tag"])
"""
USE = """
import sys
from huggingface_hub import get_token, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
assert get_token() is None
backbone, token, cache = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(backbone)
inputs = AutoTokenizer.from_pretrained(backbone)("prompt number 9", return_tensors="pt")
greedy = {"max_new_tokens": 16, "do_sample": False}
plain = model.generate(**inputs, **greedy).tolist()
def same(head, **where):
    found = model.generate(**inputs, **greedy, custom_generate=head, trust_remote_code=True, **where)
    model._exit_heads.clear()  # to be loaded again
    return found.tolist() == plain
assert same("org/private", token=token, cache_dir=cache)
assert same("org/private", cache_dir=cache, local_files_only=True)
snapshot_download("org/private", local_dir="head", token=token)
assert same("head"), "without a token: the folder's own weights"
print("same")
"""


def test_a_private_head_takes_a_token_and_a_downloaded_one_none(place, tmp_path) -> None:
    def child(code: str, token: str | None, *words: object) -> str:
        environment = hub.environment(tmp_path / "home", token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    with LoopbackHub(tmp_path / "hub") as hub:
        tag = child(PUSH, "hf_of_ada", place / "runs" / "t" / "hub" / "2")
        assert hub.repo("org/private")["private"]
        assert child(USE, None, place / "tiny-llama", "hf_of_ada", tmp_path / "cache") == "same"
    assert tag in (tmp_path / "head" / "custom_generate" / "origin.py").read_text()
    assert list((tmp_path / "cache").rglob("model.safetensors"))
    assert not list((tmp_path / "home").rglob("*.safetensors")), "cache_dir= holds for the weights too"


# ---- what it learned from


def test_a_dataset_is_named_once_and_as_the_hub_names_it(tmp_path) -> None:
    names = ["org/data", "a.jsonl", "org/data#2", "pocket/distill.jsonl", "a.jsonl#2", "org/more"]
    run = RunDir(load(None, [f"run.dir={tmp_path}"]))
    manifest = {"prompts": {"sources": [{"name": name, "licence": "mit"} for name in names]}}
    atomic_write(run / "responses" / "manifest.json", json.dumps(manifest))
    assert pedigree.datasets(run) == ["org/data", "org/more"]


# ---- the overview


def test_heads_lists_what_each_run_gives(place, capsys) -> None:
    results = json.loads((place / "runs" / "t" / "eval" / "results.json").read_text())
    best = results["best"]
    (row,) = overview.rows(place / "runs" / "t")
    assert row == {
        "run": "t",
        "state": "published",
        "backbone": "tiny",
        "exit layer": "2",
        "controller": best["controller"],
        "speedup (95%)": f"{best['speedup']:.2f} (not judged)",
        "acceptance length": f"{best['acceptance_length']:.2f}",
        "lossless": "yes",
        "published": str(place / "runs" / "t" / "hub" / "2"),
    }
    assert main(["heads", "--config", str(place / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"{best['speedup']:.2f}" in out and "published" in out


def test_heads_lists_runs_that_are_half_done(tmp_path, capsys) -> None:
    run = make_run(tmp_path)
    (row,) = overview.rows(run.path)
    assert row["state"] == "nothing begun"
    with run.stage("generate", []):
        assert overview.rows(run.path)[0]["state"] == "generate begun"
    with run.stage("generate", []), run.stage("cache", []):
        pass
    assert overview.rows(run.path)[0]["state"] == "cached"
    plant_heads(run, 3, 2)
    with pytest.raises(ZeroDivisionError), run.stage("distill", []):
        raise ZeroDivisionError
    rows = overview.rows(run.path)
    assert [(r["state"], r["exit layer"], r["speedup (95%)"]) for r in rows] == [
        ("distill begun", "2", "-"), ("distill begun", "3", "-")
    ]  # fmt: skip
    assert rows[0]["backbone"] == "tiny-llama", "of a folder the last part"
    (run / "stages" / "distill.json").write_text("{")
    (row,) = overview.rows(run.path)
    assert row["state"].startswith("cannot be read")
    assert main(["heads", f"run.dir={tmp_path / 'runs'}"]) == 0 and "cannot be read" in capsys.readouterr().out


@pytest.fixture
def pushed_run(place, tmp_path) -> RunDir:
    """A copy of the run that says it was pushed twice, the second time as org/head@t-new."""
    shutil.copytree(place / "runs" / "t", tmp_path / "t")
    run = RunDir(load(place / "config.yaml", [f"run.dir={tmp_path}"]))
    for tag in ("t-old", "t-new"):
        with run.stage("push", [run / "hub" / "2"], {"repo_id": "org/head", "tag": tag}) as summary:
            summary["pushed"] = {"repo_id": "org/head", "tag": tag}
    return run


def test_heads_says_where_a_head_was_pushed_to(place, pushed_run) -> None:
    (row,) = overview.rows(pushed_run.path)
    assert row["published"] == "org/head@t-new"
    pushed_run.redo("publish")
    with pushed_run.stage("publish", []):
        shutil.copytree(place / "runs" / "t" / "hub" / "2", pushed_run / "hub" / "2")
    (row,) = overview.rows(pushed_run.path)
    assert row["published"] == str(pushed_run / "hub" / "2"), "made anew, and not pushed since"


def test_the_closing_table_names_what_was_published(pushed_run, capsys) -> None:
    """Not the best head, where another was asked for; its repo only if it is there."""
    closing.closing_table(pushed_run)
    assert 'custom_generate="org/head"' in capsys.readouterr().out
    with pushed_run.stage("publish", []) as summary:
        summary["folder"] = "hub/3"
    closing.closing_table(pushed_run)
    assert f'custom_generate="{pushed_run / "hub" / "3"}"' in capsys.readouterr().out
    closing.closing_table(pushed_run, published=False)  # as the gate refused it
    out = capsys.readouterr().out
    assert "thompson" in out and "published: nothing" in out and "custom_generate" not in out


def test_heads_of_an_empty_place(tmp_path, capsys) -> None:
    assert main(["heads", f"run.dir={tmp_path}"]) == 0
    assert "no run folders yet" in capsys.readouterr().out
    assert main(["heads", f"run.dir={tmp_path / 'nowhere'}"]) == 2
    assert "run.dir=" in capsys.readouterr().err
