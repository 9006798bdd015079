"""A training that is stopped, killed, and finds its newest checkpoint damaged ends with the bytes of one that was not.

The real commands, with two processes on a CPU.
"""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from workflow import launch
from workflow.builtin import make_model, question, terms, thought
from workflow.checkpoints import MANIFEST, step
from workflow.prompts import build

NAMES = {"sft": "cold_start", "grpo": "reasoning"}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TRAINER = {"learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False}
PARAMS = {
    "recipe": "small",
    "seed": 42,
    "system_prompt": None,
    "sources": {
        "base": {"into": "models", "origin": "builtin", "builtin": "qwen2"},
        "rows": {
            "into": "raw",
            "origin": "builtin",
            "builtin": "bespoke_stratos",
            "options": {"rows": 9, "guesses": 0.5},
        },
    },
    "prepare": {
        "rows": {
            "source": "rows",
            "format": "bespoke_stratos",
            "tokenizer": "base",
            "max_prompt_length": 60,
            "max_length": 200,
        }
    },
    "sft": {
        "cold_start": {
            "start_from": "base",
            "dataset": "rows",
            "held_out": 4,
            "global_batch_size": 8,
            "export_dtype": "float32",
            # Steps are logged and evaluated neither at the same time nor where the run is stopped.
            "trainer": {
                **TRAINER,
                **{"max_steps": 150, "max_length": 200, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 30},
            },
        }
    },
    "grpo": {
        "reasoning": {
            "start_from": "base",
            "dataset": "rows",
            "held_out": 32,  # an epoch has 21 steps, so a run goes on in later ones, too
            "global_batch_size": 16,
            "rewards": {"accuracy": 1.0, "cosine": 0.2},  # an untrained model earns by length
            "rewards_read": "data/check/ok.txt",
            "export_dtype": "float32",
            # Completions are used for three steps, so a run can go on from every third only.
            "trainer": {
                **TRAINER,
                **{"max_steps": 60, "num_generations": 4, "num_iterations": 3, "max_completion_length": 24},
                **{"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 15},
            },
        }
    },
    "generate": {"models": ["base"]},
    "tasks": {
        "rows": {
            "answer": "number",
            "n_samples": 1,
            "temperature": 1,
            "top_p": 1.0,
            "max_tokens": 9,
            "dtype": "float32",
        }
    },
}
# What says how long something took, or on what.
COSTS = {"seconds", "train_seconds", "tokens_per_second", "peak_memory_mib", "summary", "machine", "hardware"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), SHAPE)


def make_inputs(folder: Path, shape: dict[str, int]) -> Path:
    """A model, rows, params.yaml, and hardware files that write checkpoints often or seldom."""
    (folder / "model").mkdir()
    make_model(folder / "model", seed=1, system_prompt="Think.", **shape)
    rng = random.Random(1)
    rows = []
    for number in range(60):
        numbers = terms(rng)
        answer = build(thought(numbers), rf"\boxed{{{sum(numbers)}}}")
        rows.append(
            {
                "id": f"row-{number}",
                "prompt": [{"role": "user", "content": question(numbers)}],
                "completion": [{"role": "assistant", "content": answer}],
                "solution": f"${sum(numbers)}$",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    hardware = yaml.safe_load((launch.HERE / "hardware/cpu.yaml").read_text())
    for name, minutes in {"often": 0.0, "seldom": 60.0}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**hardware, "checkpoint_minutes": minutes}))
    return folder


