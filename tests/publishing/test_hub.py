"""Pushing and pulling through the real client, to a Hub on this machine: what arrives, what is refused, what is cut."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf_xet import XetAuthenticationError
from huggingface_hub.errors import HFValidationError
from loopback_hub import ACCOUNTS, Fault, LoopbackHub

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.publishing import hub as published
from pipeline.runs.folder import RunDir

ROOT = Path(__file__).resolve().parents[2]

# HF_ENDPOINT is read when the client is imported, so the client is a process of its own; it takes calls line by line.
CLIENT = """
import json, os, sys
from pathlib import Path
from pipeline.publishing import hub
from pipeline.errors import UserError
hub.WAITS = (0.01, 0.01)
for line in sys.stdin:
    call = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if call["token"]:
        os.environ["HF_TOKEN"] = call["token"]
    try:
        if "push" in call:
            answer = hub.push(Path(call["push"]), call["repo"], "run one", public=call["public"])
        else:
            answer = str(hub.pull(call["pull"]))
    except UserError as error:
        answer = f"UserError: {error}"
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that pushes and pulls. `said` is everything it ever printed."""

    def __init__(self, hub: LoopbackHub, home: Path, **more: str):
        environment = hub.environment(home, None) | {"PYTHONPATH": str(ROOT)} | more
        self.errors = home.with_suffix(".stderr")
        self.said = ""
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                env=environment, cwd=home.parent, stdin=-1, stdout=-1, stderr=errors, text=True,
            )  # fmt: skip

    def call(self, token: str | None = "hf_of_ada", **words) -> dict | str:
        self.process.stdin.write(json.dumps({"token": token, **words}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        self.said += line
        return json.loads(line)

    def push(self, folder: Path, repo: str, public: bool = False, **more) -> dict:
        made = self.call(push=str(folder), repo=repo, public=public, **more)
        assert isinstance(made, dict), made
        return made

    def refusal(self, folder: Path, repo: str, public: bool = False, **more) -> str:
        said = self.call(push=str(folder), repo=repo, public=public, **more)
        assert isinstance(said, str), said
        return said

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        self.process.stdout.close()
        for token in (*ACCOUNTS, "hf_unknown"):
            assert token not in self.said + self.errors.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("server")) as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.faults.clear()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("client") / "home")
    yield client
    client.close()


numbers = itertools.count()


@pytest.fixture
def repo() -> str:
    return f"org/head-{next(numbers)}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small folder of the shape that publish writes, its weights no other's: what the Hub has is not sent again."""
    folder = tmp_path / "published"
    (folder / "custom_generate").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Exit head\n")
    (folder / "results.json").write_text('{"schema": 1}')
    (folder / "config.json").write_text('{"model_type": "exit_head", "backbone": {"name": "tiny", "revision": null}}')
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 20))
    (folder / "custom_generate" / "generate.py").write_text("from .origin import HEAD\n")
    (folder / "custom_generate" / "origin.py").write_text("HEAD: str | None = None\nREVISION: str | None = None\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_push_is_one_commit_and_one_tag_of_the_whole_folder(hub, client, repo, folder) -> None:
    before = contents(folder)
    made = client.push(folder, repo)
    assert re.fullmatch(r"run-one-[0-9a-f]{12}", made["tag"]) and made["new"]
    assert hub.repo(repo) == {
        "private": True,
        "branches": {"main": made["commit"]},
        "tags": {made["tag"]: made["commit"]},
    }
    assert [c["title"] for c in hub.history(repo)] == [f"Publish {made['tag']}", "initial commit"]
    assert hub.history(repo)[0]["saw"] == hub.history(repo)[0]["parent"], "behind what was looked at and nothing else"
    there = hub.files(repo, made["tag"])
    origin = there.pop("custom_generate/origin.py").decode()
    names: dict = {}
    exec(origin, names)
    assert (names["HEAD"], names["REVISION"]) == (repo, made["tag"])
    del there[".gitattributes"]
    assert contents(folder) == before, "the folder itself still belongs to nobody"
    del before["custom_generate/origin.py"]
    assert there == before


def test_what_has_not_changed_is_not_pushed(hub, client, repo, folder) -> None:
    first = client.push(folder, repo)
    hub.requests.clear()
    again = client.push(folder, repo)
    assert again == first | {"new": False}
    assert not [r for r in hub.requests if re.match("(POST|PUT) ", r)]
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Better\n")
    third = client.push(folder, repo)
    assert third["new"] and third["tag"] != first["tag"] and len(hub.history(repo)) == 3
    assert hub.files(repo, first["tag"])["README.md"].endswith(b"# Exit head\n"), "the earlier revision stays"


def test_a_file_that_is_gone_from_the_folder_goes_from_the_repo(hub, client, repo, folder) -> None:
    (folder / "old.json").write_text("{}")
    client.push(folder, repo)
    (folder / "old.json").unlink()
    made = client.push(folder, repo)
    assert hub.files(repo, made["tag"]).keys() == contents(folder).keys() | {".gitattributes"}
    assert hub.history(repo)[0]["parent"] is not None and len(hub.history(repo)) == 3


FAULTS = [
    *(("PUT /large/", what) for what in ("during", "after")),
    *(("POST .*/commit/", what) for what in ("during", "after", "503", "412")),
    *(("POST .*/tag/", what) for what in ("during", "after")),
    ("POST /api/repos/create", "after"),
    ("GET .*/refs", "during"),
]


@pytest.mark.parametrize(("route", "what"), FAULTS)
def test_a_cut_connection_is_tried_again(hub, client, repo, folder, route, what) -> None:
    """Also when the work was done and only the answer was lost: there is still one commit and one tag."""
    hub.faults.append(Fault(route, what))
    made = client.push(folder, repo)
    assert hub.faults[0].times == 0, "nothing was cut"
    assert made["new"], "whatever a later attempt found there, this push brought it"
    assert len(hub.history(repo)) == 2 and hub.repo(repo)["tags"] == {made["tag"]: made["commit"]}


UPLOAD = pytest.param("PUT /large/", marks=pytest.mark.slow)  # the client itself tries for 23 s


@pytest.mark.parametrize("route", [UPLOAD, "POST .*/commit/", "POST .*/tag/"])
def test_an_interrupted_push_leaves_no_half_revision_and_goes_on(hub, client, repo, folder, route) -> None:
    hub.faults.append(Fault(route, "during", times=99))
    assert "the same command goes on" in client.refusal(folder, repo)
    commits = hub.history(repo)
    assert hub.repo(repo)["tags"] == {}
    assert len(commits) == (2 if "tag" in route else 1), "all files or none"
    hub.faults.clear()
    made = client.push(folder, repo)
    assert len(hub.history(repo)) == 2 and hub.repo(repo)["tags"] == {made["tag"]: made["commit"]}
    assert len(hub.files(repo, made["tag"])) == len(contents(folder)) + 1


def test_public_only_where_it_is_asked_for(hub, client, repo, folder) -> None:
    client.push(folder, repo)
    assert hub.repo(repo)["private"]
    client.push(folder, repo, public=True)
    assert not hub.repo(repo)["private"] and len(hub.history(repo)) == 2
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Secret\n")
    assert "is public" in client.refusal(folder, repo) and len(hub.history(repo)) == 2
    client.push(folder, "ada/open", public=True)
    assert not hub.repo("ada/open")["private"]


REFUSED = {
    "no token": ({"token": None}, ["HF_TOKEN", "hf auth login"]),
    "a token that nobody has": ({"token": "hf_unknown"}, ["does not know the token", "HF_TOKEN"]),
    "a token that may only read": ({"token": "hf_reads_only"}, ["others/head", "right to write"]),
    "a namespace of others": ({}, ["others/head", "right to write"]),
}


@pytest.mark.parametrize(("token", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_push_that_may_not_be(hub, client, folder, token, named) -> None:
    message = client.refusal(folder, "others/head", **token)
    assert message.startswith("UserError") and all(part in message for part in named)
    assert hub.repo("others/head") is None, "nothing was made"


ELSEWHERE = {
    "nobody listens": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["127.0.0.1:9", "cannot be reached"]),
    "no URL": ({"HF_ENDPOINT": "localhost:9"}, ["HF_ENDPOINT", "https://"]),
    "offline": ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE"]),
    "no Hub": ({"HF_ENDPOINT": "URL/nowhere"}, ["answered 404"]),
    "a Hub without Xet": ({"HF_HUB_DISABLE_XET": "0"}, ["404 Not Found", "set HF_HUB_DISABLE_XET=1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "named"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_hub_that_cannot_be_had(hub, folder, repo, tmp_path, settings, named) -> None:
    """A push and a pull say what it is; these settings are read at import, so each needs a process of its own."""
    settings = {name: value.replace("URL", hub.url) for name, value in settings.items()}
    client = Client(hub, tmp_path / "home", **settings)
    said = [client.refusal(folder, repo)]
    if "HF_HUB_DISABLE_XET" not in settings:
        said.append(client.call(pull=repo))
    client.close()
    for message in said:
        assert message.startswith("UserError") and all(part in message for part in named)


@pytest.mark.parametrize(
    "error", [XetAuthenticationError("no"), HFValidationError("no name"), PermissionError(13, "no")]
)
def test_errors_of_the_clients_are_messages_and_those_of_files_are_not(error) -> None:
    def attempt() -> None:
        raise error

    expected = PermissionError if error.args[0] == 13 else UserError
    with pytest.raises(expected, match="no"):
        published._patiently("publish.repo_id=org/head", attempt)


def somebody_elses(hub: LoopbackHub, repo: str, title: str, tag: str | None, *names: str) -> None:
    files = {name: {"object": hub.store(b"theirs"), "size": 6, "lfs": False} for name in (".gitattributes", *names)}
    commit = hub.save_commit({"parent": None, "title": title, "repo": repo, "files": files})
    hub.save_repo(repo, {"private": True, "branches": {"main": commit}, "tags": {tag: commit} if tag else {}})


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("tag", [None, "v1"])
def test_a_repo_that_holds_something_else_is_left_alone(hub, client, repo, folder, tag, name) -> None:
    """Also if it is called as what would be pushed."""
    somebody_elses(hub, repo, "Publish v1", tag, "README.md", name)
    assert f"holds something else ({name})" in client.refusal(folder, repo)
    assert len(hub.history(repo)) == 1


def test_a_repo_that_was_only_made_may_be_pushed_to(hub, client, repo, folder) -> None:
    somebody_elses(hub, repo, "initial commit", None, "README.md")
    made = client.push(folder, repo)
    assert hub.files(repo, made["tag"])["README.md"] == (folder / "README.md").read_bytes()


def test_a_push_that_was_cut_before_its_tag_was_ours(hub, client, repo, folder) -> None:
    (folder / "old.json").write_text("{}")
    hub.faults.append(Fault("POST .*/tag/", "during", times=99))
    client.refusal(folder, repo)
    assert hub.repo(repo)["tags"] == {} and len(hub.history(repo)) == 2
    hub.faults.clear()
    (folder / "old.json").unlink()
    made = client.push(folder, repo)
    assert hub.files(repo, made["tag"]).keys() == contents(folder).keys() | {".gitattributes"}


# ---- what must not be pushed

CARDS = {
    "a licence that the Hub does not know": ("license: Apache 2.0", ['"license" must be one of', "publish.licence"]),
    "a dataset that has no such name": ("datasets: [org/data#2]", ['"datasets[0]" with value "org/data#2"']),
}


@pytest.mark.parametrize(("front", "named"), CARDS.values(), ids=CARDS.keys())
def test_a_card_that_the_hub_does_not_take(hub, client, repo, folder, front, named) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Exit head\n")
    message = client.refusal(folder, repo)
    assert message.startswith("UserError") and all(part in message for part in ["does not take the card", *named])
    assert len(hub.history(repo)) == 1, "nothing was committed"


def test_a_card_without_results(hub, client, repo, folder) -> None:
    (folder / "results.json").unlink()
    assert "a card without results" in client.refusal(folder, repo)
    (folder / "results.json").write_text("{}")
    for text in ("# Exit head\n", "---\nlicense: mit\n"):
        (folder / "README.md").write_text(text)
        assert "no model card" in client.refusal(folder, repo)
    assert hub.repo(repo) is None


def test_what_tools_leave_in_the_folder_is_not_pushed(hub, client, repo, folder) -> None:
    made = client.push(folder, repo)
    for name in (".ipynb_checkpoints/README-checkpoint.md", ".DS_Store", "custom_generate/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("beside")
    assert client.push(folder, repo) == made | {"new": False}


def test_a_folder_that_was_changed_since_it_was_made(folder, tmp_path, monkeypatch) -> None:
    """Refused before the Hub is asked, which here says that it is offline."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_ada")
    run = RunDir(load(None, [f"run.dir={tmp_path}", "publish.target=hub", "publish.repo_id=org/head"]))
    made = Path(shutil.copytree(folder, run / "hub" / "2"))
    with run.stage("publish", []) as summary:
        summary |= {"folder": "hub/2", "sha256": published.digest_of(made)}
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        published.publish(run, made, "")
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"hub/2: was changed .*\(model\.safetensors\).* --redo publish"):
        published.publish(run, made, "")
    shutil.copy2(folder / "model.safetensors", weights)
    (made / "config.json").unlink()
    with pytest.raises(UserError, match="files are gone"):
        published.publish(run, made, "")


def test_pull_brings_what_is_measured_and_no_code(hub, client, repo, folder) -> None:
    before = (folder / "model.safetensors").read_bytes()
    first = client.push(folder, repo)
    (folder / "model.safetensors").write_bytes(b"better")
    client.push(folder, repo)
    newest, pinned = (Path(client.call(pull=name)) for name in (repo, f"{repo}@{first['tag']}"))
    assert (newest / "model.safetensors").read_bytes() == b"better"
    assert (pinned / "model.safetensors").read_bytes() == before
    assert {p.name for p in newest.iterdir()} == {"config.json", "model.safetensors"}
    assert client.call(pull=str(folder)) == str(folder), "a folder is itself"


NOT_THERE = {
    "no such repo": ("org/nothing", {}, ["org/nothing", "no such repo"]),
    "private, and nobody asks": ("REPO", {"token": None}, ["private"]),
    "no such revision": ("REPO@v9", {}, ["@v9", "no such revision"]),
    "a bad token": ("REPO", {"token": "hf_unknown"}, ["does not know the token"]),
    "no name": ("nowhere", {}, ["evaluate.head=nowhere", "org/name"]),
}


@pytest.mark.parametrize(("head", "token", "named"), NOT_THERE.values(), ids=NOT_THERE.keys())
def test_a_head_that_cannot_be_had(hub, client, repo, folder, head, token, named) -> None:
    client.push(folder, repo)
    message = client.call(pull=head.replace("REPO", repo), **token)
    assert str(message).startswith("UserError") and all(part in message for part in named)
