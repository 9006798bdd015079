"""What a completion answers, for every kind of answer."""

import time

import pytest

from workflow.judge import Judged, judge_latex, judge_letter, judge_number, letter
from workflow.prompts import TAUGHT_FORMAT, build, parse
from workflow.verify import Verifier


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (r"\boxed{B}", "B"),
        (r"so it must be $\boxed{\text{B}}$.", "B"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\textbf{(D)}}", "D"),
        (r"\boxed{B) 12 eV}", "B"),
        (r"\boxed{\text{B) 12 eV}}", "B"),
        (r"\boxed{A} no, wait \boxed{B}", "B"),
        (r"\boxed{12} Answer: B", "B"),
        (r"The answer is C. \boxed{B}", "B"),
        ("<answer>\nB\n</answer>", "B"),
        ("The answer is B because it is small", "B"),
        ("The answer is A because it is small", "A"),
        ("The answer is **C**.", "C"),
        ("The correct answer is C, not D", "C"),
        ("The answer is option B.", "B"),
        ("Answer: D", "D"),
        ("ANSWER: D", "D"),
        ("**Answer:** B", "B"),
        ("answer is (A)", "A"),
        ("Answer: A) water", "A"),
        ("Answer: A\n\nThat is it.", "A"),
        (r"final answer: $\text{E}$", "E"),
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("", None),
        (r"\boxed{C_2H_6}", None),
        (r"\boxed{A, C}", None),
        (r"\boxed{A+B}", None),
        (r"\boxed{b}", None),
        ("A proton is heavy.", None),
        ("A good question", None),
        ("Answer: A proton is heavy", None),
        ("Answer: I think so", None),
        ("The answer is Big", None),
        ("The answer is not B", None),
        ("Option B is wrong", None),
        ("B) 12 eV", None),
    ],
)
def test_letter(text, chosen):
    assert letter(text) == chosen


def test_judge_letter():
    cases = [
        ("B", build("A or B", "B"), Judged(True, True, True, "correct", "B")),
        ("B", build("A or B", r"\boxed{B}"), Judged(True, True, True, "correct", "B")),
        ("B", build("A or B", "The answer is B."), Judged(True, False, True, "correct", "B")),
        ("B", "<think>\nThe answer is B\n</think>\nThe answer is C.", Judged(False, False, False, "wrong", "C")),
        ("B", build("B", "no idea"), Judged(False, False, True, "unparsed", "")),
        ("12 eV", build("B", "B"), Judged(False, False, True, "gold_unparsed", "B")),
    ]
    golds, completions, judged = zip(*cases, strict=True)
    assert judge_letter(golds, completions) == list(judged)


def test_judge_number():
    cases = [
        ("1,234", build("add", "1234"), Judged(True, True, True, "correct", "1234")),
        ("7", "It is 7.0", Judged(True, False, False, "correct", "7")),
        ("7", build("7", "six"), Judged(False, False, True, "unparsed", "")),
        ("seven", "7", Judged(False, False, False, "gold_unparsed", "7")),
    ]
    golds, completions, judged = zip(*cases, strict=True)
    assert judge_number(golds, completions) == list(judged)


def test_judge_latex_reads_what_comes_after_the_thought():
    cases = [
        (r"$\frac14$", build(r"\boxed{5}", r"\boxed{\frac14}"), Judged(True, True, True, "correct", "1/4")),
        ("$33$", build("three digits", r"\boxed{033}"), Judged(True, True, True, "correct", "33")),
        ("33", "<think>\n\\boxed{33}\n</think>\nIt is \\boxed{34}", Judged(False, False, False, "wrong", "34")),
        ("$x^2$", build("square", "$x^2$ I think"), Judged(True, True, True, "correct", "x**2")),
        ("$1$", "", Judged(False, False, False, "unparsed", "")),
    ]
    golds, completions, judged = zip(*cases, strict=True)
    with Verifier() as verifier:
        assert judge_latex(golds, completions, verifier) == list(judged)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "\\boxed{a{" * 100_000,
        "\\boxed{" + "a" * 1_000_000 + "}",
        "answer is " * 100_000,
        "answer" + " " * 1_000_000,
        "<answer>" * 120_000,
        "B" + " " * 1_000_000 + "q",
        "(" * 1_000_000,
        "<think>\n" + "\n</think>\n<answer>\n" * 50_000,
        build("\n</think>\n<answer>\n" * 25_000, "x" * 500_000),
    ],
)
def test_a_megabyte_is_read_quickly(text):
    start = time.monotonic()
    assert letter(text) is None
    judge_letter(["A"], [text])
    judge_number(["1"], [text])
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "text",
    [
        build("a", "b"),
        build("a\n</think>\n<answer>\nb", "c\n</answer>\nd"),
        build("", ""),
        "<think>\na\n</think>\n<answer>\n</answer>",
        build("a", "b") + "\n",
        "\n" + build("a", "b"),
        "<think>\nb\n</answer>",
    ],
)
def test_the_quick_look_at_the_end_changes_no_format(text):
    assert (parse(text) is None) == (TAUGHT_FORMAT.fullmatch(text) is None)
