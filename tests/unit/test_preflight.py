import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from workflow import findings, preflight, stage
from workflow.findings import Finding, Run
from workflow.launch import CHECKPOINTS, Hardware
from workflow.memory import GIB
from workflow.params import load_params
from workflow.prepare import write_parquet
from workflow.stage import StageError

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
DISTILL = (TEMPLATES / "deepseek_r1_distill.jinja").read_text()
DISTILL_TOKENS = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
QWEN = (TEMPLATES / "qwen2_5.jinja").read_text()
BOTH = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "max_steps": 9,
    "gradient_checkpointing": False,
}
SFT = {"max_length": 200, "packing": False, "completion_only_loss": True}
GRPO = {
    "num_generations": 8,
    "max_completion_length": 100,
    "temperature": 1.0,
    "top_p": 0.95,
    "beta": 0.0,
    "epsilon": 0.2,
    "num_iterations": 1,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "mask_truncated_completions": False,
}
CPU = {
    "processes": 2,
    "accelerate": "ddp",
    "tokens_per_device": {"sft": 6400, "grpo": 5120},
    "trainer": {"use_cpu": True},
}
GPU = {"processes": 1, "accelerate": "ddp", "tokens_per_device": {"sft": 800, "grpo": 1280}, "memory_gib": 79}
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
QWEN_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "layer_types": None,
}


EVALUATED = {"sft__cold_start__trainer__eval_strategy": "steps"}


def row(number: int) -> dict[str, Any]:
    """A prepared row with everything."""
    taught = f"<think>\nI count.\n</think>\n<answer>\n\\boxed{{{number}}}\n</answer>"
    return {
        "id": f"row-{number}",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {number}?"}],
        "completion": [{"role": "assistant", "content": taught}],
        "solution": str(number),
    }


