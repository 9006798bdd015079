"""Tables, curves, samples and costs of one run: metrics.json, plots for DVC, report.html and a model card.

Everything is read from files that params.yaml names, so what an older recipe left in the same folders is ignored.
Equal inputs give equal files, except for the git commit.
"""

import argparse
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import stage
from workflow.params import Params, load_params

if TYPE_CHECKING:
    import pandas as pd

NBSP = "\u00a0"
MINUS = "\u2212"

# Below this pass@1 a model solves so little that a difference says nothing about what it learned.
NEAR_ZERO = 0.02
# Above this share, cut-off samples are worth a warning beside the verdict.
MANY_TRUNCATED = 0.05

N_SAMPLES = 10
LONGEST_TEXT = 6000  # characters of a completion shown in full

# Panels of a phase in reading order: the trainer's column and what it is called. A name in braces stands for
# every column that fits, because reward functions are the recipe's.
PANELS = {
    "sft": {
        "loss": "Loss",
        "mean_token_accuracy": "Token accuracy",
        "entropy": "Entropy, nats per token",
        "grad_norm": "Gradient norm",
        "learning_rate": "Learning rate",
    },
    "grpo": {
        "reward": "Reward",
        "rewards/{}/mean": "Reward: {}",
        "reward_std": "Reward, spread in a group",
        "frac_reward_zero_std": "Groups without signal",
        "completions/mean_length": "Completion length, tokens",
        "completions/clipped_ratio": "Completions cut off",
        "entropy": "Entropy, nats per token",
        "kl": "KL to the start, nats",
        "loss": "Loss",
        "grad_norm": "Gradient norm",
        "learning_rate": "Learning rate",
    },
}
KINDS = {"sft": "SFT", "grpo": "GRPO"}

REASONS = {
    "correct": "the answer equals the gold answer",
    "wrong": "the answer differs from the gold answer",
    "unparsed": "no answer could be read",
    "gold_unparsed": "the gold answer could not be read",
    "timeout": "comparing the answers took too long",
    "error": "comparing the answers failed",
}


# Numbers as text


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal."""
    return f"{100 * share:.1f}{NBSP}%"


def points(difference: float) -> str:
    """A difference of two shares as signed percentage points."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def bound(difference: float) -> str:
    """An interval bound in percentage points: signed only when negative."""
    return points(difference).removeprefix("+")


def p_value(p: float) -> str:
    """`p < .001` or `p = .043`."""
    return f"p{NBSP}<{NBSP}.001" if p < 0.001 else f"p{NBSP}={NBSP}{min(p, 1):.3f}".replace("0.", ".")


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def memory(mib: float) -> str:
    """MiB as `812 MiB` or `3.4 GiB`."""
    return f"{mib:.0f}{NBSP}MiB" if mib < 1024 else f"{mib / 1024:.1f}{NBSP}GiB"


def number(value: float) -> str:
    """A number of any size in at most four significant digits, for axis labels."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


# Reading


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        StageError: the file is missing or not JSON.
    """
    if not file.is_file():
        raise stage.StageError(f"{file} does not exist; run the stage that writes it, e.g. with: dvc repro")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise stage.StageError(f"{file} is not JSON ({error}); delete it and run its stage again") from None


def read_parquet(file: Path, columns: list[str]) -> "pd.DataFrame":
    """The named columns of a parquet file.

    Raises:
        StageError: the file is missing.
    """
    import pandas as pd

    if not file.is_file():
        raise stage.StageError(f"{file} does not exist; run the stage that writes it, e.g. with: dvc repro")
    return pd.read_parquet(file, columns=columns)


def read_history(file: Path) -> "pd.DataFrame":
    """The trainer's log: one row per logged step, numbers only, sorted by step.

    Raises:
        StageError: the file is missing or has no column `step`.
    """
    import pandas as pd

    if not file.is_file():
        raise stage.StageError(f"{file} does not exist; run the training stage that writes it, e.g. with: dvc repro")
    history = pd.read_csv(file)
    if "step" not in history:
        raise stage.StageError(f"{file} has no column step; delete it and run its training stage again")
    history = history.apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    return history.dropna(subset="step").sort_values("step", kind="stable").reset_index(drop=True)


