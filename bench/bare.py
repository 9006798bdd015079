"""The calls of the stages as a user would write them without the pipeline, for bench/overhead.py.

python bench/bare.py {sft,grpo,generate} INPUT_MODEL DATA OUTPUT, with the recipe's numbers from params.yaml.
"""

import re
import sys
import time
import zlib
from pathlib import Path
from tempfile import mkdtemp

import yaml

what, model, data, output = sys.argv[1:]
params = yaml.safe_load(Path("params.yaml").read_text())
PROCESSES = 2  # as workflow/hardware/cpu.yaml


def sft() -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    phase = params["sft"]["cold_start"]
    config = SFTConfig(
        output_dir=mkdtemp(),
        per_device_train_batch_size=phase["global_batch_size"] // PROCESSES,
        per_device_eval_batch_size=1,
        seed=params["seed"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **phase["trainer"],
    )
    rows = Dataset.from_parquet(data).select_columns(["prompt", "completion"])
    parts = rows.train_test_split(test_size=phase["held_out"], seed=params["seed"])
    trainer = SFTTrainer(model=model, args=config, train_dataset=parts["train"], eval_dataset=parts["test"])
    trainer.train()
    trainer.save_model(output)
    trainer.accelerator.end_training()  # else gloo aborts it now and then while Python shuts down


def grpo() -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.rewards import accuracy_reward

    def taught_format(completions: list, **columns: object) -> list[float]:
        pattern = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>", re.DOTALL)
        return [float(bool(pattern.fullmatch(completion[0]["content"]))) for completion in completions]

    phase = params["grpo"]["reasoning"]
    config = GRPOConfig(
        output_dir=mkdtemp(),
        per_device_train_batch_size=phase["global_batch_size"] // PROCESSES,
        per_device_eval_batch_size=phase["global_batch_size"] // PROCESSES,
        reward_weights=[1.0, 0.2],
        seed=params["seed"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **phase["trainer"],
    )
    rows = Dataset.from_parquet(data).select_columns(["prompt", "solution"])
    parts = rows.train_test_split(test_size=phase["held_out"], seed=params["seed"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy_reward, taught_format],
        args=config,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
    )
    trainer.train()
    trainer.save_model(output)
    trainer.accelerator.end_training()  # else gloo aborts it now and then while Python shuts down


def generate() -> None:
    """The samples of the stage, request by request, in one call of vLLM; prints how many tokens a second it made."""
    import os

    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    import pandas as pd
    from vllm import LLM, SamplingParams

    task = params["tasks"]["arithmetic"]
    questions = pd.read_parquet(data)
    llm = LLM(
        model=model,
        seed=params["seed"],
        dtype=task["dtype"],
        max_model_len=128,
        enforce_eager=True,
        kv_cache_memory_bytes=2**30,
        enable_chunked_prefill=False,
    )
    chats, sampling = [], []
    for key, prompt in zip(questions["id"], questions["prompt"], strict=True):
        for sample in range(task["n_samples"]):
            chats.append(list(prompt))
            options = {name: task[name] for name in ("temperature", "top_p", "max_tokens")}
            sampling.append(SamplingParams(**options, seed=zlib.crc32(f"{params['seed']} {key} {sample}".encode())))
    started = time.monotonic()
    answers = llm.chat(chats, sampling)
    seconds = time.monotonic() - started
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    print(f"{tokens / seconds:.0f} tokens/s")
    pd.DataFrame({"completion": [answer.outputs[0].text for answer in answers]}).to_parquet(output)


{"sft": sft, "grpo": grpo, "generate": generate}[what]()
