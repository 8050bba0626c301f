"""What is typed arrives: text keys keep their text, paths their home folder, and nothing is read from elsewhere."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from pipeline.cli import main
from pipeline.config import Config, load, to_dict
from pipeline.config_paths import entries_of
from pipeline.config_words import variations
from pipeline.errors import UserError
from pipeline.runs import anonymous


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


TEXTS = [
    "2025_11_28", "1.10", "007", "0123456", "12:30", "12e4567", "0x1F", "1e3", ".5", "2025-11-28", "true", "no", "On",
    "y", "=", "a=b", "it's", 'say "x"', "/data/a #b.jsonl", "[a]", "{a: 1}", "*a", "&a", "!a", "%a", "@a", "a: b", "-",
    "a,b", " a", "a\\b", "ä",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_keeps_the_text_of_a_word(text: str) -> None:
    keys = ("backbone.revision", "prompts.column", "machine.server_model", "run.dir")
    config = load(None, [f"{key}={text}" for key in keys])
    assert [value_of(config, key) for key in keys] == [text] * 4


@pytest.mark.parametrize(
    "text", ["2025_11_28", "1.10", "007", "0123456", "12:30", "12e4567", "0x1F", "2025-11-28", "true", "no", "On", "="]
)
def test_a_text_key_keeps_the_text_of_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        f"run:\n  name: {text}\nbackbone: {{revision: {text}}}\nprompts:\n  mixture:\n"
        f"    - {{path: a.jsonl, revision: {text}}}\nevaluate:\n  rivals: [{text}]\n"
    )
    config = load(file, [])
    assert (config.run.name, config.backbone.revision, config.prompts.mixture[0].revision) == (text, text, text)
    assert config.evaluate.rivals == [text]
    again = tmp_path / "again.yaml"  # as a stage writes it into the run folder, and a worker reads it
    again.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load(again, []) == config
    again.write_text(yaml.safe_dump(to_dict(config)))
    assert load(again, []) == config


def test_null_and_quotes(tmp_path: Path) -> None:
    for word in ("null", "~", ""):
        assert load(None, [f"backbone.revision={word}", f"plan.node_bandwidth={word}"]).backbone.revision is None
    assert load(None, ['backbone.revision="null"']).backbone.revision == "null"
    assert load(None, ["backbone.revision='it''s'"]).backbone.revision == "it's"
    assert load(None, ["run.name=null"]).run.name == "null", "a key that cannot be null holds text"
    file = tmp_path / "my.yaml"
    file.write_text("backbone:\n  revision: ~\nprompts:\n  revision: 'null'\n  column:\n")
    config = load(file, ["backbone.revision=x", f"run.dir={tmp_path}"])
    assert (load(file, []).backbone.revision, config.backbone.revision) == (None, "x")
    assert (config.prompts.revision, config.prompts.column) == ("null", None)


def test_numbers_and_switches_are_numbers_and_switches() -> None:
    words = ["seed=012", "distill.max_steps=1_000", "distill.learning_rate=1e-3", "publish.force=yes",
             "evaluate.temperatures=[0, 1, .5]", "plan.node_bandwidth=50"]  # fmt: skip
    config = load(None, words)
    assert (config.seed, config.distill.max_steps, config.distill.learning_rate) == (12, 1000, 0.001)
    assert (config.publish.force, config.plan.node_bandwidth) == (True, 50.0)
    assert config.evaluate.temperatures == [0.0, 1.0, 0.5]
    for wrong in ("seed=12:30", "seed=yes", "distill.max_steps=1e3", "distill.learning_rate=12:30", "run.name=???"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            load(None, [wrong])


def test_what_varies_is_taken_as_it_is_typed() -> None:
    assert variations("backbone.revision=[0123, 12:30, 'a, b', ~/x]") == [
        "backbone.revision=0123", "backbone.revision=12:30", "backbone.revision='a, b'", "backbone.revision=~/x"
    ]  # fmt: skip
    assert variations("distill.exit_layers=[[2],[4, 8]]") == ["distill.exit_layers=[2]", "distill.exit_layers=[4, 8]"]
    for wrong in ("machine.nodes=2", "machine.nodes=[]", "machine.nodes", "machine.nodes=[1"):
        with pytest.raises(UserError, match=r"such as machine\.nodes=\[1,2,4\]"):
            variations(wrong)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_editors_are_no_part_of_a_file(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 7\nrun:\n  name: ä\n", encoding=encoding)
    config = load(file, [])
    assert (config.seed, config.run.name) == (7, "ä")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    for data, named in {b"seed: \xff\xfe\xfa": "not UTF-8", b"seed: [1\nrun: {": "line 2", b"a: 1\na: 2": "a twice",
                        b"seed: !!python/object:os.system x": "line 1"}.items():  # fmt: skip
        file.write_bytes(data)
        with pytest.raises(UserError, match=named) as caught:
            load(file, [])
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path, [])


# ---- nothing is read from elsewhere

SECRETS = ["${oc.env:S}", "a${oc.env:S,b}c", "${oc.decode:${oc.env:S}}", "${ oc.env : S }", "${oc.${x}:S}",
           "\\${oc.env:S}", "${oc.select:run.name}", "${run.name}${oc.env:S}", "${oc.create:${oc.env:S}}"]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_the_environment_is_not_read(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S", "s3cr3t")
    file = tmp_path / "my.yaml"
    quoted = yaml.safe_dump(secret, default_style="'").strip()
    file.write_text(f"prompts:\n  mixture:\n    - {{path: {quoted}}}\n")
    nested = [f"machine.servers=[{quoted}]", f"prompts.mixture=[{{path: {quoted}}}]", f"wandb.project={secret}"]
    for path, words in [(file, []), *((None, [word]) for word in nested)]:
        with pytest.raises(UserError, match="only references to other keys") as caught:
            load(path, words)
        key = "prompts.mixture[0].path" if path else words[0].partition("=")[0]
        assert key in str(caught.value) and "s3cr3t" not in str(caught.value) and "HF_TOKEN" in str(caught.value)
    with pytest.raises(UserError, match="only references"):  # what a published head says of its backbone
        load(None, [], {"backbone": {"revision": secret}})
    for word in variations(f"wandb.project=[{quoted}]"):
        with pytest.raises(UserError, match="only references"):
            load(None, [word])


def test_other_keys_may_be_referred_to() -> None:
    config = load(None, ["run.name=a", "wandb.project=${run.name}-x", "seed=${distill.max_steps}"])
    assert (config.wandb.project, config.seed) == ("a-x", config.distill.max_steps)


# ---- ~


def paths(kind: Any, prefix: str = "") -> list[str]:
    import dataclasses

    found = []
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            found += paths(f.type, f"{prefix}{f.name}.")
        elif entries_of(f.type):
            found += [f"{prefix}{f.name}[]"]
        elif f.metadata.get("is_path"):
            found.append(prefix + f.name)
    return found


def test_a_home_folder_is_found_in_every_key_that_holds_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths(Config) == [
        "run.dir", "backbone.name_or_path", "backbone.gguf_dir", "prompts.path", "prompts.mixture[]",
        "prompts.chat_template", "generate.exit_head", "evaluate.prompts.path", "evaluate.prompts.mixture[]",
        "evaluate.prompts.chat_template", "evaluate.head", "evaluate.states", "chat.head", "plan.pilot",
    ]  # fmt: skip
    for key in paths(Config):
        if key.endswith("[]"):
            entries = value_of(load(None, [f"{key[:-2]}=[{{path: ~/a/b.jinja}}, {{path: c~}}]"]), key[:-2])
            assert [entry.path for entry in entries] == [f"{tmp_path}/a/b.jinja", "c~"]
        else:
            assert value_of(load(None, [f"{key}=~/a/b.jinja"]), key) == f"{tmp_path}/a/b.jinja"
            assert key.rpartition(".")[2] in anonymous.PATHS + anonymous.PATHS_OR_IDS
    assert load(None, ["run.dir=~"]).run.dir == str(tmp_path)
    user = pwd.getpwuid(os.getuid())
    assert load(None, [f"run.dir=~{user.pw_name}/runs"]).run.dir == f"{user.pw_dir}/runs"
    assert load(None, ["prompts.column=~/a", "wandb.project=~x"]).prompts.column == "~/a", "no path: as typed"
    with pytest.raises(UserError, match=r"run\.dir=~no-one-here/a: ~no-one-here is no user's home"):
        load(None, ["run.dir=~no-one-here/a"])


def test_the_config_file_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("run:\n  dir: ~/runs\n")
    assert load("~/my.yaml", []).run.dir == f"{tmp_path}/runs"
    assert main(["run", "--config=~/my.yaml", "--show-config", "run.dir"]) == 0


def test_a_run_needs_a_place() -> None:
    with pytest.raises(UserError, match=r"run\.dir=: "):
        load(None, ['run.dir=""'])
