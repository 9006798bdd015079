"""Which checkpoints are taken, what they belong to, and when they go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workflow import checkpoints, launch
from workflow.checkpoints import (
    LIBRARIES,
    MANIFEST,
    MODULES,
    fault,
    fingerprint,
    finish,
    keep_two,
    newest,
    seal,
    take_up,
)
from workflow.launch import CHECKPOINTS, HERE, Hardware, drop_finished
from workflow.params import load_params


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints 9, 10 and 20, all sealed."""
    for step in (10, 9, 20):
        checkpoint = tmp_path / f"run/checkpoint-{step}"
        (checkpoint / "global_step").mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights" * 100)
        (checkpoint / "global_step/shard.pt").write_bytes(b"moments")
        (checkpoint / "empty").touch()
        seal(checkpoint, 60.04 * step)
    return tmp_path / "run"


def truncate(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def flip(checkpoint: Path) -> None:
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[50] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors has 100 bytes instead of 700"),
    "flipped": (flip, "model.safetensors has changed since it was written"),
    "lost": (lambda checkpoint: shutil.rmtree(checkpoint / "global_step"), "global_step/shard.pt is missing"),
    "filled": (lambda checkpoint: (checkpoint / "empty").write_text("x"), "empty has 1 bytes instead of 0"),
    "unsealed": (
        lambda checkpoint: (checkpoint / MANIFEST).unlink(),
        "manifest.json is missing, so it was not written to its end",
    ),
    "cut": (lambda checkpoint: (checkpoint / MANIFEST).write_text('{"files": {'), "manifest.json is damaged"),
    "no list": (lambda checkpoint: (checkpoint / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "other": (lambda checkpoint: (checkpoint / MANIFEST).write_text("{}"), "manifest.json is damaged"),
}


def test_a_sealed_checkpoint_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [fault(checkpoint) for checkpoint in folder.iterdir()] == [None] * 3
    assert newest(folder) == folder / "checkpoint-20"  # by number, not by name or by time
    known = json.loads((folder / "checkpoint-20" / MANIFEST).read_text())
    assert list(known["files"]) == ["empty", "global_step/shard.pt", "model.safetensors"]
    assert checkpoints.seconds_trained(folder / "checkpoint-20") == known["seconds"] == 1200.8
    assert checkpoints.step(folder / "checkpoint-20") == 20
    seal(folder / "checkpoint-20", 5)
    assert fault(folder / "checkpoint-20") is None
    assert capsys.readouterr().out == ""


def test_a_disk_that_fails_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: Path) -> str:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(checkpoints, "_sha256", fails)
    assert "a file cannot be read ([Errno 5] Input/output error: " in (fault(folder / "checkpoint-20") or "")


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_taken(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, says = DAMAGE[damage]
    harm(folder / "checkpoint-20")
    assert newest(folder) == folder / "checkpoint-10"
    assert capsys.readouterr().out == (f"warning: {folder}/checkpoint-20: {says}; checkpoint-10 is taken instead\n")


def test_none_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in folder.iterdir():
        flip(checkpoint)
    assert newest(folder) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[1] for line in lines] == [
        "checkpoint-10 is taken instead",
        "checkpoint-9 is taken instead",
        "the training begins anew",
    ]
    (folder / "none").mkdir()
    assert newest(folder / "none") is None and capsys.readouterr().out == ""


def test_what_a_run_goes_on_from(folder: Path) -> None:
    flip(folder / "checkpoint-20")
    (folder / "checkpoint-30").mkdir()  # being written when the run was killed
    assert take_up(folder) == folder / "checkpoint-10"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert take_up(folder.with_name("new")) is None and folder.with_name("new").is_dir()


def test_a_finished_training_keeps_one_checkpoint_until_its_model_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / checkpoints.RUN).write_text(json.dumps({"stage": "sft cold_start", "output": "data/models/cold_start"}))
    (folder / "model").mkdir()
    (folder / "README.md").touch()
    finish(folder)
    kept = tmp_path / "run.finished"
    assert not folder.exists() and sorted(path.name for path in kept.iterdir()) == ["checkpoint-20", "run.json"]
    assert take_up(folder) == folder / "checkpoint-20" and not kept.exists()  # it was killed before DVC had the model
    finish(folder)
    monkeypatch.setattr(launch, "CHECKPOINTS", tmp_path)
    drop_finished(Path("data/models/reasoning"))
    assert kept.is_dir()
    drop_finished(Path("data/models/cold_start"))
    assert not kept.exists()


