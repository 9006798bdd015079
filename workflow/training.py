"""What SFT and GRPO share: trainer options, evaluation, checkpoints, the log of a run, the export of a finished model.

Imported inside the stages' main(): it needs transformers, and `--help` should not.
"""

import csv
import math
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from dvclive import Live
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from workflow import checkpoints, stage
from workflow.chat_template import end_of_turn
from workflow.health import conditions, most_reward, not_finite
from workflow.launch import Hardware, hardware_name, hardware_options, most_per_device, processes
from workflow.params import GRPOPhase, Params, Phase
from workflow.rows import check_weights, guilty
from workflow.trackers import PROJECT

# They differ from run to run, so they go to stage.json and DVCLive but not into the history.
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "step_time")
# The last value of each goes to stage.json.
FINAL = ("reward", "mean_token_accuracy", "eval_loss", "eval_mean_token_accuracy", "eval_reward")
# A checkpoint has all that a run needs to go on, and the one before it is kept.
RESUMABLE = {
    "save_strategy": "no",  # by itself; `Checkpoints` does
    "save_total_limit": None,  # transformers removes the one before the last while the last is being written
    "save_only_model": False,
    "ignore_data_skip": False,
    "enable_jit_checkpoint": False,
}

# Where several processes train on a CPU, transformers loads a checkpoint to `cpu:0`, a name that torch does not know.
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def trainer_options(
    params: Params, kind: Literal["sft", "grpo"], name: str, hardware: Hardware, scratch: str, resumed: bool = False
) -> dict[str, Any]:
    """Arguments of SFTConfig or GRPOConfig for a phase: the recipe's options, then what the machine decides.

    Args:
        scratch: the folder for checkpoints.
        resumed: the run goes on from one.
    """
    phase = getattr(params, kind)[name]
    options = {**phase.trainer, **RESUMABLE, **hardware_options(params, hardware, kind, name)}
    options.setdefault("log_level_replica", "error")  # as TRANSFORMERS_VERBOSITY is for the first process
    if resumed:
        options["eval_on_start"] = False  # it was done
    # SFT: the loss is a mean over batches of a mean over tokens, so larger ones would give another number.
    held_out_batch = 1
    if kind == "grpo":
        # Four times as many as in training: nothing is kept for a backward pass.
        most = 4 * most_per_device(params, hardware, kind, name)
        held_out_batch = eval_batch(phase, processes(hardware, kind), most)
    return {
        **options,
        "per_device_eval_batch_size": held_out_batch,
        "seed": params.seed,
        "output_dir": scratch,
        "project": PROJECT,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


def eval_batch(phase: GRPOPhase, devices: int, most: int) -> int:
    """Completions that one device makes at once in GRPO's evaluation, the most that fit.

    All devices together take whole groups, and, where it can be, a number of questions that divides those held
    out: then every batch is full, and the mean over batches is the mean over questions on every machine.

    Args:
        most: completions that one device takes at once.
    """
    group = phase.trainer.get("num_generations_eval") or phase.trainer.get("num_generations", 8)
    least = devices // math.gcd(devices, group)  # questions
    fitting = min(most * devices, phase.global_batch_size) // group
    sizes = [questions for questions in range(fitting, 0, -1) if questions % least == 0]
    questions = next((size for size in sizes if phase.held_out % size == 0), least)
    return questions * group // devices


def hold_out(rows: Dataset, phase: Phase, seed: int, where: str) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those held out of training, drawn with the seed; None where the phase has none."""
    if not phase.held_out:
        return rows, None
    if phase.held_out >= len(rows):
        raise stage.StageError(
            f"{where}.held_out is {phase.held_out}, and {phase.dataset} has {len(rows)} rows; write less, "
            "so that there is something to train on"
        )
    parts = rows.train_test_split(test_size=phase.held_out, seed=seed)
    return parts["train"], parts["test"]


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the end of a turn as its eos_token.

    Completions then end where the chat template says, also those of a base model whose eos_token is another.

    Raises:
        StageError: there is none, or it cannot render a chat.
    """
    if not (model / "tokenizer_config.json").is_file():
        raise stage.StageError(f"{model} has no tokenizer_config.json; add the tokenizer's files to the model's source")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        raise stage.StageError(f"the tokenizer in {model} has no chat template; start from an instruct model")
    tokenizer.eos_token = end_of_turn(tokenizer)
    return tokenizer


def lora_config(phase: Phase) -> LoraConfig | None:
    """The adapters of the phase, or None where all weights are trained."""
    return LoraConfig(task_type="CAUSAL_LM", **phase.lora.model_dump()) if phase.lora else None


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
            for row in state.log_history:  # of a run that goes on from a checkpoint
                self.write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(state.global_step, self.note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float | None],
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.write(state.global_step, logs)

    def write(self, step: int, logs: dict[str, float | None]) -> None:
        """Write the numbers of one logged step, and note those that are shown."""
        self.live.step = step
        # None: a reward that could judge no completion.
        known = {name: value for name, value in logs.items() if value is not None}
        for name, value in known.items():
            held_out = name.startswith("eval_")
            self.live.log_metric(f"eval/{name.removeprefix('eval_')}" if held_out else f"train/{name}", value)
        self.live.make_summary()
        noted = [f"{name.split('/')[-1]} {float(known[name]):.3f}" for name in self.shown if name in known]
        self.note = ", ".join(noted) or self.note

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.live.end()


class HealthGate(TrainerCallback):
    """End a run whose numbers are not finite; warn of a GRPO run that is not learning, or end it.

    TRL logs the same numbers, gathered from all processes, in every process, so all of them end at the same step and
    none waits for another.

    Args:
        where: the phase in params.yaml, e.g. `grpo.reasoning`.
    """

    trainer: Trainer  # TRL's with workflow.rows.RowNotes, to which this is added

    def __init__(self, where: str, phase: Phase) -> None:
        self.where = where
        self.health = phase.health if isinstance(phase, GRPOPhase) else None
        self.most = most_reward(phase) if isinstance(phase, GRPOPhase) else None
        self.warned: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_weights(self.trainer, self.where)
        if self.health is not None and self.health.action == "warn":
            for count in range(len(state.log_history)):  # what a run said before it went on from a checkpoint
                for name, message in conditions(self.health, state.log_history[: count + 1], self.most).items():
                    self.warned.setdefault(name, message)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.health is not None and self.trainer.generates_next:
            check_weights(self.trainer, self.where)  # sampling from broken ones fails deep in a library

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # DeepSpeed skips a step whose gradient overflows, in bfloat16 too.
        wrong = not_finite(state.log_history[-1], scaled=args.fp16 or args.deepspeed_plugin is not None)
        if wrong:
            raise stage.StageError(
                f"{self.where}: {wrong}, first in {guilty(self.trainer)}, so the weights are lost; usual causes are a "
                "learning rate that is too high, float16, or a row that is out of the ordinary: write a lower "
                "trainer.learning_rate or trainer.max_grad_norm, or trainer.bf16: true, or drop the row"
            )
        if "loss" in state.log_history[-1]:
            self.trainer.noted.clear()
        if self.health is None or self.health.action == "off":
            return
        for name, message in conditions(self.health, state.log_history, self.most).items():
            if self.health.action == "stop" and name != "solved":
                raise stage.StageError(f"{self.where}: {message} (a condition under {self.where}.health)")
            if name not in self.warned and state.is_world_process_zero:
                print(f"{'note' if name == 'solved' else 'warning'}: {self.where}: {message}", flush=True)
            self.warned.setdefault(name, message)


class Checkpoints(TrainerCallback):
    """Save the run every few minutes, and where it was asked to end, before it does.

    A run that goes on from a checkpoint computes, on a CPU, what it would have computed: a checkpoint also holds what
    transformers and TRL have not logged yet, and is only made where no completions are in use.

    Args:
        trainer: TRL's SFTTrainer or GRPOTrainer, to which this is added.
        stop: whether the run was asked to end; on several processes one that was asked is enough.
        minutes: between two checkpoints.
        resume: the checkpoint that the run goes on from.
        may_save: whether a run can go on from the end of the step that has just been made; None: from no step.
        log: a file that grows while the run goes on, to be saved and restored with it.

    Raises:
        Stopped: once the checkpoint is there, in every process.
    """

    def __init__(
        self,
        label: str,
        trainer: Trainer,
        stop: stage.Stop,
        minutes: float,
        resume: Path | None,
        may_save: Callable[[], bool] | None = lambda: True,
        log: Path | None = None,
    ) -> None:
        self.label, self.trainer, self.stop, self.minutes = label, trainer, stop, minutes
        self.resume, self.may_save, self.log = resume, may_save, log
        self.earlier = checkpoints.seconds_trained(resume) if resume else 0.0
        self.stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resume is not None:
            known = torch.load(self._unlogged(self.resume), map_location=args.device, weights_only=True)
            self.trainer._tr_loss = known["loss"]
            self.trainer._total_loss_scalar = known["total_loss"]
            self.trainer._globalstep_last_logged = known["last_logged"]
            self.trainer._metrics["train"].update(known["metrics"])
            self.trainer._total_train_tokens = known["tokens"]
            if self.log is not None and state.is_world_process_zero and (self.resume / self.log.name).is_file():
                self.log.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.resume / self.log.name, self.log)
        self.begun = self.saved = time.monotonic()
        self.stop.noted_only = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = state.is_world_process_zero and time.monotonic() - self.saved >= 60 * self.minutes
        here = torch.tensor([[self.stop.asked, due]], dtype=torch.int32, device=args.device)
        stopping, due = self.trainer.accelerator.gather(here).any(dim=0).tolist()
        self.stopping = self.stopping or stopping
        if self.stopping and self.may_save is None and state.global_step < state.max_steps:
            raise stage.Stopped(
                f"{self.label} was stopped at step {state.global_step}; it cannot go on from there", code=1
            )
        # After the last step comes the export, which takes no longer than a checkpoint.
        if (self.stopping or due) and self._can_go_on_from_here(state):
            check_weights(self.trainer, self.label.replace(" ", "."))
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sealed = self._can_go_on_from_here(state)
        if sealed:
            known = {
                "loss": self.trainer._tr_loss,
                "total_loss": self.trainer._total_loss_scalar,
                "last_logged": self.trainer._globalstep_last_logged,
                "metrics": dict(self.trainer._metrics["train"]),
                "tokens": self.trainer._total_train_tokens,
            }
            torch.save(known, self._unlogged(checkpoint))
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (checkpoint / "training_args.bin").unlink()  # a pickle, with the hub's token where there is one
            if sealed and self.log is not None and self.log.is_file():
                shutil.copyfile(self.log, checkpoint / self.log.name)
            if sealed:
                checkpoints.seal(checkpoint, self.earlier + time.monotonic() - self.begun)
                checkpoints.keep_two(checkpoint.parent)
        self.trainer.accelerator.wait_for_everyone()
        self.saved = time.monotonic()
        if self.stopping and sealed:
            raise stage.Stopped(
                f"{self.label} was stopped at step {state.global_step} of {state.max_steps}; "
                "the same command goes on from there"
            )

    def _can_go_on_from_here(self, state: TrainerState) -> bool:
        return self.may_save is not None and state.global_step < state.max_steps and self.may_save()

    def _unlogged(self, checkpoint: Path) -> Path:
        """What one process has not logged yet; losses are of its own part of a batch."""
        return checkpoint / f"unlogged_{self.trainer.args.process_index}.pt"


