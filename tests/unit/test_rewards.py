import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workflow import rewards
from workflow.params import REWARDS, GRPOPhase, ParamsError
from workflow.prompts import build
from workflow.stage import StageError
from workflow.verify import Verifier, gold_text


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


def chat(*texts: str) -> list[rewards.Completion]:
    """Completions as TRL hands them over."""
    return [[{"role": "assistant", "content": text}] for text in texts]


LATEX_THOUGHT = "First $x = 40$.\n\nThen \\boxed{41}, no:\nadd one more."


@pytest.mark.parametrize(
    ("solution", "text", "reward"),
    [
        ("42", build("6 * 7", r"\boxed{42}"), 1.0),
        ("42", build("6 * 7 = 41\n\nno, 42\n", r"\boxed{42}"), 1.0),
        ("42", build("6 * 7", r"\boxed{41}"), 0.0),
        ("42", build("it is 42", "no idea"), 0.0),
        ("42", build("6 * 7", "$42$"), 1.0),
        ("42", r"no tags, but \boxed{42}", 1.0),
        ("42", r"<think>" + "\nnever closed, but \\boxed{42}", 1.0),
        ("42", "42", 0.0),
        ("42", "", 0.0),
        ("42", "</think>", 0.0),
        ("42", "</think>" * 3, 0.0),
        ("42", "\\boxed{", 0.0),
        ("42", "\x00 \u202e \U0001f600", 0.0),
        ("43 + 8 = 51\nThe answer is $\\boxed{51}$.", build("43 + 8 = 51", r"\boxed{51}"), 1.0),
        (r"$\frac{1}{2}$", build("half", r"\boxed{0.5}"), 1.0),
        (r"\frac{1}{2}", build("half", r"\boxed{\frac{2}{4}}"), 1.0),
        ("(3, 4)", build("a pair", r"\boxed{(3, 4)}"), 1.0),
        ("(3, 4)", build("a pair", r"\boxed{4}"), 0.0),
        # the gold cannot be read: no verdict, so TRL leaves the reward out
        ("", build("6 * 7", r"\boxed{42}"), None),
        ("$$", build("6 * 7", r"\boxed{42}"), None),
        (r"\boxed{}", "", None),
    ],
)
def test_accuracy(verifier, solution, text, reward):
    assert rewards.accuracy(completions=chat(text), solution=[solution], verifier=verifier) == [reward]


def test_accuracy_of_a_group_keeps_the_order(verifier):
    texts = [build("a", rf"\boxed{{{n % 3}}}") for n in range(12)]
    found = rewards.accuracy(chat(*texts), ["1"] * 11 + [""], verifier, prompts=[None] * 12)
    assert found == [float(n % 3 == 1) for n in range(11)] + [None]


def test_accuracy_survives_a_bomb():
    with Verifier(limit=1) as verifier:
        texts = [build("a", r"\boxed{1E99999999}"), build("a", r"\boxed{7}")]
        assert rewards.accuracy(chat(*texts), ["7", "7"], verifier) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "format", "tag_count"),
    [
        (build("6 * 7", r"\boxed{42}"), 1.0, 1.0),
        (build("line\n\nand another\n", "42"), 1.0, 1.0),
        (build("", ""), 1.0, 1.0),
        (build("a", "b") + "\n", 0.0, 1.0),
        (" " + build("a", "b"), 0.0, 1.0),
        (build("a", "b") + build("a", "b"), 1.0, 0.0),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>", 0.0, 1.0),
        ("<think>a</think><answer>b</answer>", 0.0, 0.0),
        ("<think>\na\n</think>\nb", 0.0, 0.5),
        ("<think>\na", 0.0, 0.25),
        ("<think>\n<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0, 0.75),
        ("a\n</think>\n<answer>\nb\n</answer>", 0.0, 0.75),
        ("", 0.0, 0.0),
        ("42", 0.0, 0.0),
    ],
)
def test_format_and_tag_count(text, format, tag_count):
    assert rewards.format(completions=chat(text), solution=["42"]) == [format]
    assert rewards.tag_count(completions=chat(text), solution=["42"]) == [tag_count]


