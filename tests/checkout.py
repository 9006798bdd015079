"""A copy of the working tree with a git history of its own, in which tests run the real command lines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]

# In the environment of every command, so that tests/faults/test_secrets.py can look for them.
CANARIES = {"HF_TOKEN": f"hf_{'Canary' * 5}HfTok", "WANDB_API_KEY": f"{'canary' * 6}wand"}

TRIED: set[str] = set()  # the README's commands that a test has run


class Checkout:
    """A copy of the repository that runs the miniature recipe by default."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first_run = ""
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, files.stdout.split("\0")):
            if (ROOT / name).is_file() and name != "dvc.lock":
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        shutil.copy(ROOT / "tests/e2e/miniature.yaml", folder / "recipes/recipe/miniature.yaml")
        config = folder / "recipes/config.yaml"
        config.write_text(config.read_text().replace("recipe: tiny", "recipe: miniature"))
        (folder / ".venv").symlink_to(sys.prefix)  # make install finds it installed
        self.run("git init -q -b main")
        self.run("python -m workflow.compose")
        self.commit("start")

    @classmethod
    def in_folder(cls, folder: Path) -> "Checkout":
        """A checkout that is there already, a clone for example."""
        checkout = object.__new__(cls)
        checkout.folder = folder
        return checkout

    def run(self, command: str, fails: bool = False) -> str:
        """The output of a command line in the checkout; it must succeed, or fail where `fails` says so."""
        done = subprocess.run(["bash", "-c", command], text=True, stdout=subprocess.PIPE, **self._where())
        assert (done.returncode != 0) == fails, f"{command}: exit code {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def begin(self, command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command line in the background; its output is added to a file."""
        with output.open("ab") as file:
            return subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=file, **self._where())

    def _where(self) -> dict[str, Any]:
        bin_folder = Path(sys.executable).parent
        # Not as a part of the make that may run the tests.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
        environment |= {"COLUMNS": "250", **CANARIES}
        return {"cwd": self.folder, "env": environment, "stderr": subprocess.STDOUT}

    def readme(self, start: str) -> str:
        """Run the README's command that starts with these words, word for word."""
        return self.run(tried(start))

    def commit(self, message: str) -> None:
        self.run(f"git add -A && git commit -qm '{message}'")

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace a text that occurs in a file."""
        path = self.folder / file
        content = path.read_text()
        assert old in content, f"{file} does not contain {old!r}"
        path.write_text(content.replace(old, new))


def locked(text: str) -> dict[str, dict[str, Any]]:
    """The stages of a dvc.lock, without what records time: logs, and the report that shows them."""
    stages = (yaml.safe_load(text) or {}).get("stages", {})
    for stage in stages.values():
        for kind in ("deps", "outs"):
            timed = ("data/logs", "data/report", "metrics.json")
            stage[kind] = [entry for entry in stage.get(kind, []) if not entry["path"].startswith(timed)]
    return stages


def commands(page: str) -> list[str]:
    """The commands in the bash blocks of a page, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def readme_commands() -> list[str]:
    """The commands of the README."""
    return commands((ROOT / "README.md").read_text())


def tried(start: str) -> str:
    """The README's command that starts with these words; it counts as tried."""
    found = [command for command in readme_commands() if command.startswith(start)]
    assert found, f"the README has no command {start!r}"
    TRIED.add(found[0])
    return found[0]
