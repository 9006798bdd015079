"""The page of samples: what is written, and what a real browser makes of it (clicks, keys, network, hostile texts)."""

import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pandas as pd
import pytest
from websockets.sync.client import ClientConnection, connect

from workflow.pages import REASONS
from workflow.params import Params
from workflow.stage import StageError
from workflow.viewer import FILE_CHARACTERS, FILE_SAMPLES, SEARCHED, file_starts, script, write_viewer

WORKFLOW = Path(__file__).parents[2] / "workflow"
MODELS = ["base", "cold_start", "reasoning"]
TASKS = {"algebra": (1000, 2), "sums": (334, 4)}  # questions, samples of each: 10,008 with three models
REASON = ["correct", "correct", "wrong", "unparsed", "timeout", "gold_unparsed", "error"]
HOSTILE = [
    "</script><script>window.owned = 1</script>",
    '<img src="https://example.org/x.png" onerror="window.owned = 1">',
    '</pre></article><h1 id="owned">owned</h1><!-- <style>* { display: none }</style>',
    "\u2028 \u2029 \u0085 \ufeff \uffff \r\n \r \t \v",
    "\x00 \x1b[31m red \x7f",
    "\u202e right to left \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u2067",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u6570\u5b66",
    "\\u003c/script> \\ \" ' ` ${1} {{ 7 * 7 }} {% x %} &lt;b&gt; ]]> </think",
    "<think>" * 200 + "<answer>",
]
EXAMPLE = [{"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "It is <b>2</b>."}]


def make_params(models: list[str], tasks: dict[str, int]) -> Params:
    """Parameters with these models, and tasks with so many samples of a question."""
    task = {"answer": "latex", "temperature": 1, "top_p": 1, "max_tokens": 32768, "dtype": "float32"}
    prepare = {"format": "math", "tokenizer": "base", "max_prompt_length": 60, "max_length": 200}
    builtin = {"origin": "builtin", "into": "raw", "builtin": "questions"}
    phase = {"start_from": "base", "dataset": next(iter(tasks)), "global_batch_size": 8, "trainer": {}}
    return Params.model_validate(
        {
            "recipe": "a_recipe",
            "seed": 1,
            "system_prompt": None,
            "sources": {
                "base": {"into": "models", "origin": "builtin", "builtin": "qwen2"},
                **{name: {**builtin, "options": {"rows": 9}} for name in tasks},
            },
            "prepare": {name: {"source": name, **prepare} for name in tasks},
            "sft": {name: phase for name in models if name != "base"},
            "grpo": {},
            "generate": {"models": models},
            "tasks": {name: {**task, "n_samples": samples} for name, samples in tasks.items()},
        }
    )


def completion(rng: random.Random, hostile: str) -> str:
    """In the taught format, with the answer alone, cut off in the thought, or empty."""
    thought = "Step by step: " + "so it goes. " * rng.randint(0, 40) + hostile
    shapes = [
        f"<think>\n{thought}\n</think>\n<answer>\n{hostile}\\boxed{{4}}\n</answer>",
        f"{thought}</think>  \n\nThe answer is 4, {hostile}",
        f"<think>\n{thought}",
        f"<think>\n{thought}\n</think>\n<think>{hostile}</think>",
        "",
    ]
    return rng.choices(shapes, [10, 4, 4, 2, 1])[0]


def write_run(root: Path, models: list[str], tasks: dict[str, tuple[int, int]]) -> pd.DataFrame:
    """Questions, samples and verdicts as the stages write them; all of them as one table, in the order of the page."""
    rng = random.Random(7)
    (root / "prepared").mkdir(parents=True)
    rows = []
    for task, (questions, samples) in tasks.items():
        ids = [f"{task}-{n:06d}" for n in range(questions)]
        texts = [f"What is {n} plus {rng.randint(0, 99)}? {rng.choice(HOSTILE)}" for n in range(questions)]
        texts[7] += " needle" + "." * SEARCHED + "hay"
        prompts = [
            [{"role": "system", "content": HOSTILE[0]}, *(EXAMPLE if n == 0 else []), {"role": "user", "content": text}]
            for n, text in enumerate(texts)
        ]
        golds = [HOSTILE[1] if n == 3 else f"${n}$" for n in range(questions)]
        table = pd.DataFrame({"id": ids, "prompt": prompts, "completion": None, "solution": golds})
        table.to_parquet(root / "prepared" / f"{task}.parquet")
        for n, (id_, text) in enumerate(zip(ids, texts, strict=True)):
            for model in models:
                for sample in range(samples):
                    reason = rng.choice(REASON)
                    written = completion(rng, rng.choice(HOSTILE) if rng.random() < 0.3 else "")
                    if n % 100 == 50 and sample == 0:
                        written = "<think>\n" + "All work and no play. \U0001f600\n" * 5000 + written
                    rows.append(
                        {
                            "link": f"{model}/{task}/{id_}/{sample}",
                            "task": task,
                            "model": model,
                            "id": id_,
                            "question": text,
                            "sample": sample,
                            "seed": rng.randrange(2**32),
                            "completion": written,
                            "tokens": rng.randint(1, 32768),
                            "finish_reason": rng.choice(["stop", "stop", "length", "abort"]),
                            "correct": reason == "correct",
                            "strict": reason == "correct" and rng.random() < 0.7,
                            "reason": reason,
                            "extracted": "" if reason == "unparsed" else rng.choice(["4", "5", *HOSTILE])[:200],
                            "gold": golds[n],
                        }
                    )
    run = pd.DataFrame(rows)
    for (task, model), own in run.groupby(["task", "model"]):
        own = own.sample(frac=1, random_state=1)  # the order of the files is nothing to rely on
        for folder, columns in (
            ("samples", ["id", "sample", "seed", "completion", "tokens", "finish_reason"]),
            ("scores", ["id", "sample", "correct", "strict", "reason", "extracted", "gold", "tokens", "finish_reason"]),
        ):
            (root / folder / model).mkdir(parents=True, exist_ok=True)
            own[columns].to_parquet(root / folder / model / f"{task}.parquet")
    return run


# A browser

LOADED = "document.readyState === 'complete'"
SHOWN = f"{LOADED} && document.querySelector('#shown > :not(#loading)') !== null"


class Browser:
    """One tab of a headless Chromium, driven through its DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv(timeout=60))).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def run(self, expression: str) -> Any:
        """The value of an expression in JavaScript, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + 30
        while not self.run(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.01)

    def open(self, page: Path, until: str = SHOWN, **state: str) -> None:
        """Load the page anew, in a state that its link names, and wait until it shows something."""
        self.call("Page.navigate", url="about:blank")
        link = "&".join(f"{name}={quote(value)}" for name, value in state.items())
        self.call("Page.navigate", url=f"{page.as_uri()}#{link}")
        self.wait(f"location.href.startsWith({json.dumps(page.as_uri())}) && {until}")

    def click(self, selector: str) -> None:
        """The mouse's left button, on the middle of the element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoViewIfNeeded()")
        self.settle()  # a list that was scrolled is drawn anew
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
        self.settle()

    def press(self, *keys: str) -> None:
        """Keys by their names in KeyboardEvent.key."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def choose(self, name: str, value: str) -> None:
        """An option of a filter."""
        self.run(
            f"(() => {{ const select = document.getElementById({json.dumps(name)}); select.value = {json.dumps(value)};"
            " select.dispatchEvent(new Event('change', { bubbles: true })); })()"
        )
        self.settle()

    def settle(self) -> None:
        """Two frames: what was asked for is drawn, where its texts are in memory."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def text(self, selector: str) -> str | None:
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? null")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium; install Debian's package chromium")
    profile = tmp_path_factory.mktemp("profile")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--window-size=1200,800",
    ]
    quiet = ["--disable-background-networking", "--disable-component-update"]
    process = subprocess.Popen(
        [chromium, *options, *quiet, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The page of 10,008 samples, and they as a table."""
    root = tmp_path_factory.mktemp("run")
    run = write_run(root, MODELS, TASKS)
    params = make_params(MODELS, {task: samples for task, (_, samples) in TASKS.items()})
    write_viewer(params, root / "prepared", root / "samples", root / "scores", root / "report")
    return root / "report" / "samples.html", run


@pytest.fixture
def page(browser: Browser, written: tuple[Path, pd.DataFrame]) -> Iterator[Browser]:
    """The browser with the page; whatever the test does, nothing is requested or reported."""
    browser.events.clear()
    if not browser.run(f"location.href.startsWith({json.dumps(written[0].as_uri())})"):
        browser.open(written[0])
    browser.run("location.hash = ''")
    browser.wait("document.getElementById('count').textContent.startsWith('10,008 samples')")
    yield browser
    browser.settle()
    outside = [url for url in requested(browser) if not url.startswith((written[0].parent.as_uri(), "about:", "data:"))]
    assert outside == []
    assert [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")] == []


def requested(browser: Browser) -> list[str]:
    """Addresses of all that was asked for since the events were cleared."""
    events = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in events]


def listed(page: Browser) -> tuple[int, int]:
    """Numbers of samples that the page says it lists, and of correct ones among them."""
    found = re.match(r"([\d,]+) (?:of [\d,]+ )?samples?, ([\d,]+) correct", page.text("#count"))
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def names(page: Browser) -> list[str]:
    """Links of all samples in the list, in order."""
    return page.run("found.map(nameOf)")


# What is written


def test_every_sample_and_its_question_are_in_the_files_once(written):
    page, run = written
    folder = page.parent / "samples"
    index = called(folder / "index.js", "start")[0]
    ends = [*index["starts"][1:], len(run)]
    found = []
    for number, (first, end) in enumerate(zip(index["starts"], ends, strict=True)):
        own, texts = called(folder / f"{number:04d}.js", "addTexts")
        assert own == number
        assert len(texts["samples"]) == end - first <= FILE_SAMPLES
        for row, (text, extracted, seed, _) in enumerate(texts["samples"], first):
            column = {name: values[row] for name, values in index["rows"].items()}
            id_, task, _ = index["questions"][column["question"]]
            gold = texts["questions"][str(column["question"])]["gold"]
            reason, correct, _ = index["verdicts"][column["verdict"]]
            finish = index["finishes"][column["finish"]]
            name = (index["tasks"][task][0], index["models"][column["model"]], id_, column["sample"])
            numbers = (seed, text, column["tokens"], finish, correct, bool(column["strict"]), reason, extracted, gold)
            found.append(name + numbers)
    columns = run.columns.drop(["link", "question"])
    assert pd.DataFrame(found, columns=columns).equals(run[columns])
    assert len(list(folder.iterdir())) == len(ends) + 2


def called(file: Path, function: str) -> list[Any]:
    """The arguments in a file that calls a function, read as JSON."""
    text = file.read_bytes().decode("ascii")
    assert "<" not in text
    return json.loads("[" + re.fullmatch(rf"{function}\((.*)\);\n", text)[1] + "]")


def test_long_completions_do_not_lie_in_one_file():
    assert file_starts([]) == [0]
    assert file_starts([10] * 1000) == [0, FILE_SAMPLES, 2 * FILE_SAMPLES]
    assert file_starts([30_000] * 100) == [0, 34, 68]
    assert file_starts([5, FILE_CHARACTERS, 5, 2 * FILE_CHARACTERS, 5]) == [0, 2, 4]


def test_a_lone_surrogate_is_written_as_an_escape():
    assert script("f", 1, {"a": "\ud800</script>"}) == 'f(1,{"a":"\\ud800\\u003c/script>"});\n'


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a run of two models and 8 questions."""
    write_run(tmp_path, MODELS[:2], {"sums": (8, 2)})
    return tmp_path


def write_small(root: Path) -> dict[str, bytes]:
    """Write the page of the small run, and read all its files."""
    params = make_params(MODELS[:2], {"sums": 2})
    write_viewer(params, root / "prepared", root / "samples", root / "scores", root / "report")
    return {str(file.relative_to(root)): file.read_bytes() for file in (root / "report").rglob("*.*")}


def test_equal_runs_give_equal_files_and_old_ones_go(small):
    first = write_small(small)
    (small / "report/samples/0099.js").write_text("old")
    assert write_small(small) == first
    files = ["samples.html", "samples/0000.js", "samples/index.js", "samples/viewer.js"]
    assert sorted(first) == [f"report/{file}" for file in files]


def spoil(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(file)).to_parquet(file)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scores/base", lambda rows: rows[1:], "scores/base/sums.parquet has no sample"),
        ("samples/base", lambda rows: rows[1:], "samples/base/sums.parquet has no sample"),
        ("samples/base", lambda rows: pd.concat([rows, rows[:1]]), "samples/base/sums.parquet has sample .* twice"),
        ("scores/base", lambda rows: pd.concat([rows, rows[:1]]), "scores/base/sums.parquet has sample .* twice"),
        ("prepared", lambda rows: rows[1:], "sums-000000 is no question of sums"),
        ("scores/base", lambda rows: rows.assign(gold="5"), "sums-000000 was judged by another gold than is in"),
    ],
)
def test_files_that_do_not_belong_together_are_an_error(small, file, change, message):
    spoil(small / file / "sums.parquet", change)
    with pytest.raises(StageError, match=message):
        write_small(small)


def test_a_missing_file_is_an_error_and_the_old_page_stays(small):
    before = write_small(small)
    (small / "scores/base/sums.parquet").unlink()
    with pytest.raises(StageError, match=r"scores/base/sums\.parquet does not exist"):
        write_small(small)
    assert (small / "report/samples.html").read_bytes() == before["report/samples.html"]
    assert (small / "report/samples/0000.js").is_file()


def test_the_page_looks_like_the_report():
    """Colours and fonts are the same in both templates."""
    blocks = [
        re.search(r":root \{.*?--mono.*?(?=\* \{ box-sizing)", (WORKFLOW / file).read_text(), re.DOTALL)[0]
        for file in ("viewer.html.jinja", "report.html.jinja")
    ]
    assert blocks[0] == blocks[1]


# What a browser shows


def test_all_texts_reach_the_page_unchanged(page, written):
    run = written[1]
    texts = page.run(
        "Promise.all(index.rows.question.map((_, row) => sampleOf(row))).then((all) => all.map((one) =>"
        " [nameOf(one.row), one.thoughts + one.answer, one.extracted, one.gold, one.seed]))"
    )
    assert texts == [[row.link, row.completion, row.extracted, row.gold, row.seed] for row in run.itertuples()]


def some(run: pd.DataFrame) -> pd.DataFrame:
    """Samples with every hostile text in every place, the longest, an empty one, and each reason."""
    chosen = [run["completion"].str.len().nlargest(2).index, run.index[run["completion"] == ""][:1], run.index[:1]]
    chosen += [run.index[run["completion"].str.contains(text, regex=False)][:3] for text in HOSTILE]
    chosen += [run.index[run["extracted"] == text][:1] for text in HOSTILE]
    chosen += [run.index[run["reason"] == reason][:1] for reason in REASON] + [run.index[run["gold"] == HOSTILE[1]][:1]]
    return run.loc[sorted(set().union(*chosen))]


def test_what_is_shown_is_what_was_written(page, written):
    chosen = some(written[1])
    assert len(chosen) > 40
    for row in chosen.itertuples():
        page.run(f"location.hash = 'at=' + encodeURIComponent({json.dumps(row.link)})")
        page.wait(f"document.querySelector('#shown > article')?.dataset.at === {json.dumps(row.link)}")
        assert (page.text("#thoughts") or "") + (page.text("#answer") or "") == row.completion
        assert (page.text("#answer") or "").strip() == row.completion.rsplit("</think>", 1)[-1].strip()
        assert page.text("#extracted") == (row.extracted or "nothing")
        assert page.text("#gold") == row.gold
        assert page.text("#question").endswith(row.question)
        facts = "[...document.querySelectorAll('.facts div')].map((one) => [...one.children].map((e) => e.textContent))"
        assert dict(page.run(facts)) == {
            "Model": row.model,
            "Task": row.task,
            "Question": row.id,
            "Sample": str(row.sample),
            "Tokens": f"{row.tokens:,}, limit 32,768",
            "Finish reason": row.finish_reason,
            "Strict": "yes" if row.strict else "no",
            "Seed": str(row.seed),
        }
        assert page.text("h2").startswith("\u2713 Correct" if row.correct else "\u2717 ")
        assert REASONS[row.reason] in page.text("h2")
    assert page.run("window.owned ?? document.title") == "a_recipe \u00b7 samples"
    elements = set(page.run("[...document.querySelectorAll('*')].map((one) => one.localName)"))
    assert elements <= ELEMENTS
    assert page.run("document.querySelectorAll('h1, script').length") == 3


ELEMENTS = {"html", "head", "meta", "link", "title", "style", "script", "body", "header", "main", "section", "article"}
ELEMENTS |= {
    "h1",
    "h2",
    "h3",
    "p",
    "div",
    "span",
    "small",
    "kbd",
    "b",
    "a",
    "pre",
    "dl",
    "dt",
    "dd",
    "details",
    "summary",
}
ELEMENTS |= {"form", "label", "input", "select", "option", "button"}


def solved(run: pd.DataFrame, model: str) -> pd.Series:
    """For each row the share of right samples of one model on its question."""
    own = run[run["model"] == model].groupby("id")["correct"].mean()
    return run["id"].map(own)


FILTERS = [
    ({}, lambda run: run["id"] != ""),
    ({"task": "sums"}, lambda run: run["task"] == "sums"),
    ({"model": "cold_start"}, lambda run: run["model"] == "cold_start"),
    ({"verdict": "correct"}, lambda run: run["correct"]),
    ({"verdict": "incorrect"}, lambda run: ~run["correct"]),
    *[({"verdict": reason}, lambda run, reason=reason: run["reason"] == reason) for reason in REASON[2:]],
    ({"finish": "length"}, lambda run: run["finish_reason"] == "length"),
    ({"strict": "yes"}, lambda run: run["strict"]),
    ({"strict": "no", "verdict": "correct"}, lambda run: run["correct"] & ~run["strict"]),
    ({"q": "algebra-00099"}, lambda run: run["id"].str.startswith("algebra-00099")),
    ({"q": " Plus  NEEDLE 7 "}, lambda run: run["question"].str.contains("needle")),
    ({"q": "hay"}, lambda run: run["id"] == "none"),  # beyond what is searched
    ({"q": "<script>"}, lambda run: run["question"].str.contains("<script>")),
    ({"change": "won/base/cold_start"}, lambda run: solved(run, "cold_start") > solved(run, "base")),
    ({"change": "lost/cold_start/reasoning"}, lambda run: solved(run, "reasoning") < solved(run, "cold_start")),
    (
        {"task": "algebra", "model": "base", "verdict": "wrong", "finish": "stop", "q": "rtl is 1"},
        lambda run: run["id"] == "none",
    ),
    (
        {"task": "algebra", "model": "base", "verdict": "wrong", "finish": "stop", "strict": "no", "q": "right what"},
        lambda run: (
            (run["task"] == "algebra")
            & (run["model"] == "base")
            & (run["reason"] == "wrong")
            & (run["finish_reason"] == "stop")
            & run["question"].str.contains("right")
        ),
    ),
]


@pytest.mark.parametrize(("state", "wanted"), FILTERS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_filters_leave_what_pandas_leaves(page, written, state, wanted):
    """By choosing and typing, and again by the link that comes of it."""
    rows = written[1][wanted(written[1])]
    for name, value in state.items():
        if name == "q":
            page.click("#q")
            page.call("Input.insertText", text=value)
        else:
            page.choose(name, value)
    assert listed(page) == (len(rows), rows["correct"].sum())
    assert names(page) == rows["link"].tolist()
    if len(rows):
        page.wait(f"document.querySelector('#shown > article')?.dataset.at === {json.dumps(rows.iloc[0].link)}")
    else:
        assert page.text("#shown").startswith("No sample passes these filters")
    assert dict(page.run("[...new URLSearchParams(location.hash.slice(1))]")) == state
    if state:
        page.click("#clear")
        assert listed(page)[0] == len(written[1])
        assert page.run("location.hash") == ""


def test_a_link_opens_what_it_was_copied_from(page, written):
    page.choose("model", "reasoning")
    page.choose("sort", "most")
    page.click("#q")
    page.call("Input.insertText", text="& </script> #1%+")
    assert names(page) == []
    page.run("byId('q').select()")
    page.call("Input.insertText", text="</script>")
    page.press("Enter", "j", "j", "c")
    page.wait("document.querySelector('.columns') !== null")
    state = "[location.hash, found, current, byId('detail').textContent, byId('q').value, byId('model').value]"
    before = page.run(state)
    assert len(before[1]) > 10
    page.call("Page.navigate", url="about:blank")
    page.call("Page.navigate", url=f"{written[0].as_uri()}{before[0]}")
    page.wait(SHOWN)
    assert page.run(state) == before
    folder = written[0].parent.as_uri()
    assert {f"{folder}/samples.html", f"{folder}/samples/index.js"} < {url.split("#")[0] for url in requested(page)}
    assert len(requested(page)) < 8  # a page, two scripts and the texts of what is shown


def test_options_tell_how_many_samples_they_would_leave(page, written):
    page.choose("model", "reasoning")
    page.choose("verdict", "wrong")
    rows = written[1]
    wrong, own = rows[rows["reason"] == "wrong"], rows[rows["model"] == "reasoning"]
    options = "[...document.getElementById({}).options].slice(1).map((option) => option.textContent)"
    counts = wrong["model"].value_counts()
    assert page.run(options.format("'model'")) == [
        f"base ({counts['base']})",
        f"cold_start ({counts['cold_start']})",
        "reasoning",
    ]
    reasons = own["reason"].value_counts()
    right = reasons.pop("correct")
    assert page.run(options.format("'verdict'")) == [
        f"correct ({right:,})",
        f"not correct ({reasons.sum():,})",
        *(
            ("wrong" if name == "wrong" else f"{name.replace('_', ' ')} ({reasons[name]})")
            for name in sorted(reasons.index)
        ),
    ]


@pytest.mark.parametrize(
    ("order", "by"),
    [
        ("fewest", lambda run: run.sort_values("tokens", kind="stable")),
        ("most", lambda run: run.sort_values("tokens", kind="stable", ascending=False)),
        (
            "hardest",
            lambda run: run.assign(ease=sum(solved(run, model) for model in MODELS)).sort_values("ease", kind="stable"),
        ),
    ],
)
def test_orders(page, written, order, by):
    page.choose("sort", order)
    assert names(page) == by(written[1])["link"].tolist()


def test_keys_and_clicks(page, written):
    run = written[1].reset_index(drop=True)
    shown = "document.querySelector('#shown > article').dataset.at"
    selected = "document.querySelector('.row[aria-selected=true]').id"

    def at(row: int) -> None:
        page.wait(f"{shown} === {json.dumps(run.iloc[row].link)}")
        assert page.run(selected) == f"row-{row}"

    at(0)
    page.press("j", "ArrowDown", "j")
    at(3)
    page.press("k", "ArrowUp")
    at(1)
    page.click("#next")
    page.click("#next")
    page.click("#previous")
    at(2)
    page.click("#row-14")  # below what is in view
    at(14)
    page.press("End")
    at(len(run) - 1)
    page.press("j")
    at(len(run) - 1)
    page.run("document.getElementById('list').scrollTop = 300000")
    page.settle()
    assert page.run("document.querySelectorAll('.row').length") < 50
    far = 300_000 // 54 + 3
    page.click(f"#row-{far}")
    at(far)

    page.press("/")
    assert page.run("document.activeElement.id") == "q"
    page.press("j", "k", "/")
    assert page.run("document.activeElement.value") == "jk/"
    page.run("document.activeElement.select()")
    page.call("Input.insertText", text="sums-000300")
    page.press("Enter", "j")
    chosen = run[run["id"] == "sums-000300"]
    assert names(page) == chosen["link"].tolist()
    at(chosen.index[1])


def test_texts_that_come_late_do_not_replace_what_was_asked_for_since(page, written):
    page.open(written[0])
    page.run("openRow(9000); openRow(1)")
    page.run("Promise.all(files.values())")
    page.settle()
    assert page.run("files.size") == 2
    assert page.text("#gold") == written[1].iloc[1].gold != written[1].iloc[9000].gold


def test_samples_of_one_question_side_by_side(page, written):
    run = written[1]
    rows = run[run["id"] == "sums-000100"]
    assert rows["completion"].str.contains("</think>").any()
    page.open(written[0], q="sums-00010", at=rows.iloc[5].link)
    page.click("#compare")
    page.wait("document.querySelector('.columns') !== null")
    columns = page.run(
        "[...document.querySelectorAll('.columns section')].map((one) => [one.querySelector('h3').textContent,"
        " [...one.querySelectorAll('.card > pre.text, .card > .none')].map((text) => text.textContent)])"
    )
    for (title, answers), model in zip(columns, MODELS, strict=True):
        own = rows[rows["model"] == model]
        mean = f"{int(own['tokens'].mean() + 0.5):,} tokens on average"
        assert title == f"{model}{own['correct'].sum()} of 4 correct, {mean}"
        ends = [text.rsplit("</think>", 1)[-1].strip() or "empty" for text in own["completion"]]
        assert [answer.strip() for answer in answers] == ends
    assert page.text("#gold") == "$100$"

    folded = page.run("[...document.querySelectorAll('.card details')].length")
    assert folded == rows["completion"].str.contains("</think>").sum()
    page.click(".card details summary")
    page.wait("document.querySelector('.card details pre') !== null")
    with_thoughts = rows[rows["completion"].str.contains("</think>")].iloc[0]["completion"]
    assert with_thoughts.startswith(page.text(".card details pre"))

    page.press("j")  # the next question
    page.wait("document.querySelector('h3 small').textContent === 'sums-000101'")
    page.press("k", "k")
    page.wait("document.querySelector('h3 small').textContent === 'sums-000100'")
    page.click("section[aria-label=reasoning] .card:nth-of-type(3) button")
    last = rows[rows["model"] == "reasoning"].iloc[2]
    page.wait(f"document.querySelector('#shown > article').dataset.at === {json.dumps(last.link)}")
    assert page.text(".columns") is None


def test_thoughts_stay_folded(page, written):
    texts = written[1]["completion"].str
    long = written[1][texts.startswith("<think>\nAll work") & texts.contains("</think>")].iloc[0]
    page.open(written[0], at=long.link)
    size = "document.getElementById('thoughts').clientHeight"
    page.settle()
    assert page.text(".more:not([hidden])") == "Show in full"
    assert page.run(size) < 400
    page.click(".more:not([hidden])")
    assert page.run(size) > 10_000
    page.click("#detail details:not(.fold) > summary")
    page.wait("new URLSearchParams(location.hash.slice(1)).get('fold') === '1'")
    page.press("j")
    page.press("k")
    page.wait(f"document.querySelector('#shown > article').dataset.at === {json.dumps(long.link)}")
    assert not page.run("document.querySelector('#detail details:not(.fold)').open")
    page.open(written[0], at=long.link)
    assert page.run("document.querySelector('#detail details:not(.fold)').open")


def test_a_narrow_window_shows_the_list_or_a_sample(page, written):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    try:
        page.open(written[0])
        visible = "['browse', 'detail'].map((id) => document.getElementById(id).checkVisibility())"
        assert page.run(visible) == [True, False]
        page.click(".row:nth-of-type(4)")
        assert page.run(visible) == [False, True]
        assert page.run("document.documentElement.scrollWidth") == 390
        page.run("history.back()")
        page.wait("document.getElementById('browse').checkVisibility()")
        page.click(".row:nth-of-type(4)")
        page.click("#back")
        assert page.run(visible) == [True, False]
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"at": "base/sums/sums-999999/0"},
            "This link names the sample base/sums/sums-999999/0, which is not in this run.",
        ),
        ({"at": "<img src=x>"}, "This link names the sample <img src=x>, which is not in this run."),
        ({"model": "gone"}, "No sample passes these filters."),
        ({"change": "won/base/gone"}, "No sample passes these filters."),
    ],
)
def test_a_link_to_what_is_not_there(page, written, state, message):
    page.open(written[0], **state)
    assert page.text("#shown") == message


def test_a_file_that_is_lost_is_named(browser, written, tmp_path):
    copy = shutil.copytree(written[0].parent, tmp_path / "report")
    (copy / "samples/0001.js").unlink()
    browser.open(copy / "samples.html", at=written[1].iloc[FILE_SAMPLES].link)
    assert browser.text("#shown").startswith("samples/0001.js cannot be read")
    shutil.rmtree(copy / "samples")
    browser.open(copy / "samples.html", until=LOADED)
    assert "the folder samples/ does not lie beside this page" in browser.text("#shown")


def test_times(page, written, record_property):
    """Only measured, because machines differ: seen with `pytest -rP`."""
    timed = "(() => {{ const start = performance.now(); {}; return performance.now() - start; }})()"
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    page.wait("performance.getEntriesByName('first-contentful-paint').length === 1")
    times = {"first paint": page.run(paint)}
    for name, changes in {
        "model": "{ model: 'base' }",
        "search": "{ model: '', q: 'what is 7' }",
        "none": "{ q: '' }",
    }.items():
        times[f"filter {name}"] = page.run(timed.format(f"filterBy({changes}); document.body.offsetHeight"))
    times["sort"] = page.run(timed.format("go({ sort: 'most' }); document.body.offsetHeight"))
    times["next"] = page.run(timed.format("move(1); document.body.offsetHeight"))
    for name, milliseconds in times.items():
        record_property(name, milliseconds)
        print(f"{name}: {milliseconds:.1f} ms")
    assert listed(page)[0] == len(written[1])
