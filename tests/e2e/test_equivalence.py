"""The same phase on one process, on two, and under ZeRO-2 and ZeRO-3: the same curve and the same kind of model."""

import csv
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.checkout import Checkout

STEPS = 20
MACHINES = {
    "1 process": ("processes: 1", "accelerate: ddp"),
    "2 processes": ("processes: 2", "accelerate: ddp"),
    "ZeRO-2": ("processes: 2", "accelerate: zero2"),
    "ZeRO-3": ("processes: 2", "accelerate: zero3"),
}


@pytest.fixture(scope="module")
def runs(trained: Checkout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with log/ and model/ per machine: the first steps of the SFT phase, every step logged."""
    hardware = (trained.folder / "workflow/hardware/cpu.yaml").read_text()
    start = "> exec python -m workflow.launch sft"
    command = next(line[7:] for line in trained.first_run.splitlines() if line.startswith(start))
    trained.edit("params.yaml", "logging_steps: 10", "logging_steps: 1")
    trained.edit("params.yaml", "max_steps: 60", f"max_steps: {STEPS}")
    found = {}
    for name, (processes, accelerate) in MACHINES.items():
        found[name] = folder = tmp_path_factory.mktemp("run")
        text = hardware.replace("processes: 2", processes).replace("accelerate: ddp", accelerate)
        assert processes in text and accelerate in text
        (folder / "machine.yaml").write_text(text)
        moved = command.replace("--output data/models/cold_start", f"--output {folder}/model")
        moved = moved.replace("--log data/logs/sft/cold_start", f"--log {folder}/log")
        trained.run(f"HARDWARE={folder}/machine.yaml {moved}")
    trained.run("git checkout -q params.yaml")
    return found


def curve(folder: Path, column: str) -> list[float]:
    rows = list(csv.DictReader((folder / "log/history.csv").open()))
    return [float(row[column]) for row in rows if row[column]]


@pytest.mark.parametrize("name", list(MACHINES)[1:])
@pytest.mark.parametrize("column", ["loss", "mean_token_accuracy", "grad_norm", "eval_loss"])
def test_the_curve_is_the_same(name: str, column: str, runs: dict[str, Path]) -> None:
    one, other = (curve(runs[machine], column) for machine in ("1 process", name))
    assert len(one) == (1 if column == "eval_loss" else STEPS)
    worst = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    print(f"{name}, {column}: {one[0]:.6f} -> {one[-1]:.6f}, largest relative difference {worst:.1e}")
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", list(MACHINES)[1:])
def test_the_exported_model_is_whole(name: str, runs: dict[str, Path]) -> None:
    shapes = []
    for machine in ("1 process", name):
        with safe_open(runs[machine] / "model/model.safetensors", "np") as tensors:
            names = set(tensors.keys())
            shapes.append({name: tensors.get_slice(name).get_shape() for name in names})
    assert shapes[1] == shapes[0]
    assert "lm_head.weight" not in shapes[0]  # tied to the embedding
