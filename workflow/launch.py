"""Spread a training stage over the machines it was given: the hardware file turns a recipe into commands, run here.

`python -m workflow.launch sft cold_start …` runs `accelerate launch … -m workflow.sft cold_start …`, beside a vLLM
server (`trl vllm-serve`) or on several nodes where the hardware file says so. The hardware file is
workflow/hardware/<HARDWARE>.yaml, by the environment variable HARDWARE (a name, or the path of a file of one's own),
else by what nvidia-smi finds. It decides how a global batch is divided, never how large it is, so the experiment and
its cache key are the same on every machine.
"""

import argparse
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from pydantic import Field, ValidationError, field_validator, model_validator

from workflow import stage
from workflow.params import Params, ParamsError, Section, load_params, one_sentence, pick

HERE = Path(__file__).parent
CHECKPOINTS = Path(".scratch/checkpoints")
Kind = Literal["sft", "grpo"]
READY_WITHIN = 600.0  # seconds a server may take to load its model
TOLD_EVERY = 15.0  # seconds between two lines about a server that is not ready
SAVED_WITHIN = 170.0  # seconds that trainers have for a checkpoint when the server was ended from outside
GRACE = 10.0  # seconds between SIGTERM and SIGKILL


class TokensPerDevice(Section):
    """How many tokens of a micro-batch fit on a device."""

    sft: int = Field(gt=0, description="Most tokens one device takes at once, padding included.")
    grpo: int = Field(gt=0, description="Most tokens of prompts and completions one device takes at once.")


class Server(Section):
    """A vLLM server for GRPO's rollouts: on the last GPUs of one machine, or alone on the last of several nodes."""

    tensor_parallel_size: int = Field(1, gt=0, description="GPUs of the server; they do not train in GRPO.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of their memory that vLLM takes.")


class Generation(Section):
    """How the stage generate works off its samples."""

    chunk: int = Field(64, gt=0, description="Samples that are written to disk together, once all are finished.")
    ahead: int = Field(
        1024,
        ge=0,
        description="A chunk is begun when no more samples than this are unfinished, so an engine is always full. "
        "0 lets each one run alone: slower where lengths differ, and on CPUs the same bytes after any interruption.",
    )
    engines: int | None = Field(
        None, gt=0, description="vLLM engines; null: one for every vllm.tensor_parallel_size GPUs, or one on a CPU."
    )


