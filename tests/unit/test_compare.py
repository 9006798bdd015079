"""Comparisons are read from a small repository of Git and DVC whose experiments were really run."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import dvc.api
import pandas as pd
import pytest

from workflow import compare, stats
from workflow.stage import StageError

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script>"

PARAMS = """\
recipe: small
seed: 42
skill:
  base: 0.2
  reasoning: 0.5
first: 0
golds: 1
wording: plain
generate:
  models: [base, reasoning]
tasks:
  sums: {n_samples: 4, temperature: 1.0}
"""

# Stages that write scores and verdicts as the stage score does: a model answers easy questions more often than hard
# ones, and its skill is the mean. `first` is the number of the first of 60 questions, `golds` changes their answers.
PIPELINE = """\
stages:
  score:
    matrix:
      model: ${generate.models}
      task: ${tasks}
    cmd: python score.py ${item.model} ${item.task}
    deps: [score.py]
    params: [seed, skill, first, golds, wording, 'tasks.${item.task}']
    outs:
      - data/scores/${item.model}/${item.task}.json
      - data/scores/${item.model}/${item.task}.parquet
  report:
    cmd: python report.py
    deps: [report.py, data/scores/base/sums.json, data/scores/reasoning/sums.json]
    outs: [data/report]
plots:
  - Accuracy:
      template: accuracy
      x: pass_at_1
      y: {data/report/plots/accuracy.csv: label}
"""

SCORE = """\
import hashlib, json, random, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

model, task = sys.argv[1:]
params = YAML(typ="safe").load(Path("params.yaml"))
settings = params["tasks"][task]
rows = []
for number in range(params["first"], params["first"] + 60):
    hard = random.Random(f"{task} {number}").uniform(-0.2, 0.2)
    chance = random.Random(f"{task} {number} {model} {params['seed']}")
    for sample in range(settings["n_samples"]):
        correct = chance.random() < params["skill"][model] + hard
        gold = str(number * params["golds"]) if number else "<script>alert(1)</script>"
        rows.append({"id": f"{task}-{number:06d}", "sample": sample, "correct": correct, "strict": False, "gold": gold})
folder = Path("data/scores") / model
folder.mkdir(parents=True, exist_ok=True)
pq.write_table(pa.Table.from_pylist(rows), folder / f"{task}.parquet")
mean = sum(row["correct"] for row in rows) / len(rows)
asked = [params["first"], params["golds"], params["wording"]]
scores = {"pass_at_1": mean, "pass_at_1_low": mean - 0.05, "pass_at_1_high": mean + 0.05}
scores |= {f"strict_{name}": 0.0 for name in scores} | {"truncated": 0.25, "mean_tokens": 12.34, "n_questions": 60}
scores |= {**settings, "version_numpy": "2.3.5", "questions_sha256": hashlib.sha256(str(asked).encode()).hexdigest()}
(folder / f"{task}.json").write_text(json.dumps(scores))
"""

REPORT = """\
import json
from pathlib import Path
folder = Path("data/report/plots")
folder.mkdir(parents=True)
rows = ["label,task,model,pass_at_1,low,high"]
for model in ("base", "reasoning"):
    score = json.loads(Path(f"data/scores/{model}/sums.json").read_text())
    ends = [score[f"pass_at_1{end}"] for end in ("", "_low", "_high")]
    rows.append(",".join([f"sums / {model}", "sums", model, *map(str, ends)]))
