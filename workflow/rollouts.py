"""TRL's GRPOTrainer with what a person wants to know of its rollouts.

Imported inside grpo's main(): it needs TRL.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from workflow.health import groups_without_signal
from workflow.rows import RowNotes

# As often completions are written in a run, and for so many questions each time.
TIMES = 20
QUESTIONS = 2


class EpochSampler(RepeatSampler):
    """TRL's order of the questions in the epoch that a trainer is in.

    TRL 1.16 draws one order after the other, so a run that went on from a checkpoint in the second epoch would meet the
    first one's again. This draws as many as there were epochs.

    Args:
        trainer: whose `state.epoch` counts them.
        like: TRL's sampler for this trainer.
    """

    def __init__(self, trainer: GRPOTrainer, like: RepeatSampler) -> None:
        parts = (like.mini_repeat_count, like.batch_size, like.repeat_count, like.shuffle, like.seed)
        super().__init__(like.data_source, *parts)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(int(self.trainer.state.epoch or 0)):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class RolloutTrainer(RowNotes, GRPOTrainer):
    """GRPOTrainer that counts groups with equal rewards exactly, and writes some completions to a file.

    Args:
        completions: the Markdown file to write, or to go on with where the run goes on from a checkpoint; the other
            arguments are GRPOTrainer's.
    """

    def __init__(self, *args: Any, completions: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.completions = completions

    @property
    def generates_next(self) -> bool:
        """Whether the next step begins with new completions: those that are in use are in no checkpoint."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(self, super()._get_train_sampler(dataset))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["rows"] = [row["id"] for row in inputs]
        mode, size = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        rows = list(zip(*self._logs["rewards"].values(), strict=True))[-len(inputs) * self.accelerator.num_processes :]
        sums = [weighted_sum(row, self.reward_weights.tolist()) for row in rows]
        self._metrics[mode]["frac_reward_zero_std"][-1] = groups_without_signal(sums, size)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "reward" not in logs or not self.accelerator.is_main_process:
            return
        steps = spaced(
            [row["step"] for row in self.state.log_history if "reward" in row], self.state.max_steps // TIMES
        )
        if steps[-1] == self.state.global_step:
            self.completions.parent.mkdir(parents=True, exist_ok=True)
            with self.completions.open("a" if len(steps) > 1 else "w", encoding="utf-8") as file:
                file.write(completions_text(steps[-1], self._logs, self.num_generations))


def spaced(steps: Sequence[int], least: int) -> list[int]:
    """The first of some ascending steps, and every one that is at least so far from the one taken before it."""
    taken = list(steps[:1])
    for step in steps:
        if step >= taken[-1] + max(1, least):
            taken.append(step)
    return taken


def weighted_sum(rewards: Sequence[float], weights: Sequence[float]) -> float:
    """The reward of one completion; NaN, no reward's verdict, is left out, and is the sum where there is no other."""
    given = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if not math.isnan(reward)]
    return sum(given) if given else math.nan


def completions_text(step: int, logs: Mapping[str, Any], size: int) -> str:
    """The best and the worst completion of the first questions of a batch, as Markdown.

    Args:
        logs: equally long sequences `prompt` and `completion` (messages), `advantages`, and by name `rewards` and
            `extra`, what a reward function logs; `size` rows in a row have the same prompt.
    """
    lines = [f"# Step {step}", ""]
    for start in range(0, min(len(logs["prompt"]), QUESTIONS * size), size):
        order = sorted(range(start, start + size), key=lambda row: logs["advantages"][row])
        lines += ["## Question", "", _indented(logs["prompt"][start][-1]["content"]), ""]
        for title, row in (("Best", order[-1]), ("Worst", order[0])):
            rewards = ", ".join(f"{name} {_number(values[row])}" for name, values in logs["rewards"].items())
            extra = "".join(f"; {name} {values[row]}" for name, values in logs["extra"].items())
            lines += [f"{title} of {size}: {rewards}; advantage {logs['advantages'][row]:+.2f}{extra}", ""]
            lines += [_indented(logs["completion"][row][-1]["content"]), ""]
    return "\n".join(lines) + "\n"


def _indented(text: str) -> str:
    """The text as a code block, which nothing that a model writes can end."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _number(reward: float) -> str:
    return "not judged" if math.isnan(reward) else f"{reward:.3g}"
