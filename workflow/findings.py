"""What is known about a training phase before it runs, and the checks of it: each returns its findings."""

import ast
import importlib.util
import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workflow import memory, stage
from workflow.launch import CHECKPOINTS, Hardware, division, hardware_name, hardware_options, processes, sequence_length
from workflow.memory import GIB
from workflow.params import GRPOPhase, Params, ParamsError, Phase, Prepare, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sft", "grpo"]

SAMPLE = 64  # rows of a data set that are looked at
ENOUGH = 0.9  # share of a reward that gold solutions must earn: a few are written in a way that nothing reads
# Options that decide what is learned; TRL's defaults for them have changed before.
WRITTEN = ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16"]
WRITTEN_SFT = ["max_length", "packing"]
WRITTEN_GRPO = ["num_generations", "max_completion_length", "temperature", "top_p", "beta", "epsilon", "num_iterations"]
WRITTEN_GRPO += ["loss_type", "scale_rewards", "mask_truncated_completions"]
# Rewards that look for <think> in a completion, their `…_as_published` variants too.
TAG_REWARDS = ("format", "tag_count", "strict_format", "soft_format", "xmlcount")
# A completion as SFT teaches it, to see what a chat template makes of it.
TAUGHT = "<think>\nthought\n</think>\n<answer>\nanswer\n</answer>"
QUESTION = [{"role": "user", "content": "question"}]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a recipe, in three short parts."""

    level: Literal["error", "warning"]
    where: str  # the key in params.yaml, or a file
    what: str
    why: str
    write: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.why}; write {self.write}"


def error(where: str, what: str, why: str, write: str) -> Finding:
    """A finding that makes the training fail or its result worthless."""
    return Finding("error", where, what, why, write)


def warning(where: str, what: str, why: str, write: str) -> Finding:
    """A finding with which the training goes on."""
    return Finding("warning", where, what, why, write)


@dataclass(frozen=True)
class Run:
    """One training phase before it runs, with what is on disk already; what is not there is None or empty."""

    params: Params
    hardware: Hardware
    kind: Kind
    name: str
    batch: tuple[int, int] | None  # per device and accumulated; None where the global batch cannot be divided
    options: dict[str, Any]  # of the trainer: TRL's defaults, then the recipe's, then the hardware's
    model: Path
    config: dict[str, Any] | None  # the model's config.json
    tokenizer: "PreTrainedTokenizerBase | None"
    dataset: Path
    rows: int | None  # of the data set, the held-out ones included
    sample: list[dict[str, Any]]  # its first rows
    lengths: list[int]  # of the sample, prompt and completion, in tokens

    @property
    def phase(self) -> Phase:
        return self.params.phases[self.name]

    @property
    def prepare(self) -> Prepare:
        return self.params.prepare[self.phase.dataset]

    @property
    def root(self) -> str:
        """The name of the source at the start of the chain of phases."""
        return root_of(self.params, self.name)

    @property
    def source(self) -> Source:
        return self.params.sources[self.root]

    @property
    def processes(self) -> int:
        """How many processes train, on all machines together."""
        return processes(self.hardware, self.kind)

    @property
    def questions(self) -> int:
        """Rows of the data set that one optimizer step of GRPO samples completions for."""
        return self.phase.global_batch_size // self.options["num_generations"]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained on."""
        return sequence_length(self.params, self.kind, self.name)

    @property
    def shape(self) -> memory.Shape | None:
        """The model's shape, where it is one that workflow/memory.py knows."""
        return None if self.config is None else memory.shape_of(self.config)

    def key(self, name: str) -> str:
        """Where a key of this phase is in params.yaml."""
        return f"{self.kind}.{self.name}.{name}"


def root_of(params: Params, name: str) -> str:
    """The source that a phase starts from, by way of other phases."""
    while name in params.phases:
        name = params.phases[name].start_from
    return name


