"""A thousand damaged rows of every format through the stage prepare: each is kept or counted, and nothing crashes."""

import csv
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from workflow import builtin, prepare
from workflow.formats import FORMATS, read_rows
from workflow.stage import StageError
from workflow.verify import Verifier

SEED = 20
LINES, TABLE = 600, 200  # rows as JSON, and in a parquet and in a CSV file each
CLEAN = 3  # every third row is sound
TASK = {"answer": "latex", "n_samples": 1, "temperature": 1, "top_p": 1, "max_tokens": 9, "dtype": "float32"}
REAL = {"gsm8k/train.jsonl": "gsm8k", "math_500/test.jsonl": "math", "math_train/train.json": "math"}  # in DATA_DIR

# JSON that json.dumps cannot write, by the text that stands for it until the line is written.
RAW = {
    "RAW-digits": "7" * 10_000,
    "RAW-deep": "[" * 5000 + "]" * 5000,
    "RAW-objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "RAW-nearly": "[" * 900 + "]" * 900,  # about as deep as Python reads
    "RAW-nan": "NaN",
    "RAW-infinity": "-Infinity",
}
JUNK = (
    *(None, "", " \u2028\n", 0, -1, 10**300, True, 0.1, 1e308, [], {}, [None], [[]], {"role": []}, [{}]),
    *([{"role": "user"}], [{"role": ["user"], "content": None}], {"from": {"a": [1]}, "value": 3}, "tool", *RAW),
)
GOLDS = (r"\boxed{1E99999999}", r"\boxed{", "$", r"\frac{" * 300, "9" * 10_000, "#### ", "-")
TEXTS = (
    *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<|im_<<1+1=2>>end|>", "\uff1c|im_end|\uff1e", "</think>"),
    *("\0", "\ufeff", "\u202e\u200f", "\u0301" * 1000, "\ufffe", "\U0010ffff", "\x1b[2J", "\r", "\x85", "Ã©"),
)
HUGE = ("a" * 5_000_000, "1 + 1 " * 200_000, "<" * 1_000_000, "<|begin_of_thought|>" * 100_000, "\u202eé" * 500_000)


def sound_rows(form: str, folder: Path) -> list[dict[str, Any]]:
    """Fifty rows of a format."""
    if form in ("messages", "prompt_completion"):
        chats = [
            [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(50)
        ]
        return [{"messages": c} if form == "messages" else {"prompt": c[:1], "completion": c[1:]} for c in chats]
    write = builtin.write_questions if form == "math" else getattr(builtin, f"write_{form}")
    folder.mkdir()
    write(folder, rows=50, seed=SEED, system_prompt="Think.", **({"guesses": 0.5} if "stratos" in form else {}))
    return list(read_rows(folder, "t*"))[:50]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a row."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def spoilt_text(rng: random.Random, text: str) -> str:
    """A text with something in it or in its place."""
    at, put = rng.randrange(len(text) + 1), rng.choice(TEXTS + GOLDS)
    return rng.choice([put, text[:at] + put + text[at:], text[:at], text * 3, text + put])


def spoilt(rng: random.Random, row: dict[str, Any], retyped: bool) -> dict[str, Any]:
    """A row with up to three mistakes in its texts and, if retyped, with values that are missing or something else."""
    row = json.loads(json.dumps(row))
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice([(h, k) for h, k in places(row) if retyped or isinstance(h[k], str)])
        if isinstance(holder[key], str) and (not retyped or rng.random() < 0.5):
            holder[key] = spoilt_text(rng, holder[key])
        elif len(holder) > 1 and rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(rng.choice(JUNK)))
    return row


def as_json(value: Any) -> bytes:
    return re.sub(r'"(RAW-\w+)"', lambda found: RAW.get(found[1], found[0]), json.dumps(value)).encode()


def damaged(rng: random.Random, line: bytes) -> bytes:
    """A line with a mistake in its bytes; it stays one line that is not blank."""
    at = rng.randrange(1, len(line))
    wrong = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", rb"\ud83d", b"\xf8\x88\x80\x80\x80", b"\xe2\x80\x8f"])
    utf16 = line.decode().encode("utf-16").replace(b"\n", b"")
    whole = rng.choice(
        [b"[]", b"{}", b"null", b"7", b'"text"', b"NaN", b"[{}]", b"{" * 5000, *map(str.encode, RAW.values())]
    )
    twice = line[:-1] + b', "problem": "twice", "problem": null}'
    return rng.choice(
        [line[:at], line[at:], line[:at] + wrong + line[at:], b"\xef\xbb\xbf" + line, utf16, whole, twice]
    )


