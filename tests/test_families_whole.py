"""The whole road, from generate to a published head, for families that run through transformers' own layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from family_cases import DENSE_WHOLE, GENERIC, MIXTURES, WHOLE
from helpers import make_run, tiny_backbone, tiny_reader_of_images
from omegaconf import OmegaConf

from pipeline.cli import main
from pipeline.config import to_dict

USE = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[72, 5, 33, 190]])
plain = model.generate(ids, max_new_tokens=24, do_sample=False)
drafted = model.generate(ids, max_new_tokens=24, do_sample=False, custom_generate=sys.argv[2], trust_remote_code=True)
draft = AutoModelForCausalLM.from_pretrained(sys.argv[3]) if len(sys.argv) > 3 else None
assisted = model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft) if draft else plain
print("same" if torch.equal(plain, drafted) and torch.equal(plain, assisted) else "other")
"""


def check_use(cwd: Path, *folders: Path) -> None:
    """A process with only torch and transformers decodes the backbone's text through these folders."""
    used = subprocess.run(
        [sys.executable, "-c", USE, *map(str, folders)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert used.stdout.strip() == "same", used.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["online", "cached"])
@pytest.mark.parametrize("family", DENSE_WHOLE)
def test_a_dense_head_goes_the_whole_way(tmp_path, capsys, family: str, teacher: str) -> None:
    """It is trained, evaluated, published and used by a process with only torch and transformers; no draft model."""
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, **GENERIC[family])
    words = ["distill.head=dense", "evaluate.rivals=[]", f"distill.teacher={teacher}"]
    run = make_run(tmp_path, f"backbone.name_or_path={folder}", "publish.min_speedup=0", "distill.max_steps=20", *words)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main(["run", *config]) == 0
    assert "lossless = yes" in capsys.readouterr().out.replace("\n", " ")
    published = json.loads((run / "hub" / "2" / "config.json").read_text())
    assert published["head"] == {"kind": "dense", "width": 2 * (24 if family == "qwen3_moe" else 64)}
    assert "in place of its experts" in (run / "hub" / "2" / "README.md").read_text()
    assert main(["publish", "--as", "draft", *config]) == 2
    assert "distill.head=dense: such a head is not a layer" in capsys.readouterr().err
    check_use(tmp_path, folder, run / "hub" / "2")


@pytest.mark.slow
def test_a_model_that_reads_images_too_goes_the_whole_way(tmp_path, capsys) -> None:
    """By its text part, though whoever uses the head loads the whole model."""
    folder = tiny_reader_of_images(tmp_path)
    run = make_run(tmp_path, f"backbone.name_or_path={folder}", "publish.min_speedup=0", "distill.max_steps=20")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main(["run", *config]) == 0
    assert "lossless = yes" in capsys.readouterr().out.replace("\n", " ")
    assert main(["publish", "--as", "draft", *config]) == 2
    assert "it reads images too" in capsys.readouterr().err
    check_use(tmp_path, folder, run / "hub" / "2")


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_from_generate_to_a_published_head(tmp_path, capsys, family: str) -> None:
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, **GENERIC[family])
    run = make_run(
        tmp_path, f"backbone.name_or_path={folder}", "publish.min_speedup=0", "distill.max_steps=20",
        "distill.exit_layers=[2]", "evaluate.rivals=[assistant_model:2]",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main(["run", *config]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "lossless = yes" in out and ("assistant_model:2: left out" in out) == (family in MIXTURES)
    folders = [folder, run / "hub" / "2"]
    assert "auto_map" not in json.loads((folders[1] / "config.json").read_text())
    exported = main(["publish", "--as", "draft", *config])
    if family in MIXTURES:
        assert exported == 2 and "a head of a mixture of experts is not exported" in capsys.readouterr().err
    else:  # the command has decoded with it, and compared its rounds with the head's
        assert exported == 0
        folders.append(run / "hub" / "2-draft")
    check_use(tmp_path, *folders)
