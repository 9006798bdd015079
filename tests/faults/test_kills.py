"""Every stage is killed at random moments, by dvc and by Snakemake, and ends with the bytes of a run left in peace."""

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.checkout import ROOT, Checkout, locked
from workflow import locks

SEED = 20260
# How often each stage is killed at a random moment, and while DVC hashes and copies what it made.
KILLS = {
    "check": (2, 2),
    "download@base": (6, 3),
    "prepare@traces": (5, 2),
    "sft@cold_start": (6, 1),
    "grpo@reasoning": (6, 0),
    "generate@reasoning-arithmetic": (5, 0),
    "score@reasoning-arithmetic": (5, 2),
    "report": (4, 2),
}
# The last line of a stage: from here on DVC hashes and copies.
DONE = ("check: params.yaml is sound", " MiB)", "report: data/report/report.html")


def alive(folder: Path) -> dict[psutil.Process, list[str]]:
    """The processes that run in a checkout, with the words of their command lines."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found[process] = process.cmdline()
    return found


class Watch(threading.Thread):
    """Looks all the time how many trainings and vLLM engines run in a checkout at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.over, self.most = folder, threading.Event(), Counter()

    def run(self) -> None:
        while not self.over.wait(0.2):
            processes = alive(self.folder)
            for module in ("workflow.sft", "workflow.grpo", "workflow.engine"):
                ours = [one for one, words in processes.items() if module in words and "accelerate" not in words]
                parents = set()
                for one in ours:  # the processes of one training have one parent
                    with suppress(psutil.NoSuchProcess):
                        parents.add(one.ppid())
                self.most[module] = max(self.most[module], len(parents))


@pytest.fixture(scope="module")
def stormy(trained: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout in which only the stages that are to be killed are left to do, and a watch over it."""
    checkout = Checkout(tmp_path_factory.mktemp("stormy"))
    known = yaml.safe_load(trained.run("git show HEAD:dvc.lock"))
    killed = {name: known["stages"].pop(name) for name in KILLS}
    (checkout.folder / "dvc.lock").write_text(yaml.safe_dump(known))
    names = " ".join(known["stages"])
    checkout.run(
        f"dvc remote add --local peace {trained.folder}/.dvc/cache && dvc pull -q --run-cache -r peace {names}"
    )
    forget_runs(checkout.folder, {stage["cmd"] for stage in killed.values()})
    # A checkpoint every half second, and one after every step.
    hardware = (checkout.folder / "workflow/hardware/cpu.yaml").read_text()
    (checkout.folder.parent / "machine.yaml").write_text(f"{hardware}checkpoint_minutes: 0.01\n")
    (checkout.folder.parent / "eager.yaml").write_text(f"{hardware}checkpoint_minutes: 0\n")
    watch = Watch(checkout.folder)
    watch.start()
    yield checkout
    assert watch.is_alive()
    watch.over.set()
    assert set(watch.most.values()) <= {0, 1}


def forget_runs(folder: Path, commands: set[str]) -> None:
    """Make as if DVC had never run these commands."""
    notes = list(folder.glob(".dvc/cache/runs/*/*/*"))  # several in a folder where logs differed
    for noted in {note.parent for note in notes if yaml.safe_load(note.read_text())["cmd"] in commands}:
        shutil.rmtree(noted)


def reported(folder: Path) -> tuple[dict, list[str]]:
    """What a report says that is the same each time: its metrics without costs, and which files it has."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"], metrics["peak_memory_mib"]
    return metrics, sorted(str(file.relative_to(folder)) for file in (folder / "data/report").rglob("*"))


