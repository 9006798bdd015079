"""What the intervals and tests of workflow/stats.py are worth, in simulations with a known truth, beside what a user
would use instead: lighteval's standard error, all samples as if independent, the unpaired test, a BCa bootstrap.

Every simulation is seeded; it prints tables and writes bench/results/statistics.json. (It is not called statistics.py
because scripts in this folder import the standard library's module of that name.)
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from lighteval.metrics.utils.stderr import mean_stderr
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar

from workflow.stats import Variances, mean_interval, paired_difference, questions_needed, smallest_gain

# How many times a benchmark of so many questions is drawn, per population.
REPEATS_MEAN = 2000
REPEATS_PAIRED = 400
REPEATS_POWER = 1000
QUESTIONS = (30, 500, 1319)
SAMPLES = (1, 4, 64)

# Populations of questions. The spread is the part of an answer's variance that lies between questions; at 0.5 and 0.8
# most questions are nearly always or nearly never solved. In LUMPS half of the questions are always or never solved.
LUMPS = "lumps"
MEANS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
SPREADS = (0.05, 0.2, 0.5, 0.8, LUMPS)

# How model a came from model b: on a share of the questions its chance is drawn anew, everywhere it solves a share of
# what it did not, a share of the questions it solves outright. The first four have no true difference.
CHANGES = {
    "same model": (0, 0, 0),
    "10 % redrawn": (0.1, 0, 0),
    "30 % redrawn": (0.3, 0, 0),
    "unrelated": (1, 0, 0),
    "gain everywhere": (0.1, 0.1, 0),
    "10 % solved": (0, 0, 0.1),
    "3 % solved": (0, 0, 0.03),
}
PAIR_MEANS = (0.05, 0.3, 0.5, 0.95)
PAIR_SPREADS = (0.05, 0.5, LUMPS)

# Mean accuracy, spread and share of redrawn questions of two models that one would compare.
SETTINGS = {
    "neighbouring checkpoints": (0.5, 0.5, 0.02),
    "neighbouring checkpoints, easy task": (0.9, 0.5, 0.02),
    "different models": (0.5, 0.5, 0.2),
}
GAINS = (0.01, 0.02, 0.05)
TASKS = {"gsm8k": (1319, 4), "math_500": (500, 4), "gpqa_diamond": (198, 8), "aime24": (30, 64)}


def chances(rng: np.random.Generator, mean: float, spread: float | str, size: tuple[int, ...]) -> np.ndarray:
    """Success chances of questions, a beta distribution or LUMPS."""
    if spread == LUMPS:
        lump, draw = rng.random(size) < 0.5, rng.random(size)
        return np.where(lump, draw < mean, chances(rng, mean, 0.2, size))
    both = 1 / spread - 1
    return rng.beta(mean * both, (1 - mean) * both, size)


def matrices(rng: np.random.Generator, chance: np.ndarray, samples: int) -> Iterator[np.ndarray]:
    """Score matrices of benchmarks (repeats, Q), one after the other; a question's right answers come first."""
    for correct in rng.binomial(samples, chance):
        yield (np.arange(samples) < correct[:, None]).astype(float)


def pairs(
    rng: np.random.Generator,
    mean: float,
    spread: float | str,
    change: tuple[float, float, float],
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, float]:
    """Success chances of models a and b on the same questions, and the true difference of their accuracies."""
    redrawn, everywhere, solved = change
    b = chances(rng, mean, spread, size)
    a = np.where(rng.random(size) < redrawn, chances(rng, mean, spread, size), b)
    a = np.where(rng.random(size) < solved, 1, a + everywhere * (1 - a))
    return a, b, (1 - mean) * (1 - (1 - everywhere) * (1 - solved))


