"""GRPO computes the loss of January 2025: TRL's number beside the formula, on the rollouts of real training steps.

The formula is DeepSeekMath's (arXiv 2402.03300, eq. 3 and 4) as TRL 0.14 had it when Open-R1 was published:
advantage (r - mean) / (std + 1e-4) over a group, std with n - 1; k3 estimate of the KL to the reference; the mean
over a completion's tokens up to and including the first end of a turn, then over completions. It made rollouts anew
for every forward pass, so the ratio of new to old probabilities was 1 and nothing was clipped.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import GRPOConfig

from workflow.rollouts import RolloutTrainer
from workflow.training import load_tokenizer

GROUP = 4
JANUARY = {
    "num_generations": GROUP,
    "num_iterations": 1,
    "beta": 0.04,
    "use_bias_correction_kl": False,
    "epsilon": 0.2,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "mask_truncated_completions": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
}
STEPS = 2
TOLERANCE = 1e-5


@dataclass
class Step:
    """One optimizer step: the policy before it, its rollouts, and what the trainer made of them."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]
    eos: int
    loss: float = 0.0
    gradient: torch.Tensor | None = None


class Recorder(RolloutTrainer):
    """The pipeline's trainer, which notes every rollout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorded: list[Step] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        pair = output["prompt_ids"], output["prompt_mask"]
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*pair, strict=True)]
        rewards = list(self._logs["rewards"]["digits"])[-len(inputs) :]
        # Loaded anew, because TRL puts a forward of its own into its model.
        reference = AutoModelForCausalLM.from_pretrained(self.model.name_or_path, dtype=torch.float32)
        policy = copy.deepcopy(reference)
        policy.load_state_dict(self.model.state_dict())
        self.recorded.append(
            Step(
                policy,
                reference,
                prompts,
                output["completion_ids"].tolist(),
                rewards,
                self.processing_class.eos_token_id,
            )
        )
        return output


class Gradients(TrainerCallback):
    """Notes the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.recorded: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.recorded.append(torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()]))


def digits(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that has nothing to do with the text and differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def train(model: Path, folder: Path, **options: Any) -> list[Step]:
    """Two optimizer steps of two micro-batches each, from weights that are not the reference's."""
    questions = ["What is 1 + 1?", "What is 43 + 2 - 3 + 1?", "Is it?", "What is 7 - 2?"] * 8
    gradients = Gradients()
    trainer = Recorder(
        model=str(model),
        reward_funcs=[digits],
        args=GRPOConfig(
            **{**JANUARY, **options},
            output_dir=str(folder),
            per_device_train_batch_size=2 * GROUP,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            max_completion_length=24,
            learning_rate=1e-2,
            max_grad_norm=0.0,  # off: the gradient is compared
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=3,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"id": questions, "prompt": [[{"role": "user", "content": text}] for text in questions]}
        ),
        processing_class=load_tokenizer(model),
        callbacks=[gradients],
        completions=folder / "completions.md",
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == len(gradients.recorded) == STEPS
    for index, step in enumerate(trainer.recorded):  # fewer than steps, with more iterations
        step.loss, step.gradient = losses[index], gradients.recorded[index]
    return trainer.recorded


def january(step: Step, beta: float = 0.04, temperature: float = 1.0) -> tuple[float, torch.Tensor, float]:
    """The formula in float64, one completion at a time, without padding: the loss, its gradient and the mean KL."""
    policy, reference = step.policy.double(), step.reference.double()
    policy.zero_grad()
    rewards = torch.tensor(step.rewards, dtype=torch.float64).view(-1, GROUP)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    losses, divergences = [], []
    for prompt, completion, advantage in zip(step.prompts, step.completions, advantages.flatten(), strict=True):
        if step.eos in completion:
            completion = completion[: completion.index(step.eos) + 1]
        logps = log_probabilities(policy, prompt, completion, temperature)
        with torch.no_grad():
            reference_logps = log_probabilities(reference, prompt, completion, temperature)
        divergence = torch.exp(reference_logps - logps) - (reference_logps - logps) - 1
        ratio = torch.exp(logps - logps.detach())
        losses.append(-(ratio * advantage - beta * divergence).mean())
        divergences.append(divergence.mean().item())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    return loss.item(), gradient, sum(divergences) / len(divergences)


def log_probabilities(model: PreTrainedModel, prompt: list[int], completion: list[int], temp: float) -> torch.Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temp
    return logits.log_softmax(-1)[range(len(completion)), completion]


def distance(step: Step, loss: float, gradient: torch.Tensor) -> tuple[float, float]:
    """How far the trainer's loss is off, and its gradient, relative to the formula's."""
    assert step.gradient is not None
    return abs(step.loss - loss), ((step.gradient - gradient).norm() / gradient.norm()).item()


def test_loss_and_gradient_are_those_of_the_formula(tiny_model: Path, tmp_path: Path) -> None:
    steps = train(tiny_model, tmp_path)
    assert len(steps) == STEPS  # rollouts are made once per optimizer step
    for step in steps:
        loss, gradient, divergence = january(step)
        assert len(step.completions) == 4 * GROUP
        assert divergence > 0.1  # the policy is not the reference
        ended = [step.eos in completion for completion in step.completions]
        assert any(ended) and not all(ended)
        off = distance(step, loss, gradient)
        assert off[0] < TOLERANCE and off[1] < TOLERANCE, off


@pytest.mark.parametrize(
    "option",
    [
        {"loss_type": "dapo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"beta": 0.0},
        {"use_bias_correction_kl": True},  # TRL 1.16's default
        {"mask_truncated_completions": True},
        {"temperature": 0.9},
    ],
    ids=str,
)
def test_each_option_changes_the_gradient(tiny_model: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    """The loss itself says less: with a ratio of 1 the advantages of a group cancel, and the KL is what remains."""
    step = train(tiny_model, tmp_path, **option)[0]
    loss, gradient, _ = january(step)
    assert distance(step, loss, gradient)[1] > 100 * TOLERANCE


def test_an_option_that_january_lacked_and_that_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    step = train(tiny_model, tmp_path, epsilon=0.01)[0]
    loss, gradient, _ = january(step)
    assert max(distance(step, loss, gradient)) < TOLERANCE


def test_temperature_divides_the_logits_which_it_did_not_in_january(tiny_model: Path, tmp_path: Path) -> None:
    step = train(tiny_model, tmp_path, temperature=0.9)[0]
    loss, gradient, _ = january(step, temperature=0.9)
    assert max(distance(step, loss, gradient)) < TOLERANCE
    loss, gradient, _ = january(step)
    assert max(distance(step, loss, gradient)) > 100 * TOLERANCE


def test_a_second_iteration_uses_the_rollouts_again(tiny_model: Path, tmp_path: Path) -> None:
    steps = train(tiny_model, tmp_path, num_iterations=2)
    assert len(steps) == STEPS / 2
    loss, gradient, _ = january(steps[0])
    assert max(distance(steps[0], loss, gradient)) < TOLERANCE  # the first update is the same
