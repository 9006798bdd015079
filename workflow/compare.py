"""Whether experiments differ, question by question: `python -m workflow.compare main b`.

A command for people: no stage calls it. Any experiment, branch, tag or commit can be named, and `workspace`; behind a
colon the model, where it is not the last of generate.models: `compare main:cold_start main:reasoning`. Parameters,
scores and verdicts are read from Git and from DVC's cache, or its remote, as they were then; nothing is checked out.
Every one is compared with the first.
"""

import argparse
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import charts, stage
from workflow.charts import MINUS
from workflow.pages import ENDS, NBSP, bound, p_value, percent, points, render, with_interval
from workflow.sources import some
from workflow.stage import StageError

if TYPE_CHECKING:
    import pandas as pd
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

SCORES = "/data/scores"  # where the stage score writes, from the root of the repository
VERDICTS = ["id", "sample", "correct", "gold"]  # the columns that are read

# What a score was measured with. settings_sha256 stands for all of it and is named only where nothing else differs.
SETTINGS = ("answer", "temperature", "top_p", "max_tokens", "n_samples", "dtype")
SETTINGS_OF = ("version_", "generation_")

LEVEL = 0.05  # of the tests: intervals are 95 %
N_MOVED = 10
N_PARAMETERS = 40
LONGEST_VALUE = 48  # characters of a parameter, setting or gold answer
LONGEST_LABEL = 36  # characters beside a chart

NOT_DISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True)
class Side:
    """One model at one revision."""

    label: str  # as it was asked for
    commit: str  # 40 hex digits, or "workspace"
    model: str
    params: dict[str, Any]
    outdated: list[str]  # parameters that changed since the stored results were made
    scores: dict[str, dict[str, Any]]  # by task
    verdicts: dict[str, "pd.DataFrame"]  # by task: VERDICTS, one row per sample


# Reading


