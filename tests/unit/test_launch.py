import subprocess
import sys
from pathlib import Path

import pytest

from workflow import launch
from workflow.launch import Hardware, PerDeviceBatch, check_batches, command, divide, load_hardware
from workflow.params import NOT_IN_TRAINER, ParamsError, load_params, option_types

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflow"
HARDWARE = sorted(file.stem for file in (FOLDER / "hardware").glob("*.yaml"))
SOUND = "{processes: 2, accelerate: ddp, per_device_batch: {sft: 4, grpo: 8}}"


@pytest.mark.parametrize(
    ("size", "processes", "most", "expected"),
    [
        (64, 1, 64, (64, 1)),
        (64, 1, 100, (64, 1)),
        (64, 2, 32, (32, 1)),
        (64, 2, 8, (8, 4)),
        (64, 8, 32, (8, 1)),
        (60, 2, 8, (6, 5)),  # 30 is no multiple of 8 or 7
        (14, 2, 6, (1, 7)),  # a prime share
        (1, 1, 1, (1, 1)),
        (64, 3, 8, None),
        (2, 4, 8, None),
    ],
)
def test_divide(size, processes, most, expected):
    assert divide(size, processes, most) == expected


def test_what_is_divided_is_all_there():
    found = 0
    for size in range(1, 130):
        for processes in (1, 2, 3, 8):
            for most in (1, 5, 16):
                parts = divide(size, processes, most)
                assert (parts is None) == (size % processes != 0)
                if parts:
                    assert parts[0] * parts[1] * processes == size and 1 <= parts[0] <= most
                    found += 1
    assert found > 500


def test_there_is_hardware():
    assert {"cpu", "gpu_24gb", "gpu_80gb", "gpu_8x80gb"} <= set(HARDWARE)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_hardware_file_loads(name, monkeypatch):
    monkeypatch.setenv("HARDWARE", name)
    hardware = load_hardware()
    assert (FOLDER / "accelerate" / f"{hardware.accelerate}.yaml").is_file()
    # The names are options of the installed trainers, and none that the pipeline sets itself.
    given = {
        "sft": set(hardware.trainer),
        "grpo": set(hardware.trainer) | set(hardware.grpo_trainer),
    }
    for kind, names in given.items():
        assert names <= set(option_types(kind))
        assert not names & {"seed", "output_dir", "per_device_train_batch_size", "learning_rate"}


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_cannot_set_what_a_machine_does(name, monkeypatch):
    """It would be overwritten on some machines and not on others."""
    monkeypatch.setenv("HARDWARE", name)
    hardware = load_hardware()
    assert {*hardware.trainer, *hardware.grpo_trainer} <= set(NOT_IN_TRAINER)


@pytest.mark.parametrize("name", HARDWARE)
def test_arguments_of_vllm_exist(name, monkeypatch):
    """Read from the installed sources: importing vllm takes seconds."""
    import ast
    import importlib.util

    root = Path(importlib.util.find_spec("vllm").origin).parent
    engine = ast.parse((root / "engine/arg_utils.py").read_text())
    fields = next(n for n in engine.body if isinstance(n, ast.ClassDef) and n.name == "EngineArgs").body
    known = {ast.unparse(field.target) for field in fields if isinstance(field, ast.AnnAssign)}
    assert {"model", "max_model_len", "seed"} <= known
    monkeypatch.setenv("HARDWARE", name)
    assert set(load_hardware().vllm) <= known - {"model", "max_model_len", "seed", "enable_prefix_caching"}


@pytest.mark.parametrize("name", HARDWARE)
def test_the_default_recipe_fits_every_machine(name, monkeypatch):
    monkeypatch.setenv("HARDWARE", name)
    check_batches(load_params(ROOT / "params.yaml"), load_hardware())


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(SOUND)
    monkeypatch.setenv("HARDWARE", str(tmp_path / "mine.yaml"))
    assert load_hardware() == Hardware(
        processes=2, accelerate="ddp", per_device_batch=PerDeviceBatch(sft=4, grpo=8), threads=1
    )


