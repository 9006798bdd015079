"""Turn raw rows into the pipeline's row schema; what does not fit is dropped and counted by reason.

A prepared row has `id`, `prompt` (messages), `completion` (messages in the taught format, or null) and `solution`
(the gold text that a reward or a task compares with, or null). A mixture draws rows of other prepared sets, which it
reads and filters itself.
"""

import argparse
import csv
import json
import os
import random
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import stage
from workflow.decontaminate import WORDS, ngrams, shared_ngram
from workflow.formats import Dropped, Row, questions, read, read_rows
from workflow.params import Prepare, load_params, pick
from workflow.verify import Verifier, gold_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256  # rows in work at a time: tokenised, traces of 5,000 tokens take a megabyte each
ENCODED = 32  # texts
BINS = [end for k in range(4, 24) for end in (2**k, 3 * 2 ** (k - 1))]  # 16, 24, 32, 48, 64, … tokens
LIMITS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # lengths for which the report says what they would cut


def evaluation_ngrams(name: str, entry: Prepare, raw: Path) -> set[str]:
    """The n-grams of all questions of an evaluation set, those of rows that its own stage drops or cuts included."""
    known: set[str] = set()
    for row in read_rows(raw / entry.source, entry.files):
        try:
            asked = questions(read(row, entry.format).prompt)
        except Dropped:
            continue  # there is no question to be asked
        known.update(ngram for question in asked for ngram in ngrams(question))
    if not known:
        raise stage.StageError(
            f"no row in {raw / entry.source} is a question in the format of prepare.{name}, so nothing can be "
            f"decontaminated with it; mend prepare.{name}.files or .format"
        )
    return known


# Filtering


def convert(row: Row, system_prompt: str | None, instruction: str | None, special: set[str]) -> dict[str, Any]:
    """One example in the row schema, without its id.

    Args:
        system_prompt: instead of the row's own, which None keeps; an empty text leaves it out.
        instruction: put behind every question, on a line of its own.
        special: the tokenizer's special tokens.

    Raises:
        Dropped: a text would turn into special tokens.
    """
    prompt = row.prompt
    if system_prompt is not None:
        own = [message for message in prompt if message["role"] != "system"]
        prompt = [{"role": "system", "content": system_prompt}, *own] if system_prompt else own
    if instruction is not None:
        prompt = [
            {**message, "content": f"{message['content']}\n{instruction}"} if message["role"] == "user" else message
            for message in prompt
        ]
    for content in (*(message["content"] for message in prompt), row.completion or "", row.solution or ""):
        if any(token in content for token in special):
            raise Dropped("special token in the text")
    completion = [{"role": "assistant", "content": row.completion}] if row.completion else None
    return {"prompt": prompt, "completion": completion, "solution": row.solution}


def unreadable_golds(rows: list[dict[str, Any]], verifier: Verifier) -> set[str]:
    """Ids of the rows with a solution in which math-verify finds no answer, so that no completion can be rewarded."""
    golds = [row for row in rows if row["solution"] is not None]
    verdicts = verifier.verify([(gold_text(row["solution"]), "") for row in golds])
    # An empty answer is "unparsed" where the gold was read: then only the gold's parsing costs time.
    return {row["id"] for row, verdict in zip(golds, verdicts, strict=True) if verdict.reason != "unparsed"}


