"""Held-out rows, evaluation, logs, gates and trackers: short trainings of the smallest model, in this process."""

import csv
import json
import math
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file

from workflow import grpo, sft
from workflow.builtin import question, terms, thought
from workflow.checkpoints import newest, seal, step
from workflow.launch import HERE
from workflow.params import GRPOPhase, SFTPhase
from workflow.prompts import build
from workflow.rollouts import completions_text, weighted_sum
from workflow.stage import StageError, Stopped
from workflow.trackers import trackers
from workflow.training import TIMINGS, RunLog, eval_batch, hold_out, write_history

Run = Callable[..., Path]
Own = Callable[[str, str], None]

CPU = yaml.safe_load((HERE / "hardware/cpu.yaml").read_text())
PHASE = {"start_from": "base", "dataset": "traces", "global_batch_size": 8, "trainer": {}}
TRAINER = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """lighteval turns them off for the whole process when it is imported, as test_score.py does."""
    with torch.enable_grad():
        yield


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A stage takes SIGTERM and SIGINT for itself."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5}


def grpo_phase(**changes: Any) -> GRPOPhase:
    rewards = {"rewards": {"format": 1.0}, "rewards_read": "data/check/ok.txt"}
    return GRPOPhase.model_validate({**PHASE, **rewards, **changes})


