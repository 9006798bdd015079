"""How raw rows are read: every format of a published data set, as one prompt, completion and gold answer.

The same row function serves a data set wherever it comes from: adding a format is adding a function to FORMATS and
its name to params.Prepare.format.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow import prompts, stage

Message = dict[str, str]

BATCH = 256  # rows of a parquet file that are in memory at a time
ROLES = {"system": "s", "user": "u", "assistant": "a"}
LETTERS = "ABCD"

# What csv, json and pyarrow raise. From pyarrow come OSError for bytes that are no parquet, OverflowError for a date
# or duration that Python has not, KeyError for an unknown time zone, NotImplementedError for an unknown encoding.
UNREADABLE = (csv.Error, ValueError, RecursionError, OSError, OverflowError, KeyError, NotImplementedError)


class Dropped(Exception):
    """This row cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Row:
    """One example: the prompt ends with a user's message; completion and solution are None where there are none."""

    prompt: list[Message]
    completion: str | None = None
    solution: str | None = None


def text(row: dict[str, Any], column: str) -> str:
    """The non-empty string in `column`, stripped; raises Dropped."""
    if column not in row:
        raise Dropped(f"no column {column}")
    if row[column] is None:
        raise Dropped(f"{column} is null")
    if not isinstance(row[column], str):
        raise Dropped(f"{column} is not text")
    if not row[column].strip():
        raise Dropped(f"{column} is empty")
    return unicode(row[column], column).strip()


def unicode(value: str, column: str) -> str:
    r"""The text itself; raises Dropped where it has half a character: JSON can write one (\ud800), parquet cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Dropped(f"{column} has half a character") from None
    return value


def turns(
    row: dict[str, Any], column: str, order: str, otherwise: str, role: str = "role", content: str = "content"
) -> list[Message]:
    """The chat in `column` as messages; raises Dropped(`otherwise`) unless the initials of its roles match `order`.

    A system message without text counts as none. Other keys of a turn are not read: parquet fills those that any
    row has with null.
    """
    if row.get(column) is None:
        raise Dropped(f"{column} is null" if column in row else f"no column {column}")
    chat = row[column]
    if not isinstance(chat, list) or not all(isinstance(turn, dict) for turn in chat):
        raise Dropped(f"{column} {otherwise}")
    if chat and chat[0].get(role) == "system" and not chat[0].get(content):
        chat = chat[1:]
    said = [turn.get(role) for turn in chat]
    if not re.fullmatch(order, "".join(ROLES.get(who, "?") if isinstance(who, str) else "?" for who in said)):
        raise Dropped(f"{column} {otherwise}")
    return [{"role": turn[role], "content": text(turn, content)} for turn in chat]


def ask(question: str, system: str | None = None) -> list[Message]:
    """A prompt with one question."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


def bespoke_stratos(row: dict[str, Any]) -> Row:
    """Bespoke-Stratos-17k: one question and its trace, thought and solution between markers.

    As bespokelabs published it (`system`, `conversations` of {from, value}), or as HuggingFaceH4 did (`messages` of
    {role, content}, with or without the other columns).
    """
    otherwise = "is not one user and one assistant turn"
    if row.get("conversations") is not None:
        chat = turns(row, "conversations", "ua", otherwise, "from", "value")
    else:
        chat = turns(row, "messages", "s?ua", otherwise)
    *prompt, response = chat
    parts = {}
    for part in ("thought", "solution"):
        # No pattern: one that looks for the end from every beginning takes hours where there are many and no end.
        _, _, rest = response["content"].partition(f"<|begin_of_{part}|>")
        inner, ended, _ = rest.partition(f"<|end_of_{part}|>")
        if not ended or not inner.strip():
            raise Dropped(f"no {part} between its markers")
        parts[part] = inner.strip()
    system = row.get("system")
    if len(prompt) == 1 and isinstance(system, str):
        prompt = ask(prompt[0]["content"], unicode(system, "system"))
    return Row(prompt, prompts.build(parts["thought"], parts["solution"]))


def numina_tir(row: dict[str, Any]) -> Row:
    """NuminaMath-TIR and MATH-lighteval: `problem` and a worked `solution` that holds the gold answer."""
    return Row(ask(text(row, "problem")), solution=text(row, "solution"))


