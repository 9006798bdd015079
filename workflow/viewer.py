"""samples.html: a page to look at every sample of a run, opened from the file system without server or network.

A browser lets such a page load scripts and nothing else. So the index (numbers of each sample, and the questions) is a
script, and the texts are scripts of about a megabyte each, loaded when a sample in them is shown.
Equal inputs give equal files.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import prompts
from workflow.pages import REASONS, read_parquet, read_samples, render
from workflow.params import Params
from workflow.stage import StageError

if TYPE_CHECKING:
    import pandas as pd

# A file of texts ends with the sample that makes it so many samples or characters.
FILE_SAMPLES = 400
FILE_CHARACTERS = 1_000_000
# Characters of a question that the search sees, because all questions are loaded at once.
SEARCHED = 2000

KEY = ["id", "sample"]
SAMPLE_COLUMNS = [*KEY, "seed", "completion", "tokens", "finish_reason"]
VERDICT_COLUMNS = [*KEY, "correct", "strict", "reason", "extracted", "gold"]


def write_viewer(params: Params, questions: Path, samples: Path, scores: Path, output: Path) -> None:
    """Write `<output>/samples.html` and the folder `<output>/samples/` that it reads, in place of older ones.

    Args:
        questions: folder of <task>.parquet: id, prompt, solution.
        samples: folder of <model>/<task>.parquet: id, sample, seed, completion, tokens, finish_reason.
        scores: folder of <model>/<task>.parquet: id, sample, correct, strict, reason, extracted, gold.

    Raises:
        StageError: a file is missing, samples and verdicts are not of the same samples, once each, a sample belongs to
            no question, or was judged by another gold than its question's solution.
    """
    asked: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for task_number, task in enumerate(params.tasks):
        for question, answers in asked_questions(params, task, questions, samples, scores):
            rows += [{**answer, "question": len(asked)} for answer in answers]
            asked.append({**question, "task": task_number})
    starts = file_starts([len(row["completion"]) for row in rows])
    verdicts = sorted({(row["reason"], row["correct"]) for row in rows}, key=lambda verdict: (not verdict[1], verdict))
    finishes = sorted({row["finish_reason"] for row in rows})
    index = {
        "models": params.generate.models,
        "tasks": [[name, task.max_tokens] for name, task in params.tasks.items()],
        "verdicts": [[reason, correct, REASONS.get(reason, reason)] for reason, correct in verdicts],
        "finishes": finishes,
        "questions": [[question["id"], question["task"], last_text(question)[:SEARCHED]] for question in asked],
        "searched": SEARCHED if any(len(last_text(question)) > SEARCHED for question in asked) else None,
        "endOfThought": prompts.END_OF_THOUGHT,
        "starts": starts,
        "rows": {
            **{name: [row[name] for row in rows] for name in ("question", "model", "sample", "tokens")},
            "verdict": [verdicts.index((row["reason"], row["correct"])) for row in rows],
            "finish": [finishes.index(row["finish_reason"]) for row in rows],
            "strict": [int(row["strict"]) for row in rows],
        },
    }

    folder = output / "samples"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "index.js").write_text(script("start", index))
    for number, (first, end) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True)):
        here = rows[first:end]
        texts = {
            "questions": {
                row["question"]: {name: asked[row["question"]][name] for name in ("messages", "gold")} for row in here
            },
            "samples": [
                [row["completion"], row["extracted"], row["seed"], prompts.parse(row["completion"]) is not None]
                for row in here
            ],
        }
        (folder / f"{number:04d}.js").write_text(script("addTexts", number, texts))
    shutil.copyfile(Path(__file__).parent / "viewer.js", folder / "viewer.js")
    (output / "samples.html").write_text(render("viewer.html.jinja", {"recipe": params.recipe}))


def file_starts(lengths: list[int]) -> list[int]:
    """The first row of each file of texts, for completions of these many characters."""
    starts, size = [0], 0
    for row, length in enumerate(lengths):
        if size >= FILE_CHARACTERS or row - starts[-1] == FILE_SAMPLES:
            starts.append(row)
            size = 0
        size += length
    return starts


def last_text(question: dict[str, Any]) -> str:
    """What is asked at the end of the messages."""
    return question["messages"][-1][1]


def script(function: str, *values: Any) -> str:
    """A call in JavaScript, in ASCII, that ends no HTML element, whatever the texts in the values are."""
    arguments = (json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c") for value in values)
    return f"{function}({','.join(arguments)});\n"


def asked_questions(
    params: Params, task: str, questions: Path, samples: Path, scores: Path
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each question of a task that was asked: id, messages (role, content) and gold; and its judged samples.

    Questions are in their file's order, samples in that of the models (numbered in the column `model`).
    """
    import pandas as pd

    file = questions / f"{task}.parquet"
    prepared = read_parquet(file, ["id", "prompt", "solution"])
    tables = [
        judged_samples(samples / model / f"{task}.parquet", scores / model / f"{task}.parquet").assign(model=number)
        for number, model in enumerate(params.generate.models)
    ]
    rows = pd.concat(tables, ignore_index=True)
    unknown = rows.loc[~rows["id"].isin(prepared["id"]), "id"]
    if len(unknown):
        raise StageError(f"{unknown.iloc[0]} is no question of {task}; run generate and score again")
    of_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows.sort_values(["model", "sample"], kind="stable").to_dict("records"):
        of_question.setdefault(row["id"], []).append(row)
    for id_, prompt, gold in zip(prepared["id"], prepared["prompt"], prepared["solution"], strict=True):
        answers = of_question.get(id_, [])
        if any(answer["gold"] != gold for answer in answers):
            raise StageError(f"{id_} was judged by another gold than is in {file}; run generate and score again")
        if answers:
            messages = [[message["role"], message["content"]] for message in prompt]
            yield {"id": id_, "messages": messages, "gold": gold}, answers


def judged_samples(samples: Path, verdicts: Path) -> "pd.DataFrame":
    """The samples in one file with their verdicts in the other."""

    given, judged = read_samples(samples, SAMPLE_COLUMNS), read_parquet(verdicts, VERDICT_COLUMNS)
    for file, table in ((samples, given), (verdicts, judged)):
        twice = table[table.duplicated(KEY)]
        if len(twice):
            which = f"sample {twice['sample'].iloc[0]} of {twice['id'].iloc[0]}"
            raise StageError(f"{file} has {which} twice; run the stage that writes it again")
    rows = given.merge(judged, how="outer", on=KEY, indicator="found")
    alone = rows[rows["found"] != "both"]
    if len(alone):
        file = verdicts if alone["found"].iloc[0] == "left_only" else samples
        raise StageError(f"{file} has no sample {alone['sample'].iloc[0]} of {alone['id'].iloc[0]}; run score again")
    return rows.drop(columns="found")