def write_history(log_history: list[dict[str, float]], file: Path) -> None:
    """One row per logged step, a column per logged number; an evaluation's are `eval_…`, on the row of its step.

    Timings are left out, so equal runs write equal files.
    """
    rows: dict[float, dict[str, float]] = {}
    for logged in log_history:
        if "train_runtime" not in logged:
            numbers = {name: value for name, value in logged.items() if name.removeprefix("eval_") not in TIMINGS}
            rows.setdefault(logged["step"], {}).update(numbers)
    columns = ["step", *sorted({name for row in rows.values() for name in row} - {"step"})]
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows.values())


def finish(
    trainer: Trainer, where: str, phase: Phase, start: Path, output: Path, log: Path, earlier: float = 0
) -> dict[str, Any]:
    """Export model, tokenizer and history of a finished run; return the facts for stage.json.

    Every process must call it: sharded parameters are gathered, and the peak memory is the sum over processes.

    Args:
        where: the phase in params.yaml, e.g. `grpo.reasoning`.
        start: the folder of the model that the run started from.
        earlier: seconds that were trained before the checkpoint that the run went on from.

    Raises:
        StageError: the run has ended before its last step, or has weights that are not finite; nothing is exported.
    """
    if trainer.state.global_step < trainer.state.max_steps:
        raise stage.StageError(
            f"the training ended at step {trainer.state.global_step} of {trainer.state.max_steps}, so its model is "
            f"not exported; give {phase.dataset} more rows, or write a lower trainer.max_steps"
        )
    check_weights(trainer, where)  # the last steps may not have been logged
    whole = Path(trainer.args.output_dir) / "model"
    export(trainer, phase, start, whole)
    if trainer.accelerator.is_main_process:
        if output.exists():
            shutil.rmtree(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(whole, output)
    used = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], device=trainer.args.device)
    peak = trainer.accelerator.gather(used).sum().item()
    if trainer.accelerator.is_main_process:
        log.mkdir(parents=True, exist_ok=True)
        write_history(trainer.state.log_history, log / "history.csv")
    last = next(row for row in reversed(trainer.state.log_history) if "train_runtime" in row)
    seconds = earlier + last["train_runtime"]
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
        "train_seconds": round(seconds, 1),
        "tokens": int(tokens),
        "tokens_per_second": round(tokens / seconds),
    }
    for row in trainer.state.log_history:
        facts |= {name: row[name] for name in FINAL if row.get(name) is not None}
    if facts["device"] == "cuda":
        facts["device_name"] = torch.cuda.get_device_name()
        facts["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return facts


def export(trainer: Trainer, phase: Phase, start: Path, output: Path) -> None:
    """Write the trained model as transformers and vLLM load it, and nothing else: no optimizer state, no pickle.

    Weights are whole and in phase.export_dtype, adapters merged. Every process must call it.
    """
    model: PreTrainedModel
    if phase.lora:
        # Merged outside of the trainer, whose parameters may be sharded, and in float32: rounded once.
        adapter = Path(trainer.args.output_dir) / "adapter"
        trainer.save_model(str(adapter))
        if not trainer.accelerator.is_main_process:
            return
        unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model too
        base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        shutil.rmtree(adapter)  # it has training_args.bin
        weights = model.state_dict()
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.accelerator.is_main_process:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = getattr(torch, phase.export_dtype)
    tokenizer = trainer.processing_class
    model.generation_config = generation_config(phase, tokenizer, model.generation_config)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True  # the trainers turn it off
    # ZeRO-2 copies every weight, so a tied one is no longer seen to be the same.
    weights = {name: w.to("cpu", dtype) for name, w in weights.items() if name not in model.all_tied_weights_keys}
    with stage.writing(output, sum(w.nbytes for w in weights.values())):
        model.save_pretrained(output, state_dict=weights)
    model.config.dtype = dtype  # save_pretrained writes the trainer's
    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)


def generation_config(phase: Phase, tokenizer: PreTrainedTokenizerBase, start: GenerationConfig) -> GenerationConfig:
    """How the model is sampled where nobody says otherwise: GRPO as its rollouts were, SFT as the start model.

    It ends at the end of a turn and at every eos token of the start model. A start model's top_k and repetition
    penalty are not kept: they were made for short answers.
    """
    eos = [tokenizer.eos_token_id]
    known = start.eos_token_id if isinstance(start.eos_token_id, list) else [start.eos_token_id]
    eos += [token for token in known if token is not None and token not in eos]
    if isinstance(phase, GRPOPhase):
        temperature, top_p = phase.trainer.get("temperature", 1.0), phase.trainer.get("top_p", 1.0)
        top_k = phase.trainer.get("top_k", 0)
    else:
        temperature, top_p, top_k = start.temperature or 1.0, start.top_p or 1.0, 0
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
