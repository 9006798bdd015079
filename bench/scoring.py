"""The score stage beside lighteval's own metric in a loop, on 500 x 64 samples of MATH-500, in one run.

Run it with DATA_DIR=/folder, which holds math_500/test.jsonl; it prints a table and writes bench/results/scoring.json.
The samples are made up around the real questions, solutions and gold answers.
"""

import contextlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

N_SAMPLES = 64
SEED = 0
REPEATS = 2
KINDS = ("lighteval", "judge", "stage")
SETTINGS = {"n_samples": N_SAMPLES, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, "dtype": "bfloat16"}

THOUGHTS = [
    "Okay, so I need to figure this out step by step.",
    "Wait, let me check that again.",
    "Hmm, maybe there is another way to see it.",
    "Let me write down what is given first.",
    "So the answer should be smaller than that, right?",
    "Alternatively, I could set up an equation such as $x^2 - 5x + 6 = 0$ and solve it.",
    "No, that is not what the question asks for.",
    "Let me verify with a small case: if $n = 2$, then $2^n - 1 = 3$.",
    "That seems right, but I should double-check the arithmetic.",
    "Putting it together, \\[ a + b = c \\] and therefore $c - b = a$.",
]
# How a model ends its answer, with the share of the samples that end so; {a} is the answer, {o} another one.
ENDINGS = {
    "boxed, display": (r"Thus:" + "\n\n\\[\n\\boxed{{{a}}}\n\\]", 25),
    "boxed, final answer": ("**Final Answer**\n\\boxed{{{a}}}", 20),
    "boxed, inline": (r"The final answer is $\boxed{{{a}}}$.", 14),
    "boxed, parentheses": (r"So we have \(\boxed{{{a}}}\).", 6),
    "boxed, dollars": (r"$$\boxed{{{a}}}$$", 4),
    "taught format, boxed": ("<answer>\n\\boxed{{{a}}}\n</answer>", 8),
    "taught format, LaTeX": ("<answer>\n${a}$\n</answer>", 4),
    "minerva": ("The final answer is ${a}$. I hope it is correct.", 1),
    "answer is": ("Therefore, the answer is ${a}$.", 2),
    "boxed, then text": (r"This gives $\boxed{{{a}}}$, because the other case, \text{{if any}}, was ruled out.", 2),
    "two boxes": (r"Either $\boxed{{{o}}}$ or, after checking, $\boxed{{{a}}}$.", 1),
    "unclosed box": (r"So it is \boxed{{{a}", 1),
    "plain": ("Therefore the answer is {a}.", 2),
    "no anchor": ("Hence we get ${a}$.", 1),
    "no answer": ("I could not find it.", 1),
}
TRUNCATED = 0.04  # share of samples cut off in the thought


def spellings(gold: str) -> list[str]:
    """Other ways to write a right answer, and some that come close."""
    found = [gold.replace("\\frac", "\\dfrac"), gold.replace("\\dfrac", "\\frac"), gold.replace(" ", "")]
    found += [gold.replace("\\left", "").replace("\\right", ""), gold.replace(",", ", "), f"x = {gold}"]
    found.append(f"{gold} \\text{{ units}}")
    if re.fullmatch(r"-?\d+", gold):
        found += [f"{gold}.0", f"{int(gold):,}", f"0{gold}", f"{gold}^\\circ", f"\\${gold}", f"{gold}\\%"]
        found.append(f"\\text{{{gold}}}")
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        sign, over, under = fraction.groups()
        found += [f"{sign}{over}/{under}", f"{sign}{int(over) / int(under):.6g}"]
        found.append(f"{sign}\\frac{{{2 * int(over)}}}{{{2 * int(under)}}}")
    if text := re.fullmatch(r"\\text\{(.*)\}", gold):
        found += [text[1], f"\\textbf{{{text[1]}}}", f"\\mathrm{{{text[1]}}}"]
    if re.fullmatch(r"[^(){}\[\]]+(,[^(){}\[\]]+)+", gold):
        found.append(",".join(reversed(gold.split(","))))
    return [answer for answer in dict.fromkeys(found) if answer != gold]