THOUGHTS = [
    "6 * 7 = 42",
    "first\n\nsecond\nthird",
    "",
    LATEX_THOUGHT,
    "so [42] it is",
    "the final answer is [42] for sure",
    "The answer is [41] .",
    "so the final answer is",
    "the answer is: 42. I hope it is correct",
    "Answer: [ 42 ] and",
    "100 % or 42 percent",
    "<answer>\n42",
    "costs 42 dollars",
]
ANSWERS = [
    r"\boxed{42}",
    "$42$",
    "42",
    "",
    r"\boxed{41}",
    "[42] it is",
    r"\[42\]",
    "The final answer is $42$.",
    r"\frac{84}{2}",
]
SHAPES = [
    build,
    lambda thought, answer: f"{thought}</think>{answer}",
    lambda thought, answer: f"{thought}\n</think>\n{answer}",
    lambda thought, answer: f"<think>{thought} </think>\n\n{answer}\n",
    lambda thought, answer: f"{thought} {answer}",
    lambda thought, answer: f"<think>\n{thought}\n</think>\n</think>{answer}",
]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_judged_part_changes_no_verdict(verifier, shape):
    texts = [SHAPES[shape](thought, answer) for thought in THOUGHTS for answer in ANSWERS]
    whole = verifier.verify([(gold_text("42"), text) for text in texts])
    judged = verifier.verify([(gold_text("42"), rewards.judged_part(text)) for text in texts])
    different = [text for text, one, other in zip(texts, whole, judged, strict=True) if one != other]
    assert different == []
    assert {verdict.reason for verdict in whole} >= {"correct", "wrong", "unparsed"}


def test_judged_part_makes_answers_of_a_group_equal():
    """That is what it is for: sums in the thought, one verification per different answer."""
    texts = [build(f"{n} + {42 - n} = 42\nso it is", r"\boxed{42}") for n in range(8)]
    assert {rewards.judged_part(text) for text in texts} == {"\n<answer>\n\\boxed{42}\n</answer>"}
    assert rewards.judged_part(build(LATEX_THOUGHT, "1")) == build(LATEX_THOUGHT, "1")
    assert rewards.judged_part("") == ""


# The formulas


@pytest.mark.parametrize(
    ("solution", "answer", "final", "published"),
    [
        ("$42$", r"\boxed{42}", 1.0, 1.0),
        ("$42$", r"\boxed{41}", 0.0, 0.0),
        (r"so $6 \cdot 7 = \boxed{42}$.", r"\boxed{42}", 1.0, 1.0),
        ("42", r"\boxed{42}", 1.0, 1.0),  # published: the gold is no LaTeX,
        ("42", r"\boxed{41}", 0.0, 1.0),  # so whatever is answered is rewarded
        ("$$", "none", None, 1.0),
        ("", r"\boxed{42}", None, 1.0),
        ("$x>1$", r"\boxed{(1,\infty)}", 1.0, 0.0),  # gold and answer swapped
        (r"$(1,\infty)$", r"\boxed{x>1}", 0.0, 1.0),
    ],
)
def test_accuracy_final_and_as_published(verifier, solution, answer, final, published):
    completions = chat(build("a thought", answer))
    assert rewards.accuracy(completions, [solution], verifier) == [final]
    assert rewards.accuracy_as_published(completions, [solution], verifier) == [published]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a thought</think><answer>42</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a thought</think><answer>42</answer>\n", 1.0),  # $ matches before a last newline
        ("<think>a</think><answer>1</answer> <think>b</think><answer>2</answer>", 1.0),
        ("<think>two\nlines</think><answer>42</answer>", 0.0),
        ("<think>a thought</think>\n<answer>42</answer>", 0.0),
        ("<think>a thought</think><answer>42</answer> bye", 0.0),
        (" <think>a thought</think><answer>42</answer>", 0.0),
        (build("a thought", "42"), 0.0),
    ],
)
def test_format_as_published(text, reward):
    assert rewards.format_as_published(chat(text)) == [reward]


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("Step 1: add. Step 2: stop.", 2),
        ("1. add", 1),
        ("<think>\n1. add\n22. stop\n</think>", 2),
        ("it is 1. no", 0),
        ("so\n- add\n* stop", 2),
        ("- add", 0),
        ("First, add. Second, look. Next, stop. Finally, rest.", 4),
        ("first, step 1:", 0),
        ("", 0),
    ],
)
def test_reasoning_steps(text, signs):
    assert rewards.reasoning_steps(chat(text)) == [min(1.0, signs / 3)]


def sized(size: int, answer: str) -> str:
    """A completion of exactly so many characters."""
    text = build("", rf"\boxed{{{answer}}}")
    return text.replace("<think>\n", "<think>\n" + "a" * (size - len(text)), 1)


