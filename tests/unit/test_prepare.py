import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from workflow.formats import Dropped, Row, ask, read
from workflow.params import Prepare
from workflow.prepare import (
    LIMITS,
    Part,
    check_kept,
    convert,
    draw,
    length_report,
    mix,
    most_characters,
    shares,
    token_counts,
    within,
)
from workflow.prompts import build
from workflow.stage import StageError

SPECIAL = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


def stratos(thought: str = "first\n\nsecond") -> dict[str, Any]:
    answer = (
        f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\n\\boxed{2}\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": answer}]
    return {"system": "Be kind.", "conversations": turns}


def entry(**settings: Any) -> Prepare:
    source = {} if "mixture" in settings else {"source": "raw", "format": "gsm8k"}
    return Prepare.model_validate({"tokenizer": "base", "max_prompt_length": 60, "max_length": 200} | source | settings)


def rows(name: str, number: int, completion: bool = True, solution: bool = False) -> list[dict[str, Any]]:
    """Prepared rows, of which only the ids and what is null matter."""
    filled = {"completion": [{}] if completion else None, "solution": "2" if solution else None}
    return [{"id": f"{name}-{index:06d}", "prompt": [], **filled} for index in range(number)]


@pytest.mark.parametrize("token", sorted(SPECIAL))
@pytest.mark.parametrize(
    ("form", "raw"),
    [
        ("math", {"problem": "a {} b", "answer": "2"}),
        ("gsm8k", {"question": "q", "answer": "so{}\n#### 2"}),
        ("gsm8k", {"question": "{}", "answer": "so\n#### 2"}),
        ("bespoke_stratos", {**stratos(), "system": "x{}"}),
        ("bespoke_stratos", stratos(thought="a {} b")),
        ("prompt_completion", {"prompt": [{"role": "user", "content": "{}"}], "completion": "c"}),
        ("prompt_completion", {"prompt": "p", "completion": "{}"}),
        ("numina_tir", {"problem": "p", "solution": "{}2"}),
    ],
)
def test_special_tokens_are_not_text(form, raw, token):
    with pytest.raises(Dropped, match=r"^special token in the text$"):
        convert(read(json.loads(json.dumps(raw).replace("{}", token)), form), None, None, SPECIAL)
    convert(read(json.loads(json.dumps(raw).replace("{}", "harmless")), form), None, None, SPECIAL)


@pytest.mark.parametrize(
    ("system_prompt", "own", "used"),
    [("Ours.", "Its own.", "Ours."), (None, "Its own.", "Its own."), (None, None, None), ("", "Its own.", None)],
)
def test_system_prompt(system_prompt, own, used):
    row = convert(read({**stratos(), "system": own}, "bespoke_stratos"), system_prompt, None, SPECIAL)
    system = [{"role": "system", "content": used}] if used else []
    assert row["prompt"] == [*system, {"role": "user", "content": "1 + 1?"}]
    assert row["completion"] == [{"role": "assistant", "content": build("first\n\nsecond", "\\boxed{2}")}]
    assert row["solution"] is None


def test_a_system_prompt_replaces_the_one_of_a_chat():
    chat = [("system", "Its own."), ("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    example = read({"messages": messages}, "messages")
    row = convert(example, "Ours.", None, SPECIAL)
    assert row["prompt"] == [{"role": "system", "content": "Ours."}, *messages[1:4]]
    assert row["completion"] == messages[4:]
    assert convert(example, None, None, SPECIAL)["prompt"] == messages[:4]


def test_an_instruction_is_put_behind_every_question():
    answered = {"role": "assistant", "content": "One."}
    row = convert(Row([*ask("1?", "S"), answered, *ask("2?")], "Two."), None, "Be brief.", SPECIAL)
    assert row["prompt"] == [*ask("1?\nBe brief.", "S"), answered, *ask("2?\nBe brief.")]
    with pytest.raises(Dropped, match="special token"):
        convert(Row(ask("1?")), None, "Stop at <|im_end|>", SPECIAL)


def test_a_row_without_completion():
    row = convert(read({"problem": "p", "answer": "2"}, "math"), None, None, SPECIAL)
    assert row == {"prompt": [{"role": "user", "content": "p"}], "completion": None, "solution": "$2$"}


def test_a_draw_keeps_the_order():
    numbers = list(range(100))
    drawn = draw(numbers, 30, 42)
    assert len(drawn) == len(set(drawn)) == 30
    assert drawn == sorted(drawn) != numbers[:30]
    assert drawn == draw(numbers, 30, 42) != draw(numbers, 30, 43)
    assert draw(numbers, None, 42) == draw(numbers, 100, 42) == draw(numbers, 200, 42) == numbers


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, {"a": 1, "b": 1}, {"a": 5, "b": 5}),
        (10, {"a": 0.3, "b": 0.1}, {"a": 8, "b": 2}),  # 7.5 and 2.5: the first of equal remainders
        (10, {"a": 70, "b": 20, "c": 10}, {"a": 7, "b": 2, "c": 1}),
        (100, {"a": 1, "b": 1, "c": 1}, {"a": 34, "b": 33, "c": 33}),
        (7, {"a": 0.6, "b": 0.25, "c": 0.15}, {"a": 4, "b": 2, "c": 1}),  # 4.2, 1.75, 1.05
        (1, {"a": 0.4, "b": 0.6}, {"a": 0, "b": 1}),
    ],
)
def test_shares(total, weights, expected):
    assert shares(total, weights) == expected