def mistakes(gold: str, others: list[str], rng: random.Random) -> list[str]:
    """Wrong answers: a digit or a sign that is off, half or twice as much, the answer to another question."""
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if re.fullmatch(r"-?\d+", gold):
        number = int(gold)
        found = [str(wrong) for wrong in (number + 1, number - 1, 2 * number, number // 2, -number, number + 10)]
    else:
        found = [f"-{gold}", f"2{gold}", f"\\frac{{{gold}}}{{2}}", f"{gold} + 1"]
    found += rng.sample(others, 3)
    for place in rng.sample(digits, min(4, len(digits))):
        found.insert(0, f"{gold[:place]}{(int(gold[place]) + rng.randint(1, 8)) % 10}{gold[place + 1 :]}")
    return [answer for answer in dict.fromkeys(found) if answer != gold]


def completions(
    question: dict, prose: list[str], others: list[str], n: int, rng: random.Random
) -> list[tuple[str, str]]:
    """n samples of one question as (ending, completion): few answers make up most of them, as with real models.

    Thoughts have 1,500 to 6,000 characters, the text between thought and answer 3 to 12 sentences.

    Args:
        question: a row of MATH-500.
        prose: sentences to make thoughts of.
        others: answers to other questions.
    """
    gold = question["answer"]
    right, wrong = [gold, *spellings(gold)], mistakes(gold, others, rng)
    ease = rng.betavariate(1.6, 0.6)
    own = re.split(r"(?<=\.) ", re.sub(r"\\boxed\{", "{", question["solution"]))
    names, weights = list(ENDINGS), [weight for _, weight in ENDINGS.values()]
    samples = []
    for _ in range(n):
        is_right = rng.random() < ease
        answers, usual = (right, 0.95) if is_right else (wrong, 0.5)
        answer = answers[0] if rng.random() < usual else rng.choice(answers[1:])
        length, thought = rng.randint(1500, 6000), []
        while sum(map(len, thought)) < length:
            thought.append(rng.choice(rng.choice([THOUGHTS, own, prose])))
        head = "<think>\n" + " ".join(thought)
        if rng.random() < TRUNCATED:
            samples.append(("truncated", head[:length]))
            continue
        ending = rng.choices(names, weights)[0]
        said = ENDINGS[ending][0].format(a=answer, o=rng.choice(wrong))
        if ending.startswith("taught"):
            samples.append((ending, f"{head}\n</think>\n{said}"))
        else:
            summary = [rng.choice([*own, rng.choice(prose)]) for _ in range(rng.randint(3, 12))]
            samples.append((ending, f"{head}\n</think>\n\n" + " ".join(summary) + f"\n\n{said}"))
    return samples


def make(questions: list[dict], n: int, seed: int) -> list[list[tuple[str, str]]]:
    """For every question n samples as (ending, completion)."""
    rng = random.Random(seed)
    solutions = [re.sub(r"\\boxed\{", "{", question["solution"]) for question in questions]
    prose = [sentence for solution in solutions for sentence in re.split(r"(?<=\.) ", solution)]
    answers = [question["answer"] for question in questions]
    return [completions(question, prose, answers, n, rng) for question in questions]


# What is measured, each in a process of its own


def lighteval(scratch: Path) -> tuple[float, list[bool]]:
    """The metric of lighteval's own task math_500 in a loop; seconds without imports, and the verdicts."""
    import pyarrow.parquet as pq
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.tasks.math_500 import math_500_prompt
    from lighteval.utils.utils import remove_reasoning_tags

    questions = json.loads((scratch / "questions.json").read_text())
    texts = pq.read_table(scratch / "samples.parquet", columns=["completion"])["completion"].to_pylist()
    metric = Metrics.pass_at_k_math(sample_params={"k": 1, "n": N_SAMPLES}).sample_level_fn
    verdicts: list[bool] = []
    metric.pass_at_k = lambda scores: verdicts.extend(score == 1 for score in scores)  # keep what it throws away
    start = time.monotonic()
    for number, question in enumerate(questions):
        answers = texts[number * N_SAMPLES : (number + 1) * N_SAMPLES]
        response = ModelResponse(
            text=answers,
            text_post_processed=[remove_reasoning_tags(answer, [("<think>", "</think>")]) for answer in answers],
        )
        metric.compute(math_500_prompt(question), response)
    return time.monotonic() - start, verdicts


def judge(scratch: Path) -> tuple[float, list[bool]]:
    """What the score stage does instead; its worker processes have started before, as lighteval was imported before."""
    from workflow import score
    from workflow.judge import judge_latex
    from workflow.verify import Verifier

    golds = [f"${question['answer']}$" for question in json.loads((scratch / "questions.json").read_text())]
    texts = [row["completion"].decode() for row in score.read_samples(scratch / "samples.parquet")]
    with Verifier(workers=2) as verifier:
        verifier.verify([("$\\frac{1}{2}$", f"\\boxed{{\\frac{{1}}{{{n}}}}}") for n in range(2, 100)])
        start = time.monotonic()
        judged = judge_latex([gold for gold in golds for _ in range(N_SAMPLES)], texts, verifier)
        return time.monotonic() - start, [one.correct for one in judged]


def command(kind: str, scratch: Path) -> list[str]:
    if kind != "stage":
        return [sys.executable, __file__, kind, str(scratch)]
    paths = {"samples": "samples.parquet", "questions": "questions.parquet", "output": "out/scores.json"}
    paths |= {"verdicts": "out/verdicts.parquet", "log": "log"}
    return [sys.executable, "-m", "workflow.score", "math_500"] + [
        part for name, path in paths.items() for part in (f"--{name}", path)
    ]


def measure(kind: str, scratch: Path) -> dict[str, float]:
    """Wall time of the whole process and the largest proportional memory of it and its children."""
    start, peak = time.monotonic(), 0
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command(kind, scratch), cwd=scratch, env=environment, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            used = 0
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
                for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        used += process.memory_full_info().pss
            peak = max(peak, used)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(1)  # to look costs what it looks at some time
    if run.returncode:
        sys.exit(f"{kind} failed")
    result = {"with start-up": time.monotonic() - start, "peak_memory_mib": peak / 2**20}
    if kind != "stage":
        result["seconds"] = json.loads((scratch / f"{kind}.json").read_text())["seconds"]
    return result


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ruamel.yaml import YAML

    file = Path(os.environ["DATA_DIR"]) / "math_500" / "test.jsonl"
    questions = [json.loads(line) for line in file.read_text().splitlines()]
    samples = make(questions, N_SAMPLES, SEED)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "questions.json").write_text(json.dumps(questions))
        params = YAML(typ="safe").load(Path("params.yaml"))
        params["prepare"]["math_500"] = next(iter(params["prepare"].values()))
        params["tasks"] = {"math_500": {"answer": "latex", **SETTINGS}}
        YAML().dump(params, scratch / "params.yaml")
        ids = [f"math_500-{number:06d}" for number in range(len(questions))]
        asked = [
            {
                "id": key,
                "prompt": [{"role": "user", "content": question["problem"]}],
                "solution": f"${question['answer']}$",
            }
            for key, question in zip(ids, questions, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(asked), scratch / "questions.parquet")
        rows = [
            {
                "id": key,
                "sample": number,
                "completion": text,
                "tokens": len(text) // 4,
                "finish_reason": "length" if ending == "truncated" else "stop",
            }
            for key, answers in zip(ids, samples, strict=True)
            for number, (ending, text) in enumerate(answers)
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"generation": json.dumps(SETTINGS)})
        pq.write_table(table, scratch / "samples.parquet")
        characters = statistics.mean(len(row["completion"]) for row in rows)
        del table, rows, asked

        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for repeat in range(REPEATS):
            # Which one goes first alternates, so that a machine that slows down slows all.
            for kind in KINDS if repeat % 2 == 0 else reversed(KINDS):
                runs[kind].append({name: round(value, 1) for name, value in measure(kind, scratch).items()})
                print(f"{kind}: {runs[kind][-1]}", flush=True)
        theirs, ours = (
            json.loads((scratch / f"{kind}.json").read_text())["verdicts"] for kind in ("lighteval", "judge")
        )
        stage = pq.read_table(scratch / "out/verdicts.parquet")["correct"].to_pylist()
    assert stage == ours
    endings = [ending for answers in samples for ending, _ in answers]
    differing = Counter(
        (ending, "lighteval" if theirs_is else "ours")
        for ending, theirs_is, ours_is in zip(endings, theirs, ours, strict=True)
        if theirs_is != ours_is
    )

    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("lighteval", "math-verify", "latex2sympy2_extended", "sympy")},
        "samples": {"questions": len(questions), "each": N_SAMPLES, "seed": SEED, "mean_characters": round(characters)},
        "runs": runs,
        "correct": {"lighteval": statistics.mean(theirs), "ours": statistics.mean(ours)},
        "agree": round(1 - differing.total() / len(ours), 5),
        "correct_by_one_only": {f"{ending}: {who}": count for (ending, who), count in differing.most_common()},
    }
    result = Path("bench/results/scoring.json")
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(record, indent=2) + "\n")
    print_table(runs)
    print(f"\nVerdicts that agree: {record['agree']:.2%} of {len(ours)}; correct by one only:")
    for (ending, who), count in differing.most_common():
        print(f"- {ending}: {count} by {who}")


def print_table(runs: dict[str, list[dict[str, float]]]) -> None:
    def middle(kind: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[kind])

    loop, whole = middle("lighteval", "seconds"), middle("lighteval", "with start-up")
    rows = [
        ("lighteval's metric in a loop", loop, whole, "lighteval"),
        ("our judging, workers started", middle("judge", "seconds"), middle("judge", "with start-up"), "judge"),
        ("the whole stage", None, middle("stage", "with start-up"), "stage"),
    ]
    print("\n| 500 x 64 samples | s | times faster | s with start-up | times faster | MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for label, seconds, total, kind in rows:
        alone = "-" if seconds is None else f"{seconds:.1f}"
        faster = "-" if seconds is None else f"{loop / seconds:.1f}"
        memory = max(run["peak_memory_mib"] for run in runs[kind])
        print(f"| {label} | {alone} | {faster} | {total:.1f} | {whole / total:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        what, folder = sys.argv[1], Path(sys.argv[2])
        seconds, verdicts = {"lighteval": lighteval, "judge": judge}[what](folder)
        (folder / f"{what}.json").write_text(json.dumps({"seconds": seconds, "verdicts": verdicts}))
    else:
        main()
