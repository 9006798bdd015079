"""The published recipes compose, resolve to a DAG and hold the published values, and so do their miniatures.

The evaluation tasks go with every recipe, and one is added as docs/tasks.md says.
"""

import csv
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from dvc.utils.hydra import compose_and_dump
from ruamel.yaml import YAML

from workflow.miniature import MAKERS, shrink
from workflow.params import Params, ParamsError

ROOT = Path(__file__).parents[2]
PUBLISHED = list(csv.DictReader((ROOT / "recipes/published.csv").open()))
RECIPES = list(dict.fromkeys(row["recipe"] for row in PUBLISHED))
PHASES = list(dict.fromkeys((row["recipe"], row["phase"]) for row in PUBLISHED))
OPTIONS = ROOT / "tests/pipeline/options.json"
TASKS = sorted(file.stem for file in (ROOT / "recipes/task").glob("*.yaml"))
ALL_RECIPES = sorted(file.stem for file in (ROOT / "recipes/recipe").glob("*.yaml"))
DOCS = (ROOT / "docs/tasks.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore:The version_base parameter", "ignore::DeprecationWarning:dvc")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """params.yaml of every published recipe."""
    folder = tmp_path_factory.mktemp("composed")
    return {recipe: compose(recipe, folder) for recipe in RECIPES}