def last_user_message(prompt: Sequence[dict[str, str]]) -> str:
    """The question in a chat prompt."""
    return [message["content"] for message in prompt if message["role"] == "user"][-1]


def git_state() -> tuple[str, list[str]]:
    """The commit and the files of the pipeline that differ from it; ("not a git checkout", []) outside of one.

    Only what the run is made of counts: dvc.lock and metrics.json change with every run.
    """
    if shutil.which("git") is None:
        return "not a git checkout", []
    head = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "not a git checkout", []
    inputs = ["workflow", "dvc.yaml", "params.yaml", "pyproject.toml"]
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", *inputs], capture_output=True, text=True, check=True
    ).stdout
    return head.stdout.strip(), [line[3:] for line in status.splitlines()]


# Models and what changed between them


@dataclass(frozen=True)
class Step:
    """From one evaluated model to the next that was trained from it."""

    before: str
    after: str
    how: str  # "GRPO", or "SFT + GRPO" where the model between was not evaluated


def start_of(params: Params, model: str) -> str | None:
    """What a phase starts from; None for a source."""
    return params.phases[model].start_from if model in params.phases else None


def ancestors(params: Params, model: str) -> list[str]:
    """The models a model was trained from, nearest first."""
    found: list[str] = []
    start = start_of(params, model)
    while start is not None:
        found.append(start)
        start = start_of(params, start)
    return found


def kind_of(params: Params, phase: str) -> str:
    """`sft` or `grpo`."""
    return "sft" if phase in params.sft else "grpo"


def trained_phases(params: Params) -> list[str]:
    """The phases that an evaluated model went through, in the order of training.

    A phase that leads to no evaluated model may not have run when the report does.
    """
    chains = [[model, *ancestors(params, model)][::-1] for model in params.generate.models]
    return list(dict.fromkeys(name for chain in chains for name in chain if name in params.phases))


def step_between(params: Params, before: str, after: str) -> Step:
    """The step to a model from one of its ancestors, named by the kinds of all phases between them."""
    chain = [after, *ancestors(params, after)]
    phases = chain[: chain.index(before)][::-1]
    return Step(before, after, " + ".join(KINDS[kind_of(params, phase)] for phase in phases))


def steps(params: Params) -> list[Step]:
    """Each evaluated model against the nearest evaluated model it was trained from, in the order of the report;
    at the end the last model against the first of its line, where that is another step."""
    evaluated = params.generate.models
    found = []
    for model in evaluated:
        before = [name for name in ancestors(params, model) if name in evaluated]
        found += [step_between(params, before[0], model)] if before else []
    line = [name for name in ancestors(params, evaluated[-1]) if name in evaluated]
    return found + ([step_between(params, line[-1], evaluated[-1])] if len(line) > 1 else [])


def last_step(params: Params) -> Step | None:
    """The step that made the last model; None where nothing it was trained from is evaluated."""
    return next((step for step in steps(params) if step.after == params.generate.models[-1]), None)


def score_matrix(verdicts: "pd.DataFrame") -> "pd.DataFrame":
    """Correctness as 0.0 and 1.0: a row per question id, sorted, a column per sample."""
    return verdicts.pivot(index="id", columns="sample", values="correct").astype(float)


def gain(step: Step, task: str, scores: dict, verdicts: dict) -> dict[str, Any]:
    """The paired difference in pass@1 of one step on one task, as a row of the report.

    Raises:
        StageError: the two models were asked different questions.
    """
    from workflow.stats import paired_difference

    before, after = (score_matrix(verdicts[model, task]) for model in (step.before, step.after))
    asked = [scores[model, task]["questions_sha256"] for model in (step.before, step.after)]
    if asked[0] != asked[1] or list(before.index) != list(after.index):
        raise stage.StageError(
            f"{step.before} and {step.after} were asked different questions in {task}; "
            "run generate and score again for both"
        )
    paired = paired_difference(after.to_numpy(), before.to_numpy())
    change = after.mean(axis=1) - before.mean(axis=1)
    return {
        "task": task,
        "before": step.before,
        "after": step.after,
        "how": step.how,
        "pass_before": scores[step.before, task]["pass_at_1"],
        "pass_after": scores[step.after, task]["pass_at_1"],
        "difference": paired.mean,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "better": int((change > 0).sum()),
        "same": int((change == 0).sum()),
        "worse": int((change < 0).sum()),
        "verdict": "better" if paired.low > 0 else "worse" if paired.high < 0 else "not distinguishable",
    }


