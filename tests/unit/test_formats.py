import csv
import json
from collections import Counter
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workflow.formats import FORMATS, Dropped, Row, ask, questions, read, read_rows, text
from workflow.params import Prepare
from workflow.prompts import build, parse
from workflow.stage import StageError

THOUGHT = "<|begin_of_thought|>\n\nfirst\n\nsecond\n\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>\n\n\\boxed{2}\n\n<|end_of_solution|>"


def stratos(question: Any = "1 + 1?", answer: Any = f"{THOUGHT}\n\n{SOLUTION}", **more: Any) -> dict[str, Any]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"system": "Be kind.", "conversations": turns, **more}


def quiz(question: str = "q?", correct: str = "b", wrong: tuple[Any, ...] = ("1", "2", "3")) -> dict[str, Any]:
    """A row of GPQA."""
    return {"Question": question, "Correct Answer": correct} | {
        f"Incorrect Answer {number}": option for number, option in enumerate(wrong, 1)
    }


def test_every_format_has_a_name_in_the_params():
    names, _ = get_args(Prepare.model_fields["format"].annotation)
    assert set(FORMATS) == set(get_args(names))


def chat(*turns: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Messages of (role, content); `more` are keys that parquet adds to every turn when one row has them."""
    return [{"role": role, "content": content, **more} for role, content in turns]


TAUGHT = build("first\n\nsecond", "\\boxed{2}")
TRACE = (("user", " 1 + 1?"), ("assistant", f"{THOUGHT}\n\n{SOLUTION}"))
TALK = (("user", "1?"), ("assistant", "One."), ("user", "2? "), ("assistant", " Two.\n"))


@pytest.mark.parametrize(
    ("form", "raw", "row"),
    [
        (
            "bespoke_stratos",
            stratos(),
            Row(
                [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}],
                "<think>\nfirst\n\nsecond\n</think>\n<answer>\n\\boxed{2}\n</answer>",
            ),
        ),
        ("bespoke_stratos", stratos(" 1? ", system=None), Row(ask("1?"), TAUGHT)),
        ("bespoke_stratos", {"messages": chat(*TRACE)}, Row(ask("1 + 1?"), TAUGHT)),
        ("bespoke_stratos", {"messages": chat(("system", "S"), *TRACE)}, Row(ask("1 + 1?", "S"), TAUGHT)),
        ("bespoke_stratos", {"messages": chat(*TRACE), "system": "S"}, Row(ask("1 + 1?", "S"), TAUGHT)),
        (
            "bespoke_stratos",
            {"messages": chat(("system", "in the chat"), *TRACE), "system": "beside it"},
            Row(ask("1 + 1?", "in the chat"), TAUGHT),
        ),
        ("bespoke_stratos", {"messages": chat(("system", ""), *TRACE), "system": None}, Row(ask("1 + 1?"), TAUGHT)),
        ("bespoke_stratos", stratos(messages=chat(("user", "other"))), Row(ask("1 + 1?", "Be kind."), TAUGHT)),
        ("bespoke_stratos", {"conversations": None, "messages": chat(*TRACE)}, Row(ask("1 + 1?"), TAUGHT)),
        ("bespoke_stratos", {"messages": chat(*TRACE, value=None, name=None)}, Row(ask("1 + 1?"), TAUGHT)),
        (
            "numina_tir",
            {"problem": "1 + 1?\n", "solution": "so $\\boxed{2}$", "messages": []},
            Row(ask("1 + 1?"), solution="so $\\boxed{2}$"),
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "2 * 617 = <<2*617=1234>>1234 now\nand that is all\n#### 1,234"},
            Row(ask("How many?"), build("2 * 617 = 1234 now\nand that is all", "\\boxed{1234}"), "1,234"),
        ),
        (
            "math",
            {"problem": "Half?", "answer": "\\frac{1}{2}", "level": 1},
            Row(ask("Half?"), solution="$\\frac{1}{2}$"),
        ),
        ("aime", {"id": 84, "problem": "p\n", "answer": "033", "year": "2024"}, Row(ask("p"), solution="$33$")),
        ("aime", {"problem": "p", "answer": " 204 "}, Row(ask("p"), solution="$204$")),
        ("aime", {"problem": "p", "answer": "000"}, Row(ask("p"), solution="$0$")),
        ("aime", {"problem": "p", "answer": 7}, Row(ask("p"), solution="$7$")),
        ("messages", {"messages": chat(*TALK[:2])}, Row(ask("1?"), "One.")),
        ("messages", {"messages": chat(("system", "S"), *TALK[:2], tool=None)}, Row(ask("1?", "S"), "One.")),
        ("messages", {"messages": chat(("system", None), *TALK[:2])}, Row(ask("1?"), "One.")),
        (
            "messages",
            {"messages": chat(*TALK), "solution": "2"},
            Row([*chat(*TALK[:2]), {"role": "user", "content": "2?"}], "Two."),
        ),
        ("prompt_completion", {"prompt": "1?\n", "completion": " One."}, Row(ask("1?"), "One.")),
        (
            "prompt_completion",
            {"prompt": chat(("system", "S"), ("user", "1?")), "completion": chat(("assistant", "One.\n"))},
            Row(ask("1?", "S"), "One."),
        ),
        ("prompt_completion", {"prompt": "1?", "completion": chat(("assistant", "One."))}, Row(ask("1?"), "One.")),
        (
            "prompt_completion",
            {"prompt": chat(*TALK[:3]), "completion": "Two."},
            Row(chat(*TALK[:2]) + ask("2?"), "Two."),
        ),
    ],
)
def test_good_rows(form, raw, row):
    assert read(raw, form) == row


def test_traces_become_the_taught_format():
    assert parse(TAUGHT).thought == "first\n\nsecond"
    assert parse(read(stratos(), "bespoke_stratos").completion) == parse(TAUGHT)
    assert parse(read({"question": "q", "answer": "so\n#### 2"}, "gsm8k").completion).answer == "\\boxed{2}"


def test_columns_of_both_schemas_in_one_parquet(tmp_path):
    """Parquet fills what a row lacks with null: columns, and keys of the turns."""
    rows = [stratos("a?"), {"messages": chat(*TRACE)}, {"messages": [{"role": "user", "content": "b?", "name": "Bo"}]}]
    columns = ("system", "conversations", "messages")
    pq.write_table(pa.Table.from_pylist([{c: r.get(c) for c in columns} for r in rows]), tmp_path / "a.parquet")
    first, second, third = read_rows(tmp_path, "*")
    assert second["conversations"] is None and second["messages"][0]["name"] is None
    assert read(first, "bespoke_stratos") == Row(ask("a?", "Be kind."), TAUGHT)
    assert read(second, "bespoke_stratos") == Row(ask("1 + 1?"), TAUGHT)
    with pytest.raises(Dropped, match="messages is not one user and one assistant turn"):
        read(third, "bespoke_stratos")


def test_questions_are_what_the_user_says():
    assert questions(ask("1?", "S")) == ["1?"]
    assert questions(read({"messages": chat(("system", "S"), *TALK)}, "messages").prompt) == ["1?", "2?"]


NO_CHAT = "messages is not a chat of user and assistant"
STRATOS_TURNS = "conversations is not one user and one assistant turn"


@pytest.mark.parametrize(
    ("form", "raw", "reason"),
    [
        ("bespoke_stratos", {}, "no column messages"),
        ("bespoke_stratos", {"conversations": None, "messages": None}, "messages is null"),
        ("bespoke_stratos", {"conversations": "hello"}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": []}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": [None, None]}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": stratos()["conversations"][::-1]}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": stratos()["conversations"] * 2}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": [{"from": "user"}, {"from": "assistant"}]}, "no column value"),
        ("bespoke_stratos", stratos(None), "value is null"),
        ("bespoke_stratos", stratos(answer=None), "value is null"),
        ("bespoke_stratos", stratos(answer=["a"]), "value is not text"),
        ("bespoke_stratos", stratos(" \n"), "value is empty"),
        ("bespoke_stratos", stratos(answer="just 2"), "no thought between its markers"),
        ("bespoke_stratos", stratos(answer=THOUGHT), "no solution between its markers"),
        ("bespoke_stratos", stratos(answer=SOLUTION), "no thought between its markers"),
        (
            "bespoke_stratos",
            stratos(answer="<|begin_of_thought|> \n <|end_of_thought|>" + SOLUTION),
            "no thought between its markers",
        ),
        ("bespoke_stratos", {"messages": chat(*TALK)}, "messages is not one user and one assistant turn"),
        ("bespoke_stratos", {"messages": chat(*TALK[:2])}, "no thought between its markers"),
        ("numina_tir", {"solution": "2"}, "no column problem"),
        ("numina_tir", {"problem": "1 + 1?"}, "no column solution"),
        ("numina_tir", {"problem": "1 + 1?", "solution": None}, "solution is null"),
        ("numina_tir", {"problem": "", "solution": "2"}, "problem is empty"),
        ("numina_tir", {"problem": "1 + 1?", "solution": 2}, "solution is not text"),
        ("gsm8k", {"answer": "a\n#### 2"}, "no column question"),
        ("gsm8k", {"question": "q"}, "no column answer"),
        ("gsm8k", {"question": None, "answer": "a\n#### 2"}, "question is null"),
        ("gsm8k", {"question": " ", "answer": "a\n#### 2"}, "question is empty"),
        ("gsm8k", {"question": "q", "answer": 2}, "answer is not text"),
        ("gsm8k", {"question": "q", "answer": "it is 2"}, "answer has no #### number"),
        ("gsm8k", {"question": "q", "answer": "it is 2\n####"}, "answer has no #### number"),
        ("gsm8k", {"question": "q", "answer": "#### 2"}, "answer has no #### number"),
        ("math", {"problem": "p"}, "no column answer"),
        ("math", {"problem": "p", "answer": None}, "answer is null"),
        ("math", {"problem": "p", "answer": "\t"}, "answer is empty"),
        ("math", {"problem": ["p"], "answer": "2"}, "problem is not text"),
        *(
            ("aime", {"problem": "p", "answer": answer}, "answer is not an integer from 0 to 999")
            for answer in ("1000", 1000, -1, "-1", "3.0", "336^\\circ", "1,0", "٣", "m+n")
        ),
        ("aime", {"problem": "p"}, "no column answer"),
        ("aime", {"problem": "p", "answer": None}, "answer is null"),
        ("aime", {"problem": "p", "answer": True}, "answer is not text"),
        ("aime", {"problem": "p", "answer": 3.0}, "answer is not text"),
        ("aime", {"problem": 5, "answer": "3"}, "problem is not text"),
        ("gpqa", {"Correct Answer": "b"}, "no column Question"),
        ("gpqa", quiz() | {"Question": ""}, "Question is empty"),
        ("gpqa", quiz(correct=" "), "Correct Answer is empty"),
        ("gpqa", quiz(wrong=("1", "", "3")), "Incorrect Answer 2 is empty"),
        ("gpqa", quiz(wrong=("1", "2", None)), "Incorrect Answer 3 is null"),
        ("gpqa", quiz(wrong=("1", "2", "b")), "two options are the same"),
        ("gpqa", quiz(wrong=("1", "2 ", "2")), "two options are the same"),
        ("messages", {}, "no column messages"),
        ("messages", {"messages": None}, "messages is null"),
        ("messages", {"messages": "1?"}, NO_CHAT),
        ("messages", {"messages": []}, NO_CHAT),
        ("messages", {"messages": ["1?", "One."]}, NO_CHAT),
        ("messages", {"messages": chat(*TALK[:3])}, NO_CHAT),
        ("messages", {"messages": chat(*TALK[1:])}, NO_CHAT),
        ("messages", {"messages": chat(*TALK[:2], ("system", "S"))}, NO_CHAT),
        ("messages", {"messages": chat(("user", "1?"), ("tool", "2"), ("assistant", "3"))}, NO_CHAT),
        ("messages", {"messages": chat(("user", "1?"), (None, None), ("assistant", "3"))}, NO_CHAT),
        ("messages", {"messages": chat((["user"], "1?"), ("assistant", "3"))}, NO_CHAT),
        ("messages", {"messages": [{"from": "user", "value": "1?"}, {"from": "assistant", "value": "3"}]}, NO_CHAT),
        ("messages", {"messages": chat(("user", None), ("assistant", "3"))}, "content is null"),
        ("messages", {"messages": chat(("user", [{"type": "text"}]), ("assistant", "3"))}, "content is not text"),
        ("messages", {"messages": chat(("system", " "), *TALK)}, "content is empty"),
        ("messages", {"messages": [{"role": "user"}, {"role": "assistant"}]}, "no column content"),
        ("prompt_completion", {"completion": "2"}, "no column prompt"),
        ("prompt_completion", {"prompt": "1?"}, "no column completion"),
        ("prompt_completion", {"prompt": "1?", "completion": None}, "completion is null"),
        ("prompt_completion", {"prompt": {"a": 1}, "completion": "2"}, "prompt is not text"),
        ("prompt_completion", {"prompt": [], "completion": "2"}, "prompt is not a chat that ends with the user"),
        (
            "prompt_completion",
            {"prompt": chat(*TALK), "completion": "2"},
            "prompt is not a chat that ends with the user",
        ),
        ("prompt_completion", {"prompt": "1?", "completion": chat(*TALK[:2])}, "completion is not one assistant turn"),
        *((form, raw, "not a JSON object") for form in FORMATS for raw in (None, "text", 3, ["problem"])),
    ],
)
def test_reasons_to_drop(form, raw, reason):
    with pytest.raises(Dropped) as dropped:
        read(raw, form)
    assert str(dropped.value) == reason


def test_options_are_lettered_and_the_gold_is_a_letter():
    row = read(quiz(" Which?\n", "right", ("x", "y\n", "z")) | {"Record ID": "rec1"}, "gpqa")
    (asked,) = questions(row.prompt)
    question, blank, *lines = asked.split("\n")
    assert (question, blank, [line[:3] for line in lines]) == ("Which?", "", ["A) ", "B) ", "C) ", "D) "])
    assert sorted(line[3:] for line in lines) == ["right", "x", "y", "z"]
    assert f"{row.solution}) right" in lines
    assert row.completion is None


def test_the_order_of_options_is_the_questions_own():
    """The same in every process and for every order of the columns; over questions each letter is as often right."""
    first = read(quiz("Which?", "right", ("x", "y", "z")), "gpqa")
    assert first.solution == "B"  # sha256 is the same everywhere
    assert read(quiz("Which?", "right", ("z", "x", "y")), "gpqa") == first
    golds = Counter(read(quiz(f"Question {number}?"), "gpqa").solution for number in range(1000))
    assert set(golds) == set("ABCD") and all(200 < count < 300 for count in golds.values())


HALF = "\ud83d"  # of an emoji: JSON and Python can hold it, UTF-8 cannot


@pytest.mark.parametrize(
    ("form", "raw", "column"),
    [
        ("math", {"problem": f"p{HALF}", "answer": "2"}, "problem"),
        ("math", {"problem": "p", "answer": HALF}, "answer"),
        ("gsm8k", {"question": "q", "answer": f"a{HALF}\n#### 2"}, "answer"),
        ("aime", {"problem": "p", "answer": f"3{HALF}"}, "answer"),
        ("gpqa", quiz(wrong=("1", "2", HALF)), "Incorrect Answer 3"),
        ("messages", {"messages": chat(("user", "1?"), ("assistant", HALF))}, "content"),
        ("bespoke_stratos", stratos() | {"system": HALF}, "system"),
    ],
)
def test_half_a_character_drops_the_row(tmp_path, form, raw, column):
    """Written as JSON writes it; parquet would refuse the text after all rows were read."""
    (tmp_path / "a.jsonl").write_text(json.dumps(raw))
    (found,) = read_rows(tmp_path, "*")
    assert found == raw
    with pytest.raises(Dropped, match=f"^{column} has half a character$"):
        read(found, form)


def test_a_whole_emoji_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"problem": "\ud83d\ude00?", "answer": "2"}')
    (found,) = read_rows(tmp_path, "*")
    assert read(found, "math").prompt == ask("\U0001f600?")


def test_text_is_stripped():
    assert text({"a": " b \n"}, "a") == "b"


ROWS = [{"problem": f"{n}?", "answer": str(n)} for n in range(5)]


def test_read_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    assert list(read_rows(tmp_path, "*")) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_read_lines_with_blank_and_garbage_ones(tmp_path, name):
    lines = [json.dumps(row) for row in ROWS]
    lines[1:1] = ["", "{garbage", "  "]
    (tmp_path / name).write_text("\n".join(lines))
    assert list(read_rows(tmp_path, "*")) == [ROWS[0], None, *ROWS[1:]]


@pytest.mark.parametrize("space", [None, 2])
def test_read_json_array(tmp_path, space):
    (tmp_path / "a.json").write_text("\n " + json.dumps(ROWS, indent=space))
    assert list(read_rows(tmp_path, "*")) == ROWS


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_newlines_end_a_row(tmp_path, newline):
    """JSON may hold U+2028 and its like as they are."""
    rows = [{"problem": "a\u2028b\u2029c\u0085d\u000be", "answer": "1"}, ROWS[1]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text(newline.join(lines) + newline, encoding="utf-8", newline="")
    assert list(read_rows(tmp_path, "*")) == rows


def test_bytes_that_are_no_text_do_not_end_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "caf\xe9"}\n' + json.dumps(ROWS[0]).encode())
    assert list(read_rows(tmp_path, "*"))[1:] == ROWS[:1]


def test_a_number_too_long_to_read_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": ' + "1" * 5000 + "}\n" + json.dumps(ROWS[0]))
    assert list(read_rows(tmp_path, "*")) == [None, ROWS[0]]


def test_json_nested_too_deeply_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 5000 + "]" * 5000 + "\n" + json.dumps(ROWS[0]))
    assert list(read_rows(tmp_path, "*")) == [None, ROWS[0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_costs_no_row(tmp_path, name):
    content = json.dumps(ROWS) if name == "a.json" else "\n".join(map(json.dumps, ROWS))
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(read_rows(tmp_path, "*")) == ROWS


def test_a_long_trace_in_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text("problem\n" + "x" * 200_000)
    assert list(read_rows(tmp_path, "*")) == [{"problem": "x" * 200_000}]


def test_markers_without_end_take_no_time():
    turns = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "<|begin_of_thought|>" * 100_000}]
    with pytest.raises(Dropped, match="no thought between its markers"):
        read({"conversations": turns}, "bespoke_stratos")
    assert read({"question": "q", "answer": "<" * 1_000_000 + "a<<1+1=2>>2\n#### 2"}, "gsm8k").solution == "2"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**63 - 1], pa.duration("s")),
        pa.array([1], pa.timestamp("s", "No/Zone")),
    ],
)
def test_times_that_python_has_not_are_one_sentence(tmp_path, column):
    pq.write_table(pa.table({"when": column}), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"a\.parquet cannot be read \([^\n]+\); mend it"):
        list(read_rows(tmp_path, "*"))


TABLE = [{"Question": 'Which "one",\nor two?', "Correct Answer": "µ"}, {"Question": "x\r\ny", "Correct Answer": "2"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_read_csv(tmp_path, encoding):
    with (tmp_path / "a.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(TABLE[0]))
        writer.writeheader()
        writer.writerows(TABLE)
    assert list(read_rows(tmp_path, "*")) == TABLE


def test_csv_rows_with_too_few_fields_and_other_bytes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"problem,answer\ncaf\xe9,3\nalone\n")
    first, second = read_rows(tmp_path, "*")
    assert read(first, "math") == Row(ask("caf\ufffd"), solution="$3$")
    with pytest.raises(Dropped, match="answer is null"):
        read(second, "math")


def test_a_broken_csv_is_one_sentence(tmp_path):
    (tmp_path / "a.csv").write_text('problem,answer\n"never closed,3\n')
    with pytest.raises(StageError, match=r"a\.csv cannot be read \(.*\); mend it or name other files$"):
        list(read_rows(tmp_path, "*"))


def test_parquet_with_other_bytes_is_one_sentence(tmp_path):
    problems = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"problem": problems}), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"a\.parquet cannot be read \(.*utf-8.*\); mend it"):
        list(read_rows(tmp_path, "*"))


def test_a_broken_json_array_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(StageError, match=r"a\.json") as error:
        list(read_rows(tmp_path, "*"))
    assert "\n" not in str(error.value)


def test_broken_parquet_is_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StageError, match=r"a\.parquet") as error:
        list(read_rows(tmp_path, "*"))
    assert "\n" not in str(error.value)


def test_files_in_name_order_without_the_stages_own(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, row in (("b.jsonl", 0), ("a.jsonl", 1), ("deep/c.jsonl", 2), ("train.txt", 3), ("source.json", 4)):
        (tmp_path / name).write_text(json.dumps(ROWS[row]))
    assert list(read_rows(tmp_path, "*")) == [ROWS[1], ROWS[0]]
    assert list(read_rows(tmp_path, "b*")) == [ROWS[0]]
    assert list(read_rows(tmp_path, "**/*")) == [ROWS[1], ROWS[0], ROWS[2]]
    with pytest.raises(
        StageError, match=r"no parquet, jsonl, json or csv file matches 'x\*' in .*; it has: a.jsonl, b.js"
    ):
        list(read_rows(tmp_path, "x*"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StageError, match=r"traces does not exist; download it first: dvc repro download@traces$"):
        list(read_rows(tmp_path / "traces", "*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match=r"matches '\*' in .*empty; it has: nothing$"):
        list(read_rows(tmp_path / "empty", "*"))
