import ast
import dataclasses
import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workflow.launch import Hardware, TokensPerDevice, check_batches
from workflow.params import NOT_IN_TRAINER, ParamsError, check_paths, load_params, option_types

ROOT = Path(__file__).parents[2]
MODULES = sorted(file.stem for file in (ROOT / "workflow").glob("*.py") if file.stem != "__init__")
# Imported by the stages inside main() only.
HEAVY = {"rollouts", "rows", "tasks", "training"}
COMMANDS = [name for name in MODULES if "ArgumentParser(" in (ROOT / f"workflow/{name}.py").read_text()]
FRAMEWORKS = ("datasets", "deepspeed", "lighteval", "torch", "transformers", "trl", "vllm")

DELETE = object()


def spoil(values: dict[str, Any], where: str, value: Any) -> None:
    """Set (or DELETE) the value at a dotted path; `a.0` is the first item of a list."""
    *parents, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    for part in parents:
        values = values[part]
    if value is DELETE:
        del values[last]
    else:
        values[last] = value


def message(path: Path) -> str:
    """What load_params says about a wrong file, without the file's name."""
    with pytest.raises(ParamsError) as error:
        load_params(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text and "pydantic" not in text
    return text.removeprefix(f"{path}: ")


def test_sound_params_are_typed_and_frozen(sound, write_params):
    params = load_params(write_params(sound))
    assert params.sft["cold_start"].trainer["learning_rate"] == 0.003
    assert params.sources["traces"].options == {"rows": 10, "guesses": 0.5}
    assert params.prepare["problems"].max_dropped_share == 0.05
    assert list(params.phases) == ["cold_start", "reasoning"]
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 1


def test_only_grpo_is_sound(sound, write_params):
    sound["sft"] = {}
    sound["grpo"]["reasoning"]["start_from"] = "base"
    assert list(load_params(write_params(sound)).phases) == ["reasoning"]


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        # unknown keys, with the near one
        ("sede", 1, "sede is not a known key; write seed"),
        ("xyz", 1, "xyz is not a known key; write one of: recipe, seed, data_dir"),
        ("sources.base.optoins", {}, "sources.base.optoins is not a known key; write options"),
        ("prepare.traces.max_lenght", 9, "prepare.traces.max_lenght is not a known key; write max_length"),
        ("sft.cold_start.global_batch", 9, "sft.cold_start.global_batch is not a known key; write global_batch_size"),
        ("sft.cold_start.rewards", {}, "sft.cold_start.rewards is not a known key; write one of: start_from, dataset"),
        ("grpo.reasoning.reward", {}, "grpo.reasoning.reward is not a known key; write rewards"),
        ("generate.model", [], "generate.model is not a known key; write models"),
        ("tasks.problems.temprature", 1, "tasks.problems.temprature is not a known key; write temperature"),
        (
            "sft.cold_start.lora",
            {"rank": 8},
            "sft.cold_start.lora.rank is not a known key; write one of: r, lora_alpha",
        ),
        ("evaluation", {"max_token": 9}, "evaluation.max_token is not a known key; write max_tokens"),
        # wrong types and values
        ("seed", "42", "seed is '42'; write what fits: input should be a valid integer"),
        ("seed", -1, "seed is -1; write what fits: input should be greater than or equal to 0"),
        ("seed", True, "seed is True; write what fits: input should be a valid integer"),
        ("sft", None, "sft is None; write what fits: input should be a valid dictionary"),
        ("grpo", [], "grpo is []; write what fits: input should be a valid dictionary"),
        ("sources.base.into", "model", "sources.base.into is 'model'; write what fits: input should be 'models' or"),
        ("prepare.traces.format", "json", "prepare.traces.format is 'json'; write what fits: input should be 'aime"),
        ("prepare.traces.rows", 0, "prepare.traces.rows is 0; write what fits: input should be greater than 0"),
        ("prepare.traces.max_dropped_share", 5, "prepare.traces.max_dropped_share is 5; write what fits: input should"),
        ("sft.cold_start.global_batch_size", 6.4, "sft.cold_start.global_batch_size is 6.4; write what fits: input"),
        ("grpo.reasoning.rewards.format", "1", "grpo.reasoning.rewards.format is '1'; write what fits: input should"),
        ("grpo.reasoning.rewards", {}, "grpo.reasoning.rewards is {}; write what fits: dictionary should have at"),
        ("generate.models", [], "generate.models is []; write what fits: list should have at least 1 item"),
        (
            "tasks.problems.answer",
            "text",
            "tasks.problems.answer is 'text'; write what fits: input should be 'latex', 'l",
        ),
        ("evaluation", {"tokenizer": "base"}, "evaluation.max_tokens is missing; add it"),
        (
            "prepare.traces.decontaminate",
            ["aime24"],
            "prepare.traces.decontaminate is 'aime24', which is not defined; w",
        ),
        ("tasks", {}, "tasks is {}; write what fits: dictionary should have at least 1 item"),
        ("tasks.problems.top_p", 1.5, "tasks.problems.top_p is 1.5; write what fits: input should be less than or"),
        ("sources.Big Name", {"into": "raw"}, "sources.Big Name is 'Big Name'; write what fits: string should match"),
        # missing keys
        ("seed", DELETE, "seed is missing; add it"),
        ("tasks", DELETE, "tasks is missing; add it"),
        ("prepare.traces.max_length", DELETE, "prepare.traces.max_length is missing; add it"),
        ("grpo.reasoning.rewards", DELETE, "grpo.reasoning.rewards is missing; add it"),
        # names of things that are not there
        ("sft.cold_start.start_from", "bas", "sft.cold_start.start_from is 'bas', which is not defined; write one of:"),
        ("sft.cold_start.start_from", "traces", "sft.cold_start.start_from is 'traces', which is not defined; write"),
        ("sft.cold_start.start_from", "cold_start", "which is not defined; write one of: base, reasoning"),
        ("sft.cold_start.dataset", "trace", "sft.cold_start.dataset is 'trace', which is not defined; write one of: "),
        ("prepare.traces.tokenizer", "cold_start", "prepare.traces.tokenizer is 'cold_start', which is not defined; "),
        ("prepare.traces.source", "base", "which is not defined; write one of: traces, problems"),
        ("generate.models.0", "bse", "generate.models is 'bse', which is not defined; write one of: base, cold_start"),
        ("tasks.gsm8k", {"answer": "latex"}, "tasks.gsm8k.n_samples is missing; add it"),
        # phases in a circle
        (
            "sft.cold_start.start_from",
            "reasoning",
            "start_from runs in a circle: cold_start -> reasoning -> cold_start; start one from a source",
        ),
        # sources that contradict themselves
        ("sources.traces.builtin", DELETE, "sources.traces: origin is builtin, so write builtin: <value> too"),
        ("sources.problems.path", DELETE, "sources.problems: origin is path, so write path: <value> too"),
        ("sources.problems.path", "???", "sources.problems: path is not set; give the recipe's data_dir, e.g. SET="),
        ("sources.base.builtin", "questions", "builtin qwen2 is a model (into: models), the other builtins are data"),
        # options of the trainer
        ("sft.cold_start.trainer.learning_rat", 1.0, "did you mean learning_rate?"),
        ("grpo.reasoning.trainer.num_generation", 8, "did you mean num_generations"),
        ("sft.cold_start.trainer.num_generations", 8, "sft.cold_start.trainer.num_generations is not an option of trl"),
        ("sft.cold_start.trainer.xyzzy", 8, "sft.cold_start.trainer.xyzzy is not an option of trl.SFTConfig; see trl."),
        ("sft.cold_start.trainer.learning_rate", "3e-3", "learning_rate is '3e-3'; write a value of type float"),
        ("sft.cold_start.trainer.max_steps", 9.5, "sft.cold_start.trainer.max_steps is 9.5; write a value of type int"),
        ("sft.cold_start.trainer.max_steps", True, "max_steps is True; write a value of type int"),
        ("grpo.reasoning.trainer.beta", None, "grpo.reasoning.trainer.beta is None; write a value of type float"),
        ("grpo.reasoning.trainer.num_generations", "8", "num_generations is '8'; write a value of type None or int"),
        # whole groups
        (
            "grpo.reasoning.global_batch_size",
            60,
            "grpo.reasoning: global_batch_size 60 is not divisible by num_generations 8; write 56 or 64",
        ),
        ("grpo.reasoning.global_batch_size", 5, "is not divisible by num_generations 8; write 8"),
        ("grpo.reasoning.trainer", {}, None),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_write(sound, write_params, where, value, says):
    spoil(sound, where, value)
    path = write_params(sound)
    if says is None:
        load_params(path)
    else:
        assert says in message(path)


def test_unset_num_generations_is_trls_default(sound, write_params):
    """8, so 60 completions are no whole groups either."""
    sound["grpo"]["reasoning"] |= {"trainer": {}, "global_batch_size": 60}
    assert "num_generations 8; write 56 or 64" in message(write_params(sound))


@pytest.mark.parametrize("answer", ["latex", "letter", "number"])
def test_kinds_of_answers(sound, write_params, answer):
    sound["tasks"]["problems"]["answer"] = answer
    sound["evaluation"] = {"tokenizer": "base", "max_tokens": 100, "dtype": "float32"}
    assert load_params(write_params(sound)).tasks["problems"].answer == answer


def test_a_misspelt_required_key_is_called_unknown(sound, write_params):
    """The misspelling says more than that the right key is missing."""
    sound["sft"]["cold_start"]["global_batch_sise"] = sound["sft"]["cold_start"].pop("global_batch_size")
    assert message(write_params(sound)) == (
        "sft.cold_start.global_batch_sise is not a known key; write global_batch_size"
    )


@pytest.mark.parametrize("name", ["path", "options", "questions", "rows"])
def test_a_thing_may_be_named_like_a_key(sound, write_params, name):
    sound["sources"][name] = {**sound["sources"]["traces"], "optins": {}}
    assert message(write_params(sound)) == f"sources.{name}.optins is not a known key; write options"


@pytest.mark.parametrize("size", [0, 1, -8])
def test_a_group_has_two_or_more(sound, write_params, size):
    """TRL needs two completions to compare; found out after the model was loaded otherwise."""
    sound["grpo"]["reasoning"]["trainer"]["num_generations"] = size
    assert "num_generations" in message(write_params(sound))


@pytest.mark.parametrize(
    ("source", "options", "near"),
    [
        ("base", {"hidden_siez": 8}, "hidden_size"),
        ("traces", {"row": 10, "guesses": 0.5}, "rows"),
        ("traces", {"rows": "many", "guesses": 0.5}, "rows"),
        ("traces", {"rows": 10, "guesses": 0.5, "hidden_size": 8}, "guesses"),
        ("traces", {}, "rows"),
    ],
)
def test_options_of_a_builtin_are_checked(sound, write_params, source, options, near):
    """Qwen2Config takes any name, so a misspelt size would silently be the default."""
    sound["sources"][source]["options"] = options
    text = message(write_params(sound))
    assert f"sources.{source}" in text and near in text


def test_unknown_task(sound, write_params):
    sound["tasks"]["gsm8k"] = sound["tasks"]["problems"]
    assert message(write_params(sound)) == "tasks is 'gsm8k', which is not defined; write one of: traces, problems"


def test_unknown_reward_names_the_known_ones(sound, write_params):
    sound["grpo"]["reasoning"]["rewards"] = {"acuracy": 1.0}
    text = message(write_params(sound))
    assert "grpo.reasoning.rewards has 'acuracy', which is no reward; did you mean accuracy" in text


@pytest.mark.parametrize(("section", "name"), [("sft", "base"), ("grpo", "cold_start")])
def test_two_models_of_one_name(sound, write_params, section, name):
    sound[section][name] = {**next(iter(sound[section].values())), "start_from": "base"}
    assert message(write_params(sound)) == f"{name} names two models; rename the phase"


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("option", NOT_IN_TRAINER)
def test_options_that_are_set_elsewhere(sound, write_params, kind, option):
    phase = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    sound[kind][phase]["trainer"][option] = 1
    assert message(write_params(sound)) == (
        f"{kind}.{phase}.trainer.{option} does not belong here: {NOT_IN_TRAINER[option]}"
    )


def test_an_order_of_rows_that_a_checkpoint_does_not_hold(sound, write_params):
    sound["sft"]["cold_start"]["trainer"]["train_sampling_strategy"] = "group_by_length"
    said = message(write_params(sound))
    assert said.startswith("sft.cold_start.trainer.train_sampling_strategy: group_by_length draws its order")
    assert said.endswith("write batch_rebalance or random")
    sound["sft"]["cold_start"]["trainer"]["train_sampling_strategy"] = "batch_rebalance"
    load_params(write_params(sound))


def test_what_the_trainers_are_always_given_is_refused_in_a_recipe():
    """An option that training.trainer_options sets itself would be overwritten silently."""
    tree = ast.parse((ROOT / "workflow/training.py").read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "trainer_options")
    answer = next(n.value for n in ast.walk(function) if isinstance(n, ast.Return))
    always = {key.value for key in answer.keys if key is not None}
    assert {"seed", "output_dir"} <= always
    assert always <= set(NOT_IN_TRAINER)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\nb: 2", "is not YAML: "),
        ("seed: 1\nseed: 2", "is not YAML: "),
        ("- a", "must be a mapping of sections; write it with: python -m workflow.compose recipe=tiny"),
        ("", "must be a mapping of sections"),
    ],
)
def test_not_even_yaml(tmp_path, text, says):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert str(error.value).startswith(str(path)) and says in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ParamsError, match="does not exist; write it with: python -m"):
        load_params(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(sound, write_params):
    """1e-4 is a string in YAML 1.1 and a number in 1.2."""
    path = write_params(sound)
    path.write_text(path.read_text().replace("0.003", "1e-4").replace("3e-3", "1e-4"))
    assert load_params(path).sft["cold_start"].trainer["learning_rate"] == 0.0001


def test_data_path_that_does_not_exist(sound, write_params, tmp_path):
    sound["sources"]["problems"]["path"] = str(tmp_path / "problems.jsonl")
    params = load_params(write_params(sound))
    with pytest.raises(ParamsError) as error:
        check_paths(params)
    assert f"sources.problems.path is '{tmp_path}/problems.jsonl', which does not exist; write an" in str(error.value)
    (tmp_path / "problems.jsonl").touch()
    check_paths(params)


def test_corpus_of_the_tokenizer_that_does_not_exist(sound, write_params, tmp_path):
    sound["sources"]["problems"]["path"] = str(tmp_path)
    sound["sources"]["base"]["options"] = {"corpus": str(tmp_path / "corpus.txt")}
    params = load_params(write_params(sound))
    with pytest.raises(ParamsError, match=r"sources\.base\.options\.corpus is .* which does not exist; write"):
        check_paths(params)
    (tmp_path / "corpus.txt").touch()
    check_paths(params)


@pytest.mark.parametrize(
    ("size", "processes", "says"),
    [
        (64, 1, None),
        (64, 8, None),
        (24, 3, None),
        (64, 3, "write 63 or 66, or use another HARDWARE"),
        (8, 16, "write 16, or use another HARDWARE"),
    ],
)
def test_global_batch_over_processes(sound, write_params, size, processes, says):
    sound["sft"]["cold_start"]["global_batch_size"] = size
    sound["grpo"]["reasoning"]["global_batch_size"] = 48 * processes
    params = load_params(write_params(sound))
    hardware = Hardware(processes=processes, accelerate="ddp", tokens_per_device=TokensPerDevice(sft=1600, grpo=4096))
    if says is None:
        check_batches(params, hardware)
    else:
        with pytest.raises(ParamsError) as error:
            check_batches(params, hardware)
        assert f"sft.cold_start.global_batch_size {size} cannot be divided over {processes} processes; {says}" in str(
            error.value
        )


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_option_types_are_the_fields_of_the_installed_trl(kind):
    """Imports trl, which workflow.params avoids."""
    trl = pytest.importorskip("trl")
    config = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[kind]
    options = option_types(kind)
    assert set(options) == {field.name for field in dataclasses.fields(config) if field.init}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert defaults["learning_rate"] > 0
    for name, types in options.items():
        if types and isinstance(defaults[name], int | float | str):
            allowed = types | ({"int"} if "float" in types else set())
            assert type(defaults[name]).__name__ in allowed, name


def test_suggestions_are_options():
    options = option_types("grpo")
    assert {"beta", "num_generations", "learning_rate", "max_steps"} <= set(options)
    assert options["learning_rate"] == {"float"} and "num_generations" not in option_types("sft")
    assert difflib.get_close_matches("learning_rat", options, 3)[0] == "learning_rate"


@pytest.mark.parametrize(
    ("spoils", "code", "out", "error"),
    [
        ({}, 0, "check: params.yaml is sound: recipe small, phases cold_start, reasoning\n", ""),
        ({"sede": 1}, 1, "", "error: params.yaml: sede is not a known key; write seed\n"),
        (
            {"sources.problems.path": "/no/such"},
            1,
            "",
            "error: params.yaml: sources.problems.path is '/no/such', which",
        ),
        ({"sft.cold_start.global_batch_size": 65}, 1, "", "error: params.yaml: sft.cold_start.global_batch_size 65 ca"),
    ],
)
def test_command_checks_everything(sound, write_params, tmp_path, environment, spoils, code, out, error):
    (tmp_path / "problems.jsonl").touch()
    for where, value in spoils.items():
        spoil(sound, where, value)
    write_params(sound)
    command = [sys.executable, "-m", "workflow.check", "--output", "ok.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | {"HARDWARE": "cpu"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(error) and done.stderr.count("\n") == code


def loaded(code: str, environment: dict[str, str]) -> list[str]:
    """The frameworks that are loaded after this code ran in a fresh interpreter."""
    code += f"\nimport sys\nprint('loaded:', *[name for name in {FRAMEWORKS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_check_itself_sees_a_framework(environment):
    assert loaded("import torch", environment) == ["torch"]


@pytest.mark.parametrize("module", [name for name in MODULES if name not in HEAVY])
def test_importing_a_module_loads_no_framework(module, environment):
    assert loaded(f"import workflow.{module}", environment) == []


@pytest.mark.parametrize("module", COMMANDS)
def test_help_loads_no_framework(module, environment):
    code = f"""
import runpy, sys
sys.argv = ['{module}', '--help']
try:
    runpy.run_module('workflow.{module}', run_name='__main__')
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert loaded(code, environment) == []


def test_all_modules_are_looked_at():
    assert {"params", "rewards", "prepare", "verify", "pipeline", "stage", "launch", "chat"} <= set(MODULES) - HEAVY
    assert {"download", "prepare", "sft", "grpo", "generate", "score", "report"} <= set(COMMANDS)
