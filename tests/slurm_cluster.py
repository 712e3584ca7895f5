"""A Slurm cluster of two nodes on this host, for tests: one controller, two slurmd, no root, no munge, no accounting.

Clusters of several test processes may run at once: jobs take their port from their number, so each cluster has numbers of its own.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.distributed import ROOT, environment

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CONF = """
ClusterName=kinoform{ports[0]}
FirstJobId={ports[0]}00
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=30
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=1000 State=UNKNOWN
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=25
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str:
    """Why no cluster can be started here; empty where one can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm)"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the host's own name {socket.gethostname()!r} has no address: processes could not meet there"
    return ""


class Cluster:
    """Commands for a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PYTHON": sys.executable, "PROCESSES": "1"}

    def run(self, *command: object, code: int = 0, **variables: object) -> str:
        """Output of a command; its exit status must be `code`."""
        env = environment(**self.variables | {name: str(value) for name, value in variables.items()})
        done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, text=True, capture_output=True, timeout=60, check=False)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *arguments: object, **variables: object) -> int:
        """Number of a job that slurm/submit.sh submits."""
        return int(self.run("slurm/submit.sh", *arguments, LOGS=self.folder / "logs", **variables))

    def about(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job).splitlines()[0]))

    def log(self, job: int) -> str:
        """What a job has printed so far, over all its starts."""
        return "".join(place.read_text() for place in (self.folder / "logs").glob(f"*-{job}.log"))

    def start(self, job: int) -> None:
        """Have a job that queues again start soon: Slurm lets it wait for two minutes, and refuses a start in the same second."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def wait(self, job: int, *states: str, timeout: float = 90) -> dict[str, str]:
        """Until a job is in one of these states."""
        until(lambda: self.about(job)["JobState"] in states, timeout, lambda: f"{self.about(job)}\n{self.log(job)}")
        return self.about(job)


def until(condition: Callable[[], Any], timeout: float, why: Callable[[], str] = str) -> None:
    """Wait for a condition; AssertionError with `why()` when it does not come in time."""
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, why()
        time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for the time of the block; its jobs and daemons are gone after it."""
    host = socket.gethostname().split(".")[0]
    cluster = Cluster(folder)
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(3)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in sockets]
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(host=host, ports=ports, user=getpass.getuser(), folder=folder))
    for name in (host, f"{host}-second"):
        (folder / f"spool-{name}").mkdir()
    commands = [["slurmd", "-D", "-N", host], ["slurmd", "-D", "-N", f"{host}-second"], ["slurmctld", "-D", "-c"]]
    env = environment(**cluster.variables)
    with (folder / "daemons.log").open("wb") as log:
        daemons = [subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True) for command in commands]
    try:
        idle = ["sinfo", "--noheader", "--Node", "--partition", "main", "--format", "%T"]
        logs = lambda: "\n".join(place.read_text()[-2000:] for place in folder.glob("*.log"))  # noqa: E731
        until(lambda: _quiet(idle, env).split() == ["idle", "idle"], 60, logs)
        yield cluster
    finally:
        _quiet(["scancel", "--user", getpass.getuser()], env)
        with suppress(AssertionError):
            until(lambda: not _quiet(["squeue", "--noheader"], env).strip(), 20)
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
        for left in ROOT.glob(f".kinoform-{ports[0]}??.requeues"):  # of jobs that were cancelled in the queue
            left.unlink()


def _quiet(command: list[str], env: dict[str, str]) -> str:
    try:
        return subprocess.run(command, env=env, text=True, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