@pytest.fixture
def run(
    sound: dict[str, Any],
    write_params: Callable[[Any], Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs the main() of sft or grpo on 40 rows, with changes to its phase, and returns the folder it wrote into.

    `minutes` lie between two checkpoints; `resume` is the one to go on from.
    """
    rng = random.Random(1)
    rows = []
    for number in range(40):
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
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    monkeypatch.setenv("HARDWARE", str(tmp_path / "one.yaml"))
    monkeypatch.setenv("CI", "1")  # TRL sends nothing then
    monkeypatch.chdir(tmp_path)
    counted = iter(range(100))

    def training(
        kind: str, changes: dict[str, Any], model: Path = tiny_model, minutes: float = 99, resume: Path | None = None
    ) -> Path:
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({**CPU, "processes": 1, "checkpoint_minutes": minutes}))
        name = {"sft": "cold_start", "grpo": "reasoning"}[kind]
        phase = sound[kind][name]
        phase |= {"global_batch_size": 8, "export_dtype": "float32"}
        phase |= {key: value for key, value in changes.items() if key != "trainer"}
        more = {"max_completion_length": 16, "num_generations": 4} if kind == "grpo" else {"max_length": 200}
        phase["trainer"] = {**TRAINER, **more, **changes.get("trainer", {})}
        write_params(sound)
        folder = tmp_path / f"run-{next(counted)}"
        arguments = {
            "model": model,
            "dataset": tmp_path / "rows.parquet",
            "output": folder / name,
            "log": folder / "log",
            "scratch": folder / "scratch",
            **({"resume": resume} if resume else {}),
        }
        monkeypatch.setattr(
            sys, "argv", [kind, name, *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))]
        )
        {"sft": sft, "grpo": grpo}[kind].main()
        return folder

    return training


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Writes a module with a function `reward` that returns an expression over `completions`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(module: str, rewards: str) -> None:
        (tmp_path / f"{module}.py").write_text(f"def reward(completions, **columns):\n    return {rewards}\n")

    return write


def history(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log/history.csv").open()))


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log/stage.json").read_text())


# Options


@pytest.mark.parametrize(
    ("processes", "most", "group", "held_out", "questions"),
    [
        (1, 128, 8, 64, 16),  # as many as the training batch has
        (1, 16, 8, 64, 2),
        (1, 4, 8, 64, 1),  # a group is never split up, though it is more than fits in training
        (2, 16, 8, 64, 4),
        (2, 16, 8, 6, 3),
        (7, 16, 7, 64, 16),
        (8, 8, 7, 64, 8),  # 7 completions on each of 8 devices are 8 whole groups
        (8, 1, 16, 10, 1),
        (1, 16, 8, 0, 2),
    ],
)
def test_evaluation_takes_whole_groups(processes: int, most: int, group: int, held_out: int, questions: int) -> None:
    phase = grpo_phase(
        global_batch_size=16 * group,
        held_out=held_out,
        trainer={"num_generations": group} | (EVALUATED if held_out else {}),
    )
    assert eval_batch(phase, processes, most) * processes == questions * group


def test_evaluation_with_a_number_of_completions_of_its_own() -> None:
    phase = grpo_phase(
        global_batch_size=32, held_out=4, trainer={"num_generations": 8, "num_generations_eval": 2, **EVALUATED}
    )
    assert eval_batch(phase, 1, 128) == 8


def test_held_out_rows_are_drawn_with_the_seed_and_not_trained_on() -> None:
    rows = Dataset.from_dict({"n": list(range(20))})
    phase = SFTPhase.model_validate({**PHASE, "held_out": 5, "trainer": EVALUATED})
    train, held_out = hold_out(rows, phase, 1, "sft.cold_start")
    assert held_out is not None and len(held_out) == 5
    assert sorted([*train["n"], *held_out["n"]]) == rows["n"]
    again, other = (hold_out(rows, phase, seed, "sft.cold_start")[1] for seed in (1, 2))
    assert again is not None and other is not None
    assert again["n"] == held_out["n"] != other["n"]
    whole, none = hold_out(rows, SFTPhase.model_validate(PHASE), 1, "sft.cold_start")
    assert whole is rows and none is None
    with pytest.raises(StageError, match=r"^sft.cold_start.held_out is 20, and traces has 20 rows; write less"):
        hold_out(rows, SFTPhase.model_validate({**PHASE, "held_out": 20, "trainer": EVALUATED}), 1, "sft.cold_start")


def test_an_evaluation_is_on_the_row_of_its_step(tmp_path: Path) -> None:
    log = [
        {"loss": 2.0, "step": 1, "step_time": 0.1},
        {"loss": 1.0, "step": 2, "reward": None},
        {"eval_loss": 1.5, "eval_runtime": 3.0, "eval_samples_per_second": 1.0, "step": 2},
        {"eval_loss": 1.4, "step": 3},
        {"train_runtime": 9.0, "train_loss": 1.5, "step": 3},
    ]
    write_history(log, tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().split() == [
        "step,eval_loss,loss,reward",
        "1,,2.0,",
        "2,1.5,1.0,",
        "3,1.4,,",
    ]


# Runs


def test_sft_evaluates_while_it_trains(run: Run) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    folder = run("sft", {"held_out": 6, "trainer": {**evaluation, "max_steps": 5}})
    rows = history(folder)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [bool(row["eval_loss"]) for row in rows] == [False, True, False, True, True]  # always at the end
    assert float(rows[4]["eval_loss"]) < float(rows[1]["eval_loss"])
    assert not {f"eval_{name}" for name in TIMINGS} & set(rows[0])
    for name in ("eval_loss", "eval_mean_token_accuracy", "mean_token_accuracy"):
        assert facts(folder)[name] == float(rows[4][name])
    assert (folder / "log/plots/metrics/eval/loss.tsv").is_file()


def test_held_out_rows_change_nothing_but_the_rows(run: Run) -> None:
    """Evaluating draws no random numbers in SFT."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    seen, unseen = (run("sft", {"held_out": 6, "trainer": {**evaluation, "eval_delay": late}}) for late in (0, 99))
    assert "eval_loss" in history(seen)[0] and "eval_loss" not in history(unseen)[0]
    weights = [(folder / "cold_start/model.safetensors").read_bytes() for folder in (seen, unseen)]
    assert weights[0] == weights[1]


def test_grpo_evaluates_and_writes_completions(run: Run) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2}
    changes = {"held_out": 3, "rewards": {"format": 1.0, "strict_format": 0.2}, "trainer": evaluation}
    folder = run("grpo", changes)
    rows = history(folder)
    assert [bool(row["eval_reward"]) for row in rows] == [False, True, False, True]
    assert "eval_rewards/format/mean" in rows[0]
    assert facts(folder)["eval_reward"] == float(rows[-1]["eval_reward"])
    # Untrained, it earns nothing: no group has a signal. TRL's own count is right here, too.
    assert {row["frac_reward_zero_std"] for row in rows} == {"1.0"}
    text = (folder / "log/completions.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# Step {step}" for step in (1, 2, 3, 4)]
    assert text.count("## Question") == 2 * 4
    assert text.count("Best of 4: format 0, strict_format 0; advantage +0.00") == 2 * 4
    assert (run("grpo", changes) / "log/completions.md").read_text() == text


def test_groups_with_equal_rewards_are_counted_whatever_the_rounding(run: Run, own: Own) -> None:
    """Each completion earns 1 + 0.2, which float32 rounds: TRL finds a deviation there, and no equal group."""
    own("always", "[1.0] * len(completions)")
    own("too", "[1.0] * len(completions)")
    rewards = {"rewards": {"always.reward": 1.0, "too.reward": 0.2}, "rewards_read": "always.py"}
    rows = history(run("grpo", {**rewards, "trainer": {"max_steps": 1}}))
    assert float(rows[0]["reward"]) == pytest.approx(1.2)
    assert rows[0]["frac_reward_zero_std"] == "1.0"


def test_completions_as_a_person_reads_them() -> None:
    logs = {
        "prompt": [
            [{"role": "system", "content": "Think."}, {"role": "user", "content": f"Question {n // 2}"}]
            for n in range(6)
        ],
        "completion": [[{"role": "assistant", "content": f"Thought\n\nAnswer {n}"}] for n in range(6)],
        "rewards": {"accuracy": [0.0, 1.0, math.nan, 0.0, 1.0, 0.0], "format": [0.25] * 6},
        "advantages": [-0.7, 0.7, 0.0, 0.0, 1.0, -1.0],
        "extra": {"accuracy/answer": list("abcdef")},
    }
    assert completions_text(12, logs, 2).splitlines() == [
        *["# Step 12", "", "## Question", "", "    Question 0", ""],
        *["Best of 2: accuracy 1, format 0.25; advantage +0.70; accuracy/answer b", ""],
        *["    Thought", "    ", "    Answer 1", ""],
        *["Worst of 2: accuracy 0, format 0.25; advantage -0.70; accuracy/answer a", ""],
        *["    Thought", "    ", "    Answer 0", ""],
        *["## Question", "", "    Question 1", ""],
        *["Best of 2: accuracy 0, format 0.25; advantage +0.00; accuracy/answer d", ""],
        *["    Thought", "    ", "    Answer 3", ""],
        *["Worst of 2: accuracy not judged, format 0.25; advantage +0.00; accuracy/answer c", ""],
        *["    Thought", "    ", "    Answer 2", ""],
    ]


def test_a_reward_without_a_verdict_is_left_out_of_the_sum() -> None:
    assert weighted_sum([1.0, 1.0], [1.0, 0.2]) == 1.2
    assert weighted_sum([math.nan, 1.0], [1.0, 0.2]) == 0.2
    assert math.isnan(weighted_sum([math.nan, math.nan], [1.0, 0.2]))


# Checkpoints

LORA = {"lora": {"r": 4, "lora_alpha": 8}}
WARNS = {"health": {"zero_reward_steps": 2}}


def same(folder: Path, other: Path, name: str) -> None:
    """Both runs have left the same bytes, and say the same of themselves but for what it cost."""
    logs = ["log/history.csv"] + ["log/completions.md"] * (name == "reasoning")
    for file in (f"{name}/model.safetensors", *logs):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    costs = {"seconds", "train_seconds", "tokens_per_second", "peak_memory_mib", "summary", "machine"}
    assert {k: v for k, v in facts(folder).items() if k not in costs} == {
        k: v for k, v in facts(other).items() if k not in costs
    }
    for metric in (folder / "log/plots/metrics").rglob("*.tsv"):
        rows = [
            [row[metric.stem] for row in csv.DictReader((run / metric.relative_to(folder)).open(), delimiter="\t")]
            for run in (folder, other)
        ]
        timed = any(word in metric.stem for word in TIMINGS)
        assert len(rows[0]) == len(rows[1]) if timed else rows[0] == rows[1], metric


@pytest.mark.parametrize(
    ("kind", "changes", "trainer"),
    [
        ("sft", {"held_out": 6}, {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 11}),
        ("sft", LORA, {"logging_steps": 2, "eval_strategy": "no", "max_steps": 7}),
        ("grpo", {"held_out": 2, **WARNS}, {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}),
        ("grpo", WARNS, {"num_iterations": 3, "beta": 0.1, "max_steps": 7}),
        ("grpo", {**LORA, **WARNS}, {"num_iterations": 2, "logging_steps": 3}),
    ],
)
def test_a_run_goes_on_from_a_checkpoint(
    run: Run, kind: str, changes: dict[str, Any], trainer: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**changes, "trainer": {"max_steps": 8, "eval_on_start": "held_out" in changes, **trainer}}
    whole = run(kind, changes)
    assert not list((whole / "scratch").glob("checkpoint-*"))
    often = run(kind, changes, minutes=0)
    name = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    same(often, whole, name)
    last = newest(often / "scratch")
    steps, cycle = changes["trainer"]["max_steps"], trainer.get("num_iterations", 1)
    assert last is not None and step(last) == (steps - 1) // cycle * cycle
    first, second = sorted((often / "scratch").glob("checkpoint-*"), key=step)[:2]
    assert 0 < step(first) < step(second)
    assert not list((often / "scratch").rglob("training_args.bin"))
    capsys.readouterr()
    seal(first, seconds=1000)
    again = run(kind, changes, resume=first)
    same(again, whole, name)
    assert 1000 <= facts(again)["train_seconds"] < 1100  # all sittings
    assert facts(again)["seconds"] > 1000
    assert facts(again)["tokens_per_second"] == pytest.approx(facts(again)["tokens"] / 1000, rel=0.1, abs=1)
    said = [row["step"] for row in json.loads((first / "trainer_state.json").read_text())["log_history"]]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert not any(f" step {number}: " in line for line in warnings for number in said)  # not for a second time


@pytest.mark.parametrize(
    ("kind", "held_out", "trainer"),
    [("sft", 20, {}), ("sft", 20, {"train_sampling_strategy": "batch_rebalance"}), ("grpo", 34, {})],
)
def test_a_run_goes_on_in_a_later_epoch(run: Run, kind: str, held_out: int, trainer: dict[str, Any]) -> None:
    """Each epoch has an order of its own, also from a checkpoint in its middle or where one begins."""
    trainer = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 99, **trainer}
    changes = {"held_out": held_out, "trainer": trainer}
    if kind == "grpo":
        changes |= {"rewards": {"cosine": 1.0}}  # by length, so an untrained model learns, too
    often = run(kind, changes, minutes=0)
    name = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    rows = list(csv.DictReader((often / "log/history.csv").open()))
    assert float(rows[-1]["grad_norm"]) > 0
    states = [json.loads(file.read_text()) for file in (often / "scratch").glob("checkpoint-*/trainer_state.json")]
    assert sorted(state["epoch"] == int(state["epoch"]) for state in states if state["epoch"] > 1) == [False, True]
    for state in states:
        same(run(kind, changes, resume=often / f"scratch/checkpoint-{state['global_step']}"), often, name)


