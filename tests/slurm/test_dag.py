"""The pipeline on a real SLURM, with everything that happens on a cluster happening to it.

Two experiments run in one checkout. `first` is the default recipe; its SFT runs on two nodes and is requeued, a node is
lost while it samples, and what it makes must be what `dvc repro` makes. `hurt` runs beside it; its GRPO meets the time
limit, and the process that drives it is killed. Its model must be that of an uninterrupted training.
"""

import csv
import io
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.checkout import ROOT, Checkout, commands, locked, readme_commands
from tests.slurm.cluster import Cluster

DOCS = (ROOT / "docs/cluster.md").read_text()
TRIED: set[str] = set()
RUN = "python -m workflow.experiment"
PROFILE = "workflow/profiles/slurm/config.yaml"
ONE = "processes: 1\nthreads: 1\naccelerate: ddp\ncheckpoint_minutes: 0.02\n"
SHARED = (
    "tokens_per_device: {sft: 16384, grpo: 32768}\n"
    "trainer: {use_cpu: true, dataloader_pin_memory: false}\n"
    "environment: {OMP_NUM_THREADS: '1', VLLM_CPU_OMP_THREADS_BIND: nobind, VLLM_ENABLE_V1_MULTIPROCESSING: '0'}\n"
    "vllm: {enforce_eager: true, kv_cache_memory_bytes: 1073741824, enable_chunked_prefill: false}\n"
    "generation: {chunk: 512, ahead: 0}\n"
)
# A training of a minute: SLURM looks at time limits every half. By length every completion earns another reward, so an
# untrained model learns something, too.
HURT = (
    "~sft.cold_start grpo.reasoning.start_from=base generate.models=[reasoning] +grpo.reasoning.rewards.cosine=1.0 "
    "grpo.reasoning.trainer.learning_rate=1e-6 "
    "grpo.reasoning.trainer.max_steps=300 grpo.reasoning.held_out=0 grpo.reasoning.trainer.eval_strategy=no"
)


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout on the login node, with the profile adapted to this cluster as docs/cluster.md says."""
    os.environ.update(cluster.environment)
    checkout = Checkout(tmp_path_factory.mktemp("site"))
    hardware = checkout.folder / "workflow/hardware"
    (hardware / "one_core.yaml").write_text(ONE + SHARED)
    (hardware / "two_nodes.yaml").write_text("nodes: 2\n" + ONE + SHARED)
    file = checkout.folder / PROFILE
    profile = yaml.safe_load(file.read_text())
    profile |= {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 1, "jobs": 8}
    profile["default-resources"] |= {"mem_mb": 4000, "cpus_per_task": 2, "slurm_extra": "'--signal=TERM@60'"}
    for rule, resources in profile["set-resources"].items():
        resources |= {"mem_mb": 8000, "cpus_per_task": 2}
        if rule in ("sft", "grpo", "generate"):
            resources["hardware"] = "cpu"
    hurt = yaml.safe_load(yaml.safe_dump(profile))
    for rule in ("sft", "grpo", "generate"):
        hurt["set-resources"][rule]["hardware"] = "one_core"
    del profile["set-resources"]["sft"]["gpu"]
    profile["set-resources"]["sft"] |= {"mpi": True, "nodes": 2, "tasks": 2, "hardware": "two_nodes"}
    file.write_text(yaml.safe_dump(profile))
    other = checkout.folder / "workflow/profiles/hurt/config.yaml"
    other.parent.mkdir()
    other.write_text(yaml.safe_dump(hurt))
    checkout.commit("our cluster")
    return checkout


def documented(start: str) -> str:
    """The command of docs/cluster.md that starts with these words; it counts as tried."""
    found = [command for command in commands(DOCS) if command.startswith(start)]
    assert found, f"docs/cluster.md has no command {start!r}"
    TRIED.add(found[0])
    return found[0]


class Started:
    """An experiment that is followed in the background."""

    def __init__(self, site: Checkout, arguments: str, name: str) -> None:
        self.site, self.name = site, name
        self.clone = site.folder / ".scratch/experiments" / name
        self.output = site.folder.parent / f"{name}.log"
        self.process = site.begin(f"{RUN} run {arguments}", self.output)

    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, what: str, found: Callable[[], Any], timeout: float = 900) -> Any:
        """What a function returns when it finds something."""
        until = time.monotonic() + timeout
        while not (there := found()):
            log = self.clone / ".scratch/driver.log"
            assert time.monotonic() < until, f"{what} did not happen in {timeout} s\n{log.read_text()[-6000:]}"
            assert self.process.poll() in (None, 0), self.said()
            time.sleep(0.2)
        return there

    def logged(self, stage: str) -> str:
        file = self.clone / f".scratch/logs/{stage}.log"
        return file.read_text() if file.is_file() else ""

    def job(self, cluster: Cluster, stage: str) -> str | None:
        """The SLURM job that runs a stage now."""
        for number, job in cluster.jobs().items():
            ours = job["comment"].endswith(f"_wildcards_{stage}") and job["name"].startswith(f"{self.name}_")
            if ours and job["state"] == "RUNNING":
                return number
        return None


@pytest.fixture(scope="module")
def finished(site: Checkout, cluster: Cluster) -> dict[str, Started]:
    """Both experiments, begun together, hurt, and finished; what was done to them is in their timeline."""
    documented("python -m workflow.experiment run first")
    first = Started(site, "first --profile slurm", "first")
    sets = " ".join(f"-S {override}" for override in HURT.split())
    hurt = Started(site, f"hurt --profile hurt {sets}", "hurt")
    log: list[str] = []

    def note(text: str) -> None:
        log.append(f"{time.strftime('%H:%M:%S')} {text}")

    # In the middle of SFT, with a checkpoint behind it: back to the queue.
    first.wait_for("a checkpoint of sft", lambda: list(first.clone.glob(".scratch/checkpoints/*/*/manifest.json")))
    job = first.job(cluster, "sft@cold_start")
    assert job is not None
    cluster.run(f"scontrol requeue {job}")
    note(f"first: sft, job {job}, was requeued at: {last(first.logged('sft@cold_start'))}")
    first.wait_for("the second attempt of sft", lambda: "going on" in first.logged("sft@cold_start"))
    note(f"first: {last(first.logged('sft@cold_start'), 'going on')}")

    # In the middle of GRPO: the time limit.
    hurt.wait_for("grpo", lambda: re.search(r"grpo reasoning: \d+/300", hurt.logged("grpo@reasoning")))
    job = hurt.job(cluster, "grpo@reasoning")
    assert job is not None
    cluster.run(f"scontrol update JobId={job} EndTime=now+50")
    hurt.wait_for("the stop of grpo", lambda: (hurt.clone / ".scratch/logs/grpo@reasoning/2.log").is_file())
    cluster.run(f"scontrol update JobId={job} TimeLimit=30")  # what we changed stays with the job
    said = (hurt.clone / ".scratch/logs/grpo@reasoning/1.log").read_text()
    assert "was stopped at step" in said
    note(f"hurt: grpo, job {job}, met its time limit: {last(said, 'stopped')}")
    assert restarts(cluster, job) == 1

    # The login node restarts: nothing that drives the experiment is left, the job goes on.
    driver = int((hurt.clone / ".scratch/driver.lock").read_text().split()[1])
    for process in [*psutil.Process(driver).children(recursive=True), psutil.Process(driver)]:
        process.send_signal(signal.SIGKILL)
    hurt.process.wait(30)
    note("hurt: the driver and Snakemake were killed")
    assert cluster.jobs()[job]["state"] in ("RUNNING", "PENDING")
    hurt.process = site.begin(f"{RUN} continue hurt", hurt.output)

    # A node is lost while it samples.
    job = first.wait_for("sampling", lambda: sampling(first, cluster))
    lost = cluster.jobs()[job]
    cluster.node_down(lost["node"])
    note(f"first: node {lost['node']} of job {job} ({lost['comment']}) was set down")
    first.wait_for("its second attempt", lambda: cluster.jobs()[job]["state"] != "PENDING" and restarts(cluster, job))
    assert cluster.jobs()[job]["node"] != lost["node"]
    cluster.node_up(lost["node"])

    for experiment in (first, hurt):
        experiment.wait_for("the end", lambda one=experiment: one.process.poll() is not None)
        assert experiment.process.returncode == 0, experiment.said()
    assert "going on" in (hurt.clone / ".scratch/logs/grpo@reasoning/2.log").read_text()
    note(f"hurt: {last(hurt.logged('grpo@reasoning'), 'going on')}")
    print("\n".join(log))
    return {"first": first, "hurt": hurt}


def sampling(experiment: Started, cluster: Cluster) -> str | None:
    """A job of the stage generate that has begun its work."""
    for model in ("base", "cold_start", "reasoning"):
        job = experiment.job(cluster, f"generate@{model}-arithmetic")
        if job and "Running stage" in experiment.logged(f"generate@{model}-arithmetic"):
            return job
    return None


def restarts(cluster: Cluster, job: str) -> int:
    return cluster.jobs()[job]["restarts"]


def last(log: str, word: str = ": ") -> str:
    return next((line for line in reversed(log.splitlines()) if word in line), "nothing")


def test_the_lock_of_dvc_repro(finished: dict[str, Started], trained: Checkout) -> None:
    ours = locked((finished["first"].clone / "dvc.lock").read_text())
    assert ours == locked(trained.run("git show HEAD:dvc.lock"))
    assert len(ours) == 17


def test_sft_ran_on_two_nodes(finished: dict[str, Started], cluster: Cluster) -> None:
    ours = [job for job in cluster.jobs().values() if job["name"].startswith("first_")]
    (job,) = [job for job in ours if job["comment"] == "rule_sft_wildcards_sft@cold_start"]
    assert re.fullmatch(r"n\[[123][-,][123]\]", job["node"])
    facts = yaml.safe_load((finished["first"].clone / "data/logs/sft/cold_start/stage.json").read_text())
    assert (facts["devices"], facts["hardware"]) == (2, "two_nodes")


def test_an_interrupted_training_gives_the_model_of_one_that_was_not(
    finished: dict[str, Started], tmp_path: Path
) -> None:
    clone = finished["hurt"].clone
    again = Checkout.in_folder(clone)
    shutil.rmtree(clone / ".scratch/checkpoints", ignore_errors=True)
    again.run(
        "HARDWARE=one_core python -m workflow.launch grpo reasoning --model data/models/base "
        f"--dataset data/prepared/problems.parquet --output {tmp_path}/reasoning --log {tmp_path}/log"
    )
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (clone / "data/models/reasoning" / file).read_bytes() == (tmp_path / "reasoning" / file).read_bytes()
    assert (clone / "data/models/reasoning/model.safetensors").read_bytes() != (
        clone / "data/models/base/model.safetensors"
    ).read_bytes()
    history = clone / "data/logs/grpo/reasoning/history.csv"
    assert history.read_bytes() == (tmp_path / "log/history.csv").read_bytes()


def test_results_are_experiments(finished: dict[str, Started], site: Checkout) -> None:
    rows = list(csv.DictReader(io.StringIO(site.run("dvc exp show --csv 2>/dev/null"))))
    assert {row["Experiment"] for row in rows if row["Experiment"]} == {"first", "hurt"}
    assert all(row["arithmetic.reasoning"] for row in rows if row["Experiment"])
    assert "first" in site.run(documented("dvc exp show"))
    listed = site.run(documented(f"{RUN} list"))
    assert re.search(r"^first +saved +17/17 ", listed, re.MULTILINE), listed
    status = site.run(documented(f"{RUN} status first"))
    assert re.search(r"^sft@cold_start +done +2 +\d+ +n", status, re.MULTILINE), status
    site.run(documented("dvc exp apply first"))
    assert (site.folder / "data/report/report.html").is_file()
    assert "up to date" in site.run("dvc status")


def test_the_report_of_snakemake_has_the_results(finished: dict[str, Started], site: Checkout) -> None:
    site.run(documented("python -m workflow.stamps"))
    site.run(documented("snakemake results --cores 1"))
    site.run(documented("snakemake results --report"))
    page = (site.folder / "cluster.html").read_text()
    assert "report.html" in page and "Results" in page


def test_what_is_done_costs_no_job(finished: dict[str, Started], site: Checkout, cluster: Cluster) -> None:
    before = set(cluster.jobs())
    assert "Nothing to be done" in site.run(
        documented("snakemake --profile workflow/profiles/slurm --dry-run") + " 2>&1"
    )
    command = next(command for command in readme_commands() if command.startswith(f"{RUN} run mine"))
    site.run(command)
    assert set(cluster.jobs()) == before


def test_a_sweep_is_stopped_taken_up_and_removed(
    finished: dict[str, Started], site: Checkout, cluster: Cluster
) -> None:
    """Its second experiment is `first` again, and costs no job; its first one shares all but GRPO with it."""
    before = set(cluster.jobs())
    site.run(documented(f"{RUN} run lr"))
    clone = site.folder / ".scratch/experiments/lr-1"
    status, until = documented(f"{RUN} status lr-1"), time.monotonic() + 900
    while not re.search(r"^grpo@reasoning +running", said := site.run(status), re.MULTILINE):
        assert time.monotonic() < until, said
        time.sleep(1)
    site.run(documented(f"{RUN} stop lr-1"))
    assert re.search(r"^lr-1 +stopped ", site.run(f"{RUN} list"), re.MULTILINE)
    assert not [job for job in cluster.jobs().values() if job["state"] in ("PENDING", "RUNNING")]
    assert len(set(cluster.jobs()) - before) == 1
    site.run(documented(f"{RUN} continue lr-1"))
    records = [yaml.safe_load(file.read_text()) for file in clone.glob(".scratch/jobs/*.json")]
    assert {record["stage"] for record in records if record["job"]} == {
        "grpo@reasoning",
        "generate@reasoning-arithmetic",
        "score@reasoning-arithmetic",
        "report",
    }
    site.run(documented(f"{RUN} remove lr-2"))
    rows = csv.DictReader(io.StringIO(site.run("dvc exp show --csv 2>/dev/null")))
    assert {"first", "hurt", "mine", "lr-1"} == {row["Experiment"] for row in rows if row["Experiment"]}


def test_a_job_that_fails_says_why_on_the_terminal(
    finished: dict[str, Started], site: Checkout, cluster: Cluster
) -> None:
    said = site.run(f"{RUN} run short --profile slurm -S prepare.problems.max_prompt_length=1", fails=True)
    assert "Traceback" not in said
    assert "kept 0 of 300 rows" in said
    *_, final = said.strip().splitlines()
    assert re.match(r"error: prepare@problems failed, its log is \.scratch/experiments/short/", final)
    assert "continue short" in final


@pytest.mark.parametrize(
    ("resource", "value", "reason"),
    [
        ("slurm_partition", "nowhere", "nvalid partition name specified"),
        ("gpu", 3, "Requested node configuration is not available"),
    ],
)
def test_what_slurm_refuses(site: Checkout, resource: str, value: object, reason: str, tmp_path: Path) -> None:
    profile = yaml.safe_load((site.folder / PROFILE).read_text())
    profile["set-resources"]["prepare"] = {resource: value}
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/config.yaml").write_text(yaml.safe_dump(profile))
    name = f"refused-{resource}"
    # Another seed: nothing comes from the cache.
    said = site.run(f"{RUN} run {name} --profile {tmp_path}/refused -S seed=7", fails=True)
    *_, final = said.strip().splitlines()
    assert final.startswith("error: SLURM refused a job: ")
    assert reason in final and "config.yaml" in final


def test_every_command_of_the_page_was_run(finished: dict[str, Started]) -> None:
    """But for those that are said to need a GPU, and those of the page's section on remotes (tests/e2e)."""
    shown = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]
    remotes = ("mkdir", "dvc cache dir", "dvc config", "dvc remote", "dvc push", "dvc pull", "dvc repro --pull")
    elsewhere = {command for command in commands(DOCS) if command.startswith(("source", *remotes))}
    elsewhere |= {line.split("  #")[0].strip() for line in shown if "# GPU:" in line}
    assert set(commands(DOCS)) == TRIED | elsewhere