(folder / "accuracy.csv").write_text("\\n".join(rows))
"""


class Clone:
    """A repository and what a person types in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str) -> str:
        """The output of a command that must succeed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(words, cwd=self.folder, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def change(self, **values: str) -> None:
        """Change lines of params.yaml."""
        file = self.folder / "params.yaml"
        text = file.read_text()
        for key, value in values.items():
            assert f"{key}: " in text
            text = re.sub(rf"\b{key}: .*", f"{key}: {value}", text)
        file.write_text(text)

    def commit(self, tag: str, repro: bool = True) -> None:
        """Run the pipeline and commit the result under a tag."""
        if repro:
            self.run("dvc", "repro", "-q")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", tag)
        self.run("git", "tag", tag)

    def copy(self, folder: Path) -> "Clone":
        """Another one, to be spoiled."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Clone(folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """main with experiments `skilled` (really better) and `noise` (another seed), and tags that differ otherwise."""
    made = Clone(tmp_path_factory.mktemp("clone"))
    for name, text in (("params.yaml", PARAMS), ("dvc.yaml", PIPELINE), ("score.py", SCORE), ("report.py", REPORT)):
        (made.folder / name).write_text(text)
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "config", "user.name", "test")
    made.run("git", "config", "user.email", "test@example.invalid")
    made.run("dvc", "init", "-q")
    (made.folder / ".dvc/plots").mkdir()
    shutil.copy(ROOT / ".dvc/plots/accuracy.json", made.folder / ".dvc/plots")
    made.commit("first")
    made.run("dvc", "exp", "run", "-q", "-n", "skilled", "-S", "skill.reasoning=0.7")
    made.run("git", "checkout", "-q", ".")
    made.run("dvc", "exp", "run", "-q", "-n", "noise", "-S", "seed=1")
    made.run("git", "checkout", "-q", ".")
    made.run("git", "checkout", "-qb", "others")
    made.change(recipe="renamed")
    made.commit("renamed", repro=False)  # no stage reads it
    made.change(wording="polite")
    made.commit("worded")
    made.change(sums="{n_samples: 6, temperature: 0.6}\n  more: {n_samples: 1, temperature: 0.0}", first="20")
    made.commit("wide")
    made.change(golds="7")
    made.commit("foreign")
    made.change(reasoning="0.1")
    made.commit("unrun", repro=False)
    made.run("git", "rm", "-q", "dvc.lock")
    made.commit("unlocked", repro=False)
    made.run("git", "checkout", "-qf", "main")
    made.run("dvc", "checkout", "-q")
    return made


@pytest.fixture
def compared(clone: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `compare` prints."""

    def run(*words: str, where: Clone = clone) -> str:
        monkeypatch.chdir(where.folder)
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        compare.main()
        return capsys.readouterr().out

    return run


def rows_of(clone: Clone, revision: str, model: str = "reasoning") -> pd.DataFrame:
    """Questions x samples of a revision."""
    with dvc.api.open(f"data/scores/{model}/sums.parquet", str(clone.folder), rev=revision, mode="rb") as file:
        return pd.read_parquet(file).pivot(index="id", columns="sample", values="correct").astype(float)


def line_of(text: str, start: str) -> list[str]:
    """The cells of the one line that starts so."""
    (line,) = [line for line in text.splitlines() if re.match(start, line)]
    return re.split(r"\s{2,}", line)


def test_a_real_difference(clone, compared):
    before, after = rows_of(clone, "main"), rows_of(clone, "skilled")
    kept = {path: path.read_bytes() for path in clone.folder.glob("data/**/*") if path.is_file()}
    text = compared("main", "skilled")
    expected = stats.paired_difference(after.to_numpy(), before.to_numpy())
    change = (after.mean(axis=1) - before.mean(axis=1)).round(6)
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    assert won + lost < 60
    assert "skill.reasoning  0.5   0.7" in text
    numbers = [f"{100 * value:.1f}" for value in (before.to_numpy().mean(), after.to_numpy().mean())]
    assert line_of(text, r"main +60")[:4] == ["main", "60", "4", f"{numbers[0]} [ {float(numbers[0]) - 5:.1f},"]
    assert f"skilled is better than main on sums: pass@1 is {numbers[1]} % instead of {numbers[0]} % (" in text
    ends = f"{100 * expected.low:.1f} to {100 * expected.high:.1f}"
    assert f"(+{100 * expected.mean:.1f} points, 95 % interval {ends}, p < .001)" in text
    assert f"It wins {won} of the 60 questions and loses {lost}." in text
    assert line_of(text, r"skilled +\+")[-5:] == ["< .001", f"{won}", f"{lost}", f"{60 - won - lost}", "better"]
    assert "warning" not in text
    # The other way round it is worse, by as much.
    assert f"main is worse than skilled on sums: pass@1 is {numbers[0]} % instead of {numbers[1]} % (-" in compared(
        "skilled", "main"
    )
    assert clone.run("git", "status", "--porcelain") == ""
    assert kept == {path: path.read_bytes() for path in clone.folder.glob("data/**/*") if path.is_file()}


def test_the_questions_that_moved_most(clone, compared):
    before, after = rows_of(clone, "main"), rows_of(clone, "skilled")
    lines = compared("main", "skilled").split("moved most")[1].splitlines()[1:11]
    change = (after.mean(axis=1) - before.mean(axis=1)).abs()
    shown = [line.split() for line in lines]
    assert [change[row[0]] for row in shown] == sorted(change, reverse=True)[:10]
    for name, *_, first, other in shown:
        assert (first, other) == (f"{before.loc[name].sum():.0f}/4", f"{after.loc[name].sum():.0f}/4")