class Storm:
    """The kills of one stage."""

    def __init__(self, checkout: Checkout, name: str, expected: dict) -> None:
        self.checkout, self.name, self.expected = checkout, name, expected
        self.log = checkout.folder.parent / f"{name}.log"
        self.told: list[str] = []
        entry, _, item = name.partition("@")
        logs = checkout.folder / "data/logs" / entry
        self.log_folder = logs / item.replace("-", "/") if item else None

    def begin(self, runner: str) -> subprocess.Popen[bytes]:
        command = {
            "dvc": f"dvc repro {self.name}",
            "snakemake": f"snakemake --cores 2 --nolock --rerun-incomplete .scratch/stamps/{self.name}",
        }[runner]
        self.log.write_bytes(b"")
        # DVC takes /bin/sh where no SHELL is named, as in a container or under cron.
        hardware = f"{self.checkout.folder.parent}/machine.yaml"
        return self.checkout.begin(f"env -u SHELL HARDWARE={hardware} {command}", self.log)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def hit(self, process: subprocess.Popen[bytes], victim: str, signum: signal.Signals) -> bool:
        """Send a signal to the runner, to all processes below it, or to the stage alone."""
        try:
            runner = psutil.Process(process.pid)
            below = runner.children(recursive=True)
        except psutil.NoSuchProcess:
            return False
        module = f"workflow.{self.name.partition('@')[0]}"
        hit = {"runner": [runner], "all": [runner, *below], "stage": []}[victim]
        for child in below if victim == "stage" else []:
            with suppress(psutil.NoSuchProcess):
                if module in child.cmdline() or ("workflow.launch" in child.cmdline()):
                    hit.append(child)
                    break
        for each in hit:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signum)
        return bool(hit)

    def ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the runner; whether the stage is done. What dvc.lock says of it must be right at any time."""
        process.wait(600)
        with chdir(self.checkout.folder):
            self.told += locks.mend()  # as `make repro` does before it starts dvc
            with locks.repo_lock():  # a dvc whose Snakemake was killed may be writing
                text = Path("dvc.lock").read_text() if Path("dvc.lock").exists() else ""
        # What a kill has cut off can still be YAML: DVC takes it for a stage that is to be run.
        found = locked(text).get(self.name) if text.endswith("\n") else None
        done = found is not None and len(found["outs"]) == len(self.expected["outs"])
        assert not done or found == self.expected
        return done

    def forget(self) -> None:
        """Make as if the stage had never been done; checkpoints go too, as DVC has its output."""
        for process in alive(self.checkout.folder):
            process.wait(300)
        file = self.checkout.folder / "dvc.lock"
        known = yaml.safe_load(file.read_text())
        known["stages"].pop(self.name, None)
        file.write_text(yaml.safe_dump(known))
        forget_runs(self.checkout.folder, {self.expected["cmd"]})
        shutil.rmtree(self.checkout.folder / ".scratch/checkpoints", ignore_errors=True)
        (self.checkout.folder / f".scratch/stamps/{self.name}").unlink(missing_ok=True)

    def kill(self, when: Callable[[subprocess.Popen[bytes]], None], how: tuple[str, str, signal.Signals]) -> bool:
        """One run that is hit; whether it was, and not over or held up by the one before."""
        runner, victim, signum = how
        process = self.begin(runner)
        began = time.monotonic()
        when(process)
        struck = process.poll() is None and self.hit(process, victim, signum)
        after = time.monotonic() - began
        done = self.ended(process)
        said = self.said()
        if struck:
            self.told.append(f"{runner}: {signum.name} to {victim} after {after:.1f} s{', done' if done else ''}")
        if done:
            self.forget()
        elif not struck:
            # The one before is still ending, and this one said so.
            held = ("is being run by process", "is being blocked by", "Unable to acquire lock")
            assert any(words in said for words in held), said[-3000:]
            time.sleep(1)
        return struck


@pytest.mark.parametrize("name", list(KILLS))
def test_killed_at_random_it_ends_with_the_same_bytes(name: str, trained: Checkout, stormy: Checkout) -> None:
    rng = random.Random(f"{SEED} {name}")
    storm = Storm(stormy, name, locked(trained.run("git show HEAD:dvc.lock"))[name])
    stormy.run("python -m workflow.stamps")
    facts = storm.log_folder and trained.folder / storm.log_folder.relative_to(stormy.folder) / "stage.json"
    seconds = json.loads(facts.read_text())["seconds"] if facts else 2.0

    def at_random(process: subprocess.Popen[bytes]) -> None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.5, seconds + 3))

    def while_dvc_hashes(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not any(line in storm.said() for line in DONE):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))

    kills = 0
    for moment, count in zip((at_random, while_dvc_hashes), KILLS[name], strict=True):
        struck = 0
        while struck < count:
            victim = rng.choice(("runner", "all", "stage")) if moment is at_random else "runner"
            signum = rng.choice((signal.SIGKILL, signal.SIGTERM)) if moment is at_random else signal.SIGKILL
            struck += storm.kill(moment, (rng.choice(("dvc", "snakemake")), victim, signum))
        kills += struck
    for process in alive(stormy.folder):
        process.wait(300)
    assert storm.ended(storm.begin("dvc")), storm.said()
    print(f"{name}: {kills} kills with seed {SEED}", *storm.told, sep="\n  ")
    if name == "report":
        assert reported(stormy.folder) == reported(trained.folder)
    assert list(stormy.folder.glob("data/models/*/training_args.bin")) == []


@pytest.mark.parametrize(
    ("name", "fault", "after", "said"),
    [
        ("download@base", "shutil.move: data/models/base$", 0, "exited with -9"),
        ("sft@cold_start", "os.rename:manifest.json", 2, "training process 0 was ended by SIGKILL"),
        ("generate@reasoning-arithmetic", "os.rename:samples/reasoning/arithmetic.parquet", 0, "exited with -9"),
        ("score@reasoning-arithmetic", "os.rename:scores/reasoning/arithmetic.json", 0, "exited with -9"),
        ("score@reasoning-arithmetic", "os.rename:cache/files/md5", 1, ""),
    ],
)
def test_killed_while_something_gets_its_name(
    name: str, fault: str, after: int, said: str, trained: Checkout, stormy: Checkout
) -> None:
    """An output, the manifest of a checkpoint, an object of DVC's cache: it has its name only when it is whole."""
    expected = locked(trained.run("git show HEAD:dvc.lock"))[name]
    storm = Storm(stormy, name, expected)
    storm.forget()
    inject = f"env FAULT='{fault}' FAULT_AFTER={after} PYTHONPATH={ROOT}/tests/faults/inject"
    hardware = f"HARDWARE={stormy.folder.parent}/eager.yaml"
    assert said in stormy.run(f"{inject} {hardware} dvc repro {name}", fails=True)
    assert name not in locked((stormy.folder / "dvc.lock").read_text())
    again = stormy.run(f"{hardware} dvc repro {name}")
    assert locked((stormy.folder / "dvc.lock").read_text())[name] == expected
    if "manifest" in fault:
        assert "manifest.json is missing, so it was not written to its end; checkpoint-" in again
        assert "going on at step" in again
