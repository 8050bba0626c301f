"""slurm/distill.sh: what it would submit, what it does without Slurm, and, on a real Slurm of two nodes, the whole
pipeline: arrays, dependencies, refusals, failures, signals, and a node whose power fails."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from helpers import make_run
from omegaconf import OmegaConf
from slurm_cluster import NODES, Cluster
from wandb_records import lines, rows, segments

from pipeline.config import load, to_dict
from pipeline.planning.architecture import facts
from pipeline.runs import folder as rundir
from pipeline.runs.folder import RunDir
from pipeline.stages.plan import make

STAGES = tuple(name for name in rundir.STAGES if name not in ("cache", "pilot"))
CACHED = ("generate", "cache", "distill", "evaluate", "publish")
"""Of a teacher that is online."""

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "slurm" / "distill.sh"
LARGE = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if load(p, []).backbone.name_or_path in facts()]
KNOBS = {"EH_SETUP": ":", "EH_CPUS": "1", "EH_TIME": "30"}


def environment(**more: str) -> dict[str, str]:
    """That of this process without knobs of its own, and with this interpreter's exit-heads on the PATH."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("EH_", "SLURM_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return plain | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | KNOBS | more


def bash(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=900)


def config_file(run: RunDir) -> Path:
    file = run.path.parent.parent / "my config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run.config))))
    return file


# ---- what it would do


def dry(folder: Path, *words: str, **more: str) -> list[list[str]]:
    done = bash(folder, "--dry-run", *words, **more)
    assert done.returncode == 0, done.stderr
    assert not any(folder.iterdir()), "nothing is written"
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flags(command: list[str]) -> dict[str, str]:
    """Of sbatch, and what it was given behind them, under ''."""
    end = command.index("--stage") - 1
    found = dict(word.lstrip("-").partition("=")[::2] for word in command[1:end])
    return found | {"": command[end + 1 :]}


def test_the_chain_that_would_be_submitted(tmp_path: Path) -> None:
    words = ["run.name=my run", "distill.exit_layers=[1,2]", 'evaluate.controllers=["thompson","fixed:2"]']
    generate, distill, evaluate, publish = map(flags, dry(tmp_path, *words))
    for name, stage in zip(STAGES, (generate, distill, evaluate, publish), strict=True):
        assert stage[""][:3] == ["--stage", name, "runs/my run"] and stage[""][3:6] == words
        assert stage["job-name"] == f"my run-{name}" and stage["kill-on-invalid-dep"] == "yes"
        assert {"requeue", "open-mode"} <= stage.keys() and stage["output"].startswith(f"runs/my run/logs/{name}-")
    assert generate["array"] == "0-0" and "dependency" not in generate
    assert distill["dependency"] == "afterok:<job of generate>,singleton"
    assert publish["dependency"] == "afterok:<job of evaluate>,singleton"
    assert "signal" in generate and "signal" in distill and "signal" not in evaluate, "evaluate begins anew"


def test_a_cached_teacher_has_a_stage_of_its_own(tmp_path: Path) -> None:
    stages = [flags(command)[""][1] for command in dry(tmp_path, "distill.teacher=cached")]
    assert stages == [*CACHED]


def test_the_pilot_has_a_stage_of_its_own(tmp_path: Path) -> None:
    commands = [*map(flags, dry(tmp_path, "distill.teacher=cached", "distill.exit_layers=auto", EH_PILOT_GPUS="2"))]
    assert [command[""][1] for command in commands] == ["generate", "cache", "pilot", "distill", "evaluate", "publish"]
    pilot, distill = commands[2:4]
    assert pilot["dependency"] == "afterok:<job of cache>,singleton" and pilot["gpus-per-node"] == "2"
    assert distill["dependency"] == "afterok:<job of pilot>,singleton"


