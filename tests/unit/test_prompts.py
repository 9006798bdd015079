from pathlib import Path

import pytest
import yaml

from workflow import prompts

ROOT = Path(__file__).parents[2]


def test_what_is_built_is_parsed():
    text = prompts.build("1 + 1\n\nis 2", r"\boxed{2}")
    assert text == "<think>\n1 + 1\n\nis 2\n</think>\n<answer>\n\\boxed{2}\n</answer>"
    assert prompts.parse(text) == prompts.Completion("1 + 1\n\nis 2", r"\boxed{2}")
    assert prompts.answer_part(text) == "\n<answer>\n\\boxed{2}\n</answer>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        prompts.build("a", "2") + "\n",
        " " + prompts.build("a", "2"),
        prompts.build("a", "2") + " and more",
        "<think>a</think><answer>2</answer>",
        "<think>\na\n</think>\n\n<answer>\n2\n</answer>",
        "<think>\na\n<answer>\n2\n</answer>",
        prompts.build("a", "2").removesuffix("</answer>"),
    ],
)
def test_anything_else_is_not_the_taught_format(text):
    assert prompts.parse(text) is None


def test_answer_part_of_a_text_without_thought_is_the_text():
    assert prompts.answer_part("<think>\nnever closed \\boxed{2}") == "<think>\nnever closed \\boxed{2}"
    assert prompts.answer_part("a</think>b</think>c") == "c"


def test_system_prompt_is_open_r1s():
    recipe = yaml.safe_load((ROOT / "recipes/recipe/gsm8k_local.yaml").read_text())
    assert recipe["system_prompt"] == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>"
    )