def test_shares_always_add_up():
    rng = random.Random(1)
    for _ in range(300):
        weights = {str(index): rng.random() + 1e-3 for index in range(rng.randint(1, 8))}
        total = rng.randint(1, 10_000)
        divided = shares(total, weights)
        assert sum(divided.values()) == total
        assert all(abs(divided[n] - total * w / sum(weights.values())) < 1 for n, w in weights.items())


def test_mixture():
    parts = {"a": rows("a", 50), "b": rows("b", 20)}
    mixture = entry(mixture={"a": 3, "b": 1}, rows=40)
    mixed = mix("ab", mixture, parts, 42)
    ids = [row["id"] for row in mixed]
    assert Counter(row_id[0] for row_id in ids) == {"a": 30, "b": 10}
    assert len(set(ids)) == 40
    assert ids != sorted(ids) and {row_id[0] for row_id in ids[:12]} == {"a", "b"}  # shuffled
    assert set(ids[:30]) - {row["id"] for row in parts["a"][:30]}  # drawn from all of a part
    assert mix("ab", mixture, parts, 42) == mixed != mix("ab", mixture, parts, 43)


def test_a_part_with_too_few_rows_says_how_many_would_do():
    parts = {"a": rows("a", 50), "b": rows("b", 20)}
    weights = {"a": 1, "b": 2}
    with pytest.raises(StageError, match=r"^prepare.ab.rows is 100, but b has only 20 of its 67; write at most 30$"):
        mix("ab", entry(mixture=weights, rows=100), parts, 42)
    assert len(mix("ab", entry(mixture=weights, rows=30), parts, 42)) == 30
    with pytest.raises(StageError, match="write at most 30"):
        mix("ab", entry(mixture=weights, rows=31), parts, 42)
    with pytest.raises(StageError, match="a has only 50 of its 500, b has only 20 of its 1000; write"):
        mix("ab", entry(mixture=weights, rows=1500), parts, 42)


def test_parts_have_the_same_columns():
    parts = {"a": rows("a", 9), "b": rows("b", 9, completion=False, solution=True)}
    says = r"^prepare.ab.mixture has parts with different columns \(a has completion, b has solution\); mix only"
    with pytest.raises(StageError, match=says):
        mix("ab", entry(mixture={"a": 1, "b": 1}, rows=4), parts, 42)
    parts["a"] = rows("a", 9, completion=True, solution=True)
    with pytest.raises(StageError, match=r"\(a has completion and solution, b has solution\)"):
        mix("ab", entry(mixture={"a": 1, "b": 1}, rows=4), parts, 42)


def test_a_part_is_under_both_limits():
    part = entry(max_prompt_length=10, max_length=500, decontaminate=["x"], files="a*", rows=5, max_dropped_share=0.3)
    both = within(part, entry(mixture={"a": 1}, rows=9, decontaminate=["y"]))
    assert (both.max_prompt_length, both.max_length, both.decontaminate) == (10, 200, ["x", "y"])
    assert (both.files, both.rows, both.format) == ("a*", 5, "gsm8k")


@pytest.mark.parametrize("key", ["system_prompt", "instruction"])
@pytest.mark.parametrize(
    ("own", "mixed", "used"), [(None, None, None), ("a", None, "a"), ("a", "b", "b"), (None, "b", "b"), ("a", "", "")]
)
def test_a_mixture_may_replace_what_is_said_around_the_questions(key, own, mixed, used):
    both = within(entry(**{key: own}), entry(mixture={"a": 1}, rows=9, **{key: mixed}))
    assert both.model_dump()[key] == used


