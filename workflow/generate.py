"""Sample answers to the questions of one task with vLLM (the same code on CPU and GPU)."""

import argparse
import os
import time
import zlib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workflow import stage
from workflow.launch import load_hardware
from workflow.params import load_params, pick


class ProgressLines(tqdm):
    """vLLM's progress bar as a line every few seconds, like the other stages' progress."""

    def __init__(self, *iterable: Any, **options: Any) -> None:
        super().__init__(*iterable, **{**options, "mininterval": 5})

    def display(self, *_: Any, **__: Any) -> None:
        rate = self.format_dict["rate"]
        if self.desc == "Processed prompts" and rate:
            print(f"generate: {self.n}/{self.total}, ETA {stage.clock((self.total - self.n) / rate)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="a name under tasks in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--questions", type=Path, required=True, help="the task's prepared parquet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    task = pick(params.tasks, args.task, "tasks")
    hardware = load_hardware()

    # One engine in this process: on a CPU it starts in 10 s instead of 33 s.
    os.environ.update(hardware.environment, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig, AutoTokenizer
    from vllm import LLM, SamplingParams

    questions = pq.read_table(args.questions, columns=["id", "prompt"]).to_pylist()[: task.questions]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer.apply_chat_template(question["prompt"], tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    prompts = [{"prompt_token_ids": ids} for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    needed = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + task.max_tokens
    context = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if needed > context:
        raise stage.StageError(
            f"the longest question and tasks.{args.task}.max_tokens need {needed} tokens, the context of "
            f"{args.model.name} is {context}; write max_tokens {task.max_tokens - needed + context} or less"
        )
    llm = LLM(
        model=str(args.model),
        max_model_len=needed,
        enable_prefix_caching=True,
        seed=params.seed,
        dtype=task.dtype,
        use_tqdm_on_load=False,
        **hardware.vllm,
    )
    # A request per sample: its seed says what it draws, whatever shares the batch with it. Hashed, so that runs with
    # neighbouring seeds have none in common.
    requests = [(question, sample) for question in range(len(questions)) for sample in range(task.n_samples)]
    seeds = [zlib.crc32(f"{params.seed} {questions[q]['id']} {sample}".encode()) for q, sample in requests]
    sampling = {"temperature": task.temperature, "top_p": task.top_p, "max_tokens": task.max_tokens}
    started = time.monotonic()
    answers = llm.generate(
        [prompts[question] for question, _ in requests],
        [SamplingParams(**sampling, seed=seed) for seed in seeds],
        use_tqdm=ProgressLines,
    )
    rows = [
        {
            "id": questions[question]["id"],
            "sample": sample,
            "seed": seed,
            "completion": answer.outputs[0].text,
            "tokens": len(answer.outputs[0].token_ids),
            "finish_reason": answer.outputs[0].finish_reason,
        }
        for (question, sample), seed, answer in zip(requests, seeds, answers, strict=True)
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), args.output)
    tokens = sum(row["tokens"] for row in rows)
    speed = round(tokens / (time.monotonic() - started))
    summary = f"{len(rows)} samples, {tokens / len(rows):.0f} tokens each, {speed} tokens/s"
    item = f"{args.model.name} {args.task}"
    facts = {"samples": len(rows), "tokens": tokens, "tokens_per_second": speed}
    libraries = [packages_distributions()["vllm"][0], "torch", "transformers"]
    stage.record(args.log, "generate", item, libraries, summary, **facts)


if __name__ == "__main__":
    stage.run(main)