def spoil(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set the values at dotted paths; None removes the key."""
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = values
        for part in parents:
            section = section[part]
        if value is None:
            del section[last]
        else:
            section[last] = value


@pytest.fixture
def recipe(sound) -> dict[str, Any]:
    """The sound params.yaml with every option that matters written out."""
    sound["sft"]["cold_start"]["trainer"] = BOTH | SFT
    sound["grpo"]["reasoning"]["trainer"] = BOTH | GRPO
    sound["prepare"]["traces"]["decontaminate"] = ["problems"]
    return sound


@pytest.fixture
def dataset(tmp_path) -> Path:
    """100 prepared rows."""
    path = tmp_path / "rows.parquet"
    write_parquet([row(number) for number in range(100)], path)
    return path


@pytest.fixture
def make(recipe, write_params, tiny_model, dataset, monkeypatch) -> Callable[..., Run]:
    """Looks at a phase of the sound recipe with some changes, on two CPU processes or on other hardware."""
    monkeypatch.setenv("HARDWARE", "mine")

    def make(kind: str, hardware: dict[str, Any] = CPU, model: Path = tiny_model, **changes: Any) -> Run:
        spoil(recipe, {path.replace("__", "."): value for path, value in changes.items()})
        params = load_params(write_params(recipe))
        machine = Hardware.model_validate(hardware)
        return findings.look(params, machine, kind, "cold_start" if kind == "sft" else "reasoning", model, dataset)

    return make


@pytest.fixture
def model_with(tiny_model, tmp_path) -> Callable[..., Path]:
    """A copy of the model with another chat template, more special tokens or other values in config.json."""

    def make(template: str | None = None, tokens: list[str] = (), **config: Any) -> Path:
        from transformers import AutoTokenizer

        folder = shutil.copytree(tiny_model, tmp_path / "model")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if tokens:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
            tokenizer.save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | config))
        return folder

    return make


def only(found: list[Finding], level: str, where: str) -> Finding:
    """The one finding, which is of that level and names that place."""
    assert [(finding.level, finding.where) for finding in found] == [(level, where)]
    return found[0]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_nothing_is_wrong_with_a_sound_recipe(make, kind):
    run = make(kind)
    assert findings.check(run) == []
    assert preflight.unchecked(run) == []
    assert run.rows == 100 and len(run.lengths) == findings.SAMPLE


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_without_model_and_data_the_rest_is_checked(make, recipe, tmp_path, kind):
    found = make(kind)
    nowhere = dataclasses.replace(found, config=None, tokenizer=None, rows=None, sample=[], lengths=[])
    assert findings.check(nowhere) == []
    lines = preflight.unchecked(nowhere)
    assert len(lines) == 2 and "download@base" in lines[0]
    assert f"prepare@{'traces' if kind == 'sft' else 'problems'}" in lines[1]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_defaults_are_those_of_trl(kind):
    import trl

    config = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[kind]
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    read = findings.trainer_defaults(kind)
    assert {name: fields[name] for name in read} == read
    assert len(read) > 120
    looked_at = {*BOTH, *(SFT if kind == "sft" else GRPO), "num_train_epochs", "eval_steps"}
    assert looked_at <= set(read)


def test_the_tokenizer_is_the_trainers(tiny_model):
    from transformers import AutoTokenizer

    taken, theirs = findings.read_tokenizer(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    turns = row(5)["prompt"] + row(5)["completion"]
    assert taken.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert (len(taken), taken.eos_token, taken.all_special_tokens) == (
        len(theirs),
        theirs.eos_token,
        theirs.all_special_tokens,
    )


def test_a_tokenizer_without_tokenizer_json(tiny_model, tmp_path):
    written = json.loads((tiny_model / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(written["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in written["merges"])]))
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert len(findings.read_tokenizer(tmp_path)) == len(written["vocab"])


# Batches and steps


@pytest.mark.parametrize(
    ("kind", "changes", "level", "where", "write"),
    [
        ("sft", {"sft__cold_start__global_batch_size": 65}, "error", "sft.cold_start.global_batch_size", "64 or 66"),
        (
            "sft",
            EVALUATED | {"sft__cold_start__held_out": 100},
            "error",
            "sft.cold_start.held_out",
            "far less than 100",
        ),
        ("sft", {"sft__cold_start__global_batch_size": 128}, "warning", "sft.cold_start.global_batch_size", "100 or"),
        ("grpo", {"grpo__reasoning__global_batch_size": 808}, "error", "grpo.reasoning.global_batch_size", "800 or"),
    ],
)
def test_batches(make, kind, changes, level, where, write):
    assert write in only(findings.check_batch(make(kind, **changes)), level, where).write


@pytest.mark.parametrize(
    ("kind", "changes", "where"),
    [
        ("sft", {"sft__cold_start__trainer__warmup_steps": 9}, "sft.cold_start.trainer.warmup_steps"),
        ("grpo", {"grpo__reasoning__trainer__num_train_epochs": 2}, "grpo.reasoning.trainer.num_train_epochs"),
    ],
)
def test_schedules(make, kind, changes, where):
    only(findings.check_steps(make(kind, **changes)), "warning", where)


def test_a_share_of_the_steps_is_warm_up(make):
    run = make("sft", sft__cold_start__trainer__warmup_steps=0.25)
    assert findings.warmup(run) == 3  # of 9, rounded up
    assert findings.check_steps(run) == []


@pytest.mark.parametrize(("iterations", "batch", "held_out"), [(1, 64, 0), (3, 64, 4), (2, 24, 0)])
def test_grpo_steps_are_those_of_trls_sampler(make, iterations, batch, held_out):
    from trl.trainer.utils import RepeatSampler

    run = make(
        "grpo",
        grpo__reasoning__global_batch_size=batch,
        grpo__reasoning__held_out=held_out,
        grpo__reasoning__trainer__eval_strategy="steps" if held_out else "no",
        grpo__reasoning__trainer__num_iterations=iterations,
        grpo__reasoning__trainer__max_steps=-1,
        grpo__reasoning__trainer__num_train_epochs=2.0,
    )
    accumulation = run.batch[1]
    sampler = RepeatSampler(range(100 - held_out), 8, batch // 8, iterations * accumulation)
    assert findings.epoch_steps(run) == len(list(sampler)) / batch / accumulation
    assert findings.total_steps(run) == 2 * findings.epoch_steps(run)


def test_sft_steps(make):
    run = make("sft", sft__cold_start__held_out=30, **EVALUATED)
    assert (findings.epoch_steps(run), findings.total_steps(run)) == (2, 9)  # 70 rows, 64 at a time
    packed = make("sft", sft__cold_start__trainer__packing=True, sft__cold_start__global_batch_size=2)
    blocks = math.ceil(sum(packed.lengths) / len(packed.lengths) * 70 / 200)
    assert findings.epoch_steps(packed) == math.ceil(blocks / 2) < 35


# Lengths


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 4096),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 16384),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 4096),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 4096),
    ],
)
def test_context(config, tokens):
    assert findings.context_of({"max_position_embeddings": 4096, **config}) == tokens


def test_a_config_that_does_not_tell_its_context(make, model_with):
    folder = model_with()
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    assert findings.context_of(config) is None
    run = dataclasses.replace(make("grpo"), config=config)
    assert findings.check_lengths(run) == [] and "context" not in dict(preflight.describe(run))["model"]


@pytest.mark.parametrize(
    ("kind", "context", "where", "write"),
    [
        ("grpo", 150, "grpo.reasoning.trainer.max_completion_length", "90 or less"),
        ("grpo", 60, "grpo.reasoning.trainer.max_completion_length", "prepare.problems.max_prompt_length"),
        ("sft", 199, "sft.cold_start.trainer.max_length", "199 or less"),
    ],
)
def test_sequences_longer_than_the_context(make, model_with, kind, context, where, write):
    found = findings.check_lengths(make(kind, model=model_with(max_position_embeddings=context)))
    assert write in only(found, "error", where).write


@pytest.mark.parametrize(("context", "level"), [(100, "error"), (101, "warning"), (159, "warning")])
def test_an_evaluation_longer_than_the_context(make, model_with, context, level):
    found = findings.check_tasks(make("grpo", model=model_with(max_position_embeddings=context)))
    assert only(found, level, "tasks.problems.max_tokens").write == f"{context - 60} or less"


def test_sequences_as_long_as_the_context(make, model_with):
    assert findings.check_lengths(make("grpo", model=model_with(max_position_embeddings=160))) == []


# Chat template and special tokens

PREFILLED = QWEN.replace("<|im_start|>assistant\\n' }}\n{%- endif", "<|im_start|>assistant\\n<think>\\n' }}\n{%- endif")


def test_a_template_that_starts_the_thought(make, model_with):
    assert PREFILLED != QWEN
    folder = model_with(PREFILLED)
    found = only(findings.check_template(make("grpo", model=folder)), "error", "sources.base.chat_template")
    assert "format" in found.why and "accuracy" not in found.why
    run = make("grpo", model=folder, grpo__reasoning__rewards={"accuracy": 1})
    only(findings.check_template(run), "warning", "sources.base.chat_template")
    run = make("grpo", model=folder, grpo__reasoning__rewards={"format_as_published": 1, "xmlcount": 0.1})
    assert "format_as_published and xmlcount" in only(findings.check_template(run), "error", found.where).why


def test_the_template_of_r1_distill(make, model_with):
    folder = model_with(DISTILL, DISTILL_TOKENS)
    for_grpo = findings.check_template(make("grpo", model=folder))
    assert "starts every answer with <think>" in only(for_grpo, "error", "sources.base.chat_template").what
    for_sft = findings.check_template(make("sft", model=folder))
    assert [finding.level for finding in for_sft] == ["warning", "error"]
    assert "drops the assistant's thought" in for_sft[1].what


def test_trl_has_a_training_template_for_r1_distill(make, model_with):
    folder = model_with(DISTILL, DISTILL_TOKENS)
    run = make("sft", model=folder, sft__cold_start__trainer__assistant_only_loss=True)
    assert [finding.what for finding in findings.check_template(run)] == ["it starts every answer with <think>"]


def test_a_template_without_markers(make, model_with):
    folder = model_with(QWEN + "{# mine #}")
    assert findings.check_template(make("sft", model=folder)) == []
    run = make("sft", model=folder, sft__cold_start__trainer__assistant_only_loss=True)
    assert "markers" in only(findings.check_template(run), "error", "sources.base.chat_template").what


def test_trl_has_a_training_template_for_qwen(make, model_with):
    run = make("sft", model=model_with(QWEN), sft__cold_start__trainer__assistant_only_loss=True)
    assert findings.check_template(run) == []


def test_no_template_at_all(make, model_with):
    folder = model_with()
    (folder / "chat_template.jinja").unlink()
    run = make("sft", model=folder)
    assert "no chat template" in only(findings.check_template(run), "error", "sources.base.chat_template").what
    assert findings.check_tokens(run) == [] and run.lengths == []


def test_a_turn_without_an_end(make, model_with):
    folder = model_with("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    for kind in ("sft", "grpo"):
        found = only(findings.check_template(make(kind, model=folder)), "error", "sources.base.chat_template")
        assert found.why == "the model cannot learn where to stop"


def test_a_prompt_that_is_no_start(make, model_with):
    template = QWEN.replace("<|im_start|>assistant\\n' }}\n{%- endif", "<|im_start|>assistant\\nSure: ' }}\n{%- endif")
    assert template != QWEN
    found = findings.check_template(make("sft", model=model_with(template)))
    assert "start of the conversation" in only(found, "warning", "sources.base.chat_template").what


def test_more_tokens_than_embeddings(make, model_with):
    folder = model_with(tokens=["<new>"])
    only(findings.check_tokens(make("grpo", model=folder)), "error", str(folder / "config.json"))


def test_an_untrained_model_that_does_not_stop(make, model_with):
    folder = model_with()
    folder = folder.rename(folder.parent / "base")  # as under generate.models
    for name, change in (("tokenizer_config.json", {"eos_token": "<|endoftext|>"}), ("generation_config.json", {})):
        values = json.loads((folder / name).read_text()) | change | {"eos_token_id": 0}
        (folder / name).write_text(json.dumps(values))
    found = only(findings.check_tokens(make("grpo", model=folder)), "warning", str(folder / "generation_config.json"))
    assert "<|im_end|>" in found.what and "[0, 2]" in found.write
    assert findings.check_tokens(make("grpo", model=folder, generate__models=["reasoning"])) == []


def test_padding_with_the_stop_token_hides_no_stop_token():
    """Which is why it is no finding: labels are ignored by their place."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch = DataCollatorForLanguageModeling(pad_token_id=2)([{"input_ids": [5, 6, 2]}, {"input_ids": [2]}])
    assert batch["input_ids"].tolist() == [[5, 6, 2], [2, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 2], [2, -100, -100]]


# Memory and disk


def test_memory_of_one_gpu(make, model_with):
    folder = model_with(**QWEN_1_5B)
    options = {"sft__cold_start__trainer__gradient_checkpointing": True, "sft__cold_start__trainer__bf16": True}
    assert findings.check_memory(make("sft", GPU, folder, **options)) == []
    found = only(findings.check_memory(make("sft", GPU | {"memory_gib": 25}, folder)), "warning", "HARDWARE=mine")
    assert "25.0 GiB" in found.what and "tokens_per_device.sft" in found.write
    found = only(findings.check_memory(make("sft", GPU | {"memory_gib": 24}, folder)), "error", "HARDWARE=mine")
    without = make("sft", GPU | {"memory_gib": 24}, folder, sft__cold_start__trainer__gradient_checkpointing=False)
    assert "gradient_checkpointing: true" in findings.check_memory(without)[0].write


def test_memory_of_a_recipe_in_bfloat16(make, model_with):
    """Open-R1's SFT on one GPU of 24 GB."""
    run = make(
        "sft",
        GPU | {"memory_gib": 24, "tokens_per_device": {"sft": 4096, "grpo": 1}},
        model_with(**QWEN_1_5B),
        sft__cold_start__trainer__model_init_kwargs={"dtype": "bfloat16"},
        sft__cold_start__trainer__gradient_checkpointing=True,
        sft__cold_start__trainer__bf16=True,
        sft__cold_start__trainer__max_length=4096,
        prepare__traces__max_length=4096,
    )
    assert findings.check_memory(run) == []
    assert 12 * GIB < findings.memory.estimate(findings.memory_job(run)).peak < 20 * GIB


def test_memory_that_vllm_needs(make, model_with):
    folder = model_with(**QWEN_1_5B)
    options = {"grpo__reasoning__trainer__gradient_checkpointing": True}
    fits = GPU | {"grpo_trainer": VLLM, "memory_gib": 140}
    assert findings.check_memory(make("grpo", fits, folder, **options)) == []
    tight = fits | {"grpo_trainer": VLLM | {"vllm_gpu_memory_utilization": 0.02}}
    found = only(findings.check_memory(make("grpo", tight, folder)), "warning", "HARDWARE=mine")
    assert (found.why, found.write[:46]) == ("it does not start", "grpo_trainer.vllm_gpu_memory_utilization: 0.05")


@pytest.mark.parametrize(
    ("mode", "top_p", "write"),
    [
        ("sequence_mask", 0.95, "token_truncate, and top_p 1.0 and top_k 0"),
        ("sequence_mask", 1.0, "token_truncate"),
        ("token_truncate", 0.95, None),
    ],
)
def test_weights_over_whole_completions(make, mode, top_p, write):
    where = "grpo.reasoning.trainer.vllm_importance_sampling_mode"
    trainer = {"vllm_importance_sampling_mode": mode, "top_p": top_p, "top_k": 0}
    changes = {f"grpo__reasoning__trainer__{name}": value for name, value in trainer.items()}
    found = findings.check_grpo_options(make("grpo", CPU | {"grpo_trainer": VLLM}, **changes))
    assert [finding.write for finding in found if finding.where == where] == ([write] if write else [])
    on_cpu = findings.check_grpo_options(make("grpo"))
    assert not [finding for finding in on_cpu if finding.where == where]


def test_memory_of_a_vllm_server(make, model_with):
    options = {"grpo__reasoning__trainer__gradient_checkpointing": True}
    seven = {"processes": 8, "accelerate": "zero2", "server": {"gpu_memory_utilization": 0.9}, "memory_gib": 79}
    seven |= {"grpo_trainer": {"use_vllm": True, "vllm_mode": "server"}, "tokens_per_device": {"sft": 1, "grpo": 1}}
    options |= {"grpo__reasoning__global_batch_size": 56}
    run = make("grpo", seven, model_with(**QWEN_1_5B), **options)
    assert run.processes == 7 and findings.memory_job(run).vllm == 0
    assert findings.check_memory(run) == []
    small = seven | {"server": {"gpu_memory_utilization": 0.02}}
    found = only(findings.check_memory(make("grpo", small, run.model)), "warning", "HARDWARE=mine")
    assert found.write.startswith("server.gpu_memory_utilization: 0.05 ")


def test_a_reference_model_needs_beta(make, model_with):
    assert not findings.memory_job(make("grpo")).reference
    assert findings.memory_job(make("grpo", grpo__reasoning__trainer__beta=0.04)).reference


def test_the_disk(make, model_with):
    run = make("sft")
    free = shutil.disk_usage(run.model).free
    assert findings.check_disk(run) == []
    large = make("sft", model=model_with(**QWEN_1_5B | {"vocab_size": 10**12}))
    (large.model / "model.safetensors").unlink()
    found = findings.check_disk(large)
    assert {finding.level for finding in found} == {"error"} and f"{free / GIB:.0f}"[:1] in found[0].what


def test_checkpoints_need_room(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # outside of a DVC repository
    run = make("sft", sft__cold_start__export_dtype="float32")
    needs = findings.disk_needs(run)
    assert set(needs) == {run.model.parent, CHECKPOINTS}
    # Three checkpoints: weights and two moments.
    assert needs[CHECKPOINTS] == 3 * 3 * needs[run.model.parent]


def test_dvcs_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage.dvc_cache() is None
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    assert stage.dvc_cache() == tmp_path / ".dvc/cache"


# Data, options and rewards


def test_rows_without_what_is_learned(make, dataset):
    write_parquet([row(1) | {"completion": None}, row(2)], dataset)
    only(findings.check_data(make("sft")), "error", "sft.cold_start.dataset")
    assert findings.check_data(make("grpo")) == []
    write_parquet([row(1) | {"solution": None}, row(2)], dataset)
    only(findings.check_data(make("grpo")), "error", "grpo.reasoning.dataset")


def test_evaluation_questions_in_training(make):
    found = findings.check_data(make("sft", prepare__traces__decontaminate=[]))
    assert only(found, "warning", "prepare.traces.decontaminate").write == "[problems]"
    builtin = {"into": "raw", "origin": "builtin", "builtin": "questions", "options": {"rows": 10}}
    assert findings.check_data(make("sft", sources__problems=builtin)) == []


def test_parts_of_a_mixture_are_decontaminated_too(make):
    mixture = {"mixture": {"traces": 1.0}, "rows": 9, "tokenizer": "base", "max_prompt_length": 60, "max_length": 200}
    changes = {"prepare__mixed": mixture, "sft__cold_start__dataset": "mixed", "prepare__traces__decontaminate": []}
    only(findings.check_data(make("sft", **changes)), "warning", "prepare.traces.decontaminate")
    assert findings.check_data(make("sft", prepare__mixed=mixture | {"decontaminate": ["problems"]})) == []


def test_packing_that_cuts(make):
    packed = {"sft__cold_start__trainer__packing": True}
    assert findings.check_data(make("sft", **packed)) == []
    cut = {"sft__cold_start__trainer__packing_strategy": "wrapped", "sft__cold_start__trainer__max_length": 30}
    found = only(findings.check_data(make("sft", **cut)), "warning", "sft.cold_start.trainer.packing_strategy")
    assert "100% of the traces are longer" in found.what and "open-r1 #355" in found.why
    run = make("sft", sft__cold_start__trainer__packing_strategy="bfd_split")
    assert "bfd_split" in only(findings.check_data(run), "warning", found.where).what
    assert findings.check_data(make("sft", sft__cold_start__trainer__max_length=200)) == []


@pytest.mark.parametrize(
    ("kind", "option", "default"),
    [
        ("grpo", "beta", "0.0"),
        ("grpo", "loss_type", "dapo"),
        ("grpo", "max_completion_length", "512"),
        ("grpo", "epsilon", "0.2"),
        ("sft", "packing", "False"),
        ("sft", "completion_only_loss", "None"),
        ("sft", "learning_rate", "2e-05"),
        ("sft", "bf16", "None"),
        ("sft", "max_steps", None),
    ],
)
def test_options_that_are_written_nowhere(make, kind, option, default):
    phase = "sft.cold_start" if kind == "sft" else "grpo.reasoning"
    found = findings.check_options(make(kind, **{f"{phase}.trainer.{option}": None}))
    finding = only(found, "warning", f"{phase}.trainer")
    expected = "num_train_epochs: 3.0" if option == "max_steps" else f"{option}: {default}"
    assert finding.write == f"what holds now, {expected}"


def test_small_steps_of_bfloat16_weights(make):
    small = {"sft__cold_start__trainer__model_init_kwargs": {"dtype": "bfloat16"}}
    assert findings.check_options(make("sft", **small)) == []
    run = make("sft", sft__cold_start__trainer__learning_rate=1e-6)
    only(findings.check_options(run), "warning", "sft.cold_start.trainer.model_init_kwargs")
    # DeepSpeed keeps a float32 copy, PEFT float32 adapters.
    zero = GPU | {"accelerate": "zero2", "trainer": {"use_cpu": True}}
    assert findings.check_options(make("sft", zero)) == []
    assert findings.check_options(make("sft", sft__cold_start__lora={"r": 8, "lora_alpha": 16})) == []


def test_a_high_learning_rate_of_grpo(make, model_with):
    folder = model_with(**QWEN_1_5B)
    run = make("grpo", model=folder, grpo__reasoning__trainer__learning_rate=2e-5)
    assert "#538" in only(findings.check_options(run), "warning", "grpo.reasoning.trainer.learning_rate").why
    assert findings.check_options(make("grpo")) == []  # a tiny model from scratch takes more
    assert findings.check_options(make("grpo", model=folder, grpo__reasoning__trainer__learning_rate=3e-6)) == []


def test_short_completions_of_a_distilled_model(make):
    base = {
        "into": "models",
        "origin": "hub",
        "repo": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "revision": "0" * 40,
    }
    run = make("grpo", sources__base=base)
    only(findings.check_options(run), "warning", "grpo.reasoning.trainer.max_completion_length")
    assert findings.check_options(make("grpo", grpo__reasoning__trainer__max_completion_length=2048)) == []


def test_another_temperature_in_the_evaluation(make):
    run = make("grpo", tasks__problems__temperature=0.6)
    assert "problems at 0.6" in only(findings.check_options(run), "warning", "grpo.reasoning.trainer.temperature").what


@pytest.mark.parametrize(
    ("rewards", "solution", "level", "says"),
    [
        ({"accuracy": 1.0}, "$", "error", "earn 0% of it"),
        ({"int": 1.0}, r"\frac{1}{2}", "error", "earn 0% of it"),
        ({"strict_format_as_published": 1.0}, "5", "warning", "as published"),
    ],
)
def test_golds_that_earn_nothing(make, dataset, rewards, solution, level, says):
    write_parquet([row(number) | {"solution": solution} for number in range(10)], dataset)
    found = findings.check_rewards(make("grpo", grpo__reasoning__rewards=rewards))
    assert found[0].level == level and found[0].where == f"grpo.reasoning.rewards.{next(iter(rewards))}"
    assert says in f"{found[0].what}, {found[0].why}"


def test_a_few_golds_that_cannot_be_read(make, dataset):
    rows = [row(number) for number in range(19)] + [row(20) | {"solution": "$"}]
    write_parquet(rows, dataset)
    found = findings.check_rewards(make("grpo"))
    assert "1 of 20" in only(found, "warning", "grpo.reasoning.rewards.accuracy").what


def test_all_rewards_of_a_sound_recipe_are_earned(make):
    rewards = {"accuracy": 1.0, "format": 1.0, "tag_count": 1.0, "correctness": 1.0, "int": 1.0, "cosine": 1.0}
    assert findings.check_rewards(make("grpo", grpo__reasoning__rewards=rewards)) == []


# Commands


@pytest.fixture(autouse=True)
def hardware_file(tmp_path) -> Path:
    """The hardware of these tests as a file."""
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(CPU))
    return path


def run_cli(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workflow.preflight", *arguments],
        cwd=folder,
        env=environment | {"HARDWARE": str(folder / "mine.yaml")},
        capture_output=True,
        text=True,
    )


def test_the_command_prints_a_page(recipe, write_params, tmp_path, tiny_model, environment):
    write_params(recipe)
    shutil.copytree(tiny_model, tmp_path / "data/models/base")
    for name in ("traces", "problems"):
        write_parquet([row(number) for number in range(100)], tmp_path / f"data/prepared/{name}.parquet")
    done = run_cli(tmp_path, environment)
    assert (done.returncode, done.stderr) == (0, "")
    pages = done.stdout.split("\ngrpo reasoning\n")
    for page, lines in zip(
        pages,
        [
            [
                "  global batch   64 sequences = 2 processes x 32 a device x 1 accumulated",
                "  lengths        at most 200, not packed",
            ],
            ["  questions      8 a step, 8 completions each", "  rewards        1.0 x accuracy, 0.2 x format"],
        ],
        strict=True,
    ):
        assert page.count("nothing wrong was found") == 1 and page.count("\n") <= 60
        assert set(lines) <= set(page.splitlines())
    assert max(len(line) for line in done.stdout.splitlines()) <= 120


def test_the_command_before_anything_was_downloaded(recipe, write_params, tmp_path, environment):
    write_params(recipe)
    done = run_cli(tmp_path, environment, "reasoning")
    assert (done.returncode, done.stderr) == (0, "")
    assert "not checked: context, chat template, memory: data/models/base is not there" in done.stdout
    assert "sft cold_start\n" not in done.stdout


def test_the_command_fails_on_an_error(recipe, write_params, tmp_path, environment):
    spoil(recipe, {"sft.cold_start.global_batch_size": 65})
    write_params(recipe)
    done = run_cli(tmp_path, environment)
    assert (done.returncode, done.stderr) == (1, "")
    for line in (
        "error: sft.cold_start.global_batch_size",
        "what   65 cannot be divided",
        "why    ",
        "write  64 or 66",
    ):
        assert line in done.stdout


def test_the_command_with_a_phase_that_is_not_there(recipe, write_params, tmp_path, environment):
    write_params(recipe)
    done = run_cli(tmp_path, environment, "warmup")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 'warmup' is not under sft and grpo") and done.stderr.count("\n") == 1


def hub_source(revision: str) -> dict[str, str]:
    return {"into": "models", "origin": "hub", "repo": "owner/name", "revision": revision}


def test_access_to_a_gated_model(recipe, write_params, tmp_path, environment):
    repo = tmp_path / "hub/models/owner/name"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text("{}")
    with HubServer(tmp_path / "hub") as hub:
        spoil(recipe, {"sources.base": hub_source(hub.revision("owner/name"))})
        write_params(recipe)
        hub.gated["owner/name"] = {"mine"}
        shut = run_cli(tmp_path, environment | hub.environment(tmp_path))
        opened = run_cli(tmp_path, environment | hub.environment(tmp_path, token="mine"))
        (tmp_path / "data/models/base").mkdir(parents=True)  # once it is there, nobody asks
        asked = len(hub.requests)
        run_cli(tmp_path, environment | hub.environment(tmp_path))
        assert len(hub.requests) == asked > 0
    assert shut.returncode == 1 and "error: sources.base" in shut.stdout
    assert "what   owner/name is gated" in shut.stdout and "write  accept its terms at" in shut.stdout
    assert opened.returncode == 0 and "sources" not in opened.stdout.split("sft cold_start")[0]


def test_access_without_a_network(recipe, write_params, tmp_path, environment):
    spoil(recipe, {"sources.base": hub_source("0" * 40)})
    write_params(recipe)
    done = run_cli(tmp_path, environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "not checked: access to the hub's repositories: no network" in done.stdout


def test_before_training_prints_warnings(recipe, write_params, tiny_model, dataset, tmp_path, environment):
    """As workflow/launch.py runs it."""
    spoil(recipe, {"sft.cold_start.trainer.warmup_steps": 9, "sft.cold_start.trainer.weight_decay": None})
    write_params(recipe)
    files = ["--model", str(tiny_model), "--dataset", str(dataset)]
    done = run_cli(tmp_path, environment, "cold_start", *files)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 2)
    assert all(line.startswith("warning: sft.cold_start.trainer") for line in lines)


@pytest.mark.parametrize("arguments", [["--model", "m", "--dataset", "d"], ["cold_start", "--model", "m"]])
def test_a_training_has_a_phase_a_model_and_a_dataset(recipe, write_params, tmp_path, environment, arguments):
    write_params(recipe)
    done = run_cli(tmp_path, environment, *arguments)
    assert done.returncode == 2 and "--model and --dataset need each other and a phase" in done.stderr


def test_before_training_stops_at_an_error(recipe, write_params, tiny_model, dataset, tmp_path, monkeypatch):
    spoil(recipe, {"sft.cold_start.global_batch_size": 65, "sft.cold_start.held_out": 100})
    spoil(recipe, {"sft.cold_start.trainer.eval_strategy": "steps"})
    write_params(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARDWARE", "mine.yaml")
    with pytest.raises(StageError) as stopped:
        preflight.before_training("sft", "cold_start", tiny_model, dataset)
    assert str(stopped.value).startswith("sft.cold_start.global_batch_size: 65 cannot be divided over 2")
    assert str(stopped.value).endswith(
        "write 64 or 66, or use another HARDWARE (1 more: python -m workflow.preflight cold_start)"
    )
    assert "\n" not in str(stopped.value)