class Hardware(Section):
    """What fits on a machine. A batch is divided, never changed; on CPUs that changes results by float noise only.

    On GPUs two things more differ. Rollouts come from vLLM, whose kernels are not the trainer's: TRL weighs them by the
    ratio of both probabilities (vllm_importance_sampling_correction and _mode, options of the recipe). And gradients
    are accumulated in bfloat16 under ZeRO, or where the weights are bfloat16, so more parts are rounded more often.
    """

    nodes: int = Field(1, gt=0, description="Machines, all alike; more than one are those of the SLURM job.")
    processes: int = Field(gt=0, description="Training processes on each machine, one per device.")
    threads: int = Field(1, gt=0, description="CPU threads of each process.")
    accelerate: Literal["ddp", "zero2", "zero3"] = Field(description="A file in workflow/accelerate/.")
    tokens_per_device: TokensPerDevice
    trainer: dict[str, Any] = Field({}, description="Options of both trainers.")
    grpo_trainer: dict[str, Any] = Field({}, description="Options of GRPOTrainer: where rollouts are made.")
    server: Server | None = Field(None, description="Of the rollouts, where vllm_mode is server.")
    memory_gib: float | None = Field(None, gt=0, description="Memory of one GPU, for the estimate of the preflight.")
    checkpoint_minutes: float = Field(
        10, ge=0, description="Minutes of training between two checkpoints: what a power cut costs at most."
    )
    environment: dict[str, str] = Field({}, description="Environment variables of training and generation.")
    vllm: dict[str, Any] = Field({}, description="Arguments of vllm.LLM in generate.")
    generation: Generation = Generation()

    @field_validator("vllm")
    @classmethod
    def _vllm_leaves_what_the_task_says(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in ("model", "max_model_len", "enable_prefix_caching", "seed", "dtype"):
            if name in options:
                raise ValueError(f"{name} is set by the stage generate; remove it")
        return options

    @model_validator(mode="after")
    def _server_fits(self) -> "Hardware":
        if (self.grpo_trainer.get("vllm_mode") == "server") != (self.server is not None):
            raise ValueError("grpo_trainer.vllm_mode: server and the section server need each other; write both")
        if self.server is not None:
            most = self.processes if self.nodes > 1 else self.processes - 1
            if self.server.tensor_parallel_size > most:
                raise ValueError(f"server.tensor_parallel_size leaves no GPU for training; write {most} or less")
        return self


@dataclass(frozen=True)
class Allocation:
    """The machines of this run. The first is the one that training processes on the others connect to."""

    hosts: tuple[str, ...]  # as SLURM names them; one means this machine
    gpus: tuple[str, ...]  # of each host, as CUDA_VISIBLE_DEVICES names them; none on a CPU


@dataclass(frozen=True)
class Ports:
    """Free TCP ports: of the training processes' rendezvous, of the vLLM server, and of the weights sent to it."""

    rendezvous: int
    server: int
    weights: int


@dataclass(frozen=True)
class Command:
    """One process to start. Those with a health URL are servers: the next command waits until they answer there."""

    name: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    health: str | None = None
    output: Path | None = None  # takes what it prints; None leaves it on the terminal
    stop: int = signal.SIGTERM  # the signal that asks it to end


def gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; none without a driver or a device."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return tuple(filter(None, environment["CUDA_VISIBLE_DEVICES"].split(",")))
    return tuple(_nvidia_smi("index"))


def _nvidia_smi(field: str, *options: str) -> list[str]:
    """What nvidia-smi says about one field, a line per GPU; nothing without a driver or a device."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    found = subprocess.run(command, capture_output=True, text=True)
    return [line.strip() for line in found.stdout.splitlines() if line.strip()] if found.returncode == 0 else []


def hardware_name() -> str:
    """The hardware file to use: the environment variable HARDWARE, else what fits the GPUs that may be used."""
    if os.environ.get("HARDWARE"):
        return os.environ["HARDWARE"]
    usable = gpus(os.environ)
    memory = _nvidia_smi("memory.total", f"--id={','.join(usable)}") if usable else []
    if not memory:
        return "cpu"
    if not all(value.isdecimal() for value in memory):
        raise ParamsError("nvidia-smi does not tell the GPUs' memory; write HARDWARE=<a file in hardware/>")
    if min(int(value) for value in memory) < 75_000:
        return "gpu_24gb"
    return "gpu_8x80gb" if len(memory) >= 8 else "gpu_80gb"


def load_hardware(name: str = "") -> Hardware:
    """The hardware file of a name or path; by default the one that HARDWARE names, or that fits this machine.

    Raises:
        ParamsError: there is no such file, or it has a wrong key or value.
    """
    import yaml

    name = name or hardware_name()
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


def machines(hardware: Hardware, kind: Kind) -> int:
    """How many machines train."""
    alone = kind == "grpo" and hardware.server is not None and hardware.nodes > 1
    return hardware.nodes - alone


def processes(hardware: Hardware, kind: Kind) -> int:
    """How many processes train, on all machines together."""
    beside = kind == "grpo" and hardware.server is not None and hardware.nodes == 1
    taken = hardware.server.tensor_parallel_size if beside else 0
    return machines(hardware, kind) * hardware.processes - taken


def sequence_length(recipe: Params, kind: Kind, name: str) -> int:
    """The longest sequence of a phase in tokens: of SFT a (packed) row, of GRPO a prompt with its completion.

    What is read of the recipe here and below decides how a step is divided, not what is learned from it, so dvc.yaml
    does not name it among the parameters of a phase.
    """
    phase = getattr(recipe, kind)[name]
    prepared = recipe.prepare[phase.dataset]
    if kind == "grpo":
        return prepared.max_prompt_length + phase.trainer.get("max_completion_length", 512)
    limit = phase.trainer.get("max_length", 1024) or prepared.max_length
    return limit if phase.trainer.get("packing") else min(limit, prepared.max_length)


def divide(global_batch: int, processes: int, most: int) -> tuple[int, int] | None:
    """(per-device batch, accumulation steps) with product x processes = global_batch, the largest that fits."""
    if global_batch % processes:
        return None
    share = global_batch // processes
    per_device = next(size for size in range(min(share, most), 0, -1) if share % size == 0)
    return per_device, share // per_device


def most_per_device(recipe: Params, hardware: Hardware, kind: Kind, name: str) -> int:
    """Sequences of a phase that one device takes at once; one where even that has too many tokens."""
    return max(1, getattr(hardware.tokens_per_device, kind) // sequence_length(recipe, kind, name))


def division(recipe: Params, hardware: Hardware, kind: Kind, name: str) -> tuple[int, int]:
    """(per-device batch, accumulation steps) of a phase.

    Raises:
        ParamsError: the global batch cannot be divided over the processes; says which ones can.
    """
    size, count = getattr(recipe, kind)[name].global_batch_size, processes(hardware, kind)
    divided = divide(size, count, most_per_device(recipe, hardware, kind, name))
    if divided is None:
        # GRPO's step also holds whole groups, and generates all of them at once.
        unit = math.lcm(count, recipe.grpo[name].trainer.get("num_generations", 8)) if kind == "grpo" else count
        near = [str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n]
        raise ParamsError(
            f"params.yaml: {kind}.{name}.global_batch_size {size} cannot be divided over {count} processes; "
            f"write {' or '.join(near)}, or use another HARDWARE"
        )
    return divided


def check_batches(recipe: Params, hardware: Hardware) -> None:
    """Raise ParamsError when a global batch cannot be divided over the processes."""
    for name in recipe.sft:
        division(recipe, hardware, "sft", name)
    for name in recipe.grpo:
        division(recipe, hardware, "grpo", name)


def hardware_options(params: Params, hardware: Hardware, kind: Kind, name: str) -> dict[str, Any]:
    """The options of SFTConfig or GRPOConfig that the machine decides; none of them may stand in a recipe.

    Where the vLLM server is comes from the environment that `commands` gives to the trainers.
    """
    per_device, accumulation = division(params, hardware, kind, name)
    options = {
        **hardware.trainer,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
    }
    if kind == "sft":
        return options
    options |= hardware.grpo_trainer
    if hardware.grpo_trainer.get("vllm_mode") == "colocate":
        # A model's whole context, 131 072 tokens in the R1 distillations, would not fit beside the training.
        options["vllm_max_model_length"] = sequence_length(params, kind, name)
    if "ROLLOUT_SERVER" in os.environ:
        options["vllm_server_base_url"] = os.environ["ROLLOUT_SERVER"]
        options["vllm_group_port"] = int(os.environ["ROLLOUT_WEIGHTS_PORT"])
    return options


def allocation(environment: Mapping[str, str], nodes: int) -> Allocation:
    """This machine, or where a training wants several nodes those of the SLURM job.

    Raises:
        ParamsError: SLURM cannot be asked which nodes the job has.
    """
    hosts = ("localhost",)
    if nodes > 1 and "SLURM_JOB_ID" in environment:
        # The job's number is all that Snakemake's plugin leaves of SLURM's variables.
        squeue = ["squeue", "--noheader", "--format=%N", f"--jobs={environment['SLURM_JOB_ID']}"]
        try:
            found = subprocess.run(squeue, capture_output=True, text=True, check=True)
            names = ["scontrol", "show", "hostnames", found.stdout.strip()]
            found = subprocess.run(names, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ParamsError(f"the nodes of this SLURM job are unknown: {error}; is squeue in PATH?") from None
        hosts = tuple(found.stdout.split())
    return Allocation(hosts, gpus(environment))


def free_ports() -> Ports:
    """TCP ports that nothing listens on; other runs on this machine get others."""
    sockets = [socket.socket() for _ in range(3)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return Ports(*(each.getsockname()[1] for each in sockets))
    finally:
        for each in sockets:
            each.close()


def accelerate_options(hardware: Hardware, kind: Kind, host: str = "", port: int = 0) -> list[str]:
    """Options of `accelerate launch`; host and port are where the processes of several machines meet."""
    count = machines(hardware, kind)
    options = ["--num_processes", str(processes(hardware, kind)), "--num_machines", str(count)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the trainer's own options (bf16) decide
    options += ["--num_cpu_threads_per_process", str(hardware.threads)]
    if count == 1:
        options += ["--main_process_port", "0"]  # any free one
    else:
        options += ["--main_process_ip", host, "--main_process_port", str(port), "--same_network"]
        options += ["--deepspeed_multinode_launcher", "standard"]  # every node is started here, none by DeepSpeed
    return [*options, "--config_file", str(HERE / "accelerate" / f"{hardware.accelerate}.yaml")]


def srun(hosts: tuple[str, ...]) -> list[str]:
    """One process on each of the hosts, with all that the job has there (it may be a step of the job itself).

    When one of them ends, the others have a minute to do so: then all exit codes are those of the processes.
    """
    command = ["srun", "--overlap", f"--nodelist={','.join(hosts)}", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}"]
    return [*command, "--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL", "--wait=60"]


def commands(
    allocation: Allocation, hardware: Hardware, params: Params, kind: Kind, arguments: list[str], ports: Ports
) -> list[Command]:
    """What to start for a phase: the vLLM server where the hardware file has one and GRPO is run, then the trainers.

    Args:
        arguments: of `python -m workflow.sft` or `workflow.grpo`: the phase first, --model and --log among them.

    Raises:
        ParamsError: there are fewer nodes or GPUs than the hardware file counts on.
    """
    if len(allocation.hosts) < hardware.nodes:
        raise ParamsError(
            f"the hardware file is for {hardware.nodes} nodes and there is {len(allocation.hosts)}; "
            f"run it in a SLURM job with --nodes={hardware.nodes}, or use another HARDWARE"
        )
    on_gpus = not hardware.trainer.get("use_cpu")
    if on_gpus and len(allocation.gpus) < hardware.processes:
        raise ParamsError(
            f"the hardware file is for {hardware.processes} GPUs and {len(allocation.gpus)} may be used here "
            f"(CUDA_VISIBLE_DEVICES, nvidia-smi); use another HARDWARE"
        )
    hosts, devices = allocation.hosts[: hardware.nodes], allocation.gpus[: hardware.processes]
    several, training = hardware.nodes > 1, processes(hardware, kind)

    def visible(some: tuple[str, ...]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(some)} if on_gpus and not several else {}

    options = accelerate_options(hardware, kind, hosts[0], ports.rendezvous)
    argv = [sys.executable, "-m", "workflow.launch", "accelerate", *options, "-m", f"workflow.{kind}", *arguments]
    if several:
        argv = [*srun(hosts[: machines(hardware, kind)]), *argv]
    # At SIGTERM srun kills what it has started; other signals it passes on.
    stop = signal.SIGUSR1 if several else signal.SIGTERM
    trainers = Command("the training", argv, visible(devices[:training]), stop=stop)
    if kind == "sft" or hardware.server is None:
        return [trainers]

    # On one machine nothing is open to the network. vLLM would look for an address of its own, in vain offline.
    address, ours = (hosts[-1], hosts[0]) if several else ("127.0.0.1", "127.0.0.1")
    url = f"http://{address}:{ports.server}"
    argv = [sys.executable, "-m", "trl.scripts.vllm_serve", "--model", arguments[arguments.index("--model") + 1]]
    argv += ["--host", address, "--port", str(ports.server)]
    argv += ["--tensor_parallel_size", str(hardware.server.tensor_parallel_size)]
    argv += ["--gpu_memory_utilization", str(hardware.server.gpu_memory_utilization)]
    argv += ["--max_model_len", str(sequence_length(params, kind, arguments[0]))]
    argv += ["--log_level", "warning", "--seed", str(params.seed)]
    server = Command(
        "the vLLM server",
        [*srun(hosts[-1:]), *argv] if several else argv,
        {**visible(devices[training:]), "VLLM_HOST_IP": address, "VLLM_LOGGING_LEVEL": "INFO"},
        health=f"{url}/health",
        output=Path(arguments[arguments.index("--log") + 1]) / "vllm_server.log",
    )
    known = {"VLLM_HOST_IP": ours, "ROLLOUT_SERVER": url, "ROLLOUT_WEIGHTS_PORT": str(ports.weights)}
    return [server, replace(trainers, environment=trainers.environment | known)]


@dataclass
class Running:
    """A started command, and what its stderr said that counts: the first error and the last line."""

    command: Command
    process: subprocess.Popen[bytes]
    copier: threading.Thread | None = None
    error: str = ""
    last: str = ""


def run(commands: list[Command]) -> int:
    """Run servers and, once they are ready, the other commands side by side until all have succeeded or one has failed.

    When a server ends, or one of the others fails, all of them are ended. SIGTERM and SIGINT ask those others to end,
    which may write a checkpoint first and are waited for. Nothing is left running, also when this process is killed:
    a second process watches over it.

    Returns:
        0, or the exit code of the one that failed, or of a server that ended before the others (128 + n for signal
        n), or 75 where they ended because they were asked to. When it is not 0, the last line printed is one sentence:
        which process failed, how, and what it said last.
    """
    running: list[Running] = []
    stopping: list[int] = []

    def stop(signum: int, _: FrameType | None) -> None:
        stopping.append(signum)
        if len(running) == len(commands):
            _ask_to_end(running)

    watcher, groups = _watch()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    try:
        ended, code, how = _follow(commands, running, stopping, groups)
    finally:
        os.close(groups)
        while os.waitpid(watcher, os.WNOHANG) == (0, 0):
            for each in running:
                each.process.poll()  # so that it is no zombie, which the watcher would wait for
            time.sleep(0.05)
    code = code if code >= 0 else 128 - code
    if stopping and code in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + ended.command.stop):
        print(f"error: {ended.command.name} was stopped; the same command goes on from there", file=sys.stderr)
        return stage.STOPPED
    if code:
        _tell(ended, how)
    return code


def _follow(
    commands: list[Command], running: list[Running], stopping: list[int], groups: int
) -> tuple[Running, int, str]:
    """Start one command after the other; return the one whose end ends the run, its exit code, and how it ended."""
    for command in commands:
        running.append(_start(command))
        os.write(groups, b"%d\n" % running[-1].process.pid)
        since = told = time.monotonic()
        while command.health is not None and not _answers(command.health):
            now = time.monotonic()
            if stopping:
                return running[-1], -stopping[0], f"was stopped by {signal.Signals(stopping[0]).name}"
            if ended := _ended(running, stopping):
                return ended
            if now - since > READY_WITHIN:
                return running[-1], 1, f"was not ready after {READY_WITHIN:.0f} s"
            if now - told > TOLD_EVERY:
                told = now
                print(f"{command.name} is starting, {stage.clock(now - since)}", flush=True)
            time.sleep(0.5)
    if stopping:
        _ask_to_end(running)  # the signal came while they were started
    while not (ended := _ended(running, stopping)):
        time.sleep(0.1)
    first = ended[0]
    asked = first.process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    if first.command.health is not None and asked and not stopping:
        # SLURM asks the steps of a job to end, and not us: the trainers were asked too, and save first.
        until = time.monotonic() + SAVED_WITHIN
        trainers = [each for each in running if each.command.health is None]
        while time.monotonic() < until and any(each.process.poll() is None for each in trainers):
            time.sleep(0.1)
        for each in trainers:
            if each.process.poll() == stage.STOPPED:
                return each, stage.STOPPED, _how(stage.STOPPED)
    return ended


def _ended(running: list[Running], stopping: list[int]) -> tuple[Running, int, str] | None:
    """The process whose end ends the run, its exit code, and how it ended; None while all go on.

    A server may end once the others have succeeded or are being stopped.
    """
    others = [each for each in running if each.command.health is None]
    if others and all(each.process.poll() == 0 for each in others):
        return others[-1], 0, _how(0)
    for each in others if others and stopping else running:
        code = each.process.poll()
        if code or (code == 0 and each.command.health is not None):
            return each, code or 1, _how(code)
    return None


def _ask_to_end(running: list[Running]) -> None:
    """Send those that are no servers the signal that asks them to end."""
    for each in running:
        if each.command.health is None:
            each.process.send_signal(each.command.stop)


def _how(code: int) -> str:
    """How a process with this exit code ended; signal n is -n, or 128 + n where another process passed it on."""
    number = -code if code < 0 else code - 128
    if number not in signal.valid_signals():
        return f"ended with exit code {code}"
    hint = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{hint}"


def _start(command: Command) -> Running:
    """Start a command in a process group of its own."""
    if shutil.which(command.argv[0]) is None:
        raise stage.StageError(f"{command.name} needs {command.argv[0]}, which is not in PATH")
    options = {"env": {**os.environ, **command.environment}, "stdin": subprocess.DEVNULL, "process_group": 0}
    if command.output is not None:
        command.output.parent.mkdir(parents=True, exist_ok=True)
        with command.output.open("wb") as output:
            return Running(command, subprocess.Popen(command.argv, stdout=output, stderr=output, **options))
    running = Running(command, subprocess.Popen(command.argv, stderr=subprocess.PIPE, **options))
    running.copier = threading.Thread(target=_copy, args=(running,), daemon=True)
    running.copier.start()
    return running


def _copy(running: Running) -> None:
    """Pass the stderr of a process on to ours, until it is closed; an error that several nodes report only once."""
    assert running.process.stderr is not None
    with running.process.stderr as lines:
        for line in lines:
            said = line.decode(errors="replace").strip()
            if said and said == running.error:
                continue
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            running.last = said or running.last
            if said.startswith("error: ") and not running.error:
                running.error = said


def _answers(url: str) -> bool:
    """Whether an HTTP server says that it is ready; asked directly, also where a proxy is set."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False


def _tell(failed: Running, how: str) -> None:
    """Print the last lines of a server's output, and the sentence that says what went wrong."""
    said, where = failed.last, ""
    if failed.copier is not None:
        failed.copier.join(timeout=1)
        said = failed.last
    if failed.command.output is not None:
        lines = failed.command.output.read_text(errors="replace").strip().splitlines()
        print(*lines[-30:], sep="\n", file=sys.stderr)
        said, where = (lines or [""])[-1].strip(), f"; its output is in {failed.command.output}"
    if failed.error:
        # What an error of ours says needs no more words. Others may have printed after it: processes that it ended.
        if failed.error != failed.last:
            print(failed.error, file=sys.stderr)
    else:
        print(f"error: {failed.command.name} {how}{': ' if said else ''}{said}{where}", file=sys.stderr)


def _watch() -> tuple[int, int]:
    """Fork a process that ends the process groups written to a pipe, one per line, once the pipe is closed.

    We close it when the run is over; the kernel does when this process is killed. A group's first process gets
    SIGTERM, and what is left of the group after GRACE seconds SIGKILL.

    Returns:
        The process' id, and the end of the pipe to write to.
    """
    reader, writer = os.pipe()
    watcher = os.fork()
    if watcher:
        os.close(reader)
        return watcher, writer
    try:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            groups = [int(line) for line in pipe]
        until = time.monotonic() + GRACE
        for group in groups:
            with suppress(ProcessLookupError):
                os.kill(group, signal.SIGTERM)
        while (groups := [group for group in groups if _is_there(group)]) and time.monotonic() < until:
            time.sleep(0.05)
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def accelerate(arguments: list[str]) -> None:
    """`accelerate launch` in this process, which then ends as the training process did that failed first.

    accelerate by itself ends with exit code 1 and two screens of tracebacks, whatever happened. On several nodes
    srun starts one of these on each; SLURM_PROCID is its rank.

    Raises:
        SystemExit: with the exit code of the training process, 128 + n for signal n; what it said is printed once.
        Stopped: the training processes were asked to end before they could say anything.
    """
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stopping: list[int] = []
    told: list[int] = []
    before = stage.Stopped("the training was stopped while it was starting; the same command starts it again")

    def stop(signum: int, _: FrameType | None) -> None:
        # Asks the training processes; torchrun would kill them 30 s later, and forget their exit codes.
        stopping.append(signum)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.terminate()
                told.append(child.pid)
        if not told:
            raise before

    # After the imports, which a signal simply ends: an exception raised in one of them may be caught there.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, stop)
    logging.disable(logging.CRITICAL)  # torchrun's summary of what is said below
    rank = ["--machine_rank", os.environ["SLURM_PROCID"]] if "SLURM_PROCID" in os.environ else []
    with tempfile.TemporaryDirectory() as scratch:
        # The first process tokenises the data, and the others on this machine find it here.
        os.environ["DATASET_CACHE"] = scratch
        options = launch_command_parser().parse_args([*rank, "--log_dir", scratch, *arguments])
        try:
            launch_command(options)
            return
        except ChildFailedError as error:
            number, failed = first_to_fail(error.failures)
    # What stage.run left for us; a process that was killed left nothing.
    said = failed.error_file_data["message"].strip() if "timestamp" in failed.error_file_data else ""
    if stopping and failed.exitcode == -signal.SIGTERM and not said:
        raise before
    if said:
        print(said, file=sys.stderr)
    if not said.startswith("error: "):
        last = f": {said.splitlines()[-1]}" if said else ""
        print(f"error: training process {number} {_how(failed.exitcode)}{last}", file=sys.stderr)
    sys.exit(failed.exitcode if failed.exitcode >= 0 else 128 - failed.exitcode)


def first_to_fail(failures: dict[int, Any]) -> tuple[int, Any]:
    """The rank and the torch.distributed.elastic ProcessFailure of the training process that failed first."""

    def when(failure: Any) -> float:
        if failure.exitcode == -signal.SIGTERM:
            return math.inf  # torchrun ended it because of another one
        if failure.exitcode < 0:
            return failure.timestamp - 1  # in whole seconds; what the others said about it was later
        return failure.error_file_data.get("timestamp", failure.timestamp)

    return min(failures.items(), key=lambda item: when(item[1]))


def drop_finished(model: Path) -> None:
    """Remove the checkpoints that were kept of trainings that wrote this model.

    Called where it is read, so that DVC has it in its cache, or trained anew.
    """
    for run in CHECKPOINTS.glob("*.finished/run.json"):
        with suppress(FileNotFoundError):  # another stage that reads the model removes them, too
            if Path(json.loads(run.read_text())["output"]) == model:
                shutil.rmtree(run.parent, ignore_errors=True)


def main() -> None:
    if sys.argv[1:2] == ["accelerate"]:
        accelerate(sys.argv[2:])
        return
    from workflow import checkpoints
    from workflow.trackers import tracker_names

    parser = argparse.ArgumentParser(
        prog="python -m workflow.launch", epilog="All other options are passed on to workflow.sft or workflow.grpo."
    )
    parser.add_argument("stage", choices=["sft", "grpo"])
    parser.add_argument("phase", help="a name under sft or grpo in params.yaml")
    parser.add_argument("--model", required=True, help="folder of the model to start from")
    parser.add_argument("--dataset", required=True, help="prepared parquet to train on")
    parser.add_argument("--output", required=True, help="folder of the trained model")
    parser.add_argument("--log", required=True, help="folder of the stage's log, and of the vLLM server's")
    args, others = parser.parse_known_args()
    label = f"{args.stage} {args.phase}"
    stage.stoppable(label)
    stage.alone(Path(args.output))
    hardware, params = load_hardware(), load_params()
    pick(getattr(params, args.stage), args.phase, args.stage)
    check_batches(params, hardware)
    tracker_names()
    os.environ.update(hardware.environment)
    os.environ["STAGE_STARTED"] = str(time.time())
    what = [args.phase, "--model", args.model, "--dataset", args.dataset]
    arguments = [*what, "--output", args.output, "--log", args.log, *others]
    planned = commands(allocation(os.environ, hardware.nodes), hardware, params, args.stage, arguments, free_ports())
    # In a process of its own: what it loads is not needed later, and it decides nothing but whether to start.
    # In a group of its own: Ctrl-C is for this process alone.
    sound = subprocess.run([sys.executable, "-m", "workflow.preflight", *what], process_group=0)
    if sound.returncode:
        sys.exit(sound.returncode)
    model, dataset = Path(args.model), Path(args.dataset)
    folder = CHECKPOINTS / checkpoints.fingerprint(args.stage, args.phase, params, hardware, model, dataset)
    checkpoint = checkpoints.take_up(folder)
    drop_finished(model)
    drop_finished(Path(args.output))  # of other inputs
    (folder / checkpoints.RUN).write_text(json.dumps({"stage": label, "output": args.output}) + "\n")
    planned[-1].argv.extend(["--scratch", str(folder)])
    if checkpoint is not None:
        planned[-1].argv.extend(["--resume", str(checkpoint)])
        steps = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
        print(f"{label}: going on at step {checkpoints.step(checkpoint) + 1} of {steps}", flush=True)
    for command in planned:
        if command.health is not None:  # the trainers ask it directly, also where a proxy is set
            for name in ("no_proxy", "NO_PROXY"):
                direct = [urlsplit(command.health).hostname, os.environ.get(name)]
                os.environ[name] = ",".join(filter(None, direct))
    code = run(planned)
    if code:
        sys.exit(code)
    checkpoints.finish(folder)


if __name__ == "__main__":
    stage.run(main)
