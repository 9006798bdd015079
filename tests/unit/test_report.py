"""The report is made from small runs that look like real ones, through main() as the pipeline calls it."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from workflow import charts, pages, report, stats
from workflow.params import load_params
from workflow.prepare import length_report
from workflow.stage import StageError

HOSTILE = '<script>alert("x")</script><img src=http://evil/x.png onerror=y> {{ 7 * 7 }} & \u202e'

SFT = """
  cold_start:
    start_from: base
    dataset: traces
    global_batch_size: 64
    trainer: {max_steps: 60}
"""
GRPO = """
  reasoning:
    start_from: cold_start
    dataset: problems
    global_batch_size: 64
    rewards: {accuracy: 1.0, format: 0.2}
    rewards_read: data/check/ok.txt
    trainer: {max_steps: 50, num_generations: 8}
"""
TASK = "{answer: latex, n_samples: 4, temperature: 1.0, top_p: 1.0, max_tokens: 100, dtype: float32}"


def write_params(root: Path, sft: str, grpo: str, models: list[str], tasks: list[str]) -> None:
    sources = ["traces", "problems", *tasks]
    builtins = {"traces": "bespoke_stratos", "problems": "numina_tir"}
    lines = [
        "recipe: small",
        "seed: 42",
        "system_prompt: Think step by step, then answer.",
        "sources:",
        "  base: {into: models, origin: builtin, builtin: qwen2, licence: Apache-2.0}",
        *(
            f"  {name}: {{into: raw, origin: builtin, builtin: {builtins.get(name, 'questions')}, "
            f"options: {{rows: 9{', guesses: 0' if name == 'traces' else ''}}}, licence: MIT}}"
            for name in sources
        ),
        "prepare:",
        *(
            f"  {name}: {{source: {name}, format: math, tokenizer: base, max_prompt_length: 48, max_length: 160}}"
            for name in sources
        ),
        f"sft: {sft or '{}'}",
        f"grpo: {grpo or '{}'}",
        f"generate: {{models: [{', '.join(models)}]}}",
        "tasks:",
        *(f"  {task}: {TASK}" for task in tasks),
    ]
    (root / "params.yaml").write_text("\n".join(lines) + "\n")


def write_log(root: Path, entry: str, item: str, **facts: object) -> None:
    folder = root / "data/logs" / entry / item
    folder.mkdir(parents=True)
    log = {
        "stage": entry,
        "item": item.replace("/", " "),
        "summary": f"{entry} done",
        "seconds": 10.5,
        "peak_memory_mib": 900,
        "machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux-6.1"},
        "versions": {"torch": "2.13.0", "transformers": "5.17.0"},
        **({"warnings": []} if entry == "grpo" else {}),
        **facts,
    }
    (folder / "stage.json").write_text(json.dumps(log))


def write_questions(root: Path, name: str, questions: list[str]) -> None:
    prompts = [[{"role": "system", "content": "Think."}, {"role": "user", "content": text}] for text in questions]
    table = pd.DataFrame({"id": [f"{name}-{i:06d}" for i in range(len(questions))], "prompt": prompts})
    (root / "data/prepared").mkdir(parents=True, exist_ok=True)
    table.assign(completion=None, solution=[str(12 + i) for i in range(len(questions))]).to_parquet(
        root / f"data/prepared/{name}.parquet"
    )


def write_evaluation(root: Path, model: str, task: str, questions: int, accuracy: float) -> None:
    """Samples, verdicts and scores of one model that answers with about this accuracy, easier questions more often."""
    rng = random.Random(f"{model}{task}")
    rows = []
    for index in range(questions):
        ease = accuracy + 0.3 * accuracy * (1 - accuracy) * math.sin(index)
        for sample in range(4):
            correct = rng.random() < ease
            text = f"<think>\n12 + {index}\nis {12 + index}\n</think>\n<answer>\n\\boxed{{{12 + index}}}\n</answer>"
            if not correct:
                text = f"<think>\n{HOSTILE}" if sample % 2 else f"{HOSTILE}</think>\n{HOSTILE}"
            rows.append(
                {
                    "id": f"{task}-{index:06d}",
                    "sample": sample,
                    "seed": 4 * index + sample,
                    "correct": correct,
                    "strict": correct,
                    "reason": "correct" if correct else "unparsed" if sample % 2 else "wrong",
                    "extracted": str(12 + index) if correct else "",
                    "gold": str(12 + index),
                    "tokens": len(text) // 3,
                    "finish_reason": "stop" if correct else "length",
                    "completion": text,
                }
            )
    table = pd.DataFrame(rows)
    matrix = table.pivot(index="id", columns="sample", values="correct").to_numpy(float)
    interval = stats.mean_interval(matrix)
    score = {
        f"pass_at_1{end}": value
        for end, value in zip(("", "_low", "_high"), (interval.mean, interval.low, interval.high), strict=True)
    }
    score |= {f"strict_{name}": 0.9 * value for name, value in score.items()}
    score |= {"pass_at_1_se": interval.se, "pass_at_4": float(matrix.any(axis=1).mean()), "maj_at_4": 0.5}
    score |= {name.replace("pass_at_1", "format_rate"): value for name, value in score.items() if name[0] == "p"}
    score |= {"dtype": "float32", "truncated": 1 - interval.mean, "no_eos": 0.0, "unparsed": 0.1}
    score |= {"timed_out": 0.0, "mean_tokens": float(table["tokens"].mean()), "n_questions": questions, "n_samples": 4}
    score |= {"temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 42, "questions_sha256": f"{questions}"}
    scores, samples = (root / "data" / folder / model for folder in ("scores", "samples"))
    scores.mkdir(parents=True, exist_ok=True)
    samples.mkdir(parents=True, exist_ok=True)
    (scores / f"{task}.json").write_text(json.dumps(score))
    table.drop(columns=["completion", "seed"]).to_parquet(scores / f"{task}.parquet")
    table[["id", "sample", "seed", "completion", "tokens", "finish_reason"]].to_parquet(samples / f"{task}.parquet")


def write_history(root: Path, kind: str, phase: str, steps: int) -> None:
    rng = random.Random(phase)
    rows = []
    for step in range(1, steps + 1):
        done, noise = step / steps, rng.gauss(0, 1)
        if kind == "sft":
            row = {
                "loss": 0.2 + 2.5 * math.exp(-6 * done) + 0.03 * noise,
                "mean_token_accuracy": 1 - math.exp(-4 * done),
            }
        else:
            row = {
                "reward": 0.5 + 0.5 * done + 0.05 * noise,
                "reward_std": 0.3 - 0.1 * done,
                "rewards/accuracy/mean": 0.4 + 0.4 * done + 0.05 * noise,
                "rewards/format/mean": 0.9 + 0.05 * done,
                "completions/mean_length": 40 - 10 * done + noise,
                "completions/clipped_ratio": 0.05 * (1 - done),
                "frac_reward_zero_std": 0.2 + 0.3 * done,
                "verify/unparsed": 0.3 * (1 - done),
                "verify/timeout": 0.0,
                "loss": 1e-5 * noise,
            }
        if step % 5 == 0:
            row["eval_loss" if kind == "sft" else "eval_reward"] = 0.5
        rows.append(
            {"step": step, "entropy": 0.6 - 0.4 * done, "grad_norm": 1 + 0.1 * noise, "learning_rate": 1e-4, **row}
        )
    pd.DataFrame(rows).to_csv(root / "data/logs" / kind / phase / "history.csv", index=False)


def make_run(
    root: Path,
    accuracies: dict[str, float],
    sft: str = SFT,
    grpo: str = GRPO,
    tasks: tuple[str, ...] = ("arithmetic",),
    questions: int = 80,
    steps: int = 50,
) -> None:
    """Everything main() reads, for models that answer with the given accuracies."""
    write_params(root, sft, grpo, list(accuracies), list(tasks))
    write_log(root, "download", "base", origin="builtin:qwen2", revision="ab" * 20, licence="Apache-2.0", files={})
    for name in ("traces", "problems", *tasks):
        write_log(root, "download", name, origin=f"builtin:{name}", revision="cd" * 20, licence="MIT", files={})
        count = questions if name in tasks else 3 * questions
        lengths = length_report([(20, 50)] * count + [(20, 900)] * 3, 64, 160)
        write_log(
            root, "prepare", name, rows_in=count + 3, rows=count, dropped={"longer than 160 tokens": 3}, lengths=lengths
        )
        write_questions(root, name, [f"{name}: what is 12 + {index}?" for index in range(count)])
    for kind, phases, name in (("sft", sft, "cold_start"), ("grpo", grpo, "reasoning")):
        if phases:
            batch = {"hardware": "cpu", "per_device_batch": 16, "accumulation": 2}
            write_log(root, kind, name, devices=2, device="cpu", tokens_per_second=1234, peak_memory_mib=2100, **batch)
            write_history(root, kind, name, steps)
    for model, accuracy in accuracies.items():
        for task in tasks:
            write_evaluation(root, model, task, questions, accuracy)
            write_log(root, "generate", f"{model}/{task}", tokens_per_second=5678)
            write_log(root, "score", f"{model}/{task}")


ARGUMENTS = (
    "--scores data/scores --samples data/samples --questions data/prepared --logs data/logs "
    "--metrics metrics.json --output data/report"
)


def run(monkeypatch: pytest.MonkeyPatch, root: Path) -> tuple[dict[str, float], str, str]:
    """main() in `root`; metrics, page and model card."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["report", *ARGUMENTS.split()])
    report.main()
    metrics = json.loads(Path("metrics.json").read_text())
    return metrics, Path("data/report/report.html").read_text(), Path("data/report/model_card.md").read_text()


