"""Check an installation: `python -m workflow.doctor` says what is found and, where it is wrong, what to change.

It ends with 1 if something is wrong; a warning is no error. Locks, links and renaming are tried, with files that are
removed again. Only the standard library (since Python 3.9) is needed until the packages have been looked at.
"""

import argparse
import fcntl
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import urlsplit

Found = tuple[Literal["ok", "warning", "error"], str]  # about one point, with what to change

DVC, DATA, SCRATCH = Path(".dvc"), Path("data"), Path(".scratch")
NEEDED = ("dvc", "huggingface_hub", "pydantic", "yaml")  # by the checks
LEAST_ROOM, LITTLE_ROOM = 1e9, 10e9  # bytes: nothing but the default recipe; the training of a small model
LITTLE_MEMORY, LITTLE_SHM = 4 * 2**30, 2**30  # bytes; Docker gives 64 MiB of the second, and NCCL and vLLM fail
NODE_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "local_lock=posix", "localflock"}  # of NFS and Lustre
# What `ulimit` shows by these letters: open files and processes; size of a file, address space, processor time.
AT_LEAST_1024 = {"n": resource.RLIMIT_NOFILE, "u": resource.RLIMIT_NPROC}
UNLIMITED = {"f": resource.RLIMIT_FSIZE, "v": resource.RLIMIT_AS, "t": resource.RLIMIT_CPU}


def answer(*command: str, seconds: float = 10) -> tuple[bool, str]:
    """Whether a command succeeds, and what it prints; else the last line of what it says about it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.TimeoutExpired) as failed:
        return False, str(failed)
    said = done.stdout.strip() if done.returncode == 0 else f"{done.stdout}\n{done.stderr}".strip().split("\n")[-1]
    return done.returncode == 0, said or f"exit code {done.returncode}"


def probe(folder: Path) -> "TemporaryDirectory[str]":
    """A folder for trials in `folder`, or in the nearest one above it that is there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return TemporaryDirectory(prefix=".doctor-", dir=there)


def check_python() -> Found:
    """The version, and whether a stage finds the commands that it starts."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] != (3, 11):
        return "error", f"{found}: the locked packages need 3.11; make install PYTHON=/path/to/python3.11"
    for name in ("dvc", "accelerate", "snakemake", "trl"):
        path = shutil.which(name)
        if path is None or Path(path).parent.resolve() != Path(sys.executable).parent.resolve():
            return "warning", f"{found}: {name} is {path or 'not in PATH'}; source .venv/bin/activate"
    return "ok", found


def lock_file() -> Path:
    """The lock that `make install` takes, or took by LOCK=… where there is no GPU."""
    made = sorted(Path(".venv").glob("installed.?pu.txt"), key=lambda mark: mark.stat().st_mtime)
    gpu = answer("nvidia-smi", "-L")[0] or (made and made[-1].name == "installed.gpu.txt")
    return Path("requirements", "gpu.txt" if gpu else "cpu.txt")


def check_packages(lock: Path) -> Found:
    """Compare what is installed with the lock, by the names of folders: importlib.metadata takes ten times as long."""
    infos = [info.stem.rpartition("-") for place in reversed(sys.path) for info in Path(place).glob("*.dist-info")]
    there = {re.sub("[-_.]+", "-", name.lower()): version for name, _, version in infos}
    files = [file for file in (lock, lock.with_suffix(".override.txt")) if file.is_file()]  # the second: torch for CPUs
    differ, wanted = [], []
    for file in files:
        wanted += re.findall(r"^([\w.-]+)==([^\s;\\]+)", file.read_text(), re.MULTILINE)
    for name, version in wanted:
        found = there.get(re.sub("[-_.]+", "-", name.lower()), "missing")
        if version not in (found, found.split("+")[0]):  # the lock of GPUs does not name torch's build, e.g. +cu130
            differ.append(f"{name} {found}, not {version}")
    if not differ:
        return "ok", f"{len(wanted)} as in {lock}"
    few = f"{len(differ)} of {len(wanted)} are not as in {lock} ({', '.join(differ[:3])}{', …' * (len(differ) > 3)})"
    return "error", f"{few}: touch {lock} && make install LOCK={lock}"


def check_gpu() -> Found:
    """Look whether torch sees the GPUs of this machine."""
    if shutil.which("nvidia-smi") is None:
        return "ok", "none: no nvidia-smi in PATH"
    there, cards = answer("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not there:
        return "warning", f"nvidia-smi finds none ({cards}): mend the driver, else stages run on the CPU"
    cards = f"{len(cards.splitlines())} x {cards.splitlines()[0]}"
    versions = "print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"
    there, said = answer(sys.executable, "-c", f"import torch; {versions}", seconds=120)
    torch, cuda, seen = said.split()[-3:] if there else (said, "None", "0")
    if cuda == "None":
        return "error", f"{cards}, but no torch for it ({torch}): make install LOCK=requirements/gpu.txt"
    if seen == "0" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return "error", f"{cards}, but torch {torch} sees none: install a driver for CUDA {cuda}"
    return "ok", f"{cards}; torch {torch} sees {seen}"


def check_hardware() -> Found:
    """Look whether the hardware file that would be used can be read."""
    from workflow import launch, params

    try:
        hardware = launch.load_hardware()
    except params.ParamsError as wrong:
        return "error", str(wrong)
    return "ok", f"{launch.hardware_name()}: nodes {hardware.nodes}, training processes on each {hardware.processes}"


def check_machine() -> Found:
    """Look at cores, memory and shared memory, within the limits of a container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, by version 2 and 1 of cgroups
        file = Path("/sys/fs/cgroup", name)
        if file.is_file() and (limit := file.read_text().strip()) != "max":
            memory = min(memory, int(limit))
    shm = shutil.disk_usage("/dev/shm").total
    found = f"{len(os.sched_getaffinity(0))} cores, memory {memory / 2**30:.1f} GiB, /dev/shm {shm / 2**30:.1f} GiB"
    if memory < LITTLE_MEMORY:
        return "warning", f"{found}: the default recipe takes 4 GiB of memory"
    if shm < LITTLE_SHM:
        return "warning", f"{found}: start the container with --shm-size=8g"
    return "ok", found


