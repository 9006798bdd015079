"""Judge the stored samples of one model on one task: verdicts per sample, accuracies with error bars."""

import argparse
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import prompts, stage
from workflow.params import Task, load_params, pick
from workflow.stage import StageError
from workflow.verify import Verifier, gold_text, last_number, number

if TYPE_CHECKING:
    import pyarrow as pa

QUESTION_COLUMNS = ["id", "prompt", "solution"]
SAMPLE_COLUMNS = ["id", "sample", "completion", "tokens", "finish_reason"]
LIBRARIES = ["latex2sympy2_extended", "lighteval", "math-verify", "numpy", "scipy", "sympy"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One sample: correct is the headline, strict also asks for the taught format."""

    correct: bool
    strict: bool
    reason: str  # of `correct`, see workflow/verify.py
    extracted: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="a task in params.yaml")
    parser.add_argument("--samples", type=Path, required=True, help="parquet of the generate stage")
    parser.add_argument("--questions", type=Path, required=True, help="parquet of the prepare stage")
    parser.add_argument("--output", type=Path, required=True, help="scores, flat JSON")
    parser.add_argument("--verdicts", type=Path, required=True, help="parquet, one row per sample")
    parser.add_argument("--log", type=Path, required=True, help="folder for stage.json")
    args = parser.parse_args()
    params = load_params()
    task = pick(params.tasks, args.task, "tasks")

    import pyarrow as pa
    import pyarrow.parquet as pq

    questions = _read(args.questions, QUESTION_COLUMNS).slice(0, task.questions)
    samples = in_order(_read(args.samples, SAMPLE_COLUMNS).to_pylist(), questions["id"].to_pylist(), task.n_samples)
    solutions = dict(zip(questions["id"].to_pylist(), questions["solution"].to_pylist(), strict=True))
    bare = [key for key, solution in solutions.items() if solution is None]
    if bare:
        raise StageError(f"question {bare[0]} has no solution; name a data set whose format has them")
    golds = [solutions[sample["id"]] for sample in samples]
    completions = [sample["completion"] for sample in samples]
    if task.answer == "latex":
        with Verifier(workers=min(8, len(os.sched_getaffinity(0)))) as verifier:
            judged = judge_latex(golds, completions, verifier)
    else:
        judged = judge_number(golds, completions)
    scores = aggregate(args.task, task, params.seed, questions, samples, golds, judged)

    args.verdicts.parent.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": sample["id"],
            "sample": sample["sample"],
            "correct": verdict.correct,
            "strict": verdict.strict,
            "reason": verdict.reason,
            "extracted": verdict.extracted,
            "gold": gold,
            "tokens": sample["tokens"],
            "finish_reason": sample["finish_reason"],
        }
        for sample, gold, verdict in zip(samples, golds, judged, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), args.verdicts)
    args.output.write_text(json.dumps(scores, indent=2) + "\n")
    summary = (
        f"pass@1 {scores['pass_at_1']:.3f} [{scores['pass_at_1_low']:.3f}, {scores['pass_at_1_high']:.3f}], "
        f"{len(questions)} questions x {task.n_samples}"
    )
    item = f"{args.output.parent.name} {args.task}"
    stage.record(args.log, "score", item, LIBRARIES, summary, samples=len(samples))


def in_order(samples: list[dict[str, Any]], ids: list[str], n_samples: int) -> list[dict[str, Any]]:
    """The samples, checked and sorted by question and number.

    Args:
        samples: rows of the samples file.
        ids: the task's Q question ids.
        n_samples: samples that each question must have.

    Returns:
        Q·n rows: all samples of the first question, then of the second, …

    Raises:
        StageError: unless every question has exactly the samples 0 to n - 1.
    """
    again = "run the generate stage again"
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise StageError(f"question {twice[0]} is in the questions file twice; give every question an id of its own")
    place = {key: index for index, key in enumerate(ids)}
    strange = [sample["id"] for sample in samples if sample["id"] not in place]
    if strange:
        raise StageError(f"sample of {strange[0]}, which is not one of the task's {len(ids)} questions; {again}")
    found = Counter((sample["id"], sample["sample"]) for sample in samples)
    double = [key for key, count in found.items() if count > 1]
    if double:
        raise StageError(f"sample {double[0][1]} of question {double[0][0]} is in the samples file twice; {again}")
    for key in ids:
        missing = [index for index in range(n_samples) if (key, index) not in found]
        if missing:
            raise StageError(f"sample {missing[0]} of question {key} is missing and n_samples is {n_samples}; {again}")
    if len(samples) > len(ids) * n_samples:
        raise StageError(f"there are more than n_samples {n_samples} samples per question; {again}")
    return sorted(samples, key=lambda sample: (place[sample["id"]], sample["sample"]))


def judge_latex(golds: list[str], completions: list[str], verifier: Verifier) -> list[Judged]:
    """Compare LaTeX answers: correct by the text after the thought, strict by `<answer>` in the taught format.

    The tags stay in what is judged: math-verify reads LaTeX only behind an anchor, and `<answer>` is one.

    Args:
        golds, completions: n solutions and completions.
    """
    golds = [gold_text(gold) for gold in golds]
    taught = [prompts.parse(completion) for completion in completions]
    lenient = [(gold, prompts.answer_part(text).strip()) for gold, text in zip(golds, completions, strict=True)]
    strict = [
        (gold, f"<answer>\n{parts.answer}\n</answer>") for gold, parts in zip(golds, taught, strict=True) if parts
    ]
    verdicts = verifier.verify(lenient + strict)
    of_strict = iter(verdicts[len(lenient) :])
    return [
        Judged(
            correct=verdict.correct is True,
            strict=parts is not None and next(of_strict).correct is True,
            reason=verdict.reason,
            extracted=verdict.extracted,
        )
        for verdict, parts in zip(verdicts, taught, strict=False)
    ]


def judge_number(golds: list[str], completions: list[str]) -> list[Judged]:
    """Compare numbers: correct by the last number after the thought, strict by `<answer>` in the taught format.

    Args:
        golds, completions: n solutions, plain numbers, and completions.
    """
    judged = []
    for solution, completion in zip(golds, completions, strict=True):
        gold = number(solution)
        last = last_number(prompts.answer_part(completion))
        parts = prompts.parse(completion)
        correct = gold is not None and last == gold
        strict = gold is not None and parts is not None and number(parts.answer) == gold
        if gold is None:
            reason = "gold_unparsed"
        elif last is None:
            reason = "unparsed"
        else:
            reason = "correct" if correct else "wrong"
        judged.append(Judged(correct, strict, reason, _plain(last)[:200]))
    return judged


def aggregate(
    name: str,
    task: Task,
    seed: int,
    questions: "pa.Table",
    samples: list[dict[str, Any]],
    golds: list[str],
    judged: list[Judged],
) -> dict[str, Any]:
    """All numbers of a score file: accuracies by lighteval, intervals and counts by us. Shares are from 0 to 1.

    Args:
        name, task, seed: what params.yaml says.
        questions: Q rows.
        samples, golds, judged: Q·n entries in the order of `in_order`.
    """
    from importlib.metadata import version

    import numpy as np

    from workflow import stats, tasks

    n = task.n_samples
    texts = [sample["completion"] for sample in samples]
    keys = list(zip(golds, texts, strict=True))
    verdicts = {
        "": {key: float(one.correct) for key, one in zip(keys, judged, strict=True)},
        "strict_": {key: float(one.strict) for key, one in zip(keys, judged, strict=True)},
    }
    completions: dict[str, list[str]] = {}
    for sample in samples:
        completions.setdefault(sample["id"], []).append(sample["completion"])
    by_lighteval = tasks.replay(tasks.task_config(name, n, verdicts), questions, completions)

    correct = np.array([one.correct for one in judged], dtype=float).reshape(-1, n)
    strict = np.array([one.strict for one in judged], dtype=float).reshape(-1, n)
    answers = np.array([one.extracted for one in judged], dtype=object).reshape(-1, n).tolist()
    interval = stats.mean_interval(correct)
    strict_interval = stats.mean_interval(strict)
    taught = np.array([prompts.parse(text) is not None for text in texts], dtype=float).reshape(-1, n)
    in_format = stats.mean_interval(taught)
    reasons = Counter(one.reason for one in judged)
    finished = Counter(sample["finish_reason"] for sample in samples)
    accuracies = {
        "pass_at_1": by_lighteval["pass_at_1"],
        "pass_at_1_se": interval.se,
        "pass_at_1_low": interval.low,
        "pass_at_1_high": interval.high,
        "strict_pass_at_1": by_lighteval["strict_pass_at_1"],
        "strict_pass_at_1_se": strict_interval.se,
        "strict_pass_at_1_low": strict_interval.low,
        "strict_pass_at_1_high": strict_interval.high,
        f"pass_at_{n}": by_lighteval[f"pass_at_{n}"],
        # lighteval's own maj@n lets whole completions vote, thoughts included; ours the extracted answers.
        f"maj_at_{n}": stats.maj_at_n(answers, correct).mean(),
        "format_rate": in_format.mean,
        "format_rate_low": in_format.low,
        "format_rate_high": in_format.high,
        "truncated": finished["length"] / len(samples),
        "no_eos": 1 - finished["stop"] / len(samples),
        "unparsed": reasons["unparsed"] / len(samples),
        "timed_out": reasons["timeout"] / len(samples),
        "errors": reasons["error"] / len(samples),
        "gold_unparsed": reasons["gold_unparsed"] / len(samples),
        "mean_tokens": np.mean([sample["tokens"] for sample in samples]),
    }
    return {
        **{key: round(float(value), 6) for key, value in accuracies.items()},
        "n_questions": len(questions),
        "n_samples": n,
        "task": name,
        "answer": task.answer,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "max_tokens": task.max_tokens,
        "dtype": task.dtype,
        "seed": seed,
        "questions_sha256": _fingerprint(questions),
        **{f"version_{library}": version(library) for library in LIBRARIES},
    }


def _read(path: Path, columns: list[str]) -> "pa.Table":
    import pyarrow.parquet as pq

    if not path.is_file():
        raise StageError(f"{path} does not exist; write it with: dvc repro")
    missing = [column for column in columns if column not in pq.read_schema(path).names]
    if missing:
        raise StageError(f"{path} has no column {missing[0]}; it must have {', '.join(columns)}")
    table = pq.read_table(path, columns=columns)
    if not len(table):
        raise StageError(f"{path} has no rows; give the task at least one question")
    return table


def _fingerprint(questions: "pa.Table") -> str:
    """sha256 of the questions as they were asked: two scores with different ones are not comparable."""
    return hashlib.sha256(json.dumps(questions.to_pylist(), sort_keys=True).encode()).hexdigest()


def _plain(value: Decimal | None) -> str:
    """A number for the vote: 42.0 and 42 are one answer."""
    text = "" if value is None else f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


if __name__ == "__main__":
    stage.run(main)
