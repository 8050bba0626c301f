"""Every file in configs/ loads through pipeline.config.load, is commented, and says nothing that code contradicts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import byte_tokenizer

from pipeline.config import Config, Source, load, to_dict
from pipeline.config_help import help_text
from pipeline.config_paths import keys_of
from pipeline.errors import UserError
from pipeline.runs.anonymous import anonymous

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_is_a_pocket_config() -> None:
    assert "pocket.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_loads_and_every_key_in_it_arrives(path: Path) -> None:
    loaded = to_dict(load(path, []))

    def arrived(wanted: object, got: object) -> bool:
        if isinstance(wanted, dict):
            return isinstance(got, dict) and all(arrived(v, got[k]) for k, v in wanted.items())
        return got == wanted

    assert arrived(yaml.safe_load(path.read_text()), loaded)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_opens_with_a_comment_that_teaches(path: Path) -> None:
    assert path.read_text().lstrip().startswith("#"), "say first what this run is and what it needs"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_goes_to_another_run_folder_than_its_neighbours(path: Path) -> None:
    names = {other.name: load(other, []).run.name for other in CONFIGS if other != path}
    assert load(path, []).run.name not in names.values()


def test_vicuna_is_asked_as_it_was_trained() -> None:
    tokenizer = byte_tokenizer()
    template = Path(load(CONFIGS[0].parent / "vicuna-13b.yaml", []).prompts.chat_template)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(
        messages, chat_template=(ROOT / template).read_text(), tokenize=False, add_generation_prompt=True
    )
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    assert text == system + "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:"


def test_words_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 7\ndistill:\n  max_steps: 9\n")
    config = load(file, ["seed=8"])
    assert (config.seed, config.distill.max_steps, config.run.name) == (8, 9, Config().run.name)


def test_a_mixture_from_a_file_or_a_word(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("prompts:\n  mixture:\n    - {path: a.jsonl, weight: 2}\n    - path: org/set\n      revision: c0\n")
    expected = [Source(path="a.jsonl", weight=2.0), Source(path="org/set", revision="c0")]
    from_file = load(file, [])
    assert from_file.prompts.mixture == expected
    word = "prompts.mixture=[{path: a.jsonl, weight: 2}, {path: org/set, revision: c0}]"
    assert load(None, [word]).prompts.mixture == expected
    assert load(file, ["prompts.mixture=[{path: b.jsonl}]"]).prompts.mixture == [Source(path="b.jsonl")]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(to_dict(from_file)))
    assert load(again, []) == from_file


def test_other_defaults_lose_to_file_and_words(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("backbone:\n  revision: of the file\n")
    instead = {"backbone": {"name_or_path": "org/model", "revision": "of the head"}, "run": {"name": "head"}}
    config = load(file, ["run.name=word"], instead)
    assert (config.run.name, config.backbone.revision, config.backbone.name_or_path) == (
        "word", "of the file", "org/model"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["org/head", "a/b", "Org_1/my-head.v2", "o/" + "x" * 96])
def test_names_of_repos(name: str) -> None:
    assert load(None, [f"publish.repo_id={name}"]).publish.repo_id == name


def test_two_configs_share_no_list() -> None:
    first = load(None, [])
    first.distill.exit_layers.append(99)
    assert 99 not in load(None, []).distill.exit_layers


def test_every_key_has_a_sentence_in_the_help() -> None:
    sections = [f.name for f in dataclasses.fields(Config)]
    lines = help_text(sections).splitlines()
    keys = [line.strip().partition("=")[0] for line in lines[0::2]]
    assert keys == keys_of(Config)
    assert all(len(line.split()) >= 2 for line in lines[1::2])


# Each: the words, and what the message must name.
WRONG = [
    (["nosuch.key=1"], ["nosuch"]),
    (["distill.max_step=3"], ["distill.max_step", "distill.max_steps"]),
    (["distil.max_steps=3"], ["distil", "distill"]),
    (["distill.max_steps=many"], ["distill.max_steps", "many"]),
    (["distill.max_steps=1.5"], ["distill.max_steps", "1.5"]),
    (["distill.max_steps=0"], ["distill.max_steps=0", "at least 1"]),
    (["distill.draft_vocabulary=1"], ["distill.draft_vocabulary=1", "from 2 on"]),
    (["distill.draft_vocabulary=8k"], ["distill.draft_vocabulary=8k", "auto, 0"]),
    (["distill.exit_layers=[0]"], ["distill.exit_layers", "N >= 1"]),
    (["distill.exit_layers=[2,-1]"], ["distill.exit_layers", "N >= 1"]),
    (["distill.exit_layers=auto"], ["distill.exit_layers=auto", "distill.teacher=cached"]),
    (["distill.exit_layers=[2,2]"], ["distill.exit_layers", "different"]),
    (["distill.exit_layers=2"], ["distill.exit_layers"]),
    (["distill.held_out=0"], ["distill.held_out"]),
    (["prompts.held_out=1"], ["prompts.held_out"]),
    (["prompts=null"], ["prompts"]),
    (["prompts.bad_rows=ignore"], ["prompts.bad_rows=ignore", "stop or skip"]),
    (["evaluate.prompts.bad_rows=ignore"], ["evaluate.prompts.bad_rows=ignore", "stop or skip"]),
    (["prompts.min_tokens=-1"], ["prompts.min_tokens=-1", "0 or above"]),
    (["prompts.max_tokens=-1"], ["prompts.max_tokens=-1", "0 or above"]),
    (["prompts.max_tokens=4", "prompts.min_tokens=5"], ["prompts.max_tokens=4", "below min_tokens=5"]),
    (["prompts.chat_template=true"], ["prompts.chat_template=true", "none", "tokenizer", ".jinja"]),
    (["prompts.chat_template=false"], ["prompts.chat_template=false", "none for plain text"]),
    (["evaluate.prompts.chat_template=own.txt"], ["evaluate.prompts.chat_template=own.txt", ".jinja"]),
    (["prompts.chat_template=null"], ["prompts.chat_template=null", "none for plain text"]),
    (["prompts.mixture=[{pth: a.jsonl}]"], ["prompts.mixture[].pth", "Did you mean prompts.mixture[].path?"]),
    (
        ["evaluate.prompts.mixture=[{path: a.jsonl, weights: 2}]"],
        ["evaluate.prompts.mixture[].weights", "Did you mean evaluate.prompts.mixture[].weight?"],
    ),
    (["prompts.mixtures=[]"], ["prompts.mixtures", "Did you mean prompts.mixture?"]),
    (["prompts.mixture=[{path: a.jsonl, weight: much}]"], ["prompts.mixture[].weight", "much"]),
    (["prompts.mixture=[a.jsonl]"], ["prompts.mixture[0]"]),
    (["prompts.mixture=a.jsonl"], ["prompts.mixture"]),
    (["prompts.mixture={path: a.jsonl}"], ["prompts.mixture"]),
    (["prompts.mixture=[{weight: 2}]"], ["prompts.mixture[0].path=null", "every source needs a path"]),
    (["prompts.mixture=[{path: a},{path: b,weight: 0}]"], ["prompts.mixture[1].weight=0.0", "above 0"]),
    (["prompts.mixture=[{path: a,weight: .inf}]"], ["prompts.mixture[0].weight=inf", "above 0"]),
    (["prompts.mixture=[{path: a}]", "prompts.path=b.jsonl"], ["prompts.path=b.jsonl", "its default is pocket"]),
    (["prompts.mixture=[{path: a}]", "prompts.revision=c0"], ["prompts.revision=c0", "its default is null"]),
    (
        ["evaluate.prompts.mixture=[{path: a}]", "evaluate.prompts.path=b.jsonl"],
        ["evaluate.prompts.path=b.jsonl", "evaluate.prompts.mixture", "its default is null"],
    ),
    (["backbone.dtype=float16"], ["backbone.dtype", "bfloat16"]),
    (["machine.device=gpu"], ["machine.device", "cuda"]),
    (["generate.engine=vllm"], ["generate.engine", "padded"]),
    (["generate.temperatures=[-1]"], ["generate.temperatures"]),
    (["evaluate.temperatures=[-1]"], ["evaluate.temperatures", "0 (greedy) or above"]),
    (["evaluate.temperatures=[nan]"], ["evaluate.temperatures", "0 (greedy) or above"]),
    (["evaluate.temperatures=[0,0.0]"], ["evaluate.temperatures", "different"]),
    (["evaluate.top_p=0"], ["evaluate.top_p"]),
    (["evaluate.top_p=1.1"], ["evaluate.top_p=1.1", "at most 1"]),
    (["evaluate.top_p=nan"], ["evaluate.top_p", "at most 1"]),
    (["evaluate.top_k=-1"], ["evaluate.top_k=-1", "0 or above"]),
    (["evaluate.num_prompts=-1"], ["evaluate.num_prompts=-1", "0 or above"]),
    (["evaluate.max_new_tokens=1"], ["evaluate.max_new_tokens=1", "at least 2"]),
    (["evaluate.controllers=[]"], ["evaluate.controllers", "one or more"]),
    (["evaluate.controllers=[beta,fixed:2,beta]"], ["evaluate.controllers", "different"]),
    (["plan.mfu=0"], ["plan.mfu=0", "above 0"]),
    (["plan.acceptance=[1.5]"], ["plan.acceptance=[1.5]", "from 0 to 1"]),
    (["plan.node_bandwidth=0"], ["plan.node_bandwidth=0", "above 0"]),
    (["publish.target=ftp"], ["publish.target", "folder or hub"]),
    (["publish.target=hub"], ["publish.target=hub", "publish.repo_id=org/name"]),
    (["publish.public=true"], ["publish.public=true", "publish.target=folder"]),
    (["publish.licence=Apache 2.0"], ["publish.licence=Apache 2.0", "apache-2.0"]),
    (["publish.repo_id=head"], ["publish.repo_id=head", "org/name"]),
    (["publish.repo_id=org/-head"], ["publish.repo_id", "org/name"]),
    (["publish.repo_id=org/a--b"], ["publish.repo_id", "org/name"]),
    (["publish.repo_id=a/b/c"], ["publish.repo_id", "org/name"]),
    (["publish.repo_id=org/kopf.git"], ["publish.repo_id", "org/name"]),
    (["wandb.mode=cloud"], ["wandb.mode", "offline"]),
    (["run.name=a/b"], ["run.name"]),
    (["run.name=.."], ["run.name"]),
    (["seed"], ["seed", "key=value"]),
    (["=1"], ["key=value"]),
    (["distill.exit_layers=[2"], ["distill.exit_layers"]),
]


PUBLISHED = {
    "run.dir=../private/runs": "runs",
    "backbone.name_or_path=pocket": "pocket",
    "backbone.name_or_path=org/model-7B.v1": "org/model-7B.v1",
    "backbone.name_or_path=../private/model": "model",
    "backbone.name_or_path=private/customer-x/model": "model",
    "prompts.path=../private/customer-x/prompts.jsonl": "prompts.jsonl",
    "prompts.path=customer-x/prompts.jsonl": "prompts.jsonl",
    "prompts.path=org/data": "org/data",
    "prompts.path=gsm8k": "gsm8k",
    "evaluate.prompts.path=~/customer-x/prompts.txt": "prompts.txt",
    "prompts.chat_template=templates/x/y.jinja": "y.jinja",
    "prompts.chat_template=x/y.jinja": "y.jinja",
    "prompts.chat_template=tokenizer": "tokenizer",
    "generate.exit_head=runs/secret": "secret",
    "evaluate.head=org/head@v1.0": "org/head@v1.0",
    "evaluate.head=../secret/hub/2": "2",
    "evaluate.states=runs/secret/eval/results.json": "results.json",
    "plan.pilot=runs/secret": "secret",
    "machine.server_model=/models/secret/llama": "llama",
    "machine.servers=[http://node1:8000/v1, 'https://10.0.0.7/x/v1?api_key=k']": ["server", "server"],
    "backbone.name_or_path=https://user:secret@hub.corp/org/model?token=t": "model",
    "backbone.name_or_path=C:\\Users\\me\\model": "model",
    "backbone.name_or_path=me@node1:/data/model": "model",
    "backbone.name_or_path=file:///home/me/model": "model",
    "prompts.path=https://user:secret@node1:8000/a/b.jsonl?token=t#x": "b.jsonl",
    "prompts.path=s3://bucket-x/a/b.jsonl": "b.jsonl",
    "prompts.path=http://node1:8000": "server",
    "prompts.path=data/B.JSONL": "B.JSONL",
    "prompts.column=/home/me/column": "column",
    "prompts.mixture=[{path: 'https://node1/a.jsonl?token=t'}, {path: /home/me/b.txt, task: in /home/me/c}]": [
        {"path": "a.jsonl", "task": None},
        {"path": "b.txt", "task": "in c"},
    ],
    "prompts.licence=as at https://user:secret@site.org/licence?key=k": "as at https://site.org/licence",
    "prompts.licence=see /home/me/LICENCE": "see LICENCE",
    "publish.repo_id=org/head": "org/head",
}


@pytest.mark.parametrize(("word", "told"), PUBLISHED.items())
def test_paths_are_not_published_and_ids_are_whole(word: str, told: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing of all this lies
    value: Any = anonymous(to_dict(load(None, [word])))
    for key in word.partition("=")[0].split("."):
        value = value[key]
    if told and isinstance(told[0], dict):
        value = [{key: entry[key] for key in told[0]} for entry in value]
    assert value == told


def test_what_is_here_is_no_id(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mixture = "prompts.mixture=[{path: ../secret/a.jsonl}, {path: org/data}]"
    tree = anonymous(to_dict(load(None, ["backbone.name_or_path=models/llama", mixture])))
    assert tree["backbone"]["name_or_path"] == "llama"
    assert [source["path"] for source in tree["prompts"]["mixture"]] == ["a.jsonl", "org/data"]


def test_generate_may_give_a_temperature_twice() -> None:
    assert load(None, ["generate.temperatures=[0,1,1]"]).generate.temperatures == [0, 1, 1]  # a mixture by thirds


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_wrong_word_is_named_with_its_remedy(words: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(None, words)
    for part in named:
        assert part in str(caught.value)


WRONG_FILES = {
    "not YAML": "seed: [1\nrun: {",
    "a key twice": "seed: 1\nseed: 2\n",
    "an unknown key": "distill:\n  max_step: 3\n",
    "an unknown key of a source": "prompts:\n  mixture:\n    - {pth: a.jsonl}\n",
    "a section with nothing in it": "distill:\n",
    "only a word": "hello\n",
    "a list": "- 1\n- 2\n",
    "a reference to nothing": "run:\n  name: ${nothing}\n",
}


@pytest.mark.parametrize("text", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"wrong\.yaml"):
        load(file, [])