def compose(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """The recipe as a mapping; written to a file on the way."""
    file = folder / f"{recipe}.yaml"
    data = ["data_dir=/data"] if recipe == "gsm8k_local" else []
    compose_and_dump(str(file), str(ROOT / "recipes"), None, "config", "", [f"recipe={recipe}", *data, *overrides])
    return YAML(typ="safe").load(file)


def test_every_recipe_of_the_issue_is_here() -> None:
    assert set(RECIPES) == {
        "openr1_1_5b",
        "openr1_1_5b_as_published",
        "openr1_1_5b_grpo_from_distill",
        "openr1_math_7b_simplerl",
        "r1_zero_gsm8k",
        "r1_zero_gsm8k_as_published",
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolves_to_a_dag(recipe: str, checkout: Path, environment: dict[str, str]) -> None:
    """By --force: in a fresh checkout DVC's --dry otherwise looks for what the first stage would have made."""
    command = f"python -m workflow.compose recipe={recipe} && dvc repro --dry --force"
    done = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"Running stage '(.+)'", done.stdout + done.stderr)
    params = YAML(typ="safe").load(checkout / "params.yaml")
    pairs = len(params["generate"]["models"]) * len(params["tasks"])
    parts = [params[name] for name in ("sources", "prepare", "sft", "grpo")]
    assert len(stages) == sum(map(len, parts)) + 2 * pairs + 2
    assert stages[-1] == "report"
    for phase in params["sft"] | params["grpo"]:
        assert any(stage.endswith(f"@{phase}") for stage in stages)


def written(phase: str, option: str, params: dict[str, Any]) -> str:
    """The value in params.yaml of what the table names, as the table writes it."""
    kind, name = phase.split(".")
    section = params[kind][name]
    if option == "rewards":
        return ", ".join(f"{reward} {float(weight)}" for reward, weight in section["rewards"].items())
    if option == "max_prompt_length":
        return str(params["prepare"][section["dataset"]]["max_prompt_length"])
    return str(section["global_batch_size"])


@cache
def config(recipe: str, phase: str, text: str) -> dict[str, Any]:
    """All options of the SFTConfig or GRPOConfig that the stage makes, on a CPU with one process."""
    from trl import GRPOConfig, SFTConfig

    from workflow.launch import Hardware, TokensPerDevice
    from workflow.training import trainer_options

    kind, name = phase.split(".")
    params = Params.model_validate(json.loads(text))
    most = TokensPerDevice(sft=10**7, grpo=10**7)
    hardware = Hardware(processes=1, accelerate="ddp", tokens_per_device=most, trainer={"use_cpu": True})
    options = trainer_options(params, kind, name, hardware, "scratch")
    if kind == "grpo":
        options["reward_weights"] = list(params.grpo[name].rewards.values())
    return ({"sft": SFTConfig, "grpo": GRPOConfig}[kind])(**options).to_dict()


@pytest.mark.parametrize(("recipe", "phase"), PHASES)
def test_holds_the_published_values(recipe: str, phase: str, composed: dict[str, dict[str, Any]]) -> None:
    """Every value that the table gives is what TRL's config object ends up with."""
    resolved = config(recipe, phase, json.dumps(composed[recipe]))
    rows = [row for row in PUBLISHED if (row["recipe"], row["phase"]) == (recipe, phase)]
    assert len(rows) > 15
    for row in rows:
        option = row["option"]
        if option in ("global_batch_size", "max_prompt_length", "rewards"):
            value = written(phase, option, composed[recipe])
        else:
            value = resolved[option.split(".")[0]]
            for key in option.split(".")[1:]:
                value = value[key]
            value = str(float(value)) if isinstance(value, float) else str(value)
        assert value == row["value"], option
        if recipe.endswith("_as_published"):
            assert row["value"] == row["published"], option
    batch = resolved["per_device_train_batch_size"] * resolved["gradient_accumulation_steps"]
    assert batch == int(next(row["value"] for row in rows if row["option"] == "global_batch_size"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_gives_a_reason_for_every_difference(recipe: str) -> None:
    for row in PUBLISHED:
        assert row["source"], row
        if row["recipe"] == recipe and row["value"] != row["published"]:
            assert not row["source"].endswith(("e450a6f", "article", "default")), row


# What a config object holds beside the algorithm: where it runs, what is logged, how rollouts are served.
ELSEWHERE = re.compile(
    "(hub|log|report|push|save|dataloader|ddp|fsdp|deepspeed|accelerator|vllm|project|trackio|run_name|use_cpu|disable_tqdm"
    "|output_dir|local_rank|per_device|gradient_accumulation|tf32|torch_compile|jit|past_index|skip_memory|debug"
    "|include_|eval_|do_|prediction|metric|greater|load_best|ignore_data|resume|restore|batch_eval|average_tokens"
    "|auto_find|enable_jit|full_determinism|parallelism|remove_unused|length_column|use_liger|use_transformers"
    "|transformers_|cache_implementation|num_completions|dataset_num|_n_gpu|bf16_full|fp16_full|steps_per|generation_batch)"
)


@pytest.mark.parametrize(("recipe", "phase"), PHASES)
def test_no_other_option_moved(recipe: str, phase: str, composed: dict[str, dict[str, Any]]) -> None:
    """What a recipe does not write is the library's default, noted in options.json: an upgrade that moves one is seen.

    After a change on purpose, write it again: python -m tests.pipeline.test_recipes
    """
    options = algorithm(recipe, phase, composed[recipe])
    assert len(options) > 40
    assert options == json.loads(OPTIONS.read_text())[f"{recipe}.{phase}"]


def algorithm(recipe: str, phase: str, params: dict[str, Any]) -> dict[str, Any]:
    """The options that can change what is learned."""
    resolved = config(recipe, phase, json.dumps(params))
    return {name: value for name, value in sorted(resolved.items()) if not ELSEWHERE.match(name)}


CHANGED = {
    "sources": None,  # all of it
    "prepare": {"files", "max_prompt_length", "max_length"},
    "sft": {"held_out", "global_batch_size"},
    "grpo": {"held_out", "global_batch_size"},
    "trainer": {"max_steps", "logging_steps", "eval_steps", "max_completion_length"},
    "tasks": {"questions", "n_samples", "max_tokens", "dtype"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_miniature_changes_only_sizes(recipe: str, composed: dict[str, dict[str, Any]]) -> None:
    whole, small = composed[recipe], shrink(composed[recipe])
    Params.model_validate(small)
    assert list(small) == list(whole)
    for section in ("recipe", "seed", "system_prompt", "generate", "evaluation"):
        assert small[section] == whole[section]
    for section in ("prepare", "sft", "grpo", "tasks"):
        assert list(small[section]) == list(whole[section])
        for name, item in whole[section].items():
            keys = {key for key, value in small[section][name].items() if item.get(key) != value}
            assert keys - {"trainer"} <= CHANGED[section]
            if "trainer" in item:
                trainer = small[section][name]["trainer"]
                assert {k for k in trainer if trainer[k] != item["trainer"].get(k)} <= CHANGED["trainer"]
    assert {source["origin"] for source in small["sources"].values()} == {"builtin"}


# The evaluation tasks


def task_file(task: str) -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / f"recipes/task/{task}.yaml")


def test_every_task_of_the_issue_is_here() -> None:
    assert set(TASKS) == {"gsm8k", "math_500", "aime24", "aime25", "gpqa_diamond", "arithmetic"}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_file_holds_one_task(task: str) -> None:
    """So that names cannot meet, and a task can be left out without a trace."""
    content = task_file(task)
    assert {section: list(entries) for section, entries in content.items()} == {
        section: [task] for section in ("sources", "prepare", "tasks")
    }
    source = content["sources"][task]
    assert source["origin"] == "builtin" or re.fullmatch(r"[0-9a-f]{40}", source["revision"])
    assert source["licence"]
    prepare = content["prepare"][task]
    assert prepare["source"] == task and prepare["max_dropped_share"] == 0  # no score is over fewer questions


def test_the_documented_table_is_true(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\w+) \| (\S+?),? ?(?:gated|test)? \|$", DOCS, re.MULTILINE)
    assert [row[0] for row in rows] and {row[0] for row in rows} == set(TASKS)
    params = compose("openr1_1_5b", tmp_path, f"task=[{','.join(TASKS)}]")
    for name, questions, samples, answer, data in rows:
        task, source = params["tasks"][name], params["sources"][name]
        assert (int(samples), answer) == (task["n_samples"], task["answer"])
        assert data == source.get("repo", source["origin"])
        assert int(questions) == source.get("options", {}).get("rows", int(questions))
        if name != "arithmetic":
            assert (task["temperature"], task["top_p"], task["dtype"]) == (0.6, 0.95, "bfloat16")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_every_task_goes_with_every_recipe(recipe: str, task: str, tmp_path: Path) -> None:
    """Instead of the recipe's own: nothing of those may be left, and nothing that the recipe trains on may go."""
    params = Params.model_validate(compose(recipe, tmp_path, f"task=[{task}]"))
    own = {"gsm8k", "math_500"} if recipe == "gsm8k_local" else set()
    assert set(params.tasks) == own | {task}
    assert params.evaluation is not None
    if task not in own:
        assert params.prepare[task].tokenizer == params.evaluation.tokenizer
        assert params.tasks[task].max_tokens == params.evaluation.max_tokens
    Params.model_validate(shrink(compose(recipe, tmp_path, f"task=[{task}]")))


# max_position_embeddings in config.json at the revision that the recipes pin.
CONTEXT = {
    "Qwen/Qwen2.5-0.5B-Instruct": 32768,
    "Qwen/Qwen2.5-1.5B-Instruct": 32768,
    "Qwen/Qwen2.5-Math-7B": 4096,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 131072,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_completions_leave_room_for_the_question(recipe: str, composed: dict[str, dict[str, Any]]) -> None:
    params = composed[recipe]
    models = [source["repo"] for source in params["sources"].values() if source["into"] == "models"]
    assert models
    for name, task in params["tasks"].items():
        needed = params["prepare"][name]["max_prompt_length"] + task["max_tokens"]
        assert all(needed <= CONTEXT[model] for model in models)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_sets_are_decontaminated_of_what_is_evaluated(recipe: str, tmp_path: Path) -> None:
    """In the mended recipes; a published one keeps what was trained on.

    oc.dict.keys alone cannot be resolved by omegaconf 2.4.1rc1, so oc.decode reads what it prints.
    """
    for overrides in ([], ["task=[gsm8k]"], ["+task=[aime25,gpqa_diamond]"]):
        params = compose(recipe, tmp_path, *overrides)
        trained = {phase["dataset"] for kind in ("sft", "grpo") for phase in params[kind].values()}
        assert trained and not trained & set(params["tasks"])
        for name in trained:
            expected = [] if recipe.endswith("_as_published") else list(params["tasks"])
            assert params["prepare"][name].get("decontaminate", []) == expected


def test_a_source_that_is_trained_and_evaluated_on_is_one(composed: dict[str, dict[str, Any]]) -> None:
    """A recipe that writes a task's source itself, because it trains on it too, writes the same."""
    both = [(r, t) for r in RECIPES for t in TASKS if t in (recipe_file(r).get("sources") or {})]
    assert both == [("r1_zero_gsm8k", "gsm8k"), ("r1_zero_gsm8k_as_published", "gsm8k")]
    for recipe, task in both:
        assert recipe_file(recipe)["sources"][task] == task_file(task)["sources"][task]
        assert composed[recipe]["sources"][task] == task_file(task)["sources"][task]


def recipe_file(recipe: str) -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / f"recipes/recipe/{recipe}.yaml")


def test_single_values_can_be_set_beside_the_list(tmp_path: Path) -> None:
    params = compose("openr1_1_5b", tmp_path, "task=[aime25]", "tasks.aime25.n_samples=8", "evaluation.max_tokens=100")
    assert params["tasks"]["aime25"] | {"n_samples": 8, "max_tokens": 100} == params["tasks"]["aime25"]
    both = compose("tiny", tmp_path, "task=aime24", "prepare.aime24.max_prompt_length=99")
    assert (list(both["tasks"]), both["prepare"]["aime24"]["max_prompt_length"]) == (["aime24"], 99)


def in_folder(folder: Path, environment: dict[str, str], command: str, fails: bool = False) -> str:
    """The output of a command line."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment | {"COLUMNS": "250"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def committed(checkout: Path, environment: dict[str, str]) -> Path:
    who = "git -c user.name=test -c user.email=test@example.invalid"
    in_folder(checkout, environment, f"git add -A && {who} commit --quiet -m start")
    return checkout


def documented(start: str) -> str:
    """The command in docs/tasks.md that starts with these words, without its comment."""
    block = re.search(r"```bash\n(.*?)```", DOCS, re.DOTALL)[1]
    (found,) = [line.split("  #")[0].strip() for line in block.splitlines() if line.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("start", "tasks"),
    [
        ("python -m workflow.compose recipe=openr1_1_5b 'task=", {"math_500", "aime25"}),
        ("python -m workflow.compose recipe=openr1_1_5b '+task=", {"math_500", "aime24", "aime25"}),
        ("dvc exp run", {"math_500", "aime24", "aime25"}),
    ],
)
def test_documented_commands_choose_the_tasks(
    start: str, tasks: set[str], checkout: Path, environment: dict[str, str]
) -> None:
    """By --dry --force, as in test_resolves_to_a_dag."""
    command = documented(start)
    if start.startswith("dvc"):
        output = in_folder(committed(checkout, environment), environment, f"{command} --dry --force")
    else:
        output = in_folder(checkout, environment, f"{command} && dvc repro --dry --force")
    assert set(re.findall(r"Running stage 'score@base-(\w+)'", output)) == tasks


def test_documented_make_composes_the_same(checkout: Path, environment: dict[str, str]) -> None:
    (command,) = re.findall(r"make (.*)", documented("make repro"))
    composing = documented("python -m workflow.compose recipe=openr1_1_5b '+task=")
    assert composing.replace("'", "") in in_folder(checkout, environment, f"make --dry-run {command}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("'task=[aime26]'", "Could not load 'task/aime26'. (recipes: gsm8k_local, "),
        ("recipe=openr1", "Could not find 'recipe/openr1' (recipes: gsm8k_local, "),
        ("task=aime24,aime25", "To use it as a list, use key=[value1,value2] (recipes: gsm8k_local, "),
    ],
)
def test_a_wrong_name_is_one_sentence_with_the_right_ones(
    overrides: str, says: str, checkout: Path, environment: dict[str, str]
) -> None:
    output = in_folder(checkout, environment, f"python -m workflow.compose {overrides}", fails=True)
    assert output.startswith("error: ") and output.count("\n") == 1
    assert says in output and f"tasks: {', '.join(TASKS)})" in output


def test_no_task_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Params.model_validate(compose("openr1_1_5b", tmp_path, "task=[]"))


def test_a_miniature_needs_builtin_rows(composed: dict[str, dict[str, Any]]) -> None:
    params = json.loads(json.dumps(composed["openr1_1_5b"]))
    params["prepare"]["problems"]["format"] = "prompt_completion"
    assert "prompt_completion" not in MAKERS
    with pytest.raises(ParamsError, match=r"^sources\.numina has the format prompt_completion, of which there is no"):
        shrink(params)


class Stages:
    """A folder in which the stages download and prepare run, with a model and params.yaml of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"PYTHONPATH": str(ROOT)}

    def download(self, name: str, into: str = "raw") -> None:
        self.run(f"python -m workflow.download {name} --output data/{into}/{name} --log log/{name}")

    def prepare(self, name: str) -> list[dict[str, Any]]:
        paths = f"--raw data/raw --tokenizer data/models/base --output {name}.parquet --log log/prepare/{name}"
        self.run(f"python -m workflow.prepare {name} {paths}")
        return pq.read_table(self.folder / f"{name}.parquet").to_pylist()

    def run(self, command: str) -> str:
        return in_folder(self.folder, self.environment, command)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Stages:
    """All tasks in miniature, and the model made."""
    folder = tmp_path_factory.mktemp("miniature")
    params = shrink(compose("openr1_1_5b", folder, f"task=[{','.join(TASKS)}]"))
    YAML().dump(params, folder / "params.yaml")
    stages = Stages(folder, environment)
    stages.download("base", "models")
    return stages


@pytest.mark.parametrize("task", TASKS)
def test_a_task_in_miniature_has_questions_with_golds(task: str, miniature: Stages) -> None:
    """Through the stages themselves, tokenizer and math-verify included."""
    miniature.download(task)
    rows = miniature.prepare(task)
    content = task_file(task)
    assert len(rows) >= 8  # as many are asked in miniature
    assert [row["id"] for row in rows] == [f"{task}-{number:06d}" for number in range(len(rows))]
    shape = {"latex": r"\$\d+\$", "number": r"\d+", "letter": "[A-D]"}[content["tasks"][task]["answer"]]
    assert all(re.fullmatch(shape, row["solution"]) for row in rows)
    instruction = content["prepare"][task].get("instruction", "")
    assert all(row["prompt"][-1]["content"].endswith(instruction) for row in rows)
    assert len({row["prompt"][-1]["content"] for row in rows}) == len(rows)


def block(language: str) -> str:
    """The one block of this language in docs/tasks.md."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)
    return found


def add_task(checkout: Path, environment: dict[str, str]) -> Stages:
    """Do what docs/tasks.md says, with the default recipe."""
    (checkout / "recipes/task/clock.yaml").write_text(block("yaml"))
    (checkout / "clock.jsonl").write_text(block("jsonl"))
    stages = Stages(checkout, environment)
    stages.environment["PYTHONPATH"] = str(checkout)
    return stages


def test_a_task_is_added_as_documented(checkout: Path, environment: dict[str, str]) -> None:
    stages = add_task(checkout, environment)
    (setting,) = re.findall(r'`make repro SET="(.*?)"`', DOCS)
    output = stages.run(f"python -m workflow.compose '{setting}' && dvc repro --dry --force")
    for model in ("base", "cold_start", "reasoning"):
        assert f"Running stage 'score@{model}-clock'" in output
    stages.download("base", "models")
    stages.download("clock")
    rows = stages.prepare("clock")
    assert [row["solution"] for row in rows] == ["$5$", "$2$"]
    assert rows[0]["prompt"][-1]["content"].startswith("It is 3 o'clock.")
    source = json.loads((checkout / "data/raw/clock/source.json").read_text())
    assert (source["origin"], source["licence"]) == ("path:clock.jsonl", "CC0-1.0") and len(source["revision"]) == 40


def test_a_format_is_added_as_documented(checkout: Path, environment: dict[str, str]) -> None:
    stages = add_task(checkout, environment)
    edit(checkout / "workflow/formats.py", "FORMATS = {", f'{block("python")}\n\nFORMATS = {{\n    "riddle": riddle,')
    edit(checkout / "workflow/params.py", '"prompt_completion"]', '"prompt_completion", "riddle"]')
    edit(checkout / "recipes/task/clock.yaml", "format: math", "format: riddle")
    edit(checkout / "recipes/task/clock.yaml", "max_dropped_share: 0", "max_dropped_share: 0.5")
    lines = [{"riddle": "Which hour?", "hour": "5 o'clock"}, {"riddle": "Which?", "hour": "noon"}]
    (checkout / "clock.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stages.run("python -m workflow.compose '+task=[clock]'")
    stages.download("base", "models")
    stages.download("clock")
    assert [row["solution"] for row in stages.prepare("clock")] == ["5"]
    log = json.loads((checkout / "log/prepare/clock/stage.json").read_text())
    assert log["dropped"] == {"hour is not on the clock": 1}


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1, f"{path} has {old!r} {content.count(old)} times"
    path.write_text(content.replace(old, new))


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        found = {f"{r}.{phase}": algorithm(r, phase, compose(r, Path(scratch))) for r, phase in PHASES}
    OPTIONS.write_text(json.dumps(found, indent=1) + "\n")
