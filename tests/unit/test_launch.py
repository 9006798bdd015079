import subprocess
import sys
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any

import pytest

from workflow import launch
from workflow.launch import (
    Allocation,
    Hardware,
    Ports,
    TokensPerDevice,
    allocation,
    check_batches,
    commands,
    divide,
    division,
    free_ports,
    hardware_options,
    load_hardware,
    processes,
)
from workflow.params import NOT_IN_TRAINER, Params, ParamsError, load_params, option_types

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflow"
HARDWARE = sorted(file.stem for file in (FOLDER / "hardware").glob("*.yaml"))
SOUND = "{processes: 2, accelerate: ddp, tokens_per_device: {sft: 4096, grpo: 8192}}"


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
        for count in (1, 2, 3, 8):
            for most in (1, 5, 16):
                parts = divide(size, count, most)
                assert (parts is None) == (size % count != 0)
                if parts:
                    assert parts[0] * parts[1] * count == size and 1 <= parts[0] <= most
                    found += 1
    assert found > 500


def test_there_is_hardware():
    one = {"cpu", "gpu_24gb", "gpu_80gb"}
    assert one | {"gpu_8x80gb", "gpu_8x80gb_server", "gpu_2x8x80gb"} == set(HARDWARE)


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
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_recipe_cannot_set_what_a_machine_does(name, kind, monkeypatch, sound, write_params):
    """It would be overwritten on some machines and not on others."""
    monkeypatch.setenv("HARDWARE", name)
    monkeypatch.setenv("ROLLOUT_SERVER", "http://127.0.0.1:1")
    monkeypatch.setenv("ROLLOUT_WEIGHTS_PORT", "2")
    sound["grpo"]["reasoning"]["global_batch_size"] = 112
    phase = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    options = hardware_options(load_params(write_params(sound)), load_hardware(), kind, phase)
    assert set(options) <= set(NOT_IN_TRAINER) and set(options) <= set(option_types(kind))
    assert {"per_device_train_batch_size", "gradient_accumulation_steps"} <= set(options)


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


def hardware(name: str, monkeypatch: pytest.MonkeyPatch) -> Hardware:
    monkeypatch.setenv("HARDWARE", name)
    return load_hardware()


@pytest.mark.parametrize("name", [name for name in HARDWARE if name != "gpu_8x80gb_server"])
def test_the_default_recipe_fits_every_machine(name, monkeypatch):
    check_batches(load_params(ROOT / "params.yaml"), hardware(name, monkeypatch))


def test_seven_gpus_need_a_multiple_of_seven(monkeypatch):
    with pytest.raises(ParamsError) as error:
        check_batches(load_params(ROOT / "params.yaml"), hardware("gpu_8x80gb_server", monkeypatch))
    assert str(error.value) == (
        "params.yaml: grpo.reasoning.global_batch_size 128 cannot be divided over 7 processes; write 112 or 168, "
        "or use another HARDWARE"
    )


def test_the_default_recipe_is_divided_without_accumulation(monkeypatch):
    """Its results were measured so; another division would change them by float noise."""
    params, cpu = load_params(ROOT / "params.yaml"), hardware("cpu", monkeypatch)
    assert division(params, cpu, "sft", "cold_start") == (16, 1)
    assert division(params, cpu, "grpo", "reasoning") == (64, 1)