THREE = {"base": 0.0, "cold_start": 0.5, "reasoning": 0.8}


def plain(text: str) -> str:
    return text.replace(pages.NBSP, " ")


def test_metrics_are_about_ten_flat_numbers(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    metrics, _, _ = run(monkeypatch, tmp_path)
    assert list(metrics) == [
        "arithmetic.reasoning",
        "arithmetic.interval",
        "arithmetic.gain",
        "arithmetic.cold_start",
        "arithmetic.base",
        "arithmetic.truncated",
        "arithmetic.mean_tokens",
        "seconds",
        "peak_memory_mib",
    ]
    scores = {model: json.loads(Path(f"data/scores/{model}/arithmetic.json").read_text()) for model in THREE}
    score = scores["reasoning"]
    assert metrics["arithmetic.reasoning"] == round(score["pass_at_1"], 4)
    ends = [float(end) for end in metrics["arithmetic.interval"].split(" to ")]
    assert ends == pytest.approx([score["pass_at_1_low"], score["pass_at_1_high"]], abs=1e-4)
    gain, low, high = numbers(metrics["arithmetic.gain"])
    assert gain == pytest.approx(score["pass_at_1"] - scores["cold_start"]["pass_at_1"], abs=1e-4)
    assert low < gain < high
    assert metrics["arithmetic.gain"].startswith(("+", "-"))
    # download, prepare: 4 + 3; two phases; generate and score: 3 each
    assert metrics["seconds"] == 10.5 * (7 + 2 + 6)
    assert metrics["peak_memory_mib"] == 2100


def test_several_tasks_keep_the_metrics_few(tmp_path, monkeypatch):
    make_run(tmp_path, THREE, tasks=("arithmetic", "algebra"))
    metrics, page, _ = run(monkeypatch, tmp_path)
    assert "algebra.reasoning" in metrics and "algebra.cold_start" not in metrics
    assert len(metrics) == 2 * 3 + 2
    assert page.count('<p class="verdict') == 2
    assert page.count('class="sample"') == 10


def test_the_page_says_what_the_evaluation_can_see(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    _, page, _ = run(monkeypatch, tmp_path)
    correct = {}
    for model in ("cold_start", "reasoning"):
        verdicts = pd.read_parquet(f"data/scores/{model}/arithmetic.parquet")
        correct[model] = verdicts.pivot(index="id", columns="sample", values="correct").to_numpy(float)
    variances = stats.difference_variances(correct["reasoning"], correct["cold_start"])
    section = page.split("What this evaluation can see")[1].split("</section>")[0]
    cells = re.findall(r'<td class="n">([\d.,]*)</td>', section)
    assert cells[0] == f"{100 * stats.smallest_gain(80, 4, variances):.1f}"
    for row, gain in enumerate((0.01, 0.02, 0.05)):
        needed = [f"{stats.questions_needed(gain, samples, variances):,}" for samples in (1, 4, 16, 64)]
        assert cells[6 * row + 1 : 6 * row + 6] == [f"{100 * gain:.0f}", *needed]


def test_equal_inputs_give_equal_files(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)

    def files() -> dict[str, str]:
        run(monkeypatch, tmp_path)
        made = [tmp_path / "metrics.json", *(tmp_path / "data/report").rglob("*.*")]
        return {str(file): file.read_text() for file in made}

    assert files() == files()


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({"cold_start": 0.4, "reasoning": 0.8}, r"GRPO raised arithmetic pass@1 from \d.*\(\+\d.* p < \.001\)\.$"),
        ({"cold_start": 0.8, "reasoning": 0.4}, r"GRPO lowered arithmetic pass@1 from .* \(-.*"),
        ({"cold_start": 0.5, "reasoning": 0.5}, "GRPO made no distinguishable difference on arithmetic: pass@1 went"),
        ({"cold_start": 0.4, "reasoning": 0.0}, "GRPO lowered .* reasoning solves next to nothing"),
        ({"cold_start": 0.0, "reasoning": 0.0}, "no distinguishable .* Both models solve next to nothing"),
        ({"base": 0.1, "reasoning": 0.8}, r"SFT \+ GRPO raised arithmetic"),
        ({"reasoning": 0.8}, "reasoning reaches .* pass@1 on arithmetic \\(95 % interval"),
    ],
)
def test_verdict_is_honest(tmp_path, monkeypatch, capsys, accuracies, expected):
    make_run(tmp_path, accuracies)
    run(monkeypatch, tmp_path)
    said = capsys.readouterr().out.split("\n\n")[-1].splitlines()[0]
    assert re.search(expected, said), said


