"""What the pages and tables share: reading what they are made from, numbers as text, and the templates."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import charts, stage
from workflow.charts import MINUS

if TYPE_CHECKING:
    import pandas as pd

NBSP = "\u00a0"

ENDS = ("", "_low", "_high")  # of a share's name in a score file: the estimate and its 95 % interval

REASONS = {
    "correct": "the answer equals the gold answer",
    "wrong": "the answer differs from the gold answer",
    "unparsed": "no answer could be read",
    "gold_unparsed": "the gold answer could not be read",
    "timeout": "comparing the answers took too long",
    "error": "comparing the answers failed",
}


# Reading


def existing(file: Path) -> Path:
    """The file; a StageError where there is none."""
    if not file.is_file():
        raise stage.StageError(f"{file} does not exist; run the stage that writes it, e.g. with: dvc repro")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object; a StageError where the file is missing or not JSON."""
    try:
        return json.loads(existing(file).read_text())
    except json.JSONDecodeError as error:
        raise stage.StageError(f"{file} is not JSON ({error}); delete it and run its stage again") from None


def read_parquet(file: Path, columns: list[str] | None = None) -> "pd.DataFrame":
    """A parquet file, or the named columns of it; a StageError where it is missing."""
    import pandas as pd

    return pd.read_parquet(existing(file), columns=columns)


def read_samples(file: Path, columns: list[str]) -> "pd.DataFrame":
    """Columns of a samples file; in completions what is not UTF-8 becomes U+FFFD."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(existing(file), columns=columns)
    texts = table["completion"].cast(pa.large_binary()).to_pylist()
    rows = table.drop_columns("completion").to_pandas()
    rows["completion"] = [text.decode(errors="replace") for text in texts]
    return rows[columns]


# Numbers as text


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal."""
    return f"{100 * share:.1f}{NBSP}%"


def points(difference: float) -> str:
    """A difference of two shares as signed percentage points."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def bound(difference: float) -> str:
    """An interval bound in percentage points: signed only when negative."""
    return points(difference).removeprefix("+")


def p_value(p: float) -> str:
    """`p < .001` or `p = .043`."""
    return f"p{NBSP}<{NBSP}.001" if p < 0.001 else f"p{NBSP}={NBSP}{min(p, 1):.3f}".replace("0.", ".")


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def memory(mib: float) -> str:
    """MiB as `812 MiB` or `3.4 GiB`."""
    return f"{mib:.0f}{NBSP}MiB" if mib < 1024 else f"{mib / 1024:.1f}{NBSP}GiB"


def with_interval(value: str, low: str, high: str) -> str:
    """`55.8 [53.6, 58.0]`, so that columns of them are aligned."""
    return f"{value} [{low:>5}, {high:>5}]"


# Templates


def render(template: str, values: dict[str, Any]) -> str:
    """A template beside this file, filled in. HTML and SVG are escaped, because completions may hold anything."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: str(name).endswith((".html.jinja", ".svg.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (percent, points, bound, p_value, duration, memory, charts.axis_label)
    environment.filters.update({function.__name__: function for function in filters})
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    return environment.get_template(template).render(values)
