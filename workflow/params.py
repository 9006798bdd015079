"""params.yaml as typed, frozen sections: every key has a meaning, an unknown key is an error.

`load_params` is called by every stage before it does anything; the stage `check`, before all others, calls it too.
"""

import ast
import difflib
import importlib.util
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=100, description="A name that is also a folder.")
]
T = TypeVar("T")
SHORT = Repr()  # of what is in a params.yaml: a few lines of YAML may stand for more text than there is memory
SHORT.maxstring = SHORT.maxother = 200
Fraction = Annotated[float, Field(ge=0, le=1)]

# The rewards of workflow/rewards.py; `…_as_published` has the behaviour, mistakes included, of the published system.
REWARDS = (
    "accuracy",
    "accuracy_as_published",
    "format",
    "format_as_published",
    "tag_count",
    "reasoning_steps",
    "length",
    "cosine",
    "repetition_penalty",
    "soft_overlong_punishment",
    "correctness",
    "correctness_as_published",
    "int",
    "int_as_published",
    "strict_format",
    "strict_format_as_published",
    "soft_format",
    "soft_format_as_published",
    "xmlcount",
    "xmlcount_as_published",
)

# Set by the pipeline or by the hardware file: written into params.yaml, they would change the cache key of
# an experiment without changing the experiment.
NOT_IN_TRAINER = {
    "output_dir": "dvc.yaml decides where a model goes",
    "seed": "write the top-level seed",
    "per_device_train_batch_size": "write global_batch_size; the hardware file divides it",
    "per_device_eval_batch_size": "the hardware file divides the batch",
    "gradient_accumulation_steps": "write global_batch_size; the hardware file divides it",
    "generation_batch_size": "write global_batch_size; the hardware file divides it",
    "reward_weights": "write the weights beside the names in rewards",
    "use_vllm": "the hardware file decides how rollouts are generated",
    "use_cpu": "the hardware file decides where it runs",
    "dataloader_pin_memory": "the hardware file decides where it runs",
    "vllm_mode": "the hardware file decides how rollouts are generated",
    "vllm_gpu_memory_utilization": "the hardware file decides how rollouts are generated",
    "vllm_tensor_parallel_size": "the hardware file decides how rollouts are generated",
    "vllm_enable_sleep_mode": "the hardware file decides how rollouts are generated",
    "vllm_group_port": "the hardware file decides how rollouts are generated",
    "vllm_max_model_length": "it is max_prompt_length of the data set + max_completion_length",
    "vllm_server_base_url": "the hardware file decides how rollouts are generated",
    "vllm_server_host": "the hardware file decides how rollouts are generated",
    "vllm_server_port": "the hardware file decides how rollouts are generated",
    "trust_remote_code": "code from a model repository is never run",
    "chat_template_path": "write chat_template under sources: every later stage has to use the same one",
    "disable_tqdm": "progress is printed as lines",
    "logging_nan_inf_filter": "a loss that is not a number is always logged as it is",
    "report_to": "DVCLive always logs; name other trackers in the environment variable TRACKERS",
    "run_name": "runs are named by phase and seed",
    "project": "the trackers' project is the pipeline's",
    "log_completions": "completions are always written to completions.md",
    "steps_per_generation": "rollouts are made for one optimizer step; write num_iterations to use them again",
    "auto_find_batch_size": "the hardware file divides the batch",
    "accelerator_config": "the hardware file divides the batch, and the order of rows comes from the seed",
    "deepspeed": "the hardware file decides how the model is spread",
    "fsdp": "the hardware file decides how the model is spread",
    "hub_token": "tokens come from the environment only",
    "resume_from_checkpoint": "a run that was stopped goes on by itself",
    "save_strategy": "checkpoints are written by the hardware file's checkpoint_minutes",
    "save_steps": "checkpoints are written by the hardware file's checkpoint_minutes",
    "save_total_limit": "checkpoints are written by the hardware file's checkpoint_minutes, and two are kept",
    "save_only_model": "a checkpoint holds all that a run needs to go on",
    "ignore_data_skip": "a run that goes on begins with the row at which it was stopped",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint by itself",
    **dict.fromkeys(
        [
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
            *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "log_completions_hub_repo"),
        ],
        "nothing is published by a stage; see python -m workflow.push",
    ),
}
# Of model_init_kwargs, which transformers' from_pretrained takes.
NOT_IN_MODEL = {
    "trust_remote_code": "code from a model repository is never run",
    "code_revision": "code from a model repository is never run",
    "token": "tokens come from the environment only",
    "pretrained_model_name_or_path": "write start_from",
    "config": "write start_from",
    "state_dict": "write start_from",
}