def printed_table(text: str, task: str) -> dict[str, dict[str, str]]:
    """The table of one task on the terminal: model, and its cells by column."""
    head, *rows = text.split(f"\n{task}: ")[1].split("\n\n")[1].splitlines()
    assert {len(line.rstrip()) for line in rows} == {len(head)} and len(head) <= 100
    assert len({line.index("[") for line in rows}) == 1
    rows = [re.sub(r"\[ *([-\d.]+), +", r"[\1, ", row) for row in rows]
    cells = [re.split("  +", line) for line in (head, *rows)]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}


def test_table_shows_every_number_with_its_interval(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, THREE, tasks=("arithmetic", "algebra"))
    rates = {"base": (0.0, 0.0, 0.004), "cold_start": (0.98, 0.97, 1.0), "reasoning": (0.985, 0.975, 0.99)}
    for model, rate in rates.items():
        set_format(tmp_path, model, "algebra", *rate)
    metrics, _, _ = run(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert re.findall("\n(.*): 80 questions x 4 samples, .*float32", printed) == ["arithmetic", "algebra"]
    table = printed_table(printed, "algebra")
    assert list(table) == ["base", "cold_start", "reasoning"]
    assert [row["by"] for row in table.values()] == ["-", "SFT", "GRPO"]
    assert [numbers(row["format %"]) for row in table.values()] == [[0, 0, 0.4], [98, 97, 100], [98.5, 97.5, 99]]
    correct = {}
    for model, row in table.items():
        score = json.loads(Path(f"data/scores/{model}/algebra.json").read_text())
        shown = [score["pass_at_1"], score["pass_at_1_low"], score["pass_at_1_high"]]
        assert numbers(row["pass@1 %"]) == pytest.approx([100 * value for value in shown], abs=0.051)
        assert numbers(row["tokens"]) == pytest.approx([score["mean_tokens"]], abs=0.051)
        verdicts = pd.read_parquet(f"data/scores/{model}/algebra.parquet")
        correct[model] = verdicts.pivot(index="id", columns="sample", values="correct").to_numpy(float)
    assert table["base"]["gain, points"] == "-"
    for before, after in (("base", "cold_start"), ("cold_start", "reasoning")):
        gain = stats.paired_difference(correct[after], correct[before])
        expected = [100 * value for value in (gain.mean, gain.low, gain.high)]
        assert numbers(table[after]["gain, points"]) == pytest.approx(expected, abs=0.051)
    gained = [100 * value for value in numbers(metrics["algebra.gain"])]
    assert numbers(table["reasoning"]["gain, points"]) == pytest.approx(gained, abs=0.06)


def numbers(cell: str) -> list[float]:
    """`55.8 [53.6, 58.0]` as its numbers; the estimate lies between its bounds."""
    assert re.fullmatch(r"[+-]?[\d.]+( \[-?[\d.]+, -?[\d.]+\])?", cell), cell
    found = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
    assert len(found) == 1 or found[1] <= found[0] <= found[2]
    return found


def set_format(root: Path, model: str, task: str, rate: float, low: float, high: float) -> None:
    file = root / f"data/scores/{model}/{task}.json"
    new = {"format_rate": rate, "format_rate_low": low, "format_rate_high": high}
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


def test_output_ends_with_table_verdict_and_path(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, THREE)
    for model, rate in (("base", (0, 0, 0.01)), ("cold_start", (0.98, 0.97, 0.99)), ("reasoning", (0.985, 0.98, 1))):
        set_format(tmp_path, model, "arithmetic", *rate)
    _, page, _ = run(monkeypatch, tmp_path)
    table, legend, said = capsys.readouterr().out.split("\n\n")[1:]
    assert table.startswith("model ") and "95 %" in legend
    verdict, taught, path = said.splitlines()
    assert verdict.startswith("GRPO raised arithmetic pass@1 from ")
    assert taught == (
        "SFT raised the share of arithmetic answers in the taught format from 0.0 % to 98.0 % "
        "(95 % intervals 0.0 to 1.0 and 97.0 to 99.0)."
    )
    assert path == "report: data/report/report.html"
    assert f'<p class="earlier">{taught}</p>' in plain(page)
    assert '<span class="soft">97.0 to 99.0</span>' in page


@pytest.mark.parametrize(("low", "said"), [(0.31, True), (0.3, False), (0.29, False)])
def test_format_was_raised_only_where_the_intervals_do_not_overlap(tmp_path, monkeypatch, capsys, low, said):
    make_run(tmp_path, {"cold_start": 0.4, "reasoning": 0.8})
    set_format(tmp_path, "cold_start", "arithmetic", 0.2, 0.1, 0.3)
    set_format(tmp_path, "reasoning", "arithmetic", 0.5, low, 0.6)
    _, page, _ = run(monkeypatch, tmp_path)
    assert ("in the taught format" in capsys.readouterr().out) == said
    assert ("GRPO raised the share of arithmetic answers" in page) == said


def test_hardware_and_precision_are_shown(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    log = tmp_path / "data/logs/grpo/reasoning/stage.json"
    facts = {"device": "cuda", "device_name": "NVIDIA H200", "hardware": "h200", "accumulation": 1}
    log.write_text(json.dumps(json.loads(log.read_text()) | facts))
    _, page, _ = run(monkeypatch, tmp_path)
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in plain(page).split("<h3>Hardware</h3>")[1].split("<tr>")]
    assert [[row[0], *row[3:6]] for row in rows if row] == [
        ["download, prepare, generate, score", "\u2013", "\u2013", "\u2013"],
        ["sft", "2 \u00d7 cpu", "cpu", "16 \u00d7 2"],
        ["grpo", "2 \u00d7 NVIDIA H200", "h200", "16 \u00d7 1"],
    ]
    assert "top-p 1.0, float32, at most 100 tokens" in page


class Page(HTMLParser):
    """Tags with their attributes, and whether all that were opened are closed in order."""

    VOID = ("meta", "link", "br", "img", "line", "path", "circle", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else at {self.getpos()}"


def test_page_is_well_formed_and_asks_for_nothing_outside(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    _, text, _ = run(monkeypatch, tmp_path)
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert {"svg", "table", "details"} <= set(names)
    assert not {"script", "img", "iframe", "object", "base", "form"} & set(names)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], (tag, attributes)
        assert (attributes.get("href") or "data:").startswith(("data:", "samples.html"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"@import|https?:|url\((?!#)", style)


def test_completions_are_text_and_nothing_else(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    _, text, _ = run(monkeypatch, tmp_path)
    assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_ten_samples_half_right_half_wrong(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    run(monkeypatch, tmp_path)
    params = load_params()
    verdicts = {("reasoning", "arithmetic"): pd.read_parquet("data/scores/reasoning/arithmetic.parquet")}
    picked = report.pick_samples(params, Path("data/prepared"), Path("data/samples"), verdicts)
    assert [sample["correct"] for sample in picked] == [True] * 5 + [False] * 5
    assert len({sample["id"] for sample in picked}) == 10
    first = picked[0]
    index = int(first["id"].split("-")[1])
    assert first["question"] == f"arithmetic: what is 12 + {index}?"
    assert first["thoughts"] == f"12 + {index}\nis {12 + index}"
    assert first["answer"] == f"\\boxed{{{12 + index}}}"


def test_samples_fill_up_where_all_are_wrong(tmp_path, monkeypatch):
    make_run(tmp_path, {"cold_start": 0.0, "reasoning": 0.0})
    _, text, _ = run(monkeypatch, tmp_path)
    assert text.count('<b class="bad">wrong</b>') == 10


@pytest.mark.parametrize(
    ("completion", "parts"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", ("a", "b")),
        ("a</think> so b", ("a", "so b")),
        ("a</think> no</think> b", ("a</think> no", "b")),
        ("a</think> <answer>b</answer>", ("a", "<answer>b</answer>")),
        ("a</think>", ("a", "")),
        ("<think>\nnever ends", ("", "<think>\nnever ends")),
        ("", ("", "")),
    ],
)
def test_split_thoughts(completion, parts):
    assert report.split_thoughts(completion) == parts


def test_what_the_health_gate_said_is_above_the_tables(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    file = tmp_path / "data/logs/grpo/reasoning/stage.json"
    warning = "step 40: 45% of the completions are cut off"
    file.write_text(json.dumps({**json.loads(file.read_text()), "warnings": [warning]}))
    _, text, _ = run(monkeypatch, tmp_path)
    assert f"reasoning, {warning}" in text


def test_lengths_and_what_a_limit_would_cut(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    _, text, _ = run(monkeypatch, tmp_path)
    assert "Lengths in tokens" in text and "900" in text
    assert re.search(r"512:\s+\d", text)


def test_overlap_is_counted_and_said(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    write_questions(tmp_path, "problems", [f"arithmetic: what is 12 + {index}?" for index in range(70, 200)])
    _, text, _ = run(monkeypatch, tmp_path)
    assert "10 of 80 arithmetic questions occur word for word in problems, which reasoning was trained on." in text


def test_only_grpo(tmp_path, monkeypatch):
    grpo = GRPO.replace("start_from: cold_start", "start_from: base")
    make_run(tmp_path, {"base": 0.2, "reasoning": 0.7}, sft="", grpo=grpo)
    metrics, text, _ = run(monkeypatch, tmp_path)
    assert "arithmetic.gain" in metrics
    assert not (tmp_path / "data/report/plots/sft.csv").exists()
    assert "SFT" not in text


def test_files_of_an_older_recipe_are_ignored(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    write_log(tmp_path, "grpo", "older", peak_memory_mib=99999)
    write_evaluation(tmp_path, "older", "arithmetic", 10, 0.5)
    stale = tmp_path / "data/report/plots/rewards/older.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("phase,step,value\n")
    metrics, text, _ = run(monkeypatch, tmp_path)
    assert "older" not in text and metrics["peak_memory_mib"] == 2100 and not stale.exists()


def test_plots_have_the_columns_that_dvc_yaml_names(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    run(monkeypatch, tmp_path)
    plots = tmp_path / "data/report/plots"
    assert list(pd.read_csv(plots / "sft.csv")) == ["phase", "step", "loss", "mean_token_accuracy"]
    assert {"reward", "completions/mean_length", "completions/clipped_ratio", "entropy"} < set(
        pd.read_csv(plots / "grpo.csv")
    )
    assert sorted(file.name for file in (plots / "rewards").iterdir()) == ["accuracy.csv", "format.csv"]
    for file, column in (("sft_eval", "eval_loss"), ("grpo_eval", "eval_reward")):
        held_out = pd.read_csv(plots / f"{file}.csv")
        assert list(held_out) == ["phase", "step", column]
        assert 1 < len(held_out) < len(pd.read_csv(plots / f"{file.removesuffix('_eval')}.csv"))
    accuracy = pd.read_csv(plots / "accuracy.csv")
    assert list(accuracy["label"]) == [f"arithmetic / {model}" for model in THREE]
    assert (accuracy["low"] <= accuracy["pass_at_1"]).all() and (accuracy["pass_at_1"] <= accuracy["high"]).all()


def test_a_phase_that_logged_nothing_has_no_curves(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    (tmp_path / "data/logs/grpo/reasoning/history.csv").write_text("step\n")
    _, text, _ = run(monkeypatch, tmp_path)
    assert "Nothing was logged" in text and "Reward" not in text
    assert not (tmp_path / "data/report/plots/grpo.csv").exists()


def test_the_card_shows_the_curves_of_its_models_line(tmp_path, monkeypatch):
    """A picture of its own, because a card on the Hub may hold no SVG in its text."""
    make_run(tmp_path, THREE)
    run(monkeypatch, tmp_path)
    folder = tmp_path / "data/report"
    assert "![Training curves](curves.svg)" in (folder / "model_card.md").read_text()
    picture = ElementTree.parse(folder / "curves.svg").getroot()
    words = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"cold_start", "reasoning", "Loss, held out", "Reward: accuracy", "Answers: unparsed"} <= words
    assert "Answers: timeout" not in words
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}path"))) >= 10


def test_steps_of_later_phases_run_on():
    log = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]})
    table = report.running_steps({"a": log, "b": log})
    assert list(table["step"]) == [1, 2, 3, 4, 5, 6] and "".join(table["phase"]) == "aaabbb"


def test_columns_that_were_not_logged_have_no_panel():
    log = pd.DataFrame({"step": [10, 20], "loss": [1.0, 0.5], "entropy": [math.nan, math.nan]})
    assert [panel["title"] for panel in charts.panels("sft", log)] == ["Loss"]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.113, 0.117), (-3e-5, 8e-5), (5, 5), (0, 0), (-2, -2), (17, 92000), (1e-4, 1.0000001e-4)],
)
def test_ticks_cover_the_data(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7 and found[0] <= low and found[-1] >= high
    assert len(set(map(charts.axis_label, found))) == len(found)


def test_one_logged_step_can_be_drawn():
    panel = charts.panel("Loss", [5], [1.25])
    assert panel["line"] == "M46.0,77.0" or panel["line"].startswith("M46.0,")
    assert "nan" not in json.dumps(panel)


def test_model_card(tmp_path, monkeypatch):
    make_run(tmp_path, THREE)
    log = tmp_path / "data/logs/download/base/stage.json"
    log.write_text(log.read_text().replace("builtin:qwen2", "Qwen/Qwen2.5-1.5B"))
    _, _, card = run(monkeypatch, tmp_path)
    from ruamel.yaml import YAML

    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == ["Qwen/Qwen2.5-1.5B"]
    assert "datasets" not in front  # builtins are not on the Hub
    assert {"sft", "grpo"} <= set(front["tags"])
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "model card", "exec")
    assert '"content": "arithmetic: what is 12 + 0?"' in code and "data/models/reasoning" in code
    assert "| traces | 240 | builtin:traces | `cdcdcdcdcdcd` | MIT |" in card


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: (data / "scores/reasoning/arithmetic.json").unlink(), "arithmetic.json does not exist; run the"),
        (lambda data: (data / "scores/base/arithmetic.json").write_text("{"), "is not JSON"),
        (lambda data: (data / "scores/base/arithmetic.parquet").unlink(), "arithmetic.parquet does not exist"),
        (lambda data: (data / "logs/sft/cold_start/history.csv").write_text("loss\n1\n"), "has no column step"),
        (lambda data: write_evaluation(data.parent, "base", "arithmetic", 70, 0.1), "were asked different questions"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, break_it, message):
    make_run(tmp_path, THREE)
    break_it(tmp_path / "data")
    with pytest.raises(StageError, match=message) as error:
        run(monkeypatch, tmp_path)
    assert "\n" not in str(error.value)


def test_git_state_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.git_state() == ("not a git checkout", [])


def test_git_state_names_what_differs(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
        )

    monkeypatch.chdir(tmp_path)
    git("init")
    Path("params.yaml").write_text("seed: 1\n")
    git("add", "params.yaml")
    git("commit", "-m", "first")
    Path("metrics.json").write_text("{}")  # every run writes it
    commit, changed = report.git_state()
    assert re.fullmatch("[0-9a-f]{40}", commit) and changed == []
    Path("params.yaml").write_text("seed: 2\n")
    Path("dvc.yaml").write_text("stages: {}\n")
    assert report.git_state() == (commit, ["params.yaml", "dvc.yaml"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (pages.percent(0.5214), "52.1 %"),
        (pages.points(0.289), "+28.9"),
        (pages.points(-0.0123), "\u22121.2"),
        (pages.points(0.00001), "0.0"),
        (pages.bound(0.26), "26.0"),
        (pages.p_value(0.0002), "p < .001"),
        (pages.p_value(0.0431), "p = .043"),
        (pages.p_value(1.0), "p = 1.000"),
        (pages.duration(3725), "1 h 02 min"),
        (pages.duration(59.7), "1 min 00 s"),
        (pages.memory(812), "812 MiB"),
        (pages.memory(3482), "3.4 GiB"),
        (charts.axis_label(0.0001), "1e\u22124"),
        (charts.axis_label(250), "250"),
        (charts.axis_label(0), "0"),
        (charts.axis_label(-0.25), "\u22120.25"),
    ],
)
def test_numbers_as_text(text, expected):
    assert plain(text) == expected