def batches(repeats: int, questions: int) -> list[int]:
    """The repeats in parts whose questions fit in the cache of a processor."""
    part = max(1, 100_000 // questions)
    return [part] * (repeats // part) + [repeats % part] * (repeats % part > 0)


def mean_coverage(questions: int, samples: int) -> dict[str, float | str]:
    """How often three intervals hold the true accuracy: averaged over the populations, and at the worst of them."""
    covered: dict[str, dict[str, float]] = {"ours": {}, "lighteval": {}, "independent": {}}
    width = width_lighteval = 0.0
    for mean in MEANS:
        for spread in SPREADS:
            rng = np.random.default_rng([questions, samples, MEANS.index(mean), SPREADS.index(spread)])
            hits = dict.fromkeys(covered, 0)
            for part in batches(REPEATS_MEAN, questions):
                for scores in matrices(rng, chances(rng, mean, spread, (part, questions)), samples):
                    ours = mean_interval(scores)
                    half = 1.96 * ours.se
                    naive = 1.96 * np.sqrt(ours.mean * (1 - ours.mean) / scores.size)
                    hits["ours"] += ours.low <= mean <= ours.high
                    hits["lighteval"] += abs(ours.mean - mean) <= half
                    hits["independent"] += abs(ours.mean - mean) <= naive
                    width += ours.high - ours.low
                    width_lighteval += 2 * half
            for name, count in hits.items():
                covered[name][f"mean {mean}, spread {spread}"] = count / REPEATS_MEAN
    row: dict[str, float | str] = {"questions": questions, "samples": samples}
    for name, shares in covered.items():
        row[name] = round(float(np.mean(list(shares.values()))), 4)
        row[f"{name}_lowest"] = round(min(shares.values()), 4)
    row["ours_highest"] = round(max(covered["ours"].values()), 4)
    row["ours_lowest_at"] = min(covered["ours"], key=covered["ours"].get)
    row["ours_highest_at"] = max(covered["ours"], key=covered["ours"].get)
    row["width_over_lighteval"] = round(width / width_lighteval, 3)
    return row


def paired_coverage(questions: int, samples: int) -> list[dict[str, float | str | bool]]:
    """Per kind of change, averaged over the populations: how often the paired and the unpaired interval hold the true
    difference, and how often these and McNemar's exact test (one sample per question) find one, or find a gain."""
    rows = []
    for change, parts in CHANGES.items():
        counts: Counter[str] = Counter()
        for mean in PAIR_MEANS:
            for spread in PAIR_SPREADS:
                places = (list(CHANGES).index(change), PAIR_MEANS.index(mean), PAIR_SPREADS.index(spread))
                rng = np.random.default_rng([questions, samples, *places])
                for part in batches(REPEATS_PAIRED, questions):
                    chance_a, chance_b, true = pairs(rng, mean, spread, parts, (part, questions))
                    for a, b in zip(matrices(rng, chance_a, samples), matrices(rng, chance_b, samples), strict=True):
                        ours = paired_difference(a, b)
                        half = 1.96 * np.hypot(mean_interval(a).se, mean_interval(b).se)
                        # Where there is a gain, finding a loss does not count.
                        right_way = ours.mean > 0 or not true
                        counts["drawn"] += 1
                        counts["covers"] += ours.low <= true <= ours.high
                        counts["covers_unpaired"] += abs(ours.mean - true) <= half
                        counts["finds"] += ours.verdict != "not distinguishable" and right_way
                        counts["finds_unpaired"] += abs(ours.mean) > half and right_way
                        if samples == 1:
                            table = [[0, np.sum(a > b)], [np.sum(a < b), 0]]
                            counts["finds_mcnemar"] += mcnemar(table, exact=True).pvalue < 0.05 and right_way
        drawn = counts.pop("drawn")
        shares = {name: round(count / drawn, 4) for name, count in counts.items()}
        row = {"questions": questions, "samples": samples, "change": change, "gain": any(parts[1:])}
        rows.append(row | shares)
    return rows


def setting_variances(setting: str, gain: float) -> Variances:
    """The true variances of a paired difference where the gain is spread over what was not solved."""
    mean, spread, redrawn = SETTINGS[setting]
    between = spread * mean * (1 - mean)
    kept = 1 - gain / (1 - mean)
    questions = between * (kept**2 + 1 - 2 * kept * (1 - redrawn))
    samples = mean * (1 - mean) - between + (mean + gain) * (1 - mean - gain) - kept**2 * between
    return Variances(questions, samples)


def power_row(setting: str, gain: float, samples: int) -> dict[str, float | str]:
    """How many questions the plan asks for, and how often the gain is found with so many."""
    mean, spread, redrawn = SETTINGS[setting]
    questions = questions_needed(gain, samples, setting_variances(setting, gain))
    rng = np.random.default_rng([list(SETTINGS).index(setting), round(1000 * gain), samples])
    found = 0
    for part in batches(REPEATS_POWER, questions):
        change = (redrawn, gain / (1 - mean), 0)
        chance_a, chance_b, _ = pairs(rng, mean, spread, change, (part, questions))
        for a, b in zip(matrices(rng, chance_a, samples), matrices(rng, chance_b, samples), strict=True):
            found += paired_difference(a, b).verdict == "better"
    power = round(found / REPEATS_POWER, 3)
    return {"setting": setting, "gain": gain, "samples": samples, "questions": questions, "power": power}


def milliseconds(call: Callable[[], object]) -> float:
    """The fastest of several runs: what the call costs when nothing else disturbs it."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return round(min(times), 3)


def timings() -> dict[str, float]:
    """Milliseconds on 1319 questions x 64 samples."""
    rng = np.random.default_rng(0)
    chance_a, chance_b, _ = pairs(rng, 0.5, 0.5, CHANGES["gain everywhere"], (1, 1319))
    a, b = next(matrices(rng, chance_a, 64)), next(matrices(rng, chance_b, 64))
    if not np.isclose(mean_interval(a).se, mean_stderr(a.mean(axis=1))):
        sys.exit("lighteval's standard error is no longer that of mean_interval; the column that carries its name lies")

    def bca(values: np.ndarray) -> object:
        return bootstrap((values,), np.mean, method="BCa", rng=0)

    return {
        "mean_interval": milliseconds(lambda: mean_interval(a)),
        "mean_interval_lighteval": milliseconds(lambda: mean_stderr(a.mean(axis=1))),
        "mean_interval_bca": milliseconds(lambda: bca(a.mean(axis=1))),
        "paired_difference": milliseconds(lambda: paired_difference(a, b)),
        "paired_difference_bca": milliseconds(lambda: bca(a.mean(axis=1) - b.mean(axis=1))),
    }


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def paired_cells(rows: list[dict]) -> list[str]:
    """One line of the table of two models from the rows of all changes."""

    def average(name: str, kinds: list[dict]) -> str:
        return percent(np.mean([row[name] for row in kinds])) if name in kinds[0] else ""

    none, gains = ([row for row in rows if row["gain"] == gain] for gain in (False, True))
    lowest, highest = min(rows, key=lambda row: row["covers"]), max(row["finds"] for row in none)
    return [
        f"{rows[0]['questions']} x {rows[0]['samples']}",
        f"{average('covers', rows)} ({percent(lowest['covers'])}, {lowest['change']})",
        average("covers_unpaired", rows),
        f"{average('finds', none)} ({percent(highest)})",
        *(average(name, none) for name in ("finds_unpaired", "finds_mcnemar")),
        *(average(name, gains) for name in ("finds", "finds_unpaired", "finds_mcnemar")),
    ]


def main() -> None:
    start = time.monotonic()
    cells = [(questions, samples) for questions in QUESTIONS for samples in SAMPLES]
    means = [mean_coverage(*cell) for cell in cells]
    table(
        "How often a 95 % interval of one accuracy holds the truth, %: mean over "
        f"{len(MEANS)} accuracies x {len(SPREADS)} spreads (lowest and highest of them, each ± 1)",
        ["questions x samples", "mean_interval", "lighteval's stderr x 1.96", "all samples independent", "width"],
        [
            [
                f"{row['questions']} x {row['samples']}",
                f"{percent(row['ours'])} ({percent(row['ours_lowest'])} to {percent(row['ours_highest'])})",
                f"{percent(row['lighteval'])} ({percent(row['lighteval_lowest'])})",
                f"{percent(row['independent'])} ({percent(row['independent_lowest'])})",
                f"{row['width_over_lighteval']:.2f}",
            ]
            for row in means
        ],
    )
    print("\nwidth: of mean_interval, over lighteval's\n\nOutside 93 to 97:")
    for row in means:
        for end in ("lowest", "highest"):
            if not 0.93 <= row[f"ours_{end}"] <= 0.97:
                where = f"{row['questions']} x {row['samples']}, {row[f'ours_{end}_at']}"
                print(f"- {where}: {percent(row[f'ours_{end}'])} %, the {end}")
    compared = [paired_coverage(*cell) for cell in cells]
    table(
        "Two models, %: how often the 95 % interval holds the true difference (lowest kind of change), how often a "
        "difference is found where there is none (highest), and how often a gain is found",
        ["questions x samples", "covers", "unpaired", "false", "unpaired", "McNemar", "found", "unpaired", "McNemar"],
        [paired_cells(rows) for rows in compared],
    )
    plans = [power_row(setting, gain, samples) for setting in SETTINGS for gain in GAINS for samples in SAMPLES]
    spreads = {setting: setting_variances(setting, 0) for setting in SETTINGS}
    table(
        "Questions needed to find a gain with 80 % power at 5 % (power reached in a simulation, %)",
        ["two models", "gain, points", *(f"{samples} sample{'s' * (samples > 1)}" for samples in SAMPLES)],
        [
            [
                setting,
                f"{100 * gain:.0f}",
                *(
                    f"{row['questions']} ({100 * row['power']:.0f})"
                    for row in plans
                    if (row["setting"], row["gain"]) == (setting, gain)
                ),
            ]
            for setting in SETTINGS
            for gain in GAINS
        ],
    )
    for setting, one in spreads.items():
        points = 100 * np.sqrt(one.questions)
        print(
            f"\n{setting}: accuracy {SETTINGS[setting][0]}, the true difference varies by {points:.0f} points between"
        )
        print(f"questions (standard deviation), one sample of both within a question has variance {one.samples:.2f}")
    smallest = [
        {"task": task, "setting": setting, "gain": round(smallest_gain(*shape, spreads[setting]), 4)}
        for task, shape in TASKS.items()
        for setting in SETTINGS
    ]
    table(
        "Smallest gain that a task finds with 80 % power, points",
        ["questions x samples", *SETTINGS],
        [
            [
                f"{task}, {questions} x {samples}",
                *(f"{100 * row['gain']:.1f}" for row in smallest if row["task"] == task),
            ]
            for task, (questions, samples) in TASKS.items()
        ],
    )
    times = timings()
    table(
        "Milliseconds on 1319 questions x 64 samples",
        ["", "ours", "lighteval's stderr", "scipy.stats.bootstrap, BCa"],
        [
            ["mean_interval", *(f"{times[f'mean_interval{end}']:.2f}" for end in ("", "_lighteval", "_bca"))],
            ["paired_difference", f"{times['paired_difference']:.2f}", "", f"{times['paired_difference_bca']:.2f}"],
        ],
    )
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "scipy", "statsmodels", "lighteval")},
        "seconds": round(time.monotonic() - start),
        "mean_interval": means,
        "paired_difference": [row for rows in compared for row in rows],
        "questions_needed": plans,
        "smallest_gain": smallest,
        "milliseconds": times,
    }
    file = Path("bench/results/statistics.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
