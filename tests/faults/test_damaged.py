"""The newest checkpoint of a real training is damaged: the one before is taken, and the file is named.

A flipped bit is in tests/e2e/test_resume.py, for SFT and GRPO.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_resume import NAMES, SHAPE, begin, make_inputs, processes, same, sealed, succeeds, wait_for
from workflow.checkpoints import MANIFEST, step


def truncate(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.pt"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    return f"optimizer.pt has {size // 2} bytes instead of {size}"


def remove(checkpoint: Path) -> str:
    (checkpoint / "rng_state_1.pth").unlink()
    return "rng_state_1.pth is missing"


def remove_manifest(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).unlink()
    return "manifest.json is missing, so it was not written to its end"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of an SFT, the folder of a run that nobody disturbed, and of one killed with two checkpoints."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("inputs", "whole", "killed")}
    make_inputs(folders["inputs"], SHAPE)
    succeeds(begin(folders["inputs"], "sft", folders["whole"]))
    run = begin(folders["inputs"], "sft", folders["killed"], "often")
    wait_for(run, lambda: len(sealed(folders["killed"])) > 1 and step(sealed(folders["killed"])[-1]) > 40)
    for process in processes(run):
        process.kill()
    run.communicate()
    return folders


@pytest.mark.parametrize("damage", [truncate, remove, remove_manifest])
def test_the_one_before_is_taken(damage: Callable[[Path], str], folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders["killed"], folder)
    *_, before, newest = sealed(folder)
    wrong = damage(newest)
    output = succeeds(begin(folders["inputs"], "sft", folder))
    said = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert said[-1] == f"warning: {newest.relative_to(folder)}: {wrong}; {before.name} is taken instead"
    assert f"sft {NAMES['sft']}: going on at step {step(before) + 1} of " in output
    same(folder, folders["whole"], "sft")
