"""What SFT and GRPO share: trainer options, the log of a run, and the export of a finished model.

Imported inside the stages' main(): it needs transformers, and `--help` should not.
"""

import csv
import resource
from pathlib import Path
from typing import Any, Literal

import torch
from dvclive import Live
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from workflow import stage
from workflow.launch import Hardware, divide, hardware_name
from workflow.params import Phase

# They differ from run to run, so they go to stage.json and DVCLive but not into the history.
TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")


def trainer_options(
    kind: Literal["sft", "grpo"], phase: Phase, seed: int, hardware: Hardware, scratch: str
) -> dict[str, Any]:
    """Arguments of SFTConfig or GRPOConfig: the recipe's options, then how the hardware divides the batch."""
    batch = divide(phase.global_batch_size, hardware.processes, getattr(hardware.per_device_batch, kind))
    if batch is None:
        raise stage.StageError(f"global_batch_size {phase.global_batch_size} does not divide over the processes")
    per_device, accumulation = batch
    return {
        **phase.trainer,
        **hardware.trainer,
        **(hardware.grpo_trainer if kind == "grpo" else {}),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "seed": seed,
        "output_dir": scratch,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; raises StageError when it cannot render a chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        raise stage.StageError(f"the tokenizer in {model} has no chat template; start from an instruct model")
    return tokenizer


class RunLog(TrainerCallback):
    """Write every logged step to DVCLive, and a line of progress to the terminal, from the first process."""

    def __init__(self, label: str, folder: Path, shown: list[str]) -> None:
        self.label, self.folder, self.shown = label, folder, shown

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.live = Live(str(self.folder), dvcyaml=None, save_dvc_exp=False, report=None)
            self.progress = stage.Progress(self.label, state.max_steps)
            self.note = ""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(state.global_step, self.note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.live.step = state.global_step
        for name, value in logs.items():
            self.live.log_metric(f"train/{name}", value)
        self.live.make_summary()
        self.note = ", ".join(f"{name.split('/')[-1]} {float(logs[name]):.3f}" for name in self.shown if name in logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.live.end()


def write_history(log_history: list[dict[str, float]], file: Path) -> None:
    """One row per logged step, a column per logged number; timings left out, so equal runs write equal files."""
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in log_history if "train_runtime" not in row]
    columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def finish(trainer: Trainer, output: Path, log: Path) -> dict[str, Any]:
    """Export model, tokenizer and history of a finished run; return the facts for stage.json.

    Every process must call it: sharded parameters are gathered, and the peak memory is the sum over processes.
    """
    trainer.save_model(str(output))
    used = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], device=trainer.args.device)
    peak = trainer.accelerator.gather(used).sum().item()
    if trainer.accelerator.is_main_process:
        (output / "training_args.bin").unlink()  # a pickle, and it holds the hub token
        log.mkdir(parents=True, exist_ok=True)
        write_history(trainer.state.log_history, log / "history.csv")
    last = next(row for row in reversed(trainer.state.log_history) if "train_runtime" in row)
    tokens = max(row.get("num_tokens", 0) for row in trainer.state.log_history)
    facts = {
        "hardware": hardware_name(),
        "per_device_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "peak_memory_mib": round(peak),
        "devices": trainer.accelerator.num_processes,
        "device": str(trainer.args.device.type),
        "steps": trainer.state.global_step,
        "loss": last["train_loss"],
        "train_seconds": round(last["train_runtime"], 1),
        "tokens": int(tokens),
        "tokens_per_second": round(tokens / last["train_runtime"]),
    }
    if facts["device"] == "cuda":
        facts["device_name"] = torch.cuda.get_device_name()
        facts["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return facts
