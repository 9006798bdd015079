"""The prepare stage through its command line, with the builtin tokenizer; imports transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workflow import prepare
from workflow.stage import StageError

GOOD = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
BAD = {
    "not a JSON object": "{garbage",
    "no column answer": '{"question": "q"}',
    "question is null": '{"question": null, "answer": "a\\n#### 2"}',
    "question is empty": '{"question": "", "answer": "a\\n#### 2"}',
    "answer is not text": '{"question": "q", "answer": 2}',
    "answer has no #### number": '{"question": "q", "answer": "2"}',
    "special token in the text": '{"question": "say <|im_end|>", "answer": "a\\n#### 2"}',
    "prompt longer than 60 tokens": json.dumps({**GOOD, "question": "1" * 60}),
    "longer than 200 tokens": json.dumps({**GOOD, "answer": "1" * 200 + "\n#### 2"}),
}
MESSAGE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema([("id", pa.string()), ("prompt", MESSAGE), ("completion", MESSAGE), ("solution", pa.string())])

Stage = Callable[..., list[str]]


@pytest.fixture
def stage(sound, write_params, tmp_path, tiny_model) -> Stage:
    """Writes raw lines and params.yaml; returns the stage's arguments."""

    def build(lines: list[str], seed: int = 42, **settings: Any) -> list[str]:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        (raw / "train.jsonl").write_text("\n".join(lines))
        (raw / "source.json").write_text("{}")
        sound["seed"] = seed
        sound["prepare"]["problems"] |= settings
        write_params(sound)
        paths = {"raw": raw, "tokenizer": tiny_model, "output": "out/problems.parquet", "log": "logs"}
        return ["problems", *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]

    return build


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: list[str]) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    prepare.main()
    return pq.read_table("out/problems.parquet").to_pylist()


def good(count: int) -> list[str]:
    return [json.dumps({**GOOD, "question": f"What is {n} + 1?"}) for n in range(count)]


def in_a_process(folder: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflow.prepare", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_reason_is_counted(stage, tmp_path, environment):
    lines = [*good(2), *BAD.values(), BAD["not a JSON object"], *good(1)]
    done = in_a_process(tmp_path, stage(lines, max_dropped_share=0.8), environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("prepare problems: 3 of 13 rows (2 not a JSON object, 1 ")

    table = pq.read_table(tmp_path / "out/problems.parquet")
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == ["problems-000000", "problems-000001", "problems-000012"]
    assert rows[1] == {
        "id": "problems-000001",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 1 + 1?"}],
        "completion": [
            {
                "role": "assistant",
                "content": "<think>\n1 + 1 = 2\n</think>\n<answer>\n\\boxed{2}\n</answer>",
            }
        ],
        "solution": "2",
    }
    facts = json.loads((tmp_path / "logs/stage.json").read_text())
    assert facts["dropped"] == dict.fromkeys(sorted(BAD), 1) | {"not a JSON object": 2}
    assert list(facts["dropped"]) == sorted(facts["dropped"])
    assert facts["rows_in"] == len(lines) == facts["rows"] + sum(facts["dropped"].values())


def test_too_many_dropped_stop_the_stage(stage, tmp_path, environment):
    done = in_a_process(tmp_path, stage([*good(7), *list(BAD.values())[:3]], max_dropped_share=0.29), environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: prepare.problems kept 7 of 10 rows (1 not a JSON object, 1 no column answer, 1 question is null); "
        "mend the data, or raise prepare.problems.max_dropped_share above 0.300 or the length limits in params.yaml\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "fails"), [(0.3, False), (0.29, True), (0, True), (1, False)])
def test_threshold(stage, tmp_path, monkeypatch, share, fails):
    arguments = stage([*good(7), *list(BAD.values())[:3]], max_dropped_share=share)
    if fails:
        with pytest.raises(StageError, match="kept 7 of 10 rows"):
            run(monkeypatch, tmp_path, arguments)
    else:
        assert len(run(monkeypatch, tmp_path, arguments)) == 7


@pytest.mark.parametrize(
    ("lines", "says"), [([], r"kept 0 of 0 rows \(none dropped\)"), (list(BAD.values())[:1], "kept 0 of 1 rows")]
)
def test_nothing_left_is_never_a_result(stage, tmp_path, monkeypatch, lines, says):
    with pytest.raises(StageError, match=says):
        run(monkeypatch, tmp_path, stage(lines, max_dropped_share=1))


def test_lengths_are_those_of_the_rendered_chat(stage, tmp_path, monkeypatch, tiny_model):
    from transformers import AutoTokenizer

    row = run(monkeypatch, tmp_path, stage(good(1)))[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    assert len(prompt) < len(whole)
    exact = {"max_prompt_length": len(prompt), "max_length": len(whole)}
    assert len(run(monkeypatch, tmp_path, stage(good(1), **exact))) == 1
    for limit, reason in (("max_prompt_length", "1 prompt longer than"), ("max_length", "1 longer than")):
        with pytest.raises(StageError, match=reason):
            run(monkeypatch, tmp_path, stage(good(1), **{**exact, limit: exact[limit] - 1}))


def test_rows_are_drawn_with_the_seed(stage, tmp_path, monkeypatch):
    every = run(monkeypatch, tmp_path, stage(good(30)))
    drawn = run(monkeypatch, tmp_path, stage(good(30), rows=10))
    assert len(drawn) == 10 and all(row in every for row in drawn)
    assert [row["id"] for row in drawn] == sorted({row["id"] for row in drawn}) != [row["id"] for row in every[:10]]
    assert run(monkeypatch, tmp_path, stage(good(30), rows=10)) == drawn
    assert run(monkeypatch, tmp_path, stage(good(30), rows=10, seed=43)) != drawn


def test_more_rows_than_there_are(stage, tmp_path, monkeypatch):
    with pytest.raises(StageError, match=r"^prepare.problems.rows is 4; write at most 3$"):
        run(monkeypatch, tmp_path, stage(good(3), rows=4))


def test_same_input_same_bytes(stage, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, stage(good(20), rows=7))
    first = (tmp_path / "out/problems.parquet").read_bytes()
    run(monkeypatch, tmp_path, stage(good(20), rows=7))
    assert (tmp_path / "out/problems.parquet").read_bytes() == first


def test_a_tokenizer_without_chat_template(stage, tmp_path, monkeypatch, tiny_model):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    arguments = [str(tmp_path / "bare") if part == str(tiny_model) else part for part in stage(good(1))]
    with pytest.raises(StageError, match="bare has no chat template; use an instruct model"):
        run(monkeypatch, tmp_path, arguments)
