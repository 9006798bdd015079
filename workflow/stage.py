"""What every stage does around its work: quiet libraries, one-sentence errors, and a record of what it cost.

Exit codes of a stage: 0 it is done, 75 it was stopped and the same command goes on, all others it failed. A stage runs
alone, ends when the dvc that started it is gone, and says so where a disk is full.
"""

import atexit
import ctypes
import errno
import fcntl
import gc
import json
import logging
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

REPORT = "TORCHELASTIC_ERROR_FILE"  # set by torchrun: a file for each training process
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from what is kept
LOCKS = Path(".scratch/locks")
TRACEBACKS = Path(".scratch/tracebacks")


class StageError(ValueError):
    """The stage cannot go on; the message is one sentence that says what to do."""


class Stopped(SystemExit):
    """The stage was asked to end, and did; the message is one sentence that says where.

    The exit code is STOPPED where the same command goes on from what is kept, else 1.
    """

    def __init__(self, message: str, code: int = STOPPED) -> None:
        super().__init__(code)
        self.message, self.exit_code = message, code


@dataclass
class Stop:
    """Whether the stage was asked to end, and whether it does so by itself, after it has saved what it has."""

    asked: bool = False
    noted_only: bool = False


_stop = Stop()  # of this process
_held: dict[Path, int] = {}  # outputs whose lock it holds


def stoppable(what: str) -> Stop:
    """From now on SIGTERM and SIGINT end this process with exit code 75, or are noted where `noted_only` is set.

    Only the first one does: schedulers send them several times.

    Args:
        what: the stage and item, e.g. `sft cold_start`.
    """

    def ask(signum: int, _: FrameType | None) -> None:
        _stop.asked = True
        if not _stop.noted_only:
            _stop.noted_only = True
            # At once: what is being imported may catch an exception, and what runs in threads may take long.
            _leave(Stopped(f"{what} was stopped; the same command starts it again"), os.environ.get(REPORT))

    _stop.asked = _stop.noted_only = False
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ask)
    return _stop


def quiet() -> None:
    """Silence the libraries' chatter; must run before they are imported."""
    warnings.filterwarnings("ignore")
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        PYTHONWARNINGS="ignore",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        DVCLIVE_LOGLEVEL="ERROR",
        TORCH_CPP_LOG_LEVEL="ERROR",
        TRL_EXPERIMENTAL_SILENCE="1",
    )
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns before it has read VLLM_LOGGING_LEVEL
    if shutil.which("nvidia-smi") is None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns in every process that it found no GPU


def run(main: Callable[[], None]) -> None:
    """Run a stage; a ValueError raised on purpose becomes one sentence on stderr and exit code 1, Stopped one and 75,
    Ctrl-C one and 130.

    One of several training processes leaves what it has to say to workflow.launch, which prints what the first one
    to fail says, and does not outlive the process that started it.
    """
    from workflow.params import ParamsError

    quiet()
    gc.set_threshold(50_000)  # importing vLLM makes a million objects and no garbage; looking is a quarter of the time
    code: int | None = None

    def end() -> None:
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # Registered first it is called last, after threads and the libraries have ended: only Python's taking apart of all
    # modules is left out, which takes up to 2 seconds, and in which a thread of gloo may abort the process.
    atexit.register(end)
    report = os.environ.get(REPORT)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # workflow.job shields dvc from it, and with dvc its stages
    if report:
        die_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # srun sends it to us too; launch sends SIGTERM instead
    elif "DVC_STAGE" in os.environ:
        die_with_parent(signal.SIGTERM)  # nobody would take what a stage makes whose dvc was killed
        if os.getsid(os.getppid()) != os.getsid(0):  # it was, before we were here: the parent now is another session's
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        main()
        code = 0
    except Stopped as stopped:
        if report:
            _leave(stopped, report)  # whatever threads NCCL and vLLM have: the time to save may be over
        _say(f"error: {stopped.message}", report)
        raise
    except KeyboardInterrupt:  # where nothing is to be saved, see `stoppable`
        _say("error: interrupted; the same command starts it again", report)
        code = 128 + signal.SIGINT
        sys.exit(code)
    except Exception as error:
        said = str(error) if isinstance(error, (ParamsError, StageError)) else unexpected(error)
        if _stop.asked:
            # The signal that asked us to end has ended what a step needs too, a vLLM server for example.
            said = f"stopped before a checkpoint; the same command goes on from the one before ({said})"
        _say(f"error: {said}", report)
        code = STOPPED if _stop.asked else 1
        sys.exit(code)
    finally:
        # How it ends is decided, and Python takes our handlers away while it shuts down.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)


def die_with_parent(signum: int) -> None:
    """Let the kernel send this process a signal when the one that started it has ended."""
    ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG of linux/prctl.h