class ParamsError(ValueError):
    """params.yaml is wrong; the message is one sentence that says what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Qwen2(Section):
    """Options of builtin qwen2; what is not written is transformers.Qwen2Config's."""

    vocab_size: int = Field(320, gt=270, description="Tokens, the 256 bytes among them.")
    corpus: str | None = Field(None, description="A text file to train the tokenizer on.")
    hidden_size: int = Field(4096, gt=0)
    intermediate_size: int = Field(22016, gt=0)
    num_hidden_layers: int = Field(32, gt=0)
    num_attention_heads: int = Field(32, gt=0)
    num_key_value_heads: int = Field(32, gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    initializer_range: float = Field(0.02, gt=0)


class Rows(Section):
    """Options of the builtin data sets."""

    rows: int = Field(gt=0)


class Traces(Rows):
    """Options of builtin bespoke_stratos."""

    guesses: Fraction = Field(description="Share of the traces that do not work the sum out.")


OPTIONS: dict[str, type[Section]] = {
    "qwen2": Qwen2,
    "aime": Rows,
    "bespoke_stratos": Traces,
    "bespoke_stratos_messages": Traces,
    "gpqa": Rows,
    "gsm8k": Rows,
    "numina_tir": Rows,
    "questions": Rows,
}


class Source(Section):
    """One model or data set to bring into data/."""

    into: Literal["models", "raw"] = Field(description="data/models/<name> for a model, data/raw/<name> for data.")
    origin: Literal["builtin", "hub", "modelscope", "path"] = Field(
        description="Made by the pipeline, downloaded from Hugging Face or ModelScope, or files on disk."
    )
    builtin: (
        Literal[
            "qwen2",
            "aime",
            "bespoke_stratos",
            "bespoke_stratos_messages",
            "gpqa",
            "gsm8k",
            "numina_tir",
            "questions",
        ]
        | None
    ) = Field(None, description="What workflow/builtin.py makes.")
    options: dict[str, Any] = Field({}, description="Arguments of the builtin.")
    path: str | None = Field(None, description="A folder or file on disk, copied as it is.")
    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the hub.")
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="The commit to download, 40 hex digits: a branch would move."
    )
    files: list[str] = Field([], description="Globs of the repository's files to download; empty takes what is needed.")
    chat_template: str | None = Field(None, description="Replaces the tokenizer's own chat template (Jinja).")
    licence: str = Field("unknown", description="Noted in source.json.")

    @model_validator(mode="after")
    def _matches_origin(self) -> "Source":
        keys = {"hub": ["repo", "revision"], "modelscope": ["repo", "revision"]}.get(self.origin, [self.origin])
        for key in keys:
            if getattr(self, key) is None:
                raise ValueError(f"origin is {self.origin}, so write {key}: <value> too")
        if self.path == "???":
            raise ValueError("path is not set; give the recipe's data_dir, e.g. SET=data_dir=/folder")
        if (self.builtin == "qwen2") != (self.into == "models") and self.origin == "builtin":
            raise ValueError("builtin qwen2 is a model (into: models), the other builtins are data (into: raw)")
        if self.chat_template is not None and self.into != "models":
            raise ValueError("chat_template belongs to a model (into: models)")
        if self.builtin is not None:
            try:
                OPTIONS[self.builtin].model_validate(self.options)
            except ValidationError as error:
                raise ValueError(f"options.{one_sentence(error, OPTIONS[self.builtin])}") from None
        return self