@pytest.mark.parametrize(
    ("name", "sft", "grpo"),
    [
        ("cpu", (4, 16), (16, 28)),
        ("gpu_24gb", (4, 32), (4, 224)),
        ("gpu_80gb", (4, 32), (8, 112)),
        ("gpu_8x80gb", (4, 4), (8, 14)),
        ("gpu_8x80gb_server", (4, 4), (16, 8)),
        ("gpu_2x8x80gb", (4, 2), (8, 7)),
    ],
)
def test_how_open_r1_is_divided(name, sft, grpo, monkeypatch, sound, write_params):
    """128 packed rows of 4096 tokens, and 112 questions x 8 completions of 512 + 1024 tokens, as it was published."""
    sound["prepare"]["traces"]["max_length"] = 32768
    sound["prepare"]["problems"]["max_prompt_length"] = 512
    packed = {"max_length": 4096, "packing": True, "packing_strategy": "wrapped"}
    sound["sft"]["cold_start"] |= {"global_batch_size": 128, "trainer": packed}
    completions = {"num_generations": 8, "max_completion_length": 1024}
    sound["grpo"]["reasoning"] |= {"global_batch_size": 896, "trainer": completions}
    params, machine = load_params(write_params(sound)), hardware(name, monkeypatch)
    assert division(params, machine, "sft", "cold_start") == sft
    assert division(params, machine, "grpo", "reasoning") == grpo


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_length": 512}, 20),  # 10 000 tokens in rows of 500
        ({"max_length": None}, 20),
        ({}, 20),  # TRL's 1024
        ({"max_length": 512, "packing": True}, 19),
        ({"max_length": 20000, "packing": True}, 1),
    ],
)
def test_tokens_limit_the_rows(trainer, expected, sound, write_params):
    sound["prepare"]["traces"]["max_length"] = 500
    sound["sft"]["cold_start"] |= {"trainer": trainer}
    tokens = TokensPerDevice(sft=10_000, grpo=1)
    one = Hardware(processes=1, accelerate="ddp", tokens_per_device=tokens)
    assert launch.most_per_device(load_params(write_params(sound)), one, "sft", "cold_start") == expected


