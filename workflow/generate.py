"""Sample answers to the questions of one task with vLLM (the same code on CPU and GPU).

Every sample is a request of its own with a seed of its own, so what it draws does not depend on what shares the batch
with it. Requests are worked off in chunks by as many engines (workflow/engine.py) as there are GPUs for; a finished
chunk lies in .scratch/generate/ until all are there, so a run that was killed goes on where it was.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from workflow import engine, launch, stage
from workflow.launch import Hardware, gpus, load_hardware
from workflow.params import ParamsError, load_params, pick

SCRATCH = Path(".scratch/generate")


def fingerprint(
    model: Path, questions: list[dict[str, Any]], settings: dict[str, Any], hardware: Hardware, libraries: list[str]
) -> str:
    """A name for everything that the samples depend on: chunks of other inputs are never taken for these."""
    parts = {
        "model": {
            str(file.relative_to(model)): hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
            for file in sorted(model.rglob("*"))
            if file.is_file()
        },
        "questions": questions,
        "settings": settings,
        "vllm": hardware.vllm,
        "chunk": hardware.generation.chunk,
        "versions": [version(library) for library in libraries],
        "code": Path(engine.__file__).read_text(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="a name under tasks in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--questions", type=Path, required=True, help="the task's prepared parquet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params, hardware = load_params(), load_hardware()
    task = pick(params.tasks, args.task, "tasks")
    os.environ.update(hardware.environment)
    os.environ["STAGE_STARTED"] = str(time.time())

    import pyarrow as pa
    import pyarrow.parquet as pq

    questions = pq.read_table(args.questions, columns=["id", "prompt"]).to_pylist()[: task.questions]
    settings = {"seed": params.seed, **task.model_dump(exclude={"answer"})}
    libraries = [packages_distributions()["vllm"][0], "torch", "transformers"]
    folder = SCRATCH / fingerprint(args.model, questions, settings, hardware, libraries)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("*.taken"), *folder.glob("*.part")]:
        file.unlink()  # of a run that was killed
    parts = engine.chunks(len(questions) * task.n_samples, hardware.generation.chunk)
    files = [engine.chunk_file(folder, chunk) for chunk in range(len(parts))]
    missing = [file for file in files if not file.exists()]
    kept = sum(len(part) for part, file in zip(parts, files, strict=True) if file not in missing)
    if kept:
        print(f"generate: {kept} samples are there from a run that did not end", flush=True)
    if missing:
        what = [args.task, "--model", args.model, "--questions", args.questions, "--folder", folder]
        code = launch.run(engines(hardware, gpus(os.environ), len(missing), [str(word) for word in what]))
        if code:
            sys.exit(code)

    table = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
    engine.write(table, args.output)
    lengths = table["tokens"].to_pylist()
    facts: dict[str, Any] = {"samples": len(lengths), "tokens": sum(lengths), "samples_kept": kept}
    summary = f"{len(lengths)} samples, {sum(lengths) / len(lengths):.0f} tokens each"
    if ran := [json.loads(file.read_text()) for file in folder.glob("engine*.json")]:
        facts["tokens_per_second"] = round(sum(one["tokens"] / one["seconds"] for one in ran))
        facts["peak_memory_mib"] = max(one["peak_memory_mib"] for one in ran)
        summary += f", {facts['tokens_per_second']} tokens/s"
    stage.record(args.log, "generate", f"{args.model.name} {args.task}", libraries, summary, **facts)
    shutil.rmtree(folder)


def engines(hardware: Hardware, devices: tuple[str, ...], most: int, arguments: list[str]) -> list[launch.Command]:
    """The engines to start: one for every `tensor_parallel_size` GPUs, `replicas` on a CPU.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        most: chunks there are to take.
        arguments: of workflow.engine, without its number.

    Raises:
        ParamsError: an engine needs more GPUs than there are.
    """
    each = hardware.vllm.get("tensor_parallel_size", 1)
    if devices and len(devices) < each:
        raise ParamsError(
            f"the hardware file's vllm.tensor_parallel_size is {each} and {len(devices)} GPUs may be used"
        )
    count = hardware.generation.engines or max(1, len(devices) // each)
    return [
        launch.Command(
            f"engine {number}",
            [sys.executable, "-m", "workflow.engine", *arguments, "--number", str(number)],
            {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * each : (number + 1) * each])} if devices else {},
        )
        for number in range(min(count, most))
    ]


if __name__ == "__main__":
    stage.run(main)
