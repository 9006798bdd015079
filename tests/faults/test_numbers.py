"""Losses, weights and rewards that are no finite numbers: a training stops at once, says where, keeps what is good.

And rewards that never return, or meet answers that are bombs. Real trainings, two processes. Rewards that raise, that
need too much memory or return a wrong number of values are in tests/unit/test_rewards.py.
"""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.e2e.test_resume import NAMES, SHAPE, begin, make_inputs, sealed, succeeds
from workflow.checkpoints import step

ROWS = r"on rows? row-\d+(, row-\d+){0,4}( and \d+ more)?"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), SHAPE)


def variant(inputs: Path, folder: Path, kind: str, trainer: dict[str, Any], **phase: Any) -> Path:
    """The inputs with other parameters, in a folder of their own."""
    shutil.copytree(inputs, folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    ours = params[kind][NAMES[kind]]
    ours["trainer"] |= trainer
    ours |= phase
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def fails(inputs: Path, kind: str, folder: Path, hardware: str = "seldom") -> str:
    """The one sentence that a training ends with; no model is there."""
    folder.mkdir(exist_ok=True)
    run = begin(inputs, kind, folder, hardware)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    assert not (folder / "models").exists()
    return errors[0]


def with_reward(inputs: Path, folder: Path, code: str, trainer: dict[str, Any], **phase: Any) -> Path:
    """GRPO with an own reward, whose module lies in `folder/run`, the folder that the training runs in."""
    (folder / "run").mkdir()
    (folder / "run/hurt.py").write_text(f"def reward(completions, id, trainer_state, **_):\n{code}\n")
    changed = {"rewards": {"hurt.reward": 1.0}, "rewards_read": "hurt.py", **phase}
    return variant(inputs, folder / "inputs", "grpo", trainer, **changed)


def folder_with(tmp_path: Path, name: str) -> Path:
    """Another folder to train in, with the same own reward."""
    shutil.copytree(tmp_path / "run", tmp_path / name, ignore=shutil.ignore_patterns(".scratch"))
    return tmp_path / name


@pytest.mark.parametrize("kind", list(NAMES))
def test_a_learning_rate_that_destroys_the_weights(kind: str, inputs: Path, tmp_path: Path) -> None:
    ours = variant(inputs, tmp_path / "inputs", kind, {"learning_rate": 1e30, "max_grad_norm": 1e9})
    said = fails(ours, kind, tmp_path / "run")
    logged = {"sft": 4, "grpo": 2}[kind]
    found = re.match(
        rf"error: {kind}\.{NAMES[kind]}: step {logged}: \w+ is (nan|inf), first in step (\d), {ROWS}, so ", said
    )
    assert found and int(found[2]) in (1, 2), said
    assert "learning_rate" in said


def test_weights_that_are_lost_are_in_no_model(inputs: Path, tmp_path: Path) -> None:
    """Where nothing is logged and no checkpoint is written after it."""
    trainer = {"learning_rate": 1e30, "max_grad_norm": 1e9, "logging_steps": 1000, "max_steps": 12}
    said = fails(variant(inputs, tmp_path / "inputs", "sft", trainer), "sft", tmp_path / "run")
    wanted = rf"after step 12 there are weights that are no finite numbers \(first seen in step \d, {ROWS}\); "
    assert re.match(f"error: sft\\.cold_start: {wanted}", said), said


def test_a_start_model_that_is_broken(inputs: Path, tmp_path: Path) -> None:
    ours = variant(inputs, tmp_path / "inputs", "sft", {})
    weights = load_file(ours / "model/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, ours / "model/model.safetensors", {"format": "pt"})
    said = fails(ours, "sft", tmp_path / "run")
    assert said.startswith(
        "error: sft.cold_start: the start model has weights that are no finite numbers; name another"
    )


def test_weights_that_are_lost_are_in_no_checkpoint(inputs: Path, tmp_path: Path) -> None:
    """Rewards so large that their advantages are infinite, from step 7 on and for one question's completions.

    Checkpoints are written after every generation, and nothing is logged before the end.
    """
    code = """
    huge = [3e38, -3e38] * len(id)
    late = trainer_state.global_step >= 6
    return [huge[n] if late and name == worst else float(n % 3) for n, name in enumerate(id)]
worst = None
def reward(completions, id, trainer_state, inner=reward, **_):
    global worst
    worst = id[0]
    return inner(completions, id, trainer_state)"""
    trainer = {"scale_rewards": "none", "logging_steps": 50, "num_iterations": 1, "eval_steps": 60, "max_steps": 12}
    ours = with_reward(inputs, tmp_path, code, trainer)
    for attempt in (1, 2):
        said = fails(ours, "grpo", tmp_path / "run", "often")
        wanted = (
            rf"after step 7 there are weights that are no finite numbers \(first seen in step 7, {ROWS}\); the last "
        )
        assert re.match(f"error: grpo\\.reasoning: {wanted}", said), said
        assert [step(checkpoint) for checkpoint in sealed(tmp_path / "run")][-1] == 6, attempt
    # Without checkpoints, before anything is sampled from them.
    said = fails(ours, "grpo", folder_with(tmp_path, "other"), "seldom")
    assert re.match(f"error: grpo\\.reasoning: {wanted}", said), said
    # Without the cause it begins anew, as the reward is part of what is learned.
    (tmp_path / "run/hurt.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    assert "going on" not in succeeds(begin(ours, "grpo", tmp_path / "run"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "    return [float('nan') if n == 3 and trainer_state.global_step == 2 else 1.0 for n in range(len(id))]",
            r"reward hurt\.reward returned nan in step 3 for completion 3 of 8, row row-\d+; return a finite number, ",
        ),
        (
            "    while True:\n        pass",
            r"reward hurt\.reward took more than 2 s in step 1, at line [23] of .*hurt\.py; make it faster, or",
        ),
        (
            # As where `ulimit -v` bounds a process: 1 GB more than it has.
            "    import resource\n"
            "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 10**9\n"
            "    resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
            "    kept = []\n    while True:\n        kept.append(bytearray(10**8))",
            r"reward hurt\.reward failed in step 1: MemoryError \(\) in line 7 of .*hurt\.py; mend it",
        ),
    ],
)
def test_a_reward_that_cannot_be_used(code: str, said: str, inputs: Path, tmp_path: Path) -> None:
    ours = with_reward(inputs, tmp_path, code, {"num_iterations": 1, "eval_steps": 60}, reward_seconds=2.0)
    found = fails(ours, "grpo", tmp_path / "run")
    assert re.match(f"error: {said}", found), found


