"""Turn raw rows into the pipeline's row schema; what does not fit is dropped and counted by reason.

A prepared row has `id`, `prompt` (messages), `completion` (messages in the taught format, or null) and `solution`
(the gold text that a reward or a task compares with, or null). The same row function serves a data set wherever
it comes from: adding a format is adding a function to FORMATS and its name to params.Prepare.format.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import prompts, stage
from workflow.params import load_params, pick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dropped(Exception):
    """This row cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Row:
    """One example: `completion` and `solution` are None where the format has none."""

    question: str
    system: str | None = None
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
    return row[column].strip()


def bespoke_stratos(row: dict[str, Any]) -> Row:
    """Bespoke-Stratos-17k: `system`, `conversations` of {from, value}; thought and solution between markers."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or [isinstance(t, dict) and t.get("from") for t in turns] != ["user", "assistant"]:
        raise Dropped("conversations is not one user and one assistant turn")
    question, response = (text(turn, "value") for turn in turns)
    parts = {}
    for part in ("thought", "solution"):
        found = re.search(rf"<\|begin_of_{part}\|>(.*?)<\|end_of_{part}\|>", response, re.DOTALL)
        if not found or not found[1].strip():
            raise Dropped(f"no {part} between its markers")
        parts[part] = found[1].strip()
    system = row.get("system")
    completion = prompts.build(parts["thought"], parts["solution"])
    return Row(question, system if isinstance(system, str) else None, completion)


def numina_tir(row: dict[str, Any]) -> Row:
    """NuminaMath-TIR: `problem` and a worked `solution` that holds the gold answer."""
    return Row(text(row, "problem"), solution=text(row, "solution"))


def gsm8k(row: dict[str, Any]) -> Row:
    """GSM8K: `question` and `answer`, whose calculator notes <<…>> go and whose gold number follows ####."""
    thought, mark, gold = text(row, "answer").rpartition("####")
    if not mark or not gold.strip() or not thought.strip():
        raise Dropped("answer has no #### number")
    number = gold.strip().replace(",", "")
    thought = re.sub(r"<<.*?>>", "", thought).strip()
    return Row(text(row, "question"), completion=prompts.build(thought, rf"\boxed{{{number}}}"), solution=number)


def math(row: dict[str, Any]) -> Row:
    """MATH and MATH-500: `problem` and `answer` in LaTeX, put in $…$ because a parser only reads LaTeX there."""
    return Row(text(row, "problem"), solution=f"${text(row, 'answer')}$")


FORMATS = {"bespoke_stratos": bespoke_stratos, "numina_tir": numina_tir, "gsm8k": gsm8k, "math": math}


def read_rows(folder: Path, pattern: str) -> Iterator[Any]:
    """Every row of the parquet, jsonl and json files in `folder` that match `pattern`, in name order."""
    import pyarrow as pa

    files = sorted(f for f in folder.glob(pattern) if f.suffix in (".parquet", ".jsonl", ".json"))
    files = [file for file in files if file.name != "source.json"]
    if not files:
        there = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise stage.StageError(f"no parquet, jsonl or json file matches {pattern!r} in {folder}; it has: {there}")
    for file in files:
        try:
            yield from _rows_of(file)
        except (json.JSONDecodeError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise stage.StageError(f"{file} cannot be read ({reason}); mend it or name other files") from None


def _rows_of(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
        return
    content = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json" and content.lstrip().startswith("["):
        yield from json.loads(content)
        return
    for line in content.split("\n"):  # splitlines would also split at U+2028 inside a text
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                yield None


def convert(raw: Any, form: str, system_prompt: str | None, special: set[str]) -> dict[str, Any]:
    """One raw row in the row schema, without its id.

    Raises:
        Dropped: the row lacks something, or its text would turn into the tokenizer's special tokens.
    """
    if not isinstance(raw, dict):
        raise Dropped("not a JSON object")
    row = FORMATS[form](raw)
    system = system_prompt if system_prompt is not None else row.system
    for content in (system, row.question, row.completion):
        if content is not None and any(token in content for token in special):
            raise Dropped("special token in the text")
    prompt = [{"role": "system", "content": system}] if system else []
    completion = [{"role": "assistant", "content": row.completion}] if row.completion else None
    return {
        "prompt": [*prompt, {"role": "user", "content": row.question}],
        "completion": completion,
        "solution": row.solution,
    }


def token_counts(rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """(prompt tokens, prompt + completion tokens) of every row, as the chat template renders them."""
    starts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    wholes = [
        tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) if r["completion"] else start
        for r, start in zip(rows, starts, strict=True)
    ]
    encode = tokenizer(starts + wholes, add_special_tokens=False)["input_ids"] if rows else []
    lengths = [len(ids) for ids in encode]
    return list(zip(lengths[: len(rows)], lengths[len(rows) :], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name under prepare in params.yaml")
    parser.add_argument("--raw", type=Path, required=True, help="folder of the raw data set")
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder whose tokenizer counts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    prepare = pick(params.prepare, args.name, "prepare")

    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer.chat_template is None:
        raise stage.StageError(f"the tokenizer in {args.tokenizer} has no chat template; use an instruct model")
    dropped: Counter[str] = Counter()
    rows = []
    rows_in = 0
    for index, raw in enumerate(read_rows(args.raw, prepare.files)):
        rows_in += 1
        try:
            row = convert(raw, prepare.format, params.system_prompt, set(tokenizer.all_special_tokens))
        except Dropped as reason:
            dropped[str(reason)] += 1
        else:
            rows.append({"id": f"{args.name}-{index:06d}", **row})
    kept = []
    for row, (prompt, whole) in zip(rows, token_counts(rows, tokenizer), strict=True):
        if prompt > prepare.max_prompt_length:
            dropped[f"prompt longer than {prepare.max_prompt_length} tokens"] += 1
        elif whole > prepare.max_length:
            dropped[f"longer than {prepare.max_length} tokens"] += 1
        else:
            kept.append(row)

    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none dropped"
    share = dropped.total() / max(rows_in, 1)
    if share > prepare.max_dropped_share or not kept:
        raise stage.StageError(
            f"prepare.{args.name} kept {len(kept)} of {rows_in} rows ({counts}); mend the data, or raise "
            f"prepare.{args.name}.max_dropped_share above {share:.3f} or the length limits in params.yaml"
        )
    if prepare.rows is not None:
        if len(kept) < prepare.rows:
            raise stage.StageError(f"prepare.{args.name}.rows is {prepare.rows}; write at most {len(kept)}")
        order = sorted(random.Random(params.seed).sample(range(len(kept)), prepare.rows))
        kept = [kept[index] for index in order]

    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("prompt", message), ("completion", message), ("solution", pa.string())])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), args.output)
    stage.record(
        args.log,
        "prepare",
        args.name,
        ["pyarrow", "transformers"],
        f"{len(kept)} of {rows_in} rows ({counts})",
        rows_in=rows_in,
        rows=len(kept),
        dropped=dict(sorted(dropped.items())),
    )


if __name__ == "__main__":
    stage.run(main)