def test_two_are_kept(folder: Path) -> None:
    (folder / "checkpoint-30").mkdir()
    keep_two(folder)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-30"]


def test_a_short_training_leaves_nothing(tmp_path: Path) -> None:
    take_up(tmp_path / "run")
    (tmp_path / "run/checkpoint-3").mkdir()  # not sealed
    finish(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_training_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / checkpoints.RUN).write_text(json.dumps({"stage": "sft a", "output": "data/models/a"}))
    monkeypatch.setattr(launch, "CHECKPOINTS", folder.parent)
    drop_finished(Path("data/models/a"))
    assert len(list(folder.glob("checkpoint-*"))) == 3
    assert Path(".scratch/checkpoints") == CHECKPOINTS


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_fingerprint_names_everything_that_a_training_depends_on(
    kind: Any,
    sound: dict[str, Any],
    write_params: Callable[[Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    model, dataset, read = tmp_path / "model", tmp_path / "rows.parquet", tmp_path / "own.py"
    model.mkdir()
    for file in (model / "config.json", model / "model.safetensors", dataset, read):
        file.write_text("as it was")
    sound["grpo"]["reasoning"] |= {"rewards_read": str(read)}
    hardware = {"processes": 2, "accelerate": "ddp", "tokens_per_device": {"sft": 16384, "grpo": 32768}}

    def found() -> str:
        machine = Hardware.model_validate(hardware)
        return fingerprint(kind, name, load_params(write_params(sound)), machine, model, dataset)

    def change(section: dict[str, Any], key: str, value: Any) -> str:
        before = section.get(key)
        section[key] = value
        changed = found()
        section[key] = before
        if before is None:
            del section[key]
        return changed

    def write(file: Path, text: str) -> str:
        before = file.read_text()
        file.write_text(text)
        changed = found()
        file.write_text(before)
        return changed

    start = found()
    assert start == found() and len(start) == 32
    others = [
        change(sound, "seed", 43),
        change(sound[kind][name]["trainer"], "learning_rate", 1e-5),
        change(sound[kind][name], "global_batch_size", 128),
        change(sound[kind][name], "export_dtype", "float32"),
        change(hardware, "processes", 1),
        change(hardware, "accelerate", "zero2"),
        change(hardware, "tokens_per_device", {"sft": 800, "grpo": 1100}),
        change(hardware, "trainer", {"bf16": True}),
        change(hardware, "environment", {"OMP_NUM_THREADS": "2"}),
        write(model / "model.safetensors", "as it is"),
        write(model / "config.json", "as it is"),
        write(dataset, "as it is"),
    ]
    if kind == "grpo":
        others += [change(sound["grpo"][name]["rewards"], "format", 0.3), write(read, "as it is")]
    (model / "more.json").touch()
    others.append(found())
    (model / "more.json").unlink()
    for module in MODULES[kind]:
        copy = shutil.copytree(HERE, tmp_path / f"code-{module}", ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / f"{module}.py").open("a") as file:
            file.write("# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "HERE", copy)
            others.append(found())
    for library in LIBRARIES:
        known = {name: checkpoints.version(name) for name in LIBRARIES}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "version", (known | {library: "0"}).__getitem__)
            others.append(found())
    assert len({start, *others}) == 1 + len(others)
    same = [
        change(hardware, "checkpoint_minutes", 1),
        change(hardware, "memory_gib", 80.0),
        change(hardware, "vllm", {"enforce_eager": True}),
        change(hardware, "generation", {"chunk": 3}),
        change(sound, "recipe", "other"),
        change(sound["tasks"]["problems"], "n_samples", 9),
        start,
    ]
    assert set(same) == {found()}
