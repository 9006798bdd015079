"""The taught format: a thought, then an answer, each between its tags on lines of their own."""

import re
from dataclasses import dataclass

END_OF_THOUGHT = "</think>"
TAUGHT_FORMAT = re.compile(r"<think>\n(?P<thought>.*?)\n</think>\n<answer>\n(?P<answer>.*?)\n</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion in the taught format, taken apart."""

    thought: str
    answer: str


def build(thought: str, answer: str) -> str:
    """A completion in the taught format."""
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


def parse(text: str) -> Completion | None:
    """Take a completion apart; None unless the whole text is in the taught format, without anything around it.

    Not even a newline may follow: the model has to stop after the answer.
    """
    # The pattern takes the square of the length for a long text that only starts like the format.
    match = TAUGHT_FORMAT.fullmatch(text) if text.endswith("\n</answer>") else None
    return Completion(match["thought"], match["answer"]) if match else None


def answer_part(text: str) -> str:
    """What comes after the last `</think>`, or the whole text where there is none (a model that was not taught)."""
    return text.rsplit(END_OF_THOUGHT, 1)[-1]