def test_noise_is_not_a_difference(compared):
    text = compared("main", "noise")
    assert re.search(
        r"noise and main are not distinguishable on sums: pass@1 is .* % and .* % \(.*p = \.\d{3}\)\.", text
    )
    assert "seed         42    1" in text


def test_the_same_verdicts(compared):
    text = compared("main", "renamed")
    assert "renamed and main are not distinguishable on sums: the verdicts are the same on every sample." in text
    assert "recipe       small  renamed" in text
    assert "moved most" not in text
    assert line_of(text, r"renamed +0\.0")[-4:] == ["0", "0", "60", "not distinguishable"]


def test_several_are_corrected_for_their_number(clone, compared):
    before = rows_of(clone, "main").to_numpy()
    alone = [stats.paired_difference(rows_of(clone, name).to_numpy(), before).p for name in ("noise", "skilled")]
    text = compared("main", "noise", "skilled")
    assert alone[1] < alone[0] < 0.99
    assert f"p = {alone[0]:.3f}, Holm-corrected for 2 comparisons".replace("0.", ".") in text
    assert "skilled is better than main on sums" in text and "p < .001, Holm-corrected for 2 comparisons" in text


def test_what_counts_alone_may_be_chance_among_several():
    row = {"task": "sums", "first": "a", "other": "b", "questions": 60, "pass_first": 0.5, "pass_other": 0.6}
    row |= {"difference": 0.1, "low": 0.01, "high": 0.19, "verdict": "better", "won": 9, "lost": 3, "identical": False}
    (single,) = compare.judged([{**row, "p": 0.03}])
    assert (single["verdict"], single["holm"]) == ("better", None)
    both = compare.judged([{**row, "p": 0.03}, {**row, "p": 0.04}])
    assert [one["verdict"] for one in both] == ["not distinguishable"] * 2
    assert [one["holm"] for one in both] == pytest.approx([0.06, 0.06])
    assert "By itself the difference would count; among several it may be chance." in both[0]["sentence"]
    assert [one["verdict"] for one in compare.judged([{**row, "p": 0.01}, {**row, "p": 0.04}])] == ["better"] * 2


def test_two_models_of_one_revision(clone, compared):
    text = compared("main:base", "main:reasoning")
    assert "params.yaml is the same." in text
    assert "main:reasoning is better than main:base on sums" in text
    share = rows_of(clone, "main", "base").to_numpy().mean()
    assert f"instead of {100 * share:.1f} %" in text


def test_names_of_revisions(clone, compared):
    sha = clone.run("git", "rev-parse", "main").strip()
    for name in ("first", "HEAD", sha, sha[:8], "others~6"):
        text = compared(name, "skilled")
        assert f"skilled is better than {name} on sums" in text
        assert line_of(text, rf"{name} +{sha[:7]}")[1:] == [sha[:7], "small", "reasoning"]


