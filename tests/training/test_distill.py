"""The distill stage: what is learned from packed sequences, what a run leaves behind, and wrong inputs.

The step itself is proved in test_step.py, resuming in test_resume.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distilling import head_bytes, lines, prepare, unpack, write_responses
from family_cases import ALL, GENERIC, OWN, slow_but
from helpers import tiny_backbone
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from oracles import head_for
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.evaluation.losslessness import teacher_forced
from pipeline.generation.documents import Document, read_documents, read_manifest
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.sampling import Sampler
from pipeline.runs.wandb_settings import wandb_mode
from pipeline.stages import distill
from pipeline.training import packing
from pipeline.training.load_sharded import load_sharded_backbone
from pipeline.training.sharding import shard_step_model
from pipeline.training.step_model import StepModel

PASSES = "distill.sequences_per_pass=1"  # two a step
UNDISTURBED = [PASSES]


# ---- what is learned


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def stepping(tmp_path: Path, folder: Path, mesh):
    """(the model, its step model with heads at N = 1 and 2, these heads, the documents of the responses)."""
    run = prepare(tmp_path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    backbone, heads = load_sharded_backbone(run.config.backbone, torch.device("cpu"), mesh, fingerprint(model), [1, 2])
    step_model = StepModel(backbone, [1, 2], heads, run.config)
    shard_step_model(step_model, heads, mesh)
    documents, _ = read_documents(run / "responses", read_manifest(run / "responses"), "drop", 0.5)
    return model, step_model, heads, documents


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("family", slow_but([*OWN, "gemma3_text", "granite", "gpt_oss"], ALL))
def test_packed_losses_and_gradients_equal_those_of_documents_alone(tmp_path, mesh, family, turns):
    """Compares every position, the sum over each answer and the gradient, through the StepModel that trains."""
    fields = {"sliding_window": 16} if family == "mistral" else {"tie_word_embeddings": family == "qwen3"}
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, **GENERIC.get(family, fields))
    write_responses(tmp_path / "run" / "responses", folder, turns=turns)
    _, step_model, heads, documents = stepping(tmp_path, folder, mesh)
    assert [len(d.spans) for d in documents] == [turns] * 24
    together = packing.pack(documents, 48 * turns)
    assert len(together) < len(documents) / 1.8

    # The order in which the documents lie in the sequences is the order to take them alone in.
    lies = {tuple(ids.tolist()): i for i, (ids, *_) in enumerate(unpack(together, range(len(together))))}
    documents.sort(key=lambda d: lies[tuple(d.tokens)])
    whole = [together[range(len(together))]]
    alone = [packing.pack([d], len(d.tokens))[[0]] for d in documents]
    # Each answer once more as one turn alone: what its row of the responses would teach if nothing were joined.
    answers = [Document(d.id, d.tokens[: span[1]], [span]) for d in documents for span in d.spans]
    turns_alone = [packing.pack([a], len(a.tokens))[[0]] for a in answers]

    def losses_and_gradient(batches):
        step_model.zero_grad()
        total = torch.zeros(2)
        for batch in batches:
            losses = step_model(batch["ids_BT"], batch["positions_BT"], batch["mask_BT"], 1.0)
            losses.sum().backward()
            total += losses.detach()
        return total, torch.cat([p.grad.full_tensor().flatten() for h in heads for p in h.parameters()])

    @torch.no_grad()
    def losses_by_position(batches):
        found = [step_model(b["ids_BT"], b["positions_BT"], b["mask_BT"], statistics=True)[0]["loss"] for b in batches]
        return torch.cat(found, 1)

    losses, gradient = losses_and_gradient(whole)
    expected, expected_gradient = losses_and_gradient(alone)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)
    losses_HR = losses_by_position(whole)
    torch.testing.assert_close(losses_HR, losses_by_position(alone), rtol=1e-5, atol=1e-5)
    lengths = [end - start for a in answers for start, end in a.spans]
    sums, expected_sums = (
        torch.stack([part.sum(1) for part in found.split(lengths, 1)])
        for found in (losses_HR, losses_by_position(turns_alone))
    )
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.sum(0), losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", slow_but(["llama", "gemma2", "granite", "cohere2", "gpt_oss", "seed_oss"], ALL))
def test_the_loss_is_that_of_the_laws_that_decoding_drafts_and_verifies_with(tmp_path, mesh, family):
    """Scales and caps of logits, windows and experts, and no dropout (that of Seed-OSS's config is 0.1): what training
    minimises is the KL divergence of decoding."""
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, **GENERIC.get(family, {}))
    write_responses(tmp_path / "run" / "responses", folder)
    model, step_model, _, documents = stepping(tmp_path, folder, mesh)
    engines = [SplitBackbone(model, head_for(model, n)) for n in (1, 2)]  # heads start as the last layer in both
    for document in documents[:4]:
        batch = packing.pack([document], len(document.tokens))[[0]]
        ((start, end),) = document.spans
        with torch.no_grad():
            losses = step_model(batch["ids_BT"], batch["positions_BT"], batch["mask_BT"], 1.0)
        for engine, loss in zip(engines, losses.tolist(), strict=True):
            ids = list(document.tokens)
            with torch.inference_mode():
                p_TV, q_TV = teacher_forced(engine, ids[:start], ids[start:end], Sampler(1.0))
            assert loss == pytest.approx(float((p_TV * (p_TV / q_TV).log()).sum()), rel=1e-4) and loss > 0.1


def test_the_last_possible_exit_layer_starts_as_the_backbone_itself(tmp_path, backbone):
    """The head of exit layer L - 1 starts as a copy of layer L, so with it the model is the backbone."""
    run = prepare(tmp_path, backbone, "distill.exit_layers=[3]", "distill.max_steps=1")
    distill.run(run)
    before = json.loads((run / "run.json").read_text())[-1]["heads"]["exit-3"]["before"]
    assert before["loss"] == pytest.approx(0, abs=1e-6) and before["overlap"] == pytest.approx(1, abs=1e-6)
    assert before["match"] == 1


def test_heads_trained_together_equal_heads_trained_alone(tmp_path, undisturbed, backbone):
    for exit_layer in (1, 2):
        run = prepare(tmp_path / str(exit_layer), backbone, PASSES, f"distill.exit_layers=[{exit_layer}]")
        distill.run(run)
        assert head_bytes(run, f"exit-{exit_layer}") == head_bytes(undisturbed, f"exit-{exit_layer}")


def test_what_is_left_out_is_said_and_recorded(tmp_path, backbone, capsys):
    """The conversations have three turns; in some the last does not fit, and a fourth of the answers is truncated."""
    write_responses(tmp_path / "run" / "responses", backbone, turns=3, reasons=["stop", "stop", "stop", "length"])
    run = prepare(tmp_path, backbone, "distill.max_steps=1", "distill.exit_layers=[1]")
    distill.run(run)
    found = json.loads((run / "run.json").read_text())[-1]["responses"]
    too_long = found["too_long"]
    assert 0 < too_long < 18
    counts = {"answers": 72, "truncated": 18, "repeating": 0, "joined": 48, "alone": 0}
    assert found == counts | {"too_long": too_long, "learned": 54 - too_long, "documents": 24}
    line = (
        f"distill: {54 - too_long} of 72 responses in 24 documents; left out: 18 truncated, 0 repeating, "
        f"{too_long} too long; of 48 later turns 48 joined to the turn before, 0 stand alone\n"
    )
    assert line in capsys.readouterr().out


def test_what_a_run_leaves_behind(undisturbed, backbone, capsys):
    summary = json.loads((undisturbed / "run.json").read_text())[-1]
    assert summary["responses"]["learned"] == summary["responses"]["answers"] == summary["responses"]["documents"] == 24
    by_step = {line["step"]: line for line in lines(undisturbed) if "val/exit-1/loss" in line}
    assert list(by_step) == [0, 4, 8, 9]
    for name, n in (("exit-1", 1), ("exit-2", 2)):
        key = f"val/{name}/expected_acceptance_length"
        best = summary["heads"][name]
        assert best["expected_acceptance_length"] == max(line[key] for line in by_step.values())
        assert by_step[best["best_step"]][key] == best["expected_acceptance_length"]
        assert best["before"]["loss"] == by_step[0][f"val/{name}/loss"]
        assert best["expected_acceptance_length"] >= best["before"]["expected_acceptance_length"]
        head = ExitHead.load(undisturbed / "heads" / name)
        head.check_fits(AutoModelForCausalLM.from_pretrained(backbone))
        assert (head.exit_layer, head.num_layers) == (n, 4)
        assert {w.dtype for w in head.weights.values()} == {torch.float32}
    assert summary["tokens_per_second"] > 0 and summary["step_over_teacher"] > 1
    assert summary["train_response_tokens"] < summary["train_tokens"]
    saved = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    assert saved == ["step-00000006.ckpt", "step-00000009.ckpt"]
    state = torch.load(undisturbed / "checkpoints" / saved[0], weights_only=True)["state_dict"]
    assert state and not any("backbone" in name for name in state)
    distill.run(undisturbed)
    assert "done already" in capsys.readouterr().out


def test_the_loss_is_the_weighted_sum_of_the_terms_that_the_config_names(tmp_path, backbone):
    def first_loss(number: int, *terms: str) -> float:
        words = (f"distill.loss=[{','.join(terms)}]", "distill.temperature=2", "distill.max_steps=1")
        run = prepare(tmp_path / str(number), backbone, "distill.exit_layers=[1]", *words)
        distill.run(run)
        return next(line["train/exit-1/loss"] for line in lines(run) if "learning_rate" in line)

    kl, tvd = first_loss(0, "kl"), first_loss(1, "tvd")
    assert kl != pytest.approx(tvd, rel=0.1)
    assert first_loss(2, "0.5*kl", "3*tvd") == pytest.approx(0.5 * kl + 3 * tvd, rel=1e-5)


# ---- wrong inputs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.exit_layers=[4]"], "from 1 to 3"),
        (["distill.sequence_length=2"], "sequence_length=2"),
        (["machine.processes_per_node=3"], "multiple of the 3 processes"),
        (["machine.nodes=2"], "srun or torchrun"),
        (["distill.loss=[kll]"], "no term 'kll'. Did you mean kl?"),
        (["machine.processes_per_node=2", "machine.shard_degree=3"], "shard_degree=3: does not divide the 2"),
    ],
)
def test_mistakes_leave_the_stage_unmarked(tmp_path, backbone, words, message):
    run = prepare(tmp_path, backbone, *words)
    with pytest.raises(UserError, match=message):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()


def test_a_process_whose_others_do_not_come_names_them_and_leaves_the_stage_unmarked(tmp_path, backbone, monkeypatch):
    run = prepare(tmp_path, backbone, "machine.nodes=2", "machine.timeout=1")
    variables = {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_network_port()}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(UserError, match="rank 1 of 2 did not come within 1 s"):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()
    assert "rank 1 of 2 did not come" in (run / "logs" / "distill-rank-00000.log").read_text()


def test_a_damaged_checkpoint_leaves_the_stage_unmarked(tmp_path, backbone):
    copy = Path(shutil.copytree(backbone, tmp_path / "copy"))
    run = prepare(tmp_path, copy)
    (copy / "model.safetensors").write_bytes((backbone / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: was cut short"):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()


def test_nothing_but_truncated_responses_leaves_the_stage_unmarked(tmp_path, backbone):
    write_responses(tmp_path / "run" / "responses", backbone, reasons=["length"])
    run = prepare(tmp_path, backbone)
    with pytest.raises(UserError, match=r"distill\.truncated=drop.*of 24 responses 24 are truncated.*truncated=keep"):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()


def test_responses_of_another_backbone_are_refused(tmp_path, backbone):
    run = prepare(tmp_path, backbone)
    manifest = json.loads((run / "responses" / "manifest.json").read_text())
    manifest["backbone"]["fingerprint"] = "0" * 64
    (run / "responses" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint"):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()


# ---- Weights & Biases


def test_wandb_is_online_only_with_a_key(config, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(config.wandb) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert wandb_mode(config.wandb) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(config.wandb) == "online"
    config.wandb.mode = "disabled"
    assert wandb_mode(config.wandb) == "disabled"


def test_wandb_offline_writes_inside_the_run_folder_only(tmp_path, backbone, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    run = prepare(tmp_path, backbone, "wandb.mode=auto", "distill.max_steps=2", "distill.exit_layers=[1]")
    distill.run(run)
    assert list((run / "wandb").rglob("offline-run-*/*.wandb"))
    assert not any(home.iterdir())