def open_repository() -> "Repo":
    """The repository of the current folder."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        return Repo()
    except (NotDvcRepoError, SCMError):
        raise StageError(f"{Path.cwd()} is not in a repository of Git and DVC; run this in a clone") from None


def resolve(repo: "Repo", revision: str) -> str:
    """The commit of an experiment, branch, tag or commit; "workspace" stays what it is.

    Raises:
        StageError: there is none of this name, or several experiments have it.
    """
    from dvc.repo.experiments.utils import exp_refs
    from dvc.scm import RevError, resolve_rev

    if revision == "workspace":
        return revision
    try:
        return resolve_rev(repo.scm, revision)
    except RevError:
        experiments = [ref.name for ref in exp_refs(repo.scm)]
        if revision in experiments:
            raise StageError(f"several experiments are called {revision!r}; write the commit of one") from None
        names = {
            "experiments": sorted(set(experiments)),
            "branches": sorted(repo.scm.list_branches()),
            "tags": sorted(repo.scm.list_tags()),
        }
        known = "; ".join(f"{kind}: {some(found)}" for kind, found in names.items() if found)
        raise StageError(f"there is no revision {revision!r}; write workspace, a commit, or one of {known}") from None


def read_side(repo: "Repo", asked: str) -> Side:
    """The parameters of one revision, and what is stored of one model's scores.

    Args:
        asked: REVISION or REVISION:MODEL; without a model the last of generate.models.

    Raises:
        StageError: no such revision or model, or its scores are nowhere.
    """
    from dvc.api import DVCFileSystem
    from dvc.utils.serialize import ParseError, parse_yaml

    revision, _, model = asked.partition(":")
    commit = resolve(repo, revision)
    # With today's configuration: the remote and the cache may have been set up after the revision was made.
    fs = DVCFileSystem(repo.root_dir, rev=None if commit == "workspace" else commit, config=dict(repo.config))
    try:
        params = parse_yaml(fs.read_text("/params.yaml"), "params.yaml")
        models, tasks = params["generate"]["models"], params["tasks"]
    except (FileNotFoundError, ParseError, KeyError, TypeError):
        raise StageError(f"{revision} has no params.yaml with generate.models and tasks; name another one") from None
    model = model or models[-1]
    if model not in models:
        raise StageError(f"{revision} has no scores of {model!r}; write one of its models: {', '.join(models)}")
    files = [f"{SCORES}/{model}/{task}{suffix}" for task in tasks for suffix in (".json", ".parquet")]
    contents = {file: stored(fs, file, revision) for file in files}
    return Side(
        label=asked,
        commit=commit,
        model=model,
        params=params,
        outdated=outdated(fs.repo) + not_by_pipeline(fs, contents),
        scores={task: json.loads(contents[f"{SCORES}/{model}/{task}.json"]) for task in tasks},
        verdicts={task: read_verdicts(contents[f"{SCORES}/{model}/{task}.parquet"], task, revision) for task in tasks},
    )


def stored(fs: "DVCFileSystem", file: str, revision: str) -> bytes:
    """A file as it was at a revision; a StageError where it is neither in the cache nor in the default remote."""
    name = file.removeprefix("/")
    again = "run dvc repro"
    if revision != "workspace":
        again += f" there (git checkout {revision}, or dvc exp apply for an experiment) and commit dvc.lock"
    try:
        return fs.read_bytes(file)
    except FileNotFoundError:
        if not fs.exists(file):
            raise StageError(f"{revision} has no results: {name} is no output of its dvc.yaml; {again}") from None
        if "md5" not in fs.info(file):
            raise StageError(f"{revision} has no results: {name} is not in its dvc.lock; {again}") from None
        raise StageError(
            f"{name} of {revision} is neither in the cache nor in the default remote; run dvc fetch --all-commits -r "
            f"NAME where another remote has it, or make it again: {again}"
        ) from None
    except ImportError as error:  # how DVC says that a kind of remote needs another package
        raise StageError(f"the remote of this repository cannot be read: {error}") from None


def read_verdicts(content: bytes, task: str, revision: str) -> "pd.DataFrame":
    """The columns VERDICTS of a verdict file, every question with all its samples."""
    import pandas as pd
    import pyarrow.parquet as pq

    file = io.BytesIO(content)
    missing = [column for column in VERDICTS if column not in pq.read_schema(file).names]
    if missing:
        raise StageError(
            f"the verdicts on {task} of {revision} have no column {missing[0]}; score it again with dvc repro"
        )
    rows = pd.read_parquet(file, columns=VERDICTS)
    if rows.duplicated(["id", "sample"]).any() or rows["id"].value_counts().nunique() != 1:
        raise StageError(
            f"the verdicts on {task} of {revision} are not one for every sample of every question; score it again with "
            "dvc repro"
        )
    return rows


def outdated(repo: "Repo") -> list[str]:
    """Parameters and outputs that are not those which the stored results were made with, by dvc.lock."""
    from dvc.dependency import ParamsDependency

    stages = repo.index.stages
    made = {out.fs_path: out.hash_info for item in stages for out in item.outs}
    found: set[str] = set()
    for dependency in (each for item in stages for each in item.deps):
        if isinstance(dependency, ParamsDependency):
            for changed in dependency.status().values():
                found |= set(changed) if isinstance(changed, dict) else set()  # else the stage never ran
        elif dependency.fs_path in made and dependency.hash_info != made[dependency.fs_path]:
            found.add(dependency.def_path)
    # A section is named by the keys in it, where they are known.
    return sorted(key for key in found if not any(other.startswith(f"{key}.") for other in found))


def not_by_pipeline(fs: "DVCFileSystem", contents: dict[str, bytes]) -> list[str]:
    """Files of the workspace that are not those in dvc.lock; at a commit they are found by their hash."""
    hashes = {file: hashlib.md5(content, usedforsecurity=False).hexdigest() for file, content in contents.items()}
    return [file[1:] for file, found in hashes.items() if fs.info(file)["dvc_info"].get("md5") != found]


# Comparing


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, as `dvc params diff` names them."""
    found = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def parameters(sides: list[Side]) -> list[dict[str, Any]]:
    """The keys of params.yaml that differ, with the value of each side as text."""
    each = [flat(side.params) for side in sides]
    keys = dict.fromkeys(key for values in each for key in values)
    differing = [key for key in keys if any(values.get(key) != each[0].get(key) for values in each)]
    return [{"key": key, "values": [brief(values.get(key, "-")) for values in each]} for key in differing]


