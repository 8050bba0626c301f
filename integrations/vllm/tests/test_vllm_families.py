"""Every family that the plugin admits, in vLLM: random models whose deep layers change little, so that an untrained
head agrees with them at times, and its rounds say something."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_backbone
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_serving import PYTHON, greedy, serve, simulated

from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.fingerprint import fingerprint
from pipeline.publishing.head_folder import one_layer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: make test-vllm makes it"),
]
N, K, NEW = 2, 3, 60
PROMPTS = [[60, 61, 62, 60, 61, 62, 60], [9, 8, 7], [100, 20, 30, 40, 50], [77]]
THETA = {"rope_type": "default", "rope_theta": 500000.0}


class Tiny:
    """A random model of a family and a head for it, as published. The heads' sizes are among those of vLLM on CPUs."""

    def __init__(self, folder: Path, family: str, **fields):
        fields = {"hidden_size": 128, "head_dim": 32, "rope_parameters": THETA} | fields
        self.folder = tiny_backbone(folder, family, sharpness=3.0, **fields)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        with torch.no_grad():
            for layer in self.model.model.layers[N:]:
                layer.self_attn.o_proj.weight.mul_(0.25)
                layer.mlp.down_proj.weight.mul_(0.25)
        self.model.save_pretrained(self.folder)
        record = {"name": "tiny", "revision": None, "fingerprint": fingerprint(self.model), "model_type": family}
        head = ExitHead(N, len(self.model.model.layers), record, new_exit_layer(self.model).state_dict())
        self.head = folder / "head"
        head.save(self.head)
        config = json.loads((self.head / "config.json").read_text())
        shown = one_layer(AutoConfig.from_pretrained(self.folder))
        (self.head / "config.json").write_text(json.dumps(config | {"backbone_config": shown}))
        self.engine = SplitBackbone(self.model, head)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_rounds_are_those_of_the_simulation(tmp_path, family, fields) -> None:
    tiny = Tiny(tmp_path, family, **fields)
    (found,) = serve(tiny.folder, [{"prompts": PROMPTS, "params": greedy(NEW)}], tiny.head, K)["calls"]
    wanted = simulated(tiny.engine, PROMPTS, NEW, [K])
    assert found["ids"] == wanted.ids
    assert (found["rounds"], found["by_position"]) == (sum(wanted.of_each), wanted.by_position)
    assert any(rounds < 0.8 * NEW for rounds in wanted.of_each), "hardly a draft is accepted: this says nothing"


def test_windows_are_refused(tmp_path) -> None:
    tiny = Tiny(tmp_path, "mistral", sliding_window=16)
    assert "sliding windows" in serve(tiny.folder, [], tiny.head, K)["error"]
