import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workflow.params import Prepare
from workflow.prepare import FORMATS, Dropped, Row, convert, read_rows, text
from workflow.prompts import build, parse
from workflow.stage import StageError

SPECIAL = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}

THOUGHT = "<|begin_of_thought|>\n\nfirst\n\nsecond\n\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>\n\n\\boxed{2}\n\n<|end_of_solution|>"


def stratos(question: Any = "1 + 1?", answer: Any = f"{THOUGHT}\n\n{SOLUTION}", **more: Any) -> dict[str, Any]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"system": "Be kind.", "conversations": turns, **more}


def test_every_format_has_a_name_in_the_params():
    assert set(FORMATS) == set(Prepare.model_fields["format"].annotation.__args__)


@pytest.mark.parametrize(
    ("form", "raw", "row"),
    [
        (
            "bespoke_stratos",
            stratos(),
            Row("1 + 1?", "Be kind.", "<think>\nfirst\n\nsecond\n</think>\n<answer>\n\\boxed{2}\n</answer>"),
        ),
        ("bespoke_stratos", stratos(" 1? ", system=None), Row("1?", None, build("first\n\nsecond", "\\boxed{2}"))),
        (
            "numina_tir",
            {"problem": "1 + 1?\n", "solution": "so $\\boxed{2}$", "messages": []},
            Row("1 + 1?", solution="so $\\boxed{2}$"),
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "2 * 617 = <<2*617=1234>>1234 now\nand that is all\n#### 1,234"},
            Row(
                "How many?",
                completion=build("2 * 617 = 1234 now\nand that is all", "\\boxed{1234}"),
                solution="1234",
            ),
        ),
        ("math", {"problem": "Half?", "answer": "\\frac{1}{2}", "level": 1}, Row("Half?", solution="$\\frac{1}{2}$")),
    ],
)
def test_good_rows(form, raw, row):
    assert FORMATS[form](raw) == row
    assert row.completion is None or parse(row.completion) is not None


STRATOS_TURNS = "conversations is not one user and one assistant turn"


@pytest.mark.parametrize(
    ("form", "raw", "reason"),
    [
        ("bespoke_stratos", {}, STRATOS_TURNS),
        ("bespoke_stratos", {"conversations": None}, STRATOS_TURNS),
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
        *((form, raw, "not a JSON object") for form in FORMATS for raw in (None, "text", 3, ["problem"])),
    ],
)
def test_reasons_to_drop(form, raw, reason):
    with pytest.raises(Dropped) as dropped:
        convert(raw, form, None, SPECIAL)
    assert str(dropped.value) == reason


@pytest.mark.parametrize("token", sorted(SPECIAL))
@pytest.mark.parametrize(
    ("form", "raw"),
    [
        ("math", {"problem": "a {} b", "answer": "2"}),
        ("gsm8k", {"question": "q", "answer": "so{}\n#### 2"}),
        ("gsm8k", {"question": "{}", "answer": "so\n#### 2"}),
        ("bespoke_stratos", {**stratos(), "system": "x{}"}),
        ("bespoke_stratos", stratos(answer=THOUGHT.replace("second", "{}") + SOLUTION)),
    ],
)
def test_special_tokens_are_not_text(form, raw, token):
    with pytest.raises(Dropped, match=r"^special token in the text$"):
        convert(json.loads(json.dumps(raw).replace("{}", token)), form, None, SPECIAL)
    convert(json.loads(json.dumps(raw).replace("{}", "harmless")), form, None, SPECIAL)


@pytest.mark.parametrize(
    ("system_prompt", "own", "used"),
    [("Ours.", "Its own.", "Ours."), (None, "Its own.", "Its own."), (None, None, None), ("", "Its own.", None)],
)
def test_system_prompt(system_prompt, own, used):
    row = convert({**stratos(), "system": own}, "bespoke_stratos", system_prompt, SPECIAL)
    system = [{"role": "system", "content": used}] if used else []
    assert row["prompt"] == [*system, {"role": "user", "content": "1 + 1?"}]
    assert row["completion"] == [{"role": "assistant", "content": build("first\n\nsecond", "\\boxed{2}")}]
    assert row["solution"] is None


def test_a_row_without_completion():
    row = convert({"problem": "p", "answer": "2"}, "math", None, SPECIAL)
    assert row == {"prompt": [{"role": "user", "content": "p"}], "completion": None, "solution": "$2$"}


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
    with pytest.raises(StageError, match=r"no parquet, jsonl or json file matches 'x\*' in .*; it has: a.jsonl, b.js"):
        list(read_rows(tmp_path, "x*"))
