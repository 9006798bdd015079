"""Tables, curves, samples and costs of one run: metrics.json, plots for DVC, report.html and a model card.

Everything is read from files that params.yaml names, so what an older recipe left in the same folders is ignored.
Equal inputs give equal files, except for the git commit.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import charts, prompts, stage
from workflow.charts import MINUS
from workflow.pages import (
    ENDS,
    NBSP,
    REASONS,
    bound,
    existing,
    p_value,
    percent,
    points,
    read_json,
    read_parquet,
    read_samples,
    render,
    with_interval,
)
from workflow.params import Params, load_params
from workflow.viewer import write_viewer

if TYPE_CHECKING:
    import pandas as pd

# Below this pass@1 a model solves so little that a difference says nothing about what it learned.
NEAR_ZERO = 0.02
# Above this share, cut-off samples are worth a warning beside the verdict.
MANY_TRUNCATED = 0.05

# How many questions these gains need, with so many samples each, is in the report.
PLANNED_GAINS = (0.01, 0.02, 0.05)
PLANNED_SAMPLES = (1, 4, 16, 64)

N_SAMPLES = 10
LONGEST_TEXT = 6000  # characters of a completion shown in full

# The columns of plots/<file>.csv that `plots` in dvc.yaml names; rewards have a file each. What is measured on held-out
# rows is logged at other steps than the training, so it has files of its own.
PLOTTED = {
    "sft": ["loss", "mean_token_accuracy"],
    "sft_eval": ["eval_loss", "eval_mean_token_accuracy"],
    "grpo": ["reward", "completions/mean_length", "completions/clipped_ratio", "entropy"],
    "grpo_eval": ["eval_reward"],
}


# Reading


def read_history(file: Path) -> "pd.DataFrame":
    """The trainer's log: one row per logged step, numbers only, sorted by step; a StageError where it is not one."""
    import pandas as pd

    history = pd.read_csv(existing(file))
    if "step" not in history:
        raise stage.StageError(f"{file} has no column step; delete it and run its training stage again")
    history = history.apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    return history.dropna(subset="step").sort_values("step", kind="stable").reset_index(drop=True)


def read_questions(file: Path) -> "pd.DataFrame":
    """The columns id and question of a prepared data set; the question is the last message of the user."""
    rows = read_parquet(file, ["id", "prompt"])
    asked = [[message["content"] for message in prompt if message["role"] == "user"][-1] for prompt in rows["prompt"]]
    return rows[["id"]].assign(question=asked)


def git_state() -> tuple[str, list[str]]:
    """The commit and the files of the pipeline that differ from it; ("not a git checkout", []) outside of one.

    Only what the run is made of counts: dvc.lock and metrics.json change with every run.
    """
    git = partial(subprocess.run, capture_output=True, text=True)
    if shutil.which("git") is None or (head := git(["git", "rev-parse", "--verify", "HEAD"])).returncode:
        return "not a git checkout", []
    inputs = ["workflow", "dvc.yaml", "params.yaml", "pyproject.toml"]
    status = git(["git", "status", "--porcelain", "--", *inputs], check=True).stdout
    return head.stdout.strip(), [line[3:] for line in status.splitlines()]


# Models and what changed between them


@dataclass(frozen=True)
class Step:
    """From one evaluated model to another that was trained from it."""

    before: str
    after: str
    how: str  # "GRPO", or "SFT + GRPO" where there is a model between


def ancestors(params: Params, model: str) -> list[str]:
    """The models a model was trained from, nearest first; a source has none."""
    found = []
    while model in params.phases:
        model = params.phases[model].start_from
        found.append(model)
    return found


def kind_of(params: Params, phase: str) -> str:
    """`sft` or `grpo`."""
    return "sft" if phase in params.sft else "grpo"


def kinds(params: Params, models: list[str]) -> dict[str, str]:
    """`SFT` or `GRPO` of those that are phases."""
    return {name: kind_of(params, name).upper() for name in models if name in params.phases}


def trained_phases(params: Params) -> list[str]:
    """The phases that an evaluated model went through, in the order of training.

    A phase that leads to no evaluated model may not have run when the report does.
    """
    chains = [[model, *ancestors(params, model)][::-1] for model in params.generate.models]
    return list(dict.fromkeys(name for chain in chains for name in chain if name in params.phases))


