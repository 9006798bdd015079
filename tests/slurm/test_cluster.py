"""The SLURM of the tests does what a real one does where the pipeline depends on it, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"}
# Says when it is asked to end, and goes on.
STUBBORN = "trap 'echo {0} was asked to end' TERM; echo {0} runs; while sleep 0.1; do :; done"
BOTH = f'srun bash -c "{STUBBORN.format("the step")}" &\n{STUBBORN.format("the script")}'


def submit(cluster: Cluster, output: Path, script: str, options: str = "") -> str:
    """The id of a new job with this batch script."""
    path = output.with_suffix(".sh")
    path.write_text(f"#!/bin/bash\n{script}\n")
    return cluster.run(f"sbatch --parsable --open-mode=append --output={output} {options} {path}").strip()


def printed(output: Path, text: str, timeout: float) -> str:
    """What a job has printed, once this is in it."""
    until = time.monotonic() + timeout
    while text not in (said := output.read_text() if output.exists() else ""):
        assert time.monotonic() < until, f"{text!r} was not printed within {timeout} s\n{said}"
        time.sleep(0.1)
    return said


@pytest.mark.parametrize(("options", "visible"), [("--gres=gpu:1", "0"), ("--gres=gpu:2", "0,1"), ("", "none")])
def test_a_job_sees_the_gpus_it_asked_for(cluster: Cluster, tmp_path: Path, options: str, visible: str) -> None:
    output = tmp_path / "log"
    job = submit(cluster, output, "echo ${CUDA_VISIBLE_DEVICES-none}", options)
    assert cluster.wait(job, ENDED, 120)["exit_code"] == 0
    assert output.read_text() == f"{visible}\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--gres=gpu:3", "Requested node configuration is not available"),
        ("--gres=gpu:a100:1", "Requested node configuration is not available"),
        ("--partition=nowhere", "Invalid partition name specified"),
    ],
)
def test_a_request_that_no_node_meets_is_refused(cluster: Cluster, options: str, sentence: str) -> None:
    assert sentence in cluster.run(f"sbatch {options} --wrap true", fails=True)


def test_two_jobs_run_at_once_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Each waits for the other, and takes all GPUs of its node."""
    script = "touch {0}; until [ -e {1} ]; do sleep 0.1; done; exit {2}"
    options = f"--gres=gpu:2 --chdir={tmp_path} --comment=two"
    first = submit(cluster, tmp_path / "first", script.format("a", "b", 0), options)
    second = submit(cluster, tmp_path / "second", script.format("b", "a", 7), options)
    jobs = [cluster.wait(job, ENDED, 120) for job in (first, second)]
    assert [(job["state"], job["exit_code"], job["comment"]) for job in jobs] == [
        ("COMPLETED", 0, "two"),
        ("FAILED", 7, "two"),
    ]
    assert jobs[0]["node"] != jobs[1]["node"]


