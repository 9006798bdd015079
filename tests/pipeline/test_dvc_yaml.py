"""dvc.yaml is complete and says nothing that is not so: code, parameters, names, recipes."""

import ast
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML

from workflow.download import check_paths
from workflow.launch import check_batches, load_hardware
from workflow.params import Params, ParamsError, load_params
from workflow.pipeline import load_stages

ROOT = Path(__file__).parents[2]
ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = load_stages(ROOT)
RECIPES = sorted(file.stem for file in (ROOT / "recipes/recipe").glob("*.yaml"))
HARDWARE = sorted(file.stem for file in (ROOT / "workflow/hardware").glob("*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore:The version_base parameter", "ignore::DeprecationWarning:dvc")


def body(entry: str) -> dict[str, Any]:
    """The stage under foreach or matrix, or the plain one."""
    return ENTRIES[entry].get("do", ENTRIES[entry])


def modules(entry: str) -> list[str]:
    """The modules whose main() the entry runs: the cmd's, and the one that launch starts."""
    words = body(entry)["cmd"].split()
    assert words[:3] == ["exec", "python", "-m"]
    first = words[3].removeprefix("workflow.")
    return [first, words[4]] if first == "launch" else [first]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"workflow/{module}.py").read_text())


def imports(module: str, runs: bool) -> set[str]:
    """The modules of workflow that a module imports anywhere.

    Without what its main() imports, unless that is what runs: importing a module does not run its main().
    """
    found = set()
    nodes = [n for n in tree(module).body if runs or not (isinstance(n, ast.FunctionDef) and n.name == "main")]
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("workflow.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write absolute imports"
            if node.module == "workflow":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("workflow."):
                found.add(node.module.split(".")[1])
    return found


def closure(entry: str) -> set[str]:
    """Every module of workflow that the entry's command executes."""
    mains = modules(entry)
    found, waiting = set(), list(mains)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports(module, runs=module in mains)
    return found


def test_what_is_looked_at():
    assert list(ENTRIES) == ["check", "download", "prepare", "sft", "grpo", "generate", "score", "report"]
    assert {"tiny"} <= set(RECIPES) and {stage.entry for stage in STAGES.values()} == set(ENTRIES)
    assert imports("grpo", runs=True) >= {"stage", "params", "rewards", "training", "verify"}
    assert imports("grpo", runs=False) == {"stage", "params"}
    assert closure("prepare") == {"decontaminate", "formats", "params", "prepare", "prompts", "stage", "verify"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_that_runs_is_a_dependency_and_no_other(entry):
    listed = {dep for dep in body(entry)["deps"] if dep.startswith("workflow/")}
    assert {dep for dep in listed if dep.endswith(".py")} == {f"workflow/{module}.py" for module in closure(entry)}
    assert all((ROOT / dep).is_file() for dep in listed)


@pytest.mark.parametrize("entry", ENTRIES)
def test_templates_that_are_read_are_dependencies(entry):
    files = {file.name for file in (ROOT / "workflow").iterdir() if file.suffix in (".jinja", ".js")}
    source = "".join((ROOT / f"workflow/{module}.py").read_text() for module in closure(entry))
    read = {f"workflow/{name}" for name in files if name in source}
    assert {dep for dep in body(entry)["deps"] if dep.startswith("workflow/") and not dep.endswith(".py")} == read
    assert files


def test_the_package_itself_does_nothing():
    """It is imported by every stage and is a dependency of none."""
    assert [type(node) for node in tree("__init__").body] == [ast.Expr]


@pytest.mark.parametrize("entry", ENTRIES)
def test_deps_are_sorted_and_written_once(entry):
    code = [dep for dep in body(entry)["deps"] if dep.startswith("workflow/")]
    assert code == sorted(set(code))


@pytest.mark.parametrize("entry", ENTRIES)
def test_sections_of_the_params_that_are_read_are_listed(entry):
    """What main() and its module read of params.yaml; the checks of the whole file are not among it."""
    read = set()
    for module in modules(entry):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params":
                read |= {"sft", "grpo"} if node.attr == "phases" else {node.attr}
    listed = {param.split(".")[0] for param in body(entry)["params"] if isinstance(param, str)}
    assert read and read <= set(Params.model_fields)
    assert read <= listed or {"params.yaml": None} in body(entry)["params"]  # check: the whole file


@pytest.mark.parametrize("name", STAGES)
def test_parameters_exist(name):
    """load_stages looks every one of them up, in params.yaml or pyproject.toml."""
    params = STAGES[name].params
    if name == "check":
        assert set(params) == {"params.yaml:"} and params["params.yaml:"]["recipe"] == "tiny"
        return
    assert len(params) >= 3 and None not in params.values()
    files = {key.partition(":")[0] for key in params}
    assert files == {"params.yaml", "pyproject.toml"}
    libraries = [value for key, value in params.items() if key.startswith("pyproject.toml:")]
    assert all("==" in line for lines in libraries for line in lines)


def test_a_parameter_that_is_not_there_is_an_error(checkout):
    text = (checkout / "dvc.yaml").read_text()
    (checkout / "dvc.yaml").write_text(text.replace("- system_prompt\n", "- sistem_prompt\n", 1))
    with pytest.raises(KeyError, match="sistem_prompt"):
        load_stages(checkout)


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_plain_command(entry):
    command = body(entry)["cmd"]
    assert isinstance(command, str) and command == " ".join(command.split())
    assert not re.search(r"[|<>;&`\\\n]|\$\(", command)
    assert command.count("python") == 1 and command.startswith("exec python -m workflow.")


@pytest.mark.parametrize("name", STAGES)
def test_one_name_per_thing(name):
    stage = STAGES[name]
    assert (ROOT / f"workflow/{stage.entry}.py").is_file()
    assert modules(stage.entry)[-1] == stage.entry
    logs = re.findall(r"--log (\S+)", stage.command)
    assert [log.split("/")[:3] for log in logs] == (
        # The report's own cost is not known while it is written, and what check writes never changes.
        [] if stage.entry in ("check", "report") else [["data", "logs", stage.entry]]
    )
    assert set(logs) <= set(stage.outs)
    assert all(out.startswith("data/") or out == "metrics.json" for out in stage.outs)


def test_outputs_overlap_nowhere():
    outs = [out for stage in STAGES.values() for out in stage.outs]
    assert len(outs) > 10
    for i, one in enumerate(outs):
        assert not [other for other in outs[:i] if (one + "/").startswith(other + "/") or other.startswith(one + "/")]


@pytest.mark.parametrize("name", STAGES)
def test_paths_of_the_command_are_the_deps_and_outs(name):
    """A path in a command that DVC is not told of would be missing in a clone."""
    stage = STAGES[name]
    told = {*stage.outs, *(out for other in stage.upstream for out in STAGES[other].outs)}
    paths = {word for word in stage.command.split() if word.startswith("data/") or word.endswith(".json")}
    assert paths and all(path in told or any(out.startswith(path + "/") for out in told) for path in paths)
    assert set(stage.outs) <= paths


def test_models_to_evaluate_are_made():
    outs = {out for stage in STAGES.values() for out in stage.outs}
    models = load_params(ROOT / "params.yaml").generate.models
    assert models and {f"data/models/{model}" for model in models} <= outs


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_says_what_it_does(entry):
    assert re.fullmatch(r"[A-Z].{20,}[^.]", body(entry)["desc"])


def compose(file: Path, *overrides: str) -> None:
    compose_and_dump(str(file), str(ROOT / "recipes"), None, "config", "", list(overrides))


def test_committed_params_are_the_default_recipe(tmp_path):
    """What `dvc exp run -S …` and `make repro RECIPE=tiny` write."""
    compose(tmp_path / "params.yaml", "recipe=tiny")
    composed = (tmp_path / "params.yaml").read_text()
    assert (ROOT / "params.yaml").read_text() == composed
    compose(tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == composed


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_validates_and_resolves(recipe, checkout, tmp_path, monkeypatch):
    needs_data = "data_dir" in yaml.safe_load((ROOT / f"recipes/recipe/{recipe}.yaml").read_text())
    folder = tmp_path / "some data"
    overrides = [f"recipe={recipe}", *([f"data_dir='{folder}'"] if needs_data else [])]
    compose(checkout / "params.yaml", *overrides)
    params = load_params(checkout / "params.yaml")
    assert params.recipe == recipe

    corpora = [source.options["corpus"] for source in params.sources.values() if "corpus" in source.options]
    paths = [Path(p) for p in [*(source.path for source in params.sources.values() if source.path), *corpora]]
    assert bool(paths) == needs_data
    for path in paths:
        assert path.is_relative_to(folder)
        with pytest.raises(ParamsError, match="does not exist"):
            check_paths(params)
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    check_paths(params)
    for name in HARDWARE:
        monkeypatch.setenv("HARDWARE", name)
        if name == "gpu_8x80gb_server" and not recipe.startswith("openr1"):
            # Its seven trainers divide what was published for seven, and of the others it says which batch they could.
            with pytest.raises(ParamsError, match=r"cannot be divided over 7 processes; write \d+"):
                check_batches(params, load_hardware())
        else:
            check_batches(params, load_hardware())

    stages = load_stages(checkout)
    assert {stage.entry for stage in stages.values()} >= set(ENTRIES) - {"sft", "grpo"}
    assert {name.partition("@")[2] for name in stages if name.startswith(("sft@", "grpo@"))} == set(params.phases)
    outs = {out for stage in stages.values() for out in stage.outs}
    assert {f"data/models/{model}" for model in params.generate.models} <= outs
    for stage in stages.values():
        assert "${" not in stage.command and "???" not in str(stage.params)
        assert stage.upstream or stage.entry == "check"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_without_its_data_says_what_to_give(recipe, tmp_path):
    if "data_dir" not in yaml.safe_load((ROOT / f"recipes/recipe/{recipe}.yaml").read_text()):
        compose(tmp_path / "params.yaml", f"recipe={recipe}")
        load_params(tmp_path / "params.yaml")
        return
    with pytest.raises((ParamsError, OmegaConfBaseException), match="data_dir"):
        compose(tmp_path / "params.yaml", f"recipe={recipe}")
        load_params(tmp_path / "params.yaml")


def test_load_stages_needs_nothing_but_three_files(checkout):
    """No dvc.lock, no data, no code: the Snakefile is parsed again inside every job."""
    (checkout / "dvc.lock").write_text("{garbage")
    shutil.rmtree(checkout / "workflow")
    shutil.rmtree(checkout / "data", ignore_errors=True)
    before = sorted(checkout.rglob("*"))
    assert list(load_stages(checkout)) == list(STAGES)
    new = {str(path.relative_to(checkout)) for path in set(checkout.rglob("*")) - set(before)}
    assert {name.split("/")[0] for name in new} <= {".dvc"}


@pytest.mark.parametrize(
    ("reward", "read", "upstream"),
    [
        ("own.rewards.short", "own/rewards.py", "check"),
        ("judge", "data/models/judge", "download@judge"),
    ],
)
def test_what_a_reward_reads_is_a_dependency(reward, read, upstream, checkout):
    """A change of an own reward re-runs the phase, and a reward model is downloaded before it."""
    file = checkout / "params.yaml"
    compose(file)
    values = YAML(typ="safe").load(file)
    values["sources"]["judge"] = values["sources"]["base"]
    values["grpo"]["reasoning"] |= {"rewards": {reward: 1.0}, "rewards_read": read}
    YAML().dump(values, file)
    load_params(file)
    stage = load_stages(checkout)["grpo@reasoning"]
    assert read in stage.files or upstream in stage.upstream
    assert (read in stage.files) == read.endswith(".py")
