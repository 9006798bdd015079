"""The score stage on made-up samples, through lighteval's real Pipeline and real math-verify workers."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from workflow import score
from workflow.judge import Judged, judge_latex
from workflow.prompts import answer_part, build
from workflow.stage import StageError
from workflow.stats import maj_at_n, mean_interval, pass_at_k
from workflow.verify import Verifier

ROOT = Path(__file__).parents[2]
SETTINGS = {"n_samples": 4, "temperature": 1.0, "top_p": 0.95, "max_tokens": 100, "dtype": "float32"}
GENERATION = {**SETTINGS, "vllm": "0.31.0", "tensor_parallel_size": 2, "chat_template_sha256": "c0ffee", "new": [1, 2]}

# Four samples of five questions: what is in the file, then correct, strict, reason.
LATEX = {
    ("q1", "$42$"): [
        (build("6 * 7", r"\boxed{42}"), True, True, "correct"),
        (build("6 + 7", r"\boxed{13}"), False, False, "wrong"),
        (r"I think that \boxed{42} is right", True, False, "correct"),
        (r"<think>" + "\nlost \\boxed{42", False, False, "unparsed"),
    ],
    ("q2", r"\frac{1}{2}"): [
        (build("half", "$0.5$"), True, True, "correct"),
        (build("half", r"\boxed{\frac{2}{4}}") + "\n", True, False, "correct"),
        (build(r"not \boxed{\frac12}", r"\boxed{2}"), False, False, "wrong"),
        (build("half", "one half"), False, False, "unparsed"),
    ],
    ("q3", "(3, 4)"): [(build("a pair", r"\boxed{(3,4)}"), True, True, "correct")] * 4,
    ("q4", r"so it is \boxed{7}"): [(build("seven?", r"\boxed{1}"), False, False, "wrong")] * 4,
    ("q5", "no gold"): [(build("what", r"\boxed{\text{no}}"), False, False, "wrong")] * 4,
    ("aime", "33"): [(build("AIME pads to three digits", r"\boxed{033}"), True, True, "correct")] * 4,
}
NUMBER = {
    ("n1", "1234"): [
        (build("add 1000 to 234", "1,234"), True, True, "correct"),
        (build("add", "It is $1,234."), True, False, "correct"),
        ("1 and 1234.0", True, False, "correct"),
        (build("1234", "none"), False, False, "unparsed"),
    ],
    ("n2", "-5"): [(build("two less seven", "-5"), True, True, "correct")] * 2
    + [(build("two less seven", "5"), False, False, "wrong")] * 2,
}
LETTER = {
    ("l1", "B"): [
        (build("A or B", r"\boxed{B}"), True, True, "correct"),
        ("The answer is (B), because A is too small.", True, False, "correct"),
        (build("A or B", "A"), False, False, "wrong"),
        (build("B", "A proton is heavier."), False, False, "unparsed"),
    ],
    ("l2", "(C)"): [(build("what", "C"), True, True, "correct")] * 4,
}


def write(folder: Path, answer: str, cases: dict, seed: int = 42) -> list[str]:
    """A params.yaml, questions and shuffled samples; returns the stage's arguments."""
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    params["prepare"]["toy"] = next(iter(params["prepare"].values()))
    params["seed"] = seed
    params["tasks"] = {"toy": {"answer": answer, "questions": len(cases), **SETTINGS}}
    YAML().dump(params, folder / "params.yaml")
    questions = [
        {"id": key, "prompt": [{"role": "user", "content": f"question {key}"}], "completion": None, "solution": gold}
        for key, gold in [*cases, ("not asked", "1")]
    ]
    samples = [
        {"id": key, "sample": i, "seed": i, "completion": row[0], "tokens": 10 * (i + 1), "finish_reason": "stop"}
        for (key, _), rows in cases.items()
        for i, row in enumerate(rows)
    ]
    samples[3]["finish_reason"] = "length"
    pq.write_table(pa.Table.from_pylist(questions), folder / "questions.parquet")
    table = pa.Table.from_pylist(samples[::-1]).replace_schema_metadata({"generation": json.dumps(GENERATION)})
    pq.write_table(table, folder / "samples.parquet")
    paths = {"samples": "samples.parquet", "questions": "questions.parquet", "output": "scores/toy.json"}
    paths |= {"verdicts": "scores/toy.parquet", "log": "logs"}
    return ["toy", *(part for name, path in paths.items() for part in (f"--{name}", path))]


