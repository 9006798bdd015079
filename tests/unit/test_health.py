"""Which logs are a warning, what it says, and that a solved task is none. No torch here."""

import math
from typing import Any

import pytest

from workflow.health import conditions, groups_without_signal, most_reward, not_finite
from workflow.params import REWARDS, GRPOPhase, Health

HEALTH = Health(patience=3, zero_reward_steps=10)
LEARNING = {
    "reward": 0.5,
    "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.01,
    "entropy": 0.6,
    "loss": 0.01,
    "grad_norm": 0.3,
}


def log(steps: int, **numbers: Any) -> list[dict[str, Any]]:
    """A log with an evaluation between the steps, as TRL writes it."""
    rows = [
        {"step": step, **LEARNING, **{name.replace("__", "/"): v for name, v in numbers.items()}}
        for step in range(1, steps + 1)
    ]
    return [*rows[:1], {"step": 1, "eval_reward": 0.0, "eval_loss": math.nan}, *rows[1:]]


def phase(rewards: dict[str, float]) -> GRPOPhase:
    read = "own.py" if any("." in name for name in rewards) else "data/check/ok.txt"
    return GRPOPhase.model_validate(
        {
            "start_from": "base",
            "dataset": "problems",
            "global_batch_size": 8,
            "rewards": rewards,
            "rewards_read": read,
            "trainer": {"num_generations": 8},
        }
    )


def test_a_run_that_learns() -> None:
    assert conditions(HEALTH, log(50), most=1.2) == {}
    assert conditions(HEALTH, [], most=1.2) == {}


@pytest.mark.parametrize(
    ("name", "numbers", "says"),
    [
        ("frac_reward_zero_std", {"frac_reward_zero_std": 0.8}, ["80%", "0.5 of at most 1.2", "num_generations"]),
        ("clipped_ratio", {"completions__clipped_ratio": 0.3}, ["30%", "max_completion_length"]),
        ("min_entropy", {"entropy": 0.02}, ["0.02 nats", "learning_rate", "beta"]),
    ],
)
def test_conditions_that_have_to_last(name: str, numbers: dict[str, float], says: list[str]) -> None:
    assert conditions(HEALTH, log(2, **numbers), most=1.2) == {}
    found = conditions(HEALTH, log(4, **numbers), most=1.2)
    assert list(found) == [name]
    assert all(text in found[name] for text in ["step 4", "3 logged steps", *says])
    once_better = log(4, **numbers)
    once_better[-2] |= LEARNING
    assert conditions(HEALTH, once_better, most=1.2) == {}


def test_no_reward_after_some_steps() -> None:
    assert conditions(HEALTH, log(9, reward=0.0), most=1.2) == {}
    for nothing in (0.0, None):
        found = conditions(HEALTH, log(10, reward=nothing), most=1.2)
        assert list(found) == ["zero_reward"]
        assert "step 10" in found["zero_reward"] and "completions.md" in found["zero_reward"]
    rows = log(10, reward=0.0)
    rows[4]["reward"] = 0.01
    assert conditions(HEALTH, rows, most=1.2) == {}


def test_a_solved_task_is_not_a_failure() -> None:
    solved = log(5, reward=1.15, frac_reward_zero_std=0.95, entropy=0.006)
    found = conditions(HEALTH, solved, most=1.2)
    assert list(found) == ["solved"]
    assert "1.15 of at most 1.2" in found["solved"]
    failing = log(5, reward=0.2, frac_reward_zero_std=0.95, entropy=0.006)
    assert list(conditions(HEALTH, failing, most=1.2)) == ["frac_reward_zero_std", "min_entropy"]
    # What the most is, is not known of a reward of one's own.
    assert list(conditions(HEALTH, solved, most=None)) == ["frac_reward_zero_std", "min_entropy"]


def test_numbers_that_were_not_logged_are_no_condition() -> None:
    rows = [{"step": step, "reward": None, "entropy": None} for step in range(1, 6)]
    assert conditions(HEALTH, rows, most=None) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "reward"])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    assert not_finite({"step": 7, **LEARNING, name: value}) == f"step 7: {name} is {value}"


def test_numbers_that_are_finite() -> None:
    assert not_finite({"step": 7, **LEARNING}) is None
    assert not_finite({"step": 7, "reward": None, "loss": 0.0}) is None
    assert not_finite({"step": 7, **LEARNING, "grad_norm": math.inf}, scaled=True) is None  # a skipped step


def test_the_most_a_completion_earns() -> None:
    assert most_reward(phase({"accuracy": 1.0, "format": 0.2})) == pytest.approx(1.2)
    assert most_reward(phase({"correctness_as_published": 1.0, "int": 1.0, "xmlcount": 1.0})) == 3.0
    assert most_reward(phase({"accuracy": 1.0, "repetition_penalty": 1.0})) == 1.0
    for unknown in ({"accuracy": 1.0, "cosine": 1.0}, {"my.reward": 1.0}, {"tag_count": -1.0}):
        assert most_reward(phase(unknown)) is None


def test_the_most_is_known_of_every_reward_that_has_one() -> None:
    unknown = [name for name in REWARDS if most_reward(phase({name: 1.0, "accuracy": 1.0})) is None]
    assert unknown == ["length", "cosine"]


def test_groups_without_signal_whatever_the_rounding() -> None:
    third = 0.1 + 0.2
    assert groups_without_signal([1.2, 1.2, third, 0.3, 0.0, 1.0, 1.0, 1.0], 2) == 0.75
    assert groups_without_signal([1.0, math.nan, math.nan, math.nan, 0.5, 1.0], 2) == pytest.approx(2 / 3)
