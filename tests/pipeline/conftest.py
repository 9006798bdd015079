import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the working tree as a repository of its own: what git knows or would take in, nothing ignored."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    folder = tmp_path / "checkout"
    for name in filter(None, names):
        if (ROOT / name).is_file() and name != "dvc.lock":  # not one that was deleted, nor what a run left
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    assert (folder / "dvc.yaml").is_file() and not (folder / "data/raw").exists()
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment with this interpreter's tools first, on no particular machine."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HARDWARE", "STAGE_STARTED", "PYTHONPATH")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