def run(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict, list[dict]]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["score", *arguments])
    score.main()
    return json.loads(Path("scores/toy.json").read_text()), pq.read_table("scores/toy.parquet").to_pylist()


@pytest.mark.parametrize(
    ("answer", "gold", "message"),
    [
        ("letter", "none of them", "the solution of l1 is 'none of them', which is no letter"),
        ("number", "12 apples", "the solution of l1 is '12 apples', which is no number"),
    ],
)
def test_golds_of_another_kind_are_refused(tmp_path, monkeypatch, answer, gold, message):
    with pytest.raises(StageError, match=message):
        run(tmp_path, write(tmp_path, answer, {("l1", gold): LETTER["l1", "B"]}), monkeypatch)


def test_fewer_questions_than_asked_are_refused(tmp_path, monkeypatch):
    arguments = write(tmp_path, "letter", LETTER)
    file = tmp_path / "questions.parquet"
    pq.write_table(pq.read_table(file).slice(0, 1), file)
    with pytest.raises(StageError, match="has 1 questions and the task asks 2; ask less"):
        run(tmp_path, arguments, monkeypatch)


@pytest.mark.parametrize(("answer", "cases"), [("latex", LATEX), ("number", NUMBER), ("letter", LETTER)])
def test_stage(tmp_path, monkeypatch, capsys, answer, cases):
    scores, verdicts = run(tmp_path, write(tmp_path, answer, cases), monkeypatch)

    wanted = [(key, i, *row[1:]) for (key, _), rows in cases.items() for i, row in enumerate(rows)]
    assert [(v["id"], v["sample"], v["correct"], v["strict"], v["reason"]) for v in verdicts] == wanted
    assert [v["gold"] for v in verdicts] == [gold for _, gold in cases for _ in range(4)]
    correct = np.array([v["correct"] for v in verdicts], dtype=float).reshape(-1, 4)
    strict = np.array([v["strict"] for v in verdicts], dtype=float).reshape(-1, 4)
    for prefix, matrix in (("", correct), ("strict_", strict)):
        interval = asdict(mean_interval(matrix))
        assert scores[f"{prefix}pass_at_1"] == pytest.approx(interval.pop("mean"), abs=1e-6)
        for part, value in interval.items():
            assert scores[f"{prefix}pass_at_1_{part}"] == pytest.approx(value, abs=1e-6)
    for k in (2, 4):
        assert scores[f"pass_at_{k}"] == pytest.approx(pass_at_k(correct, k).mean(), abs=1e-6)
    extracted = [[v["extracted"] for v in verdicts[start : start + 4]] for start in range(0, len(verdicts), 4)]
    for name, values in (("pass_at_4", pass_at_k(correct, 4)), ("maj_at_4", maj_at_n(extracted, correct))):
        interval = mean_interval(values[:, None])
        assert (scores[f"{name}_low"], scores[f"{name}_high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert scores["truncated"] == scores["no_eos"] == pytest.approx(1 / len(verdicts), abs=1e-6)
    assert scores["unparsed"] == pytest.approx(
        sum(v["reason"] == "unparsed" for v in verdicts) / len(verdicts), abs=1e-6
    )
    assert (scores["mean_tokens"], scores["timed_out"]) == (25, 0)
    assert (scores["n_questions"], scores["n_samples"], scores["top_p"]) == (len(cases), 4, 0.95)
    assert all(not isinstance(value, dict | list) for value in scores.values())
    assert (scores["generation_tensor_parallel_size"], scores["generation_new"]) == (2, "[1, 2]")
    assert "generation_temperature" not in scores
    assert scores["version_math-verify"]
    assert json.loads((tmp_path / "logs/stage.json").read_text())["samples"] == len(verdicts)
    assert capsys.readouterr().out.count("\n") == 1
    assert not list((tmp_path / "scores").glob("*.part"))

    first = [(tmp_path / "scores" / name).read_bytes() for name in ("toy.json", "toy.parquet")]
    run(tmp_path, sys.argv[1:], monkeypatch)
    assert [(tmp_path / "scores" / name).read_bytes() for name in ("toy.json", "toy.parquet")] == first


CLOSED_BOX = re.compile(r"\\boxed\{[^{}]*(\{[^{}]*\}[^{}]*)*\}")


def kind_of_disagreement(text: str, ours: Judged, read_by_lighteval: str) -> str | None:
    """Why the two differ on a text without its thought; None where they must not.

    - "final answer": lighteval reads what follows these words before it looks for a box, wherever they stand. The task
      asks for the answer in a box.
    - "nothing marked": there is no closed box and no LaTeX behind "answer". lighteval then takes any number or formula
      of the text, such as the last of a thought that was cut off; for us that is no answer.
    - "no box": there is no closed box; lighteval prefers a number in words, or a later formula that it can parse, to
      the LaTeX behind an earlier "answer" that we read.
    """
    boxed = CLOSED_BOX.search(text)
    if boxed and re.search("(?i)final answer", text[: boxed.start()]) and read_by_lighteval not in boxed[0]:
        return "final answer"
    if boxed or read_by_lighteval == ours.extracted:
        return None
    return "nothing marked" if ours.reason == "unparsed" else "no box"


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="needs DATA_DIR, a folder with math_500/test.jsonl")
def test_agrees_with_lightevals_own_math_metric():
    """On 1,500 made-up samples of the real questions; where they differ, it is for one of the reasons above."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    from bench import scoring

    file = Path(os.environ["DATA_DIR"]) / "math_500" / "test.jsonl"
    questions = [json.loads(line) for line in file.read_text().splitlines()]
    samples = scoring.make(questions, n=3, seed=5)
    golds = [f"${question['answer']}$" for question in questions for _ in range(3)]
    endings, completions = zip(*(sample for answers in samples for sample in answers), strict=True)
    with Verifier(workers=2) as verifier:
        judged = judge_latex(golds, completions, verifier)
    metric = Metrics.pass_at_k_math.value.sample_level_fn.compute_score
    kinds: Counter[str] = Counter()
    for gold, ending, completion, ours in zip(golds, endings, completions, judged, strict=True):
        doc, text = Doc(query="", choices=[gold], gold_index=0), answer_part(completion)
        if bool(metric(doc, ModelResponse(text=[text]))) != ours.correct:
            kind = kind_of_disagreement(text, ours, (doc.specific["extracted_predictions"] or [""])[0])
            assert kind, (gold, ending, ours, doc.specific, text)
            kinds[kind] += 1
        else:
            kinds["agree"] += 1
    assert kinds["agree"] > 0.9 * len(golds)
    assert kinds.keys() == {"agree", "final answer", "nothing marked", "no box"}
    usual = [ours.correct for ending, ours in zip(endings, judged, strict=True) if ending.startswith("boxed")]
    assert 0.5 < np.mean(usual) < 0.9


def test_golds_are_answers_to_themselves():
    """Of MATH-500, with spellings that sympy's LaTeX parsers do not read as they are."""
    golds = [
        r"\frac14",
        r"11\sqrt2",
        r"\frac 59",
        r"\dfrac{17}{50}",
        r"\text{(C)}",
        "10,\\! 080",
        ".35625",
        r"90^\circ",
    ]
    with Verifier() as verifier:
        judged = judge_latex(golds, [build("so", rf"\boxed{{{gold}}}") for gold in golds], verifier)
    assert [(one.correct, one.strict) for one in judged] == [(True, True)] * len(golds)


ROWS = [{"id": key, "sample": i} for key in ("a", "b") for i in range(2)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"id": "c", "sample": 0}], "sample of c, which is not one of the task's 2 questions"),
        ([*ROWS, ROWS[1]], "sample 1 of question a is in the samples file twice"),
        (ROWS[:3], "sample 1 of question b is missing and n_samples is 2"),
        ([*ROWS, {"id": "a", "sample": 2}], "there are more than n_samples 2 samples per question"),
    ],
)
def test_samples_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(StageError, match=message):
        score.in_order(rows, ["a", "b"], 2)