def most_characters(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> int:
    """So many characters that no max_length tokens can stand for all of them.

    The name of a byte-level token has a character per byte, and composing (NFC) makes two bytes of three characters
    at most, so a token stands for less than twice as many characters as the longest name has.
    """
    return (max_length + 1) * 2 * max(len(token) for token in tokenizer.get_vocab())


def token_counts(
    rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", most: int | None = None
) -> list[tuple[int, int]]:
    """(prompt tokens, prompt + completion tokens) of every row, as the chat template renders them.

    Args:
        most: characters of a text that are counted, for those that are too long anyway; None counts all.
    """
    starts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    wholes = [
        tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) if r["completion"] else start
        for r, start in zip(rows, starts, strict=True)
    ]
    # A text of 5 MB takes 15 s and 2.6 GB, and 256 such at a time all there is.
    texts = [text[:most] for text in starts + wholes]
    encoded = (
        tokenizer(texts[start : start + ENCODED], add_special_tokens=False)["input_ids"]
        for start in range(0, len(texts), ENCODED)
    )
    lengths = [len(ids) for batch in encoded for ids in batch]
    return list(zip(lengths[: len(rows)], lengths[len(rows) :], strict=True))


@dataclass
class Part:
    """What filtering made of one raw data set."""

    rows_in: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)  # dropped rows by reason, without the contaminated ones
    contaminated: list[dict[str, str]] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)  # also of rows that are dropped for their length

    @property
    def dropped(self) -> Counter[str]:
        """All dropped rows by reason."""
        return self.bad + Counter(f"sharing {WORDS} words with {row['task']}" for row in self.contaminated)


def filter_rows(
    name: str,
    entry: Prepare,
    raw: Path,
    system_prompt: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    evaluation: dict[str, set[str]],
    verifier: Verifier,
) -> Part:
    """Convert the rows of one raw data set and drop the bad, contaminated and too long ones.

    Args:
        system_prompt: where the entry has none of its own.
        evaluation: the n-grams of every evaluation set, by name; those in entry.decontaminate are looked up.
    """
    part = Part()
    system_prompt = system_prompt if entry.system_prompt is None else entry.system_prompt or None
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    most = most_characters(tokenizer, entry.max_length)
    evaluation = {task: evaluation[task] for task in entry.decontaminate}
    numbered = enumerate(read_rows(raw / entry.source, entry.files))
    while batch := list(islice(numbered, BATCH)):
        part.rows_in += len(batch)
        rows = []
        for index, found in batch:
            row_id = f"{name}-{index:06d}"
            try:
                example = read(found, entry.format)
                row = convert(example, system_prompt, entry.instruction, special)
            except Dropped as reason:
                part.bad[str(reason)] += 1
                continue
            asked = questions(example.prompt)  # without the instruction, which evaluation sets may have too
            if shared := shared_ngram(asked, evaluation):
                task, ngram = shared
                part.contaminated.append({"id": row_id, "task": task, "ngram": ngram, "question": asked[-1][:200]})
            else:
                rows.append({"id": row_id, **row})
        if unreadable := unreadable_golds(rows, verifier):
            part.bad["gold answer not readable"] += len(unreadable)
            rows = [row for row in rows if row["id"] not in unreadable]
        for row, (prompt, whole) in zip(rows, token_counts(rows, tokenizer, most), strict=True):
            part.lengths.append((prompt, whole))
            if prompt > entry.max_prompt_length:
                part.bad[f"prompt longer than {entry.max_prompt_length} tokens"] += 1
            elif whole > entry.max_length:
                part.bad[f"longer than {entry.max_length} tokens"] += 1
            else:
                part.rows.append(row)
    if not part.rows_in:
        raise stage.StageError(f"the files in {raw / entry.source} that match {entry.files!r} have no rows; add some")
    return part


def within(part: Prepare, mixture: Prepare) -> Prepare:
    """A part's entry, narrowed by the mixture's limits, and with its system prompt and instruction where it has them.

    Lengths are counted with the mixture's tokenizer, whatever the part's own is.
    """
    return part.model_copy(
        update={
            "system_prompt": part.system_prompt if mixture.system_prompt is None else mixture.system_prompt,
            "instruction": part.instruction if mixture.instruction is None else mixture.instruction,
            "max_prompt_length": min(part.max_prompt_length, mixture.max_prompt_length),
            "max_length": min(part.max_length, mixture.max_length),
            "decontaminate": [*part.decontaminate, *mixture.decontaminate],
        }
    )


