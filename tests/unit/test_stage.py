import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from workflow import stage


def record(folder: Path, **facts: object) -> dict[str, object]:
    stage.record(folder / "logs", "sft", "cold_start", ["pytest"], "9 rows", [], **facts)
    return json.loads((folder / "logs/stage.json").read_text())


def test_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAGE_STARTED", str(time.time() - 90))
    facts = record(tmp_path, rows=9)
    assert list(facts) == [
        "stage",
        "item",
        "summary",
        "seconds",
        "peak_memory_mib",
        "machine",
        "versions",
        "rows",
    ]
    assert (facts["stage"], facts["item"], facts["summary"], facts["rows"]) == ("sft", "cold_start", "9 rows", 9)
    assert 90 <= facts["seconds"] < 150
    assert 10 < facts["peak_memory_mib"] < 100_000
    assert facts["machine"]["cores"] == os.cpu_count() and facts["machine"]["system"] == platform.platform()
    assert facts["machine"]["cpu"]
    assert facts["versions"] == {"pytest": version("pytest")}
    assert re.fullmatch(r"sft cold_start: 9 rows \(\d+ s, \d+ MiB\)\n", capsys.readouterr().out)


def test_what_the_stage_measured_wins(tmp_path, capsys):
    facts = record(tmp_path, peak_memory_mib=12345, seconds=61.4)
    assert (facts["peak_memory_mib"], facts["seconds"]) == (12345, 61.4)
    assert capsys.readouterr().out == "sft cold_start: 9 rows (61 s, 12345 MiB)\n"


def test_time_of_earlier_runs_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_STARTED", str(time.time() - 90))
    assert 190 <= record(tmp_path, earlier=100)["seconds"] < 250


