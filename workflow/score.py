"""Judge the stored samples of one model on one task: verdicts per sample, accuracies with error bars."""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import stage
from workflow.judge import VERSION, Judged, judge_latex, judge_letter, judge_number, option
from workflow.params import Task, load_params, pick
from workflow.stage import StageError
from workflow.verify import Verifier, number

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

QUESTION_COLUMNS = ["id", "prompt", "solution"]
# Completions as bytes: one that is not UTF-8 is no reason to lose the others, and most take less memory than as text.
SAMPLE_COLUMNS = {
    "id": "string",
    "sample": "int64",
    "completion": "large_binary",
    "tokens": "int64",
    "finish_reason": "string",
}
SAMPLING = ["temperature", "top_p", "max_tokens", "dtype", "n_samples"]
PARSERS = ["latex2sympy2_extended", "math-verify", "sympy"]
LIBRARIES = [*PARSERS, "lighteval", "numpy", "scipy", "statsmodels"]
AT_A_TIME = 1000  # samples that are read
AGAIN = "run the generate stage again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="a task in params.yaml")
    parser.add_argument("--samples", type=Path, required=True, help="parquet of the generate stage")
    parser.add_argument("--questions", type=Path, required=True, help="parquet of the prepare stage")
    parser.add_argument("--output", type=Path, required=True, help="scores, flat JSON")
    parser.add_argument("--verdicts", type=Path, required=True, help="parquet, one row per sample")
    parser.add_argument("--log", type=Path, required=True, help="folder for stage.json")
    args = parser.parse_args()
    stage.stoppable(f"score {args.output.parent.name} {args.task}")
    stage.alone(args.output)
    params = load_params()
    task = pick(params.tasks, args.task, "tasks")

    questions = read_questions(args.questions, task.questions)
    generation = read_generation(args.samples, task)
    solutions = dict(zip(questions["id"].to_pylist(), questions["solution"].to_pylist(), strict=True))
    samples = in_order(read_samples(args.samples), questions["id"].to_pylist(), task.n_samples)
    check_golds(task, solutions)
    golds = [solutions[sample["id"]] for sample in samples]
    with ThreadPoolExecutor(1) as background:
        judging = background.submit(judge, task, golds, [sample["completion"] for sample in samples])
        # lighteval takes seconds to import, as judging does, which is done by other processes.
        from workflow import tasks
    judged = judging.result()

    accuracies = aggregate(samples, judged, task.n_samples)
    verdicts = {
        "": [float(one.correct) for one in judged],
        "strict_": [float(one.strict) for one in judged],
    }
    by_lighteval = tasks.replay(tasks.task_config(args.task, task.n_samples, verdicts), questions)
    for name in accuracies.keys() & by_lighteval.keys():
        if abs(accuracies[name] - by_lighteval[name]) > 1e-9:
            raise AssertionError(f"{name} is {accuracies[name]} by workflow.stats, {by_lighteval[name]} by lighteval")

    settings = comparable(task, questions, generation)
    scores = {
        **{name: round(float(value), 6) for name, value in accuracies.items()},
        "n_questions": len(questions),
        "task": args.task,
        "seed": params.seed,
        **settings,
        "settings_sha256": fingerprint(settings),
        **versions(LIBRARIES),
    }
    write(args.output, scores, args.verdicts, samples, golds, judged)
    summary = (
        f"pass@1 {scores['pass_at_1']:.3f} [{scores['pass_at_1_low']:.3f}, {scores['pass_at_1_high']:.3f}], "
        f"{len(questions)} questions x {task.n_samples}"
    )
    item = f"{args.output.parent.name} {args.task}"
    outs = [args.output, args.verdicts]
    stage.record(args.log, "score", item, LIBRARIES, summary, outs, samples=len(samples))


# Reading