def test_length_is_relative_to_the_completions_of_the_same_prompt(verifier):
    texts = [sized(100, "1"), sized(200, "1"), sized(150, "1"), sized(100, "2"), sized(200, "2"), sized(175, "2")]
    other = [sized(300, "1"), sized(300, "1"), sized(400, "1"), sized(1000, "1")]
    prompts = [[{"role": "user", "content": name}] for name in ["q"] * 6 + ["r"] * 2 + ["q"] * 2]
    solution = ["1"] * 6 + ["1"] * 2 + ["", ""]
    found = rewards.length(chat(*texts, *other), solution, verifier, prompts=prompts)
    # right: λ; wrong: at most 0; all of one length: 0; gold unreadable: as if right
    assert found == [0.5, -0.5, 0.0, 0.0, -0.5, -0.25, 0.0, 0.0, 0.5, -0.5]


@pytest.mark.parametrize(
    ("size", "cosine"), [(250, math.sqrt(0.5)), (500, 0.0), (1000, -1.0), (1500, 0.0), (2000, 1.0)]
)
def test_cosine(verifier, size, cosine):
    found = rewards.cosine(chat(sized(size, "1"), sized(size, "2"), sized(size, "1")), ["1", "1", ""], verifier)
    right, wrong = 0.5 + 0.25 * (1 + cosine), -0.5 + 0.25 * (1 + cosine)
    assert found == pytest.approx([right, wrong, 1.0])


def test_cosine_with_the_ends_of_the_paper(verifier):
    """A wrong answer is the less bad the longer it is."""
    texts = [sized(100, "2"), sized(400, "2"), sized(100, "1"), sized(400, "1")]
    options = {"max_length": 400, "min_value_wrong": -10, "max_value_wrong": 0, "min_value_correct": 1}
    found = rewards.cosine(chat(*texts), ["1"] * 4, verifier, **options, max_value_correct=2)
    quarter = 0.5 + math.sqrt(0.5) / 2
    assert found == pytest.approx([-10 * quarter, 0, 1 + quarter, 1])


@pytest.mark.parametrize(
    ("text", "options", "reward"),
    [
        ("a b c d e", {}, 0.0),
        ("a b c a b c", {}, -1 / 4),  # abc bca cab abc
        ("x x x x", {}, -1 / 2),
        ("X x\n x\tX", {}, -1 / 2),
        ("x x x x", {"ngram_size": 1, "max_penalty": -0.4}, -0.3),
        ("a b", {}, 0.0),
        ("", {}, 0.0),
    ],
)
def test_repetition_penalty(text, options, reward):
    assert rewards.repetition_penalty(chat(text), **options) == pytest.approx([reward])