class Prepare(Section):
    """One prepared data set: rows of one raw source, or a mixture of other prepared sets, in the row schema."""

    source: Name | None = Field(None, description="A data set under sources.")
    files: str = Field(
        "*",
        pattern=r"^[^/]",
        description="Glob of the parquet, jsonl, json or csv files to read.",
    )
    format: (
        Literal["aime", "bespoke_stratos", "gpqa", "gsm8k", "math", "messages", "numina_tir", "prompt_completion"]
        | None
    ) = Field(None, description="How a raw row is read, see workflow/formats.py.")
    system_prompt: str | None = Field(
        None, description="Instead of the top-level one; an empty text takes each row's own."
    )
    instruction: str | None = Field(None, description="Put behind every question, on a line of its own.")
    mixture: dict[Name, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Instead of source and format: other prepared sets and their weights; `rows` are drawn."
    )
    tokenizer: Name = Field(description="The model under sources whose tokenizer counts the lengths.")
    rows: int | None = Field(None, gt=0, description="Keep this many rows, drawn with the seed; null keeps all.")
    max_prompt_length: int = Field(gt=0, description="Rows with a longer prompt are dropped (tokens).")
    max_length: int = Field(gt=0, description="Rows with a longer prompt + completion are dropped (tokens).")
    max_dropped_share: Fraction = Field(0.05, description="The stage fails when a larger share is dropped.")
    decontaminate: list[Name] = Field(
        [], description="Prepared evaluation sets: rows that share an 8-gram with one of their questions are dropped."
    )

    @model_validator(mode="after")
    def _source_or_mixture(self) -> "Prepare":
        if ".." in self.files.split("/"):
            raise ValueError(f"files is {self.files!r}, which leaves the source's folder; write a glob without ..")
        if self.mixture and (self.source or self.format):
            raise ValueError("write either source and format, or mixture")
        if self.mixture and self.rows is None:
            raise ValueError("a mixture needs rows: how many to draw")
        if not self.mixture and (self.source is None or self.format is None):
            raise ValueError("write source and format (or mixture)")
        return self


class Lora(Section):
    """Train low-rank adapters instead of all weights (PEFT); they are merged into the exported model."""

    r: int = Field(gt=0, description="Rank of the update matrices.")
    lora_alpha: int = Field(gt=0, description="The update is scaled by lora_alpha / r.")
    lora_dropout: Fraction = 0.0
    target_modules: str | list[str] = Field("all-linear", description="Names of the layers that get an adapter.")


class Health(Section):
    """When GRPO is not learning: conditions on the training log, each over `patience` logged steps in a row."""

    action: Literal["stop", "warn", "off"] = Field("warn", description="What a condition that holds does.")
    patience: int = Field(20, gt=0, description="Logged steps that a condition must hold.")
    frac_reward_zero_std: Fraction = Field(0.8, description="Share of groups whose rewards are all equal, at least.")
    clipped_ratio: Fraction = Field(0.3, description="Share of completions cut off, at least.")
    zero_reward_steps: int = Field(100, gt=0, description="Optimizer steps after which the reward is no longer 0.")
    min_entropy: float = Field(0.02, ge=0, description="Mean entropy in nats per token, at most.")


class Phase(Section):
    """What SFT and GRPO have in common: where a model comes from and what it is trained on."""

    start_from: Name = Field(description="A model under sources, or an earlier phase.")
    dataset: Name = Field(description="A prepared data set.")
    held_out: int = Field(0, ge=0, description="Rows kept out of training, drawn with the seed, for its evaluation.")
    global_batch_size: int = Field(gt=0, description="Sequences per optimizer step, over all devices.")
    lora: Lora | None = None
    export_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the weights of the saved model.")
    trainer: dict[str, Any] = Field(description="Options of TRL's config class, by name.")

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> "Phase":
        evaluates = self.trainer.get("eval_strategy", "no") != "no"
        if evaluates and not self.held_out:
            raise ValueError("trainer.eval_strategy is set and held_out is 0; write held_out: <rows>, or leave it out")
        if self.held_out and not evaluates:
            raise ValueError(
                f"held_out is {self.held_out} and nothing evaluates; write trainer.eval_strategy: steps and "
                "trainer.eval_steps too, or held_out: 0"
            )
        return self


