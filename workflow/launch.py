"""Spread a training stage over the machine: the hardware file turns a recipe into an accelerate command.

`python -m workflow.launch sft cold_start …` runs `accelerate launch … -m workflow.sft cold_start …`. The
hardware file is workflow/hardware/<HARDWARE>.yaml, by the environment variable HARDWARE (a name, or the path of
a file of one's own), else by what nvidia-smi finds. It decides how a global batch is divided, never how large
it is, so the experiment and its cache key are the same on every machine.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from workflow import stage
from workflow.params import Params, ParamsError, Section, load_params, one_sentence

HERE = Path(__file__).parent


class PerDeviceBatch(Section):
    sft: int = Field(gt=0, description="Most sequences one device takes at once.")
    grpo: int = Field(gt=0, description="Most completions one device takes at once.")


class Hardware(Section):
    """What fits on a machine. A batch is divided, never changed; on CPUs that changes results by float noise only.

    On GPUs rollouts come from vLLM, whose kernels differ from the trainer's: there TRL weighs the tokens by the
    ratio of both probabilities (vllm_importance_sampling_correction, an option of the recipe).
    """

    processes: int = Field(gt=0, description="Training processes, one per device.")
    threads: int = Field(1, gt=0, description="CPU threads of each process.")
    accelerate: Literal["ddp", "zero2", "zero3"] = Field(description="A file in workflow/accelerate/.")
    per_device_batch: PerDeviceBatch
    trainer: dict[str, Any] = Field({}, description="Options of both trainers.")
    grpo_trainer: dict[str, Any] = Field({}, description="Options of GRPOTrainer: where rollouts are made.")
    environment: dict[str, str] = Field({}, description="Environment variables of training and generation.")
    vllm: dict[str, Any] = Field({}, description="Arguments of vllm.LLM in generate.")


def hardware_name() -> str:
    """The hardware file to use: the environment variable HARDWARE, else what fits the GPUs that may be used."""
    if os.environ.get("HARDWARE"):
        return os.environ["HARDWARE"]
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")
    found = subprocess.run(query, capture_output=True, text=True)
    if found.returncode:
        return "cpu"  # a driver without a device
    try:
        memory = [int(line) for line in found.stdout.split("\n") if line.strip()]
    except ValueError:
        raise ParamsError("nvidia-smi does not tell the GPUs' memory; write HARDWARE=<a file in hardware/>") from None
    if min(memory) < 75_000:
        return "gpu_24gb"
    return "gpu_8x80gb" if len(memory) >= 8 else "gpu_80gb"


def load_hardware() -> Hardware:
    """The hardware file that HARDWARE names, or that fits this machine.

    Raises:
        ParamsError: there is no such file, or it has a wrong key or value.
    """
    import yaml

    name = hardware_name()
    path = Path(name) if name.endswith(".yaml") else HERE / "hardware" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (HERE / "hardware").glob("*.yaml")))
        raise ParamsError(f"HARDWARE is {name!r}; write one of: {known}, or the path of a .yaml file")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must be a mapping; start from a copy of {HERE / 'hardware' / 'cpu.yaml'}")
    try:
        return Hardware.model_validate(values)
    except ValidationError as error:
        raise ParamsError(f"{path}: {one_sentence(error, Hardware)}") from None


def divide(global_batch: int, processes: int, most: int) -> tuple[int, int] | None:
    """(per-device batch, accumulation steps) with product x processes = global_batch, the largest that fits."""
    if global_batch % processes:
        return None
    share = global_batch // processes
    per_device = next(size for size in range(min(share, most), 0, -1) if share % size == 0)
    return per_device, share // per_device


def check_batches(params: Params, hardware: Hardware) -> None:
    """Raise ParamsError when a global batch cannot be divided over the processes."""
    for kind in ("sft", "grpo"):
        for name, phase in getattr(params, kind).items():
            size = phase.global_batch_size
            if divide(size, hardware.processes, getattr(hardware.per_device_batch, kind)) is None:
                below = size // hardware.processes * hardware.processes
                near = [str(n) for n in (below, below + hardware.processes) if n]
                raise ParamsError(
                    f"params.yaml: {kind}.{name}.global_batch_size {size} cannot be divided over "
                    f"{hardware.processes} processes; write {' or '.join(near)}, or use another HARDWARE"
                )


def command(hardware: Hardware, arguments: list[str]) -> list[str]:
    """The command that runs `-m workflow.<stage> …` on every device."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(hardware.processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(hardware.threads), "--main_process_port", "0"]
    launch += ["--config_file", str(HERE / "accelerate" / f"{hardware.accelerate}.yaml")]
    return [*launch, "-m", f"workflow.{arguments[0]}", *arguments[1:]]


def main() -> None:
    arguments = sys.argv[1:]
    usage = "usage: python -m workflow.launch {sft,grpo} PHASE … (the options of workflow.sft or workflow.grpo)"
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if not arguments or arguments[0] not in ("sft", "grpo"):
        sys.exit(usage)
    hardware = load_hardware()
    check_batches(load_params(), hardware)
    os.environ.update(hardware.environment)
    os.environ["STAGE_STARTED"] = str(time.time())
    sys.stdout.flush()
    # In place of this process, so that a signal reaches the launcher and nothing is left running without it.
    os.execv(sys.executable, command(hardware, arguments))


if __name__ == "__main__":
    stage.run(main)