def test_knobs_reach_the_stages_they_are_for(tmp_path: Path) -> None:
    knobs = {"EH_ARRAY": "16%4", "EH_NODES": "4", "EH_GPUS": "h100:8", "EH_MEM": "64G", "EH_DISTILL_MEM": "0",
             "EH_ACCOUNT": "me", "EH_EVALUATE_PARTITION": "short", "EH_SBATCH": '--exclude=n3 --comment="two words"',
             "EH_SAVE": "300"}  # fmt: skip
    generate, distill, evaluate, publish = map(flags, dry(tmp_path, **knobs))
    assert generate["array"] == "0-15%4" and generate["gpus-per-node"] == "h100:1" and generate["signal"] == "USR1@300"
    assert (distill["nodes"], distill["ntasks-per-node"], distill["gpus-per-node"]) == ("4", "8", "h100:8")
    assert distill[""][-2:] == ["machine.nodes=4", "machine.processes_per_node=8"]
    assert (generate["mem"], distill["mem"], publish["mem"]) == ("64G", "0", "64G")
    assert evaluate["partition"] == "short" and "partition" not in distill
    assert evaluate["gpus-per-node"] == publish["gpus-per-node"] == "h100:1"
    assert all(
        s["account"] == "me" and s["exclude"] == "n3" and s["comment"] == "two words" for s in (generate, publish)
    )


def test_the_config_says_how_many_nodes_unless_a_knob_does(tmp_path: Path) -> None:
    words = ["machine.nodes=3", "machine.processes_per_node=2", "machine.device=cpu"]
    assert flags(dry(tmp_path, *words)[1])["nodes"] == "3"
    distill = flags(dry(tmp_path, *words, EH_NODES="5")[1])
    assert distill["nodes"] == "5" and distill["ntasks-per-node"] == "2" and distill[""][-2] == "machine.nodes=5"


@pytest.mark.parametrize(
    ("words", "knobs", "processes"),
    [
        ([], {"EH_GPUS": "8"}, "8"),
        ([], {"EH_DISTILL_GPUS": "h100:8"}, "8"),
        ([], {"EH_GPUS": "8", "EH_DISTILL_GPUS": "4"}, "4"),
        ([], {"EH_PROCESSES": "2"}, "2"),
        ([], {"EH_GPUS": "8", "EH_PROCESSES": "2"}, "2"),
        (["machine.device=cpu"], {}, "4"),
    ],
)
def test_a_process_for_each_gpu(tmp_path: Path, words: list[str], knobs: dict[str, str], processes: str) -> None:
    distill = flags(dry(tmp_path, "machine.processes_per_node=4", *words, **knobs)[1])
    assert distill["ntasks-per-node"] == processes and distill[""][-1] == f"machine.processes_per_node={processes}"


def commands_of(config: Path) -> list[str]:
    """Those for this script that stand in a config's comments, each made one line."""
    comments = "\n".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))
    return re.findall(r"^(?:EH_\S+ )+bash slurm/distill\.sh .*", comments.replace("\\\n", ""), re.M)


@pytest.mark.parametrize("config", LARGE, ids=lambda p: p.stem)
def test_the_command_in_a_large_config_asks_for_what_is_planned(config: Path) -> None:
    """As it stands there: GPUs of each stage, of the kind and number that exit-heads plan says."""
    (command,) = commands_of(config)
    assert f" --config configs/{config.name}" in command
    done = subprocess.run(["bash", "-c", f"{command} --dry-run"], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = {line[line.index("--stage") + 1]: flags(line) for line in map(shlex.split, done.stdout.splitlines())}
    p = make(load(config, []))
    gpus = {name: int(stage["gpus-per-node"]) for name, stage in stages.items()}
    evaluate = p.gpus_of(p.evaluate)
    assert gpus == {"generate": p.gpus_of(p.generate), "distill": p.layout.per_node, "evaluate": evaluate,
                    "publish": evaluate}  # fmt: skip
    distill = stages["distill"]
    assert int(distill["nodes"]) * int(distill["ntasks-per-node"]) == p.layout.processes


SEVERAL = [p for p in LARGE if load(p, []).machine.processes_per_node > 1]


@pytest.mark.parametrize("config", SEVERAL, ids=lambda p: p.stem)
def test_a_config_for_gpus_is_refused_without(config: Path, tmp_path: Path) -> None:
    done = bash(tmp_path, "--dry-run", "--config", str(config))
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"machine\.processes_per_node=(\d): .* EH_GPUS=\1, or give machine\.device=cpu", done.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.max_step=3"], "Did you mean distill.max_steps?"),
        (["--redo", "distill"], "give another run.name"),
        (["-N", "4"], "flags of sbatch go before it"),
        (["--config", "nowhere.yaml"], "no such file"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(tmp_path: Path, words: list[str], message: str) -> None:
    done = bash(tmp_path, *words, "--dry-run")
    assert done.returncode == 2 and message.lower() in done.stderr.lower() and not done.stdout
    assert not any(tmp_path.iterdir())


def test_without_slurm_the_stages_run_in_turn_until_one_fails(tmp_path: Path) -> None:
    """A program of the same name tells how it was called."""
    program = tmp_path / "bin" / "exit-heads"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\ncase $1 in run) exec {sys.executable} -m pipeline "$@" ;; publish) exit 3 ;; esac\n'
        'printf "%s|" "$@"; echo\n'
    )
    program.chmod(0o755)
    words = ["run.name=my run", "distill.exit_layers=[1,2]"]
    path = f"{program.parent}:/usr/bin:/bin"
    done = bash(tmp_path, "--local", *words, PATH=path)
    assert done.returncode == 3 and "stage publish ended with 3" in done.stderr
    assert done.stdout.splitlines() == [f"{stage}|{'|'.join(words)}|" for stage in STAGES[:-1]]