def open_parquet(path: Path, columns: Iterable[str]) -> "pq.ParquetFile":
    """A parquet file; raises StageError where it is none, or has no row or none of a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise StageError(f"{path} does not exist; write it with: dvc repro")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it with: dvc repro") from None
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise StageError(f"{path} has no column {missing[0]}; it must have {', '.join(columns)}")
    if not file.metadata.num_rows:
        raise StageError(f"{path} has no rows; give the task at least one question")
    return file


def read_questions(path: Path, count: int | None) -> "pa.Table":
    """The first `count` questions, or all: id, prompt, solution.

    Raises:
        StageError: there are fewer, or a question has no id, no solution, or text that is not UTF-8.
    """
    again = "run the prepare stage again"
    table = open_parquet(path, QUESTION_COLUMNS).read(QUESTION_COLUMNS)
    if len(table) < (count or 1):
        raise StageError(f"{path} has {len(table)} questions and the task asks {count}; ask less")
    table = table.slice(0, count)
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        raise StageError(f"{path} has text that is not UTF-8; {again}") from None
    for row in rows:
        if not isinstance(row["id"], str):
            raise StageError(f"{path} has the id {row['id']!r}, which is no text; {again}")
        if row["solution"] is None:
            raise StageError(f"question {row['id']} has no solution; name a data set whose format has them")
        if not isinstance(row["solution"], str):
            raise StageError(f"the solution of question {row['id']} is no text; {again}")
    return table


def read_samples(path: Path) -> list[dict[str, Any]]:
    """One row per sample, the completion as bytes.

    Raises:
        StageError: a value is missing or of another type.
    """
    import pyarrow as pa

    file = open_parquet(path, SAMPLE_COLUMNS)
    rows: list[dict[str, Any]] = []
    for batch in file.iter_batches(AT_A_TIME, columns=list(SAMPLE_COLUMNS)):
        columns: dict[str, list[Any]] = {}
        for name, kind in SAMPLE_COLUMNS.items():
            try:
                columns[name] = batch[name].cast(kind).to_pylist()
            except (pa.ArrowException, UnicodeDecodeError):
                raise StageError(f"column {name} of {path} does not hold {kind.split('_')[-1]}; {AGAIN}") from None
            if None in columns[name]:
                raise StageError(f"row {len(rows) + columns[name].index(None)} of {path} has no {name}; {AGAIN}")
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def read_generation(path: Path, task: Task) -> dict[str, Any]:
    """How the samples were made: what the generate stage wrote into the file, but for what params.yaml says too.

    Raises:
        StageError: the file does not say it, or not what params.yaml says.
    """
    metadata = open_parquet(path, SAMPLE_COLUMNS).schema_arrow.metadata or {}
    if b"generation" not in metadata:
        raise StageError(f"{path} does not say how its samples were made; {AGAIN}")
    generation = json.loads(metadata[b"generation"])
    for name, value in task.model_dump(include=set(SAMPLING)).items():
        if generation.pop(name, value) != value:
            raise StageError(f"{path} was not sampled with {name} {value}, which params.yaml has; {AGAIN}")
    return generation


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
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise StageError(f"question {twice[0]} is in the questions file twice; give every question an id of its own")
    place = {key: index for index, key in enumerate(ids)}
    strange = [sample["id"] for sample in samples if sample["id"] not in place]
    if strange:
        raise StageError(f"sample of {strange[0]}, which is not one of the task's {len(ids)} questions; {AGAIN}")
    found = Counter((sample["id"], sample["sample"]) for sample in samples)
    double = [key for key, count in found.items() if count > 1]
    if double:
        raise StageError(f"sample {double[0][1]} of question {double[0][0]} is in the samples file twice; {AGAIN}")
    for key in ids:
        missing = [index for index in range(n_samples) if (key, index) not in found]
        if missing:
            raise StageError(f"sample {missing[0]} of question {key} is missing and n_samples is {n_samples}; {AGAIN}")
    if len(samples) > len(ids) * n_samples:
        raise StageError(f"there are more than n_samples {n_samples} samples per question; {AGAIN}")
    return sorted(samples, key=lambda sample: (place[sample["id"]], sample["sample"]))


# Judging


def check_golds(task: Task, solutions: dict[str, str]) -> None:
    """Raise StageError where a gold is not of the kind that the task compares: no answer to it could be right.

    LaTeX is not looked at: the stage prepare has dropped and counted the golds that math-verify cannot read.
    """
    read = {"latex": str, "letter": option, "number": number}[task.answer]
    for key, solution in solutions.items():
        if read(solution) is None:
            raise StageError(
                f"the solution of {key} is {solution[:50]!r}, which is no {task.answer}; write another answer"
            )


def judge(task: Task, golds: list[str], completions: list[bytes]) -> list[Judged]:
    """The verdicts on n completions, in their order; bytes that are not UTF-8 are read as U+FFFD."""
    texts = (text.decode(errors="replace") for text in completions)
    if task.answer == "letter":
        return judge_letter(golds, texts)
    if task.answer == "number":
        return judge_number(golds, texts)
    with Verifier(workers=min(8, len(os.sched_getaffinity(0)))) as verifier:
        verifier.start()
        return judge_latex(golds, texts, verifier)


def aggregate(samples: list[dict[str, Any]], judged: list[Judged], n: int) -> dict[str, float]:
    """Accuracies with their intervals, and shares from 0 to 1.

    Args:
        samples, judged: Q·n entries in the order of `in_order`.
        n: samples per question.
    """
    import numpy as np

    from workflow import stats

    correct, strict, taught = (
        np.array(flags, dtype=float).reshape(-1, n)
        for flags in zip(*((one.correct, one.strict, one.taught) for one in judged), strict=True)
    )
    answers = [[one.extracted for one in judged[start : start + n]] for start in range(0, len(judged), n)]
    numbers = {
        **_with_interval("pass_at_1", correct),
        **_with_interval("strict_pass_at_1", strict),
        **{f"pass_at_{2**i}": stats.pass_at_k(correct, 2**i).mean() for i in range(1, n.bit_length())},
    }
    if n > 1:
        numbers |= _with_interval(f"pass_at_{n}", stats.pass_at_k(correct, n)[:, None])
    # lighteval's own maj@n lets whole completions vote, thoughts included; ours the extracted answers.
    numbers |= _with_interval(f"maj_at_{n}", stats.maj_at_n(answers, correct)[:, None])
    reasons = Counter(one.reason for one in judged)
    finished = Counter(sample["finish_reason"] for sample in samples)
    return {
        **numbers,
        **_with_interval("format_rate", taught),
        "truncated": finished["length"] / len(samples),
        "no_eos": 1 - finished["stop"] / len(samples),
        "unparsed": reasons["unparsed"] / len(samples),
        "timed_out": reasons["timeout"] / len(samples),
        "errors": reasons["error"] / len(samples),
        "gold_unparsed": reasons["gold_unparsed"] / len(samples),
        "mean_tokens": np.mean([sample["tokens"] for sample in samples]),
    }


def _with_interval(name: str, scores: "np.ndarray") -> dict[str, float]:
    from workflow import stats

    interval = stats.mean_interval(scores)
    return {
        name: interval.mean,
        f"{name}_se": interval.se,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


# Writing


def comparable(task: Task, questions: "pa.Table", generation: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal in two score files for their numbers to be comparable, flat; the seed is not part of it.

    Prompt (by the questions and the chat template), sampling, numeric type, parallelism and the versions of what
    sampled and parsed: the same model moved by points where only these changed (Hochlehnert et al., arXiv 2504.07086).
    """
    plain = (str, int, float, bool, type(None))
    return {
        "answer": task.answer,
        **task.model_dump(include=set(SAMPLING)),
        "questions_sha256": fingerprint(questions.to_pylist()),
        **{
            f"generation_{name}": value if isinstance(value, plain) else json.dumps(value, sort_keys=True)
            for name, value in generation.items()
        },
        "version_judge": VERSION,
        **versions(PARSERS),
    }


def fingerprint(value: Any) -> str:
    """sha256 of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions(libraries: list[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {f"version_{library}": version(library) for library in libraries}


def write(
    output: Path,
    scores: dict[str, Any],
    verdicts: Path,
    samples: list[dict[str, Any]],
    golds: list[str],
    judged: list[Judged],
) -> None:
    """Write the scores and one verdict per sample, each whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    parts = {path: path.with_name(f"{path.name}.part") for path in (verdicts, output)}
    for path in parts:
        path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with stage.writing(parts[verdicts], table.nbytes):
        pq.write_table(table, parts[verdicts])
    parts[output].write_text(json.dumps(scores, indent=2) + "\n")
    for path, part in parts.items():
        part.replace(path)


if __name__ == "__main__":
    stage.run(main)