def check_kept(name: str, entry: Prepare, parts: dict[str, Part]) -> str:
    """How many rows were dropped for which reasons, in words; raises StageError when too few are left.

    Contaminated rows are not bad ones, so they do not count towards max_dropped_share.
    """
    for part_name, part in parts.items():
        if not part.rows:
            raise stage.StageError(
                f"prepare.{name} kept 0 of {part.rows_in} rows of {part_name} ({_in_words(part.dropped)}); "
                f"check the data, prepare.{part_name}.format and the length limits in params.yaml"
            )
    rows_in = sum(part.rows_in for part in parts.values())
    counts = _in_words(sum((part.dropped for part in parts.values()), Counter()))
    share = sum(part.bad.total() for part in parts.values()) / rows_in
    if share > entry.max_dropped_share:
        raise stage.StageError(
            f"prepare.{name} kept {sum(len(part.rows) for part in parts.values())} of {rows_in} rows ({counts}); mend "
            f"the data, or raise prepare.{name}.max_dropped_share above {share:.3f} or the length limits in params.yaml"
        )
    if not entry.mixture and entry.rows is not None and len(parts[name].rows) < entry.rows:
        raise stage.StageError(f"prepare.{name}.rows is {entry.rows}; write at most {len(parts[name].rows)}")
    return counts


def _in_words(dropped: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in dropped.most_common()) or "none dropped"


# Drawing


def draw(rows: list[dict[str, Any]], most: int | None, seed: int) -> list[dict[str, Any]]:
    """At most so many rows, drawn with the seed and kept in order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), most))]


def shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """`total` divided in proportion to the weights into whole numbers, by largest remainder."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    whole = {name: int(number) for name, number in exact.items()}
    rest = total - sum(whole.values())
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:rest]:
        whole[name] += 1
    return whole