ASKS = "[float(__import__('os').kill(__import__('os').getpid(), 15) or 0)] * len(completions)"


def test_a_run_that_is_asked_to_end_saves_where_it_can_go_on(run: Run, tmp_path: Path, own: Own) -> None:
    own("asks", ASKS)
    changes = {"rewards": {"asks.reward": 1.0}, "rewards_read": "asks.py"}
    with pytest.raises(Stopped) as stopped:
        run("grpo", {**changes, "trainer": {"num_iterations": 2, "max_steps": 5}})
    assert stopped.value.code == 75
    assert stopped.value.message == "grpo reasoning was stopped at step 2 of 5; the same command goes on from there"
    assert not (tmp_path / "run-0/reasoning").exists() and not (tmp_path / "run-0/log/history.csv").exists()
    found = newest(tmp_path / "run-0/scratch")
    assert found is not None and step(found) == 2


def test_a_run_that_no_checkpoint_holds_saves_none(run: Run, tmp_path: Path, own: Own) -> None:
    own("asks", ASKS)
    changes = {"rewards": {"asks.reward": 1.0}, "rewards_read": "asks.py"}
    with pytest.raises(Stopped) as stopped:
        run("grpo", {**changes, "trainer": {"sync_ref_model": True, "beta": 0.1}}, minutes=0)
    assert stopped.value.message == "grpo reasoning was stopped at step 1; it cannot go on from there"
    assert not list((tmp_path / "run-0/scratch").rglob("checkpoint-*"))