def test_workspace(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    here.change(seed="7")
    with_old_results = compared("main", "workspace", where=here)
    assert "the verdicts are the same on every sample" in with_old_results
    warning = "warning: the results of workspace are not those of its params.yaml and dvc.lock, what differs is seed;"
    assert warning in with_old_results
    here.run("dvc", "repro", "-q")
    text = compared("main", "workspace", where=here)
    assert "warning" not in text and "the verdicts are the same" not in text
    assert line_of(text, "workspace +workspace") == ["workspace", "workspace", "small", "reasoning"]
    # Parameters and dvc.lock went back to the commit, and the results stayed.
    here.run("git", "checkout", "-q", ".")
    files = "data/scores/reasoning/sums.json, data/scores/reasoning/sums.parquet"
    assert f"what differs is {files};" in compared("main", "workspace", where=here)
    # Only half of the pipeline was run again.
    here.change(seed="8")
    here.run("dvc", "repro", "-q", "--single-item", "score@base-sums", "score@reasoning-sums")
    text = compared("main", "workspace", where=here)
    assert re.search(r"what differs is (data/scores/base/sums\.json, )?data/scores/reasoning/sums\.json;", text)


def test_a_commit_whose_pipeline_was_not_run(compared):
    text = compared("foreign", "unrun")
    assert "warning: the results of unrun are not those of its params.yaml and dvc.lock, what differs is skill;" in text


def test_questions_in_other_words(compared):
    text = compared("main", "worded")
    assert "warning: main and worded were asked the questions of sums in different words" in text
    assert "wording      plain  polite" in text


def test_other_questions_and_settings_and_tasks(clone, compared):
    before, after = rows_of(clone, "main"), rows_of(clone, "wide")
    shared = before.index.intersection(after.index)
    assert len(shared) == 40
    expected = stats.paired_difference(after.loc[shared].to_numpy(), before.loc[shared].to_numpy())
    text = compared("main", "wide")
    assert (
        "main and wide are compared on the 40 questions of sums in both; left out are 20 of main and 20 of wide."
        in text
    )
    settings = "n_samples 4 and 6; temperature 1.0 and 0.6"
    assert f"warning: main and wide have different settings on sums, which may be the difference: {settings}." in text
    assert f"{100 * expected.low:.1f} to {100 * expected.high:.1f}" in text
    assert "\nmore is in wide only.\n" in text
    assert not [line for line in text.splitlines() if line.startswith("more  ")]
    of_three = compared("main", "wide", "foreign")
    assert "\nmore is in wide and foreign only.\n" in of_three
    assert "main and foreign are not compared on sums" in of_three
    assert "foreign and wide are not distinguishable on more" not in of_three


def test_questions_that_only_share_their_ids(compared):
    with pytest.raises(
        StageError, match=r"not compared on sums: .* under the same ids, the gold answer of sums-0000\d\d"
    ):
        compared("main", "foreign")


def test_questions_without_a_common_id(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    here.change(first="100")
    here.run("dvc", "repro", "-q")
    with pytest.raises(StageError, match=r"^main and workspace are not compared on sums: .*no id occurs in both\.$"):
        compared("main", "workspace", where=here)


def test_settings():
    old = {"temperature": 1.0, "version_vllm": "0.31", "mean_tokens": 3}
    assert compare.settings(old, {**old, "mean_tokens": 4}) == []
    new = {**old, "version_vllm": "0.32", "dtype": "float32", "settings_sha256": "a" * 64}
    assert compare.settings(old, new) == ["version_vllm 0.31 and 0.32", "dtype unknown and float32"]
    assert compare.settings(new, {**new, "settings_sha256": "b" * 64}) == ["settings_sha256 aaaaaaaa and bbbbbbbb"]


def test_parameters():
    sides = [
        compare.Side("a", "", "m", {"seed": 1, "sft": {}, "grpo": {"r": {"beta": 0.0}}}, [], {}, {}),
        compare.Side("b", "", "m", {"seed": 1, "sft": {"c": {"rows": 5}}, "grpo": {"r": {"beta": 0.04}}}, [], {}, {}),
    ]
    rows = [(row["key"], *row["values"]) for row in compare.parameters(sides)]
    assert rows == [("sft", "{}", "-"), ("grpo.r.beta", "0.0", "0.04"), ("sft.c.rows", "-", "5")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("main", "skiled"),
            "no revision 'skiled'; .*experiments: noise, skilled; branches: main, others; tags: first, ",
        ),
        (("main", "first"), "main and first are the same commit and model; .* first:base$"),
        (("main", "main"), "main and main are the same commit and model"),
        (("main", "first:reasoning"), "main and first:reasoning are the same"),
        (("main", "skilled:sft"), "skilled has no scores of 'sft'; write one of its models: base, reasoning$"),
        (
            ("main", "unlocked"),
            r"unlocked has no results: .*run dvc repro there \(git checkout unlocked, .*\) and commit dvc\.lock$",
        ),
    ],
)
def test_what_cannot_be_compared(compared, words, message):
    with pytest.raises(StageError, match=message) as error:
        compared(*words)
    assert "\n" not in str(error.value)


def test_experiments_of_one_name(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    sha = here.run("git", "rev-parse", "wide").strip()
    here.run("git", "update-ref", f"refs/exps/{sha[:2]}/{sha[2:]}/skilled", sha)
    assert "skilled is better than main on sums" in compared("main", "skilled", where=here)  # of the commit that is out
    here.run("git", "checkout", "-qf", "others")
    with pytest.raises(StageError, match="several experiments are called 'skilled'; write the commit of one"):
        compared("main", "skilled", where=here)


@pytest.mark.parametrize("content", ["", "generate:", "generate: {models: [base]}", "a: [1"])
def test_a_revision_of_something_else(clone, compared, tmp_path, content):
    here = clone.copy(tmp_path / "here")
    (here.folder / "params.yaml").write_text(content)
    with pytest.raises(StageError, match=r"^workspace has no params\.yaml with generate\.models and tasks"):
        compared("main", "workspace", where=here)


def test_no_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="is not in a repository of Git and DVC"):
        compare.open_repository()