# ---- the job of a stage, with an srun that ends as told


@pytest.mark.parametrize(
    ("ends", "again"),
    [
        ("138+ 138+ 138+ 75 143 75+ 143 143 143", 9),  # a more urgent job is never the job's own fault
        ("75 75 75", 2),  # the same process each time, for want of memory
        ("138 138 138", 2),
        ("138 138 138+ 138 138", 4),
        ("138 75+ 138 138 138", 3),
        ("75 143 138 138", 3),
        ("2", 0),
        ("137", 0),
    ],
)
def test_a_job_is_given_up_when_its_time_brings_nothing(tmp_path: Path, ends: str, again: int) -> None:
    """`ends`: of each start the exit code, with + if it had got any further. `again`: how many were started again."""
    folder, tools, asked = tmp_path / "my run", tmp_path / "bin", tmp_path / "asked"
    (folder / "logs").mkdir(parents=True)
    tools.mkdir()
    programs = {
        "srun": 'echo said >>"$RUN/logs/distill.log"; [ -z "$FURTHER" ] || mktemp "$RUN/saved-XXXXXX"; exit "$CODE"',
        "scontrol": f'case $1 in show) echo "JobId=7 PreemptTime=2026" ;; *) echo "$*" >>{asked} ;; esac',
    }
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "RUN": str(folder)}
    for i, end in enumerate(ends.split()):
        code = end.rstrip("+")
        told = {"CODE": code, "FURTHER": end[len(code) :], "SLURM_RESTART_COUNT": str(i)}
        done = bash(tmp_path, "--stage", "distill", str(folder), "seed=1", **job, **told)
        assert done.returncode == int(code), done.stderr
    assert (asked.read_text().splitlines() if asked.exists() else []) == ["requeue 7"] * again
    given_up = again < len(ends.split()) and code in ("138", "75")
    assert ("at the same place three times" in done.stderr) == given_up


# ---- a real Slurm

slurm = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment = environment(SLURM_CONF=cluster.environment["SLURM_CONF"])
        yield cluster


class Chain:
    """The jobs that one call of the script submitted, by stage."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, **more: str):
        self.cluster = cluster
        command = ["sbatch", "--parsable", "--chdir", str(folder), str(SCRIPT), *words]
        done = subprocess.run(command, env=cluster.environment | more, capture_output=True, text=True, check=True)
        job = done.stdout.strip()
        state = cluster.wait(job, "COMPLETED", "FAILED")["JobState"]
        self.said = (folder / f"exit-heads-{job}.log").read_text()
        assert state == "COMPLETED", self.said
        self.jobs = {stage: id_ for id_, stage in re.findall(r"^(\d+) +(\w+) ", self.said, re.M)}

    def __getitem__(self, stage: str) -> str:
        return self.jobs[stage]

    def end(self, stage: str, seconds: float = 900) -> list[dict[str, str]]:
        """The tasks of a stage when all are over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        tasks = lambda: self.cluster.tasks(self.jobs[stage])  # noqa: E731
        self.cluster.until(lambda: all(t["JobState"] in over for t in tasks()), seconds, f"the end of {stage}")
        return tasks()

    def states(self) -> dict[str, set[str]]:
        return {stage: {task["JobState"] for task in self.end(stage)} for stage in self.jobs}

    def log(self, stage: str) -> str:
        files = (Path(task["StdOut"]) for task in self.cluster.tasks(self.jobs[stage]))
        return "".join(file.read_text() for file in files if file.exists())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[str]]:
    """A run on a tiny random backbone, and the words for it: with blanks and brackets in them."""
    run = make_run(tmp_path_factory.mktemp("tiny"), "run.name=a run", "wandb.mode=offline", "machine.threads=1")
    words = ["--config", str(config_file(run)), "distill.exit_layers=[1,2]", 'evaluate.controllers=["fixed:2"]']
    return run, [*words, "publish.force=true"]


