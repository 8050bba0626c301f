"""The distill stage against a plain training loop, against being killed, and against wrong inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from helpers import tiny_backbone
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.inference.exit_head import ExitHead, fingerprint, new_exit_layer
from pipeline.rundir import RunDir, sha256_of
from pipeline.stages import distill
from pipeline.tracking import wandb_mode
from pipeline.training import data
from pipeline.training.callbacks import newest_readable
from pipeline.training.loading import load_sharded_backbone
from pipeline.training.losses import plain_loss
from pipeline.training.module import Distillation, Engine, learning_rate_at
from pipeline.training.sharding import shard_engine

STEPS = 9
WORDS = f"""distill.exit_layers=[1,2] distill.max_steps={STEPS} distill.sequence_length=48 distill.warmup_steps=2
    distill.sequences_per_step=2 distill.validate_every=4 distill.checkpoint_every=3 distill.loss_chunk=16
    distill.held_out=0.2 distill.learning_rate=1e-2 backbone.dtype=float32 machine.device=cpu machine.threads=1
    wandb.mode=disabled""".split()


def write_responses(
    folder: Path, backbone: Path, count: int = 24, turns: int = 1, reasons: Sequence[str] = ("stop",)
) -> None:
    """Random prompts and responses, as `generate` lays them out; of conversations, each turn continues the last.

    They end for `reasons` in turn.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest, (), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    rows = []
    for i in range(count):
        said: list[int] = []
        for turn in range(1, turns + 1):
            prompt, response = said + tokens(3, 10), tokens(4, 20)
            id_ = f"p-{i}" if turn == 1 else f"p-{i}.{turn}"
            reason = reasons[len(rows) % len(reasons)]
            rows.append({"id": id_, "prompt_ids": prompt, "response_ids": response, "finish_reason": reason})
            said = prompt + response
    half = len(rows) // 2
    folder.mkdir(parents=True)
    shards = []
    for number, part in enumerate((rows[:half], rows[half:])):
        path = folder / f"shard-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path)
        shards.append({"file": path.name, "rows": len(part), "sha256": sha256_of(path)})
    identity = {"name": "tiny", "revision": None, "model_type": "llama",
                "fingerprint": fingerprint(AutoModelForCausalLM.from_pretrained(backbone))}  # fmt: skip
    manifest = {"shards": shards, "complete": True, "backbone": identity, "sampling": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), sharpness=4.0)


def prepare(folder: Path, backbone: Path, *words: str) -> RunDir:
    run = RunDir(load(None, [f"run.dir={folder}", "run.name=run", f"backbone.name_or_path={backbone}", *WORDS, *words]))
    if not (run / "responses").exists():
        write_responses(run / "responses", backbone)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, backbone) -> RunDir:
    run = prepare(tmp_path_factory.mktemp("undisturbed"), backbone)
    distill.run(run)
    return run


def head_bytes(run: RunDir, name: str) -> bytes:
    return (run / "heads" / name / "model.safetensors").read_bytes()


def lines(run: RunDir) -> list[dict]:
    timing = ("tokens_per_second", "step_over_teacher")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in found]


# ---- what is learned


def test_losses_and_heads_equal_a_plain_training_loop(undisturbed, backbone):
    """No FSDP, no Lightning, no packing, full logits: one document at a time, one head at a time."""
    model = AutoModelForCausalLM.from_pretrained(backbone).requires_grad_(False)
    d = undisturbed.config.distill
    manifest = data.read_manifest(undisturbed / "responses")
    documents, _ = data.read_documents(undisturbed / "responses", manifest, d.truncated, d.repeated_share)
    documents = data.usable(documents, d.sequence_length)
    train, _ = data.split(documents, d.held_out)
    packed = data.pack(train, d.sequence_length)
    for exit_layer in d.exit_layers:
        head = new_exit_layer(model)
        optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        losses = []
        for step, batch in enumerate(data.StepBatches(len(packed), 2, STEPS, 0)):
            total, rows = 0.0, 0
            for tokens, start, end in unpack(packed, batch):
                hidden = model.model(tokens[None], output_hidden_states=True, use_cache=False).hidden_states
                at = torch.arange(len(tokens))[None]
                drafted = head(hidden[exit_layer], position_embeddings=model.model.rotary_emb(hidden[0], at))
                student = model.model.norm(drafted)[0, start:end]
                teacher = hidden[-1][0, start:end]
                total = total + plain_loss(model.lm_head.weight, teacher, {"kl": 1.0}, 1.0, 1.0, [student]).sum()
                rows += end - start
            losses.append((total / rows).item())
            optimizer.zero_grad()
            (total / rows).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), d.clip_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, d.learning_rate, d.warmup_steps, STEPS)
            optimizer.step()
        logged = [line[f"train/exit-{exit_layer}/loss"] for line in lines(undisturbed) if "learning_rate" in line]
        assert logged == pytest.approx(losses, rel=2e-5)
        assert losses[-1] < losses[0]


