"""The Snakefile draws the same DAG as dvc.yaml; checked in a copy of the working tree."""

import fcntl
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from workflow.pipeline import load_stages

ROOT = Path(__file__).parents[2]
STAMPS = ".scratch/stamps/"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")


def call(folder: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def dry_run(folder: Path, environment: dict[str, str], *targets: str) -> list[dict[str, str]]:
    """The jobs of `snakemake -n` in order: rule, input, output, wildcards, …"""
    done = call(folder, environment, "snakemake", "--dry-run", "--cores", "1", *targets)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = []
    for block in re.split(r"^(?:local)?rule ", done.stdout + done.stderr, flags=re.MULTILINE)[1:]:
        name, *lines = block.split("\n")
        fields = dict(line.strip().split(": ", 1) for line in lines if re.match(r" {4}[a-z]+: ", line))
        jobs.append({"rule": name.rstrip(":"), **fields})
    return jobs


def stamps(field: str) -> list[str]:
    """The stages whose stamps are in a field of a job."""
    return [path.removeprefix(STAMPS) for path in field.split(", ") if path.startswith(STAMPS)]


def test_one_rule_per_entry(checkout, environment):
    done = call(checkout, environment, "snakemake", "--list-rules")
    assert done.returncode == 0, done.stderr
    entries = dict.fromkeys(stage.entry for stage in load_stages(checkout).values())
    assert sorted(done.stdout.split()) == sorted([*entries, "all", "results"])


def test_jobs_are_the_stages_in_order(checkout, environment):
    stages = load_stages(checkout)
    jobs = dry_run(checkout, environment)
    assert jobs.pop()["rule"] == "all"
    order = [job["wildcards"].removeprefix("stage=") for job in jobs]
    assert sorted(order) == sorted(stages) and len(order) > 10
    for job, name in zip(jobs, order, strict=True):
        assert job["rule"] == stages[name].entry
        # A stamp is all that a job makes: Snakemake deletes what a failed job made.
        assert job["output"] == STAMPS + name
        assert sorted(stamps(job["input"])) == sorted(stages[name].upstream)
        assert all(order.index(upstream) < order.index(name) for upstream in stages[name].upstream)
        code = [path for path in job["input"].split(", ") if not path.startswith(STAMPS)]
        assert sorted(code) == sorted(stages[name].files) and all(path.startswith("workflow/") for path in code)


def test_upstream_is_what_dvc_says(checkout, monkeypatch):
    """Our reading of dvc.yaml against DVC's own graph."""
    monkeypatch.chdir(checkout)
    graph = Repo().index.graph
    theirs = {stage.addressing: {other.addressing for other in graph.successors(stage)} for stage in graph}
    assert {name: set(stage.upstream) for name, stage in load_stages().items()} == theirs


def test_parsing_reads_no_lock_file(checkout, environment):
    before = {job["output"] for job in dry_run(checkout, environment)[:-1]}
    (checkout / "dvc.lock").write_text("{garbage: [")
    assert {job["output"] for job in dry_run(checkout, environment)[:-1]} == before


def test_parsing_takes_no_lock(checkout, environment):
    with Repo(str(checkout)).lock:
        with (checkout / ".dvc/tmp/lock").open("a") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is held
        assert len(dry_run(checkout, environment)) > 10
        assert not (checkout / ".dvc/tmp/rwlock").exists()


PROFILES = sorted(file.parent.name for file in (ROOT / "workflow/profiles").glob("*/config.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_profile(checkout, environment, profile):
    """Its options are Snakemake's, its rules are the Snakefile's; on a cluster training and sampling have GPUs."""
    assert len(PROFILES) == 2
    done = call(checkout, environment, "snakemake", "--profile", f"workflow/profiles/{profile}", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = done.stdout + done.stderr
    assert "This was a dry-run" in jobs
    if profile == "slurm":
        for rule, has_gpu in {"prepare": False, "sft": True, "grpo": True, "generate": True, "score": False}.items():
            job = re.search(rf"^rule {rule}:.*?^    resources: (.*?)$", jobs, re.DOTALL | re.MULTILINE)
            assert job is not None and ("gpu=1" in job[1]) == has_gpu, rule
            assert "runtime=" in job[1] and "--signal=TERM@" in job[1]


def test_a_profile_for_a_rule_without_stages(checkout, environment):
    """R1-Zero has no SFT, and needs no profile of its own."""
    params = YAML(typ="safe").load(checkout / "params.yaml")
    params["grpo"]["reasoning"]["start_from"] = "base"
    params["generate"]["models"] = ["reasoning"]
    YAML().dump(params | {"sft": {}}, checkout / "params.yaml")
    done = call(checkout, environment, "snakemake", "--profile", "workflow/profiles/slurm", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("^rule sft:", done.stdout + done.stderr, re.MULTILINE)


def test_a_profile_for_a_rule_that_does_not_exist(checkout, environment):
    profile = checkout / "workflow/profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("  grpo: {gpu", "  gpro: {gpu"))
    done = call(checkout, environment, "snakemake", "--profile", "workflow/profiles/slurm", "--dry-run")
    assert done.returncode != 0
    assert (
        "set-resources names the rule 'gpro', which does not exist; write one of: check, download"
        in done.stdout + done.stderr
    )


def test_lint(checkout, environment):
    done = call(checkout, environment, "snakemake", "--lint")
    assert done.returncode == 0, done.stderr
    assert "Congratulations" in done.stdout + done.stderr


def test_format(checkout, environment):
    files = [file for file in ("Snakefile", "workflow/rules") if (checkout / file).exists()]
    done = call(checkout, environment, "snakefmt", "--check", *files)
    assert done.returncode == 0, done.stderr


def test_a_job_runs_the_stage_with_dvc(checkout, environment):
    name = "download@arithmetic"
    done = call(checkout, environment, "snakemake", "--cores", "1", STAMPS + name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / STAMPS / name).is_file()
    assert (checkout / "data/raw/arithmetic/source.json").is_file()
    assert "download arithmetic: " in (checkout / f".scratch/logs/{name}.log").read_text()
    assert dry_run(checkout, environment, STAMPS + name) == []
    # Snakemake leaves nothing in the output, so DVC finds it as it made it.
    status = call(checkout, environment, "dvc", "status", name)
    assert "up to date" in status.stdout, status.stdout + status.stderr

    # Another parameter runs the rule again where it is one of the stage's own.
    params = checkout / "params.yaml"
    values = YAML(typ="safe").load(params)
    values["grpo"] = {}
    values["generate"]["models"] = ["base"]
    YAML().dump(values, params)
    assert {job["rule"] for job in dry_run(checkout, environment, STAMPS + name)} == {"check", "download"}
    call(checkout, environment, "snakemake", "--cores", "1", STAMPS + "check")
    # What check makes is the same as before, so nothing else has to run.
    assert dry_run(checkout, environment, STAMPS + name) == []
    values["sources"]["arithmetic"]["options"]["rows"] += 1
    YAML().dump(values, params)
    assert [job["rule"] for job in dry_run(checkout, environment, STAMPS + name)] == ["check", "download"]


def test_stamps_of_what_is_done(checkout, environment):
    """Laid down without Snakemake's memory of a run, from the run cache too, and not where something changed."""
    name = "download@arithmetic"

    def laid() -> list[str]:
        done = call(checkout, environment, "python", "-m", "workflow.stamps")
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(file.name for file in (checkout / STAMPS).iterdir())

    assert laid() == ["check"]  # which runs here
    done = call(checkout, environment, "snakemake", "--cores", "1", STAMPS + name)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(checkout / ".snakemake")
    shutil.rmtree(checkout / "data")
    assert laid() == ["check", name]
    assert (checkout / "data/raw/arithmetic/source.json").is_file()
    assert dry_run(checkout, environment, STAMPS + name) == []
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("rows: 512", "rows: 511"))
    assert laid() == ["check"]
    assert [job["rule"] for job in dry_run(checkout, environment, STAMPS + name)] == ["download"]
    params.write_text(params.read_text().replace("rows: 511", "rows: many"))
    assert laid() == []
    assert [job["rule"] for job in dry_run(checkout, environment, STAMPS + name)] == ["check", "download"]
    params.write_text(params.read_text().replace("rows: many", "rows: 512"))
    assert laid() == ["check", name]


def test_stamps_are_not_laid_under_a_running_snakemake(checkout, environment):
    (checkout / ".snakemake/locks").mkdir(parents=True)
    (checkout / ".snakemake/locks/0.input.lock").touch()
    done = call(checkout, environment, "python", "-m", "workflow.stamps")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Snakemake runs in this folder, or was killed here;")


def test_a_job_that_fails_leaves_no_stamp(checkout, environment):
    name = "download@arithmetic"
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("seed: 42", "seed: fortytwo"))
    done = call(checkout, environment, "snakemake", "--cores", "1", STAMPS + name)
    assert done.returncode != 0
    assert not (checkout / STAMPS / "check").exists() and not (checkout / STAMPS / name).exists()
    assert "error: params.yaml: seed is 'fortytwo'" in (checkout / ".scratch/logs/check.log").read_text()
