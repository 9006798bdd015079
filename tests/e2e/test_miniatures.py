"""Every published recipe in miniature, through its whole DAG, by the command that the README gives.

And every evaluation task in miniature, from its questions to its score.
"""

import csv
import json

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from tests.checkout import ROOT, TRIED, Checkout, readme_commands

TASKS = sorted(file.stem for file in (ROOT / "recipes/task").glob("*.yaml"))
RECIPES = list(dict.fromkeys(row["recipe"] for row in csv.DictReader((ROOT / "recipes/published.csv").open())))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One for all: what two recipes have in common is made once."""
    return Checkout(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_through_in_miniature(recipe: str, checkout: Checkout) -> None:
    command = next(command for command in readme_commands() if "MINIATURE=1" in command)
    if f"RECIPE={recipe} " in command:
        TRIED.add(command)
    else:  # one recipe evaluates all its models, which is most of the time; the others what they train
        checkout.run(f"python -m workflow.compose recipe={recipe} --miniature")
        models = YAML(typ="safe").load(checkout.folder / "params.yaml")["generate"]["models"]
        command = f"make repro RECIPE={recipe} MINIATURE=1 SET='generate.models=[{models[-1]}]'"
    output = checkout.run(command)
    assert "Traceback" not in output
    params = YAML(typ="safe").load(checkout.folder / "params.yaml")
    assert params["recipe"] == recipe
    for kind in ("sft", "grpo"):
        for phase, options in params[kind].items():
            folder = checkout.folder / "data/models" / phase
            assert (folder / "model.safetensors").is_file()
            assert (folder / "generation_config.json").is_file()
            assert not (folder / "training_args.bin").exists()
            rows = list(csv.DictReader((checkout.folder / f"data/logs/{kind}/{phase}/history.csv").open()))
            assert [int(row["step"]) for row in rows] == [1, 2]
            assert float(rows[-1]["eval_loss" if kind == "sft" else "eval_reward"]) >= -10
            for reward in options.get("rewards", {}):
                assert rows[-1][f"rewards/{reward}/mean"] != ""
    for model in params["generate"]["models"]:
        for task in params["tasks"]:
            scores = json.loads((checkout.folder / f"data/scores/{model}/{task}.json").read_text())
            assert (scores["n_questions"], scores["n_samples"]) == (8, 2)
    assert recipe in (checkout.folder / "data/report/model_card.md").read_text()


def test_every_task_runs_through_in_miniature(checkout: Checkout) -> None:
    """With a model that nothing was taught. The ids of the prepared questions are those of samples and verdicts."""
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
