"""What every stage does around its work: quiet libraries, one-sentence errors, and a record of what it cost."""

import ctypes
import json
import logging
import os
import platform
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

REPORT = "TORCHELASTIC_ERROR_FILE"  # set by torchrun: a file for each training process
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from what is kept


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
            stopped = Stopped(f"{what} was stopped while it was starting; the same command starts it again")
            if report := os.environ.get(REPORT):
                _leave(stopped, report)  # what is being imported may catch an exception, and others wait for us
            raise stopped

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
    """Run a stage; a ValueError raised on purpose becomes one sentence on stderr and exit code 1, Stopped one and 75.

    One of several training processes leaves what it has to say to workflow.launch, which prints what the first one
    to fail says, and does not outlive the process that started it.
    """
    from workflow.params import ParamsError

    quiet()
    report = os.environ.get(REPORT)
    if report:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # srun sends it to us too; launch sends SIGTERM instead
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # workflow.job shields dvc from it, and with dvc its stages
    try:
        main()
    except Stopped as stopped:
        if report:
            _leave(stopped, report)  # whatever threads NCCL and vLLM have: the time to save may be over
        _say(f"error: {stopped.message}", report)
        raise
    except Exception as error:
        ours = isinstance(error, (ParamsError, StageError))
        if _stop.asked:
            # The signal that asked us to end has ended what a step needs too, a vLLM server for example.
            said = str(error) if ours else traceback.format_exc().strip().splitlines()[-1]
            _say(f"error: stopped before a checkpoint; the same command goes on from the one before ({said})", report)
            sys.exit(STOPPED)
        if not ours and not report:
            raise
        _say(f"error: {error}" if ours else traceback.format_exc(), report)
        sys.exit(1)
    finally:
        # How it ends is decided, and Python takes our handlers away while it shuts down.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)


def _leave(stopped: Stopped, report: str) -> None:
    """End a training process at once."""
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
    log: Path, stage: str, item: str, libraries: list[str], summary: str, earlier: float = 0, **facts: Any
) -> None:
    """Write `<log>/stage.json` and print the stage's last line.

    Args:
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