def kept(good: int, bad: int, contaminated: int) -> Part:
    taken = [{"id": "a", "task": "exam", "ngram": "n", "question": "q"}] * contaminated
    return Part(good + bad + contaminated, rows("a", good), Counter({"answer is null": bad}), taken)


def test_contaminated_rows_are_counted_but_not_bad():
    assert check_kept("a", entry(max_dropped_share=0.1), {"a": kept(80, 10, 10)}) == (
        "10 answer is null, 10 sharing 8 words with exam"
    )
    with pytest.raises(StageError, match=r"kept 79 of 100 rows \(11 .*, 10 .*\); .*max_dropped_share above 0.110 or"):
        check_kept("a", entry(max_dropped_share=0.1), {"a": kept(79, 11, 10)})


def test_nothing_kept_is_never_a_result():
    says = r"^prepare.a kept 0 of 10 rows of a \(6 sharing 8 words with exam, 4 answer is null\); check the data,"
    with pytest.raises(StageError, match=says):
        check_kept("a", entry(max_dropped_share=1), {"a": kept(0, 4, 6)})
    with pytest.raises(StageError, match=r"^prepare.ab kept 0 of 4 rows of b "):
        check_kept("ab", entry(mixture={"a": 1}, rows=1), {"a": kept(9, 0, 0), "b": kept(0, 4, 0)})


def test_the_share_is_that_of_all_parts():
    mixture = entry(mixture={"a": 1, "b": 1}, rows=9, max_dropped_share=0.1)
    check_kept("ab", mixture, {"a": kept(80, 20, 0), "b": kept(100, 0, 0)})
    with pytest.raises(
        StageError, match=r"prepare.ab kept 179 of 200 rows .* raise prepare.ab.max_dropped_share above"
    ):
        check_kept("ab", mixture, {"a": kept(79, 21, 0), "b": kept(100, 0, 0)})


def test_length_report():
    lengths = [(10, 10 * number) for number in range(1, 101)]  # 10 to 1000 tokens
    report = length_report(lengths, 9, 900)
    assert report["prompt"] == {"mean": 10, "p50": 10, "p90": 10, "p95": 10, "p99": 10, "max": 10}
    assert report["whole"] == {"mean": 505, "p50": 500, "p90": 900, "p95": 950, "p99": 990, "max": 1000}
    assert (report["rows"], report["beyond_max_prompt_length"], report["beyond_max_length"]) == (100, 1, 0.1)
    assert report["longer_than"] == dict.fromkeys(map(str, LIMITS), 0) | {"512": 0.49}
    assert [row["up_to"] for row in report["histogram"]] == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert [row["whole"] for row in report["histogram"]] == [1, 1, 1, 1, 2, 3, 3, 7, 6, 13, 13, 25, 24]
    assert [row["prompt"] for row in report["histogram"]] == [100] + [0] * 12


@pytest.mark.parametrize(
    ("length", "last"), [(1, 16), (16, 16), (17, 24), (24, 24), (32_768, 32_768), (32_769, 49_152)]
)
def test_the_last_bin_holds_the_longest_row(length, last):
    histogram = length_report([(1, length)], 60, 200)["histogram"]
    assert histogram[-1] == {"up_to": last, "prompt": int(last == 16), "whole": 1}
    assert sum(row["prompt"] for row in histogram) == 1


def test_only_what_is_too_long_is_cut_before_it_is_counted(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rng, limit = random.Random(3), 50
    words = [
        "what is ",
        "123",
        " ",
        "\n\n",
        "\\frac{1}{2}",
        "e\u0301",
        "\u1e9b\u0323",
        "ﷺ",
        "数",
        "🏳️‍🌈",
        "\u0344",
        "the",
    ]
    made = [
        {
            "prompt": [{"role": "user", "content": "".join(rng.choices(words, k=rng.randint(0, 30)))}],
            "completion": rng.choice(
                [None, [{"role": "assistant", "content": rng.choice(words) * rng.randint(1, 3000)}]]
            ),
        }
        for _ in range(200)
    ]
    whole = token_counts(made, tokenizer)
    most = most_characters(tokenizer, limit)
    cut = token_counts(made, tokenizer, most)
    assert [count > limit for pair in whole for count in pair] == [count > limit for pair in cut for count in pair]
    assert all(one == other for one, other in zip(whole, cut, strict=True) if one[1] <= limit)
    assert 20 < sum(one[1] > limit for one in whole) < 190
    assert sum(one[1] > other[1] for one, other in zip(whole, cut, strict=True)) > 20