def test_the_loss_is_the_weighted_sum_of_the_terms_that_the_config_names(tmp_path, backbone):
    def first_loss(number: int, *terms: str) -> float:
        words = (f"distill.loss=[{','.join(terms)}]", "distill.temperature=2", "distill.max_steps=1")
        run = prepare(tmp_path / str(number), backbone, "distill.exit_layers=[1]", *words)
        distill.run(run)
        return next(line["train/exit-1/loss"] for line in lines(run) if "learning_rate" in line)

    kl, tvd = first_loss(0, "kl"), first_loss(1, "tvd")
    assert kl != pytest.approx(tvd, rel=0.1)
    assert first_loss(2, "0.5*kl", "3*tvd") == pytest.approx(0.5 * kl + 3 * tvd, rel=1e-5)


def unpack(packed: data.Packed, batch: Sequence[int]):
    """(tokens, first and one past the last place that is learned from) of every document of these sequences."""
    for s in batch:
        length = int(packed.lengths_S[s])
        starts = [t for t in range(length) if packed.positions_ST[s, t] == 0]
        for start, end in pairwise([*starts, length]):
            learned = packed.mask_ST[s, start:end].nonzero().squeeze(1)
            yield packed.ids_ST[s, start:end].long(), int(learned[0]), int(learned[-1]) + 1


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_packed_losses_and_gradients_equal_those_of_documents_alone(tmp_path, mesh, family, turns):
    """Every position, the sum over each answer and the gradient, through the Engine that trains."""
    fields = {"sliding_window": 16} if family == "mistral" else {"tie_word_embeddings": family == "qwen3"}
    folder = tiny_backbone(tmp_path, family, sharpness=4.0, **fields)
    write_responses(tmp_path / "run" / "responses", folder, turns=turns)
    run = prepare(tmp_path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    backbone, heads = load_sharded_backbone(run.config.backbone, torch.device("cpu"), mesh, fingerprint(model), [1, 2])
    engine = Engine(backbone, [1, 2], heads, run.config)
    shard_engine(engine, heads, mesh)
    documents, _ = data.read_documents(run / "responses", data.read_manifest(run / "responses"), "drop", 0.5)
    assert [len(d.spans) for d in documents] == [turns] * 24
    together = data.pack(documents, 48 * turns)
    assert len(together) < len(documents) / 1.8

    # The order in which the documents lie in the sequences is the order to take them alone in.
    lies = {tuple(ids.tolist()): i for i, (ids, *_) in enumerate(unpack(together, range(len(together))))}
    documents.sort(key=lambda d: lies[tuple(d.tokens)])
    whole = [together[range(len(together))]]
    alone = [data.pack([d], len(d.tokens))[[0]] for d in documents]
    # Each answer once more as one turn alone: what its row of the responses would teach if nothing were joined.
    answers = [data.Document(d.id, d.tokens[: span[1]], [span]) for d in documents for span in d.spans]
    turns_alone = [data.pack([a], len(a.tokens))[[0]] for a in answers]

    def losses_and_gradient(batches):
        engine.zero_grad()
        total = torch.zeros(2)
        for batch in batches:
            losses = engine(batch["ids_BT"], batch["positions_BT"], batch["mask_BT"], 1.0)
            losses.sum().backward()
            total += losses.detach()
        return total, torch.cat([p.grad.full_tensor().flatten() for h in heads for p in h.parameters()])

    @torch.no_grad()
    def losses_by_position(batches):
        found = [engine(b["ids_BT"], b["positions_BT"], b["mask_BT"], statistics=True)[0]["loss"] for b in batches]
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


def test_the_last_possible_exit_layer_starts_as_the_backbone_itself(tmp_path, backbone):
    """Copied from layer L and fed the hidden state after layer L - 1, the head is what it copies."""
    run = prepare(tmp_path, backbone, "distill.exit_layers=[3]", "distill.max_steps=1")
    distill.run(run)
    before = json.loads((run / "run.json").read_text())[-1]["heads"]["exit-3"]["before"]
    assert before["loss"] == pytest.approx(0, abs=1e-6) and before["overlap"] == pytest.approx(1, abs=1e-6)
    assert before["match"] == 1


def test_heads_trained_together_equal_heads_trained_alone(tmp_path, undisturbed, backbone):
    for exit_layer in (1, 2):
        run = prepare(tmp_path / str(exit_layer), backbone, f"distill.exit_layers=[{exit_layer}]")
        distill.run(run)
        assert head_bytes(run, f"exit-{exit_layer}") == head_bytes(undisturbed, f"exit-{exit_layer}")


def test_what_is_left_out_is_said_and_recorded(tmp_path, backbone, capsys):
    """Conversations of three turns, of which the last has no room in some, and a fourth of the answers cut off."""
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


# ---- killed, stopped, resumed

DIES = """
    import os, signal, sys
    from pipeline.config import load
    from pipeline.rundir import RunDir
    from pipeline.stages import distill
    from pipeline.training.module import Distillation
    at = int(sys.argv[1])
    plain = Distillation.training_step
    def step(self, batch, index):
        loss = plain(self, batch, index)
        if self.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss
    Distillation.training_step = step
    distill.run(RunDir(load(None, sys.argv[2:])))
"""


def kill_at(step: int, run: RunDir, backbone: Path) -> subprocess.CompletedProcess:
    words = [f"run.dir={run.path.parent}", "run.name=run", f"backbone.name_or_path={backbone}", *WORDS]
    command = [sys.executable, "-c", textwrap.dedent(DIES), str(step), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def assert_same(run: RunDir, other: RunDir) -> None:
    for name in ("exit-1", "exit-2"):
        assert head_bytes(run, name) == head_bytes(other, name)
    assert lines(run) == lines(other)
    mine, theirs = (json.loads((r / "run.json").read_text())[-1] for r in (run, other))
    assert mine["heads"] == theirs["heads"] and mine["train_tokens"] == theirs["train_tokens"]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, undisturbed, backbone):
    run = prepare(tmp_path, backbone)
    killed = kill_at(7, run, backbone)
    assert killed.returncode == -9, killed.stderr
    assert newest_readable(run / "checkpoints").name == "step-00000006.ckpt" and not (run / "heads").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # what a kill may leave
    distill.run(run)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_the_run_goes_on(
    tmp_path, undisturbed, backbone, monkeypatch, capsys, number
):
    run = prepare(tmp_path, backbone)
    plain = Distillation.training_step

    def step(self, batch, index):
        if self.global_step == 4:
            os.kill(os.getpid(), number)
        return plain(self, batch, index)

    monkeypatch.setattr(Distillation, "training_step", step)
    handler = signal.getsignal(number)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            distill.run(run)
    else:
        with pytest.raises(SystemExit) as ended:
            distill.run(run)
        assert ended.value.code == 128 + number
    monkeypatch.undo()
    assert f"{number.name}: saved" in capsys.readouterr().out and not (run / "heads").exists()
    assert newest_readable(run / "checkpoints").name == "step-00000005.ckpt"
    assert signal.getsignal(number) == handler
    distill.run(run)
    assert_same(run, undisturbed)


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path, undisturbed, backbone, monkeypatch, capsys):
    """As if killed after the last checkpoint, which is then cut off: on from the one before; and with it whole, too."""
    run = prepare(tmp_path, backbone)
    monkeypatch.setattr(distill, "save_heads", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill.run(run)
    monkeypatch.undo()
    distill.run(run)
    assert_same(run, undisturbed)
    (run / "stages" / "distill.json").unlink()
    newest = run / "checkpoints" / "step-00000009.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    distill.run(run)
    assert "cannot be read" in capsys.readouterr().err
    assert_same(run, undisturbed)


# ---- wrong inputs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.exit_layers=[4]"], "from 1 to 3"),
        (["distill.sequence_length=2"], "sequence_length=2"),
        (["machine.processes_per_node=3"], "multiple of the 3 processes"),
        (["machine.nodes=2"], "srun or torchrun"),
        (["machine.processes_per_node=2", "machine.shard_degree=3"], "shard_degree=3: does not divide the 2"),
        (["distill.loss=[kll]"], "no term 'kll'. Did you mean kl?"),
    ],
)
def test_mistakes_leave_the_stage_unmarked(tmp_path, backbone, words, message):
    run = prepare(tmp_path, backbone, *words)
    with pytest.raises(UserError, match=message):
        distill.run(run)
    assert not (run / "stages" / "distill.json").exists()


