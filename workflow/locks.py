"""Mend what a killed dvc has left in this checkout: `make repro` and the jobs of Snakemake do it before they start dvc.

DVC 3.67 writes two files in place, so a kill can leave half of them: .dvc/tmp/rwlock, after which every dvc command
fails, and dvc.lock. Both are put right without losing work: a lock belongs to processes that are gone, and what
dvc.lock said is in DVC's cache of runs, from which `dvc repro` restores it. In that cache a kill can leave an empty
folder, after which the stage whose run was to be noted there always fails ("join() argument must be str, … not
'NoneType'"): DVC takes the newest file of the folder without asking whether there is one.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow import stage

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK_FILE = Path("dvc.lock")
DAMAGED = Path("dvc.lock.damaged")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for said in mend():
        print(said)


def mend() -> list[str]:
    """Put right what a kill has left of DVC's files; return a sentence for each.

    Raises:
        StageError: this is no checkout.
    """
    if not RWLOCK.parent.parent.is_dir():
        raise stage.StageError("there is no .dvc here; run it in the folder of the repository")
    if not damaged():
        return []
    said = []
    with repo_lock():  # else it may just be being written, or mended by another job
        for path in damaged():
            if path == LOCK_FILE:
                path.replace(DAMAGED)
                said.append(f"{path} was cut off by a kill: it is {DAMAGED} now, and DVC's cache knows what is done")
            elif path == RWLOCK:
                path.unlink()
                said.append(f"{path} was cut off by a kill: removed")
            else:
                path.rmdir()
                said.append(f"{path} was left empty by a kill: removed")
    return said


def damaged() -> list[Path]:
    """The files of DVC that a kill has cut off, and the empty folders in its cache of runs."""
    from dvc.exceptions import DvcException
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError

    found = []
    try:
        if RWLOCK.is_file():
            with locks_of_paths():
                pass
    except (RWLockFileCorruptedError, RWLockFileFormatError):
        found.append(RWLOCK)
    try:
        read_lock_file()
    except DvcException:
        found.append(LOCK_FILE)
    # Here DVC notes the runs of a stage that had the same inputs: <cache>/runs/<2 digits>/<64 digits>/.
    runs = (stage.dvc_cache() or RWLOCK.parents[1] / "cache") / "runs"
    return found + [folder for folder in sorted(runs.glob("*/*")) if not any(folder.iterdir())]


def release(name: str) -> None:
    """Release DVC's locks of an earlier job of this stage that was killed.

    DVC asks whether their process exists, by a number that on another node may be anybody's.
    """
    if not RWLOCK.is_file():
        return

    def ours(info: dict[str, Any]) -> bool:
        return info["cmd"].endswith(f" --single-item {name}")

    with locks_of_paths() as lock:
        for path in [path for path, info in lock["write"].items() if ours(info)]:
            del lock["write"][path]
        for path, infos in list(lock["read"].items()):
            lock["read"][path] = [info for info in infos if not ours(info)]
            if not lock["read"][path]:
                del lock["read"][path]


@contextmanager
def locks_of_paths() -> Iterator[dict[str, Any]]:
    """DVC's locks of paths, to be changed."""
    from dvc.fs import localfs
    from dvc.rwlock import _edit_rwlock

    with _edit_rwlock(str(RWLOCK.parent.resolve()), localfs, False) as lock:
        yield lock


@contextmanager
def repo_lock() -> Iterator[None]:
    """DVC's lock of the checkout, under which dvc.lock is written; waits for it."""
    from dvc.lock import make_lock

    folder = str(RWLOCK.parent.resolve())
    with make_lock(f"{folder}/lock", tmp_dir=folder, wait=True):
        yield


def read_lock_file() -> None:
    """Raise DvcException where DVC cannot read dvc.lock."""
    from dvc.dvcfile import Lockfile
    from dvc.repo import Repo

    Lockfile(Repo(), str(LOCK_FILE)).load()


if __name__ == "__main__":
    stage.run(main)
