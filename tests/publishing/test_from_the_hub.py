"""A small demo's head to the Hub and back, by the command line: pushed, used with only torch there, measured again."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from loopback_hub import ACCOUNTS, Fault, LoopbackHub
from packaging.requirements import Requirement

from pipeline.pocket.paths import BACKBONE
from pipeline.runs.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/pocket-head"
TO_HUB = ["publish.target=hub", f"publish.repo_id={REPO}", "publish.force=true"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(pocket_run, tmp_path_factory) -> Path:
    """The small demo's folder, as a copy: its config names another run.dir, which words will set right."""
    return Path(shutil.copytree(pocket_run, tmp_path_factory.mktemp("copy") / "pocket"))


def cli(hub: LoopbackHub, run: Path, *words: str, token: str | None = "hf_of_ada", code: int = 0) -> str:
    """Run the command line; everything it printed. A user of a name that can be found again where it leaks."""
    done = subprocess.run(
        command(run, *words), env=environment(hub, run, token), capture_output=True, text=True, timeout=500
    )
    said = done.stdout + done.stderr
    assert done.returncode == code and "Traceback" not in said, said[-3000:]
    return said


def command(run: Path, verb: str, *words: str) -> list[str]:
    file = run / "config.yaml"
    return [sys.executable, "-m", "pipeline", verb, "--config", str(file), f"run.dir={run.parent}", *words]


def environment(hub: LoopbackHub, run: Path, token: str | None = "hf_of_ada") -> dict[str, str]:
    return hub.environment(run.parent / "home", token) | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOGNAME": "ada-of-this-machine"
    }  # fmt: skip


@pytest.fixture(scope="module")
def pushed(hub, run) -> dict:
    """The record of the push: repo_id, tag, commit. `said` is what was printed."""
    said = cli(hub, run, "publish", "--redo", "publish", *TO_HUB)
    record = json.loads((run / "run.json").read_text())[-1]
    return record["pushed"] | {"said": said}


def test_publish_pushes_once(hub, run, pushed) -> None:
    assert f"push: pushed as {REPO}@{pushed['tag']}" in pushed["said"] and hub.repo(REPO)["private"]
    before = len(hub.requests)
    assert "push: done already" in cli(hub, run, "publish", *TO_HUB)
    assert len(hub.requests) == before, "what the run knows itself is not asked"
    said = cli(hub, run, "publish", *TO_HUB, "--redo", "publish")
    assert f"nothing changed, nothing pushed: it is there as {REPO}@{pushed['tag']}" in said
    assert len(hub.history(REPO)) == 2
    assert f"{REPO}@{pushed['tag']}" in cli(hub, run, "heads")


def test_nothing_leaks(hub, run, pushed) -> None:
    """No token anywhere; no path, machine or user in what others can read."""
    for token in ACCOUNTS:
        assert token not in pushed["said"]
        for file in (p for p in [*run.rglob("*"), *hub.folder.rglob("*")] if p.is_file()):
            assert token.encode() not in file.read_bytes(), file
    secrets = [str(run.parent), "/tmp/", str(ROOT), "ada-of-this-machine", getpass.getuser() + "@"]
    for path, content in hub.files(REPO, pushed["tag"]).items():
        for secret in secrets:
            assert secret.encode() not in content, (path, secret)
        if not path.endswith((".safetensors", ".png")):
            assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content.decode()), path
    for file in (hub.folder / "commits").iterdir():
        assert not any(secret in file.read_text() for secret in secrets)


def test_a_refused_push_keeps_the_folder_and_goes_on(hub, run, pushed, tmp_path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "pocket"))
    elsewhere = [*TO_HUB, "publish.repo_id=org/later"]
    assert "HF_TOKEN" in cli(hub, other, "publish", *elsewhere, "--redo", "publish", token=None, code=2)
    assert (other / "hub").exists(), "without a token nothing was touched"
    assert "does not know the token" in cli(
        hub, other, "publish", *elsewhere, "--redo", "publish", token="hf_x", code=2
    )
    made = {p: p.stat().st_mtime_ns for p in (other / "hub").rglob("*")}
    assert made and hub.repo("org/later") is None
    said = cli(hub, other, "publish", *elsewhere)
    assert "publish: done already" in said and "push: pushed as org/later@" in said
    assert {p: p.stat().st_mtime_ns for p in (other / "hub").rglob("*")} == made