def step_between(params: Params, before: str, after: str) -> Step:
    """The step to a model from one of its ancestors, named by the kinds of all phases between them."""
    chain = [after, *ancestors(params, after)]
    return Step(before, after, " + ".join(kinds(params, chain[: chain.index(before)][::-1]).values()))


def steps(params: Params) -> list[Step]:
    """Each evaluated model against the nearest evaluated model it was trained from, in the order of the report;
    at the end the last model against the first of its line, where that is another step."""
    found, line = [], []
    for model in params.generate.models:
        line = [name for name in ancestors(params, model) if name in params.generate.models]
        found += [step_between(params, before, model) for before in line[:1]]
    return found + [step_between(params, before, params.generate.models[-1]) for before in line[1:][-1:]]


def paired_gain(step: Step, task: str, scores: dict, verdicts: dict) -> dict[str, Any]:
    """The paired difference in pass@1 of one step on one task, as a row of the report.

    Raises:
        StageError: the two models were asked different questions.
    """
    from workflow.stats import paired_difference

    models = (step.before, step.after)
    before, after = (correct(verdicts[model, task]) for model in models)
    asked = {scores[model, task]["questions_sha256"] for model in models}
    if len(asked) > 1 or list(before.index) != list(after.index):
        raise stage.StageError(
            f"{step.before} and {step.after} were asked different questions in {task}; "
            "run generate and score again for both"
        )
    paired = paired_difference(after.to_numpy(), before.to_numpy())
    change = after.mean(axis=1) - before.mean(axis=1)
    return {
        "task": task,
        **asdict(step),
        "pass_before": scores[step.before, task]["pass_at_1"],
        "pass_after": scores[step.after, task]["pass_at_1"],
        "difference": paired.mean,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "better": int((change > 0).sum()),
        "same": int((change == 0).sum()),
        "worse": int((change < 0).sum()),
        "verdict": paired.verdict,
    }


def correct(verdicts: "pd.DataFrame") -> "pd.DataFrame":
    """A row per question, a column per sample: 1.0 where the answer is right."""
    return verdicts.pivot(index="id", columns="sample", values="correct").astype(float)


def power(row: dict[str, Any], verdicts: dict) -> dict[str, Any]:
    """The gain that a comparison such as this row of `paired_gain` finds four times in five, and the questions that it
    takes to find others. There are two questions or more."""
    from workflow.stats import difference_variances, questions_needed, smallest_gain

    after, before = (correct(verdicts[row[model], row["task"]]).to_numpy() for model in ("after", "before"))
    variances = difference_variances(after, before)
    return {
        **row,
        "samples": after.shape[1],
        "smallest": smallest_gain(*after.shape, variances),
        "questions": {gain: [questions_needed(gain, n, variances) for n in PLANNED_SAMPLES] for gain in PLANNED_GAINS},
    }


def gain_of(gains: list[dict], task: str, model: str) -> dict[str, Any] | None:
    """What the step that made the model changed: the first row, in the order of `steps`; None where there is none."""
    return next((row for row in gains if (row["task"], row["after"]) == (task, model)), None)


# Verdicts


def accuracy_sentence(row: dict[str, Any]) -> str:
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


def verdict_sentence(task: str, model: str, scores: dict, gains: list[dict]) -> str:
    """What the step that made the model changed, or how good it is where nothing it was trained from is evaluated."""
    row, score = gain_of(gains, task, model), scores[model, task]
    if row:
        return accuracy_sentence(row)
    return (
        f"{model} reaches {percent(score['pass_at_1'])} pass@1 on {task} (95{NBSP}% interval "
        f"{percent(score['pass_at_1_low'])} to {percent(score['pass_at_1_high'])})."
    )


def format_sentences(params: Params, scores: dict, gains: list[dict]) -> list[str]:
    """A sentence for every step that raised the share in the taught format: the two intervals do not overlap."""
    found = []
    rows = [gain_of(gains, task, model) for task in params.tasks for model in params.generate.models]
    for row in filter(None, rows):
        before, after = (scores[row[model], row["task"]] for model in ("before", "after"))
        if after["format_rate_low"] > before["format_rate_high"]:
            change = f"from {percent(before['format_rate'])} to {percent(after['format_rate'])}"
            ends = [f"{bound(one['format_rate_low'])} to {bound(one['format_rate_high'])}" for one in (before, after)]
            evidence = f"(95{NBSP}% intervals {ends[0]} and {ends[1]})"
            found.append(
                f"{row['how']} raised the share of {row['task']} answers in the taught format {change} {evidence}."
            )
    return found