def test_a_run_that_is_asked_to_end_in_its_last_step_ends_as_it_would_have(run: Run, own: Own) -> None:
    own("asks", ASKS)
    folder = run("grpo", {"rewards": {"asks.reward": 1.0}, "rewards_read": "asks.py", "trainer": {"max_steps": 1}})
    assert (folder / "reasoning/model.safetensors").is_file()


def test_a_run_that_ends_early_exports_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(self: RunLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(RunLog, "on_step_end", ends)
    with pytest.raises(StageError, match=r"^the training ended at step 2 of 4, so its model is not exported; give"):
        run("sft", {})
    assert not (tmp_path / "run-0/cold_start").exists()


# Gates


def test_weights_that_are_not_numbers_end_sft(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"^sft.cold_start: the start model has weights that are no finite numbers"):
        run("sft", {}, broken)
    assert not (tmp_path / "run-0/cold_start").exists()


def test_a_learning_rate_that_breaks_the_weights_ends_grpo(run: Run, tmp_path: Path, own: Own) -> None:
    own("long", "[float(len(completion[0]['content'])) for completion in completions]")
    changes = {"rewards": {"long.reward": 1.0}, "rewards_read": "long.py", "health": {"action": "off"}}
    with pytest.raises(StageError, match=r"^grpo.reasoning: step 2: (loss|grad_norm) is (nan|-?inf), first in step"):
        run("grpo", {**changes, "trainer": {"learning_rate": 1e6, "num_iterations": 2}})
    assert not (tmp_path / "run-0/reasoning").exists()


@pytest.mark.parametrize("action", ["stop", "warn", "off"])
def test_a_run_without_reward(run: Run, tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"rewards": {"format": 1.0}, "health": {"action": action, "zero_reward_steps": 2}}
    if action == "stop":
        with pytest.raises(StageError, match=r"^grpo.reasoning: step 2: no completion has .*grpo.reasoning.health\)$"):
            run("grpo", changes)
        assert not (tmp_path / "run-0/reasoning").exists()
        return
    folder = run("grpo", changes)
    assert facts(folder)["steps"] == 4
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: grpo.reasoning: ")]
    assert len(warnings) == (action == "warn")  # once, though it holds for three steps


def test_a_reward_that_judges_nothing_does_not_end_the_run(run: Run, own: Own) -> None:
    own("mute", "[None] * len(completions)")
    folder = run("grpo", {"rewards": {"mute.reward": 1.0}, "rewards_read": "mute.py", "trainer": {"max_steps": 2}})
    assert [row["reward"] for row in history(folder)] == ["", ""]
    assert "no reward was logged" in facts(folder)["summary"]


# Trackers


def test_trackers_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACKERS", raising=False)
    assert trackers("run") == []
    assert not (tmp_path / ".scratch").exists()
    monkeypatch.setenv("TRACKERS", "mlflow")
    with pytest.raises(StageError, match=r"^TRACKERS has 'mlflow', which is not known; write some of: tensorboard,"):
        trackers("run")


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import importlib.util

    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    monkeypatch.setenv("TRACKERS", name)
    with pytest.raises(StageError, match=rf"^TRACKERS has '{name}', which is not installed; run: .*install {name}$"):
        trackers("run")