def test_time_counts_from_the_start_of_the_process(tmp_path, environment):
    code = (
        "import time; time.sleep(1); from pathlib import Path; from workflow import stage; "
        f"stage.record(Path({str(tmp_path)!r}), 'a', 'b', [], 'c', [])"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert 1 <= json.loads((tmp_path / "stage.json").read_text())["seconds"] < 30


def run(raised: str, environment: dict[str, str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = f"""
from workflow import stage
from workflow.params import ParamsError
def main():
    print("working")
    {raised}
stage.run(main)
"""
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("error", ["ParamsError", "stage.StageError"])
def test_mistakes_are_one_sentence(error, environment):
    done = run(f"raise {error}('seed is missing; add it')", environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "working\n", "error: seed is missing; add it\n")


def test_success_says_nothing(environment):
    done = run("pass", environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "working\n", "")


@pytest.mark.parametrize("error", ["KeyError('a')", "ValueError('a')", "RuntimeError('a')"])
def test_anything_else_is_one_sentence_and_a_traceback_in_a_file(error, environment, tmp_path):
    done = run(f"raise {error}", environment, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(rf"error: -c failed in line 6 of .* \({error.split('(')[0]}: '?a'?\); ", line), line
    file = tmp_path / line.split(" report it with ")[1]
    assert file.read_text().startswith("Traceback") and error.split("(")[0] in file.read_text()


def test_without_room_for_the_traceback_it_is_printed(environment, tmp_path):
    (tmp_path / ".scratch").write_text("no folder")
    done = run("raise KeyError('a')", environment, tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: -c failed in line 6")


@pytest.mark.parametrize(
    "raised",
    [
        "raise OSError(errno.ENOSPC, 'No space left on device', 'a')",
        "raise RuntimeError('I/O error: No space left on device (os error 28)')",
        "raise ValueError('a') from OSError(errno.EDQUOT, 'Disk quota exceeded')",
    ],
)
def test_a_full_disk_is_one_sentence(raised, environment, tmp_path):
    done = run(f"import errno; {raised}", environment, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: -c: no space is left on a disk; make room, and start it again (")


def test_what_does_not_fit_is_removed_and_named_with_its_size(tmp_path):
    part = tmp_path / "samples.part"
    with pytest.raises(stage.StageError) as raised, stage.writing(part, 12_300_000):
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert re.match(rf"{part} needs 12\.3 MB and its disk had [\d,.]+ MB; make room there", str(raised.value))
    assert not part.exists()
    with pytest.raises(OSError, match="denied"), stage.writing(part, 1):
        raise PermissionError("denied")


def test_the_cache_must_have_room_for_what_dvc_will_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep/model").write_bytes(b"x" * 1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 999))
    stage.check_cache([out])  # outside of DVC
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    dir = /nowhere/at/all\n")
    stage.check_cache([out])  # not started by dvc
    monkeypatch.setenv("DVC_STAGE", "sft@a")
    with pytest.raises(stage.StageError, match=r"out is made and needs 0\.0 MB in DVC's cache, /nowhere/at/all, which"):
        stage.check_cache([out])
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    stage.check_cache([out])


def test_ctrl_c_is_one_sentence(environment, tmp_path):
    """Of a stage that has nothing to save; `stoppable` ones end with 75."""
    done = run("import os, signal; signal.raise_signal(signal.SIGINT)", environment, tmp_path)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; the same command starts it again\n"


def test_one_writes_an_output_and_another_waits(environment, tmp_path):
    """Also after the first one was killed: what it forked holds the lock."""
    first = """import os, time
    from pathlib import Path
    stage.alone(Path("data/models/a"))
    if os.fork() == 0:
        os.closerange(0, 3)
        while not Path("waits").exists():
            time.sleep(0.01)
        Path("written").touch()
        os._exit(0)
    os.kill(os.getpid(), 9)"""
    second = """from pathlib import Path
    from threading import Timer
    stage.alone(Path("data/models/b"))
    Timer(2, Path("waits").touch).start()
    stage.alone(Path("data/models/a"))
    print(Path("written").exists())"""
    assert run(first, environment | {"PYTHONUNBUFFERED": "1"}, tmp_path).returncode == -9
    done = run(second, environment, tmp_path)
    said, ended = done.stdout.splitlines()[1:]
    assert re.fullmatch(r"data/models/a is being written by process \d+ on \S+; waiting for it to end", said)
    assert ended == "True"
    assert run(second, environment, tmp_path).stdout == "working\nTrue\n"


def test_a_stage_is_asked_to_end_when_its_dvc_is_killed(environment, tmp_path):
    code = """
from workflow import stage
import time
def main():
    stage.stoppable("sft a")
    print("working", flush=True)
    time.sleep(60)
stage.run(main)
"""
    shell = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])", code]
    for dvc in (True, False):
        known = environment | ({"DVC_STAGE": "sft@a"} if dvc else {})
        with (tmp_path / "said").open("w") as file:
            parent = subprocess.Popen(shell, env=known, cwd=tmp_path, stdout=file, stderr=file)
        while not (tmp_path / "said").read_text():
            time.sleep(0.05)
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        if dvc:
            child.wait(10)
            assert "error: sft a was stopped; the same command starts it again" in (tmp_path / "said").read_text()
        else:
            time.sleep(0.3)
            assert child.is_running()
            child.kill()


def test_a_stage_ends_whose_dvc_was_gone_before_it_began(environment, tmp_path):
    """Its parent is then the init of another session."""
    for dvc, code in ((True, -signal.SIGTERM), (False, 0)):
        known = environment | ({"DVC_STAGE": "sft@a"} if dvc else {})
        run = [sys.executable, "-c", "from workflow import stage; stage.run(lambda: print('working'))"]
        done = subprocess.run(run, env=known, cwd=tmp_path, capture_output=True, text=True, start_new_session=True)
        assert (done.returncode, done.stdout) == (code, "" if dvc else "working\n"), done.stderr


def test_what_ends_with_the_process_ends(environment):
    """Threads, pools and the libraries' own exit functions come before the end; only the modules stay as they are."""
    code = (
        "import atexit, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from threading import Thread\n"
        "from workflow import stage\n"
        "class Left:\n"
        "    def __del__(self): print('taken apart', flush=True)\n"
        "def main():\n"
        "    global left\n"
        "    left = Left()\n"
        "    atexit.register(print, 'exit function')\n"
        "    Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "    ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.6), print('pool')))\n"
        "    print('main')\n"
        "stage.run(main)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split("\n") == ["main", "thread", "pool", "exit function", ""]
    failed = subprocess.run(
        [sys.executable, "-c", code.replace("print('main')", "raise ValueError")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert failed.returncode == 1
    assert failed.stdout.split("\n") == ["thread", "pool", "exit function", ""]


def test_exit_codes_pass(environment):
    assert run("raise SystemExit(75)", environment).returncode == 75


def test_a_stage_that_was_stopped_says_where(environment):
    done = run("raise stage.Stopped('sft a was stopped at step 3 of 9')", environment)
    assert (done.returncode, done.stdout, done.stderr) == (75, "working\n", "error: sft a was stopped at step 3 of 9\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_can_be_stopped_ends_at_the_first_signal(signum, environment):
    """The others come while it ends."""
    raised = f"""import os, time
    stage.stoppable("sft a")
    os.kill(os.getpid(), {int(signum)})
    os.kill(os.getpid(), {int(signum)})
    time.sleep(60)
    """
    done = run(raised, environment)
    said = "error: sft a was stopped; the same command starts it again\n"
    assert (done.returncode, done.stderr) == (75, said)


def test_a_stage_that_saves_first_is_only_told(environment):
    raised = """import os
    stop = stage.stoppable("sft a")
    stop.noted_only = True
    os.kill(os.getpid(), 15)
    print(stop.asked)"""
    done = run(raised, environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "working\nTrue\n", "")


@pytest.mark.parametrize("ignored", [True, False])
def test_sigterm_ends_a_stage_that_was_started_with_it_ignored(ignored, environment):
    """As workflow.job starts dvc, and with it every stage."""
    code = "import os, time\nfrom workflow import stage\n"
    code += "def main():\n    os.kill(os.getpid(), 15)\n    time.sleep(60)\nstage.run(main)"
    shield = "trap '' TERM; " if ignored else ""
    done = subprocess.run(["bash", "-c", f'{shield}"$0" -c "$1"; exit $?', sys.executable, code], env=environment)
    assert done.returncode == 143


def test_libraries_are_quiet_and_offline(environment):
    done = run("import os, warnings; warnings.warn('x'); print(os.environ['HF_HUB_OFFLINE'])", environment)
    assert (done.stdout, done.stderr) == ("working\n1\n", "")


def test_progress_prints_how_far_and_how_long(capsys):
    progress = stage.Progress("sft cold_start", 300, every=0)
    progress.update(100)
    progress.start -= 50  # 100 steps took 50 seconds
    progress.update(200, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["sft cold_start: 100/300", "sft cold_start: 200/300, ETA 0:50, loss 0.5"]


def test_progress_of_a_resumed_run_counts_from_where_it_resumed(capsys):
    progress = stage.Progress("sft", 1000, every=0)
    progress.update(900)
    progress.start -= 120
    progress.update(920)
    assert capsys.readouterr().out.splitlines()[1] == "sft: 920/1000, ETA 8:00"


def test_progress_waits_between_lines_but_not_with_the_last(capsys):
    progress = stage.Progress("sft", 1000, every=60)
    for done in range(999):
        progress.update(done)
    assert capsys.readouterr().out == ""
    progress.last -= 60
    progress.update(999)
    progress.update(1000)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["sft: 999/1000", "sft: 1000/1000"]
