"""Mend what a killed dvc has left in this checkout: `make repro` and the jobs of Snakemake do it before they start dvc.

DVC 3.67 writes two files in place, so a kill can leave half of them: .dvc/tmp/rwlock, after which every dvc command
fails, and dvc.lock. Both are put right without losing work: a lock belongs to processes that are gone, and what
dvc.lock said is in DVC's cache of runs, from which `dvc repro` restores it. In that cache a kill can leave an empty
folder, or half a note under a temporary name, after which the stage whose run was to be noted there always fails
("join() argument must be str, … not 'NoneType'", "'outs'"): DVC takes the newest file of the folder, whatever it is.
"""

import argparse
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workflow import stage

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK_FILE = Path("dvc.lock")
DAMAGED = Path("dvc.lock.damaged")
NOTED_WITHIN = 1.0  # seconds; a note that takes longer is not being written by a clone that shares the cache


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
    notes = unfinished_notes()
    if not damaged() and not notes:
        return []
    said = []
    if notes:
        time.sleep(NOTED_WITHIN)
    with repo_lock():  # else it may just be being written, or mended by another job
        for path in damaged():
            if path == LOCK_FILE:
                path.replace(DAMAGED)
                said.append(f"{path} was cut off by a kill: it is {DAMAGED} now, and DVC's cache knows what is done")
            elif path == RWLOCK:
                path.unlink()
                said.append(f"{path} was cut off by a kill: removed")
        for path in [path for path in unfinished_notes() if path in notes]:
            with suppress(OSError):  # a clone that shares the cache was quicker
                if path.is_dir():
                    path.rmdir()
                    said.append(f"{path} was left empty by a kill: removed")
                else:
                    path.unlink()
                    said.append(f"{path} was cut off by a kill: removed")
    return said


def damaged() -> list[Path]:
    """The files of DVC in this checkout that a kill has cut off."""
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
    return found


def unfinished_notes() -> list[Path]:
    """Where DVC notes runs, in its cache: notes that have no name yet, and the folders that then have none.

    Each folder is for runs with the same inputs: <cache>/runs/<2 digits>/<64 digits>/<64 digits>.
    """
    found = []
    runs = (stage.dvc_cache() or RWLOCK.parents[1] / "cache") / "runs"
    for folder in sorted(runs.glob("*/*")):
        with suppress(FileNotFoundError):  # mended by a clone that shares the cache, just now
            notes = list(folder.iterdir())
            unnamed = [note for note in notes if not re.fullmatch(r"[0-9a-f]{64}", note.name)]
            found += [*unnamed, *([folder] if len(unnamed) == len(notes) else [])]
    return found


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
