"""The default recipe gives the scores that are recorded in tests/golden; where it does not, the questions are named.

`python -m tests.e2e.test_golden` records the run in this checkout's data/ anew: only after a change that is meant to
change scores, whose commit then says why.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.checkout import ROOT, Checkout

GOLDEN = ROOT / "tests/golden"
MODELS = ("base", "cold_start", "reasoning")
TASK = "arithmetic"
KEY = ["id", "sample"]
SAMPLE = [*KEY, "seed", "completion", "tokens", "finish_reason"]
VERDICT = ["correct", "strict", "reason", "extracted", "gold"]


def processor() -> str:
    """The processor, as far as it decides how floats are rounded."""
    facts = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    widths = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in facts.get("flags", "").split()]
    return (
        f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}, {' '.join(widths)}"
    )


def of_run(data: Path, model: str) -> pd.DataFrame:
    """Samples and verdicts of one model, a row per sample."""
    samples = pd.read_parquet(data / f"samples/{model}/{TASK}.parquet")[SAMPLE]
    verdicts = pd.read_parquet(data / f"scores/{model}/{TASK}.parquet")[[*KEY, *VERDICT]]
    return samples.merge(verdicts, on=KEY, validate="one_to_one")


def recorded(model: str) -> pd.DataFrame:
    return pd.read_parquet(GOLDEN / f"{model}.parquet")


def changed(before: pd.DataFrame, after: pd.DataFrame, columns: list[str]) -> list[str]:
    """A line for every sample that is not the same, e.g. `arithmetic-000012 sample 3: correct True -> False`."""
    assert before[KEY].values.tolist() == after[KEY].values.tolist()
    different = (before[columns] != after[columns]).any(axis=1)
    return [
        f"{old['id']} sample {old['sample']}: "
        + ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in columns if old[name] != new[name])
        for (_, old), (_, new) in zip(before[different].iterrows(), after[different].iterrows(), strict=True)
    ]


def told(lines: list[str], what: str) -> str:
    questions = {line.split()[0] for line in lines}
    return "\n".join([f"{what}: {len(lines)} samples of {len(questions)} questions changed", *lines[:20]])


def numbers(scores: dict[str, Any]) -> dict[str, Any]:
    """What a score file says about the samples, without the versions that made it."""
    return {
        name: value for name, value in scores.items() if not name.startswith(("version_", "generation_", "settings_"))
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_recorded_samples_are_judged_as_they_were(model: str, tmp_path: Path) -> None:
    """On any machine: a parser or a metric that changed is seen here, question by question."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    rows = recorded(model)
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = json.loads((GOLDEN / "scores.json").read_text())[model]
    table = pa.Table.from_pandas(rows[SAMPLE], preserve_index=False)
    generation = {name.removeprefix("generation_"): scores[name] for name in scores if name.startswith("generation_")}
    generation |= {name: scores[name] for name in ("temperature", "top_p", "max_tokens", "dtype", "n_samples")}
    pq.write_table(table.replace_schema_metadata({"generation": json.dumps(generation)}), tmp_path / "samples.parquet")
    command = [sys.executable, "-m", "workflow.score", TASK, "--samples", "samples.parquet"]
    command += ["--questions", str(GOLDEN / "questions.parquet"), "--output", f"{model}/{TASK}.json"]
    command += ["--verdicts", f"{model}/{TASK}.parquet", "--log", "log"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    lines = changed(rows, pd.read_parquet(tmp_path / f"{model}/{TASK}.parquet"), VERDICT)
    assert not lines, told(lines, f"{model}, scored again")
    assert numbers(json.loads((tmp_path / f"{model}/{TASK}.json").read_text())) == numbers(scores)


def test_a_change_is_told_with_its_question() -> None:
    before = recorded("reasoning")
    after = before.copy()
    after.loc[[5, 9], "correct"] = ~after.loc[[5, 9], "correct"]
    lines = changed(before, after, VERDICT)
    assert [line.split(":")[0] for line in lines] == [f"{before['id'][n]} sample {before['sample'][n]}" for n in (5, 9)]
    assert "correct" in lines[0]
    assert told(lines, "run").startswith("run: 2 samples of 2 questions changed")


def test_the_whole_recipe_gives_the_recorded_scores(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.run("python -m workflow.compose recipe=tiny && dvc repro")
    golden = json.loads((GOLDEN / "scores.json").read_text())
    runs = {model: of_run(tmp_path / "data", model) for model in MODELS}
    accuracy = {model: float(run["correct"].mean()) for model, run in runs.items()}
    # Another processor rounds differently, and training amplifies that: it is another run of the same recipe.
    assert accuracy["base"] < 0.02
    assert 0.4 < accuracy["cold_start"] < 0.75
    assert accuracy["reasoning"] > 0.9
    if golden["processor"] == processor():
        for model, run in runs.items():
            lines = changed(recorded(model), run, ["completion", *VERDICT])
            assert not lines, told(lines, f"{model}, trained and sampled again")


def record() -> None:
    """Write tests/golden from data/."""
    scores: dict[str, Any] = {"processor": processor()}
    for model in MODELS:
        scores[model] = json.loads((ROOT / f"data/scores/{model}/{TASK}.json").read_text())
        of_run(ROOT / "data", model).to_parquet(GOLDEN / f"{model}.parquet", compression="zstd", index=False)
    pd.read_parquet(ROOT / f"data/prepared/{TASK}.parquet").to_parquet(GOLDEN / "questions.parquet", compression="zstd")
    (GOLDEN / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    record()
