"""Running what launch has planned, with small real processes in the place of trainers and servers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from workflow.launch import Allocation, Hardware, accelerate_options, commands, first_to_fail, free_ports
from workflow.params import load_params

Process = subprocess.Popen[str]
KILLED = "ended by SIGKILL, as the kernel does when memory runs out"

# Becomes healthy after DELAY seconds, then notes that it was ended in good order.
SERVER = """
import http.server, os, signal, sys, time
from pathlib import Path
Path("server.pid").write_text(str(os.getpid()))
print("loading the model", flush=True)

def end(*_):
    Path("server.ended").touch()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
time.sleep(float(os.environ.get("DELAY", 0)))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Callable[..., Process]:
    """Starts a process that runs scripts as launch does: a server, where there is one, and what needs it.

    All of it happens in this test's folder, which the test is in too; `constants` are launch's.
    """
    monkeypatch.chdir(tmp_path)
    port = str(free_ports().server)

    def begin(work: str, server: str = "", variables: dict[str, str] | None = None, **constants: float) -> Process:
        (tmp_path / "work.py").write_text(work)
        (tmp_path / "server.py").write_text(server)
        script = f"""
import sys
from pathlib import Path
from workflow import launch
from workflow.launch import Command, run

vars(launch).update({{"READY_WITHIN": 30}} | {constants!r})
health, output = "http://127.0.0.1:{port}/health", Path("log/server.log")
server = Command("the server", [sys.executable, "server.py"], health=health, output=output)
work = Command("the training", [sys.executable, "work.py"], {{"PLACE": "here"}})
sys.exit(run([server, work] if {bool(server)} else [work]))
"""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, "-c", script], env=environment | {"PORT": port} | (variables or {}), **pipes
        )

    return begin


def is_written(file: str) -> bool:
    """A file exists before its text does."""
    return Path(file).is_file() and bool(Path(file).read_text())


def is_there(pid_file: str) -> bool:
    try:
        return psutil.Process(int(Path(pid_file).read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_output_is_passed_on_unchanged(start):
    work = (
        "import os, sys; print(os.environ['PLACE']); print('é\\n\\n  x', file=sys.stderr); sys.stderr.write('no end')"
    )
    process = start(work)
    assert process.communicate() == ("here\n", "é\n\n  x\nno end")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("raise ValueError('broken')", 1, "error: the training ended with exit code 1: ValueError: broken"),
        ("import sys; sys.exit(75)", 75, "error: the training ended with exit code 75"),
        ("import sys; sys.exit('bye')", 1, "error: the training ended with exit code 1: bye"),
        ("import sys; sys.exit(255)", 255, "error: the training ended with exit code 255"),
        ("import os; os.kill(os.getpid(), 9)", 137, f"error: the training was {KILLED}"),
        ("import sys; sys.exit(143)", 143, "error: the training was ended by SIGTERM"),
        ("import sys; sys.exit('error: no completions; name others')", 1, "error: no completions; name others"),
        ("import sys; print('error: first\\nerror: second', file=sys.stderr); sys.exit(3)", 3, "error: first"),
    ],
)
def test_a_failure_is_one_sentence_at_the_end(start, work, code, said):
    process = start(work)
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.endswith(f"{said}\n") and errors.count(said) == (2 if "second" in work else 1)