def test_repeated_question_is_refused():
    with pytest.raises(StageError, match="question a is in the questions file twice"):
        score.in_order(ROWS, ["a", "a"], 2)


def test_command_line_says_what_is_wrong_in_one_sentence(tmp_path):
    arguments = write(tmp_path, "number", NUMBER)
    (tmp_path / "samples.parquet").unlink()
    command = [sys.executable, "-m", "workflow.score", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: samples.parquet does not exist; write it with: dvc repro\n"


def rewrite(folder: Path, change, **generation) -> None:
    """Change the samples file: its table by a function, what it says of the generation by name."""
    table = change(pq.read_table(folder / "samples.parquet"))
    metadata = {"generation": json.dumps({**GENERATION, **generation})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "samples.parquet")


def column(name: str, values: list, kind: pa.DataType):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values, kind))


COMPLETIONS = [row[0] for rows in NUMBER.values() for row in rows][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (column("completion", [*COMPLETIONS[:-1], None], pa.string()), "row 7 of samples.parquet has no completion"),
        (column("tokens", [1] * 7 + [None], pa.int64()), "row 7 of samples.parquet has no tokens"),
        (column("tokens", ["many"] * 8, pa.string()), "column tokens of samples.parquet does not hold int64"),
        (column("id", [b"\xff"] * 8, pa.binary()), "column id of samples.parquet does not hold string"),
        (lambda table: table.drop_columns("sample"), "samples.parquet has no column sample"),
        (lambda table: table.slice(0, 0), "samples.parquet has no rows"),
        (lambda table: table.slice(1), "sample 3 of question n2 is missing"),
        (lambda table: pa.concat_tables([table, table.slice(2, 1)]), "is in the samples file twice"),
    ],
)
def test_samples_that_cannot_be_counted_are_refused_and_cost_no_finished_work(tmp_path, monkeypatch, change, message):
    arguments = write(tmp_path, "number", NUMBER)
    run(tmp_path, arguments, monkeypatch)
    before = (tmp_path / "scores/toy.json").read_bytes()
    rewrite(tmp_path, change)
    with pytest.raises(StageError, match=message):
        run(tmp_path, arguments, monkeypatch)
    assert (tmp_path / "scores/toy.json").read_bytes() == before