def settings(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two scores were measured with, where it differs, e.g. `temperature 1.0 and 0.6`."""
    names = [name for name in {**first, **other} if name in SETTINGS or name.startswith(SETTINGS_OF)]
    found = [name for name in names if first.get(name) != other.get(name)]
    if not found and first.get("settings_sha256") != other.get("settings_sha256"):
        found = ["settings_sha256"]
    return [f"{name} {brief(first.get(name, 'unknown'))} and {brief(other.get(name, 'unknown'))}" for name in found]


def brief(value: Any) -> str:
    """A value on one line; of a hash the first digits."""
    text = " ".join(str(value).split())
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:8]
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}\u2026"


def matched(task: str, first: Side, other: Side) -> tuple[list[str], list[str]]:
    """The ids of the questions that both were asked, in the order of the first, and what a reader has to know of them.

    An id is the number of a row in a data set, so two data sets of one name share their ids. Where the gold answer
    differs, too, it is another question; where most do, so are the others.
    """
    a, b = (side.verdicts[task].drop_duplicates("id").set_index("id")["gold"] for side in (first, other))
    shared = [key for key in a.index if key in b.index]
    same = [key for key in shared if a[key] == b[key]]
    both = f"{first.label} and {other.label}"
    if not shared:
        return [], [f"{both} are not compared on {task}: they were asked different questions, no id occurs in both."]
    if len(same) < len(shared) / 2:
        key = next(key for key in shared if a[key] != b[key])
        answers = f"{brief(a[key])} of {first.label} and {brief(b[key])} of {other.label}"
        return [], [
            f"{both} are not compared on {task}: they were asked different questions under the same ids, the gold "
            f"answer of {key} is {answers}."
        ]
    if len(same) < max(len(a), len(b)):
        left_out = f"{len(a) - len(same)} of {first.label} and {len(b) - len(same)} of {other.label}"
        return same, [f"{both} are compared on the {len(same)} questions of {task} in both; left out are {left_out}."]
    if first.scores[task]["questions_sha256"] != other.scores[task]["questions_sha256"]:
        return same, [f"{both} were asked the questions of {task} in different words: questions_sha256 differs."]
    return same, []


def pair(task: str, first: Side, other: Side, ids: list[str]) -> dict[str, Any]:
    """One side against the first on the named questions of a task, paired by question."""
    from workflow.stats import paired_difference

    before, after = (
        side.verdicts[task].pivot(index="id", columns="sample", values="correct").loc[ids].astype(float)
        for side in (first, other)
    )
    paired = paired_difference(after.to_numpy(), before.to_numpy())
    golds = first.verdicts[task].drop_duplicates("id").set_index("id")["gold"]
    change = (after.mean(axis=1) - before.mean(axis=1)).round(9)  # so that 1/3 of 3 and 2/3 of 6 samples are the same
    furthest = change[change != 0].sort_values(key=abs, ascending=False, kind="stable")[:N_MOVED]
    moved = [
        {"id": key, "gold": brief(golds[key]), "first": solved(before.loc[key]), "other": solved(after.loc[key])}
        for key in furthest.index
    ]
    return {
        "task": task,
        "first": first.label,
        "other": other.label,
        "questions": len(ids),
        "pass_first": float(before.to_numpy().mean()),
        "pass_other": float(after.to_numpy().mean()),
        "difference": paired.mean,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "verdict": paired.verdict,
        "won": int((change > 0).sum()),
        "lost": int((change < 0).sum()),
        "same": int((change == 0).sum()),
        "identical": before.equals(after),
        "moved": moved,
    }


def solved(samples: "pd.Series") -> str:
    """How many of a question's samples are right, e.g. 3/4."""
    return f"{samples.sum():.0f}/{len(samples)}"


def judged(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All comparisons, of all tasks, with their final verdict and a sentence.

    Of several, some differ by chance. So their p are Holm's (1979), and what does not pass is not distinguishable.
    """
    from workflow.stats import holm

    adjusted = [float(p) for p in holm([row["p"] for row in pairs])] if len(pairs) > 1 else [None] * len(pairs)
    rows = []
    for row, p in zip(pairs, adjusted, strict=True):
        chance = p is not None and p >= LEVEL
        verdict = NOT_DISTINGUISHABLE if chance else row["verdict"]
        final = {**row, "holm": p, "verdict": verdict, "by_chance": verdict != row["verdict"]}
        rows.append({**final, "sentence": sentence(final, len(pairs))})
    return rows


def sentence(row: dict[str, Any], comparisons: int) -> str:
    """What a comparison says, as a person would."""
    first, other, task = row["first"], row["other"], row["task"]
    if row["identical"]:
        return f"{other} and {first} are not distinguishable on {task}: the verdicts are the same on every sample."
    p = (
        p_value(row["p"])
        if row["holm"] is None
        else f"{p_value(row['holm'])}, Holm-corrected for {comparisons} comparisons"
    )
    evidence = (
        f"({points(row['difference'])} points, 95{NBSP}% interval {bound(row['low'])} to {bound(row['high'])}, {p})"
    )
    counts = f"{row['won']} of the {row['questions']} questions and loses {row['lost']}."
    if row["verdict"] == NOT_DISTINGUISHABLE:
        shares = f"{percent(row['pass_other'])} and {percent(row['pass_first'])}"
        text = f"{other} and {first} are not distinguishable on {task}: pass@1 is {shares} {evidence}."
        alone = " By itself the difference would count; among several it may be chance." if row["by_chance"] else ""
        return f"{text} {other} wins {counts}{alone}"
    shares = f"{percent(row['pass_other'])} instead of {percent(row['pass_first'])}"
    return f"{other} is {row['verdict']} than {first} on {task}: pass@1 is {shares} {evidence}. It wins {counts}"


def compare_task(task: str, sides: list[Side]) -> dict[str, Any]:
    """Everything about one task: a row per side, the comparisons with the first that has it, what to know of them."""
    having = [side for side in sides if task in side.scores]
    those = " and ".join(side.label for side in having)
    notes, pairs = [], []
    for other in having[1:]:
        ids, found = matched(task, having[0], other)
        notes += found
        if not ids:
            continue
        pairs.append(pair(task, having[0], other, ids))
        differing = "; ".join(settings(having[0].scores[task], other.scores[task]))
        if differing:
            both = f"{having[0].label} and {other.label}"
            notes.append(f"{both} have different settings on {task}, which may be the difference: {differing}.")
    return {
        "task": task,
        "only": f"{task} is in {those} only." if len(having) < len(sides) else "",
        "rows": [{"label": side.label, **side.scores[task]} for side in having],
        "pairs": pairs,
        "notes": notes,
    }


def compare(sides: list[Side]) -> dict[str, Any]:
    """What the text and the page show.

    Raises:
        StageError: one side is named twice, or nothing can be compared.
    """
    for index, side in enumerate(sides):
        for earlier in sides[:index]:
            if (side.commit, side.model) == (earlier.commit, earlier.model):
                raise StageError(
                    f"{earlier.label} and {side.label} are the same commit and model; name two that differ, or another "
                    f"model behind a colon, e.g. {side.label.split(':')[0]}:{side.params['generate']['models'][0]}"
                )
    tasks = [compare_task(task, sides) for task in dict.fromkeys(task for side in sides for task in side.scores)]
    if not any(task["pairs"] for task in tasks):
        raise StageError(" ".join(text for task in tasks for text in (task["only"], *task["notes"]) if text))
    final = iter(judged([row for task in tasks for row in task["pairs"]]))
    tasks = [{**task, "pairs": [next(final) for _ in task["pairs"]]} for task in tasks]
    notes = [
        f"the results of {side.label} are not those of its params.yaml and dvc.lock, what differs is "
        f"{some(side.outdated)}; run dvc repro there."
        for side in sides
        if side.outdated
    ]
    return {"sides": sides, "parameters": parameters(sides), "tasks": tasks, "notes": notes}


# Text


def table(rows: list[tuple[str, ...]], alignment: str) -> str:
    """Rows in aligned columns; alignment has `<` or `>` for each."""
    rows = [tuple(plain(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map("{:{}{}}".format, row, alignment, widths)).rstrip() for row in rows)


def plain(text: str) -> str:
    """Text for a terminal."""
    return text.replace(NBSP, " ").replace(MINUS, "-")


def accuracy_table(task: dict[str, Any]) -> str:
    """A row per side: how much was asked, and the scores."""
    rows = [(task["task"], "questions", "samples", "pass@1 %", "strict %", "truncated %", "tokens")]
    for row in task["rows"]:
        shares = (
            with_interval(*(bound(row[name + end]) for end in ENDS)) for name in ("pass_at_1", "strict_pass_at_1")
        )
        counts = (f"{row['n_questions']}", f"{row['n_samples']}")
        rows.append((row["label"], *counts, *shares, bound(row["truncated"]), f"{row['mean_tokens']:.1f}"))
    return table(rows, "<>>>>>>")


def difference_table(pairs: list[dict[str, Any]]) -> str:
    """A row per comparison with the first."""
    rows = [(f"against {pairs[0]['first']}", "points", "p", "won", "lost", "same", "verdict")]
    for row in pairs:
        points_ = with_interval(points(row["difference"]), bound(row["low"]), bound(row["high"]))
        p = p_value(row["p"] if row["holm"] is None else row["holm"]).removeprefix(f"p{NBSP}").removeprefix(f"={NBSP}")
        counts = (f"{row[name]}" for name in ("won", "lost", "same"))
        rows.append((row["other"], points_, p, *counts, row["verdict"]))
    return table(rows, "<>>>>><")


def moved_table(row: dict[str, Any]) -> str:
    """The questions that moved most, with how many of their samples are right on both sides."""
    head = ("moved most", "gold", row["first"], row["other"])
    return table([head, *((one["id"], one["gold"], one["first"], one["other"]) for one in row["moved"])], "<>>>")


def as_text(result: dict[str, Any]) -> str:
    """The comparison as one prints it."""
    sides = result["sides"]
    head = [("", "commit", "recipe", "model")]
    head += [(side.label, short(side.commit), str(side.params.get("recipe", "-")), side.model) for side in sides]
    parts = [table(head, "<<<<")]
    if result["parameters"]:
        rows = [("params.yaml", *(side.label for side in sides))]
        rows += [(row["key"], *row["values"]) for row in result["parameters"][:N_PARAMETERS]]
        parts.append(table(rows, "<" * len(rows[0])))
        more = len(result["parameters"]) - N_PARAMETERS
        if more > 0:
            parts.append(f"and {more} more keys of params.yaml, see: dvc params diff")
    else:
        parts.append("params.yaml is the same.")
    parts += [f"warning: {note}" for note in result["notes"]]
    for task in result["tasks"]:
        parts += [task["only"]] if task["only"] else []
        if len(task["rows"]) == 1:
            continue
        parts.append(accuracy_table(task))
        parts += [difference_table(task["pairs"])] if task["pairs"] else []
        parts += [f"warning: {note}" for note in task["notes"]]
        parts += [row["sentence"] for row in task["pairs"]]
        parts += [moved_table(row) for row in task["pairs"] if row["moved"]]
    parts.append(
        "In brackets: 95 % intervals. Questions are won, lost or the same by how many of their samples are right.\n"
        "The intervals cover the choice of questions and samples, not another run of the training: a run has one seed."
    )
    return plain("\n\n".join(parts))


def short(commit: str) -> str:
    """A commit as Git abbreviates it."""
    return commit if commit == "workspace" else commit[:7]


# The page


def dots(rows: list[dict[str, Any]], axis: list[float], signed: bool) -> dict[str, Any]:
    """Geometry of a chart with a dot and an interval per row, in units of an SVG.

    Args:
        rows: label, mean, low, high (shares) and verdict.
        axis: ticks as shares; the first and the last are the ends.
        signed: differences, in points.
    """
    labels = [brief_label(row["label"]) for row in rows]
    left, width, pitch = 14 + 6.8 * max(map(len, labels)), 720, 28

    def across(share: float) -> float:
        return round(left + (share - axis[0]) / (axis[-1] - axis[0]) * (width - 20 - left), 1)

    return {
        "width": width,
        "height": pitch * len(rows) + 30,
        "bottom": pitch * len(rows) + 6,
        "left": left,
        "zero": across(0) if signed else None,
        "ticks": [
            (across(tick), f"{'+' if signed and tick > 0 else ''}{charts.axis_label(100 * tick)}") for tick in axis
        ],
        "rows": [
            {
                **row,
                "label": label,
                "y": pitch * index + 18,
                "x": across(row["mean"]),
                "x_low": across(row["low"]),
                "x_high": across(row["high"]),
            }
            for index, (row, label) in enumerate(zip(rows, labels, strict=True))
        ],
    }


def brief_label(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}\u2026"


def task_charts(task: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of one task, and the differences from the first."""
    shares = [
        {"label": row["label"], "mean": row["pass_at_1"], "low": row["pass_at_1_low"], "high": row["pass_at_1_high"]}
        for row in task["rows"]
    ]
    gains = [{**row, "label": row["other"], "mean": row["difference"]} for row in task["pairs"]]
    ends = [(min(row["low"] for row in rows), max(row["high"] for row in rows)) for rows in (shares, gains) if rows]
    return {
        "accuracy": dots(shares, charts.ticks(*ends[0]), signed=False),
        "gain": dots(gains, charts.ticks(min(0, ends[1][0]), max(0, ends[1][1])), signed=True) if gains else None,
    }


def as_page(result: dict[str, Any]) -> str:
    """The comparison as one HTML file that needs no network."""
    tasks = [{**task, **task_charts(task)} for task in result["tasks"] if len(task["rows"]) > 1]
    only = [task["only"] for task in result["tasks"] if task["only"]]
    return render(
        "compare.html.jinja",
        {**result, "tasks": tasks, "only": only, "commits": [short(s.commit) for s in result["sides"]]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.compare", description=__doc__)
    what = "experiment, branch, tag, commit or workspace, with :MODEL where it is not the last of generate.models"
    parser.add_argument("first", help=f"{what}; what the others are compared with")
    parser.add_argument("others", nargs="+", metavar="other", help="the same")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts, too")
    args = parser.parse_args()
    repo = open_repository()
    result = compare([read_side(repo, asked) for asked in (args.first, *args.others)])
    print(as_text(result))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(as_page(result))
        print(f"\npage: {args.html}")


if __name__ == "__main__":
    stage.run(main)
