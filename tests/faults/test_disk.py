"""A disk that is full while something is written: path, need and room are said, and with room the command succeeds."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkout import Checkout, locked
from tests.e2e import test_generate, test_resume
from tests.e2e.test_resume import logged, succeeds, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, as root")

SIZES = re.compile(r"needs ([\d.,]+) MB and its disk had ([\d.,]+) MB; make room there, and start it again")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory of its own, mounted on a new folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """Leave so many bytes of a disk."""
    file = folder / "filler"
    with file.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, shutil.disk_usage(folder).free - free)
    return file


def one_error(output: str) -> str:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    return errors[0]


def test_while_a_model_is_exported(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    shape = {**test_resume.SHAPE, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    inputs = test_resume.make_inputs(tmp_path / "inputs", shape)
    size = (inputs / "model/model.safetensors").stat().st_size
    folder = tmp_path / "folder"
    with small_disk(folder, "60m"):
        run = test_resume.begin(inputs, "sft", folder)
        wait_for(run, lambda: logged(folder) > 10)
        filler = fill(folder, size // 2)
        output, _ = run.communicate()
        assert run.returncode == 1, output
        need, room = (float(number) for number in SIZES.search(one_error(output)).groups())
        assert need == pytest.approx(size / 1e6, rel=0.02) and room < need
        assert "/model needs" in one_error(output) and not (folder / "models").exists()
        filler.unlink()
        succeeds(test_resume.begin(inputs, "sft", folder))
        assert (folder / "models/cold_start/model.safetensors").stat().st_size == size


def test_while_samples_are_written(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    asked = test_generate.make_inputs(tmp_path / "inputs")
    folder = tmp_path / "folder"
    with small_disk(folder, "20m"):
        run = test_generate.start(asked, folder)
        while len(test_generate.finished(folder)) < 1:
            assert run.poll() is None, run.communicate()[0]
        fill(folder, 0)
        output, _ = run.communicate()
        assert run.returncode == 1, output
        assert re.search(r"\.part needs [\d.]+ MB and its disk had 0\.0 MB; make room there", one_error(output))
        assert not (folder / "out").exists()
        (folder / "filler").unlink()
        there = len(test_generate.finished(folder))
        again = test_generate.start(asked, folder)
        output, _ = again.communicate()
        assert again.returncode == 0, output
        assert f"generate: {there * test_generate.CHUNK} samples are there from a run that did not end" in output


def test_in_the_cache_of_dvc(trained: Checkout, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout")
    cache = tmp_path / "cache"
    with small_disk(cache, "500k"):
        checkout.run(f"dvc cache dir --local {cache}")
        said = checkout.run("dvc repro download@base", fails=True)
        wanted = rf"error: .scratch/download/base-\w+ is made and needs [\d.]+ MB in DVC's cache, {cache}, which"
        assert re.search(wanted, said), said
        subprocess.run(["mount", "-o", "remount,size=20m", str(cache)], check=True)
        checkout.run("dvc repro download@base")
        ours, theirs = locked((checkout.folder / "dvc.lock").read_text()), locked(trained.run("git show HEAD:dvc.lock"))
        assert ours["download@base"] == theirs["download@base"]