def gsm8k(row: dict[str, Any]) -> Row:
    """GSM8K: `question` and `answer`, whose calculator notes <<…>> go and whose gold number follows ####.

    The gold keeps its commas, which every reward but the published ones reads; the taught answer has none.
    """
    thought, mark, gold = text(row, "answer").rpartition("####")
    if not mark or not gold.strip() or not thought.strip():
        raise Dropped("answer has no #### number")
    number = gold.strip().replace(",", "")
    thought = re.sub(r"<<[^<\n]*?>>", "", thought).strip()  # no <: a megabyte of << without >> would take hours
    return Row(ask(text(row, "question")), prompts.build(thought, rf"\boxed{{{number}}}"), gold.strip())


def math(row: dict[str, Any]) -> Row:
    """MATH and MATH-500: `problem` and `answer` in LaTeX, put in $…$ because a parser only reads LaTeX there."""
    return Row(ask(text(row, "problem")), solution=f"${text(row, 'answer')}$")


def aime(row: dict[str, Any]) -> Row:
    """AIME: `problem` and `answer`, an integer from 0 to 999, as a number or as text with or without leading zeros."""
    answer = row["answer"] if type(row.get("answer")) is int else text(row, "answer")
    if not re.fullmatch(r"[0-9]{1,3}", str(answer)):
        raise Dropped("answer is not an integer from 0 to 999")
    return Row(ask(text(row, "problem")), solution=f"${int(answer)}$")


def gpqa(row: dict[str, Any]) -> Row:
    """GPQA: `Question`, `Correct Answer` and `Incorrect Answer 1` to `3`; the gold is the letter of the correct one.

    The options are in the order of the sha256 of question and option: the same in every run and on every machine,
    whatever the seed is.
    """
    question, gold = text(row, "Question"), text(row, "Correct Answer")
    options = [gold, *(text(row, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    if len(set(options)) < len(options):
        raise Dropped("two options are the same")
    options.sort(key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return Row(ask("\n".join([question, "", *lines])), solution=LETTERS[options.index(gold)])


def messages(row: dict[str, Any]) -> Row:
    """Chats: `messages` of {role, content}, of which the last answer is the completion; no gold."""
    *prompt, last = turns(row, "messages", "s?(ua)+", "is not a chat of user and assistant")
    return Row(prompt, last["content"])


def prompt_completion(row: dict[str, Any]) -> Row:
    """`prompt` and `completion`, each a text or messages of {role, content}; no gold."""
    if isinstance(row.get("prompt"), list):
        prompt = turns(row, "prompt", "s?(ua)*u", "is not a chat that ends with the user")
    else:
        prompt = ask(text(row, "prompt"))
    if isinstance(row.get("completion"), list):
        return Row(prompt, turns(row, "completion", "a", "is not one assistant turn")[0]["content"])
    return Row(prompt, text(row, "completion"))


FORMATS = {
    "aime": aime,
    "bespoke_stratos": bespoke_stratos,
    "gpqa": gpqa,
    "gsm8k": gsm8k,
    "math": math,
    "messages": messages,
    "numina_tir": numina_tir,
    "prompt_completion": prompt_completion,
}


def read_rows(folder: Path, pattern: str) -> Iterator[Any]:
    """Every row of the parquet, jsonl, json and csv files in `folder` that match `pattern`, in name order."""
    if not folder.is_dir():
        raise stage.StageError(f"{folder} does not exist; download it first: dvc repro download@{folder.name}")
    files = sorted(f for f in folder.glob(pattern) if f.suffix in (".parquet", ".jsonl", ".json", ".csv"))
    files = [file for file in files if file.name != "source.json"]
    if not files:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise stage.StageError(f"no parquet, jsonl, json or csv file matches {pattern!r} in {folder}; it has: {there}")
    for file in files:
        try:
            yield from _rows_of(file)
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            raise stage.StageError(f"{file} cannot be read ({reason}); mend it or name other files") from None


def _rows_of(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            yield from batch.to_pylist()
        return
    if file.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # instead of 131,072 characters, which a long trace has
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            yield from csv.DictReader(lines, strict=True)
        return
    # Only a newline ends a line: U+2028 may stand inside a text.
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        if file.suffix == ".json" and lines.read(1000).lstrip().startswith("["):
            lines.seek(0)
            yield from json.load(lines)
            return
        lines.seek(0)
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):  # no JSON, a number of too many digits, or nested too deeply
                    yield None


def read(raw: Any, form: str) -> Row:
    """One raw row in the given format; raises Dropped."""
    if not isinstance(raw, dict):
        raise Dropped("not a JSON object")
    return FORMATS[form](raw)


def questions(prompt: list[Message]) -> list[str]:
    """What the user says in a prompt."""
    return [message["content"] for message in prompt if message["role"] == "user"]