@cache
def trainer_defaults(kind: Kind) -> dict[str, Any]:
    """The options of trl.SFTConfig or trl.GRPOConfig that have a plain default, read from the installed sources.

    Importing TRL takes seconds; params.option_types reads the same files for the types.
    """
    roots = {package: Path(str(importlib.util.find_spec(package).origin)).parent for package in ("trl", "transformers")}
    files = {
        "TrainingArguments": roots["transformers"] / "training_args.py",
        "_BaseConfig": roots["trl"] / "trainer" / "base_config.py",
        f"{kind.upper()}Config": roots["trl"] / "trainer" / f"{kind}_config.py",
    }
    defaults = {}
    for name, file in files.items():
        body = next(n.body for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
        for option in body:
            if isinstance(option, ast.AnnAssign):
                value = option.value
                if isinstance(value, ast.Call):
                    value = next((word.value for word in value.keywords if word.arg == "default"), value)
                if isinstance(value, ast.Constant | ast.UnaryOp | ast.List | ast.Dict):  # max_steps is -1
                    defaults[ast.unparse(option.target)] = ast.literal_eval(value)
    return defaults


def look(params: Params, hardware: Hardware, kind: Kind, name: str, model: Path, dataset: Path) -> Run:
    """Gather what is known about a phase; the folder `model` and the file `dataset` need not be there yet."""
    phase = params.phases[name]
    options = {**trainer_defaults(kind), **phase.trainer, **hardware.trainer}
    try:
        batch = division(params, hardware, kind, name)
        options |= hardware_options(params, hardware, kind, name)
    except ParamsError:
        batch = None  # check_batch says why
    config = json.loads((model / "config.json").read_text()) if (model / "config.json").is_file() else None
    tokenizer = read_tokenizer(model) if (model / "tokenizer_config.json").is_file() else None
    rows, sample, lengths = params.prepare[phase.dataset].rows, [], []
    if dataset.is_file():
        import pyarrow.parquet as pq

        with pq.ParquetFile(dataset) as file:
            rows = file.metadata.num_rows
            batches = file.iter_batches(SAMPLE, columns=["prompt", "completion", "solution"])
            sample = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
    if sample and tokenizer is not None and tokenizer.chat_template is not None:
        from workflow.prepare import token_counts

        lengths = [whole for _, whole in token_counts(sample, tokenizer)]
    return Run(params, hardware, kind, name, batch, options, model, config, tokenizer, dataset, rows, sample, lengths)


def read_tokenizer(model: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, without AutoTokenizer where it can be: that imports for two seconds more."""
    import transformers

    if (model / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast.from_pretrained(model)
    return transformers.AutoTokenizer.from_pretrained(model)


# Batches and steps


def sequences(run: Run) -> int | None:
    """Rows to train on; with packing the sequences that their tokens fill, about. None as long as it is not known."""
    packs = run.kind == "sft" and run.options["packing"]
    if run.rows is None or (packs and not run.lengths):
        return None
    rows = run.rows - run.phase.held_out
    return math.ceil(rows * sum(run.lengths) / len(run.lengths) / run.longest) if packs else rows


def epoch_steps(run: Run) -> int | None:
    """Optimizer steps in an epoch.

    SFT takes the last, smaller batch too (transformers.Trainer). GRPO leaves out questions that fill no whole batch,
    and makes num_iterations steps from one set of rollouts (trl.trainer.utils.RepeatSampler).
    """
    rows = sequences(run)
    if rows is None:
        return None
    if run.kind == "sft":
        return math.ceil(rows / run.phase.global_batch_size)
    return rows // run.questions * run.options["num_iterations"]


def total_steps(run: Run) -> int | None:
    """Optimizer steps of the whole phase; max_steps wins over num_train_epochs, as in transformers.Trainer."""
    if run.options["max_steps"] > 0:
        return run.options["max_steps"]
    steps = epoch_steps(run)
    return None if steps is None else math.ceil(run.options["num_train_epochs"] * steps)


def warmup(run: Run) -> int | None:
    """Steps of warm-up; below 1 the option is a share of all steps."""
    steps, total = run.options["warmup_steps"], total_steps(run)
    if steps >= 1:
        return int(steps)
    return None if total is None else math.ceil(steps * total)


def check_batch(run: Run) -> list[Finding]:
    """The global batch over processes, groups and rows."""
    found = []
    where, size = run.key("global_batch_size"), run.phase.global_batch_size
    try:
        division(run.params, run.hardware, run.kind, run.name)
    except ParamsError as problem:
        what, _, write = str(problem).removeprefix(f"params.yaml: {where} ").partition("; write ")
        found.append(error(where, what, "the processes would make different steps", write))
    rows = sequences(run)
    needed, unit = (run.questions, "questions") if run.kind == "grpo" else (size, "sequences")
    if rows is not None and rows <= 0:
        what = f"{run.phase.held_out} of {run.rows} rows are held out"
        found.append(error(run.key("held_out"), what, "none is left to train on", f"far less than {run.rows}"))
    elif rows is not None and rows < needed:
        what = f"one step takes {needed} {unit}, and {run.phase.dataset} has {rows}"
        write = f"{rows * (size // needed)} or less, or take more rows"
        if run.kind == "grpo":
            found.append(error(where, what, "TRL leaves an incomplete batch out, so there is no step", write))
        else:
            found.append(warning(where, what, "every step is an epoch", write))
    return found


def check_steps(run: Run) -> list[Finding]:
    """How many steps there are, and what the schedule makes of them."""
    found = []
    if run.options["max_steps"] > 0 and "num_train_epochs" in run.phase.trainer:
        what = f"max_steps is {run.options['max_steps']} too"
        where = run.key("trainer.num_train_epochs")
        found.append(warning(where, what, "max_steps wins and the epochs mean nothing", "only one of the two"))
    total, rising = total_steps(run), warmup(run)
    if total is not None and rising is not None and rising >= total > 0:
        what = f"{rising} of {total} steps are warm-up"
        write = f"less than {total}, or a share such as 0.1"
        found.append(warning(run.key("trainer.warmup_steps"), what, "the rate is never what the recipe says", write))
    return found


# Lengths


def context_of(config: dict[str, Any]) -> int | None:
    """The most tokens that a model takes, by vLLM's rule (vllm/config/model.py, _get_and_verify_max_len).

    max_position_embeddings, times the factor of linear and dynamic RoPE scaling (other kinds have it in already),
    whatever the tokenizer's model_max_length is. None where config.json does not tell.
    """
    if "max_position_embeddings" not in config:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor", 1) if kind in ("linear", "dynamic") else 1
    return int(config["max_position_embeddings"] * factor)


def check_lengths(run: Run) -> list[Finding]:
    """The longest sequence against the model's context."""
    prompt, data = run.prepare.max_prompt_length, f"prepare.{run.phase.dataset}"
    context = None if run.config is None else context_of(run.config)
    if context is None or run.longest <= context:
        return []
    why = "the model has no positions for them"
    if run.kind == "sft":
        what = f"sequences of {run.longest} tokens, in a context of {context}"
        return [error(run.key("trainer.max_length"), what, why, f"{context} or less, and {data}.max_length too")]
    longest = run.options["max_completion_length"]
    what = f"prompts of {prompt} and completions of {longest} tokens, in a context of {context}"
    write = f"{context - prompt} or less" if context > prompt else f"a {data}.max_prompt_length far below {context}"
    return [error(run.key("trainer.max_completion_length"), what, why, write)]


def check_tasks(run: Run) -> list[Finding]:
    """The lengths of the evaluation: vLLM would refuse them after the training, when that has cost its hours."""
    context = None if run.config is None else context_of(run.config)
    if context is None:
        return []
    found = []
    for name, task in run.params.tasks.items():
        where, longest = f"tasks.{name}.max_tokens", run.params.prepare[name].max_prompt_length
        what = f"prompts of up to {longest} and completions of {task.max_tokens} tokens, in a context of {context}"
        if task.max_tokens >= context:
            found.append(error(where, what, "the trained model could not be evaluated", f"{context - longest} or less"))
        elif task.max_tokens + longest > context:
            why = "the evaluation stops if a prompt is that long"
            found.append(warning(where, what, why, f"{context - longest} or less"))
    return found


# Chat template and special tokens


def training_template(run: Run) -> str | None:
    """The chat template that TRL takes instead of the tokenizer's: with assistant_only_loss, where that has no markers.

    Raises:
        ValueError: TRL has none for this tokenizer.
    """
    if not run.options["assistant_only_loss"]:
        return None
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(run.tokenizer.chat_template) else get_training_chat_template(run.tokenizer)


def check_template(run: Run) -> list[Finding]:
    """The chat template: that there is one, that it leaves the start of the thought to the model, that a turn ends."""
    if run.tokenizer is None:
        return []
    from workflow.chat_template import end_of_turn

    where, found = f"sources.{run.root}.chat_template", []
    if run.tokenizer.chat_template is None:
        what = "the tokenizer has no chat template"
        return [error(where, what, "no prompt can be rendered", "one in Jinja, such as that of the instruct model")]
    asked = run.tokenizer.apply_chat_template(QUESTION, tokenize=False)
    ready = run.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    if "<think>" in ready.removeprefix(asked):
        what = "it starts every answer with <think>"
        write = "a copy of the model's template that ends where the assistant's turn starts"
        rewards = run.phase.rewards if isinstance(run.phase, GRPOPhase) else {}
        tagged = [name for name in rewards if name.removesuffix("_as_published") in TAG_REWARDS]
        if tagged:
            why = f"completions do not have the tag, so {' and '.join(tagged)} cannot be earned"
            found.append(error(where, what, why, write))
        else:
            found.append(warning(where, what, "no scored answer is in the taught format", write))
    try:
        end_of_turn(run.tokenizer)
    except stage.StageError:
        what = "no special token follows the assistant's text"
        write = f"{run.tokenizer.eos_token} behind message['content']"
        found.append(error(where, what, "the model cannot learn where to stop", write))
    return found + (check_trained_text(run, ready) if run.kind == "sft" else [])


def check_trained_text(run: Run, ready: str) -> list[Finding]:
    """What SFT trains on: the thought is in it, it goes on from the prompt `ready`, the loss can find it."""
    where = f"sources.{run.root}.chat_template"
    try:
        template = training_template(run)
    except ValueError:
        what = "assistant_only_loss is true, and it has no {% generation %} markers"
        write = "them around the assistant's text, or completion_only_loss: true instead"
        return [error(where, what, "TRL cannot tell what is to be learned", write)]
    turns = [*QUESTION, {"role": "assistant", "content": TAUGHT}]
    whole = run.tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    if TAUGHT not in whole:
        what = "it drops the assistant's thought up to </think>"
        write = "a copy of the model's template that keeps message['content'] whole"
        return [error(where, what, "the model learns answers without thoughts", write)]
    if not whole.startswith(ready):
        what = "a prompt is not rendered as the start of the conversation that is trained on"
        return [
            warning(where, what, "the model is asked in another way than it learned", "one that renders both alike")
        ]
    return []


def check_tokens(run: Run) -> list[Finding]:
    """The tokenizer against config.json and generation_config.json.

    Padding with the stop token is no finding: TRL 1.16 masks padding by its place, not by its token. Nor is an
    eos_token that does not end a turn: workflow/training.py takes the one that does.
    """
    if run.tokenizer is None or run.config is None or run.tokenizer.chat_template is None:
        return []
    from workflow.chat_template import end_of_turn

    found = []
    if len(run.tokenizer) > run.config["vocab_size"]:
        what = f"the embedding has {run.config['vocab_size']} rows, and the tokenizer {len(run.tokenizer)} tokens"
        write = f"a model whose embedding was resized, or the tokenizer that belongs to {run.model.name}"
        found.append(error(str(run.model / "config.json"), what, "a token without a row ends the training", write))
    file = run.model / "generation_config.json"
    declared = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops = {run.tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    try:
        ending = run.tokenizer.convert_tokens_to_ids(end_of_turn(run.tokenizer))
    except stage.StageError:
        return found  # check_template says so
    if ending not in stops and run.model.name in run.params.generate.models:
        what = f"generation does not stop at {run.tokenizer.convert_ids_to_tokens(ending)}, which ends a turn"
        why = f"{run.model.name} is scored with what it writes behind its answer, and the trained models are not"
        found.append(warning(str(file), what, why, f"eos_token_id: {sorted({*stops, ending})} in that file"))
    return found


# Memory and disk


def weight_bytes(run: Run) -> int:
    """Bytes of a weight as TRL loads it: float32, unless model_init_kwargs says otherwise."""
    dtype = (run.options["model_init_kwargs"] or {}).get("dtype", "float32")
    if dtype == "auto" and run.config is not None:
        dtype = run.config.get("dtype") or run.config.get("torch_dtype") or "float32"
    return 4 if dtype == "float32" else 2


def computes_in_bf16(run: Run) -> bool:
    """Whether the trainer computes in bfloat16: TRL's default where fp16 is not asked for."""
    return not run.options["fp16"] if run.options["bf16"] is None else run.options["bf16"]


def device_memory(run: Run) -> float | None:
    """Bytes of one GPU, by the hardware file, or of this machine's memory per process on a CPU."""
    if run.options["use_cpu"]:
        import psutil

        return psutil.virtual_memory().total / run.processes
    return None if run.hardware.memory_gib is None else run.hardware.memory_gib * GIB


def memory_job(run: Run) -> memory.Job | None:
    """What the memory of this phase is estimated for; None without a model of a known shape."""
    if run.shape is None or run.batch is None:
        return None
    per_device, accumulation = run.batch
    have = device_memory(run)
    by_vllm = run.kind == "grpo" and run.options["use_vllm"]
    beside = by_vllm and run.options["vllm_mode"] == "colocate" and have is not None
    return memory.Job(
        shape=run.shape,
        device="cpu" if run.options["use_cpu"] else "cuda",
        processes=run.processes,
        spread=run.hardware.accelerate,
        loaded=weight_bytes(run),
        bf16=computes_in_bf16(run),
        checkpointing=run.options["gradient_checkpointing"],
        lora=run.phase.lora,
        reference=run.kind == "grpo" and run.options["beta"] != 0,
        sequences=per_device,
        tokens=run.longest,
        rollouts=per_device * accumulation if run.kind == "grpo" and not by_vllm else 0,
        vllm=run.options["vllm_gpu_memory_utilization"] * have if beside else 0,
        vllm_sleeps=beside and run.options["vllm_enable_sleep_mode"],
    )


def check_memory(run: Run) -> list[Finding]:
    """The estimated peak, and what vLLM needs to start, against the memory of one device."""
    job, have = memory_job(run), device_memory(run)
    if job is None or have is None:
        return []
    found, where = [], f"HARDWARE={hardware_name()}"
    parts = memory.estimate(job)
    if parts.peak > have:
        certain = sum(parts.held.values())
        what = f"training takes about {parts.peak / GIB:.1f} GiB of the {have / GIB:.1f} GiB of one device"
        level = error if certain > have else warning
        found.append(level(where, what, "it runs out of memory", smaller(run, job)))
    if run.kind == "grpo" and run.options["use_vllm"]:
        server = run.hardware.server
        share = server.gpu_memory_utilization if server else run.options["vllm_gpu_memory_utilization"]
        devices = server.tensor_parallel_size if server else run.options["vllm_tensor_parallel_size"]
        needs = memory.vllm_needs(job.shape, run.longest, devices)
        what = f"vLLM gets {share * have / GIB:.1f} GiB of a GPU, and needs {needs / GIB:.1f}"
        name = "server.gpu_memory_utilization" if server else "grpo_trainer.vllm_gpu_memory_utilization"
        write = f"{name}: {math.ceil(needs / have * 20) / 20} in the hardware file"
        if needs > share * have:
            found.append(warning(where, what, "it does not start", write))
    return found


def smaller(run: Run, job: memory.Job) -> str:
    """What makes a phase take less memory and costs least."""
    if not job.checkpointing:
        return f"{run.key('trainer.gradient_checkpointing')}: true"
    if job.sequences > 1:
        return f"a smaller tokens_per_device.{run.kind} in the hardware file"
    if job.processes > 1 and job.spread != "zero3":
        return f"accelerate: {'zero2' if job.spread == 'ddp' else 'zero3'} in the hardware file"
    return f"{run.key('lora')}: {{r: 16, lora_alpha: 32}}, or use another HARDWARE"


def disk_needs(run: Run) -> dict[Path, float]:
    """Bytes that the phase writes, by folder: the trained model, DVC's copy of it, checkpoints."""
    parameters = memory.stored_parameters(run.model) or (run.shape.parameters if run.shape else None)
    if parameters is None:
        return {}
    exported = parameters * (4 if run.phase.export_dtype == "float32" else 2)
    needs = {run.model.parent: exported}
    cache_folder = stage.dvc_cache()
    if cache_folder is not None:
        needs[cache_folder] = exported
    trained = memory.adapter_parameters(run.shape, run.phase.lora) if run.phase.lora and run.shape else parameters
    # Weights and Adam's two moments; DeepSpeed saves its float32 copy too. Two are kept while a third is written.
    state = 3 * weight_bytes(run) if run.hardware.accelerate == "ddp" else 14
    needs[CHECKPOINTS] = 3 * trained * state
    return needs


def check_disk(run: Run) -> list[Finding]:
    """The free space of every disk that the phase writes to."""
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in disk_needs(run).items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        device = os.stat(there).st_dev
        disks[device] = (there, disks.get(device, (there, 0.0))[1] + size)
    found = []
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            what = f"the phase writes {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
            write = "make room; .scratch/checkpoints has those of runs that you gave up, too"
            found.append(error(str(folder), what, "the trained model could not be saved", write))
    return found


# Data, options and rewards


def check_data(run: Run) -> list[Finding]:
    """What the rows hold, whether evaluation questions may be among them, what packing does to them."""
    found = []
    column = "completion" if run.kind == "sft" else "solution"
    if any(row[column] is None for row in run.sample):
        what = f"{run.phase.dataset} has rows without a {column}"
        why = "there is nothing to learn" if run.kind == "sft" else "no completion can be rewarded"
        found.append(error(run.key("dataset"), what, why, f"a data set whose format has {column}s"))
    for name in run.prepare.mixture or [run.phase.dataset]:
        looked_up = {name, *run.prepare.decontaminate, *run.params.prepare[name].decontaminate}
        missing = [t for t in run.params.tasks if t not in looked_up and not builtin_pair(run.params, name, t)]
        if missing:
            where, what = f"prepare.{name}.decontaminate", f"it does not name {' and '.join(missing)}"
            found.append(warning(where, what, "evaluation questions may be trained on", f"[{', '.join(missing)}]"))
    if run.kind == "sft" and run.options["packing"]:
        where, limit = run.key("trainer.packing_strategy"), run.longest
        long = sum(length > limit for length in run.lengths)
        share = f"{long / len(run.lengths):.0%} of the traces are longer" if run.lengths else "some may be longer"
        if run.options["packing_strategy"] == "wrapped":
            what = f"wrapped cuts whatever crosses a block of {limit} tokens ({share})"
            why = "thoughts lose their answers: MATH-500 fell from 43.6 to 24.8 % (open-r1 #355)"
            found.append(warning(where, what, why, "bfd, with a max_length that holds whole traces"))
        elif run.options["packing_strategy"] == "bfd_split" and long:
            what = f"bfd_split cuts traces at {limit} tokens ({share})"
            why = "what follows is learned without its question"
            found.append(warning(where, what, why, "bfd, with a max_length that holds whole traces"))
    return found


def builtin_pair(params: Params, name: str, task: str) -> bool:
    """Whether both are builtin: workflow/builtin.py has no question for both training and evaluation."""
    sources = [params.prepare[entry].source for entry in (name, task)]
    return all(source is not None and params.sources[source].origin == "builtin" for source in sources)


def check_options(run: Run) -> list[Finding]:
    """Options that are written nowhere, and values that are known to do harm."""
    found = []
    wanted = WRITTEN + (WRITTEN_GRPO if run.kind == "grpo" else WRITTEN_SFT)
    if "max_steps" not in run.phase.trainer:
        wanted = [*wanted, "num_train_epochs"]
    if run.kind == "sft" and "assistant_only_loss" not in run.phase.trainer:
        wanted = [*wanted, "completion_only_loss"]
    missing = [name for name in wanted if name not in run.phase.trainer]
    if missing:
        what = f"written nowhere: {', '.join(missing)}"
        values = ", ".join(f"{name}: {run.options[name]}" for name in missing)
        why = "TRL's defaults hold, and change with its versions"
        found.append(warning(run.key("trainer"), what, why, f"what holds now, {values}"))
    rate = run.options["learning_rate"]
    if weight_bytes(run) == 2 and run.hardware.accelerate == "ddp" and not run.phase.lora and rate < 1e-5:
        what = f"weights are bfloat16, and the learning rate is {rate}"
        why = "most steps are smaller than half the distance between two bfloat16 numbers, and are lost"
        found.append(warning(run.key("trainer.model_init_kwargs"), what, why, "{dtype: float32}"))
    return found + (check_grpo_options(run) if run.kind == "grpo" else [])


def check_grpo_options(run: Run) -> list[Finding]:
    """Learning rate, completion length and temperature of GRPO."""
    found = []
    rate, longest, temperature = (run.options[n] for n in ("learning_rate", "max_completion_length", "temperature"))
    large = run.shape.parameters >= 1e8 if run.shape is not None else run.source.origin != "builtin"
    if large and rate >= 1e-5:
        why = "at 2e-5 a model fell from 55.4 to 18.2 % on MATH-500 (open-r1 #538)"
        found.append(warning(run.key("trainer.learning_rate"), f"{rate} is high for GRPO", why, "1e-6"))
    named = f"{run.root} {run.source.repo} {run.source.path}".lower().replace("_", "-")
    if "r1-distill" in named and longest < 2048:
        what = f"{longest} tokens, and a model distilled from R1 thinks longer"
        why = "most completions are cut off before their answer, and earn nothing"
        found.append(warning(run.key("trainer.max_completion_length"), what, why, "2048 or more"))
    others = [f"{name} at {t.temperature}" for name, t in run.params.tasks.items() if t.temperature != temperature]
    o = run.options
    weighted = o["use_vllm"] and o["vllm_importance_sampling_correction"]
    if weighted and o["vllm_importance_sampling_mode"].startswith("sequence"):
        cut = o["top_p"] < 1 or o["top_k"] > 0
        what = f"{o['vllm_importance_sampling_mode']} multiplies a weight per token over the whole completion"
        why = "with top_p or top_k it goes to 0, and only the KL term is learned" if cut else "long ones get no weight"
        write = "token_truncate" + (", and top_p 1.0 and top_k 0" if cut else "")
        found.append(warning(run.key("trainer.vllm_importance_sampling_mode"), what, f"{why} (trl #6789)", write))
    if others:
        what = f"trained at {temperature}, evaluated on {' and '.join(others)}"
        why = "what is scored is not quite the policy that was trained"
        found.append(warning(run.key("trainer.temperature"), what, why, "the same number in both"))
    return found


def check_rewards(run: Run) -> list[Finding]:
    """The rewards tried on gold solutions in the taught format: they must earn the most there is."""
    solutions = [row["solution"] for row in run.sample if row["solution"] is not None]
    if not isinstance(run.phase, GRPOPhase) or not solutions:
        return []
    from workflow.rewards import dry_run
    from workflow.verify import Verifier

    with Verifier(workers=min(4, len(os.sched_getaffinity(0)))) as verifier:
        results = dry_run(run.phase, solutions, verifier)
    found = []
    for result in results:
        where, published = run.key(f"rewards.{result.reward}"), result.reward.endswith("_as_published")
        if result.maximum is not None and (result.mean is None or result.mean < result.maximum):
            share = (result.mean or 0.0) / result.maximum
            what = f"gold solutions in the taught format earn {share:.0%} of it"
            why = "right answers are not rewarded"
            if published:
                found.append(warning(where, what, f"{why}, as published", result.reward.removesuffix("_as_published")))
                continue
            write = "a reward that fits: usual causes are a pattern without DOTALL and solutions in another form"
            level = error if share < ENOUGH else warning
            found.append(level(where, what, why, write))
        if result.unreadable:
            what = f"it cannot read {result.unreadable} of {len(solutions)} gold solutions"
            why = "their completions all earn the same, and teach nothing"
            found.append(warning(where, what, why, f"a format for prepare.{run.phase.dataset} that ends in an answer"))
    return found


def check_access(params: Params, data: Path) -> tuple[list[Finding], list[str]]:
    """Whether the hub lets this account read what is not in `data` yet: findings, and what could not be checked.

    Run it before anything imports transformers, which stage.quiet() keeps off the network.
    """
    missing = {
        name: source
        for name, source in params.sources.items()
        if source.origin in ("hub", "modelscope") and not (data / source.into / name).is_dir()
    }
    if not missing:
        return [], []
    import httpx

    from workflow.sources import look_up

    found, notes = [], []
    for name, source in missing.items():
        if source.origin == "modelscope":
            notes.append(f"access to {source.repo}: ModelScope tells only when it is downloaded")
            continue
        try:
            look_up(name, source)
        except stage.StageError as problem:
            if isinstance(problem.__cause__, httpx.TransportError):
                return found, [*notes, "access to the hub's repositories: no network"]
            what, _, write = str(problem).removeprefix(f"sources.{name}: ").partition("; ")
            found.append(error(f"sources.{name}", what, "nothing can start before it is downloaded", write))
    return found, notes


def check(run: Run) -> list[Finding]:
    """All findings about one phase, errors first."""
    checks = [check_batch, check_steps, check_lengths, check_tasks, check_template, check_tokens, check_memory]
    checks += [check_disk, check_data, check_options, check_rewards]
    return sorted((finding for one in checks for finding in one(run)), key=lambda finding: finding.level)
