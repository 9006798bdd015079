from typing import get_args

import pytest

from workflow import rewards
from workflow.params import GRPOPhase, ParamsError
from workflow.prompts import build
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
    accuracy = rewards.accuracy_with(verifier)
    assert accuracy(completions=chat(text), solution=[solution]) == [reward]


def test_accuracy_of_a_group_keeps_the_order(verifier):
    texts = [build("a", rf"\boxed{{{n % 3}}}") for n in range(12)]
    found = rewards.accuracy_with(verifier)(completions=chat(*texts), solution=["1"] * 11 + [""], prompts=[None] * 12)
    assert found == [float(n % 3 == 1) for n in range(11)] + [None]


def test_accuracy_survives_a_bomb():
    with Verifier(limit=1) as verifier:
        found = rewards.accuracy_with(verifier)(
            completions=chat(build("a", r"\boxed{1E99999999}"), build("a", r"\boxed{7}")), solution=["7", "7"]
        )
    assert found == [0.0, 1.0]


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


def test_rewards_by_name_in_order(verifier):
    functions = rewards.reward_functions(["tag_count", "accuracy", "format"], verifier)
    assert [function.__name__ for function in functions] == ["tag_count", "accuracy", "format"]
    completions = chat(build("a", r"\boxed{42}"), "")
    for function in functions:
        assert function(completions=completions, solution=["42", "42"], extra=[1, 2]) == [1.0, 0.0]


def test_every_name_that_params_allow_is_a_reward(verifier):
    names = get_args(get_args(GRPOPhase.model_fields["rewards"].annotation)[0])
    assert len(names) >= 3
    assert [function.__name__ for function in rewards.reward_functions(names, verifier)] == list(names)


def test_unknown_reward(verifier):
    with pytest.raises(ParamsError, match=r"^rewards has 'length', which does not exist; write one of: accuracy, for"):
        rewards.reward_functions(["format", "length"], verifier)
