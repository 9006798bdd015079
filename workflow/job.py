"""Run one stage as a job of Snakemake: `dvc repro --single-item`, its log, its record, and what a stop means.

SLURM sends SIGTERM to every process of a job when its time is nearly over (`--signal` in the profile) or when another
job takes its place. dvc would die of it and leave its stage running, so it is started with SIGTERM ignored, and the
signal is passed to the stage. A stage that has written a checkpoint ends with exit code 75. Its SLURM job then goes
back to the queue and continues the stage, or begins it again where it has no checkpoints.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from workflow import locks, stage
from workflow.pipeline import made

SCRATCH = Path(".scratch")
STOP = SCRATCH / "stop"  # written by `workflow.experiment stop`: what is stopped now is not to be continued
STOPPED = os.EX_TEMPFAIL
LOOK = 5.0  # seconds
# A stage that is stopped more often than this is not getting anywhere: with a checkpoint each time, and without.
MOST_STOPS, MOST_BEGINNINGS = 200, 5
# Snakemake sets these to a rule's threads. MKL with two threads gives other last bits than with one, and takes six
# times as long where each core has a process already. So a stage has what it has under `dvc repro`.
THREADS = [f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "GOTO", "NUMEXPR")] + ["VECLIB_MAXIMUM_THREADS"]

_lock: TextIO  # held until this process has ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", help="a stage of dvc.yaml, e.g. sft@cold_start")
    parser.add_argument("--log", type=Path, required=True, help="takes what the stage prints, each attempt anew")
    parser.add_argument("--stamp", type=Path, required=True, help="written when the stage is done: what it made")
    parser.add_argument("--hardware", default="auto", help="a file of workflow/hardware/; auto: what fits the GPUs")
    args = parser.parse_args()
    asked = threading.Event()  # to end
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.signal(signal.SIGINT, lambda *_: asked.set())  # Ctrl-C, which the terminal sends to dvc and the stage too
    earlier = read_record(args.stage)
    refuse_twice(args.stage, earlier)
    if args.hardware != "auto":
        os.environ["HARDWARE"] = args.hardware
    log = next_log(args.log.with_suffix(""))
    known = {
        "stage": args.stage,
        "attempt": int(log.stem),
        "job": os.environ.get("SLURM_JOB_ID"),
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "log": str(log),
        "started": time.time(),
    }
    write_record({**known, "ended": None, "code": None})
    if earlier is not None and earlier["ended"] is None and earlier["job"] is not None:
        time.sleep(2 * LOOK)  # SLURM may have given up a node that is alive: see `follow`
    for said in locks.mend():
        print(said, flush=True)
    locks.release(args.stage)
    code, resumable = follow(args.stage, [log, args.log], known, asked)
    if not is_ours(known):
        sys.exit(f"error: {args.stage} was taken over by another attempt, see {record_file(args.stage)}")
    write_record({**known, "ended": time.time(), "code": code})
    if code == 0:
        args.stamp.parent.mkdir(parents=True, exist_ok=True)
        with locks.repo_lock():  # another job may be writing dvc.lock
            args.stamp.write_text(made(args.stage))
    if code == STOPPED:
        requeue(MOST_STOPS if resumable else MOST_BEGINNINGS, log)
    sys.exit(code)


def record_file(name: str) -> Path:
    """Where the last attempt to run a stage is noted."""
    return SCRATCH / "jobs" / f"{name}.json"


def write_record(record: dict[str, Any]) -> None:
    """Note an attempt; readers see the old record or the new one, never half of it."""
    file = record_file(record["stage"])
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{record['pid']}.part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(file)


def read_record(name: str) -> dict[str, Any] | None:
    """What was noted of the last attempt to run a stage; None before the first."""
    file = record_file(name)
    return json.loads(file.read_text()) if file.is_file() else None


def is_ours(known: dict[str, Any]) -> bool:
    """Whether no other attempt has begun since."""
    noted = read_record(known["stage"])
    return noted is not None and (noted["node"], noted["pid"]) == (known["node"], known["pid"])


def next_log(folder: Path) -> Path:
    """The log of a new attempt: 1.log, 2.log, …"""
    folder.mkdir(parents=True, exist_ok=True)
    attempts = [int(file.stem) for file in folder.glob("*.log")]
    return folder / f"{max(attempts, default=0) + 1}.log"


def refuse_twice(name: str, other: dict[str, Any] | None) -> None:
    """Raise StageError while another job runs the same stage in this checkout, on whichever node; else hold its lock.

    Where the other one is a job of SLURM, SLURM is asked: the lock may be held on a node that SLURM has given up, where
    the job is ended by `follow`. This very job, begun again, is no other one.
    """
    global _lock
    file = record_file(name).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    _lock = file.open("w")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    begun = other is not None and other["ended"] is None
    if begun and other["job"]:
        alive = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"}
        held = other["job"] != os.environ.get("SLURM_JOB_ID") and job_state(other["job"]) in alive
    if held:
        who = "another process"  # that has not noted itself yet
        if begun:
            number = f"SLURM job {other['job']}" if other["job"] else f"process {other['pid']}"
            who = f"{number} on {other['node']}"
        raise stage.StageError(f"{name} is being run by {who}; wait for it, or end it first")


def job_state(job: str) -> str:
    """What SLURM says of a job, e.g. RUNNING; nothing when it has forgotten the job.

    Raises:
        StageError: SLURM does not answer.
    """
    found = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True)
    if found.returncode and "Invalid job id" not in found.stderr:
        raise stage.StageError(f"squeue does not say what became of job {job}, try again later: {found.stderr.strip()}")
    return found.stdout.strip()


def follow(name: str, logs: list[Path], known: dict[str, Any], asked: threading.Event) -> tuple[int, bool]:
    """Run a stage with DVC, and copy what it prints to the terminal and to files.

    SLURM runs a job again elsewhere when it has lost sight of its node, where it may still run. So each attempt looks
    whether a later one has begun, and ends at once if so; the later one begins two looks later.

    Args:
        asked: whether this job was asked to end; then the stage is, too.

    Returns:
        0, STOPPED (75) for a stage that was stopped, or 1; and whether the stage said that it can go on.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for variable in THREADS:
        environment.pop(variable, None)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def shield() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stage.die_with_parent(signal.SIGKILL)  # then its stage is asked to end, and saves what it has

    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=shield,
    )

    def ask() -> None:
        import psutil

        with suppress(psutil.NoSuchProcess):  # it has just ended
            for child in psutil.Process(process.pid).children():
                child.terminate()

    def stop(*_: int | FrameType | None) -> None:
        asked.set()
        ask()

    def watch() -> None:
        import psutil

        while process.poll() is None:
            if not is_ours(known):
                with suppress(psutil.NoSuchProcess):
                    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                        each.kill()
                return
            os.utime(record_file(name))  # a sign of life, for workflow.experiment on another login node
            if asked.is_set():
                ask()  # when we were asked, dvc may not have begun the stage
            time.sleep(LOOK)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    resumable = uncached = False
    files = [log.open("wb") for log in logs]
    for line in process.stdout:
        for file in (*files, sys.stdout.buffer):
            file.write(line)
            file.flush()
        resumable = resumable or re.search(rb"failed to run: .*, exited with %d$" % STOPPED, line) is not None
        uncached = uncached or line.startswith(b"ERROR: failed to transfer ")
    code = process.wait()
    if code == 0 and uncached:
        # For DVC this is no failure, but it would make the stage again the next time.
        code, said = (
            1,
            f"error: {name} is made, but is not in DVC's cache, see above; make room there, and start again\n",
        )
        for file in (*files, sys.stdout.buffer):
            file.write(said.encode())
    for file in files:
        file.close()
    stopped = code and (resumable or asked.is_set())
    return STOPPED if stopped else int(code != 0), resumable


def requeue(most: int, log: Path) -> None:
    """Put this SLURM job back into the queue, if it still runs; one that is being cancelled or preempted does not.

    Args:
        most: times that it may have been there already.
        log: where the user looks.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or STOP.exists() or job_state(job) != "RUNNING":
        return
    asked = ["squeue", "--noheader", "--jobs", job, "--Format", "BatchFlag,RestartCnt"]
    batch, restarts = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    if batch != "1":
        return  # the shell of salloc, which SLURM cannot start again
    if int(restarts) >= most:
        said = f"error: this stage was stopped {most + 1} times; give it more runtime in the profile"
        print(said)
        with log.open("a") as file:
            print(said, file=file)
        return
    print(f"SLURM job {job} goes back to the queue and continues this stage", flush=True)
    subprocess.run(["scontrol", "requeue", job], check=True)


if __name__ == "__main__":
    stage.run(main)
