"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# Both nodes claim two CPUs whatever the machine has. Processes are tracked by their parents, which needs no cgroups. A requeued
# job waits for cred_expire seconds (SLURM's default is 120).
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=30 State=UP
"""


def why_not() -> str | None:
    """What is missing for a cluster here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} missing: tests/slurm/install.sh installs SLURM (Debian, as root)"
    if os.geteuid() != 0:
        return "slurmd starts jobs, which needs root"
    return None


def until(condition, what: str, seconds: float, every: float = 0.1):
    """The first true value of `condition()`.

    Raises:
        TimeoutError: not true after that many seconds.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(every)
    return value


class Cluster:
    """Use as a context manager; `environment` is for the clients (sbatch and so on)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket may have 107 characters
        self.daemons: list[subprocess.Popen[bytes]] = []
        # A developer's own allocation must not leak into the jobs.
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {**outer, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        folder = self.folder
        folder.chmod(0o755)  # munged refuses a folder that others may write to, and one that it cannot be reached in
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = free_ports(3)
        names = {"host": socket.gethostname().split(".")[0], "folder": folder}
        text = CONFIGURATION.format(**names, controller_port=ports[0], port_1=ports[1], port_2=ports[2])
        (folder / "slurm.conf").write_text(text)
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        try:
            munge = [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"]
            self._start("munged", "--foreground", f"--key-file={key}", *munge)
            until((folder / "munge.socket").exists, "munged listens", 10)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", "n1")
            self._start("slurmd", "-D", "-N", "n2")
            until(lambda: self.run("sinfo", "-h", "-o", "%t %D", check=False) == "idle 2", "both nodes idle", 30)
        except BaseException:
            print(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) == 4:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            try:
                until(lambda: not self.run("squeue", "-h", check=False), "all jobs end", 30)
            except TimeoutError as error:
                print(error)
        # Orphans, such as the helpers that saving starts below a rank that is killed. Clusters find them with cgroups.
        for process in processes(SLURM_CONF=self.environment["SLURM_CONF"]):
            if process not in {daemon.pid for daemon in self.daemons}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        # The controller first (it would wait for nodes that are gone), munged, which all of them need, last.
        for daemon in self.daemons[1:] + self.daemons[:1]:
            daemon.terminate()
            try:
                daemon.wait(1)  # slurmctld takes ten seconds to save a state that nobody needs
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{len(self.daemons)}-{command[0]}.log", "wb") as log:
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment))

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a client prints; `environment` is added to its own."""
        result = subprocess.run(
            command, cwd=ROOT, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """sbatch; returns the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **environment)

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job, as scontrol shows them."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job once it has ended for good."""
        until(lambda: self.job(number)["JobState"] in ENDED, f"job {number} ends", seconds, every=0.3)
        return self.job(number)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def free_ports(number: int) -> list[int]:
    """Ports nobody listens on, below those that Linux gives to outgoing connections (else one of these may take it)."""
    ports: list[int] = []
    while len(ports) < number:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            ports.append(port)
    return ports


def variables(process: int) -> set[bytes]:
    """The environment that a process was started with, as NAME=value; empty if it has ended."""
    try:
        return set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def processes(**environment: str) -> list[int]:
    """Processes of this machine that have all of these variables in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if wanted <= variables(int(folder.name))]


def torchrun_of(process: int) -> int | None:
    """The torchrun above a training process; None for the helpers that a training process starts, and for orphans."""
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    above = variables(parent)
    return parent if above and not any(variable.startswith(b"RANK=") for variable in above) else None
