"""Every published recipe in miniature, through its whole DAG, by the command that the README gives."""

import csv
import json

import pytest
from ruamel.yaml import YAML

from tests.checkout import ROOT, Checkout, readme_commands

RECIPES = list(dict.fromkeys(row["recipe"] for row in csv.DictReader((ROOT / "recipes/published.csv").open())))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One for all: what two recipes have in common is made once."""
    return Checkout(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_through_in_miniature(recipe: str, checkout: Checkout) -> None:
    command = next(command for command in readme_commands() if "MINIATURE=1" in command)
    if f"RECIPE={recipe} " not in command:
        # The README's recipe evaluates all its models on all its tasks, which is most of the time; the others the model
        # that they train on their first task. Every task is in test_every_task.py.
        checkout.run(f"python -m workflow.compose recipe={recipe} --miniature")
        composed = YAML(typ="safe").load(checkout.folder / "params.yaml")
        model, task = composed["generate"]["models"][-1], next(iter(composed["tasks"]))
        command = f"make repro RECIPE={recipe} MINIATURE=1 SET='generate.models=[{model}] task=[{task}]'"
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