def test_a_damaged_checkpoint_leaves_the_stage_unmarked(tmp_path, backbone):
    copy = Path(shutil.copytree(backbone, tmp_path / "copy"))
    run = prepare(tmp_path, copy)
    (copy / "model.safetensors").write_bytes((backbone / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
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


# ---- more than one process


@pytest.mark.slow
@pytest.mark.parametrize("shard_degree", [0, 1])
def test_two_processes_learn_what_one_does(tmp_path, undisturbed, backbone, shard_degree):
    run = prepare(tmp_path, backbone, "machine.processes_per_node=2", f"machine.shard_degree={shard_degree}")
    distill.run(run)
    for ours, theirs in zip(lines(run), lines(undisturbed), strict=True):
        # Sums in another order: a last-bit difference, which Adam's division makes larger as steps go by.
        assert ours == pytest.approx(theirs, rel=1e-6 if ours["step"] <= 1 else 1e-5)
    for name in ("exit-1", "exit-2"):
        theirs = load_file(undisturbed / "heads" / name / "model.safetensors")
        for key, weight in load_file(run / "heads" / name / "model.safetensors").items():
            torch.testing.assert_close(weight, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_cached_teacher_teaches_the_same(tmp_path, family: str) -> None:
    """Losses and heads of teacher=cached are those of online, on packed sequences of several documents."""
    window = {"sliding_window": 8} if family == "mistral" else {}
    backbone = tiny_backbone(tmp_path, family, sharpness=4.0, **window)
    runs = []
    for teacher in ("online", "cached"):
        run = prepare(tmp_path / teacher, backbone, f"distill.teacher={teacher}")
        distill.run(run)
        runs.append(run)
    losses = [[line["train/exit-2/loss"] for line in lines(run) if "learning_rate" in line] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    online, cached = (load_file(run / "heads" / "exit-2" / "model.safetensors") for run in runs)
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-3, atol=1e-4)
