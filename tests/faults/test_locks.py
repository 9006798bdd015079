"""What a killed dvc has cut off in the middle of writing is mended, and costs no work."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkout import Checkout, locked

SEED = 20260


@pytest.mark.parametrize("content", ["", '{"write": {"/somewhere/data/mod', '{"write": {"a": {"pid": "x"}}}'])
def test_locks_of_a_dvc_that_is_gone(content: str, trained: Checkout) -> None:
    rwlock = trained.folder / ".dvc/tmp/rwlock"
    rwlock.write_text(content)
    assert "RWLock-file" in trained.run("dvc repro", fails=True)
    assert trained.run("python -m workflow.locks") == ".dvc/tmp/rwlock was cut off by a kill: removed\n"
    assert "up to date" in trained.run("dvc repro")
    assert trained.run("python -m workflow.locks") == ""


def test_a_lock_file_that_was_cut_off(trained: Checkout) -> None:
    """At any byte: what is left is either read, or set aside; DVC restores all stages and runs none."""
    lock = trained.folder / "dvc.lock"
    whole = lock.read_text()
    rng = random.Random(SEED)
    for cut in (0, len(whole) // 2, *(rng.randrange(len(whole)) for _ in range(4))):
        lock.write_text(whole[:cut])
        said = trained.run("python -m workflow.locks && dvc repro")
        assert "Running stage" not in said, (cut, said)
        assert locked(lock.read_text()) == locked(whole), cut
        damaged = trained.folder / "dvc.lock.damaged"
        assert damaged.exists() == ("dvc.lock was cut off by a kill" in said)
        damaged.unlink(missing_ok=True)
    trained.run("git checkout -q dvc.lock")
    assert "up to date" in trained.run("dvc repro")


@pytest.mark.parametrize("half", [False, True])
def test_a_run_that_was_to_be_noted(half: bool, trained: Checkout) -> None:
    """Killed when it has made the folder of a run, or while it writes the note under a temporary name."""
    lock = trained.folder / "dvc.lock"
    known = yaml.safe_load(lock.read_text())
    check = known["stages"].pop("check")
    (folder,) = {
        note.parent
        for note in trained.folder.glob(".dvc/cache/runs/*/*/*")
        if same_inputs(yaml.safe_load(note.read_text()), check)
    }
    for note in folder.iterdir():
        note.unlink()
    if half:
        (folder / ".Vx7.tmp").write_text(f"cmd: {check['cmd']}\n")
    lock.write_text(yaml.safe_dump(known))
    assert ("'outs'" if half else "join() argument") in trained.run("dvc repro check", fails=True)
    said = trained.run("python -m workflow.doctor", fails=True)
    assert (f"{folder}/.Vx7.tmp cannot be read" if half else f"{folder} is empty") in said
    said = trained.run("python -m workflow.locks")
    assert said.endswith(f"{folder} was left empty by a kill: removed\n") and said.count("\n") == 1 + half
    trained.run("dvc repro check && git checkout -q dvc.lock")
    assert "up to date" in trained.run("dvc repro")


def same_inputs(note: dict[str, Any], stage: dict[str, Any]) -> bool:
    return all(note.get(key) == stage.get(key) for key in ("cmd", "deps", "params"))


def test_elsewhere_it_says_where_to_go(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    said = checkout.run("cd tests && python -m workflow.locks", fails=True)
    assert said == "error: there is no .dvc here; run it in the folder of the repository\n"