def check_limits() -> Found:
    """Look at the limits of this shell that stop training or vLLM."""
    limits = {name: resource.getrlimit(kind)[0] for name, kind in {**AT_LEAST_1024, **UNLIMITED}.items()}
    low = [f"-{name} 1024" for name in AT_LEAST_1024 if limits[name] in range(1024)]
    low += [f"-{name} unlimited" for name in UNLIMITED if limits[name] != resource.RLIM_INFINITY]
    found = ", ".join(f"-{name} {'unlimited' if limit < 0 else limit}" for name, limit in limits.items())
    return ("warning", f"{found}: ulimit {' '.join(low)}") if low else ("ok", found)


def check_room(folders: list[Path]) -> Found:
    """Write to each folder, and look how much room it has."""
    free = {}
    for folder in folders:
        try:
            with probe(folder) as place:
                Path(place, "file").write_text("room")
                free[folder] = shutil.disk_usage(place).free
        except OSError as failed:
            return "error", f"{folder} cannot be written to ({failed.strerror}): make it writable, or make room"
    found, least = ", ".join(f"{folder} {room / 1e9:,.1f} GB" for folder, room in free.items()), min(free.values())
    if least >= LITTLE_ROOM:
        return "ok", found
    make = "make room (.scratch/checkpoints has those of runs that you gave up), see workflow.preflight"
    return ("error" if least < LEAST_ROOM else "warning"), f"{found}: {make}"


def check_links(cache: Path, types: list[str]) -> Found:
    """Try which links DVC can make between its cache and the workspace, and say which one it takes."""
    from dvc.fs import localfs
    from dvc_objects.fs.generic import test_links

    with probe(cache) as source, probe(DATA) as target:
        work = test_links(["reflink", "hardlink", "symlink", "copy"], localfs, source, localfs, f"{target}/file")
    used = next((link for link in types if link in work), None)
    found = f"{used} of cache.type {','.join(types)}; possible are {', '.join(work)}"
    if used not in ("reflink", "copy"):
        why = "what writes to an output writes to the cache" if used else "DVC cannot fill the workspace"
        return ("warning" if used else "error"), f"{found}: {why}; dvc config cache.type reflink,copy"
    return "ok", found if used == "reflink" else f"{found}: outputs take twice their size (once on XFS and Btrfs)"