class TestTiny:
    """One after another: the second begins with what the first has left."""

    pytestmark = slurm

    def test_the_whole_pipeline(self, cluster: Cluster, tiny, tmp_path: Path) -> None:
        run, words = tiny
        words = [*words, "distill.teacher=cached"]
        chain = Chain(cluster, tmp_path, *words, EH_ARRAY="2", EH_NODES="2", EH_GPUS="h100:1")
        assert list(chain.jobs) == [*CACHED]
        for stage, before in (("cache", "generate"), ("distill", "cache")):
            assert cluster.job(chain[stage])["Dependency"] == f"afterok:{chain[before]}_*(unfulfilled)"
        assert cluster.job(chain["publish"])["Dependency"].startswith(f"afterok:{chain['evaluate']}(")
        assert chain.states() == {stage: {"COMPLETED"} for stage in CACHED}, chain.log("distill")
        for stage in ("generate", "cache"):
            assert sorted(task["ArrayTaskId"] for task in cluster.tasks(chain[stage])) == ["0", "1"]
        distill = cluster.job(chain["distill"])
        assert distill["NumNodes"] == "2" and distill["NumTasks"] == "2" and distill["TresPerNode"] == "gres:gpu:h100:1"
        assert [r["stage"] for r in json.loads((run / "run.json").read_text())][-3:] == list(STAGES[1:])
        assert (run / "hub").is_dir() and len(list((run / "heads").glob("exit-*"))) == 2
        for node in NODES:
            assert re.search(rf"distill: node {node}: rank \d, CPU, 1 CPU thread each, torch", chain.log("distill"))
        for rank in range(2):
            log = (run / "logs" / f"distill-rank-{rank:05d}.log").read_text()
            assert f"rank {rank} of 2 on {NODES[rank]}" in log and log.splitlines()[-1].endswith(" end")
        for job in chain.jobs.values():
            assert job in chain.said.split("scancel ")[1].split()

    def test_a_failed_step_cancels_those_behind_it(self, cluster: Cluster, tiny, tmp_path: Path) -> None:
        _, words = tiny
        chain = Chain(cluster, tmp_path, *words, "distill.exit_layers=[9]", EH_NODES="2")
        assert chain.states() == {
            "generate": {"COMPLETED"}, "distill": {"FAILED"}, "evaluate": {"CANCELLED"}, "publish": {"CANCELLED"}
        }  # fmt: skip
        assert "generate: done already" in chain.log("generate")
        assert "was made with other values: distill.exit_layers" in chain.log("distill")
        assert cluster.job(chain["distill"])["ExitCode"] == "2:0"


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"EH_DISTILL_PARTITION": "nowhere"}, "invalid partition specified: nowhere"),
        ({"EH_DISTILL_GPUS": "9"}, "Requested node configuration is not available"),
        ({"EH_DISTILL_GPUS": "a100:1"}, "Requested node configuration is not available"),
        ({"EH_EVALUATE_SBATCH": "--nosuchflag"}, "unrecognized option '--nosuchflag'"),
    ],
    ids=["partition", "gpu-count", "gpu-kind", "flag"],
)
def test_a_refused_job_is_told_and_takes_the_chain_with_it(cluster: Cluster, tiny, tmp_path, knobs, message) -> None:
    _, words = tiny
    done = bash(tmp_path, *words, **knobs | {"SLURM_CONF": cluster.environment["SLURM_CONF"]})
    stage = next(iter(knobs)).split("_")[1].lower()
    assert done.returncode == 1 and message in done.stderr and f"stage {stage} was refused" in done.stderr
    submitted = re.search(r"cancelling what waits before it: ([\d ]+)", done.stderr).group(1).split()
    assert len(submitted) == STAGES.index(stage)
    for job in submitted:
        cluster.wait(job, "CANCELLED")


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_after_a_signal_and_a_dead_node_the_published_head_is_the_same_to_the_last_bit(cluster, tmp_path) -> None:
    """The pocket backbone, sharded over two nodes. An undisturbed run of two processes on one machine, without Slurm;
    then the same on Slurm: a task of generate is told that its time is over, then distill is, then distill has to make
    room for a more urgent job, then the node of rank 1 loses its power. All was learned, once, and W&B has it."""
    words = [
        "--config", str(ROOT / "configs" / "pocket.yaml"), f"run.dir={tmp_path}", "wandb.mode=offline",
        "generate.num_prompts=80", "generate.shard_size=4", "generate.max_new_tokens=48", "distill.teacher=online",
        "distill.exit_layers=[2]", "distill.max_steps=40", "distill.sequences_per_step=2", "distill.validate_every=10",
        "distill.checkpoint_every=4", "distill.sequence_length=128", "evaluate.num_prompts=2",
        "evaluate.max_new_tokens=16", "evaluate.temperatures=[0.0]", "publish.force=true",
    ]  # fmt: skip
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    done = bash(tmp_path, "--local", *words, "run.name=calm", "machine.processes_per_node=2")
    assert done.returncode == 0, done.stderr

    chain = Chain(cluster, tmp_path, *words, "run.name=disturbed", EH_ARRAY="2", EH_NODES="2")
    entries = disturbed / "responses" / "entries"
    cluster.until(lambda: len(list(entries.glob("*"))) >= 2, 300, "the first responses")
    cluster.call("scancel", "--signal=USR1", f"{chain['generate']}_1")
    tasks = chain.end("generate")
    assert sorted((task["ArrayTaskId"], task["Restarts"]) for task in tasks) == [("0", "0"), ("1", "1")]

    def step() -> int:
        file = disturbed / "metrics.jsonl"
        return json.loads(file.read_text().splitlines()[-1])["step"] if file.exists() and file.read_text() else -1

    distill = chain["distill"]
    cluster.until(lambda: step() >= 5, 600, "step 5")
    cluster.call("scancel", "--signal=USR1", distill)
    cluster.until(lambda: cluster.job(distill)["Restarts"] == "1", 300, "distill to be put back into the queue")
    saved = max(int(file.stem.split("-")[1]) for file in (disturbed / "checkpoints").glob("step-*.ckpt"))
    assert saved >= 5 and f"SIGUSR1: saved {disturbed}/checkpoints/step-{saved:08d}.ckpt" in chain.log("distill")
    assert "ended with 138" in chain.log("distill")

    cluster.until(lambda: step() >= saved + 6, 600, "six more steps")
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.until(lambda: cluster.job(distill)["Restarts"] == "2", 300, "distill to make room")
    assert "SIGTERM: saved" in chain.log("distill") and "ended with 143" in chain.log("distill")

    cluster.until(lambda: step() >= saved + 15, 600, "more steps")
    cluster.kill_node(NODES[1])
    cluster.until(lambda: cluster.job(distill)["Restarts"] == "3", 300, "Slurm to see that the node is dead")
    assert "rank 1 (127.0.0.2, process" in chain.log("distill") and "gone without a word" in chain.log("distill")
    cluster.start_node(NODES[1])
    assert chain.states() == {stage: {"COMPLETED"} for stage in STAGES}, chain.log("distill")

    head = Path("hub", "2", "model.safetensors")
    assert (disturbed / head).read_bytes() == (calm / head).read_bytes()
    for name in ("responses/manifest.json", "heads/exit-2/model.safetensors"):
        assert (disturbed / name).read_bytes() == (calm / name).read_bytes()
    learned = [strip_times(lines(run)) for run in (disturbed, calm)]
    assert learned[0] == learned[1] and list(learned[0]) == list(range(41))

    found = segments(disturbed)  # four starts of distill, and the report of evaluate
    assert len(found) == 5 and len({record["run"]["run_id"] for s in found for record in s if "run" in record}) == 1
    logged: dict[int, dict[str, float]] = {}
    for segment in found[:4]:
        logged |= rows(segment)
    assert logged == lines(disturbed)
    log = (disturbed / "logs" / "distill-rank-00001.log").read_text()
    assert [int(n) for n in re.findall(rf"start {distill}\.(\d)", log)] == [0, 1, 2, 3]


def strip_times(found: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    times = ("tokens_per_second", "step_over_teacher")
    return {step: {k: v for k, v in figures.items() if k not in times} for step, figures in found.items()}