def test_a_push_killed_in_the_middle_goes_on(run, pushed, tmp_path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "pocket"))
    with LoopbackHub(tmp_path / "hub", faults=[Fault("PUT /large/", "during", times=9)]) as hub:
        process = subprocess.Popen(
            command(other, "publish", *TO_HUB), env=environment(hub, other), start_new_session=True
        )  # fmt: skip
        deadline = time.time() + 200
        while not any(r.startswith("PUT /large/") for r in hub.requests) and time.time() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
        hub.faults.clear()
        assert len(hub.history(REPO)) == 1 and hub.repo(REPO)["tags"] == {}
        cli(hub, other, "publish", *TO_HUB)
        assert len(hub.history(REPO)) == 2 and hub.repo(REPO)["tags"].keys() == {pushed["tag"]}


# ---- where there is nothing but torch and transformers

FRESH = """
import importlib.util, sys
for name in ("pipeline", "lightning", "datasets", "wandb", "accelerate", "omegaconf", "pandas", "matplotlib", "pytest"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
backbone, *heads = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(backbone)
inputs = AutoTokenizer.from_pretrained(backbone)("def add(a, b):\\n", return_tensors="pt", return_token_type_ids=False)
greedy = {"max_new_tokens": 48, "do_sample": False}
plain = model.generate(**inputs, **greedy)
for head in heads:
    for controller in (None, "none", "fixed:3"):
        ours = {"custom_generate": head, "trust_remote_code": True, "controller": controller}
        assert model.generate(**inputs, **greedy, **ours).tolist() == plain.tolist(), (head, controller)
    print("same", head)
"""

PROMPTS = ["def add(a, b):\n", "class Stack:\n", "import os\n", "for i in range(10):\n", "def read(path):\n"]

# Every way writes the same tokens, in turns; what their seconds are is printed and not asserted.
IN_TURNS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
backbone, head, draft, prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(backbone)
model, draft = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (backbone, draft))
ours = {"custom_generate": head, "trust_remote_code": True}
ways = {"generate": {}, "assistant_model": {"assistant_model": draft}, "controller none": ours | {"controller": "none"},
        "head": ours}
seconds, tokens = dict.fromkeys(ways, 0.0), 0
for turn in range(3):
    for prompt in json.loads(prompts):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        texts = {}
        for name, way in ways.items():
            start = time.perf_counter()
            texts[name] = model.generate(**inputs, max_new_tokens=64, do_sample=False, **way).tolist()
            seconds[name] += (time.perf_counter() - start) * (turn > 0)  # the first loads and warms up
        assert all(text == texts["generate"] for text in texts.values()), (prompt, texts)
        tokens += (len(texts["generate"][0]) - inputs["input_ids"].shape[1]) * (turn > 0)
for name, s in seconds.items():
    print(f"{name}: {tokens / s:.0f} tokens/s, {seconds['generate'] / s:.2f} of generate")
