"""Every evaluation task in miniature, from its questions to its score."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from ruamel.yaml import YAML

from tests.checkout import ROOT, Checkout

TASKS = sorted(file.stem for file in (ROOT / "recipes/task").glob("*.yaml"))


def test_every_task_runs_through_in_miniature(tmp_path: Path) -> None:
    """With a model that nothing was taught. The ids of the prepared questions are those of samples and verdicts."""
    checkout = Checkout(tmp_path)
    chosen = f"'task=[{','.join(TASKS)}]' generate.models=[base] '~grpo.reasoning'"
    checkout.run(f"python -m workflow.compose recipe=r1_zero_gsm8k {chosen} --miniature && dvc repro")
    params = YAML(typ="safe").load(checkout.folder / "params.yaml")
    assert list(params["tasks"]) == TASKS and len(TASKS) == 6
    for task, options in params["tasks"].items():
        questions = pq.read_table(checkout.folder / f"data/prepared/{task}.parquet").to_pylist()[:8]
        ids = [question["id"] for question in questions for _ in range(2)]
        samples = pq.read_table(checkout.folder / f"data/samples/base/{task}.parquet")
        verdicts = pq.read_table(checkout.folder / f"data/scores/base/{task}.parquet")
        assert samples["id"].to_pylist() == verdicts["id"].to_pylist() == ids
        assert verdicts["gold"].to_pylist() == [question["solution"] for question in questions for _ in range(2)]
        assert not {"gold_unparsed", "error"} & set(verdicts["reason"].to_pylist())
        scores = json.loads((checkout.folder / f"data/scores/base/{task}.json").read_text())
        assert (scores["n_questions"], scores["n_samples"], scores["answer"]) == (8, 2, options["answer"])
