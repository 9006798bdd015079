"""The score stage on made-up samples, through lighteval's real Pipeline and real math-verify workers."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from workflow import score
from workflow.prompts import answer_part, build
from workflow.stage import StageError
from workflow.stats import mean_interval, pass_at_k
from workflow.verify import Verifier, gold_text

ROOT = Path(__file__).parents[2]
SETTINGS = {"n_samples": 4, "temperature": 1.0, "top_p": 0.95, "max_tokens": 100, "dtype": "float32"}

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


def write(folder: Path, answer: str, cases: dict) -> list[str]:
    """A params.yaml, questions and shuffled samples; returns the stage's arguments."""
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    params["prepare"]["toy"] = next(iter(params["prepare"].values()))
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
    pq.write_table(pa.Table.from_pylist(samples[::-1]), folder / "samples.parquet")
    paths = {"samples": "samples.parquet", "questions": "questions.parquet", "output": "scores/toy.json"}
    paths |= {"verdicts": "scores/toy.parquet", "log": "logs"}
    return ["toy", *(part for name, path in paths.items() for part in (f"--{name}", path))]


def run(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict, list[dict]]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["score", *arguments])
    score.main()
    return json.loads(Path("scores/toy.json").read_text()), pq.read_table("scores/toy.parquet").to_pylist()


@pytest.mark.parametrize(("answer", "cases"), [("latex", LATEX), ("number", NUMBER)])
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
    assert scores["pass_at_4"] == pytest.approx(pass_at_k(correct, 4).mean(), abs=1e-6)  # lighteval's is the same
    assert scores["truncated"] == scores["no_eos"] == pytest.approx(1 / len(verdicts))
    assert scores["unparsed"] == pytest.approx(sum(v["reason"] == "unparsed" for v in verdicts) / len(verdicts))
    assert (scores["mean_tokens"], scores["timed_out"]) == (25, 0)
    assert (scores["n_questions"], scores["n_samples"], scores["top_p"]) == (len(cases), 4, 0.95)
    assert all(not isinstance(value, dict | list) for value in scores.values())
    assert json.loads((tmp_path / "logs/stage.json").read_text())["samples"] == len(verdicts)
    assert capsys.readouterr().out.count("\n") == 1

    first = [(tmp_path / "scores" / name).read_bytes() for name in ("toy.json", "toy.parquet")]
    run(tmp_path, sys.argv[1:], monkeypatch)
    assert [(tmp_path / "scores" / name).read_bytes() for name in ("toy.json", "toy.parquet")] == first


def test_agrees_with_lightevals_own_math_metric():
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    cases = [
        ("42", r"The final answer is $\boxed{42}$."),
        ("42", build("six times seven", r"\boxed{42}")),
        ("42", build("six times seven", r"\boxed{43}")),
        ("42", build("six times seven", "$42$")),
        (r"\frac{1}{2}", build("half", r"\boxed{\dfrac{1}{2}}")),
        (r"\frac{1}{2}", build("half", r"\boxed{0.5}")),
        (r"\frac{1}{2}", build("half", r"\boxed{\frac{2}{3}}")),
        ("x^2 + 2x + 1", build("square", r"\boxed{(x+1)^2}")),
        ("x^2 + 2x + 1", build("square", r"\boxed{(x-1)^2}")),
        (r"2\sqrt{3}", build("root", r"\boxed{\sqrt{12}}")),
        (r"\left( 3, \frac{\pi}{2} \right)", build("polar", r"\boxed{\left(3, \frac{\pi}{2}\right)}")),
        (r"\left( 3, \frac{\pi}{2} \right)", build("polar", r"\boxed{\left(3, \pi\right)}")),
        (r"(-\infty, 2]", build("interval", r"\boxed{(-\infty, 2]}")),
        (r"1,-2", build("roots", r"\boxed{-2, 1}")),
        ("10080", build("count", r"\boxed{10,080}")),
        (r"\text{Evelyn}", build("fastest", r"\boxed{\text{Evelyn}}")),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", build("vector", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}")),
        (r"3", build("lost", "I do not know")),
    ]
    golds, completions = ([case[i] for case in cases] for i in (0, 1))
    with Verifier() as verifier:
        ours = [float(one.correct) for one in score.judge_latex(golds, completions, verifier)]
    metric = Metrics.pass_at_k_math.value.sample_level_fn.compute_score
    theirs = [
        metric(Doc(query="", choices=[gold_text(gold)], gold_index=0), ModelResponse(text=[answer_part(completion)]))
        for gold, completion in cases
    ]
    assert ours == theirs
    assert 0.5 < np.mean(ours) < 1


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


def test_question_without_solution_is_refused(tmp_path, monkeypatch):
    arguments = write(tmp_path, "number", {("n1", "1"): NUMBER["n1", "1234"], ("n2", None): NUMBER["n2", "-5"]})
    with pytest.raises(StageError, match="question n2 has no solution"):
        run(tmp_path, arguments, monkeypatch)