def check_locks(folder: Path) -> Found:
    """Take both kinds of locks, and see that a second process is refused them: our and DVC's flock, SQLite's lockf."""
    with probe(folder) as place:
        kind, *options = re.split("[ ,]+", answer("findmnt", "-no", "FSTYPE,OPTIONS", "--target", place)[1])
        where, move = f"{folder} is on {kind}", "use a local disk, NFS without nolock, or Lustre with flock"
        for lock in ("flock", "lockf"):
            with Path(place, lock).open("w") as file:
                try:
                    vars(fcntl)[lock](file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as failed:
                    return "error", f"{where}, where {lock} fails ({failed.strerror}): {move}"
                second = f"import fcntl; fcntl.{lock}(open({file.name!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
                done = subprocess.run([sys.executable, "-ISc", second], capture_output=True, text=True)
            if "BlockingIOError" not in done.stderr:
                return "error", f"{where}, where {lock} does not keep a second process out: {move}"
    if local := sorted(NODE_LOCKS.intersection(options)):
        return "warning", f"{where} with {local[0]}, so no other node sees its locks: {move}"
    return "ok", f"{where}, where flock and fcntl hold"


def check_rename() -> Found:
    """Try whether a model that was made in .scratch gets its place in data/ in one step."""
    with probe(SCRATCH) as source, probe(DATA) as target:
        Path(source, "file").touch()
        try:
            os.replace(f"{source}/file", f"{target}/file")
        except OSError as failed:
            return "warning", f"not from {SCRATCH} to {DATA} ({failed.strerror}), so models are copied: use one disk"
    return "ok", f"from {SCRATCH} to {DATA} in one step"


def check_dvc_files() -> Found:
    """Look for what a killed dvc may leave: two files that are cut off, an empty folder."""
    from workflow import locks

    for path in [*locks.damaged(), *locks.unfinished_notes()]:
        what = "is empty" if path.is_dir() else "cannot be read"
        return "error", f"{path} {what}: unless a dvc is writing it just now, python -m workflow.locks"
    return "ok", f"{locks.RWLOCK} and {locks.LOCK_FILE} are whole, or not there yet"


def check_git() -> Found:
    """Look for what `dvc exp run` needs: a commit, and somebody whose it is."""
    there, said = answer("git", "rev-parse", "--verify", "HEAD")
    if not there:
        return "error", f"no commit here ({said}): install git; clone the repository, or git init and git commit"
    for part in ("name", "email"):
        if not os.environ.get(f"GIT_COMMITTER_{part.upper()}") and not answer("git", "config", f"user.{part}")[0]:
            return "warning", f"no user.{part}, which dvc exp needs: git config --global user.{part} …"
    return "ok", "a commit, and an identity"


def check_slurm() -> Found:
    """Look whether SLURM is there and answers."""
    if shutil.which("sbatch") is None and shutil.which("sinfo") is None:
        return "ok", "none"
    there, said = answer("sinfo", "--noheader", "--format=%R")
    if not there or shutil.which("sbatch") is None:
        return "warning", f"no answer ({said}): for --profile slurm, load SLURM's module or mend slurm.conf"
    return "ok", f"partitions {', '.join(sorted(set(said.split())))}"


def check_token(name: str, file: Path, word: str = "") -> Found:
    """Look for a token, which is never printed, in the environment and in the file of a login."""
    if os.environ.get(name, "").strip():
        return "ok", "set"
    if not file.is_file() or word not in file.read_text(errors="replace"):
        return "ok", "neither set nor logged in: only sources, trackers and pushes that ask for one need it"
    if file.stat().st_mode & 0o077:
        return "warning", f"not set, and others can read {file}: chmod 600 {file}"
    return "ok", f"not set; the login in {file}"


def check_endpoint() -> Found:
    """Say which hub would be asked, without a password that its address may have."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if url.scheme not in ("http", "https") or not url.hostname:
        return "error", "not an address: write https://host, or unset it"
    return "ok", f"{url.scheme}://{url.hostname}"  # without the password that an address may have


def examine() -> Iterator[tuple[str, Found]]:
    """All points by name; what needs packages that are not there is left out."""
    yield "Python", check_python()
    yield "packages", check_packages(lock_file())
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        yield "all else", ("error", f"not looked at without {missing[0]}: make install; source .venv/bin/activate")
        return
    from dvc.config import Config
    from huggingface_hub.constants import HF_TOKEN_PATH

    from workflow import stage

    cache = stage.dvc_cache() or DVC / "cache"
    yield "GPU", check_gpu()
    yield "hardware", check_hardware()
    yield "machine", check_machine()
    yield "limits", check_limits()
    yield "room", (room := check_room([DATA, SCRATCH, DVC / "tmp", cache]))
    if room[0] != "error":  # what follows writes files
        yield "links", check_links(cache, Config(str(DVC.absolute()))["cache"].get("type") or ["reflink", "copy"])
        yield "renaming", check_rename()
        yield "locks", check_locks(SCRATCH)
        yield "locks", check_locks(DVC / "tmp")
    yield "DVC files", check_dvc_files()
    yield "git", check_git()
    yield "SLURM", check_slurm()
    home = Path.home()
    yield "HF_TOKEN", check_token("HF_TOKEN", Path(HF_TOKEN_PATH))
    yield "WANDB_API_KEY", check_token("WANDB_API_KEY", Path(os.environ.get("NETRC") or home / ".netrc"), "wandb")
    yield "MODELSCOPE_API_TOKEN", check_token("MODELSCOPE_API_TOKEN", home / ".modelscope/credentials/cookies")
    yield "HF_ENDPOINT", check_endpoint()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not (DVC / "config").is_file():
        sys.exit("error: there is no .dvc/config here; run it in the folder of the repository")
    levels = []
    for name, (level, found) in examine():
        print(f"{level:<8} {name:<21} {found}", flush=True)
        levels.append(level)
    print(f"errors {levels.count('error')}, warnings {levels.count('warning')}")
    sys.exit(1 if "error" in levels else 0)


if __name__ == "__main__":
    main()