class SFTPhase(Phase):
    pass


class GRPOPhase(Phase):
    """global_batch_size counts completions: questions per step x num_generations."""

    rewards: dict[str, float] = Field(
        min_length=1,
        description="What is rewarded: its weight. A name in REWARDS, a dotted path such as mypkg.rewards.my_reward, "
        "or the name of a model under sources with one label.",
    )
    reward_options: dict[str, dict[str, Any]] = Field({}, description="Arguments of a reward, by its name.")
    rewards_read: str = Field(
        description="What own rewards are made of, so that a change re-runs the phase: their .py file, or "
        "data/models/<name> of a reward model; data/check/ok.txt where there is nothing."
    )
    reward_seconds: float = Field(600.0, gt=0, description="One call of a reward may take so long; then it all stops.")
    health: Health = Health()

    @model_validator(mode="after")
    def _whole_groups(self) -> "GRPOPhase":
        group = self.trainer.get("num_generations", 8)
        if isinstance(group, int) and group < 2:
            raise ValueError(f"trainer.num_generations is {group}; write 2 or more")
        if isinstance(group, int) and self.global_batch_size % group:
            below = self.global_batch_size // group * group
            near = [str(size) for size in (below, below + group) if size]
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by num_generations {group}; "
                f"write {' or '.join(near)}"
            )
        return self