def verdict(row: dict[str, Any]) -> str:
    """What a gain says, in one or two honest sentences."""
    change = f"from {percent(row['pass_before'])} to {percent(row['pass_after'])}"
    evidence = (
        f"({points(row['difference'])} points, 95{NBSP}% interval "
        f"{bound(row['low'])} to {bound(row['high'])}, {p_value(row['p'])})"
    )
    verb = {"better": "raised", "worse": "lowered"}.get(row["verdict"])
    if verb:
        text = f"{row['how']} {verb} {row['task']} pass@1 {change} {evidence}."
    else:
        text = f"{row['how']} made no distinguishable difference on {row['task']}: pass@1 went {change} {evidence}."
    if max(row["pass_before"], row["pass_after"]) < NEAR_ZERO:
        text += " Both models solve next to nothing, so this says little about what was learned."
    elif row["pass_after"] < NEAR_ZERO:
        text += f" {row['after']} solves next to nothing."
    return text


def verdicts_in_words(params: Params, gains: list[dict], scores: dict) -> tuple[list[str], list[str]]:
    """The headline (one sentence per task, about the last step) and the sentences about the steps before it."""
    last, step = params.generate.models[-1], last_step(params)
    if step is None:
        rows = [(task, scores[last, task]) for task in params.tasks]
        return [
            f"{last} reaches {percent(score['pass_at_1'])} pass@1 on {task} (95{NBSP}% interval "
            f"{percent(score['pass_at_1_low'])} to {percent(score['pass_at_1_high'])})."
            for task, score in rows
        ], []
    headline = [verdict(row) for row in gains if (row["before"], row["after"]) == (step.before, step.after)]
    earlier = [verdict(row) for row in gains if row["after"] != step.after]
    return headline, earlier


# Data


def overlaps(params: Params, phases: list[str], questions: Path) -> list[dict[str, Any]]:
    """How many evaluation questions of each task occur word for word in the training set of each phase."""
    trained = {}
    for name in sorted({params.phases[phase].dataset for phase in phases}):
        prompts = read_parquet(questions / f"{name}.parquet", ["prompt"])["prompt"]
        trained[name] = {last_user_message(prompt) for prompt in prompts}
    rows = []
    for task, settings in params.tasks.items():
        prompts = read_parquet(questions / f"{task}.parquet", ["prompt"])["prompt"][: settings.questions]
        asked = [last_user_message(prompt) for prompt in prompts]
        for phase in phases:
            name = params.phases[phase].dataset
            seen = sum(question in trained[name] for question in asked)
            rows.append({"task": task, "phase": phase, "dataset": name, "seen": seen, "asked": len(asked)})
    return rows


def data_rows(params: Params, phases: list[str], logs: Path) -> list[dict[str, Any]]:
    """One row per prepared data set: what it is for, where it comes from, rows in, kept, and dropped by reason."""
    rows = []
    for name, prepare in params.prepare.items():
        log = read_json(logs / "prepare" / name / "stage.json")
        origin = read_json(logs / "download" / prepare.source / "stage.json")
        dropped = {reason: count for reason, count in sorted(log["dropped"].items()) if count}
        not_drawn = log["rows_in"] - sum(dropped.values()) - log["rows"]
        uses = [f"training {phase}" for phase in phases if params.phases[phase].dataset == name]
        uses += ["evaluation"] if name in params.tasks else []
        rows.append(
            {
                "name": name,
                "use": ", ".join(uses) or "not used",
                "rows_in": log["rows_in"],
                "rows": log["rows"],
                "dropped": {**dropped, "not drawn": not_drawn} if not_drawn else dropped,
                "origin": origin["origin"],
                "revision": origin["revision"],
                "licence": origin["licence"],
            }
        )
    return rows