@pytest.mark.parametrize("value", [None, ""])
def test_without_hardware_it_is_what_is_found(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("HARDWARE", raising=False)
    else:
        monkeypatch.setenv("HARDWARE", value)
    assert launch.hardware_name() in HARDWARE
    found = load_hardware()
    monkeypatch.setenv("HARDWARE", launch.hardware_name())
    assert load_hardware() == found


@pytest.mark.parametrize("name", ["cpus", "/no/such.yaml", "no/such.yaml"])
def test_hardware_that_is_not_there(monkeypatch, name):
    monkeypatch.setenv("HARDWARE", name)
    with pytest.raises(ParamsError) as error:
        load_hardware()
    assert str(error.value) == f"HARDWARE is {name!r}; write one of: {', '.join(HARDWARE)}, or the path of a .yaml file"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SOUND.replace("processes: 2", "processes: 0"), ["processes", "greater than 0"]),
        (SOUND.replace("processes: 2", "processes: '2'"), ["processes", "valid integer"]),
        (SOUND.replace("processes: 2, ", ""), ["processes is missing; add it"]),
        (SOUND.replace("ddp", "zero9"), ["accelerate", "'ddp', 'zero2' or 'zero3'"]),
        (SOUND.replace("sft: 4", "sft: 4.5"), ["per_device_batch.sft", "valid integer"]),
        (SOUND.replace("grpo: 8", "gpro: 8"), ["per_device_batch.gpro is not a known key; write grpo"]),
        (SOUND.replace("processes", "proceses"), ["proceses is not a known key; write processes"]),
        ("[1, 2]", ["mapping"]),
        ("", ["mapping"]),
        ("processes: [1", ["is not YAML"]),
    ],
)
def test_mistakes_in_a_hardware_file(tmp_path, monkeypatch, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    monkeypatch.setenv("HARDWARE", str(path))
    with pytest.raises(ParamsError) as error:
        load_hardware()
    message = str(error.value)
    assert message.startswith(str(path)) and all(part in message for part in says)
    assert "\n" not in message and ": :" not in message


def machine(processes: int, accelerate: str, threads: int = 1) -> Hardware:
    return Hardware(
        processes=processes,
        threads=threads,
        accelerate=accelerate,
        per_device_batch=PerDeviceBatch(sft=4, grpo=8),
    )


def expected(processes: int, threads: int, config: str, stage: str) -> list[str]:
    head = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    head += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    head += ["--num_cpu_threads_per_process", str(threads), "--main_process_port", "0"]
    head += ["--config_file", str(FOLDER / f"accelerate/{config}.yaml")]
    return [*head, "-m", f"workflow.{stage}", "cold_start", "--model", "m"]


@pytest.mark.parametrize(
    ("hardware", "arguments"),
    [
        (machine(2, "ddp"), (2, 1, "ddp")),
        (machine(1, "ddp"), (1, 1, "ddp")),
        (machine(1, "ddp", threads=4), (1, 4, "ddp")),
        (machine(1, "zero2"), (1, 1, "zero2")),
        (machine(8, "zero2"), (8, 1, "zero2")),
        (machine(2, "zero3"), (2, 1, "zero3")),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_command(hardware, arguments, stage):
    assert command(hardware, [stage, "cold_start", "--model", "m"]) == expected(*arguments, stage)


def test_command_on_this_pipelines_cpu(monkeypatch):
    monkeypatch.setenv("HARDWARE", "cpu")
    assert command(load_hardware(), ["sft", "cold_start", "--model", "m"]) == expected(2, 1, "ddp", "sft")


@pytest.mark.parametrize("arguments", [[], ["score"], ["--model", "m"]])
def test_usage(arguments, environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("usage: python -m workflow.launch {sft,grpo} PHASE") and done.stderr.count("\n") == 1


def test_help_is_no_mistake(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m workflow.launch {sft,grpo} PHASE")


@pytest.mark.parametrize(
    ("hardware", "change", "says"),
    [
        ("cpu", {"global_batch_size": 65}, "sft.cold_start.global_batch_size 65 cannot be divided over 2 processes"),
        ("nothing", {}, "HARDWARE is 'nothing'; write one of: cpu"),
    ],
)
def test_stops_before_anything_is_started(sound, write_params, tmp_path, environment, hardware, change, says):
    sound["sft"]["cold_start"] |= change
    write_params(sound)
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", "sft", "cold_start"],
        cwd=tmp_path,
        env=environment | {"HARDWARE": hardware},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
