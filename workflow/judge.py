"""Judging samples: what a completion answers, and whether that is the gold, for every kind of answer a task can have.

A lenient and a strict verdict for each sample: the first reads what comes after the thought as well as it can, the
second asks for the taught format. Whatever a model wrote, its sample gets a verdict.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from workflow import prompts
from workflow.verify import Verifier, gold_text, last_number, number

T = TypeVar("T")

VERSION = 1  # of the rules in here and in workflow/verify.py; raise it with a change that can change a verdict

# An option alone or before its text: B, (B), \text{B}, **B.**, \boxed{B}, "B) 12 eV".
OPTION = re.compile(
    r"(?:\\(?:boxed|text|textbf|textrm|mathrm|mathbf)\s*\{\s*){0,2}\(?([A-J])(?:[\s.)}*$]*|[.):}]+\s.*)", re.DOTALL
)
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}")
TAGGED = re.compile(r"<answer>\s*([^<]{1,500})</answer>")
# A letter in words, behind "answer is" or "Answer:". A and I are words too, where a word follows.
SAID = re.compile(
    r"(?i:answer)(?:\s{1,3}(?i:is)\b)?\s{0,3}:?[\s*$\"]{0,5}(?:(?i:option|choice)\s)?\(?"
    r"(?:\\(?:text|textbf|textrm|mathrm|mathbf)\{)?\(?([A-J])(?![\w'^+=])(?!(?<=[AI])[ \t]+(?!because|since|as\b)\w)"
)


@dataclass(frozen=True, slots=True)
class Judged:
    """One sample: correct is the headline, strict also asks for the taught format."""

    correct: bool
    strict: bool
    taught: bool  # whether it is in the taught format, right or wrong
    reason: str  # of `correct`, see workflow/verify.py
    extracted: str  # the answer that was read, shortened to 200 characters; "" if there is none


def judge_latex(golds: list[str], completions: Iterable[str], verifier: Verifier) -> list[Judged]:
    """Compare LaTeX answers: correct by the text after the thought, strict by `<answer>` in the taught format.

    The tags stay in what is judged: math-verify reads LaTeX only behind an anchor, and `<answer>` is one.

    Args:
        golds, completions: n solutions and completions; of these only what decides is kept in memory.
    """
    taught: list[bool] = []

    def pairs() -> Iterator[tuple[str, str]]:
        for gold, text in zip(map(gold_text, golds), completions, strict=True):
            parts = prompts.parse(text)
            taught.append(parts is not None)
            yield gold, prompts.answer_part(text).strip()
            if parts:
                yield gold, f"<answer>\n{parts.answer}\n</answer>"

    verdicts = iter(verifier.verify(pairs(), mended=True, label="score"))
    judged = []
    for is_taught in taught:
        lenient = next(verdicts)
        strict = is_taught and next(verdicts).correct is True
        judged.append(Judged(lenient.correct is True, strict, is_taught, lenient.reason, lenient.extracted))
    return judged


def judge_number(golds: list[str], completions: Iterable[str]) -> list[Judged]:
    """Compare numbers: correct by the last number after the thought, strict by `<answer>` in the taught format.

    Args:
        golds, completions: n solutions, plain numbers, and completions.
    """
    judged = []
    for solution, completion in zip(golds, completions, strict=True):
        gold, last = number(solution), last_number(prompts.answer_part(completion))
        parts = prompts.parse(completion)
        strict = None if parts is None else number(parts.answer)
        judged.append(_judged(gold, last, strict, parts is not None, _plain(last)))
    return judged


def judge_letter(golds: list[str], completions: Iterable[str]) -> list[Judged]:
    """Compare options of multiple-choice questions: correct by `letter` after the thought, strict by `<answer>`.

    Args:
        golds, completions: n solutions, capital letters from A to J, and completions.
    """
    judged = []
    for solution, completion in zip(golds, completions, strict=True):
        found = letter(prompts.answer_part(completion))
        parts = prompts.parse(completion)
        strict = None if parts is None else option(parts.answer)
        judged.append(_judged(option(solution), found, strict, parts is not None, found or ""))
    return judged


def letter(text: str) -> str | None:
    """The option that a text settles for: its last `\\boxed{B}`, else `<answer>B</answer>`, else "answer is B", else B.

    Each may say it as `option` reads it; a box or a tag with something else in it is passed over.
    """
    for pattern in (BOX, TAGGED):
        found = [chosen for content in pattern.findall(text) if (chosen := option(content))]
        if found:
            return found[-1]
    said = SAID.findall(text)
    return said[-1] if said else option(text, alone=True)


def option(text: str, alone: bool = False) -> str | None:
    """The letter from A to J that the text is: B, (B), \\text{B}, or, unless it must stand alone, "B) 12 eV"."""
    text = text.strip(" \t\n$*")
    match = OPTION.fullmatch(text)
    return None if match is None or (alone and re.search(r"\w", text[match.end(1) :])) else match[1]


def _judged(gold: T | None, found: T | None, strict: T | None, taught: bool, extracted: str) -> Judged:
    reason = "gold_unparsed" if gold is None else "unparsed" if found is None else "wrong"
    if gold is not None and found == gold:
        reason = "correct"
    return Judged(reason == "correct", gold is not None and strict == gold, taught, reason, extracted[:200])


def _plain(value: Decimal | None) -> str:
    """A number for the vote: 42.0 and 42 are one answer."""
    text = "" if value is None else f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