@pytest.mark.parametrize("options", [{}, {"max_completion_length": 100, "soft_punish_cache": 20}])
def test_soft_overlong_punishment_is_equation_13(options):
    """TRL's function, against the formula of the DAPO paper."""
    longest = options.get("max_completion_length", 16384)
    cache = options.get("soft_punish_cache", 4096)
    edge = longest - cache
    sizes = [0, edge - 1, edge, edge + 1, edge + cache // 2, longest - 1, longest, longest + 1]
    expected = [0 if n <= edge else (edge - n) / cache if n <= longest else -1 for n in sizes]
    assert rewards.soft_overlong_punishment([[1] * n for n in sizes], **options) == pytest.approx(expected)
    assert expected[1:4] == [0, 0, -1 / cache]


R1_ZERO = ["correctness", "int", "strict_format", "soft_format"]


@pytest.mark.parametrize(
    ("text", "gold", "corrected", "published", "xmlcount"),
    [
        # the taught format, with and without a newline at the end, where the published xmlcount takes all for a tail
        ("<think>\na\n</think>\n<answer>\n72\n</answer>\n", "72", [2.0, 0.5, 0.5, 0.5], [2.0, 0.5, 0.5, 0.0], 0.5),
        ("<think>\na\n</think>\n<answer>\n72\n</answer>", "72", [2.0, 0.5, 0.5, 0.5], [2.0, 0.5, 0.0, 0.0], 0.461),
        # a thought of two lines
        ("<think>\na\nb\n</think>\n<answer>\n72\n</answer>\n", "72", [2.0, 0.5, 0.5, 0.5], [2.0, 0.5, 0.0, 0.0], 0.5),
        # everything in one line
        ("<think>a</think> <answer>72</answer>", "72", [2.0, 0.5, 0.0, 0.5], [2.0, 0.5, 0.0, 0.5], 0.0),
        # text after the answer: 4 characters after the newline, and 5 - 1 before it
        (
            "<think>\na\n</think>\n<answer>\n72\n</answer>\nbye!",
            "72",
            [2.0, 0.5, 0.0, 0.5],
            [2.0, 0.5, 0.0, 0.0],
            0.492,
        ),
        # numbers that are more than digits
        ("<answer>1,000</answer>", "1000", [2.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        ("<answer>1000</answer>", "1,000", [2.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], 0.0),
        ("<answer>-3</answer>", "-3", [2.0, 0.5, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], 0.0),
        ("<answer>2.50</answer>", "2.5", [2.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        (r"<answer>\boxed{72}</answer>", "72", [2.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        ("<answer>73</answer>", "72", [0.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], 0.0),
        ("<answer>72 clips</answer>", "72", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        ("<answer>blue</answer>", "blue", [2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], 0.0),
        # the last answer counts, up to the next end; all of the text where there are no tags
        ("<answer>1</answer><answer> 72 </answer>8</answer>", "72", [2.0, 0.5, 0.0, 0.0], [2.0, 0.5, 0.0, 0.0], 0.0),
        ("72", "72", [2.0, 0.5, 0.0, 0.0], [2.0, 0.5, 0.0, 0.0], 0.0),
        ("it is 72", "72", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        ("", "72", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
        # tags that occur twice earn nothing
        ("<think>\n<think>\na\n</think>\n", "72", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.125),
    ],
)
def test_r1_zero(text, gold, corrected, published, xmlcount):
    def earned(name: str) -> float | None:
        return rewards.FUNCTIONS[name](completions=chat(text), solution=[gold])[0]

    assert [earned(name) for name in R1_ZERO] == corrected
    assert [earned(f"{name}_as_published") for name in R1_ZERO] == published
    assert earned("xmlcount_as_published") == pytest.approx(xmlcount)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (build("a", "72"), 0.5),
        (build("a", "72") + "\n", 0.5),
        (build("a", "72") + "\nbye!", 0.496),
        (build("a", "72") + "bye!", 0.496),
        (build("a", "72") * 2, -0.001 * len(build("a", "72"))),
        ("<think>\na\n</think>\n" + "long " * 100, 0.25),
        ("", 0.0),
    ],
)
def test_xmlcount_counts_only_what_is_behind_the_last_tag(text, reward):
    assert rewards.xmlcount(completions=chat(text)) == [pytest.approx(reward)]


# Logs


class Logs:
    """What TRL's log_metric and log_extra would collect."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.columns: dict[str, list] = {}

    def arguments(self) -> dict[str, Callable]:
        return {"log_metric": self.metrics.__setitem__, "log_extra": self.columns.__setitem__}


@pytest.mark.parametrize("name", ["accuracy", "accuracy_as_published", "length", "cosine"])
def test_verdicts_are_counted_in_the_log(name):
    texts = [build("a", answer) for answer in (r"\boxed{7}", r"\boxed{8}", "no idea", r"\boxed{1E99999999}", "1")]
    logs = Logs()
    with Verifier(limit=1) as verifier:
        solution = ["$7$", "$7$", "$7$", "$7$", ""]
        rewards.FUNCTIONS[name](
            completions=chat(*texts), solution=solution, verifier=verifier, prompts=[0] * 5, **logs.arguments()
        )
    assert logs.metrics == {
        "verify/unparsed": 0.2,
        "verify/gold_unparsed": 0.2,
        "verify/timeout": 0.2,
        "verify/error": 0.0,
        "verify/unjudged": 0.0,
    }
    if name.startswith("accuracy"):
        assert logs.columns == {f"{name}/answer": ["7", "8", "", "", ""]}


def test_answers_without_a_number_are_counted_in_the_log():
    logs = Logs()
    completions = chat("<answer>7</answer>", "<answer>seven</answer>", "", "<answer>8</answer>")
    rewards.correctness(completions, ["7", "7", "7", "eight"], **logs.arguments())
    assert logs.metrics == {"verify/unparsed": 0.5, "verify/gold_unparsed": 0.25}
    assert logs.columns == {"correctness/answer": ["7", "seven", "", "8"]}


@pytest.mark.parametrize("name", ["accuracy", "accuracy_as_published", "length", "cosine"])
def test_no_batch_takes_longer_than_the_limit(name, verifier, monkeypatch):
    """A batch of bombs earns nothing, neither good nor bad, and the next batch is judged as ever."""
    rewards.accuracy(chat(build("a", r"\boxed{1}")), ["1"], verifier)  # the workers are there
    monkeypatch.setattr(rewards, "VERIFY_SECONDS", 0.5)
    bombs = [build("a" * n, rf"\boxed{{1E{98_000_000 + n}}}") for n in range(8 * 32)]
    logs = Logs()
    arguments = {"verifier": verifier, "prompts": [0] * 256, **logs.arguments()}
    start = time.monotonic()
    assert rewards.FUNCTIONS[name](completions=chat(*bombs), solution=["$7$"] * 256, **arguments) == [None] * 256
    assert time.monotonic() - start < 3
    assert logs.metrics["verify/unjudged"] == 1.0
    monkeypatch.undo()
    answers = [build("a" * n, rf"\boxed{{{n}}}") for n in range(8 * 32)]
    found = rewards.FUNCTIONS[name](completions=chat(*answers), solution=["$7$"] * 256, **arguments)
    assert None not in found
    assert logs.metrics["verify/unjudged"] == 0.0


# From params.yaml to functions


def phase(
    rewards: dict[str, float] | list[str], options: dict[str, dict] | None = None, read: str = "x.py"
) -> GRPOPhase:
    return GRPOPhase(
        start_from="base",
        dataset="problems",
        global_batch_size=16,
        trainer={},
        rewards=dict.fromkeys(rewards, 1.0),
        reward_options=options or {},
        rewards_read=read,
    )


def test_every_name_that_params_allow_is_a_reward():
    assert list(rewards.FUNCTIONS) == list(REWARDS)


def test_rewards_by_name_in_order(verifier, tmp_path):
    names = [name for name in REWARDS if name != "format"] + ["format"]
    functions = rewards.reward_functions(phase(names), verifier, tmp_path)
    assert [function.__name__ for function in functions] == names
    completions = chat(build("a", r"\boxed{42}"), "")
    for function in functions:
        found = function(
            completions=completions,
            solution=["42", "42"],
            prompts=["q", "q"],
            completion_ids=[[1], []],
            extra=[1, 2],
            log_metric=rewards.unlogged,
            log_extra=rewards.unlogged,
        )
        assert [type(value) for value in found] == [float, float], function.__name__


def test_options_reach_the_reward(verifier, tmp_path):
    options = {"cosine": {"max_length": 400, "max_value_correct": 2.0}, "repetition_penalty": {"max_penalty": -3}}
    cosine, repetition = rewards.reward_functions(phase(["cosine", "repetition_penalty"], options), verifier, tmp_path)
    assert cosine(completions=chat(sized(200, "1")), solution=["1"]) == pytest.approx([1.25])
    assert repetition(completions=chat("x x x x")) == [-1.5]


OWN = """
import module_that_is_not_installed_here_and_must_not_be_imported
from somewhere import shared as borrowed

BONUS = 1

def close_enough(completions, solution, *, bonus=0.0, **columns):
    return [bonus] * len(completions)

async def later(completions, **columns):
    return [0.0] * len(completions)

class Judge:
    def __call__(self, completions, **columns):
        return [0.0]

judge = Judge()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of own rewards where it can be imported; returns its name."""

    def write(source: str) -> str:
        package = f"own_{uuid.uuid4().hex}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "rewards.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{package}.rewards"

    return write


def test_own_reward(own, verifier, tmp_path):
    module = own(
        OWN.replace("import module_that", "# import module_that").replace("from somewhere", "# from somewhere")
    )
    name = f"{module}.close_enough"
    (function,) = rewards.reward_functions(phase([name], {name: {"bonus": 0.25}}), verifier, tmp_path)
    assert function.__name__ == name
    assert function(completions=chat("a", "b"), solution=["1", "2"], prompts=["p", "p"]) == [0.25, 0.25]
    (function,) = rewards.reward_functions(phase([f"{module}.judge"]), verifier, tmp_path)
    assert function(completions=chat("a")) == [0.0]


def test_own_rewards_are_found_without_importing_them(own):
    module = own(OWN)
    for name in ("close_enough", "judge", "borrowed"):
        rewards.check_rewards(phase([f"{module}.{name}"]))


def test_star_imports_are_believed(own):
    rewards.check_rewards(phase([f"{own('from somewhere import *')}.anything"]))


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("close_enuf", {}, r"has no close_enuf; did you mean own_\w+\.rewards\.close_enough\?$"),
        ("something", {}, "has no something; define it there$"),
        ("later", {}, "which is a coroutine; write it with def, not async def$"),
        (
            "close_enough",
            {"bonsu": 1},
            "has 'bonsu', which is no parameter of it; write one of: completions, solution, b",
        ),
    ],
)
def test_own_reward_that_does_not_fit(own, attribute, options, message):
    name = f"{own(OWN)}.{attribute}"
    with pytest.raises(ParamsError, match=message):
        rewards.check_rewards(phase([name], {name: options} if options else {}))


def test_own_module_that_cannot_be_read(own, verifier, tmp_path):
    with pytest.raises(
        ParamsError, match=r"'nowhere\.rewards\.mine', which cannot be found \(No module named 'nowhere'\); "
    ):
        rewards.check_rewards(phase(["nowhere.rewards.mine"]))
    module = own("def mine(:\n")
    package = module.removesuffix(".rewards")
    with pytest.raises(ParamsError, match=r"cannot be found \(no Python file is \w+\.absent\); write module.function"):
        rewards.check_rewards(phase([f"{package}.absent.mine"]))
    with pytest.raises(ParamsError, match=r"line 1 of .*rewards\.py is not Python$"):
        rewards.check_rewards(phase([f"{module}.mine"]))
    module = own("def mine(completions): return []\nraise OSError('no server')")
    rewards.check_rewards(phase([f"{module}.mine"]))
    with pytest.raises(
        ParamsError, match=r"which cannot be imported: OSError \(no server\) in line 2 of .*rewards\.py$"
    ):
        rewards.reward_functions(phase([f"{module}.mine"]), verifier, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cosine",
            {"max_len": 10},
            "reward_options.cosine has 'max_len', which is no option of cosine; write one of: max_length, "
            "min_value_wrong, max_value_wrong, min_value_correct, max_value_correct",
        ),
        (
            "repetition_penalty",
            {"language": "zh"},
            "reward_options.repetition_penalty has 'language', which is no option of repetition_penalty; write one of: "
            "ngram_size, max_penalty",
        ),
        (
            "format",
            {"strict": True},
            "reward_options.format has 'strict', which is no option of format; it has none, so remove it",
        ),
        (
            "accuracy",
            {"verifier": 1},
            "reward_options.accuracy has 'verifier', which is no option of accuracy; it has none, so remove it",
        ),
        (
            "cosine",
            {"max_length": "long"},
            "reward_options.cosine.max_length is 'long'; write what fits: input should be a valid integer",
        ),
        (
            "cosine",
            {"max_length": 0},
            "reward_options.cosine.max_length is 0; write what fits: input should be greater than 0",
        ),
        (
            "repetition_penalty",
            {"max_penalty": 1.0},
            "reward_options.repetition_penalty.max_penalty is 1.0; write what fits: input should be less than or equal "
            "to 0",
        ),
        (
            "judge",
            {"scale": 2},
            "reward_options.judge belongs to a reward model, which has no options; remove it",
        ),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(ParamsError) as error:
        rewards.check_rewards(phase([name], {name: options}))
    assert str(error.value) == message


def test_rewards_and_their_check_import_no_torch():
    code = (
        "import sys, workflow.rewards\n"
        "print([name for name in ('torch', 'trl', 'transformers', 'math_verify', 'sympy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


INSTEAD = "return a finite number, or None where there is nothing to say"


def divided(completions, **columns):
    return [1 / 0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "reward mine returned a list of 1 for 2 completions; return a list with one number or None for each"),
        (
            [1.0] * 3,
            "reward mine returned a list of 3 for 2 completions; return a list with one number or None for each",
        ),
        (None, "reward mine returned a NoneType for 2 completions; return a list with one number or None for each"),
        (0.5, "reward mine returned a float for 2 completions; return a list with one number or None for each"),
        (
            [0.5, math.nan],
            "reward mine returned nan for completion 1 of 2; " + INSTEAD,
        ),
        (
            [math.inf, 1],
            "reward mine returned inf for completion 0 of 2; " + INSTEAD,
        ),
        (
            [1, "1"],
            "reward mine returned '1' for completion 1 of 2; " + INSTEAD,
        ),
    ],
)
def test_result_that_does_not_fit(result, message):
    with pytest.raises(StageError) as error:
        rewards.checked("mine", lambda completions: result)(completions=chat("a", "b"))
    assert str(error.value) == message


def test_reward_that_raises():
    line = divided.__code__.co_firstlineno + 1
    message = (
        rf"^reward mine failed: ZeroDivisionError \(division by zero\) in line {line} of .*test_rewards\.py; mend it$"
    )
    with pytest.raises(StageError, match=message):
        rewards.checked("mine", divided)(completions=chat("a"), prompts=["p"])


def test_results_become_floats():
    numpy = pytest.importorskip("numpy")
    values = [1, True, None, numpy.float32(0.5), numpy.int64(2)]
    found = rewards.checked("mine", lambda completions: values)(completions=chat(*"abcde"))
    assert found == [1.0, 1.0, None, 0.5, 2.0]
    assert {type(value) for value in found} == {float, type(None)}


# Reward models, and TRL's trainer with all of it


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory):
    """Makes data/models/judge with so many labels; returns the folder of models."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def make(labels: int) -> Path:
        models = tmp_path_factory.mktemp("models")
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=labels)
        model.save_pretrained(models / "judge")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(models / "judge")
        return models

    return make


def test_reward_model(reward_model, verifier, tmp_path):
    models = reward_model(1)
    assert rewards.reward_functions(phase(["judge"]), verifier, models) == [str(models / "judge")]
    (models / "judge" / "chat_template.jinja").unlink()
    with pytest.raises(
        StageError, match=r"^the tokenizer of reward model .*judge has no chat template; write chat_temp"
    ):
        rewards.reward_functions(phase(["judge"]), verifier, models)
    (models / "judge" / "tokenizer_config.json").unlink()
    with pytest.raises(StageError, match=r"^reward model .*judge has no tokenizer; "):
        rewards.reward_functions(phase(["judge"]), verifier, models)
    with pytest.raises(
        StageError, match=r"^reward model .*judge has 2 labels; name a sequence classification model with"
    ):
        rewards.reward_functions(phase(["judge"]), verifier, reward_model(2))
    with pytest.raises(StageError, match=r"^reward model .*judge has no config\.json; name a model under sources$"):
        rewards.reward_functions(phase(["judge"]), verifier, tmp_path)


def test_language_model_is_no_reward_model(tiny_model, verifier):
    with pytest.raises(StageError, match=r"has 2 labels"):
        rewards.reward_functions(phase([tiny_model.name]), verifier, tiny_model.parent)


def test_in_trl(tiny_model, reward_model, own, verifier, tmp_path):
    """GRPOTrainer logs every reward under its name, the shares of verdicts, and the answers beside the completions."""
    import pandas as pd
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    own_name = f"{own('def half(completions, **columns): return [0.5, None] * (len(completions) // 2)')}.half"
    names = ["accuracy", "length", "soft_overlong_punishment", own_name, "judge"]
    options = {"soft_overlong_punishment": {"max_completion_length": 4, "soft_punish_cache": 2}}
    prompt = [{"role": "user", "content": "6 * 7?"}]
    trainer = GRPOTrainer(
        model=str(tiny_model),
        reward_funcs=rewards.reward_functions(phase(names, options), verifier, reward_model(1)),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            log_completions=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "solution": gold} for gold in ("$42$", "")] * 2),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {name for name in logged if name.startswith("rewards/")} == {
        f"rewards/{name}/{number}" for name in names for number in ("mean", "std")
    }
    assert logged["rewards/accuracy/mean"] == 0.0
    assert logged[f"rewards/{own_name}/mean"] == 0.5
    assert logged["rewards/soft_overlong_punishment/mean"] < 0
    assert logged["verify/gold_unparsed"] == 0.5
    assert logged["verify/unparsed"] == 0.5
    assert logged["verify/timeout"] == logged["verify/error"] == logged["verify/unjudged"] == 0
    completions = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    assert list(completions["accuracy/answer"]) == [""] * 8
    assert completions["accuracy"].isna().sum() == 4
    assert completions["judge"].notna().all()


# Before training


def test_dry_run_of_sound_data(verifier):
    names = [name for name in REWARDS if not name.endswith("format_as_published")]
    found = rewards.dry_run(phase(names), ["72", "1000", "-3"], verifier)
    assert [one.reward for one in found] == names
    for one in found:
        if one.maximum is not None and one.reward not in ("accuracy_as_published", "int_as_published"):
            assert one.mean == one.maximum, one
    by_name = {one.reward: one for one in found}
    assert by_name["accuracy_as_published"] == rewards.DryRun("accuracy_as_published", 1.0, 1.0, 3)
    assert by_name["int_as_published"] == rewards.DryRun("int_as_published", pytest.approx(1 / 3), 0.5, 0)
    assert by_name["soft_overlong_punishment"] == rewards.DryRun("soft_overlong_punishment", None, None, 0)
    assert by_name["length"] == rewards.DryRun("length", 0.0, None, 0)
    assert by_name["xmlcount_as_published"].maximum is None


@pytest.mark.parametrize(
    "gold",
    [
        r"43 + 8 = 51\nThe answer is $\boxed{51}$.",
        r"$\frac{1}{2}$",
        r"\frac{1}{2}",
        "(3, 4)",
        r"First \boxed{1} and \boxed{2}.",
        "72",
        r"\$36",
    ],
)
def test_dry_run_reads_golds_in_every_form(verifier, gold):
    assert rewards.dry_run(phase(["accuracy"]), [gold], verifier) == [rewards.DryRun("accuracy", 1.0, 1.0, 0)]


def test_dry_run_finds_what_is_wrong(verifier):
    names = ["accuracy", "format", "format_as_published", "strict_format_as_published", "soft_format_as_published"]
    found = rewards.dry_run(phase([*names, "correctness"]), ["42", "", "blue"], verifier)
    assert found == [
        rewards.DryRun("accuracy", 1.0, 1.0, 1),
        rewards.DryRun("format", 1.0, 1.0, 0),
        rewards.DryRun("format_as_published", 0.0, 1.0, 0),
        rewards.DryRun("strict_format_as_published", 0.0, 0.5, 0),
        rewards.DryRun("soft_format_as_published", 0.0, 0.5, 0),
        rewards.DryRun("correctness", 2.0, 2.0, 2),
    ]
    assert rewards.dry_run(phase(["accuracy"]), [""], verifier) == [rewards.DryRun("accuracy", None, 1.0, 1)]


def test_dry_run_leaves_out_what_wants_more_than_text(verifier):
    found = rewards.dry_run(phase(["mine.rewards.own", "judge"]), ["42"], verifier)
    assert found == [rewards.DryRun("mine.rewards.own", None, None, 0), rewards.DryRun("judge", None, None, 0)]


def test_dry_run_of_gsm8k(verifier):
    """The first golds of the real data, as prepare reads them."""
    if not os.environ.get("DATA_DIR"):
        pytest.skip("needs DATA_DIR, a folder with gsm8k/train.jsonl")
    lines = (Path(os.environ["DATA_DIR"]) / "gsm8k" / "train.jsonl").read_text().splitlines()[:1000]
    golds = [json.loads(line)["answer"].rpartition("####")[2].strip().replace(",", "") for line in lines]
    names = ["accuracy", "correctness", "correctness_as_published", "int", "strict_format", "soft_format"]
    for one in rewards.dry_run(phase(names), golds, verifier):
        assert (one.mean, one.unreadable) == (one.maximum, 0), one


# Time


def test_a_call_off_the_main_thread_is_bounded_and_judged(verifier):
    """Where no signal reaches it: math-verify's own time limits, which are alarms, would not work there."""
    bomb = [[{"role": "assistant", "content": r"\boxed{1E99999999}"}]] * 2
    found: list[Any] = []
    reward = rewards.checked("accuracy", partial(rewards.accuracy, verifier=verifier), 60.0)
    thread = threading.Thread(target=lambda: found.append(reward(bomb, solution=["$7$", "$8$"])))
    before = signal.getsignal(signal.SIGALRM)
    thread.start()
    thread.join(60)
    assert found == [[0.0, 0.0]]
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_reward_that_catches_everything_is_ended_all_the_same():
    def stubborn(completions, **_):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        StageError, match=r"reward own took more than 0\.2 s, at line \d+ of .*test_rewards\.py; make it"
    ):
        rewards.checked("own", stubborn, 0.2)([])
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_reward_that_takes_all_memory_is_one_sentence():
    with pytest.raises(
        StageError, match=r"reward own failed: MemoryError \(\) in line \d+ of .*test_rewards\.py; mend it"
    ):
        rewards.checked("own", lambda completions, **_: bytearray(2**62))([])
