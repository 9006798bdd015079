import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from workflow import stage


def record(folder: Path, **facts: object) -> dict[str, object]:
    stage.record(folder / "logs", "sft", "cold_start", ["pytest"], "9 rows", **facts)
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
        f"stage.record(Path({str(tmp_path)!r}), 'a', 'b', [], 'c')"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert 1 <= json.loads((tmp_path / "stage.json").read_text())["seconds"] < 30


def run(raised: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = f"""
from workflow import stage
from workflow.params import ParamsError
def main():
    print("working")
    {raised}
stage.run(main)
"""
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("error", ["ParamsError", "stage.StageError"])
def test_mistakes_are_one_sentence(error, environment):
    done = run(f"raise {error}('seed is missing; add it')", environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "working\n", "error: seed is missing; add it\n")


def test_success_says_nothing(environment):
    done = run("pass", environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "working\n", "")


@pytest.mark.parametrize("error", ["KeyError('a')", "ValueError('a')", "RuntimeError('a')"])
def test_anything_else_keeps_its_traceback(error, environment):
    done = run(f"raise {error}", environment)
    assert done.returncode == 1 and "Traceback" in done.stderr and error.split("(")[0] in done.stderr


def test_exit_codes_pass(environment):
    assert run("raise SystemExit(75)", environment).returncode == 75


def test_a_stage_that_was_stopped_says_where(environment):
    done = run("raise stage.Stopped('sft a was stopped at step 3 of 9')", environment)
    assert (done.returncode, done.stdout, done.stderr) == (75, "working\n", "error: sft a was stopped at step 3 of 9\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_can_be_stopped_ends_at_the_first_signal(signum, environment):
    """The others come while it ends."""
    raised = f"""import os, time
    stop = stage.stoppable("sft a")
    try:
        os.kill(os.getpid(), {int(signum)})
        time.sleep(60)
    finally:
        assert stop.asked
        os.kill(os.getpid(), {int(signum)})
        time.sleep(0.1)
    """
    done = run(raised, environment)
    said = "error: sft a was stopped while it was starting; the same command starts it again\n"
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
