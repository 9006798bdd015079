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
MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes")  # options of vLLM that change no sample


def read_questions(file: Path, count: int | None) -> list[dict[str, Any]]:
    """The first `count` questions of a task, or all: id and prompt.

    Raises:
        StageError: there are none, or fewer.
    """
    import pyarrow.parquet as pq

    if not file.is_file():
        raise stage.StageError(f"{file} does not exist; write it with: dvc repro")
    questions = pq.read_table(file, columns=["id", "prompt"]).to_pylist()
    if len(questions) < (count or 1):
        raise stage.StageError(
            f"{file} has {len(questions)} questions and the task asks {count or 'at least 1'}; ask less"
        )
    return questions[:count]


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
        "environment": hardware.environment,
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
    stage.stoppable(f"generate {args.model.name} {args.task}")
    stage.alone(args.output)
    launch.drop_finished(args.model)

    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig, AutoTokenizer

    questions = read_questions(args.questions, task.questions)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer.apply_chat_template(one["prompt"], tokenize=False, add_generation_prompt=True) for one in questions
    ]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    needed = max(map(len, prompts)) + task.max_tokens
    context = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if needed > context:
        raise stage.StageError(
            f"the longest question and tasks.{args.task}.max_tokens need {needed} tokens, the context of "
            f"{args.model.name} is {context}; write max_tokens {task.max_tokens - needed + context} or less"
        )
    libraries = [packages_distributions()["vllm"][0], "torch", "transformers"]
    settings = {
        **task.model_dump(exclude={"answer", "questions"}),
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "tensor_parallel_size": hardware.vllm.get("tensor_parallel_size", 1),
        "options": {name: value for name, value in sorted(hardware.vllm.items()) if name not in MEMORY},
        **{name.removesuffix("-cpu"): version(name) for name in libraries},
    }
    asked = [{"id": one["id"], "prompt": ids} for one, ids in zip(questions, prompts, strict=True)]
    folder = SCRATCH / fingerprint(args.model, asked, {"seed": params.seed, **settings}, hardware, libraries)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("*.taken"), *folder.glob("*.part"), *folder.glob("engine*.json")]:
        file.unlink()  # of a run that was killed
    parts = engine.chunks(len(questions) * task.n_samples, hardware.generation.chunk)
    files = [engine.chunk_file(folder, chunk) for chunk in range(len(parts))]
    missing = [file for file in files if not file.exists()]
    kept = sum(len(part) for part, file in zip(parts, files, strict=True) if file not in missing)
    if kept:
        print(f"generate: {kept} samples are there from a run that did not end", flush=True)
    if missing:
        engine.prompt_file(folder).write_text(json.dumps(asked))
        devices = () if hardware.trainer.get("use_cpu") else gpus(os.environ)
        what = [args.task, "--model", str(args.model), "--folder", str(folder)]
        code = launch.run(engines(hardware, devices, len(missing), what))
        if code:
            sys.exit(code)

    table = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
    engine.write(table.replace_schema_metadata({"generation": json.dumps(settings)}), args.output)
    lengths = table["tokens"].to_pylist()
    facts: dict[str, Any] = {"samples": len(lengths), "tokens": sum(lengths), "samples_kept": kept}
    summary = f"{len(lengths)} samples, {sum(lengths) / len(lengths):.0f} tokens each"
    if ran := [json.loads(file.read_text()) for file in folder.glob("engine*.json")]:
        facts["tokens_per_second"] = round(sum(one["tokens"] / one["seconds"] for one in ran))
        facts["peak_memory_mib"] = max(one["peak_memory_mib"] for one in ran)
        summary += f", {facts['tokens_per_second']} tokens/s"
    stage.record(args.log, "generate", f"{args.model.name} {args.task}", libraries, summary, [args.output], **facts)
    shutil.rmtree(folder)


def engines(hardware: Hardware, devices: tuple[str, ...], most: int, arguments: list[str]) -> list[launch.Command]:
    """The engines to start: one for every `vllm.tensor_parallel_size` GPUs, or `generation.engines`.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        most: chunks there are to take.
        arguments: of workflow.engine, without its number.

    Raises:
        ParamsError: an engine needs more GPUs than there are.
    """
    each = hardware.vllm.get("tensor_parallel_size", 1)
    count = hardware.generation.engines or max(1, len(devices) // each)
    if devices and count * each > len(devices):
        raise ParamsError(
            f"the hardware file asks for {count} engines (generation.engines) on {each} GPUs each "
            f"(vllm.tensor_parallel_size) and {len(devices)} may be used; write less"
        )
    count = min(count, most)
    return [
        launch.Command(
            f"engine {number}",
            [sys.executable, "-m", "workflow.engine", *arguments, "--engines", str(count), "--number", str(number)],
            {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * each : (number + 1) * each])} if devices else {},
        )
        for number in range(count)
    ]


if __name__ == "__main__":
    stage.run(main)
