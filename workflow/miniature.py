"""Any recipe in miniature: the same stages, data formats, rewards and trainer options, on a CPU in minutes.

`python -m workflow.compose recipe=openr1_1_5b --miniature` (or `make repro RECIPE=openr1_1_5b MINIATURE=1`) replaces
what makes a recipe long: models and data are the builtin ones of the same format, and there are few rows, steps and
tokens. What it shows is that the recipe runs through, before anybody pays for GPUs; its scores mean nothing.
"""

from typing import Any

from workflow.params import ParamsError

MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,  # two heads of 32, the fewest that vLLM's attention on CPUs takes
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# The builtin data set that has the columns of each format.
MAKERS = {
    "aime": "aime",
    "bespoke_stratos": "bespoke_stratos_messages",
    "gpqa": "gpqa",
    "gsm8k": "gsm8k",
    "math": "questions",
    "messages": "bespoke_stratos_messages",
    "numina_tir": "numina_tir",
}
ROWS, STEPS, TOKENS, QUESTIONS, SAMPLES = 200, 2, 32, 8, 2
# A byte-level tokenizer needs more tokens for a prompt than the limits of a real one allow.
LENGTH = 2048


def shrink(params: dict[str, Any]) -> dict[str, Any]:
    """The miniature of a recipe.

    Args:
        params: a whole params.yaml as a mapping.

    Raises:
        ParamsError: a data set has a format of which there is no builtin one.
    """
    formats = {prepare["source"]: prepare["format"] for prepare in params["prepare"].values() if "source" in prepare}
    return {
        **params,
        "sources": {name: _source(name, source, formats.get(name)) for name, source in params["sources"].items()},
        "prepare": {name: _prepare(name, prepare, params["tasks"]) for name, prepare in params["prepare"].items()},
        "sft": {name: _phase(phase, 8) for name, phase in params["sft"].items()},
        "grpo": {
            name: _phase(phase, 2 * phase["trainer"]["num_generations"]) for name, phase in params["grpo"].items()
        },
        "tasks": {
            name: {**task, "questions": QUESTIONS, "n_samples": SAMPLES, "max_tokens": TOKENS, "dtype": "float32"}
            for name, task in params["tasks"].items()
        },
    }


def _source(name: str, source: dict[str, Any], form: str | None) -> dict[str, Any]:
    small = {"into": source["into"], "origin": "builtin", "licence": "Apache-2.0"}
    if source["into"] == "models":
        template = {"chat_template": source["chat_template"]} if "chat_template" in source else {}
        return {**small, "builtin": "qwen2", "options": MODEL, **template}
    if form not in MAKERS:
        raise ParamsError(
            f"sources.{name} has the format {form}, of which there is no builtin data set; write one in "
            "workflow/builtin.py and name it in MAKERS of workflow/miniature.py"
        )
    guesses = {"guesses": 0.5} if MAKERS[form] == "bespoke_stratos_messages" else {}
    return {**small, "builtin": MAKERS[form], "options": {"rows": ROWS, **guesses}}


def _prepare(name: str, prepare: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    lengths = {"max_prompt_length": LENGTH, "max_length": max(LENGTH, prepare["max_length"])}
    return {**prepare, "files": "test*" if name in tasks else "train*", **lengths}


def _phase(phase: dict[str, Any], batch: int) -> dict[str, Any]:
    trainer = {**phase["trainer"], "max_steps": STEPS, "logging_steps": 1, "eval_steps": STEPS}
    if "max_completion_length" in trainer:
        trainer["max_completion_length"] = TOKENS
    if trainer.get("max_length") is not None:
        trainer["max_length"] = max(LENGTH, trainer["max_length"])
    held_out = {"held_out": batch} if "held_out" in phase else {}
    return {**phase, **held_out, "global_batch_size": batch, "trainer": trainer}