def test_bytes_that_are_no_text_and_a_megabyte_are_counted(tmp_path, monkeypatch):
    arguments = write(tmp_path, "number", NUMBER)
    answers = [b"5", b"5", b"-5 \xff\xfe", b"\x80-5", b"<think>\n" + b"\n</think>\n<answer>\n" * 100_000, b"1" * 10**6]
    answers += [b"1234\xc3", b"1,234" + b" " * 10**6]
    raw = pa.array(answers, pa.binary())
    not_text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())  # as a broken writer leaves it
    rewrite(tmp_path, lambda table: table.set_column(3, "completion", not_text))
    scores, verdicts = run(tmp_path, arguments, monkeypatch)
    assert [v["reason"] for v in verdicts][::-1] == ["wrong"] * 2 + ["correct"] * 2 + ["unparsed", "wrong"] + [
        "correct"
    ] * 2
    assert (scores["n_questions"], scores["pass_at_1"]) == (2, 0.5)


def test_samples_that_do_not_say_how_they_were_made_are_refused(tmp_path, monkeypatch):
    arguments = write(tmp_path, "number", NUMBER)
    pq.write_table(
        pq.read_table(tmp_path / "samples.parquet").replace_schema_metadata(None), tmp_path / "samples.parquet"
    )
    with pytest.raises(StageError, match="does not say how its samples were made; run the generate stage again"):
        run(tmp_path, arguments, monkeypatch)
    rewrite(tmp_path, lambda table: table, temperature=0.7)
    with pytest.raises(StageError, match=r"was not sampled with temperature 1\.0, which params\.yaml has"):
        run(tmp_path, arguments, monkeypatch)


def test_settings_are_equal_for_another_seed_and_differ_for_all_that_matters(tmp_path, monkeypatch):
    def sha256(answer: str = "number", seed: int = 42, **generation) -> str:
        arguments = write(tmp_path, answer, NUMBER, seed)
        rewrite(tmp_path, lambda table: table, **generation)
        return run(tmp_path, arguments, monkeypatch)[0]["settings_sha256"]

    first = sha256()
    assert sha256(seed=7) == first
    others = [sha256(tensor_parallel_size=1), sha256(chat_template_sha256="tea"), sha256("latex")]
    monkeypatch.setitem(SETTINGS, "top_p", 0.9)
    others.append(sha256(top_p=0.9))
    assert len({first, *others}) == 5


def test_file_that_is_no_parquet_is_refused(tmp_path, monkeypatch):
    arguments = write(tmp_path, "number", NUMBER)
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StageError, match="cannot be read"):
        run(tmp_path, arguments, monkeypatch)


def test_question_without_solution_is_refused(tmp_path, monkeypatch):
    arguments = write(tmp_path, "number", {("n1", "1"): NUMBER["n1", "1234"], ("n2", None): NUMBER["n2", "-5"]})
    with pytest.raises(StageError, match="question n2 has no solution"):
        run(tmp_path, arguments, monkeypatch)
