"""The exported draft model in OpenVINO GenAI: an engine that shares no code with ours, and whose rounds can be counted.

Its packages need an older transformers, so they lie in a folder of their own in pytest's cache and are seen by child
processes alone. About 260 MB are downloaded the first time; without a package index the tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_draft_model import NEW, PROMPTS, THETA, Case, changed, rounds_of_fixed

from pipeline.evaluation.losslessness import teacher_forced
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.sampling import Sampler

pytestmark = [pytest.mark.slow, pytest.mark.openvino]
PACKAGES = ["optimum-intel==2.2.0", "optimum==2.3.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0", "openvino-telemetry==2025.2.0", "transformers==5.5.4",
            "tokenizers==0.22.2", "huggingface_hub==1.21.0"]  # fmt: skip
DRAFTS = 3
EXPORT = "from optimum.commands.optimum_cli import main; main()"


@pytest.fixture(scope="module")
def environment(pytestconfig) -> dict[str, str]:
    """Of a process that sees the engine's packages, and torch from ours."""
    folder = Path(pytestconfig.cache.mkdir("openvino"))
    done = folder / ".done"
    if not done.exists() or done.read_text() != str(PACKAGES):
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder), "--upgrade",
                 "--no-deps", "--no-compile", *PACKAGES]  # fmt: skip
        pip = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        if pip.returncode:
            last = (pip.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"OpenVINO GenAI cannot be installed here: {last}")
        done.write_text(str(PACKAGES))
    return os.environ | {"PYTHONPATH": str(folder), "OPENVINO_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}


def child(environment: dict[str, str], *words: str, **options) -> str:
    done = subprocess.run([sys.executable, "-B", *words], env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def converted(environment: dict[str, str], model: Path, target: Path) -> str:
    child(environment, "-c", EXPORT, "export", "openvino", "--model", str(model), "--task", "text-generation-with-past",
          "--weight-format", "fp32", str(target))  # fmt: skip
    return str(target)


def decoded(environment: dict[str, str], backbone: str, draft: str) -> list[dict]:
    job = {"backbone": backbone, "draft": draft, "k": DRAFTS, "new": NEW, "prompts": PROMPTS}
    out = child(environment, str(Path(__file__).parent / "openvino_child.py"), input=json.dumps(job))
    return json.loads(out.splitlines()[-1])


def test_rounds_are_those_of_the_exit_head_and_those_of_a_wrong_export_are_not(environment, tmp_path) -> None:
    """With a rope theta that is no default and an LM head of its own; the wrong export has two layers swapped."""
    case = Case(tmp_path, rope_parameters=THETA, head_dim=32)
    engine = SplitBackbone(case.model, case.head)
    texts = [autoregressive(engine, Request(ids, NEW), Sampler()).tokens for ids in PROMPTS]
    simulated = []
    for ids, text in zip(PROMPTS, texts, strict=True):
        _, q_TV = teacher_forced(engine, ids, text, Sampler())
        right = (q_TV.argmax(-1) == torch.tensor(text)).tolist()
        simulated.append(rounds_of_fixed(right[1:], DRAFTS))  # the first token comes from the pass over the prompt
    backbone = converted(environment, Path(case.source.name_or_path), tmp_path / "ov-backbone")
    found = decoded(environment, backbone, converted(environment, case.draft, tmp_path / "ov-draft"))
    assert [f["tokens"] for f in found] == texts
    assert [f["rounds"] for f in found] == simulated
    assert max(simulated) < 0.8 * NEW, "hardly a draft is accepted: this says nothing"
    swapped = changed(case.draft, tmp_path / "swapped", swap=True)
    wrong = decoded(environment, backbone, converted(environment, swapped, tmp_path / "ov-swapped"))
    assert [f["tokens"] for f in wrong] == texts, "the text does not tell"
    assert [f["rounds"] for f in wrong] != simulated