def test_results_that_are_elsewhere(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    store = tmp_path / "store"
    store.mkdir()
    # The remote comes later than the commits, so they do not know of it.
    here.run("dvc", "remote", "add", "-q", "-d", "store", str(store))
    (here.folder / ".dvc/cache/files").rename(store / "files")
    assert "skilled is better than main on sums" in compared("main", "skilled", where=here)
    store.rename(tmp_path / "gone")
    with pytest.raises(
        StageError, match=r"reasoning/sums\.json of main is neither in the cache nor in the default remote; run"
    ):
        compared("main", "skilled", where=here)


def test_verdicts_that_are_not_whole(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    file = here.folder / "data/scores/reasoning/sums.parquet"
    whole = pd.read_parquet(file)
    for spoiled, message in (
        (whole[1:], "not one for every sample of every question"),
        (pd.concat([whole, whole[:1]]), "not one for every sample of every question"),
        (whole.drop(columns="gold"), "have no column gold"),
    ):
        spoiled.to_parquet(file)
        with pytest.raises(StageError, match=message):
            compared("main", "workspace", where=here)


class Links(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page(clone, compared, tmp_path):
    file = tmp_path / "new" / "page.html"
    text = compared("main", "skilled", "noise", "wide", "--html", str(file))
    assert text.endswith(f"\npage: {file}\n")
    page = file.read_text()
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and links.loads == ["data:,"]
    for sentence in (line for line in text.splitlines() if " than main on " in line or " are not dist" in line):
        assert sentence in compare.plain(html.unescape(page))
    assert "left out are 20 of main and 20 of wide" in page and "more is in wide only." in page
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert [len(svg.findall("g")) for svg in charts] == [4, 3]
    # A dot is where its number is, between the ticks around it, and within its interval.
    gains = [svg for svg in charts if svg.findall("line[@class='zero']")]
    ticks = {
        float(tick.text.replace("\u2212", "-")): float(tick.get("x"))
        for tick in gains[0].findall("text[@text-anchor='middle']")
    }
    ends = sorted(ticks)[0], sorted(ticks)[-1]
    gain = 100 * (rows_of(clone, "skilled").to_numpy().mean() - rows_of(clone, "main").to_numpy().mean())
    expected = ticks[ends[0]] + (gain - ends[0]) / (ends[1] - ends[0]) * (ticks[ends[1]] - ticks[ends[0]])
    assert float(gains[0].find("g[@class='better']/circle").get("cx")) == pytest.approx(expected, abs=0.2)
    assert float(gains[0].find("line[@class='zero']").get("x1")) == ticks[0]


def test_a_gold_answer_is_text_on_the_page(clone, compared, tmp_path):
    here = clone.copy(tmp_path / "here")
    file = here.folder / "data/scores/reasoning/sums.parquet"
    rows = pd.read_parquet(file)
    first = rows["id"] == "sums-000000"
    rows.loc[first, "correct"] = rows.loc[first, "correct"].mean() < 0.5
    rows.to_parquet(file)
    page = tmp_path / "page.html"
    assert HOSTILE in compared("main", "workspace", "--html", str(page), where=here)
    assert HOSTILE not in page.read_text() and "&lt;script&gt;" in page.read_text()


@pytest.mark.parametrize(("revision", "code"), [("skilled", 0), ("nothing", 1)])
def test_command_line(clone, environment, revision, code):
    command = [sys.executable, "-m", "workflow.compare", "main", revision]
    done = subprocess.run(command, cwd=clone.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    if code:
        assert done.stdout == ""
        assert done.stderr.startswith("error: there is no revision 'nothing'") and done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""
        assert "skilled is better than main on sums" in done.stdout


def test_plots_diff_has_error_bars(clone):
    specs = json.loads(clone.run("dvc", "plots", "diff", "main", "skilled", "--json"))
    (plot,) = specs["data"]["Accuracy"]
    content = json.loads(plot["content"]) if isinstance(plot["content"], str) else plot["content"]
    assert "<DVC_METRIC" not in json.dumps(content)
    rows = content["data"]["values"]
    assert [(row["rev"], row["label"]) for row in rows] == [
        (revision, f"sums / {model}") for revision in ("main", "skilled") for model in ("base", "reasoning")
    ]
    for row in rows:
        assert float(row["low"]) < float(row["pass_at_1"]) < float(row["high"])
    drawn = [layer["encoding"] for layer in content["layer"]]
    assert any((one["x"]["field"], one.get("x2", {}).get("field")) == ("low", "high") for one in drawn)
    assert content["encoding"]["color"]["scale"]["domain"] == ["main", "skilled"]
    assert content["encoding"]["y"]["field"] == "label"
