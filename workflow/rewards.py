"""Rewards: what a completion earns, after Open-R1's final state (July 2025).

A reward takes the completions in chat form and the data columns as keywords, and returns one float per
completion, or None where the row cannot be judged (TRL then leaves that reward out for the row).
"""

from collections.abc import Callable
from typing import Any

from workflow import prompts
from workflow.params import ParamsError
from workflow.verify import Verifier, gold_text

Completion = list[dict[str, str]]
Reward = Callable[..., list[float | None]]

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def accuracy_with(verifier: Verifier) -> Reward:
    """The accuracy reward: 1.0 where math-verify finds the answer equal to the gold `solution`, else 0.0.

    None where the gold cannot be parsed or the comparison fails with an exception. Verification runs in the
    verifier's killable processes.
    """

    def accuracy(completions: list[Completion], solution: list[str], **columns: Any) -> list[float | None]:
        answers = [judged_part(completion[0]["content"]) for completion in completions]
        verdicts = verifier.verify(list(zip(map(gold_text, solution), answers, strict=True)))
        return [None if v.reason in ("gold_unparsed", "error") else float(v.correct is True) for v in verdicts]

    return accuracy


def judged_part(text: str) -> str:
    """The text without its thought where math-verify could read nothing in the thought anyway.

    It reads \\boxed{}, and LaTeX between its marks or behind the word "answer", so a thought without them changes no
    verdict; without it, the many equal answers of a group are verified once.
    """
    answer = prompts.answer_part(text)
    thought = text.removesuffix(answer).lower()
    return text if any(mark in thought for mark in ("\\", "$", "answer")) else answer


def format(completions: list[Completion], **columns: Any) -> list[float | None]:
    """1.0 where the whole text is `<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>`, else 0.0.

    Stricter than Open-R1's, whose pattern lets more lines follow: here the model has to stop after the answer.
    """
    return [float(prompts.parse(completion[0]["content"]) is not None) for completion in completions]


def tag_count(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.25 for each of the four tags that occurs exactly once."""
    return [sum(0.25 for tag in TAGS if completion[0]["content"].count(tag) == 1) for completion in completions]


def reward_functions(names: list[str], verifier: Verifier) -> list[Reward]:
    """The rewards by name, in order; their `__name__` is the name that TRL logs."""
    known: dict[str, Reward] = {"accuracy": accuracy_with(verifier), "format": format, "tag_count": tag_count}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ParamsError(f"rewards has {unknown[0]!r}, which does not exist; write one of: {', '.join(known)}")
    return [known[name] for name in names]