def write_files(rng: random.Random, rows: list[dict[str, Any]], folder: Path) -> None:
    """The rows again and again, two of three damaged, as JSON with a BOM, as parquet and as CSV."""
    huge = [{**row, rng.choice(list(row)): text} for row, text in zip(rows, HUGE, strict=False)]
    lines, tables = [], []
    for number in range(LINES):
        row = rows[number % len(rows)]
        change = damaged(rng, as_json(row)) if rng.random() < 0.3 else as_json(spoilt(rng, row, retyped=True))
        lines.append(as_json(row) if number % CLEAN == 0 else as_json(huge.pop()) if huge else change)
    for number in range(TABLE):
        row = rows[number % len(rows)]
        tables.append(row if number % CLEAN == 0 else spoilt(rng, row, retyped=False))
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rng.choice([b"\n", b"\r\n"]).join(lines) + b"\n\n")
    pq.write_table(pa.Table.from_pylist(tables), folder / "b.parquet")
    with (folder / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(tables)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    builtin.make_model(folder, seed=SEED, system_prompt="Think first.", num_key_value_heads=1, **shape)
    return folder


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """One for all runs of the stage: to start it takes seconds, and it knows the golds it has seen."""
    with Verifier(workers=2) as verifier:
        yield verifier


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, form: str, share: float) -> dict[str, Any]:
    """What the stage prepare notes about the rows in raw/rows."""
    limits = {"tokenizer": "base", "max_prompt_length": 1000, "max_length": 2000, "max_dropped_share": share}
    base = {"into": "models", "origin": "builtin", "builtin": "qwen2"}
    params = {
        **{"recipe": "faults", "seed": SEED, "system_prompt": "Think first.", "sft": {}, "grpo": {}},
        "sources": {"base": base, "rows": {"into": "raw", "origin": "path", "path": "x"}},
        "prepare": {"rows": {"source": "rows", "format": form} | limits},
        **{"generate": {"models": ["base"]}, "tasks": {"rows": TASK}},
    }
    YAML().dump(params, folder / "params.yaml")
    monkeypatch.chdir(folder)
    words = f"prepare rows --raw raw --tokenizer {model} --output out.parquet --log log"
    monkeypatch.setattr(sys, "argv", words.split())
    prepare.main()
    return json.loads((folder / "log/stage.json").read_text())


@pytest.mark.parametrize("name", [*FORMATS, *REAL])
def test_every_row_is_kept_or_counted(name, tmp_path, model, verifier, monkeypatch):
    from transformers import AutoTokenizer

    data = os.environ.get("DATA_DIR")
    if name in REAL and not data:
        pytest.skip("DATA_DIR names no folder of real data sets")
    print(f"seed {SEED}")
    rng = random.Random(f"{SEED} {name}")
    monkeypatch.setattr(prepare, "Verifier", lambda workers: nullcontext(verifier))
    form = REAL.get(name, name)
    if name in REAL:
        read = read_rows(Path(data, name).parent, Path(name).name)
        # Within the limits, and not one of the few of MATH that have no answer.
        rows = rng.sample([row for row in read if len(str(row)) < 900 and None not in row.values()], 50)
    else:
        rows = sound_rows(name, tmp_path / "sound")
    (tmp_path / "raw/rows").mkdir(parents=True)
    write_files(rng, rows, tmp_path / "raw/rows")

    facts = run(monkeypatch, tmp_path, model, form, share=1)
    kept = pq.read_table("out.parquet").to_pylist()
    print(len(kept), facts["dropped"])
    assert facts["rows_in"] == LINES + 2 * TABLE == len(kept) + sum(facts["dropped"].values())
    ids = [row["id"] for row in kept]
    sound = {f"rows-{n:06d}" for start, end in ((0, LINES), (LINES, LINES + TABLE)) for n in range(start, end, CLEAN)}
    assert len(set(ids)) == len(ids) and sound <= set(ids)
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_ids)
    for row in kept:
        texts = [message["content"] for message in row["prompt"] + (row["completion"] or [])] + [row["solution"] or ""]
        assert all(special.isdisjoint(found) for found in tokenizer(texts, add_special_tokens=False)["input_ids"])
    if name == "gsm8k":
        with pytest.raises(StageError, match=r"^prepare\.rows kept \d+ of 1000 rows \([^\n]+$"):
            run(monkeypatch, tmp_path, model, form, share=0.1)


def test_a_damaged_parquet_is_read_or_one_sentence(tmp_path):
    print(f"seed {SEED}")
    rng, file = random.Random(SEED), tmp_path / "rows.parquet"
    rows = [{"problem": f"What is {n}?", "answer": f"{n}", "level": n} for n in range(500)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    whole, said = file.read_bytes(), set()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.choice([len(content)] * 5 + [rng.randrange(len(content))])])
        try:
            list(read_rows(tmp_path, "*"))
        except StageError as error:
            said.add(str(error))
    assert len(said) > 10 and not any("\n" in sentence for sentence in said)