def test_values_that_would_do_hold_whole_groups(sound, write_params):
    """Multiples of the processes and of num_generations; those of the other phase are of the processes alone."""
    sound["grpo"]["reasoning"] |= {"global_batch_size": 8, "trainer": {"num_generations": 8}}
    tokens = TokensPerDevice(sft=1024, grpo=1024)
    three = Hardware(processes=3, accelerate="ddp", tokens_per_device=tokens)
    with pytest.raises(ParamsError, match="global_batch_size 64 cannot be divided over 3 processes; write 63 or 66, "):
        division(load_params(write_params(sound)), three, "sft", "cold_start")
    with pytest.raises(ParamsError, match="global_batch_size 8 cannot be divided over 3 processes; write 24, or use"):
        division(load_params(write_params(sound)), three, "grpo", "reasoning")


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(SOUND)
    monkeypatch.setenv("HARDWARE", str(tmp_path / "mine.yaml"))
    assert load_hardware() == Hardware(
        processes=2, accelerate="ddp", tokens_per_device=TokensPerDevice(sft=4096, grpo=8192), threads=1, nodes=1
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
        (SOUND.replace("sft: 4096", "sft: 4.5"), ["tokens_per_device.sft", "valid integer"]),
        (SOUND.replace("grpo: 8", "gpro: 8"), ["tokens_per_device.gpro is not a known key; write grpo"]),
        (SOUND.replace("}}", "}, server: {}}"), ["vllm_mode: server and the section server need each other"]),
        (SOUND.replace("}}", "}, grpo_trainer: {vllm_mode: server}}"), ["need each other; write both"]),
        (
            SOUND.replace("}}", "}, grpo_trainer: {vllm_mode: server}, server: {tensor_parallel_size: 2}}"),
            ["server.tensor_parallel_size leaves no GPU for training; write 1 or less"],
        ),
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


HEAD = [sys.executable, "-m", "workflow.launch", "accelerate"]
SAME = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
ARGUMENTS = ["--model", "data/models/m", "--dataset", "d", "--output", "o", "--log", "data/logs/l"]
ALONE = ["--num_machines", "1", *SAME, "--main_process_port", "0"]
TOGETHER = ["--num_machines", "2", *SAME, "--main_process_ip", "node3", "--main_process_port", "1001"]
TOGETHER += ["--same_network", "--deepspeed_multinode_launcher", "standard"]
SERVER = [sys.executable, "-m", "trl.scripts.vllm_serve", "--model", "data/models/m"]
SRUN = ["--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL", "--wait=60"]
BOTH = ["srun", "--overlap", "--nodelist=node3,node4", "--nodes=2", "--ntasks=2", *SRUN]
PORTS = Ports(rendezvous=1001, server=1002, weights=1003)
EIGHT = tuple("01234567")


def config(name: str) -> list[str]:
    return ["--config_file", str(FOLDER / f"accelerate/{name}.yaml"), "-m"]


def planned(
    machine: Hardware, hosts: tuple[str, ...], gpus: tuple[str, ...], kind: str, params: Params
) -> list[dict[str, Any]]:
    phase = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    found = commands(Allocation(hosts, gpus), machine, params, kind, [phase, *ARGUMENTS], PORTS)
    return [{name: value for name, value in vars(command).items() if value and value != SIGTERM} for command in found]


@pytest.fixture
def params(sound: dict[str, Any], write_params: Any) -> Params:
    sound["grpo"]["reasoning"]["trainer"]["max_completion_length"] = 300
    return load_params(write_params(sound))


@pytest.mark.parametrize(
    ("name", "gpus", "count", "spread", "visible"),
    [
        ("cpu", (), 2, "ddp", None),
        ("cpu", EIGHT, 2, "ddp", None),
        ("gpu_24gb", ("0",), 1, "ddp", "0"),
        ("gpu_80gb", ("0",), 1, "ddp", "0"),
        ("gpu_80gb", ("GPU-5f3c", "GPU-77d0"), 1, "ddp", "GPU-5f3c"),
        ("gpu_8x80gb", EIGHT, 8, "zero2", "0,1,2,3,4,5,6,7"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_commands_on_one_machine(name, gpus, count, spread, visible, kind, params, monkeypatch):
    phase = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    argv = [*HEAD, "--num_processes", str(count), *ALONE, *config(spread), f"workflow.{kind}", phase, *ARGUMENTS]
    expected = {"name": "the training", "argv": argv}
    if visible is not None:
        expected["environment"] = {"CUDA_VISIBLE_DEVICES": visible}
    # Nodes that the hardware file does not use make no difference.
    for hosts in (("localhost",), ("node3", "node4")):
        assert planned(hardware(name, monkeypatch), hosts, gpus, kind, params) == [expected]


def test_commands_of_seven_gpus_and_a_server(params, monkeypatch):
    machine = hardware("gpu_8x80gb_server", monkeypatch)
    (training,) = planned(machine, ("localhost",), EIGHT, "sft", params)
    assert training["argv"][4:6] == ["--num_processes", "8"]
    assert training["environment"] == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert planned(machine, ("localhost",), EIGHT, "grpo", params) == [
        {
            "name": "the vLLM server",
            "argv": [
                *SERVER,
                *("--host", "127.0.0.1", "--port", "1002", "--tensor_parallel_size", "1"),
                *("--gpu_memory_utilization", "0.9", "--max_model_len", "360", "--log_level", "warning"),
                *("--seed", "42"),
            ],
            "environment": {
                "CUDA_VISIBLE_DEVICES": "7",
                "VLLM_HOST_IP": "127.0.0.1",
                "VLLM_LOGGING_LEVEL": "INFO",
            },
            "health": "http://127.0.0.1:1002/health",
            "output": Path("data/logs/l/vllm_server.log"),
        },
        {
            "name": "the training",
            "argv": [
                *(*HEAD, "--num_processes", "7", *ALONE, *config("zero2")),
                *("workflow.grpo", "reasoning", *ARGUMENTS),
            ],
            "environment": {
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6",
                "VLLM_HOST_IP": "127.0.0.1",
                "ROLLOUT_SERVER": "http://127.0.0.1:1002",
                "ROLLOUT_WEIGHTS_PORT": "1003",
            },
        },
    ]


def test_gpus_are_those_that_may_be_used(params, monkeypatch):
    """SLURM gives some of a machine's GPUs, in CUDA_VISIBLE_DEVICES."""
    machine = hardware("gpu_8x80gb_server", monkeypatch).model_copy(update={"processes": 3})
    found = planned(machine, ("localhost",), ("2", "5", "6", "7"), "grpo", params)
    assert [command["environment"]["CUDA_VISIBLE_DEVICES"] for command in found] == ["6", "2,5"]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_commands_on_two_nodes(kind, params, monkeypatch):
    phase = {"sft": "cold_start", "grpo": "reasoning"}[kind]
    argv = [*BOTH, *HEAD, "--num_processes", "16", *TOGETHER, *config("zero2"), f"workflow.{kind}", phase, *ARGUMENTS]
    found = planned(hardware("gpu_2x8x80gb", monkeypatch), ("node3", "node4"), EIGHT, kind, params)
    assert found == [{"name": "the training", "argv": argv, "stop": SIGUSR1}]


def test_commands_of_a_node_that_trains_and_one_that_serves(params):
    machine = Hardware.model_validate(
        {
            "nodes": 2,
            "processes": 8,
            "accelerate": "zero3",
            "tokens_per_device": {"sft": 8192, "grpo": 8192},
            "grpo_trainer": {"use_vllm": True, "vllm_mode": "server"},
            "server": {"tensor_parallel_size": 4, "gpu_memory_utilization": 0.8},
        }
    )
    (training,) = planned(machine, ("node3", "node4"), EIGHT, "sft", params)
    assert training["argv"][: len(BOTH)] == BOTH and "environment" not in training
    server, training = planned(machine, ("node3", "node4"), EIGHT, "grpo", params)
    one = [f"--nodes={1}", f"--ntasks={1}", *SRUN]
    assert server["argv"] == [
        *("srun", "--overlap", "--nodelist=node4", *one, *SERVER),
        *("--host", "node4", "--port", "1002", "--tensor_parallel_size", "4"),
        *("--gpu_memory_utilization", "0.8", "--max_model_len", "360", "--log_level", "warning", "--seed", "42"),
    ]
    assert server["environment"] == {"VLLM_HOST_IP": "node4", "VLLM_LOGGING_LEVEL": "INFO"}
    assert server["health"] == "http://node4:1002/health"
    assert "stop" not in server and training["stop"] == SIGUSR1
    argv = ["srun", "--overlap", "--nodelist=node3", *one, *HEAD, "--num_processes", "8", *ALONE, *config("zero3")]
    assert training["argv"] == [*argv, "workflow.grpo", "reasoning", *ARGUMENTS]
    assert training["environment"] == {
        "VLLM_HOST_IP": "node3",
        "ROLLOUT_SERVER": "http://node4:1002",
        "ROLLOUT_WEIGHTS_PORT": "1003",
    }


@pytest.mark.parametrize(
    ("name", "hosts", "gpus", "says"),
    [
        ("gpu_2x8x80gb", ("localhost",), EIGHT, "for 2 nodes and there is 1; run it in a SLURM job with --nodes=2"),
        ("gpu_2x8x80gb", ("node3", "node4"), EIGHT[:4], "for 8 GPUs and 4 may be used here"),
        ("gpu_8x80gb_server", ("localhost",), EIGHT[1:], "for 8 GPUs and 7 may be used here"),
        ("gpu_24gb", ("localhost",), (), "for 1 GPUs and 0 may be used here"),
    ],
)
def test_too_few_machines(name, hosts, gpus, says, params, monkeypatch):
    with pytest.raises(ParamsError, match=says):
        planned(hardware(name, monkeypatch), hosts, gpus, "grpo", params)


@pytest.mark.parametrize(
    ("name", "sft", "grpo"), [("cpu", 2, 2), ("gpu_80gb", 1, 1), ("gpu_8x80gb_server", 8, 7), ("gpu_2x8x80gb", 16, 16)]
)
def test_processes(name, sft, grpo, monkeypatch):
    machine = hardware(name, monkeypatch)
    assert (processes(machine, "sft"), processes(machine, "grpo")) == (sft, grpo)


def test_options_of_the_rollouts(params, monkeypatch):
    for name in ("ROLLOUT_SERVER", "ROLLOUT_WEIGHTS_PORT"):
        monkeypatch.delenv(name, raising=False)
    divided = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    eight = hardware("gpu_8x80gb", monkeypatch)
    assert hardware_options(params, eight, "sft", "cold_start") == divided
    assert hardware_options(params, eight, "grpo", "reasoning") == {
        **divided,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 360,
    }
    seven = hardware("gpu_8x80gb_server", monkeypatch).model_copy(update={"processes": 5})
    divided = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    without = {**divided, "use_vllm": True, "vllm_mode": "server"}
    assert hardware_options(params, seven, "grpo", "reasoning") == without
    (_, training) = planned(seven, ("localhost",), EIGHT, "grpo", params)
    for variable, value in training["environment"].items():
        monkeypatch.setenv(variable, value)
    assert hardware_options(params, seven, "grpo", "reasoning") == {
        **without,
        "vllm_server_base_url": "http://127.0.0.1:1002",
        "vllm_group_port": 1003,
    }


def test_options_of_the_server_exist(monkeypatch, params):
    """Of `trl vllm-serve`; what it does not know it would pass on to vLLM, as it shall --seed."""
    import ast
    import importlib.util

    source = Path(importlib.util.find_spec("trl").origin).parent / "scripts/vllm_serve.py"
    arguments = next(n for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == "ScriptArguments").body
    known = {f"--{ast.unparse(field.target)}" for field in arguments if isinstance(field, ast.AnnAssign)}
    server, _ = planned(hardware("gpu_8x80gb_server", monkeypatch), ("localhost",), EIGHT, "grpo", params)
    given = {word for word in server["argv"] if word.startswith("--")}
    assert given - known == {"--seed"} and len(given) > 5


def test_allocation(tmp_path, monkeypatch):
    """That of several nodes is tested on a real SLURM, in tests/slurm."""
    visible = {"CUDA_VISIBLE_DEVICES": "2,5"}
    assert allocation(visible, 1) == Allocation(("localhost",), ("2", "5"))
    assert allocation({"CUDA_VISIBLE_DEVICES": ""}, 1) == Allocation(("localhost",), ())
    job = {"SLURM_JOB_ID": "7"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert allocation(job | visible, 1) == Allocation(("localhost",), ("2", "5"))
    assert allocation(visible, 2) == Allocation(("localhost",), ("2", "5"))
    with pytest.raises(ParamsError, match="the nodes of this SLURM job are unknown"):
        allocation(job | visible, 2)


def test_ports_are_free_and_differ():
    ports = [*vars(free_ports()).values(), *vars(free_ports()).values()]
    assert len(ports) == 6 and len(set(ports[:3])) == 3 and all(1024 <= port < 65536 for port in ports)


USAGE = "usage: python -m workflow.launch [-h] --model MODEL --dataset DATASET --output"


@pytest.mark.parametrize("arguments", [[], ["score"], ["--model", "m"], ["sft", "cold_start", "--model", "m"]])
def test_usage(arguments, environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(USAGE)


def test_help_is_no_mistake(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(USAGE)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("cpu", {"global_batch_size": 65}, "sft.cold_start.global_batch_size 65 cannot be divided over 2 processes"),
        ("nothing", {}, "HARDWARE is 'nothing'; write one of: cpu"),
        ("gpu_2x8x80gb", {}, "for 2 nodes and there is 1"),
    ],
)
def test_stops_before_anything_is_started(sound, write_params, tmp_path, environment, name, change, says):
    sound["sft"]["cold_start"] |= change
    write_params(sound)
    done = subprocess.run(
        [sys.executable, "-m", "workflow.launch", "sft", "cold_start", *ARGUMENTS],
        cwd=tmp_path,
        env=environment | {"HARDWARE": name},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
