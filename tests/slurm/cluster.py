"""A real SLURM on one machine: three nodes n1-n3 with two GPUs each, which are device nodes that nothing uses.

munged, slurmctld and the slurmds have all their files in one folder, TCP ports of their own and their own munge key,
so a SLURM that this machine belongs to is not touched. A node is a set of Linux namespaces: it has its own host name
and process ids, as a machine has, and shares files and network with the others. Jobs find the nodes by their names.

Use:
    with Cluster(folder) as cluster:
        subprocess.run(["sbatch", …], env=os.environ | cluster.environment)
        cluster.wait("1", {"COMPLETED"}, 60)

Nothing of it is left when the block ends, nor when this process does in any way: all daemons and what they start are
in one process namespace. Its first process (`serve` below) ends them and removes the folder when a pipe from us is
closed; should that process be killed, the kernel ends the rest of the namespace.

SLURM 22.05 looks at time limits every 30 s. It ends a job up to 30 s after its limit, and sends the signal of
`--signal=TERM@60` between 60 and 90 s before it, to the steps and not to the batch script. `scontrol update JobId=…
EndTime=now+80` moves the limit of a running job: then the signal comes within 30 s, and no test waits for minutes.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

NODES = ("n1", "n2", "n3")
GPUS = 2  # of each node
CPUS = 16  # of each node, whatever the machine has
MEMORY = 256_000  # MiB of each node
UP_WITHIN = 60.0  # seconds
# Its first process is killed when unshare is, and the rest with it. What is mounted outside later is seen inside.
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--propagation", "slave", "--uts"]

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_wait}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n.spool
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=86400
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# 2 would bring a node that an administrator set down back by itself.
ReturnToService=1
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
{nodes}
PartitionName=DEFAULT Nodes=ALL DefaultTime=60 MaxTime=1-0
PartitionName=gpu Default=YES PriorityTier=2
PartitionName=low PriorityTier=1 GraceTime={grace}
"""


def missing() -> str | None:
    """Why the cluster cannot run on this machine, and what to do about it; None where it can."""
    absent = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not in PATH; install SLURM with: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the SLURM daemons of the tests need root; run pytest as root, in a container or a virtual machine"
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        return "unshare cannot make the namespaces that the SLURM nodes are; start the container with --privileged"
    return None


