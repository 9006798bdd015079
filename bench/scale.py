"""What parsing, planning and finding nothing to do cost as the DAG grows, beside the same with DVC alone.

The DAG is a sweep: phases of SFT and GRPO that differ in their learning rate, each model sampled and judged on two
tasks. Nothing is trained: what the stages make is a few bytes, taken in by `dvc commit`. It prints tables and writes
bench/results/scale.json.
"""

import copy
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from workflow.params import load_params, read_params
from workflow.pipeline import load_stages

REPEATS = 3
PAIRS = (0, 4, 9, 19, 39)  # of an SFT and a GRPO phase; none is the recipe itself
# Commands, and what each must say: before anything is made, and when everything is.
PLAN = {
    "snakemake --version": (["snakemake", "--version"], ""),
    "load_stages": ([sys.executable, "-c", "from workflow.pipeline import load_stages; load_stages()"], ""),
    "snakemake --dry-run": (["snakemake", "--dry-run", "--cores", "1", "--quiet", "host"], "total"),
    "dvc stage list": (["dvc", "stage", "list"], "report"),
    "dvc status": (["dvc", "status"], "changed deps"),  # `dvc repro --dry` fails where nothing is made yet
}
NO_OP = {
    "workflow.stamps, all done": ([sys.executable, "-m", "workflow.stamps"], "to do: nothing"),
    "snakemake, all done": (["snakemake", "--cores", "1"], "Nothing to be done"),
    "dvc status, all done": (["dvc", "status"], "up to date"),
    "dvc repro, all done": (["dvc", "repro"], "up to date"),
    "dvc repro --single-item": (["dvc", "repro", "--single-item", "check"], "up to date"),  # as a job does
}


def make_checkout(folder: Path) -> None:
    """A copy of what git knows or would take in."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, files.stdout.split("\0")):
        if Path(name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def sweep(recipe: dict[str, Any], pairs: int) -> dict[str, Any]:
    """A recipe with so many pairs of phases instead of its own, and two tasks."""
    if pairs == 0:
        return recipe
    sections = ("prepare", "tasks")
    values = recipe | {name: recipe[name] | {"arithmetic_again": {**recipe[name]["arithmetic"]}} for name in sections}
    for entry in ("sft", "grpo"):
        (phase,) = recipe[entry].values()
        values[entry] = {f"{entry}_{pair}": copy.deepcopy(phase) for pair in range(pairs)}
        for pair, each in enumerate(values[entry].values()):
            each["trainer"]["learning_rate"] *= 1 + pair / 100
    for pair, each in enumerate(values["grpo"].values()):
        each["start_from"] = f"sft_{pair}"
    values["generate"] = {"models": ["base", *values["sft"], *values["grpo"]]}
    return values


def make_everything(folder: Path) -> None:
    """Let DVC take in a small file for every output."""
    for stage in load_stages(folder).values():
        for out in stage.outs:
            path = folder / out
            path = path if path.suffix else path / "file.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(out))
    subprocess.run(["dvc", "commit", "--force", "--quiet"], cwd=folder, check=True)


def seconds(command: list[str], says: str, folder: Path) -> float:
    """Wall time of a command that must succeed and say this."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    took = time.monotonic() - start
    if done.returncode or says not in done.stdout:
        sys.exit(f"{' '.join(command)} in {folder}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return round(took, 3)


def measure(commands: dict[str, tuple[list[str], str]], folders: dict[int, Path]) -> dict[str, dict[int, list[float]]]:
    """Seconds by command and number of stages; the sizes take turns, so that a slow minute meets all of them."""
    times = {name: {stages: [] for stages in folders} for name in commands}
    for repeat in range(REPEATS):
        for stages, folder in folders.items():
            for name, (command, says) in commands.items():
                times[name][stages].append(seconds(command, says, folder))
            print(f"{repeat + 1}/{REPEATS}: {stages} stages", flush=True)
    return times


def exponent(times: dict[int, list[float]], small: int, large: int) -> float:
    """b of seconds ~ stages^b between two sizes."""
    return math.log(statistics.median(times[large]) / statistics.median(times[small])) / math.log(large / small)


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def main() -> None:
    recipe = read_params()
    with TemporaryDirectory() as scratch:
        folders = {}
        for pairs in PAIRS:
            folder = Path(scratch) / str(pairs)
            make_checkout(folder)
            YAML().dump(sweep(recipe, pairs), folder / "params.yaml")
            load_params(folder / "params.yaml")
            folders[len(load_stages(folder))] = folder
        times = measure(PLAN, folders)
        for folder in folders.values():
            make_everything(folder)
        times |= measure(NO_OP, folders)
    sizes = list(folders)
    table(
        ["seconds", *(f"{stages} stages" for stages in sizes)],
        [[name, *(f"{statistics.median(row[stages]):.2f}" for stages in sizes)] for name, row in times.items()],
    )
    steps = list(itertools.pairwise(sizes))
    table(
        ["growth, exponent", *(f"{small} to {large}" for small, large in steps)],
        [[name, *(f"{exponent(row, *step):.2f}" for step in steps)] for name, row in times.items()],
    )
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("dvc", "snakemake")},
        "seconds": times,
    }
    file = Path("bench/results/scale.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
