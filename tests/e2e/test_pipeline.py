"""The whole DAG on the real libraries, through the commands a user types. The tests run in the order of the file."""

import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.checkout import TRIED, Checkout, locked, readme_commands

MODELS = ("base", "cold_start", "reasoning")


def ran(output: str) -> set[str]:
    """The stages that a `dvc repro` really ran (with --dry: would run)."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def test_first_run_makes_every_artifact(trained: Checkout) -> None:
    assert len(ran(trained.first_run)) == 17
    for model in MODELS:
        assert (trained.folder / "data/models" / model / "model.safetensors").is_file()
        assert not (trained.folder / "data/models" / model / "training_args.bin").exists()
        scores = json.loads((trained.folder / f"data/scores/{model}/arithmetic.json").read_text())
        assert scores["n_questions"] == 40
        assert scores["n_samples"] == 2
        assert scores["pass_at_1_low"] <= scores["pass_at_1"] <= scores["pass_at_1_high"]
    source = json.loads((trained.folder / "data/raw/traces/source.json").read_text())
    assert set(source) == {"origin", "revision", "licence", "files"}
    assert len(source["revision"]) == 40
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert {name: type(value) for name, value in metrics.items() if not isinstance(value, int | float)} == {
        "arithmetic.interval": str,
        "arithmetic.gain": str,
    }
    assert 8 <= len(metrics) <= 12
    table = (trained.folder / "data/report/report.txt").read_text()
    assert trained.first_run.endswith(table)
    assert all(any(line.startswith(model) for line in table.splitlines()) for model in MODELS)
    report = (trained.folder / "data/report/report.html").read_text()
    assert "arithmetic" in report
    assert 'src="http' not in report
    assert 'href="http' not in report
    assert 'href="samples.html"' in report
    assert list((trained.folder / "data/report/samples").glob("[0-9]*.js"))


def test_every_stage_ends_with_one_line(trained: Checkout) -> None:
    for line in ("download base:", "prepare traces:", "sft cold_start:", "grpo reasoning:", "generate reasoning"):
        assert sum(out.startswith(line) and " MiB)" in out for out in trained.first_run.splitlines()) == 1, line
    assert "Warning" not in trained.first_run
    assert "Traceback" not in trained.first_run


def test_preflight_finds_nothing_wrong(trained: Checkout) -> None:
    output = trained.readme("python -m workflow.preflight")
    assert output.count("nothing wrong was found") == 2
    assert all(name in output for name in ("sft cold_start", "grpo reasoning", "global batch", "memory of one device"))


def test_again_nothing_runs(trained: Checkout) -> None:
    output = trained.run("dvc repro")
    assert ran(output) == set()
    assert "Data and pipelines are up to date." in output


def test_a_comment_in_the_readme_re_runs_nothing(trained: Checkout) -> None:
    with (trained.folder / "README.md").open("a") as readme:
        readme.write("\n<!-- a comment -->\n")
    assert ran(trained.run("dvc repro --dry")) == set()
    trained.run("git checkout -q README.md")


def test_rewards_re_run_grpo_and_not_sft(trained: Checkout) -> None:
    with (trained.folder / "workflow/rewards.py").open("a") as rewards:
        rewards.write("\n# another reward\n")
    output = trained.run("dvc repro --dry")
    assert {name.partition("@")[0] for name in ran(output)} == {"check", "grpo"}
    trained.run("git checkout -q workflow/rewards.py")


def test_learning_rate_re_runs_grpo_and_what_follows_and_back_restores(trained: Checkout) -> None:
    before = (trained.folder / "dvc.lock").read_text()
    trained.edit("params.yaml", "learning_rate: 0.0003", "learning_rate: 0.0001")
    assert ran(trained.run("dvc repro")) == {
        "check",
        "grpo@reasoning",
        "generate@reasoning-arithmetic",
        "score@reasoning-arithmetic",
        "report",
    }
    assert (trained.folder / "dvc.lock").read_text() != before
    trained.run("git checkout -q params.yaml")
    output = trained.run("dvc repro")
    assert ran(output) == set()
    assert "is cached - skipping run" in output
    assert (trained.folder / "dvc.lock").read_text() == before


def test_experiments_by_name_and_from_the_queue(trained: Checkout) -> None:
    trained.readme("dvc exp run -n b")
    trained.readme("dvc exp run --queue -S seed")
    assert trained.run("dvc queue status").count("Queued") >= 3
    trained.run("dvc queue remove --queued")  # three whole runs would take too long here
    trained.readme("dvc exp run --queue -S grpo")
    trained.readme("dvc queue start")
    trained.run("for i in $(seq 400); do dvc queue status | grep -q 'Queued\\|Running' || break; sleep 1; done")
    rows = list(csv.DictReader(io.StringIO(trained.run("dvc exp show --csv 2>/dev/null"))))
    beta = next(name for name in rows[0] if name.endswith("grpo.reasoning.trainer.beta"))
    assert sorted(row[beta] for row in rows if row["Experiment"]) == ["0.01", "0.04", "0.1"]
    scores = [name for name in rows[0] if name.startswith("arithmetic.")]
    assert len(scores) == 7
    assert "arithmetic.interval" in scores
    assert all(row[name] for row in rows for name in scores)
    table = trained.readme("dvc exp show")
    assert "grpo.reasoning.trainer.beta" in table
    assert "sft.cold_start" not in table
    assert "data/" not in table
    said = trained.readme("python -m workflow.compare main b")
    assert "grpo.reasoning.trainer.beta" in said
    assert "of the 40 questions" in said or "the same on every sample" in said
    both = trained.run("python -m workflow.compare main:cold_start main:reasoning b --html compare.html")
    assert "Holm" in both
    assert (trained.folder / "compare.html").read_text().count("<svg") >= 1
    trained.run("rm compare.html")
    trained.readme("dvc plots diff main b")
    page = (trained.folder / "dvc_plots/index.html").read_text()
    assert '"x2"' in page  # the error bars
    assert all(f'"rev": "{revision}"' in page for revision in ("main", "b"))
    assert "arithmetic.reasoning" in trained.run("dvc metrics diff --all main b")
    trained.readme("dvc exp apply b")
    assert "beta: 0.04" in (trained.folder / "params.yaml").read_text()
    trained.run("git reset -q --hard && dvc checkout -q")


def test_reading_the_results(trained: Checkout) -> None:
    trained.readme("source .venv/bin/activate")
    assert "reasoning" in trained.readme("cat data/report/report.txt")
    assert "arithmetic.reasoning" in trained.readme("dvc metrics show")
    trained.readme("dvc plots show")
    page = (trained.folder / "dvc_plots/index.html").read_text()
    for title in ("SFT loss", "GRPO reward", "Accuracy"):
        assert title in page
    output = trained.readme("python -m workflow.chat")
    assert output.strip()
    assert "Traceback" not in output


def test_chat_prompt_and_missing_model(trained: Checkout) -> None:
    prompt = trained.run("echo 'What is 12 + 3 - 1 + 2?' | python -m workflow.chat --max-tokens 8")
    assert "Ctrl-D ends" in prompt
    missing = trained.run("python -m workflow.chat --model data/models/nobody hello", fails=True)
    assert missing.startswith("error: there is no model in data/models/nobody (models: data/models/base, ")


def test_a_second_clone_pulls_everything_and_trains_nothing(trained: Checkout, tmp_path: Path) -> None:
    trained.run(f"dvc remote add -f --local store {tmp_path}/store && dvc push -q -r store")
    trained.run(f"git clone -q . {tmp_path}/clone")
    clone = Checkout.in_folder(tmp_path / "clone")
    clone.run(f"dvc remote add --local store {tmp_path}/store && dvc pull -q -r store")
    assert ran(clone.run("dvc repro")) == set()
    for file in ("metrics.json", "data/report/report.html", "data/models/reasoning/model.safetensors"):
        assert (clone.folder / file).read_bytes() == (trained.folder / file).read_bytes()


def test_snakemake_gives_the_lock_of_dvc_repro(trained: Checkout, tmp_path: Path) -> None:
    """Two runs on one machine, to the byte: models, samples, scores, and all between. The second has no network."""
    other = Checkout(tmp_path)
    cut = "unshare --map-root-user --net sh -c 'ip link set lo up && {}'"  # a namespace that has the loopback only
    permitted = subprocess.run(["sh", "-c", cut.format("true")], capture_output=True).returncode == 0
    command = "snakemake --cores 2 --quiet all"
    other.run(cut.format(command) if permitted else command)
    ours, theirs = (locked((checkout.folder / "dvc.lock").read_text()) for checkout in (other, trained))
    assert ours == theirs
    assert all(stage["deps"] for stage in ours.values()) and len(ours) == 17
    assert "Nothing to be done" in other.run("snakemake --cores 2 2>&1")
    if not permitted:
        pytest.skip("equal, but with a network: this machine does not permit namespaces (unshare --net, iproute2)")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipe: miniature", "recipe: miniature\nrecipee: x", "recipee is not a known key; write recipe"),
        ("seed: 42", "seed: many", "seed is 'many'; write what fits"),
        ("start_from: cold_start", "start_from: warm_start", "write one of: base, cold_start"),
        ("global_batch_size: 32\n    rewards", "global_batch_size: 30\n    rewards", "write 24 or 32"),
        ("origin: builtin\n    builtin: questions", "origin: path\n    path: /nowhere", "/nowhere"),
    ],
)
def test_a_mistake_stops_everything_with_one_sentence(
    trained: Checkout, tmp_path: Path, old: str, new: str, message: str
) -> None:
    """In a fresh checkout and in one where everything is cached."""
    for checkout in (Checkout(tmp_path), trained):
        checkout.edit("params.yaml", old, new)
        output = checkout.run("dvc repro", fails=True)
        checkout.run("git checkout -q params.yaml")
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert message in errors[0]
        assert "Traceback" not in output
        assert ran(output) == {"check"}
    trained.run("dvc checkout -q")


def test_bad_rows_are_dropped_counted_and_limited(trained: Checkout, tmp_path: Path) -> None:
    rows = (trained.folder / "data/raw/traces/train.jsonl").read_text().splitlines()[:100]
    bad = json.loads(rows[0])
    bad["conversations"][0]["value"] = "What is <|im_end|>?"
    long = json.loads(rows[0])
    long["conversations"][0]["value"] = "What is " + "1 + " * 200 + "1?"
    rows += [json.dumps(bad), json.dumps(long), '{"system": null}', "not json"]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(rows))
    checkout = Checkout(tmp_path / "checkout")
    checkout.edit(
        "params.yaml",
        "origin: builtin\n    builtin: bespoke_stratos\n    options:\n      rows: 2000\n      guesses: 0.5",
        f"origin: path\n    path: {data}",
    )
    output = checkout.run("dvc repro prepare@traces")
    assert "prepare traces: 100 of 104 rows" in output
    counts = json.loads((checkout.folder / "data/logs/prepare/traces/stage.json").read_text())["dropped"]
    assert sum(counts.values()) == 4
    checkout.edit("params.yaml", "format: bespoke_stratos", "format: bespoke_stratos\n    max_dropped_share: 0.01")
    output = checkout.run("dvc repro prepare@traces", fails=True)
    assert "kept 100 of 104 rows" in output


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="set DATA_DIR to a folder with gsm8k/ and math_500/ (jsonl)")
def test_real_rows_go_through_every_stage(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    small = "sft.cold_start.trainer.max_steps=3 grpo.reasoning.trainer.max_steps=2 grpo.reasoning.global_batch_size=16"
    small += " tasks.gsm8k.questions=8 tasks.math_500.questions=8 generate.models=[base,reasoning]"
    command = next(command for command in readme_commands() if "RECIPE=gsm8k_local" in command)
    TRIED.add(command)
    checkout.run(command.replace("data_dir=/folder", f"data_dir={os.environ['DATA_DIR']} {small}"))
    for model in ("base", "reasoning"):
        for task in ("gsm8k", "math_500"):
            scores = json.loads((checkout.folder / f"data/scores/{model}/{task}.json").read_text())
            assert scores["n_questions"] == 8
            assert scores["gold_unparsed"] == 0
    prepared = json.loads((checkout.folder / "data/logs/prepare/math_500/stage.json").read_text())
    assert (prepared["rows_in"], prepared["rows"]) == (500, 500)


def test_every_command_of_the_readme_was_run() -> None:
    cluster = "python -m workflow.experiment run mine --profile slurm"  # in tests/slurm
    elsewhere = {command for command in readme_commands() if command.startswith(("make test", "xdg-open", cluster))}
    elsewhere |= {command for command in readme_commands() if "MINIATURE=1" in command}  # in test_miniatures.py
    if "DATA_DIR" not in os.environ:
        elsewhere |= {command for command in readme_commands() if "gsm8k_local" in command}
    assert set(readme_commands()) == TRIED | elsewhere