class Cluster:
    """SLURM in an empty or new folder, which is removed at the end.

    Args:
        folder: An absolute path; sockets are made in it, and the path of a socket has 107 bytes at most.
        kill_wait: Seconds between SIGTERM and SIGKILL where SLURM ends a job: a time limit, a requeue, a preemption.
        grace: Seconds between the SIGTERM that tells a job of the partition `low` of its preemption, and that end.
        requeue_wait: Seconds that a requeued job waits at least, SLURM's default is 120. It takes none below 5, and
            it is also the time within which a node must have begun a step.
    """

    def __init__(self, folder: Path, kill_wait: int = 30, grace: int = 30, requeue_wait: int = 10) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.kill_wait, self.grace, self.requeue_wait = kill_wait, grace, requeue_wait

    def __enter__(self) -> Self:
        self._write()
        self._server = subprocess.Popen(
            [*NAMESPACE, sys.executable, __file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )
        until = time.monotonic() + UP_WITHIN
        while set(self._states().values()) != {"idle"}:
            if time.monotonic() > until or self._server.poll() is not None:
                logs = "\n".join(self._tail(log.name) for log in sorted(self.folder.glob("*.log")))
                self.__exit__()
                raise RuntimeError(f"the SLURM of the tests did not start\n{logs}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # closes the pipe and waits

    def run(self, command: str, fails: bool = False) -> str:
        """What a command line prints; it must succeed, or fail where `fails` says so: then what it prints on stderr."""
        done = subprocess.run(shlex.split(command), env=os.environ | self.environment, text=True, capture_output=True)
        said = f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert (done.returncode != 0) == fails, said
        return done.stderr if fails else done.stdout

    def jobs(self) -> dict[str, dict[str, Any]]:
        """All jobs since the cluster was started, by id: those that wait, run, have ended, or were refused.

        `node` is empty while a job waits, and a list in SLURM's notation where there are several; `exit_code` is -n
        for signal n; `started` and `ended` are in seconds since 1970, of the last start, and 0 or planned before.
        """
        return {
            str(job["job_id"]): {
                "name": job["name"],
                "state": job["job_state"],
                "reason": job["state_reason"],
                "node": job["nodes"],
                "partition": job["partition"],
                "comment": job["comment"],
                "restarts": job["restart_cnt"],
                "exit_code": os.waitstatus_to_exitcode(job["exit_code"]),
                "submitted": job["submit_time"],
                "started": job["start_time"],
                "ended": job["end_time"],
            }
            for job in json.loads(self.run("squeue --json"))["jobs"]
        }

    def wait(self, job: str, states: Collection[str], timeout: float) -> dict[str, Any]:
        """What `jobs` says about a job, once it is in one of these states.

        Raises:
            AssertionError: it was not within `timeout` seconds; says what it is, and what slurmctld did last.
        """
        until = time.monotonic() + timeout
        while (found := self.jobs()[job])["state"] not in states:
            if time.monotonic() > until:
                log = self._tail("slurmctld.log")
                raise AssertionError(f"job {job} is in none of {states} after {timeout} s: {found}\n{log}")
            time.sleep(0.2)
        return found

    def node_down(self, name: str) -> None:
        """Set a node down, as an administrator does: SLURM ends its jobs, and requeues those that allow it.

        Their processes get SIGTERM at once, and SIGKILL `kill_wait` seconds later. SLURM does not wait for them: where
        `requeue_wait` is shorter, a job that takes its time runs twice for a while, as it does in a split network.
        """
        self.run(f"scontrol update NodeName={name} State=DOWN Reason=test")

    def node_fails(self, name: str) -> None:
        """Take a node's power: its processes are gone at once, and SLURM is told so, which else takes minutes."""
        self._ask("stop", name)
        self.node_down(name)

    def node_up(self, name: str) -> None:
        """Bring a node back after node_down or node_fails, and wait until it takes jobs."""
        self._ask("start", name)
        until = time.monotonic() + UP_WITHIN
        while not _listens(self._ports[name]):
            assert time.monotonic() < until, f"slurmd does not listen\n{self._tail(f'{name}.log')}"
            time.sleep(0.1)
        self.run(f"scontrol update NodeName={name} State=RESUME")

    def _ask(self, order: str, name: str) -> None:
        """Let `serve` carry out an order."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(order, name, file=self._server.stdin, flush=True)
        assert self._server.stdout.readline() == "done\n", f"{order} {name} failed"

    def _write(self) -> None:
        """The files that the daemons read."""
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for gpu in range(GPUS):
            os.mknod(self.folder / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.stat("/dev/null").st_rdev)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
        names = ["slurmctld", *NODES]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        nodes = [f"NodeName={name} NodeAddr=127.0.0.1 Port={self._ports[name]}" for name in NODES]
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=socket.gethostname(),
                port=self._ports["slurmctld"],
                folder=self.folder,
                requeue_wait=self.requeue_wait,
                kill_wait=self.kill_wait,
                grace=self.grace,
                cpus=CPUS,
                memory=MEMORY,
                gpus=GPUS,
                nodes="\n".join(nodes),
            )
        )

    def _states(self) -> dict[str, str]:
        """The state of each node; one that does not answer has a * behind it. Without slurmctld no node has any."""
        command = ["sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T"]
        answer = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        return dict.fromkeys(NODES, "unknown") | dict(line.split() for line in answer.stdout.splitlines())

    def _tail(self, log: str) -> str:
        return "\n".join((self.folder / log).read_text(errors="replace").splitlines()[-20:])


def _free_ports(count: int) -> list[int]:
    """TCP ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def serve(folder: Path) -> None:
    """Run the daemons until stdin is closed, and on the way what it says: `stop` or `start`, and a node's name.

    This is the first process of a namespace: it adopts what others leave behind, and sees no process outside.
    """
    import psutil

    assert os.getpid() == 1, "all other processes are killed at the end"
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
        # Where jobs look that have lost SLURM_CONF: Snakemake's plugin takes it from them.
        subprocess.run(["mount", "--bind", folder, "/etc/slurm"], check=True)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        munged = _daemon(["munged", "--foreground", "--force", *options], folder / "munged.log")
        while munged.poll() is None and not (folder / "munge.socket").exists():
            time.sleep(0.01)
        _daemon(["slurmctld", "-D"], folder / "start.log")
        nodes = {name: _node(name, folder) for name in NODES}
        signal.signal(signal.SIGCHLD, _reap)
        for line in sys.stdin:
            order, name = line.split()
            if order == "stop":
                for first in psutil.Process(nodes[name].pid).children():
                    first.kill()
                nodes[name].wait()  # unshare ends when all of the node's processes have
            elif nodes[name].poll() is not None:
                nodes[name] = _node(name, folder)
            print("done", flush=True)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.kill(-1, signal.SIGKILL)
        try:
            while True:
                os.wait()
        except ChildProcessError:
            shutil.rmtree(folder)


def _daemon(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("a") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _node(name: str, folder: Path) -> subprocess.Popen[bytes]:
    # bash reaps the processes that slurmd leaves behind, and ends with it.
    start = f"hostname {name}; slurmd -D -N {name} & wait $!"
    return _daemon([*NAMESPACE, "bash", "-c", start], folder / "start.log")


def _reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