def alone(output: Path) -> None:
    """Hold the lock of an output until this process has ended; wait while another one holds it.

    DVC's own lock is a process id, which another container or node cannot look up, and is gone with a dvc that was
    killed while its stage goes on. What is forked from here on holds this one too: launch.run's watcher, which
    outlives a launch that was killed until all that it started has ended.

    Raises:
        OSError: this file system has no locks (`python -m workflow.doctor` looks).
    """
    if output.absolute() in _held:
        return
    LOCKS.mkdir(parents=True, exist_ok=True)
    file = LOCKS / f"{str(output).strip('/').replace('/', '-')}.lock"
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{output} is being written by {os.read(handle, 200).decode()}; waiting for it to end", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    _held[output.absolute()] = handle
    os.truncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def unexpected(error: Exception) -> str:
    """What failed, and where, in one sentence; its traceback goes to a file."""
    what = [Path(sys.argv[0]).stem, *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    name = re.sub(r"[^\w.-]+", "-", "-".join([*what, *filter(None, [os.environ.get("RANK")])]))[:100]
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if is_no_space(error):
        return f"{' '.join(what)}: no space is left on a disk; make room, and start it again ({cause})"
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame for frame in frames[1:] if Path(frame.filename).parent == Path(__file__).parent]
    place = here[-1] if here else frames[-1]
    said = f"{' '.join(what)} failed in line {place.lineno} of {place.filename} ({cause})"
    try:
        TRACEBACKS.mkdir(parents=True, exist_ok=True)
        file = TRACEBACKS / f"{name}.txt"
        file.write_text("".join(traceback.format_exception(error)))
    except OSError:
        traceback.print_exception(error)
        return said
    return f"{said}; if that does not tell you what to change, report it with {file}"


def is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an exception; safetensors and torch raise others than OSError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "PytorchStreamWriter failed" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Say in one sentence that the disk was too small for a file or folder that the `with` block writes.

    Args:
        path: removed where it could not be finished.
        size: bytes that it takes.

    Raises:
        StageError: with path, need and room.
    """
    room = shutil.disk_usage(path.parent).free
    try:
        yield
    except Exception as error:  # of any library that writes
        if not is_no_space(error):
            raise
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        raise StageError(
            f"{path} needs {megabytes(size)} and its disk had {megabytes(room)}; make room there, and start it again"
        ) from error


def check_cache(outs: list[Path]) -> None:
    """Raise StageError where DVC's cache has no room for the outputs of a stage that dvc has started.

    DVC notices it when it copies them, and for a folder ends with exit code 0 all the same.
    """
    if "DVC_STAGE" not in os.environ or (cache := dvc_cache()) is None:
        return
    from dvc.fs import localfs
    from dvc_objects.fs.generic import test_links

    place = next(path for path in (cache, *cache.parents) if path.exists())
    if test_links(["reflink"], localfs, str(outs[0].parent), localfs, str(place / "file")):
        return  # as DVC does where it can: both files have the same blocks
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    need = sum(file.stat().st_size for file in files)
    room = shutil.disk_usage(place).free
    if need > room:
        raise StageError(
            f"{outs[0]} is made and needs {megabytes(need)} in DVC's cache, {cache}, which has room for "
            f"{megabytes(room)}; make room there, and start it again"
        )


def dvc_cache() -> Path | None:
    """The folder of DVC's cache, None outside of a DVC repository."""
    from dvc.config import Config

    folder = Path(os.environ.get("DVC_ROOT", "")) / ".dvc"
    if not (folder / "config").is_file():
        return None
    return Path(Config(str(folder.absolute()))["cache"].get("dir", folder.absolute() / "cache"))


def megabytes(size: float) -> str:
    """A size for people, e.g. 1,234.5 MB."""
    return f"{size / 1e6:,.1f} MB"


def _leave(stopped: Stopped, report: str | None) -> None:
    """End this process at once."""
    _say(f"error: {stopped.message}", report)
    sys.stdout.flush()
    os._exit(stopped.exit_code)


def _say(message: str, report: str | None) -> None:
    """Print why the stage ends, or leave it in torchrun's file."""
    if report:
        Path(report).write_text(json.dumps({"message": message, "timestamp": time.time()}))
    else:
        print(message, file=sys.stderr, flush=True)


def record(
    log: Path,
    stage: str,
    item: str,
    libraries: list[str],
    summary: str,
    outs: list[Path],
    earlier: float = 0,
    **facts: Any,
) -> None:
    """Write `<log>/stage.json` and print the stage's last line.

    Args:
        outs: what the stage has made besides, for a look at the room in DVC's cache.
        libraries: distributions whose versions are noted.
        summary: what came out, in a few words.
        earlier: seconds of work of earlier runs that this one went on from.
        facts: more numbers, e.g. rows or tokens; they overwrite what is measured here: seconds since the stage
            started and this process' peak memory in MiB.
    """
    facts = {
        "stage": stage,
        "item": item,
        "summary": summary,
        "seconds": round(earlier + time.time() - _started(), 1),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in libraries},
        **facts,
    }
    log.mkdir(parents=True, exist_ok=True)
    (log / "stage.json").write_text(json.dumps(facts, indent=2) + "\n")
    check_cache([*outs, log])
    print(f"{stage} {item}: {summary} ({facts['seconds']:.0f} s, {facts['peak_memory_mib']} MiB)", flush=True)


def _started() -> float:
    """Unix time at which the stage was started, by workflow.launch or as this process, so that imports count."""
    import psutil

    return float(os.environ.get("STAGE_STARTED") or psutil.Process().create_time())


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Progress:
    """A line every few seconds: how far, how fast, how long still."""

    def __init__(self, label: str, total: int, every: float = 5.0) -> None:
        self.label, self.total, self.every = label, total, every
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """Print when `every` seconds have passed, and at the end."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.start = done, now
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        rate = (done - self.first) / (now - self.start) if now > self.start else 0
        left = f", ETA {clock((self.total - done) / rate)}" if rate else ""
        print(f"{self.label}: {done}/{self.total}{left}{', ' + note if note else ''}", flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, e.g. 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