def notes(params: Params, scores: dict, verdicts: dict, overlap: list[dict], logged: list[dict]) -> list[str]:
    """What a reader must know before believing the verdict."""
    last = params.generate.models[-1]
    found = [f"{log['item']}, {warning}" for log in logged if log["stage"] == "grpo" for warning in log["warnings"]]
    found += [
        f"{row['seen']} of {row['asked']} {row['task']} questions occur word for word in {row['dataset']}, "
        f"which {row['phase']} was trained on."
        for row in overlap
        if row["seen"]
    ]
    for task, settings in params.tasks.items():
        share = scores[last, task]["truncated"]
        if share > MANY_TRUNCATED:
            found.append(
                f"{percent(share)} of the {task} samples of {last} were cut off at {settings.max_tokens} tokens."
            )
        counts = verdicts[last, task]["reason"].value_counts()
        found += [
            f"{counts[reason]} {task} samples of {last} could not be judged: {REASONS[reason]}."
            for reason in ("gold_unparsed", "timeout", "error")
            if reason in counts
        ]
    return found


def result_table(params: Params, task: str, scores: dict, gains: list[dict]) -> str:
    """One task as aligned text: a row per model, every share and gain with its 95 % interval."""
    last = scores[params.generate.models[-1], task]
    title = (
        f"{task}: {last['n_questions']} questions x {last['n_samples']} samples, temperature {last['temperature']}, "
        f"top-p {last['top_p']}, {last['dtype']}, at most {last['max_tokens']} tokens"
    )
    rows = [("model", "by", "pass@1 %", "format %", "gain, points", "tokens")]
    for model in params.generate.models:
        score, row = scores[model, task], gain_of(gains, task, model)
        shares = (with_interval(*(bound(score[name + end]) for end in ENDS)) for name in ("pass_at_1", "format_rate"))
        gain = with_interval(points(row["difference"]), bound(row["low"]), bound(row["high"])) if row else "-"
        rows.append((model, row["how"] if row else "-", *shares, gain, f"{score['mean_tokens']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map("{:{}{}}".format, row, "<<>>>>", widths)) for row in rows]
    return "\n".join([title, "", *lines])


# Data


def overlaps(params: Params, phases: list[str], questions: Path) -> list[dict[str, Any]]:
    """How many evaluation questions of each task occur word for word in the training set of each phase.

    The instructions behind them, which may differ, are left out.
    """
    instructions = [prepare.instruction for prepare in params.prepare.values() if prepare.instruction]

    def bare(name: str) -> "pd.Series":
        texts = read_questions(questions / f"{name}.parquet")["question"]
        for instruction in instructions:
            texts = texts.str.removesuffix(f"\n{instruction}")
        return texts

    datasets = {phase: params.phases[phase].dataset for phase in phases}
    trained = {name: set(bare(name)) for name in datasets.values()}
    rows = []
    for task, settings in params.tasks.items():
        asked = bare(task)[: settings.questions]
        for phase, name in datasets.items():
            seen = int(asked.isin(trained[name]).sum())
            rows.append({"task": task, "phase": phase, "dataset": name, "seen": seen, "asked": len(asked)})
    return rows


def data_rows(params: Params, phases: list[str], logs: Path) -> list[dict[str, Any]]:
    """One row per prepared data set: what it is for, where it comes from, rows in, kept, and dropped by reason."""
    rows = []
    for name, prepare in params.prepare.items():
        log = read_json(logs / "prepare" / name / "stage.json")
        mixture = {"origin": "mixture of " + ", ".join(prepare.mixture), "revision": "", "licence": ""}
        origin = mixture if prepare.mixture else read_json(logs / "download" / prepare.source / "stage.json")
        dropped = {reason: count for reason, count in sorted(log["dropped"].items()) if count}
        not_drawn = log["rows_in"] - sum(dropped.values()) - log["rows"]
        uses = [f"training {phase}" for phase in phases if params.phases[phase].dataset == name]
        uses += ["evaluation"] if name in params.tasks else []
        dropped |= {"not drawn": not_drawn} if not_drawn else {}
        rows.append({**origin, **log, "name": name, "use": ", ".join(uses) or "not used", "dropped": dropped})
    return rows


def model_rows(params: Params, phases: list[str], logs: Path) -> list[dict[str, Any]]:
    """One row per model: a source with its origin, or a phase with what it was trained from and on."""
    sources = [name for name, source in params.sources.items() if source.into == "models"]
    rows = [{**read_json(logs / "download" / name / "stage.json"), "name": name} for name in sources]
    for name, kind in kinds(params, phases).items():
        made = f"{kind} of {params.phases[name].start_from} on {params.phases[name].dataset}"
        rows.append({"name": name, "origin": made, "revision": "", "licence": ""})
    return rows


# Samples


def draw(verdicts: "pd.DataFrame", count: int, salt: str) -> "pd.DataFrame":
    """Verdicts on different questions, half right and half wrong where there are enough, the right ones first.

    The order is a hash of salt, id and sample: drawn at random, but the same in every report.
    """
    import pandas as pd

    keys = [f"{salt}:{id_}:{sample}" for id_, sample in zip(verdicts["id"], verdicts["sample"], strict=True)]
    rows = verdicts.assign(order=[hashlib.sha256(key.encode()).hexdigest() for key in keys])
    rows = rows.sort_values("order").drop_duplicates("id")
    right, wrong = rows[rows["correct"]], rows[~rows["correct"]]
    n_right = max(min(len(right), (count + 1) // 2), min(len(right), count - len(wrong)))
    return pd.concat([right[:n_right], wrong[: count - n_right]])


def pick_samples(params: Params, questions: Path, samples: Path, verdicts: dict) -> list[dict[str, Any]]:
    """Ten samples of the last model, shared out over the tasks.

    Raises:
        StageError: a sample was judged that is not among the stored ones.
    """
    last = params.generate.models[-1]
    picked = []
    for index, task in enumerate(params.tasks):
        count = N_SAMPLES // len(params.tasks) + (index < N_SAMPLES % len(params.tasks))
        file = samples / last / f"{task}.parquet"
        rows = draw(verdicts[last, task], count, f"{params.seed}:{task}")
        rows = rows.merge(read_samples(file, ["id", "sample", "completion"]), how="left", on=["id", "sample"])
        rows = rows.merge(read_questions(questions / f"{task}.parquet"), how="left", on="id")
        lost = rows[rows[["completion", "question"]].isna().any(axis=1)]
        if len(lost):
            where = f"sample {lost['sample'].iloc[0]} of {lost['id'].iloc[0]}"
            raise stage.StageError(f"{file} has no {where}; run score again for {last}")
        for row in rows.to_dict("records"):
            thoughts, answer = split_thoughts(row["completion"])
            texts = {"question": row["question"], "thoughts": thoughts, "answer": answer, "gold": row["gold"]}
            explained = REASONS.get(row["reason"], row["reason"])
            picked.append({**row, **{name: shorten(text) for name, text in texts.items()}, "reason": explained})
    return picked


def split_thoughts(completion: str) -> tuple[str, str]:
    """Thought and answer of a completion; no thought where it does not end."""
    taught = prompts.parse(completion)
    if taught:
        return taught.thought, taught.answer
    answer = prompts.answer_part(completion)
    return completion.removesuffix(answer).removesuffix(prompts.END_OF_THOUGHT).strip(), answer.strip()


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
    """The different machines and ways to use them, each with the stages that ran so."""
    found: dict[tuple, list[str]] = {}
    for log in logged:
        times = f"{NBSP}\u00d7{NBSP}"
        facts = {
            **log["machine"],
            "devices": f"{log['devices']}{times}{log.get('device_name', log['device'])}" if "devices" in log else "",
            "hardware": log.get("hardware", ""),
            "batch": f"{log['per_device_batch']}{times}{log['accumulation']}" if "per_device_batch" in log else "",
        }
        found.setdefault(tuple(facts.items()), []).append(log["stage"])
    return [{**dict(facts), "stages": list(dict.fromkeys(ran))} for facts, ran in found.items()]


# Writing


def summary_metrics(params: Params, scores: dict, gains: list[dict], logged: list[dict]) -> dict[str, float | str]:
    """metrics.json: flat, about ten values, the columns of `dvc exp show`.

    Shares are numbers, which can be sorted and compared by `dvc metrics diff`; intervals are text beside them, and so
    is the gain with its interval. What is claimed comes first, because a narrow terminal cuts the table off on the
    right. Models before the last one are in it only where there is one task.
    """
    last = params.generate.models[-1]
    metrics: dict[str, float | str] = {}
    for task in params.tasks:
        score, row = scores[last, task], gain_of(gains, task, last)
        metrics[f"{task}.{last}"] = round(score["pass_at_1"], 4)
        metrics[f"{task}.interval"] = f"{score['pass_at_1_low']:.4f} to {score['pass_at_1_high']:.4f}"
        if row:
            metrics[f"{task}.gain"] = f"{row['difference']:+.4f} [{row['low']:.4f}, {row['high']:.4f}]"
    if len(params.tasks) == 1:
        others = params.generate.models[-2::-1]
        metrics |= {f"{task}.{model}": round(scores[model, task]["pass_at_1"], 4) for model in others}
        metrics |= {f"{task}.{name}": round(score[name], 4) for name in ("truncated", "mean_tokens")}
    metrics["seconds"] = round(sum(log["seconds"] for log in logged), 1)
    metrics["peak_memory_mib"] = max(log["peak_memory_mib"] for log in logged)
    return metrics


def running_steps(histories: dict[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """The logs of one or more phases below each other, in a column `phase`; `step` runs on: a line never folds back."""
    import pandas as pd

    tables, offset = [], 0
    for phase, history in histories.items():
        tables.append(history.assign(phase=phase, step=history["step"].astype(int) + offset))
        offset = max(tables[-1]["step"], default=offset)
    return pd.concat(tables, ignore_index=True)


def write_plots(params: Params, histories: dict[str, "pd.DataFrame"], scores: dict, folder: Path) -> None:
    """The CSV files that `plots` in dvc.yaml names. A kind of phase that the recipe lacks, or that
    logged nothing, has no file, and DVC skips its plots.

    sft.csv, grpo.csv, …: phase, step and the columns in PLOTTED; rewards/<name>.csv: phase, step, value;
    accuracy.csv: label, task, model, pass_at_1, low, high.
    """
    import pandas as pd

    # Rewards of an older recipe must not be plotted again.
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for kind in ("sft", "grpo"):
        logged = {name: log for name, log in histories.items() if kind_of(params, name) == kind and len(log)}
        if not logged:
            continue
        table = running_steps(logged).dropna(axis=1, how="all")
        for file in (kind, f"{kind}_eval"):
            kept = [column for column in PLOTTED[file] if column in table]
            if kept:
                table[["phase", "step", *kept]].dropna().to_csv(folder / f"{file}.csv", index=False)
        rewards = {
            match[1]: match[0] for match in map(re.compile("rewards/(.+)/mean").fullmatch, table.columns) if match
        }
        for name, column in rewards.items():
            (folder / "rewards").mkdir(exist_ok=True)
            rows = table[["phase", "step"]].assign(value=table[column]).dropna()
            rows.to_csv(folder / "rewards" / f"{name}.csv", index=False)
    rows = [
        (f"{task} / {model}", task, model, *(scores[model, task][f"pass_at_1{end}"] for end in ENDS))
        for task in params.tasks
        for model in params.generate.models
    ]
    columns = ["label", "task", "model", "pass_at_1", "low", "high"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "accuracy.csv", index=False)


def hub_ids(origins: list[str]) -> list[str]:
    """The origins that are Hugging Face ids (owner/name), each once."""
    return list(dict.fromkeys(origin for origin in origins if re.fullmatch(r"[\w.-]+/[\w.-]+", origin)))


def card_values(params: Params, logs: Path, questions: Path) -> dict[str, Any]:
    """What the model card of the last model says beside what the page does."""
    last = params.generate.models[-1]
    root, *phases = [last, *ancestors(params, last)][::-1]
    base = read_json(logs / "download" / root / "stage.json")
    sets = [row for row in data_rows(params, phases, logs) if row["use"].startswith("training")]
    task, sampling = next(iter(params.tasks.items()))
    prompt = read_parquet(questions / f"{task}.parquet", ["prompt"])["prompt"].iloc[0]
    return {
        "last": last,
        "root": root,
        "base": base,
        "base_models": hub_ids([base["origin"]]),
        "sets": sets,
        "datasets": hub_ids([row["origin"] for row in sets]),
        "kinds": kinds(params, phases),
        "tags": ["reasoning", *dict.fromkeys(kind_of(params, name) for name in phases), "open-r1-pipeline"],
        "messages": [{"role": message["role"], "content": message["content"]} for message in prompt],
        "sampling": sampling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path, required=True, help="folder of <model>/<task>.json and .parquet")
    parser.add_argument("--samples", type=Path, required=True, help="folder of <model>/<task>.parquet")
    parser.add_argument("--questions", type=Path, required=True, help="folder of prepared data sets")
    parser.add_argument("--logs", type=Path, required=True, help="folder of <entry>/<item>/stage.json")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json to write")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    stage.stoppable("report")
    stage.alone(args.output)
    params = load_params()

    last, phases = params.generate.models[-1], trained_phases(params)
    pairs = [(model, task) for task in params.tasks for model in params.generate.models]
    scores = {(model, task): read_json(args.scores / model / f"{task}.json") for model, task in pairs}
    verdicts = {(model, task): read_parquet(args.scores / model / f"{task}.parquet") for model, task in pairs}
    histories = {phase: read_history(args.logs / kind_of(params, phase) / phase / "history.csv") for phase in phases}
    logged = stage_logs(params, phases, args.logs)
    gains = [paired_gain(step, task, scores, verdicts) for task in params.tasks for step in steps(params)]
    claims = [row for task in params.tasks if (row := gain_of(gains, task, last))]
    sentences = [verdict_sentence(task, last, scores, gains) for task in params.tasks]
    taught = format_sentences(params, scores, gains)
    metrics = summary_metrics(params, scores, gains, logged)
    overlap = overlaps(params, phases, args.questions)
    commit, changed = git_state()

    write_plots(params, histories, scores, args.output / "plots")
    write_viewer(params, args.questions, args.samples, args.scores, args.output)
    values = {
        "params": params,
        "params_text": Path("params.yaml").read_text(),
        "sentences": sentences,
        "more": taught + [accuracy_sentence(row) for row in gains if row["after"] != last],
        "notes": notes(params, scores, verdicts, overlap, logged),
        "scores": scores,
        "metrics": metrics,
        "gains": gains,
        "axis": charts.forest_axis(gains),
        "planned": [power(row, verdicts) for row in claims if scores[last, row["task"]]["n_questions"] > 1],
        "planned_samples": PLANNED_SAMPLES,
        "bars": charts.bars(params, scores),
        "kinds": kinds(params, phases),
        "curves": {phase: charts.panels(kind_of(params, phase), history) for phase, history in histories.items()},
        "data": data_rows(params, phases, args.logs),
        "models": model_rows(params, phases, args.logs),
        "overlap": overlap,
        "samples": pick_samples(params, args.questions, args.samples, verdicts),
        "logged": logged,
        "versions": versions(logged),
        "machines": machines(logged),
        "commit": commit,
        "changed": changed,
    }
    page = args.output / "report.html"
    page.write_text(render("report.html.jinja", values))
    card = values | card_values(params, args.logs, args.questions)
    card["curves"] = {phase: values["curves"][phase] for phase in card["kinds"]}
    (args.output / "model_card.md").write_text(render("model_card.md.jinja", card))
    (args.output / "curves.svg").write_text(render("curves.svg.jinja", card))
    args.metrics.write_text(json.dumps(metrics, indent=2) + "\n")

    tables = "\n\n".join(result_table(params, task, scores, gains) for task in params.tasks)
    legend = "In brackets: 95 % intervals. Gains are over the model it was trained from, paired by question."
    text = "\n".join(["", tables, "", legend, "", *sentences, *taught, f"report: {page}"])
    text = text.replace(NBSP, " ").replace(MINUS, "-")
    (args.output / "report.txt").write_text(text + "\n")
    stage.check_cache([args.output, args.metrics])
    print(text, flush=True)


if __name__ == "__main__":
    stage.run(main)