@pytest.fixture
def start(inputs: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a stage in a folder; kills what is left of it at the end."""
    started: list[subprocess.Popen[str]] = []

    def begun(kind: str, folder: Path, hardware: str = "seldom") -> subprocess.Popen[str]:
        started.append(begin(inputs, kind, folder, hardware))
        return started[-1]

    yield begun
    for process in started:
        process.kill()


def begin(inputs: Path, kind: str, folder: Path, hardware: str = "seldom") -> subprocess.Popen[str]:
    """Start a stage in a folder."""
    shutil.copy(inputs / "params.yaml", folder / "params.yaml")
    command = [sys.executable, "-m", "workflow.launch", kind, NAMES[kind], "--model", str(inputs / "model")]
    command += ["--dataset", str(inputs / "rows.parquet"), "--output", f"models/{NAMES[kind]}", "--log", "log"]
    environment = os.environ | {"HARDWARE": str(inputs / f"{hardware}.yaml"), "CI": "1"}
    environment |= {"PYTHONPATH": str(launch.HERE.parent), "HF_TOKEN": "hf_secret"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def sealed(folder: Path) -> list[Path]:
    """The checkpoints with a manifest, the newest last."""
    return sorted((file.parent for file in folder.glob(f".scratch/checkpoints/*/*/{MANIFEST}")), key=step)


def logged(folder: Path) -> int:
    """The last step in the log of a run that is going on."""
    try:
        return json.loads((folder / "log/metrics.json").read_text())["step"]
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
        return 0


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def processes(run: subprocess.Popen[str]) -> dict[psutil.Process, list[str]]:
    """All processes of a run, with the words of their command lines."""
    found = {}
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found[process] = process.cmdline()
    return found


def ask(run: subprocess.Popen[str]) -> None:
    """Tell a run to end, as SLURM does it: every process of it, whatever it is doing."""
    for process in processes(run):
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def succeeds(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def stopped(process: subprocess.Popen[str], said: str) -> re.Match[str]:
    """What a run has said that has stopped: exit code 75 and one sentence."""
    output, _ = process.communicate()
    assert process.returncode == 75, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    found = re.fullmatch(said, errors[0])
    assert found, output
    return found


def same(folder: Path, whole: Path, kind: str) -> None:
    name = NAMES[kind]
    files = [f"models/{name}/model.safetensors", "log/history.csv"] + ["log/completions.md"] * (kind == "grpo")
    for file in files:
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert {file.name for file in (folder / f"models/{name}").iterdir()} == {
        file.name for file in (whole / f"models/{name}").iterdir()
    }
    facts, expected = (json.loads((run / "log/stage.json").read_text()) for run in (folder, whole))
    assert {key: facts[key] for key in facts.keys() - COSTS} == {key: expected[key] for key in expected.keys() - COSTS}
    curves = list((whole / "log/plots/metrics").rglob("*.tsv"))
    assert len(curves) > 3
    for curve in curves:
        if not any(word in curve.stem for word in ("runtime", "per_second", "step_time", "flos")):
            tables = [(run / curve.relative_to(whole)).open() for run in (folder, whole)]
            values = [[row[curve.stem] for row in csv.DictReader(table, delimiter="\t")] for table in tables]
            assert values[0] == values[1], curve.stem


@pytest.mark.parametrize("kind", list(NAMES))
def test_whatever_happens_the_result_is_the_same(
    kind: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir(), folder.mkdir()
    steps, cycle = PARAMS[kind][NAMES[kind]]["trainer"]["max_steps"], {"sft": 1, "grpo": 3}[kind]
    undisturbed = succeeds(start(kind, whole))
    assert "going on" not in undisturbed
    assert list((whole / ".scratch/checkpoints").iterdir()) == []

    # Stopped in the middle, and told so several times.
    run = start(kind, folder)
    wait_for(run, lambda: logged(folder) > steps // 4)
    for _ in range(2):
        ask(run)
    said = rf"error: {kind} {NAMES[kind]} was stopped at step (\d+) of {steps}; the same command goes on from there"
    at = int(stopped(run, said)[1])
    assert steps // 4 < at < steps and at % cycle == 0
    assert [step(checkpoint) for checkpoint in sealed(folder)] == [at]
    assert not (folder / "models").exists() and not (folder / "log/history.csv").exists()
    for file in sealed(folder)[0].rglob("*"):
        assert file.name != "training_args.bin"
        assert file.is_dir() or b"hf_secret" not in file.read_bytes()

    # It goes on, and is killed with all its processes.
    run = start(kind, folder, "often")
    wait_for(run, lambda: bool(sealed(folder)) and step(sealed(folder)[-1]) >= at + 5 * cycle)
    killed = list(processes(run))
    for process in killed:
        process.kill()
    output, _ = run.communicate()
    assert f"{kind} {NAMES[kind]}: going on at step {at + 1} of {steps}\n" in output
    psutil.wait_procs(killed)
    assert not (folder / "models").exists()

    # Its newest checkpoint is damaged.
    before, newest = sealed(folder)[-2:]
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-5] ^= 4
    (newest / "model.safetensors").write_bytes(weights)
    output = succeeds(start(kind, folder))
    warnings = [line for line in output.splitlines() if line.startswith(f"warning: {newest.relative_to(folder)}: ")]
    assert warnings == [
        f"warning: {newest.relative_to(folder)}: model.safetensors has changed since it was written; "
        f"{before.name} is taken instead"
    ]
    assert f"going on at step {step(before) + 1} of {steps}\n" in output and step(before) > at
    same(folder, whole, kind)
    rows = list(csv.DictReader((whole / "log/history.csv").open()))
    assert any(float(row["grad_norm"] or 0) > 0 for row in rows[len(rows) // 2 :]), "nothing was learned"

    # It is killed before DVC has its model, which costs a few steps; the next stage removes what was kept for that.
    (kept,) = sealed(folder)
    assert step(kept) == step(before) and kept.parent.name.endswith(".finished")
    if kind == "sft":
        shutil.rmtree(folder / "models")
        assert f"going on at step {step(kept) + 1} of {steps}\n" in succeeds(start(kind, folder))
        same(folder, whole, kind)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, "run.json"}


@pytest.mark.parametrize(
    ("word", "seconds"),
    [
        ("workflow.preflight", 0.3),
        ("accelerate", 0.0),
        ("accelerate", 1.0),
        ("workflow.sft", 0.0),
        ("workflow.sft", 3.0),
    ],
)
def test_a_run_that_is_stopped_while_it_starts(
    word: str, seconds: float, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start("sft", tmp_path)

    # accelerate's own command line names the module that it starts, too.
    wait_for(
        run,
        lambda: any(
            word in words and (word == "accelerate" or "accelerate" not in words) for words in processes(run).values()
        ),
    )
    time.sleep(seconds)
    ask(run)
    stopped(run, r"error: .* was stopped.*; the same command (starts it again|goes on from there)")
    assert not (tmp_path / "models").exists()