def test_a_job_on_two_nodes_runs_on_both(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "log"
    say = "echo $SLURM_PROCID $(hostname) of $SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST"
    reach = "getent hosts $(scontrol show hostnames $SLURM_JOB_NODELIST) | wc -l"
    job = submit(cluster, output, f"{reach}; srun bash -c '{say}'", "--nodes=2 --gres=gpu:1 --nodelist=n2,n3")
    assert cluster.wait(job, ENDED, 120)["node"] == "n[2-3]"
    assert sorted(output.read_text().splitlines()) == ["0 n2 of 2 n[2-3]", "1 n3 of 2 n[2-3]", "2"]


def test_a_time_limit_ends_a_job_and_its_signal_reaches_the_step_alone(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM looks every 30 s."""
    warned, ended = tmp_path / "warned", tmp_path / "ended"
    first = submit(cluster, warned, BOTH, "--time=10 --signal=TERM@60")
    second = submit(cluster, ended, "srun sleep 300", "--time=10")
    for job in (first, second):
        cluster.wait(job, {"RUNNING"}, 120)
    printed(warned, "the step runs", 120)
    cluster.run(f"scontrol update JobId={first} EndTime=now+80")
    cluster.run(f"scontrol update JobId={second} EndTime=now+1")
    said = printed(warned, "the step was asked to end", 40)
    assert "the script was asked to end" not in said
    assert cluster.jobs()[first]["state"] == "RUNNING"
    assert cluster.wait(second, ENDED, 120)["state"] == "TIMEOUT"
    cluster.run(f"scancel --signal=KILL --full {first}")
    cluster.wait(first, ENDED, 120)


def test_a_preempted_job_is_told_and_runs_again_when_it_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    """Its step is sent SIGTERM at once, and has the partition's grace time, 30 s, to end."""
    low = tmp_path / "low"
    step = "srun bash -c 'echo step; exec sleep 300'"
    script = f"echo attempt ${{SLURM_RESTART_COUNT:-0}}; {step} || scontrol requeue $SLURM_JOB_ID; sleep 300"
    preempted = submit(cluster, low, script, "--partition=low --gres=gpu:2 --nodelist=n1")
    printed(low, "step", 120)
    urgent = cluster.wait(submit(cluster, tmp_path / "high", "true", "--gres=gpu:2 --nodelist=n1"), ENDED, 120)
    assert urgent["state"] == "COMPLETED"
    assert urgent["started"] - urgent["submitted"] < 20
    printed(low, "attempt 1", 120)
    assert cluster.jobs()[preempted]["restarts"] == 1
    cluster.run(f"scancel {preempted}")


def test_a_job_runs_again_after_a_requeue_and_where_its_node_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    script = "echo attempt ${SLURM_RESTART_COUNT:-0} on $(hostname); sleep 300"
    options = {"n1": "", "n2": "--exclude=n1", "n3": "--exclude=n1,n2"}
    jobs = {node: submit(cluster, tmp_path / node, script, options[node]) for node in options}
    lost = submit(cluster, tmp_path / "lost", script, "--nodelist=n1 --no-requeue")
    for name, node in (("n1", "n1"), ("n2", "n2"), ("n3", "n3"), ("lost", "n1")):
        printed(tmp_path / name, f"attempt 0 on {node}", 120)
    cluster.node_fails("n1")
    cluster.node_down("n2")
    cluster.run(f"scontrol requeue {jobs['n3']}")
    try:
        for node in options:
            printed(tmp_path / node, "attempt 1 on n3", 120)
        assert cluster.jobs()[lost]["state"] == "NODE_FAIL"
    finally:
        cluster.node_up("n1")
        cluster.node_up("n2")
    cluster.run(f"scancel {' '.join(jobs.values())}")
    for node in ("n1", "n2"):
        job = submit(cluster, tmp_path / "after", "true", f"--nodelist={node}")
        assert cluster.wait(job, ENDED, 120)["state"] == "COMPLETED"


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return "ended"


@pytest.mark.parametrize("how", ["the block ends", signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_second_cluster(cluster: Cluster, tmp_path: Path, how: str | signal.Signals) -> None:
    """Neither where its user is ended by Ctrl-C or kill -9; and the first one goes on."""
    folder = tmp_path / "slurm"
    script = f"""
import time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path({str(folder)!r})) as cluster:
    # setsid, and nohup: what a job leaves behind.
    job = cluster.run("sbatch --parsable --output=/dev/null --wrap 'setsid nohup sleep 1000 & sleep 1000'").strip()
    cluster.wait(job, {{"RUNNING"}}, 120)
    print("runs", flush=True)
    input()
"""
    user = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "runs\n"
    until = time.monotonic() + 120
    while True:  # a job is RUNNING before its processes are
        there = {process: name_of(process) for process in psutil.Process(user.pid).children(recursive=True)}
        if [list(there.values()).count(name) for name in ("slurmd", "sleep")] == [3, 2]:
            break
        assert time.monotonic() < until, there
        time.sleep(0.1)
    if isinstance(how, signal.Signals):
        os.killpg(user.pid, how)
    user.communicate("\n", timeout=300)
    _, left = psutil.wait_procs(list(there), timeout=60)
    assert left == []
    assert not folder.exists()
    assert cluster.wait(submit(cluster, tmp_path / "log", "true"), ENDED, 120)["state"] == "COMPLETED"