def test_servers_are_waited_for_and_ended(start):
    """Asked directly: the environment of a cluster may have a proxy, which does not know this machine."""
    work = """
import os, urllib.request
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(direct.open(f"http://127.0.0.1:{os.environ['PORT']}/health").status)
"""
    begun = time.monotonic()
    process = start(
        work, SERVER, {"DELAY": "2", "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    )
    assert process.communicate() == ("200\n", "")
    assert process.returncode == 0 and time.monotonic() - begun > 2
    assert Path("server.ended").is_file() and not is_there("server.pid")
    assert Path("log/server.log").read_text() == "loading the model\n"


def test_progress_of_a_server_that_starts_slowly(start):
    output, errors = start("", SERVER, {"DELAY": "2"}, TOLD_EVERY=1).communicate()
    assert re.fullmatch(r"(the server is starting, 0:0\d\n)+", output) and errors == ""


@pytest.mark.parametrize(
    ("server", "code", "said"),
    [
        ("raise MemoryError('of the GPU')", 1, "the server ended with exit code 1: MemoryError: of the GPU"),
        ("print('enough'); import sys; sys.exit(75)", 75, "the server ended with exit code 75: enough"),
        ("print('enough')", 1, "the server ended with exit code 0: enough"),
        ("print('busy', flush=True); import time; time.sleep(900)", 1, "the server was not ready after 2 s: busy"),
    ],
)
def test_a_server_that_does_not_start(start, server, code, said):
    begun = time.monotonic()
    process = start("from pathlib import Path; Path('begun').touch()", server, READY_WITHIN=2)
    _, errors = process.communicate()
    assert process.returncode == code and time.monotonic() - begun < 300
    assert errors.endswith(f"error: {said}; its output is in log/server.log\n")
    assert ("Traceback" in errors) == ("MemoryError" in server)  # its last lines are shown
    assert not Path("begun").exists()


WAITS = """
import os, time
from pathlib import Path
Path("work.pid").write_text(str(os.getpid()))
time.sleep(900)
"""


def test_a_server_that_dies_ends_the_training(start):
    process = start(WAITS, SERVER)
    wait_for(lambda: is_written("work.pid"))
    os.kill(int(Path("server.pid").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 137 and not is_there("work.pid")
    assert errors.endswith(f"error: the server was {KILLED}: loading the model; its output is in log/server.log\n")


def test_training_that_fails_ends_the_server_and_its_children(start):
    """A vLLM server that is told to end while it loads a model stays, so it is killed, with its own processes."""
    stubborn = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER.replace(
        "signal.signal(signal.SIGTERM, end)",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])\n"
        "Path('child.pid').write_text(str(child.pid))",
    )
    process = start("raise KeyError('wrong')", stubborn, GRACE=1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and not is_there("server.pid") and not is_there("child.pid")
    assert errors.endswith("error: the training ended with exit code 1: KeyError: 'wrong'\n")


SAVES = """
import os, signal, sys, time, urllib.request
from pathlib import Path

def save(signum, _):
    time.sleep(1)
    if SERVED:
        urllib.request.urlopen(f"http://127.0.0.1:{os.environ['PORT']}/health")
    print("saved", signal.Signals(signum).name, flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
Path("work.pid").write_text(str(os.getpid()))
time.sleep(900)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("server", ["", SERVER])
def test_a_signal_lets_the_training_save(start, signum, server):
    process = start(SAVES.replace("SERVED", str(bool(server))), server)
    wait_for(lambda: is_written("work.pid"))
    process.send_signal(signum)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (75, "saved SIGTERM\n")
    assert errors == "error: the training ended with exit code 75\n"
    assert not server or Path("server.ended").is_file()


def test_a_server_that_is_signalled_too_does_not_end_the_saving(start):
    """SLURM signals every process of a job."""
    process = start(SAVES.replace("SERVED", "False"), SERVER)
    wait_for(lambda: is_written("work.pid"))
    for pid in (process.pid, int(Path("server.pid").read_text())):
        os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=300)[0] == "saved SIGTERM\n" and process.returncode == 75


def test_trainers_save_when_a_signal_reaches_only_what_was_started(start):
    """As SLURM does it: it asks the steps of a job to end, not the script that has started them."""
    work = "import os, signal, sys, time\nfrom pathlib import Path\n"
    work += "def save(*_):\n    time.sleep(1)\n    Path('saved').touch()\n    sys.exit(75)\n"
    work += "signal.signal(signal.SIGTERM, save)\nPath('work.pid').write_text(str(os.getpid()))\ntime.sleep(900)"
    process = start(work, SERVER)
    wait_for(lambda: is_written("work.pid"))
    for name in ("server", "work"):
        os.kill(int(Path(f"{name}.pid").read_text()), signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert Path("saved").exists()


def test_a_signal_while_the_server_starts(start):
    process = start(WAITS, SERVER, {"DELAY": "60"})
    wait_for(lambda: is_written("server.pid"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and not Path("work.pid").exists() and not is_there("server.pid")
    assert errors == "error: the server was stopped; the same command goes on from there\n"


def test_work_that_only_ends_when_it_is_asked_to(start):
    process = start(WAITS)
    wait_for(lambda: is_written("work.pid"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75
    assert errors == "error: the training was stopped; the same command goes on from there\n"


def test_what_several_nodes_say_is_said_once(start):
    work = "import sys; sys.exit('error: first\\nerror: first\\nsrun: n1 ended\\nerror: first')"
    assert start(work).communicate() == ("", "error: first\nsrun: n1 ended\nerror: first\n")


def test_nothing_is_left_when_the_launcher_is_killed(start):
    process = start(WAITS, SERVER)
    wait_for(lambda: is_written("work.pid"))
    process.kill()
    wait_for(lambda: not is_there("work.pid") and not is_there("server.pid"))
    assert Path("server.ended").is_file()


# What follows runs the real `accelerate launch` with two processes that do nothing.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from workflow import stage

rank = os.environ["RANK"]

def main():
    Path(f"trainer{rank}.pid").write_text(str(os.getpid()))
    BODY

stage.run(main)
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Callable[..., Process]:
    """Starts `accelerate launch` of a script with two processes, as launch does it."""
    monkeypatch.chdir(tmp_path)

    def begin(body: str, grace: float = 10, stop: int = signal.SIGTERM) -> Process:
        (tmp_path / "trainer.py").write_text(TRAINER.replace("BODY", body.replace("\n", "\n    ")))
        argv = [sys.executable, "-m", "workflow.launch", "accelerate", *accelerate_options(cpu_hardware(), "sft")]
        command = f"launch.Command('the training', {[*argv, 'trainer.py']!r}, stop={int(stop)})"
        script = f"import sys; from workflow import launch, stage; launch.GRACE = {grace}; "
        script += f"stage.run(lambda: sys.exit(launch.run([{command}])))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", script], env=environment | {"TMPDIR": str(tmp_path)}, **pipes)

    return begin


def cpu_hardware(**changes: object) -> Hardware:
    values = {"processes": 2, "accelerate": "ddp", "trainer": {"use_cpu": True}}
    return Hardware.model_validate(values | {"tokens_per_device": {"sft": 1024, "grpo": 1024}} | changes)


def test_what_all_training_processes_say_is_said_once(train):
    process = train("raise stage.StageError('the data set has no completions; name another')")
    assert process.communicate() == ("", "error: the data set has no completions; name another\n")
    assert process.returncode == 1
    assert not list(Path().glob("torchelastic*"))  # torchrun leaves a folder behind


def test_what_the_first_one_met_is_said_and_its_traceback_kept(train):
    process = train("time.sleep(2 * (rank == '0'))\nraise RuntimeError(f'process {rank} is broken')")
    _, errors = process.communicate()
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert re.match(r"error: trainer failed in line \d+ of .*trainer\.py \(RuntimeError: process 1 is broken\); ", line)
    assert "process 1 is broken" in Path(line.split(" report it with ")[1]).read_text()


def test_a_killed_process_is_to_blame_for_what_the_others_say(train):
    body = """
if rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
while os.path.exists(f"/proc/{Path('trainer1.pid').read_text() if Path('trainer1.pid').exists() else 'self'}/exe"):
    time.sleep(0.01)
raise RuntimeError("connection closed by peer")
"""
    process = train(body)
    _, errors = process.communicate()
    assert process.returncode == 137
    assert errors.endswith(f"error: training process 1 was {KILLED}\n")


def test_training_processes_may_save_before_they_end(train):
    body = """
def save(signum, _):
    time.sleep(1)
    os.write(1, b"saved\\n")
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
Path(f"trainer{rank}.ready").touch()
time.sleep(900)
"""
    process = train(body)
    wait_for(lambda: Path("trainer0.ready").exists() and Path("trainer1.ready").exists(), 60)
    for rank in range(2):  # srun sends its signals to all processes of a step
        os.kill(int(Path(f"trainer{rank}.pid").read_text()), signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode, output) == (75, "saved\nsaved\n")


def test_training_processes_that_are_asked_several_times(train):
    """SLURM signals every process of a step, and may do so again; accelerate is still there when they have ended."""
    body = """
def save(signum, _):
    signal.signal(signum, signal.SIG_IGN)
    time.sleep(1)
    raise stage.Stopped("it was stopped at step 3 of 9; the same command goes on from there")

signal.signal(signal.SIGTERM, save)
Path(f"trainer{rank}.ready").touch()
time.sleep(900)
"""
    process = train(body)
    wait_for(lambda: Path("trainer0.ready").exists() and Path("trainer1.ready").exists(), 60)
    while process.poll() is None:
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.communicate()[1] == "error: it was stopped at step 3 of 9; the same command goes on from there\n"
    assert process.returncode == 75


def test_training_processes_that_only_end(train):
    process = train("Path(f'trainer{rank}.ready').touch()\ntime.sleep(900)", stop=signal.SIGUSR1)
    wait_for(lambda: Path("trainer0.ready").exists() and Path("trainer1.ready").exists(), 60)
    process.send_signal(signal.SIGTERM)
    said = "error: the training was stopped while it was starting; the same command starts it again\n"
    assert process.communicate(timeout=300) == ("", said)
    assert process.returncode == 75


def test_no_training_process_is_left_when_the_launcher_is_killed(train):
    """Not even one that does not react to SIGTERM, as one that waits for another GPU."""
    process = train(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath(f'trainer{rank}.ready').touch()\ntime.sleep(900)",
        grace=1,
    )
    wait_for(lambda: Path("trainer0.ready").exists() and Path("trainer1.ready").exists(), 60)
    process.kill()
    wait_for(lambda: not is_there("trainer0.pid") and not is_there("trainer1.pid"), 20)


@pytest.mark.parametrize("spread", ["ddp", "zero2"])
def test_two_nodes_find_each_other(spread, sound, write_params, tmp_path, environment, monkeypatch):
    """The real command of each node, without srun in front of it."""
    monkeypatch.chdir(tmp_path)
    hardware = cpu_hardware(nodes=2, processes=1, accelerate=spread)
    hosts = Allocation(("127.0.0.1", "127.0.0.2"), ())
    arguments = ["cold_start", "--model", "m", "--log", "l"]
    (command,) = commands(hosts, hardware, load_params(write_params(sound)), "sft", arguments, free_ports())
    argv = command.argv[command.argv.index(sys.executable) : command.argv.index("workflow.sft") - 1]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    (tmp_path / "trainer.py").write_text(f"import os; print(*(os.environ[name] for name in {names}))")
    nodes = []
    for rank in range(2):
        variables = environment | {"SLURM_PROCID": str(rank), "TMPDIR": str(tmp_path)}
        nodes.append(subprocess.Popen([*argv, "trainer.py"], env=variables, stdout=subprocess.PIPE, text=True))
    assert [node.communicate(timeout=120)[0] for node in nodes] == ["0 0 2 127.0.0.1\n", "1 0 2 127.0.0.1\n"]
    assert [node.returncode for node in nodes] == [0, 0]


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([(0, 1, 100.7), (1, 1, 100.2)], 1),
        ([(0, 1, 100.7), (1, 75, None)], 1),  # no words: by the second in which torchrun saw it
        ([(0, -15, None), (1, 1, 100.2)], 1),  # torchrun ended the other one
        ([(0, 1, 100.1), (1, -9, None)], 1),  # the peer saw it go, torchrun later
        ([(0, -9, None, 130), (1, 1, 100.1)], 1),  # torchrun, when it had waited for half a minute
        ([(0, -15, None), (1, -15, None)], 0),
        ([(1, 75, None), (0, -15, None)], 1),
    ],
)
def test_which_process_failed_first(failures, first, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    seen = {}
    for rank, code, said, *at in failures:
        file = tmp_path / str(rank)
        if said is not None:
            file.write_text(json.dumps({"message": "error: no", "timestamp": said}))
        seen[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))
        seen[rank].timestamp = at[0] if at else 100
    assert first_to_fail(seen)[0] == first
