"""A real Slurm cluster of two nodes on this machine, for tests: plain processes, loopback only, files in one folder.

Takes a folder; starts munged, slurmctld and two slurmd there (Debian: slurmctld slurmd slurm-client munge), gives the
environment in which sbatch, srun and scontrol find them, and stops them at the end. It needs no systemd, no cgroups and
no root.
"""

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")
NODES = ("127.0.0.1", "127.0.0.2")
"""Node names: addresses, which need no line in /etc/hosts, as the name of a job's first node is its MASTER_ADDR."""
GPUS = 2
"""GPUs of each node: stand-in devices that Slurm counts and allocates."""

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=6
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=8 RealMemory=64000 Gres=gpu:h100:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in DAEMONS if _find(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    return None


class Cluster:
    """Two nodes with 8 CPUs each; jobs in partition urgent preempt those in main. Use `with Cluster(folder) as ...`.

    Raises RuntimeError if a daemon ends, AssertionError if the nodes do not come up.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    # ---- jobs

    def call(self, *words: str, check: bool = True) -> str:
        """The output of a Slurm command. Raises RuntimeError if it fails, unless `check` is False."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}{done.stdout}")
        return done.stdout

    def tasks(self, job: str) -> list[dict[str, str]]:
        """Field -> value of `scontrol show job`, for each task of an array."""
        shown = self.call("scontrol", "show", "job", "-o", job).splitlines()
        # Values may contain blanks: a value ends before the next NAME=.
        return [dict(re.findall(r"(\w[\w/:]*)=(.*?)(?= \w[\w/:]*=|$)", line.strip())) for line in shown if line]

    def job(self, job: str) -> dict[str, str]:
        """Field -> value of a job that is no array."""
        return self.tasks(job)[0]

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """The job's fields once it is in one of these states. Raises AssertionError after `seconds`."""
        self.until(lambda: self.job(job)["JobState"] in states, seconds, f"job {job} to be {' or '.join(states)}")
        return self.job(job)

    def until(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.time() + seconds
        while not happened():
            queue = self.call("squeue", "--all") if time.time() > deadline else ""
            assert time.time() < deadline, f"waited {seconds:.0f} s for {what}\n{queue}"
            time.sleep(0.3)

    # ---- nodes

    def kill_node(self, node: str) -> None:
        """Simulate a power failure: SIGKILL to the node's daemon, then to all processes that it started."""
        daemon = self.daemons.pop(node)
        doomed = [daemon.pid, *self._stepds(node)]
        for pid in doomed:  # parents first, so that no parent sees its children die
            for each in [pid, *_descendants(pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        daemon.wait()

    def start_node(self, node: str) -> None:
        with (self.folder / f"{node}.out").open("a") as out:
            self.daemons[node] = _daemon([_find("slurmd"), "-N", node, "-D"], self.environment, out)

    def _stepds(self, node: str) -> list[int]:
        """Process ids of the slurmstepd of a node, which detach from their daemon when they start."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (folder / "environ").read_bytes()
                ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in environment
                if name.startswith("slurmstepd") and ours and self._node_of(int(folder.name)) == node:
                    found.append(int(folder.name))
        return found

    def _node_of(self, stepd: int) -> str | None:
        for child in _descendants(stepd):
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"SLURMD_NODENAME="):
                        return entry.split(b"=", 1)[1].decode()
        return None

    # ---- the daemons

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged requires a folder that others can enter but not write
        port = _free_ports(3)
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        (folder / "slurm.conf").write_text(
            CONF.format(host=host, user=user, folder=folder, port=port, ports=f"[{port + 1}-{port + 2}]", gpus=GPUS)
        )
        files = ",".join(map(str, self._stand_ins()))
        (folder / "gres.conf").write_text(f"NodeName=127.0.0.[1-2] Name=gpu Type=h100 File={files}\n")
        self._munge()
        self._run("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.until(self._idle, 120, "two idle nodes")

    def _idle(self) -> bool:
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended: {(self.folder / f'{name}.out').read_text()[-2000:]}")
        return self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() == ["idle"] * len(NODES)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        subprocess.run([_find("mungekey"), "-c", "-k", str(key)], check=True)
        key.chmod(0o600)
        names = {"key-file": key} | {
            f"{what}-file": self.folder / f"munge.{what}" for what in ("pid", "log", "seed")
        } | {"socket": self.folder / "munge.socket"}  # fmt: skip
        self._run("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in names.items()))
        self.until((self.folder / "munge.socket").exists, 20, "munged")

    def _stand_ins(self) -> list[Path]:
        """Character devices, the type that Slurm requires of a GPU's file."""
        if os.getuid():
            return [Path(f"/dev/tty{i}") for i in range(GPUS)]
        devices = [self.folder / f"nvidia{i}" for i in range(GPUS)]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        return devices

    def _run(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("w") as out:
            self.daemons[name] = _daemon([_find(name), *words], self.environment, out)

    def _stop(self) -> None:
        if "slurmctld" in self.daemons:
            self.call("scancel", "--user", str(os.getuid()), check=False)
            with contextlib.suppress(AssertionError):
                self.until(lambda: not self.call("squeue", "-h", check=False), 20, "no jobs")
        for name in reversed(list(self.daemons)):
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
                self.daemons[name].wait()
        self.daemons.clear()


def _daemon(command: list[str], environment: dict[str, str], out: TextIO) -> subprocess.Popen:
    """Start a daemon that the kernel kills when this process ends, even by SIGKILL."""
    return subprocess.Popen(command, env=environment, stdout=out, stderr=out, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _find(name: str) -> str | None:
    """Path of a program, also in /usr/sbin, where daemons are and which is not on every user's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for base in range(20000 + os.getpid() % 3000 * count, 32000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base
    raise RuntimeError("no free ports")


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants, parents before their children."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [each for child in map(int, children) for each in (child, *_descendants(child))]
    return []
