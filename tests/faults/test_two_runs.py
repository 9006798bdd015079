"""Two runs in one checkout at once: the second waits, or says who holds it, and no stage is ever run by both."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.checkout import Checkout, locked
from tests.faults.test_kills import Watch, alive

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def checkout(trained: Checkout, tmp_path: Path) -> Checkout:
    """A checkout in which all up to SFT is done."""
    checkout = Checkout(tmp_path / "checkout")
    (checkout.folder / "dvc.lock").write_text(trained.run("git show HEAD:dvc.lock"))
    checkout.run(f"dvc remote add --local peace {trained.folder}/.dvc/cache")
    checkout.run("dvc pull -q -r peace check download@base download@traces prepare@traces")
    (checkout.folder / "dvc.lock").unlink()
    checkout.run("dvc commit -q --force check download@base download@traces prepare@traces")
    return checkout


@pytest.mark.parametrize("second", ["dvc", "snakemake", "another namespace"])
def test_one_training_at_a_time(second: str, checkout: Checkout, trained: Checkout, tmp_path: Path) -> None:
    commands = {
        "dvc": "dvc repro sft@cold_start",
        "snakemake": "snakemake --cores 2 --nolock .scratch/stamps/sft@cold_start",
        # Here process numbers mean other processes, so DVC takes the first run for one that was killed.
        "another namespace": f"{' '.join(NAMESPACE)} dvc repro sft@cold_start",
    }
    if second == "another namespace" and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not permit process namespaces (unshare --pid)")
    if second == "snakemake":
        checkout.run("python -m workflow.stamps")
    watch = Watch(checkout.folder)
    watch.start()
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    first = checkout.begin(commands["dvc"], logs[0])
    while not any("workflow.sft" in words for words in alive(checkout.folder).values()):
        assert first.poll() is None, logs[0].read_text()
        time.sleep(0.05)
    other = checkout.begin(commands[second], logs[1])
    codes = [first.wait(600), other.wait(600)]
    watch.over.set()
    watch.join()
    said = logs[1].read_text()
    assert watch.most["workflow.sft"] == 1
    if second == "another namespace":
        # The first dvc may fail at its end, because the second has dropped its locks; one of them has the result.
        assert "data/models/cold_start is being written by process " in said, said
        assert codes[1] == 0, said
    elif codes[1] != 0:
        assert codes[0] == 0, logs[0].read_text()
        assert "is busy, it is being blocked by:" in said and "dvc repro sft@cold_start" in said, said
    else:  # it waited elsewhere, and found it done
        assert "Stage 'sft@cold_start' didn't change, skipping" in said, said
    expected = locked(trained.run("git show HEAD:dvc.lock"))["sft@cold_start"]
    assert locked((checkout.folder / "dvc.lock").read_text())["sft@cold_start"] == expected