"""

# What can be imported there, by the names of the distributions.
INSTALLED = """
import json
from importlib.metadata import distributions, packages_distributions
print(json.dumps([sorted({d.name for d in distributions()}), sorted(packages_distributions())]))
"""


def required(*names: str) -> dict[str, Distribution]:
    """These distributions and all that they require here, by name."""
    found: dict[str, Distribution] = {}
    missing = list(names)
    while missing:
        name = re.sub("[-_.]+", "-", missing.pop()).lower()
        if name not in found:
            found[name] = distribution(name)
            requirements = map(Requirement, found[name].requires or [])
            missing += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> Path:
    """Of a virtual environment that holds torch, transformers, what they require, and nothing else.

    Their installed files are linked into it: as after `pip install torch transformers`, but in a second, off the net.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for each in required("torch", "transformers").values():
        for top in {Path(file).parts[0] for file in each.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(each.locate_file(top))
    return folder / "bin" / "python"


def test_the_fresh_environment_has_nothing_else(fresh_python, tmp_path) -> None:
    done = subprocess.run([str(fresh_python), "-c", INSTALLED], cwd=tmp_path, env={}, capture_output=True, text=True)
    names, modules = json.loads(done.stdout)
    assert {re.sub("[-_.]+", "-", name).lower() for name in names} == required("torch", "transformers").keys()
    assert {"torch", "transformers"} <= set(modules)
    assert not {"pipeline", "lightning", "wandb", "datasets", "accelerate", "omegaconf", "pytest"} & set(modules)


def test_a_fresh_environment_uses_the_head_from_the_hub_and_from_a_folder(
    hub, run, pushed, fresh_python, tmp_path
) -> None:
    folder = Path(shutil.copytree(run / "hub" / "2", tmp_path / "a folder"))
    clean = {k: v for k, v in hub.environment(tmp_path / "home").items() if k != "PYTHONPATH"}
    words = [str(fresh_python), "-c", FRESH, str(BACKBONE), REPO, str(folder)]
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500)
    assert done.stdout.splitlines() == [f"same {REPO}", f"same {folder}"], done.stderr[-3000:]
    downloaded = next((tmp_path / "home").rglob("origin.py")).read_text()
    assert f'"{REPO}"' in downloaded and f'"{pushed["tag"]}"' in downloaded


def test_head_and_draft_model_from_the_hub_write_the_text_of_generate(hub, run, pushed, fresh_python, tmp_path) -> None:
    """In turns with `generate` and the decoder without drafts. pytest -rP shows how fast each of them was."""
    said = cli(hub, run, "publish", "--as", "draft", *TO_HUB)
    assert f"push: pushed as {REPO}-draft@" in said and hub.repo(f"{REPO}-draft")["private"]
    clean = {k: v for k, v in hub.environment(tmp_path / "home").items() if k != "PYTHONPATH"}
    words = [str(fresh_python), "-c", IN_TURNS, str(BACKBONE), REPO, f"{REPO}-draft", json.dumps(PROMPTS)]
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr[-3000:]
    assert list((tmp_path / "home").glob("hub/models--*-draft/snapshots/*/model.safetensors")), "it came from the Hub"
    print(done.stdout)


def test_a_private_head_is_for_those_who_may_see_it(hub, run, pushed, fresh_python, tmp_path) -> None:
    clean = {k: v for k, v in hub.environment(tmp_path / "home", None).items() if k != "PYTHONPATH"}
    words = [str(fresh_python), "-c", FRESH, str(BACKBONE), REPO]
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0 and "same" not in done.stdout and REPO in done.stderr


# ---- and measured again


def test_the_pushed_head_is_measured_again_as_it_was(hub, run, pushed, tmp_path) -> None:
    head = f"{REPO}@{pushed['tag']}"
    words = ["--head", head, f"run.dir={tmp_path}", "evaluate.temperatures=[0.0]"]
    cli(hub, run, "evaluate", *words)
    again = json.loads((tmp_path / f"{REPO.replace('/', '--')}--{pushed['tag']}" / "eval" / "results.json").read_text())
    before = json.loads((run / "eval" / "results.json").read_text())
    assert again["published_head"] == f"{REPO}@{pushed['commit']}"
    (entry,) = again["heads"]
    (same,) = (h for h in before["heads"] if (h["exit_layer"], h["temperature"]) == (entry["exit_layer"], 0.0))
    assert entry["head_sha256"] == same["head_sha256"] == sha256_of(run / "hub" / "2" / "model.safetensors")
    figures, expected = (h["controllers"]["fixed:2"] for h in (entry, same))
    assert figures["acceptance_length"] == expected["acceptance_length"]
