"""One vLLM engine of the stage generate: it takes chunks of a task's samples until none is left.

`python -m workflow.generate` starts one of these for every GPU (or group of GPUs) that it was given.
"""

import argparse
import hashlib
import json
import os
import resource
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import stage
from workflow.launch import load_hardware
from workflow.params import load_params, pick

if TYPE_CHECKING:
    import pyarrow as pa
    from vllm import LLM, SamplingParams


def chunks(requests: int, size: int) -> list[range]:
    """The requests of every chunk. Request r is sample r % n of question r // n."""
    return [range(first, min(first + size, requests)) for first in range(0, requests, size)]


def chunk_file(folder: Path, chunk: int) -> Path:
    """Where the samples of a finished chunk lie."""
    return folder / f"{chunk:06d}.parquet"


def seed_of(seed: int, question: str, sample: int) -> int:
    """The seed of one sample: hashed, so that runs with neighbouring seeds have none in common."""
    return zlib.crc32(f"{seed} {question} {sample}".encode())


def take(folder: Path, count: int) -> Iterator[int]:
    """The chunks that are not there and that no other engine has taken, each when it is asked for."""
    for chunk in range(count):
        if not chunk_file(folder, chunk).exists():
            try:
                (folder / f"{chunk:06d}.taken").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield chunk


def write(table: "pa.Table", file: Path) -> None:
    """Write a parquet file that is whole or not there, also after a loss of power."""
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as handle:
        pq.write_table(table, handle)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(file)


def answers(
    llm: "LLM",
    todo: Iterator[int],
    parts: list[range],
    prompts: list[list[int]],
    sampling: "list[SamplingParams]",
    ahead: int,
) -> Iterator[tuple[int, Any]]:
    """Each request with its vllm CompletionOutput, as they are finished.

    Args:
        todo: chunks, taken one by one.
        parts: the requests of every chunk.
        prompts, sampling: token ids and parameters of every request.
        ahead: the next chunk is taken when no more requests than this are unfinished. With 0 every chunk runs alone,
            from an empty prefix cache, so on a CPU what it holds does not depend on what ran before.
    """
    engine = llm.llm_engine
    while True:
        if engine.get_num_unfinished_requests() <= ahead and (chunk := next(todo, None)) is not None:
            if not engine.has_unfinished_requests():
                llm.reset_prefix_cache()
            for request in parts[chunk]:
                engine.add_request(str(request), {"prompt_token_ids": prompts[request]}, sampling[request])
        elif engine.has_unfinished_requests():
            yield from ((int(output.request_id), output.outputs[0]) for output in engine.step())
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="a name under tasks in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--questions", type=Path, required=True, help="the task's prepared parquet")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the finished chunks")
    parser.add_argument("--number", type=int, required=True, help="of this engine")
    args = parser.parse_args()
    params, hardware = load_params(), load_hardware()
    task = pick(params.tasks, args.task, "tasks")

    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig, AutoTokenizer

    questions = pq.read_table(args.questions, columns=["id", "prompt"]).to_pylist()[: task.questions]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer.apply_chat_template(question["prompt"], tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    needed = max(map(len, prompts)) + task.max_tokens
    context = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if needed > context:
        raise stage.StageError(
            f"the longest question and tasks.{args.task}.max_tokens need {needed} tokens, the context of "
            f"{args.model.name} is {context}; write max_tokens {task.max_tokens - needed + context} or less"
        )

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=str(args.model),
        max_model_len=needed,
        enable_prefix_caching=True,
        seed=params.seed,
        dtype=task.dtype,
        use_tqdm_on_load=False,
        **hardware.vllm,
    )
    settings = {
        **task.model_dump(exclude={"answer", "questions"}),
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "tensor_parallel_size": hardware.vllm.get("tensor_parallel_size", 1),
        "vllm": version(packages_distributions()["vllm"][0]),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    requests = [(question, sample) for question in range(len(questions)) for sample in range(task.n_samples)]
    seeds = [seed_of(params.seed, questions[question]["id"], sample) for question, sample in requests]
    sampling = [
        SamplingParams(
            temperature=task.temperature,
            top_p=task.top_p,
            max_tokens=task.max_tokens,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for seed in seeds
    ]
    size, ahead = hardware.generation.chunk, hardware.generation.ahead
    parts = chunks(len(requests), size)
    prompts = [prompts[question] for question, _ in requests]
    progress = stage.Progress("generate", len(requests))
    there = sum(len(part) for chunk, part in enumerate(parts) if chunk_file(args.folder, chunk).exists())
    progress.update(there)
    started, tokens = time.monotonic(), 0
    found: dict[int, dict[int, Any]] = defaultdict(dict)
    finished = answers(llm, take(args.folder, len(parts)), parts, prompts, sampling, ahead)
    for count, (request, output) in enumerate(finished, start=1):
        chunk = request // size
        found[chunk][request] = output
        tokens += len(output.token_ids)
        progress.update(there + count)
        if len(found[chunk]) == len(parts[chunk]):
            outputs = found.pop(chunk)
            rows = [
                {
                    "id": questions[requests[request][0]]["id"],
                    "sample": requests[request][1],
                    "seed": seeds[request],
                    "completion": outputs[request].text,
                    "tokens": len(outputs[request].token_ids),
                    "finish_reason": outputs[request].finish_reason,
                }
                for request in parts[chunk]
            ]
            table = pa.Table.from_pylist(rows).replace_schema_metadata({"generation": json.dumps(settings)})
            write(table, chunk_file(args.folder, chunk))
    facts = {
        "tokens": tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    (args.folder / f"engine{args.number}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    stage.run(main)