def mix(name: str, entry: Prepare, parts: dict[str, list[dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """entry.rows rows of all parts in the proportions of entry.mixture, drawn without replacement and shuffled.

    Raises:
        StageError: a part has too few rows, or lacks the completions or solutions that another one has.
    """
    filled = {
        part: " and ".join(column for column in ("completion", "solution") if rows[0][column] is not None)
        for part, rows in parts.items()
    }
    if len(set(filled.values())) > 1:
        has = ", ".join(f"{part} has {columns}" for part, columns in filled.items())
        raise stage.StageError(
            f"prepare.{name}.mixture has parts with different columns ({has}); mix only data sets that have the same"
        )

    def missing(total: int) -> list[str]:
        wanted = shares(total, entry.mixture).items()
        return [
            f"{part} has only {len(parts[part])} of its {number}"
            for part, number in wanted
            if number > len(parts[part])
        ]

    if missing(entry.rows):
        most = next(total for total in range(entry.rows - 1, 0, -1) if not missing(total))
        raise stage.StageError(
            f"prepare.{name}.rows is {entry.rows}, but {', '.join(missing(entry.rows))}; write at most {most}"
        )
    rng = random.Random(seed)
    rows = [
        row for part, number in shares(entry.rows, entry.mixture).items() for row in rng.sample(parts[part], number)
    ]
    rng.shuffle(rows)
    return rows


# Results


def length_report(lengths: list[tuple[int, int]], max_prompt_length: int, max_length: int) -> dict[str, Any]:
    """How long the rows are, in tokens: of the prompt, and of prompt and completion together (`whole`).

    Quantiles are lengths that occur: the smallest one that so large a share of the rows does not exceed. A row counts
    in the first bin of the histogram whose `up_to` it does not exceed.
    """
    columns = {"prompt": sorted(prompt for prompt, _ in lengths), "whole": sorted(whole for _, whole in lengths)}
    ends = BINS[: bisect_left(BINS, columns["whole"][-1]) + 1]
    binned = {name: Counter(bisect_left(ends, length) for length in values) for name, values in columns.items()}

    def beyond(limit: int, name: str = "whole") -> float:
        return sum(length > limit for length in columns[name]) / len(lengths)

    return {
        "rows": len(lengths),
        **{
            name: {
                "mean": round(sum(values) / len(values), 1),
                **{f"p{q}": values[ceil(q / 100 * len(values)) - 1] for q in (50, 90, 95, 99)},
                "max": values[-1],
            }
            for name, values in columns.items()
        },
        "beyond_max_prompt_length": beyond(max_prompt_length, "prompt"),
        "beyond_max_length": beyond(max_length),
        "longer_than": {str(limit): beyond(limit) for limit in LIMITS},
        "histogram": [
            {"up_to": end, **{name: numbers[index] for name, numbers in binned.items()}}
            for index, end in enumerate(ends)
        ],
    }


def write_parquet(rows: list[dict[str, Any]], output: Path) -> None:
    """Write rows in the row schema, a thousand at a time, so that they are not all in memory twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("prompt", message), ("completion", message), ("solution", pa.string())])
    output.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(output, schema) as writer:
        for start in range(0, len(rows), 1000):
            writer.write_table(pa.Table.from_pylist(rows[start : start + 1000], schema=schema))


def write_logs(log: Path, histogram: list[dict[str, int]], contaminated: list[dict[str, str]]) -> None:
    """Write lengths.csv for plots, and contaminated.jsonl: what was dropped because of which words."""
    log.mkdir(parents=True, exist_ok=True)
    with (log / "lengths.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["up_to", "prompt", "whole"])
        writer.writeheader()
        writer.writerows(histogram)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in contaminated)
    (log / "contaminated.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name under prepare in params.yaml")
    parser.add_argument("--raw", type=Path, required=True, help="folder of all raw data sets")
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder whose tokenizer counts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    stage.stoppable(f"prepare {args.name}")
    stage.alone(args.output)
    params = load_params()
    entry = pick(params.prepare, args.name, "prepare")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer.chat_template is None:
        raise stage.StageError(f"the tokenizer in {args.tokenizer} has no chat template; use an instruct model")
    entries = {part: within(params.prepare[part], entry) for part in entry.mixture} or {args.name: entry}
    tasks = {task for part in entries.values() for task in part.decontaminate}
    evaluation = {task: evaluation_ngrams(task, params.prepare[task], args.raw) for task in tasks}
    with Verifier(workers=min(8, len(os.sched_getaffinity(0)))) as verifier:
        parts = {
            name: filter_rows(name, part, args.raw, params.system_prompt, tokenizer, evaluation, verifier)
            for name, part in entries.items()
        }
    counts = check_kept(args.name, entry, parts)
    drawn = {name: draw(part.rows, entries[name].rows, params.seed) for name, part in parts.items()}
    rows = mix(args.name, entry, drawn, params.seed) if entry.mixture else drawn[args.name]

    write_parquet(rows, args.output)
    lengths = [pair for part in parts.values() for pair in part.lengths]
    report = length_report(lengths, entry.max_prompt_length, entry.max_length)
    write_logs(args.log, report["histogram"], [row for part in parts.values() for row in part.contaminated])
    rows_in = sum(part.rows_in for part in parts.values())
    used = Counter(row["id"].rpartition("-")[0] for row in rows)
    stage.record(
        args.log,
        "prepare",
        args.name,
        ["math-verify", "pyarrow", "transformers"],
        f"{len(rows)} of {rows_in} rows ({counts}), median {report['whole']['p50']} tokens",
        [args.output],
        rows_in=rows_in,
        rows=len(rows),
        dropped=dict(sorted(sum((part.dropped for part in parts.values()), Counter()).items())),
        parts={
            name: {"rows_in": part.rows_in, "rows": used[name], "dropped": dict(sorted(part.dropped.items()))}
            for name, part in parts.items()
        },
        lengths=report,
    )


if __name__ == "__main__":
    stage.run(main)
