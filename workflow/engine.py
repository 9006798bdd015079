"""One vLLM engine of the stage generate: it takes chunks of a task's samples until none is left.

`python -m workflow.generate` starts one of these for every GPU (or group of GPUs) that it was given.
"""

import argparse
import json
import os
import resource
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
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


def prompt_file(folder: Path) -> Path:
    """Where the questions lie as JSON: a list of {id, prompt}, the prompt as token ids."""
    return folder / "prompts.json"


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
    part = file.with_suffix(".part")  # one name, which the next run overwrites after a kill
    with stage.writing(part, table.nbytes), part.open("wb") as handle:
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
    parser.add_argument("--folder", type=Path, required=True, help="folder of the prompts and the finished chunks")
    parser.add_argument("--engines", type=int, required=True, help="how many there are")
    parser.add_argument("--number", type=int, required=True, help="of this one")
    args = parser.parse_args()
    params, hardware = load_params(), load_hardware()
    task = pick(params.tasks, args.task, "tasks")

    import pyarrow as pa
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind

    unknown = sorted(set(hardware.vllm) - {field.name for field in fields(EngineArgs)})
    if unknown:
        raise stage.StageError(f"vllm.{unknown[0]} in the hardware file is no argument of vllm.LLM; remove it")
    questions = json.loads(prompt_file(args.folder).read_text())
    llm = LLM(
        model=str(args.model),
        max_model_len=max(len(question["prompt"]) for question in questions) + task.max_tokens,
        enable_prefix_caching=True,
        seed=params.seed,
        dtype=task.dtype,
        use_tqdm_on_load=False,
        **hardware.vllm,
    )
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
    size = hardware.generation.chunk
    parts = chunks(len(requests), size)
    prompts = [questions[question]["prompt"] for question, _ in requests]
    missing = sum(len(part) for chunk, part in enumerate(parts) if not chunk_file(args.folder, chunk).exists())
    # No engine takes so much in advance that nothing is left for the others.
    ahead = min(hardware.generation.ahead, missing // (2 * args.engines))
    progress = stage.Progress("generate" if args.engines == 1 else f"generate, engine {args.number}", len(requests))
    progress.update(len(requests) - missing)
    started, tokens = time.monotonic(), 0
    found: dict[int, dict[int, Any]] = defaultdict(dict)
    finished = answers(llm, take(args.folder, len(parts)), parts, prompts, sampling, ahead)
    for count, (request, output) in enumerate(finished, start=1):
        chunk = request // size
        found[chunk][request] = output
        tokens += len(output.token_ids)
        progress.update(len(requests) - missing + count)
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
            write(pa.Table.from_pylist(rows), chunk_file(args.folder, chunk))
    facts = {
        "tokens": tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    (args.folder / f"engine{args.number}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    stage.run(main)