def test_a_reward_that_hangs_where_python_cannot_interrupt_it(inputs: Path, tmp_path: Path) -> None:
    """One operation on an integer: the process ends all the same, and says where it was."""
    ours = with_reward(inputs, tmp_path, "    return [sum(range(10**13))]", {"eval_steps": 60}, reward_seconds=1.0)
    run = begin(ours, "grpo", tmp_path / "run")
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 1, output
    assert 'hurt.py", line 2 in reward' in output
    assert output.splitlines()[-1].startswith("error: training process ") and "exit code 1" in output.splitlines()[-1]


def test_golds_that_are_bombs(inputs: Path, tmp_path: Path) -> None:
    """They are bounded and counted, and the training goes on."""
    ours = variant(inputs, tmp_path / "inputs", "grpo", {"max_steps": 12, "logging_steps": 1, "num_iterations": 1})
    rows = pq.read_table(ours / "rows.parquet").to_pylist()
    bombs = [r"\boxed{1E99999999}", r"$10^{10^{10}}$", r"$((((9!)!)!)!)!$"]
    for row, bomb in zip(rows, bombs, strict=False):
        row["solution"] = bomb
    pq.write_table(pa.Table.from_pylist(rows), ours / "rows.parquet")
    (tmp_path / "run").mkdir()
    succeeds(begin(ours, "grpo", tmp_path / "run"))
    history = list(csv.DictReader((tmp_path / "run/log/history.csv").open()))
    reasons = ("timeout", "error", "gold_unparsed")
    counted = [float(row[f"verify/{reason}"]) for row in history for reason in reasons]
    assert sum(counted) > 0
    assert json.loads((tmp_path / "run/log/stage.json").read_text())["steps"] == 12