class Evaluation(Section):
    """What the files in recipes/task/ take from a recipe; no stage reads it."""

    tokenizer: Name = Field(description="The model under sources whose tokenizer counts the questions' lengths.")
    max_tokens: int = Field(gt=0, description="Longest completion that fits the models beside a question, in tokens.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(description="Of the weights in vLLM.")


class Generate(Section):
    models: list[Name] = Field(min_length=1, description="The models to evaluate, in the order of the report.")


class Task(Section):
    """One benchmark; its questions are the prepared data set of the same name."""

    answer: Literal["latex", "letter", "number"] = Field(description="How the final answer is read and compared.")
    questions: int | None = Field(None, gt=0, description="The first n questions; null takes all.")
    n_samples: int = Field(gt=0, description="Samples per question.")
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(gt=0, description="Longest completion in tokens.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        description="Of the weights in vLLM, which would otherwise halve the precision of a float32 model."
    )


class Params(Section):
    recipe: Name
    seed: int = Field(ge=0)
    data_dir: str | None = Field(None, description="The folder that the recipe's path sources lie in.")
    system_prompt: str | None = Field(description="Put before every question; null keeps each row's own.")
    sources: dict[Name, Source]
    prepare: dict[Name, Prepare]
    sft: dict[Name, SFTPhase]
    grpo: dict[Name, GRPOPhase]
    generate: Generate
    evaluation: Evaluation | None = None
    tasks: dict[Name, Task] = Field(min_length=1)

    @property
    def phases(self) -> dict[str, Phase]:
        """All training phases by name."""
        return {**self.sft, **self.grpo}

    @model_validator(mode="after")
    def _names_exist(self) -> "Params":
        models = [name for name, source in self.sources.items() if source.into == "models"]
        raw = [name for name, source in self.sources.items() if source.into == "raw"]
        taken = [name for name in self.phases if name in models] + [name for name in self.sft if name in self.grpo]
        if taken:
            raise ValueError(f"{taken[0]} names two models; rename the phase")
        plain = [name for name, prepare in self.prepare.items() if not prepare.mixture]
        for name, prepare in self.prepare.items():
            if prepare.source is not None:
                _known(f"prepare.{name}.source", prepare.source, raw)
            for part in prepare.mixture:
                _known(f"prepare.{name}.mixture", part, [other for other in plain if other != name])
            for other in prepare.decontaminate:
                _known(f"prepare.{name}.decontaminate", other, [other for other in plain if other != name])
            _known(f"prepare.{name}.tokenizer", prepare.tokenizer, models)
        for kind in ("sft", "grpo"):
            for name, phase in getattr(self, kind).items():
                others = [other for other in self.phases if other != name]
                _known(f"{kind}.{name}.start_from", phase.start_from, models + others)
                _known(f"{kind}.{name}.dataset", phase.dataset, list(self.prepare))
                _check_trainer(f"{kind}.{name}.trainer", phase.trainer, kind)
        for name, phase in self.sft.items():
            kept, cut = self.prepare[phase.dataset].max_length, phase.trainer.get("max_length", 1024)
            split = phase.trainer.get("packing") and phase.trainer.get("packing_strategy") in ("wrapped", "bfd_split")
            if cut is not None and cut < kept and not split:
                raise ValueError(
                    f"sft.{name}.trainer.max_length {cut} would cut answers of {phase.dataset}, whose max_length is "
                    f"{kept}; write {kept} or more"
                )
        for name, grpo in self.grpo.items():
            _check_rewards(f"grpo.{name}", grpo, models)
        for name in self.phases:
            seen = [name]
            while seen[-1] in self.phases:
                seen.append(self.phases[seen[-1]].start_from)
                if seen[-1] in seen[:-1]:
                    raise ValueError(f"start_from runs in a circle: {' -> '.join(seen)}; start one from a source")
        for model in self.generate.models:
            _known("generate.models", model, models + list(self.phases))
        for task in self.tasks:
            _known("tasks", task, list(self.prepare))
        return self


def pick(items: dict[str, T], name: str, section: str) -> T:
    """The item of a section of params.yaml that a command line names; raises ParamsError when there is none."""
    if name not in items:
        raise ParamsError(f"{name!r} is not under {section} in params.yaml; write one of: {', '.join(items)}")
    return items[name]


def _known(where: str, value: str, names: list[str]) -> None:
    if value not in names:
        raise ValueError(f"{where} is {value!r}, which is not defined; write one of: {', '.join(names)}")


def _check_rewards(where: str, phase: GRPOPhase, models: list[str]) -> None:
    for reward in phase.rewards:
        if "." in reward:
            if not phase.rewards_read.endswith(".py"):
                raise ValueError(
                    f"{where}.rewards_read is {phase.rewards_read!r}; write the .py file that {reward} is in, so that "
                    "a change of it re-runs the phase"
                )
        elif reward in models:
            if phase.rewards_read != f"data/models/{reward}":
                raise ValueError(f"{where}.rewards_read is {phase.rewards_read!r}; write data/models/{reward}")
        elif reward not in REWARDS:
            close = difflib.get_close_matches(reward, REWARDS, 2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"write one of: {', '.join(REWARDS)}"
            raise ValueError(
                f"{where}.rewards has {reward!r}, which is no reward; {hint} (own ones are dotted paths, such as "
                "mypkg.rewards.my_reward)"
            )
    for reward in phase.reward_options:
        _known(f"{where}.reward_options", reward, list(phase.rewards))


@cache
def option_types(kind: Literal["sft", "grpo"]) -> dict[str, set[str]]:
    """Names and plain types of the options of trl.SFTConfig or trl.GRPOConfig.

    Read from the installed sources without importing them, because importing TRL imports torch (seconds) and
    these checks run before anything else. An option whose type is not plain maps to an empty set.
    """
    roots = {package: Path(str(importlib.util.find_spec(package).origin)).parent for package in ("trl", "transformers")}
    files = [
        roots["transformers"] / "training_args.py",
        roots["trl"] / "trainer" / "base_config.py",
        roots["trl"] / "trainer" / f"{kind}_config.py",
    ]
    options = {}
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in (
                "TrainingArguments",
                "_BaseConfig",
                f"{kind.upper()}Config",
            ):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        names = set(ast.unparse(field.annotation).split(" | "))
                        plain = names <= {"int", "float", "bool", "str", "None"}
                        options[ast.unparse(field.target)] = names if plain else set()
    return options


def _check_trainer(where: str, trainer: dict[str, Any], kind: Literal["sft", "grpo"]) -> None:
    options = option_types(kind)
    for name, value in trainer.items():
        if name in NOT_IN_TRAINER:
            raise ValueError(f"{where}.{name} does not belong here: {NOT_IN_TRAINER[name]}")
        if name == "train_sampling_strategy" and value == "group_by_length":
            raise ValueError(
                f"{where}.{name}: group_by_length draws its order from what was drawn before, so a run that goes on "
                "from a checkpoint would meet other rows; write batch_rebalance or random"
            )
        if name.endswith("model_init_kwargs") and isinstance(value, dict):
            for key in value.keys() & NOT_IN_MODEL.keys():
                raise ValueError(f"{where}.{name}.{key} does not belong here: {NOT_IN_MODEL[key]}")
        if name not in options:
            close = difflib.get_close_matches(name, options, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"see trl.{kind.upper()}Config"
            raise ValueError(f"{where}.{name} is not an option of trl.{kind.upper()}Config; {hint}")
        wanted = options[name] | ({"int"} if "float" in options[name] else set())
        given = "None" if value is None else type(value).__name__
        if options[name] and given not in wanted:
            raise ValueError(f"{where}.{name} is {value!r}; write a value of type {' or '.join(sorted(options[name]))}")


def one_sentence(error: ValidationError, root: type[Section]) -> str:
    """Where the first mistake is, and what to write; `root` is the section that was validated."""
    errors = error.errors()
    # A misspelt key is also a missing one, and the misspelling says more.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        known = list(_section_at(root, first["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"{where} is not a known key; write {close[0] if close else 'one of: ' + ', '.join(known)}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return text if not where or text.startswith(where.split(".")[0] + ".") else f"{where}: {text}"
    return f"{where} is {SHORT.repr(first['input'])}; write what fits: {first['msg'].lower()}"


def _section_at(section: Any, path: tuple[str | int, ...]) -> type[Section]:
    """The section class at a path, a Section or Section | None; in a dict[Name, Section] a name is part of the path."""
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[part].annotation
        section = next((kind for kind in reversed(get_args(annotation)) if kind is not type(None)), annotation)
        if get_origin(annotation) is dict:
            next(parts)
    return section


def read_params(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """The mapping in a params.yaml, read with YAML 1.2 as DVC does (so 1e-4 is a number)."""
    from ruamel.yaml import YAML, YAMLError

    if not path.is_file():
        raise ParamsError(f"{path} does not exist; write it with: python -m workflow.compose recipe=tiny")
    try:
        data = YAML(typ="safe").load(path)
    except YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ParamsError(
            f"{path} must be a mapping of sections; write it with: python -m workflow.compose recipe=tiny"
        )
    return data


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: with one sentence that says where the mistake is and what to write.
    """
    try:
        return Params.model_validate(read_params(path))
    except ValidationError as error:
        raise ParamsError(f"{path}: {one_sentence(error, Params)}") from None


def check_paths(params: Params) -> None:
    """Raise ParamsError when a path source names something that is not on disk, or is no file or folder."""
    for name, source in params.sources.items():
        for key, path in (("path", source.path), ("options.corpus", source.options.get("corpus"))):
            if path is not None and not (Path(path).is_file() or Path(path).is_dir()):
                what = "is no file or folder" if Path(path).exists() else "does not exist"
                raise ParamsError(
                    f"params.yaml: sources.{name}.{key} is {path!r}, which {what}; write an existing "
                    "file or folder (recipes that take data_dir: SET=data_dir=/folder)"
                )


def check_recipes(folder: Path = Path("recipes")) -> None:
    """Raise ParamsError when a recipe reads an environment variable, a token say: it would be in params.yaml."""
    for file in sorted(folder.rglob("*.yaml")):
        if "oc.env" in file.read_text():
            raise ParamsError(f"{file} reads the environment (oc.env), which no recipe may; write the value instead")
