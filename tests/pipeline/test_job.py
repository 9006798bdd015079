"""One stage as a job: what it leaves behind, and what SIGTERM does to it. DVC is real, the stages are small scripts."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
STAGES = """
import os, signal, sys, time
from pathlib import Path

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path("checkpoint").write_text("half")
    sys.exit(75)

name = sys.argv[1]
if name == "resumable":
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if name == "wrong":
    sys.exit("error: this never works")
print("begun", *(variable for variable in os.environ if variable.endswith("_NUM_THREADS")), flush=True)
if not Path("checkpoint").exists() and name != "quick":
    time.sleep(60)
Path(name).write_text("made")
"""
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
NAMES = ("quick", "wrong", "resumable", "helpless")


@pytest.fixture
def repo(tmp_path: Path, environment: dict[str, str]) -> Path:
    for tool in ("git", "dvc"):
        subprocess.run([tool, "init", "-q"], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "run.py").write_text(STAGES)
    stages = "".join(f"  {name}:\n    cmd: exec python run.py {name}\n    outs: [{name}]\n" for name in NAMES)
    (tmp_path / "dvc.yaml").write_text(f"stages:\n{stages}")
    return tmp_path


def start(repo: Path, environment: dict[str, str], name: str, where: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*where, "python", "-m", "workflow.job", name, "--log", f".scratch/logs/{name}.log"]
    command += ["--stamp", f".scratch/stamps/{name}"]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=repo, env=environment, text=True, **pipes)


def record(repo: Path, name: str) -> dict:
    return json.loads((repo / f".scratch/jobs/{name}.json").read_text())


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until_begun(repo: Path, name: str) -> None:
    for _ in range(6000):
        log = repo / f".scratch/logs/{name}.log"
        if log.is_file() and "begun" in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} has not begun")


def test_a_job_leaves_stamp_log_and_record(repo: Path, environment: dict[str, str]) -> None:
    job = start(repo, environment, "quick")
    said, _ = job.communicate()
    assert job.returncode == 0, said
    assert (repo / ".scratch/stamps/quick").read_text().startswith("quick ")
    assert "begun" in said
    assert (repo / ".scratch/logs/quick/1.log").read_text() == (repo / ".scratch/logs/quick.log").read_text()
    noted = record(repo, "quick")
    assert (noted["code"], noted["attempt"], noted["job"], noted["stage"]) == (0, 1, None, "quick")
    assert noted["started"] < noted["ended"]


def test_a_stage_has_the_threads_of_dvc_repro(repo: Path, environment: dict[str, str]) -> None:
    """Snakemake sets the number of threads of linear algebra for what it starts, on which results depend."""
    command = "env > before; python -m workflow.job quick --log quick.log --stamp {output}"
    (repo / "Snakefile").write_text(f"rule:\n    output: 'stamp'\n    threads: 2\n    shell: '{command}'\n")
    known = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["snakemake", "--cores", "2"], cwd=repo, env=known, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "OMP_NUM_THREADS=2\n" in (repo / "before").read_text()
    assert "\nbegun\n" in (repo / "quick.log").read_text()


def test_each_attempt_has_a_log(repo: Path, environment: dict[str, str]) -> None:
    for attempt in (1, 2):
        job = start(repo, environment, "wrong")
        job.communicate()
        assert job.returncode == 1
        assert "error: this never works" in (repo / f".scratch/logs/wrong/{attempt}.log").read_text()
        assert record(repo, "wrong")["attempt"] == attempt
        assert record(repo, "wrong")["code"] == 1
    assert not (repo / ".scratch/stamps/wrong").exists()


def test_a_stage_with_a_checkpoint_ends_with_75_and_goes_on(repo: Path, environment: dict[str, str]) -> None:
    job = start(repo, environment, "resumable")
    wait_until_begun(repo, "resumable")
    # As SLURM does it: to every process of the job, dvc and the stage as well as this one.
    (dvc,) = children(job.pid)
    for pid in (job.pid, dvc, *children(dvc)):
        os.kill(pid, signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 75, said
    assert record(repo, "resumable")["code"] == 75
    assert (repo / "checkpoint").exists() and not (repo / "resumable").exists()
    again = start(repo, environment, "resumable")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert record(repo, "resumable")["attempt"] == 2


def test_a_signal_before_the_stage_has_begun_is_not_lost(repo: Path, environment: dict[str, str]) -> None:
    job = start(repo, environment, "resumable")
    while not (repo / ".scratch/jobs/resumable.json").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # dvc is being imported
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=300)
    assert job.returncode == 75
    assert not (repo / "resumable").exists()


def test_a_stage_without_a_checkpoint_is_not_left_running(repo: Path, environment: dict[str, str]) -> None:
    job = start(repo, environment, "helpless")
    wait_until_begun(repo, "helpless")
    (stage,) = children(children(job.pid)[0])
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=300)
    assert job.returncode == 75
    assert is_gone(stage)


@pytest.mark.parametrize("where", [[], NAMESPACE])
def test_no_stage_is_run_twice_at_once(where: list[str], repo: Path, environment: dict[str, str]) -> None:
    """Nor from another container, where the number of the first process means nothing."""
    if where and subprocess.run([*where, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not permit process namespaces (unshare --pid)")
    first = start(repo, environment, "resumable")
    wait_until_begun(repo, "resumable")
    second = start(repo, environment, "resumable", where)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 1
    assert said.startswith(f"error: resumable is being run by process {first.pid} on ")
    assert record(repo, "resumable")["pid"] == first.pid
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    assert first.returncode == 75


def test_what_a_killed_job_had_locked_is_free(repo: Path, environment: dict[str, str]) -> None:
    """Also where its process number is now that of another process, as may be on another node."""
    first = start(repo, environment, "resumable")
    wait_until_begun(repo, "resumable")
    (dvc,) = children(first.pid)
    for pid in (first.pid, dvc, *children(dvc)):
        os.kill(pid, signal.SIGKILL)
    first.communicate()
    locks = repo / ".dvc/tmp/rwlock"
    assert f'"pid": {dvc}' in locks.read_text()
    locks.write_text(locks.read_text().replace(f'"pid": {dvc}', '"pid": 1'))
    (repo / "checkpoint").write_text("half")
    again = start(repo, environment, "resumable")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said


def test_an_attempt_that_was_taken_over_ends(repo: Path, environment: dict[str, str]) -> None:
    """SLURM begins a job again when it has lost sight of its node, where the first attempt may still run."""
    first = start(repo, environment, "resumable")
    wait_until_begun(repo, "resumable")
    (stage,) = children(children(first.pid)[0])
    later = {**record(repo, "resumable"), "node": "elsewhere", "attempt": 2}
    (repo / ".scratch/jobs/resumable.json").write_text(json.dumps(later))
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1
    assert said.splitlines()[-1].startswith("error: resumable was taken over by another attempt")
    assert is_gone(stage)
    assert record(repo, "resumable") == later
    assert not (repo / "checkpoint").exists()


FILE = "head -c 3000000 /dev/urandom > big"
FOLDER = "mkdir big && head -c 3000000 /dev/urandom > big/one && head -c 10 /dev/urandom > big/other"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, as root")
@pytest.mark.parametrize("makes", [FILE, FOLDER])
def test_a_full_cache_says_so_and_the_next_attempt_succeeds(
    repo: Path, environment: dict[str, str], makes: str
) -> None:
    """Of a folder DVC says so, but does not fail."""
    cache = repo / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)], check=True)
    try:
        subprocess.run(["dvc", "cache", "dir", "--local", "cache"], cwd=repo, env=environment, check=True)
        (repo / "dvc.yaml").write_text(f"stages: {{big: {{cmd: '{makes}', outs: [big]}}}}\n")
        job = start(repo, environment, "big")
        said, _ = job.communicate()
        assert job.returncode == 1
        assert re.search(f"No space left on device: '{repo}/big.*' -> '{cache}/", said)
        assert "Traceback" not in said and not (repo / ".scratch/stamps/big").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(cache)], check=True)
        job = start(repo, environment, "big")
        said, _ = job.communicate()
        assert job.returncode == 0, said
    finally:
        subprocess.run(["umount", str(cache)], check=True)
