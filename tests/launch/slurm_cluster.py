"""A real Slurm of one controller and two nodes on this machine, for the time of the tests.

Everything lives under one directory and on ports of its own: configuration, munge key, state, logs. It runs as the user
that runs the tests, so neither a system-wide Slurm nor one of another test run is touched.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
NODES = ("n1", "n2")

CONFIGURATION = """\
ClusterName=ftrain-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MailProg=/bin/true
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


@dataclass(frozen=True)
class Job:
    """What the controller says of a job."""

    state: str
    restarts: int
    exit_code: int


def missing_programs() -> list[str]:
    """Return the Slurm and munge programs that are not installed here."""
    return [program for program in PROGRAMS if find_program(program) is None]


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SBIN))


def wait_until(what: str, holds: Callable[[], bool], why_not: Callable[[], str], seconds: float = 90.0) -> None:
    """Return once `holds`; fail with `why_not` when the machine is plainly not going to get there."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{why_not()}"
        time.sleep(0.1)


class SlurmCluster:
    """Start with `start`, use through `sbatch` and friends, end with `stop`, which leaves no process behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._configure()
        directory = self.directory
        self._spawn(
            *("munged", "--foreground", "--force", f"--key-file={directory}/munge.key"),
            *(f"--socket={directory}/munge.sock", f"--pid-file={directory}/munged.pid"),
            *(f"--seed-file={directory}/munged.seed", f"--log-file={directory}/munged.log"),
        )
        wait_until("munged listens", (directory / "munge.sock").exists, self.logs)
        self._spawn("slurmctld", "-D", "-f", str(self.configuration))
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node, "-f", str(self.configuration))
        wait_until("two idle nodes", lambda: self._idle_nodes() == len(NODES), self.logs)

    def stop(self) -> None:
        # The steps of a job outlive the daemons, so the jobs go first.
        with contextlib.suppress(subprocess.SubprocessError):
            self._end_all_jobs()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until("no process left", lambda: not self.processes(), lambda: str(self.processes()), seconds=90)

    def processes(self) -> list[int]:
        """Return the pids of all live processes that were started by this cluster, however they were started."""
        mark = f"SLURM_CONF={self.configuration}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def sbatch(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> int:
        """Submit a batch script with `arguments` of sbatch and return the job's id."""
        output = self.command("sbatch", "--parsable", *arguments, environment=environment)
        return int(output.strip())

    def command(self, name: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
        """Run a client program of Slurm and return what it prints."""
        program = find_program(name)
        assert program is not None
        done = subprocess.run(
            [program, *map(str, arguments)],
            env={**self.environment, **(environment or {})},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{name} {arguments}: {done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: int) -> Job:
        words = self.command("scontrol", "show", "job", "--oneliner", str(number)).split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        return Job(fields["JobState"], int(fields["Restarts"]), int(fields["ExitCode"].split(":")[0]))

    def wait_for_job(self, number: int, state: str) -> Job:
        """Return once the job is in `state`; fail early when it has ended in another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", state}
        wait_until(f"job {number} {state}", lambda: self.job(number).state in ends, self.logs)
        job = self.job(number)
        assert job.state == state, f"{job}\n{self.logs()}"
        return job

    def logs(self) -> str:
        """Return the end of every log, for the message of a test that fails."""
        files = sorted(self.directory.rglob("*.log"))
        return "".join(f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}\n" for file in files)

    def _configure(self) -> None:
        self.directory.joinpath("state").mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        text = CONFIGURATION.format(
            host=socket.gethostname(),
            controller_port=controller_port,
            user=getpass.getuser(),
            directory=self.directory,
            nodes=nodes,
        )
        self.configuration.write_text(text)

    def _spawn(self, name: str, *arguments: str) -> None:
        program = find_program(name)
        assert program is not None
        with (self.directory / f"{name}-{len(self._daemons)}.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _idle_nodes(self) -> int:
        program = find_program("sinfo")
        assert program is not None
        done = subprocess.run(
            [program, "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return len(done.stdout.split())

    def _end_all_jobs(self) -> None:
        def queued() -> list[str]:
            return self.command("squeue", "--noheader", "--format=%i").split()

        for number in queued():
            for pid in self._pids_of_job(number):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.command("scancel", number)
        wait_until("no job left", lambda: not queued(), self.logs, seconds=90)

    def _pids_of_job(self, number: str) -> list[int]:
        mark = f"SLURM_JOB_ID={number}".encode()
        mine = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    mine.append(pid)
        return mine


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