def model_rows(params: Params, phases: list[str], logs: Path) -> list[dict[str, Any]]:
    """One row per model: a source with its origin, or a phase with what it was trained from and on."""
    rows = []
    for name, source in params.sources.items():
        if source.into == "models":
            log = read_json(logs / "download" / name / "stage.json")
            rows.append({"name": name, **{key: log[key] for key in ("origin", "revision", "licence")}})
    for name in phases:
        phase = params.phases[name]
        made = f"{KINDS[kind_of(params, name)]} of {phase.start_from} on {phase.dataset}"
        rows.append({"name": name, "origin": made, "revision": "", "licence": ""})
    return rows


# Samples


def pick_samples(params: Params, questions: Path, samples: Path, verdicts: dict) -> list[dict[str, Any]]:
    """Ten samples of the last model, shared out over the tasks, half right and half wrong where there are enough.

    The order is a hash of seed, task, id and sample: drawn at random, but the same in every report.

    Raises:
        StageError: a sample was judged that is not among the stored ones.
    """
    last = params.generate.models[-1]
    tasks = list(params.tasks)
    picked = []
    for index, task in enumerate(tasks):
        quota = N_SAMPLES // len(tasks) + (index < N_SAMPLES % len(tasks))
        rows = verdicts[last, task]
        keys = [f"{params.seed}:{task}:{id_}:{sample}" for id_, sample in zip(rows["id"], rows["sample"], strict=True)]
        rows = rows.assign(order=[hashlib.sha256(key.encode()).hexdigest() for key in keys]).sort_values("order")
        rows = rows.drop_duplicates("id")
        right, wrong = rows[rows["correct"]], rows[~rows["correct"]]
        n_right = max(min(len(right), (quota + 1) // 2), min(len(right), quota - len(wrong)))
        drawn = [*right[:n_right].itertuples(), *wrong[: quota - n_right].itertuples()]
        asked = read_parquet(questions / f"{task}.parquet", ["id", "prompt"])
        asked = {str(id_): last_user_message(prompt) for id_, prompt in zip(asked["id"], asked["prompt"], strict=True)}
        file = samples / last / f"{task}.parquet"
        stored = read_parquet(file, ["id", "sample", "completion", "tokens", "finish_reason"]).astype({"id": str})
        stored = {(row.id, row.sample): row for row in stored.itertuples()}
        for row in drawn:
            if (row.id, row.sample) not in stored or row.id not in asked:
                raise stage.StageError(f"{file} has no sample {row.sample} of {row.id}; run score again for {last}")
            answered = stored[row.id, row.sample]
            thoughts, answer = split_thoughts(answered.completion)
            picked.append(
                {
                    "id": row.id,
                    "sample": row.sample,
                    "question": shorten(asked[row.id]),
                    "thoughts": shorten(thoughts),
                    "answer": shorten(answer),
                    "extracted": row.extracted,
                    "gold": shorten(row.gold),
                    "correct": row.correct,
                    "strict": row.strict,
                    "reason": REASONS.get(row.reason, row.reason),
                    "tokens": answered.tokens,
                    "truncated": answered.finish_reason == "length",
                }
            )
    return picked


def split_thoughts(completion: str) -> tuple[str, str]:
    """What stands in <think> and in <answer>, or else after it; ("", completion) where the thought does not end.

    The last </think> counts, as it does for the score stage.
    """
    thoughts, end, rest = completion.rpartition("</think>")
    if not end:
        return "", completion.strip()
    answer = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", rest, re.DOTALL)
    return thoughts.strip().removeprefix("<think>").strip(), (answer[1] if answer else rest).strip()


def shorten(text: str) -> str:
    """The text, with its middle left out where it is longer than LONGEST_TEXT characters."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n\n[\u2026 {len(text) - 2 * half} characters left out \u2026]\n\n{text[-half:]}"


# Costs


def stage_logs(params: Params, phases: list[str], logs: Path) -> list[dict[str, Any]]:
    """The stage.json of every stage the report is made from, in the order of the pipeline."""
    pairs = [f"{model}/{task}" for model in params.generate.models for task in params.tasks]
    items = {
        "download": list(params.sources),
        "prepare": list(params.prepare),
        "sft": [phase for phase in phases if phase in params.sft],
        "grpo": [phase for phase in phases if phase in params.grpo],
        "generate": pairs,
        "score": pairs,
    }
    return [
        {**read_json(logs / entry / item / "stage.json"), "stage": entry, "item": item}
        for entry, names in items.items()
        for item in names
    ]


def versions(logged: list[dict]) -> list[tuple[str, str]]:
    """Package and version, sorted; all versions where the stages differ."""
    found: dict[str, set[str]] = {}
    for log in logged:
        for package, version in log["versions"].items():
            found.setdefault(package, set()).add(version)
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]


def machines(logged: list[dict]) -> list[dict[str, Any]]:
    """The different machines and devices, each with the stages that ran there."""
    found: dict[tuple, list[str]] = {}
    for log in logged:
        machine = log["machine"]
        devices = f"{log['devices']} \u00d7 {log['device']}" if "devices" in log else ""
        key = (machine["cpu"], machine["cores"], machine["system"], devices)
        found.setdefault(key, []).append(log["stage"])
    return [
        {"cpu": cpu, "cores": cores, "system": system, "devices": devices, "stages": list(dict.fromkeys(ran))}
        for (cpu, cores, system, devices), ran in found.items()
    ]


# Charts


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover low to high.

    The first is at or below low, the last at or above high, so they are the axis.
    """
    # Equal up to the four digits of a label: a constant, drawn as a level line.
    if math.isclose(low, high, rel_tol=1e-3):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0, 1)
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return [float(f"{index * width:.10g}") for index in range(first, last + 1)]


def panel(title: str, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Geometry of one curve in a box of 320 x 170 units: paths, ticks, and the first and last value.

    From 40 points on, the curve is a running mean over a twentieth of them with the logged values behind it;
    a long log is thinned to about 400 points by averaging neighbours.
    """
    import numpy as np

    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    bins = np.array_split(np.arange(len(xs)), min(len(xs), 400))
    xs, ys = np.array([xs[part].mean() for part in bins]), np.array([ys[part].mean() for part in bins])
    reach = len(ys) // 40 if len(ys) >= 40 else 0
    smooth = np.array([ys[max(0, i - reach) : i + reach + 1].mean() for i in range(len(ys))])
    # A single spike must not flatten the rest: with enough points, the axis leaves out the outermost per cent,
    # and the box clips what lies beyond.
    inner = np.quantile(ys, [0.01, 0.99]) if len(ys) >= 100 else ys
    y_ticks = ticks(min(inner.min(), smooth.min()), max(inner.max(), smooth.max()))
    # Short logs have whole steps only.
    x_ticks = [tick for tick in ticks(xs[0], xs[-1]) if xs[0] <= tick <= xs[-1] and tick == int(tick)] or [xs[0]]
    box = {"left": 46, "right": 312, "top": 8, "bottom": 146}
    span = (xs[-1] - xs[0]) or 1

    def across(value: float) -> float:
        return round(box["left"] + (value - xs[0]) / span * (box["right"] - box["left"]), 1)

    def up(value: float) -> float:
        return round(
            box["bottom"] - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (box["bottom"] - box["top"]), 1
        )

    def path(values: "np.ndarray") -> str:
        return "M" + "L".join(f"{across(a)},{up(b)}" for a, b in zip(xs, values, strict=True))

    return {
        "title": title,
        "box": box,
        "raw": path(ys) if reach else "",
        "line": path(smooth),
        "dot": (across(xs[-1]), up(smooth[-1])),
        "x_ticks": [(across(tick), number(tick)) for tick in x_ticks],
        "y_ticks": [(up(tick), number(tick)) for tick in y_ticks],
        "first": number(float(f"{smooth[0]:.3g}")),
        "last": number(float(f"{smooth[-1]:.3g}")),
    }


def panels(kind: str, history: "pd.DataFrame") -> list[dict[str, Any]]:
    """The curves of one phase: every known column that was logged, in the order of PANELS."""
    drawn = []
    for name, title in PANELS[kind].items():
        pattern = re.compile(re.escape(name).replace(r"\{\}", "(.+)"))
        for column in history.columns:
            match = pattern.fullmatch(column)
            logged = history[["step", column]].dropna() if match else history[:0]
            if len(logged):
                drawn.append(panel(title.format(*match.groups()), logged["step"], logged[column]))
    return drawn


def bars(params: Params, scores: dict) -> list[dict[str, Any]]:
    """Accuracy per task and model with its interval, as percent of an axis that ends at a round share."""
    charts = []
    for task in params.tasks:
        rows = [{"model": model, **scores[model, task]} for model in params.generate.models]
        top = next(end for end in (0.05, 0.1, 0.2, 0.5, 1) if max(row["pass_at_1_high"] for row in rows) <= end)
        charts.append({"task": task, "rows": rows, "top": top, "ticks": [top * part / 4 for part in range(5)]})
    return charts


def forest_axis(gains: list[dict]) -> dict[str, float]:
    """The common axis of all gains: it includes 0 and every interval."""
    axis = ticks(min([0, *(row["low"] for row in gains)]), max([0, *(row["high"] for row in gains)]))
    return {"low": axis[0], "high": axis[-1], "span": axis[-1] - axis[0]}


# Writing


def headline(params: Params, scores: dict, gains: list[dict], logged: list[dict]) -> dict[str, float]:
    """metrics.json: flat, about ten numbers, the columns of `dvc exp show`.

    One task: pass@1 of every model. Several: of the last model only, so that the table stays readable. What is
    claimed comes first, because a narrow terminal cuts the table off on the right.
    """
    last, step = params.generate.models[-1], last_step(params)
    one_task = len(params.tasks) == 1
    metrics: dict[str, float] = {}
    for task in params.tasks:
        score = scores[last, task]
        shown = params.generate.models if one_task else [last]
        metrics |= {f"{task}.{model}": scores[model, task]["pass_at_1"] for model in shown}
        for row in gains:
            if step and (row["task"], row["before"], row["after"]) == (task, step.before, step.after):
                metrics[f"{task}.gain"] = row["difference"]
                metrics |= {f"{task}.gain_{end}": row[end] for end in ("low", "high")}
        metrics |= {f"{task}.{last}_{end}": score[f"pass_at_1_{end}"] for end in ("low", "high")}
        if one_task:
            metrics |= {f"{task}.truncated": score["truncated"], f"{task}.mean_tokens": score["mean_tokens"]}
    metrics["seconds"] = sum(log["seconds"] for log in logged)
    metrics["peak_memory_mib"] = max(log["peak_memory_mib"] for log in logged)
    return {name: round(value, 4) for name, value in metrics.items()}


def running_steps(histories: dict[str, "pd.DataFrame"]) -> list["pd.DataFrame"]:
    """The logs of several phases with a first column `phase` and one `step` that runs on: a line never folds back."""
    offset, tables = 0, []
    for phase, history in histories.items():
        table = history.assign(step=history["step"].astype(int) + offset)
        table.insert(0, "phase", phase)
        offset = int(table["step"].max()) if len(table) else offset
        tables.append(table)
    return tables


def write_plots(params: Params, histories: dict[str, "pd.DataFrame"], scores: dict, folder: Path) -> None:
    """The CSV files that `plots` in dvc.yaml names. A kind of phase that the recipe lacks, or that
    logged nothing, has no file, and DVC skips its plots.

    sft.csv and grpo.csv: phase, step and the trainer's columns; rewards/<name>.csv: phase, step, value;
    accuracy.csv: label, task, model, pass_at_1, low, high.
    """
    import pandas as pd

    # Rewards of an older recipe must not be plotted again.
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    wanted = {
        "sft": ["loss", "mean_token_accuracy"],
        "grpo": ["reward", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "entropy"],
    }
    for kind, columns in wanted.items():
        tables = running_steps({name: table for name, table in histories.items() if kind_of(params, name) == kind})
        if not tables:
            continue
        table = pd.concat(tables, ignore_index=True).dropna(axis=1, how="all")
        if table.empty:
            continue
        kept = [column for column in columns if column in table]
        table[["phase", "step", *kept]].dropna().to_csv(folder / f"{kind}.csv", index=False)
        for column in table.columns:
            match = re.fullmatch("rewards/(.+)/mean", column)
            if match:
                (folder / "rewards").mkdir(exist_ok=True)
                rows = table[["phase", "step", column]].rename(columns={column: "value"}).dropna()
                rows.to_csv(folder / "rewards" / f"{match[1]}.csv", index=False)
    pd.DataFrame(
        [
            {
                "label": f"{task} / {model}",
                "task": task,
                "model": model,
                "pass_at_1": scores[model, task]["pass_at_1"],
                "low": scores[model, task]["pass_at_1_low"],
                "high": scores[model, task]["pass_at_1_high"],
            }
            for task in params.tasks
            for model in params.generate.models
        ]
    ).to_csv(folder / "accuracy.csv", index=False)


def notes(params: Params, scores: dict, verdicts: dict, overlap: list[dict]) -> list[str]:
    """What a reader must know before believing the headline."""
    last = params.generate.models[-1]
    found = [
        f"{row['seen']} of {row['asked']} {row['task']} questions occur word for word in {row['dataset']}, "
        f"which {row['phase']} was trained on."
        for row in overlap
        if row["seen"]
    ]
    for task, settings in params.tasks.items():
        if scores[last, task]["truncated"] > MANY_TRUNCATED:
            found.append(
                f"{percent(scores[last, task]['truncated'])} of the {task} samples of {last} were cut off at "
                f"{settings.max_tokens} tokens."
            )
        counts = verdicts[last, task]["reason"].value_counts()
        found += [
            f"{counts[reason]} {task} samples of {last} could not be judged: {REASONS[reason]}."
            for reason in ("gold_unparsed", "timeout", "error")
            if reason in counts
        ]
    return found


def hub_ids(origins: list[str]) -> list[str]:
    """The origins that are Hugging Face ids (owner/name), each once."""
    return list(dict.fromkeys(origin for origin in origins if re.fullmatch(r"[\w.-]+/[\w.-]+", origin)))


def model_card(params: Params, scores: dict, sentences: list[str], logs: Path, questions: Path, commit: str) -> str:
    """README of the last model in the form the Hugging Face Hub reads: YAML front matter, then Markdown."""
    from ruamel.yaml import YAML

    last = params.generate.models[-1]
    line = ancestors(params, last)
    phases = [name for name in [*line[::-1], last] if name in params.phases]
    root = [last, *line][-1]
    base = read_json(logs / "download" / root / "stage.json")
    sets = [row for row in data_rows(params, phases, logs) if row["use"].startswith("training")]
    front = {
        "license": base["licence"].lower(),
        "base_model": hub_ids([base["origin"]]),
        "datasets": hub_ids([row["origin"] for row in sets]),
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reasoning", *dict.fromkeys(kind_of(params, name) for name in phases), "open-r1-pipeline"],
    }
    text = io.StringIO()
    YAML().dump({key: value for key, value in front.items() if value}, text)
    trained = [
        f"{position}. `{name}`: {KINDS[kind_of(params, name)]} of `{params.phases[name].start_from}` "
        f"on `{params.phases[name].dataset}`"
        for position, name in enumerate(phases, 1)
    ]
    first_task, settings = next(iter(params.tasks.items()))
    prompt = read_parquet(questions / f"{first_task}.parquet", ["prompt"])["prompt"].iloc[0]
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    sampling = (
        f"do_sample=True, temperature={settings.temperature}, top_p={settings.top_p}"
        if settings.temperature
        else "do_sample=False"
    )
    lines = [
        "---",
        text.getvalue().rstrip(),
        "---",
        "",
        f"# {last} ({params.recipe})",
        "",
        f"A model trained to think between `<think>` tags before it answers, made by the recipe `{params.recipe}` "
        f"of open-r1-pipeline (seed {params.seed}, commit `{commit}`).",
        "",
        *sentences,
        "",
        "## Training",
        "",
        f"Started from `{root}` ({base['origin']}, revision `{base['revision'][:12]}`, {base['licence']}).",
        "",
        *trained,
        "",
        "| data | rows | origin | revision | licence |",
        "|---|---:|---|---|---|",
        *(
            f"| {row['name']} | {row['rows']} | {row['origin']} | `{row['revision'][:12]}` | {row['licence']} |"
            for row in sets
        ),
        "",
        "## Scores",
        "",
        "| task | pass@1 | 95 % interval | strict | questions \u00d7 samples | temperature | top-p | max. tokens |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
        *(
            f"| {task} | {percent(score['pass_at_1'])} | {percent(score['pass_at_1_low'])} to "
            f"{percent(score['pass_at_1_high'])} | {percent(score['strict_pass_at_1'])} | "
            f"{score['n_questions']} \u00d7 {score['n_samples']} | {score['temperature']} | {score['top_p']} | "
            f"{score['max_tokens']} |"
            for task in params.tasks
            for score in [scores[last, task]]
        ),
        "",
        "The intervals cover the choice of questions and samples, not another run of the training.",
        "",
        "## Use",
        "",
        "The prompt below is the first evaluation question, exactly as the model was asked.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'model = pipeline("text-generation", "data/models/{last}")',
        f"messages = {json.dumps(messages, indent=4, ensure_ascii=False)}",
        f"output = model(messages, max_new_tokens={settings.max_tokens}, {sampling})",
        'print(output[0]["generated_text"][-1]["content"])',
        "```",
    ]
    return "\n".join(lines) + "\n"


def render(**values: Any) -> str:
    """report.html.jinja filled in; every value is escaped, because completions may hold anything."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, points, bound, p_value, duration, memory, number)
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template("report.html.jinja").render(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path, required=True, help="folder of <model>/<task>.json and .parquet")
    parser.add_argument("--samples", type=Path, required=True, help="folder of <model>/<task>.parquet")
    parser.add_argument("--questions", type=Path, required=True, help="folder of prepared data sets")
    parser.add_argument("--logs", type=Path, required=True, help="folder of <entry>/<item>/stage.json")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json to write")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    params = load_params()

    phases = trained_phases(params)
    pairs = [(model, task) for task in params.tasks for model in params.generate.models]
    columns = ["id", "sample", "correct", "strict", "reason", "extracted", "gold"]
    scores = {pair: read_json(args.scores / pair[0] / f"{pair[1]}.json") for pair in pairs}
    verdicts = {
        (model, task): read_parquet(args.scores / model / f"{task}.parquet", columns).astype({"id": str})
        for model, task in pairs
    }
    histories = {phase: read_history(args.logs / kind_of(params, phase) / phase / "history.csv") for phase in phases}
    logged = stage_logs(params, phases, args.logs)
    gains = [gain(step, task, scores, verdicts) for task in params.tasks for step in steps(params)]
    sentences, earlier = verdicts_in_words(params, gains, scores)
    overlap = overlaps(params, phases, args.questions)
    commit, changed = git_state()

    write_plots(params, histories, scores, args.output / "plots")
    html = render(
        params=params,
        params_text=Path("params.yaml").read_text(),
        sentences=sentences,
        earlier=earlier,
        notes=notes(params, scores, verdicts, overlap),
        gains=gains,
        axis=forest_axis(gains),
        bars=bars(params, scores),
        curves=[
            (name, KINDS[kind], panels(kind, histories[name])) for name in phases for kind in [kind_of(params, name)]
        ],
        data=data_rows(params, phases, args.logs),
        models=model_rows(params, phases, args.logs),
        overlap=overlap,
        samples=pick_samples(params, args.questions, args.samples, verdicts),
        logged=logged,
        total_seconds=sum(log["seconds"] for log in logged),
        peak_memory=max(log["peak_memory_mib"] for log in logged),
        versions=versions(logged),
        machines=machines(logged),
        commit=commit,
        changed=changed,
    )
    (args.output / "report.html").write_text(html)
    code = f"{commit} with uncommitted changes" if changed else commit
    card = model_card(params, scores, sentences, args.logs, args.questions, code)
    (args.output / "model_card.md").write_text(card)
    args.metrics.write_text(json.dumps(headline(params, scores, gains, logged), indent=2) + "\n")
    print(f"report: {' '.join(sentences)} ({args.output / 'report.html'})", flush=True)


if __name__ == "__main__":
    stage.run(main)
