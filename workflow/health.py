"""Signs in the training log that a run is not learning, and what usually causes them."""

import math
from collections.abc import Sequence
from typing import Any

from workflow.params import GRPOPhase, Health

# The most that a reward of workflow/rewards.py gives; those that depend on a length reach theirs in no real run.
MOST = {
    "accuracy": 1.0,
    "format": 1.0,
    "tag_count": 1.0,
    "reasoning_steps": 1.0,
    "repetition_penalty": 0.0,
    "soft_overlong_punishment": 0.0,
    "correctness": 2.0,
    "int": 0.5,
    "strict_format": 0.5,
    "soft_format": 0.5,
    "xmlcount": 0.5,
}
# A mean reward of this share of the most: what is left to learn is less than the noise.
SOLVED = 0.9


def most_reward(phase: GRPOPhase) -> float | None:
    """The weighted sum that a perfect completion earns; None where it is not known (own rewards, models, lengths)."""
    most = 0.0
    for name, weight in phase.rewards.items():
        known = MOST.get(name.removesuffix("_as_published"))
        if known is None or weight < 0:
            return None
        most += weight * known
    return most or None


def groups_without_signal(rewards: Sequence[float], size: int) -> float:
    """Share of groups of `size` consecutive rewards that are all equal, so that their advantages are 0.

    NaN stands for a completion that no reward could judge; it is left out of its group. TRL compares a float32
    deviation with 0 instead, and finds no equal group where the sum of the rewards is rounded (1 + 0.2).
    """
    groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    equal = [len({round(reward, 6) for reward in group if not math.isnan(reward)}) <= 1 for group in groups]
    return sum(equal) / len(equal)


def not_finite(row: dict[str, Any], scaled: bool = False) -> str | None:
    """Which number of a logged step is not finite, or None.

    Args:
        scaled: a step whose gradient overflows is skipped, as in float16 and by DeepSpeed, and belongs to training.
    """
    for name in ("loss", "reward", *([] if scaled else ["grad_norm"])):
        value = row.get(name)
        if value is not None and not math.isfinite(value):
            return f"step {row['step']}: {name} is {value}"
    return None


def conditions(health: Health, history: list[dict[str, Any]], most: float | None) -> dict[str, str]:
    """The conditions that hold now: name and message. The name `solved` is no failure: there is nothing left to learn.

    Args:
        history: the logged steps so far, in order, as TRL names their numbers; a number may be missing or None.
        most: the reward of a perfect completion, see `most_reward`.
    """
    found: dict[str, str] = {}
    rows = [row for row in history if "reward" in row]
    if not rows:
        return found
    last, step = rows[-1], f"step {rows[-1]['step']}"
    if last["step"] >= health.zero_reward_steps and not any(row["reward"] for row in rows):
        found["zero_reward"] = (
            f"{step}: no completion has earned a reward yet; usual causes are questions that are too hard for the "
            "model, an answer format that the chat template or the system prompt makes impossible, or completions cut "
            "off before the answer: read completions.md, then choose easier questions, start from an SFT phase or "
            "write a larger trainer.max_completion_length"
        )
    recent = rows[-health.patience :]
    if len(recent) < health.patience:
        return found
    held = f"for {health.patience} logged steps"
    rewards = [row["reward"] for row in recent if row["reward"] is not None]
    mean = sum(rewards) / len(rewards) if rewards else math.nan
    of_most = f"{mean:.3g}" if most is None else f"{mean:.3g} of at most {most:.3g}"
    solved = most is not None and mean >= SOLVED * most

    def all_of(name: str, least: float, most: float = math.inf) -> bool:
        values = [row.get(name) for row in recent]
        return all(value is not None and least <= value <= most for value in values)

    if all_of("frac_reward_zero_std", health.frac_reward_zero_std):
        share = f"{last['frac_reward_zero_std']:.0%} of the groups have equal rewards"
        if solved:
            found["solved"] = (
                f"{step}: {share} because nearly all are right (mean reward {of_most}), and so it was {held}: the task "
                "is solved; stop earlier, or choose harder questions"
            )
        else:
            found["frac_reward_zero_std"] = (
                f"{step}: {share} (mean reward {of_most}), and it was {health.frac_reward_zero_std:.0%} or more {held}:"
                " nothing is learned from them; usual causes are questions that are too hard or too easy for the model "
                "and a reward that cannot be earned: choose other questions, or write a larger trainer.num_generations "
                "or trainer.temperature"
            )
    if all_of("completions/clipped_ratio", health.clipped_ratio):
        found["clipped_ratio"] = (
            f"{step}: {last['completions/clipped_ratio']:.0%} of the completions are cut off, and it was "
            f"{health.clipped_ratio:.0%} or more {held}; usual causes are a trainer.max_completion_length that is too "
            "small and a model that does not end its turn: write a larger one, or teach the end of a turn with an SFT "
            "phase"
        )
    if all_of("entropy", -math.inf, health.min_entropy) and not solved:
        found["min_entropy"] = (
            f"{step}: the entropy is {last['entropy']:.3g} nats per token, and it was {health.min_entropy:.3g} or less "
            f"{held} (mean reward {of_most}): the model has collapsed to one answer; usual causes are a learning rate "
            "that is too high and no KL term: write a lower trainer.learning_rate, or a trainer.beta such as 0.04"
        )
    return found
