"""workflow.experiment with real git, DVC and Snakemake, on a pipeline of two stages that cost nothing."""

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.checkout import Checkout
from workflow import experiment
from workflow.experiment import combinations, hours, last_line, print_table, progress
from workflow.stage import StageError

RUN = "python -m workflow.experiment"

PIPELINE = {
    "stages": {
        "train": {
            "foreach": "${grpo}",
            "do": {
                "cmd": "exec python stages.py train",
                "deps": ["stages.py"],
                "params": ["seed", "grpo.${key}"],
                "outs": ["data/train"],
            },
        },
        "report": {
            "cmd": "exec python stages.py report",
            "deps": ["data/train"],
            "metrics": ["metrics.json"],
            "outs": ["data/report"],
        },
    },
    "plots": [{"loss": {"x": "step", "y": {"data/report/plots/sft.csv": "loss"}}}],
}

STAGES = '''
"""Two stages: train takes as long as the file .scratch/wait is there, and cannot do seed 666."""
import json, signal, sys, time
from pathlib import Path
from workflow.params import read_params

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(75)

params = read_params()
if sys.argv[1] == "train":
    signal.signal(signal.SIGTERM, stop)
    with open(".scratch/starts", "a") as file:
        file.write("train\\n")
    step = 0
    while Path(".scratch/wait").exists():
        step += 1
        print(f"train reasoning: {step}/1000, ETA 1:40, reward 0.{step:03d}", flush=True)
        time.sleep(0.1)
    if params["seed"] == 666:
        print(*range(100), sep="\\n")
        sys.exit("error: seed is 666; write another one")
    Path("data/train").mkdir(parents=True, exist_ok=True)
    beta = params["grpo"]["reasoning"]["trainer"]["beta"]
    Path("data/train/model.txt").write_text(f"seed {params['seed']}, beta {beta}\\n")
else:
    Path("data/report/plots").mkdir(parents=True, exist_ok=True)
    Path("data/report/plots/sft.csv").write_text("step,loss\\n1,0.5\\n2,0.25\\n")
    Path("metrics.json").write_text(json.dumps({"words": len(Path("data/train/model.txt").read_text().split())}))
'''


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with the cheap pipeline, and a remote in a folder beside it."""
    checkout = Checkout(tmp_path_factory.mktemp("main") / "checkout")
    (checkout.folder / "stages.py").write_text(STAGES)
    YAML().dump(PIPELINE, checkout.folder / "dvc.yaml")
    checkout.run("dvc remote add --default store ../store && dvc remote add --local mine ../mine")
    checkout.commit("cheap pipeline")
    return checkout


def folder(main: Checkout, name: str) -> Path:
    return main.folder / ".scratch/experiments" / name


def shown(main: Checkout) -> dict[str, dict[str, str]]:
    """The rows of `dvc exp show` by experiment or branch."""
    return {row["Experiment"] or row["rev"]: row for row in csv.DictReader(io.StringIO(main.run("dvc exp show --csv")))}


def wait_for(what: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def begin_waiting(main: Checkout, name: str, seed: int) -> Path:
    """Start an experiment whose training does not end while .scratch/wait is in its clone, and see it begin."""
    # The file is there before the stage starts: it is made as soon as the clone is.
    main.run(f"({RUN} run {name} -S seed={seed} --detach) && touch .scratch/experiments/{name}/.scratch/wait")
    log = folder(main, name) / ".scratch/logs/train@reasoning/1.log"
    wait_for(lambda: log.is_file() and "train reasoning: 3/1000" in log.read_text())
    return folder(main, name)


def the_driver(clone: Path) -> psutil.Process:
    return psutil.Process(int((clone / ".scratch/driver.lock").read_text().split()[1]))


def in_clone(clone: Path, module: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if module in (process.info["cmdline"] or []) and process.info["cwd"] == str(clone)
    ]


# One that succeeds


@pytest.fixture(scope="module")
def finished(main: Checkout) -> str:
    """What `run` prints for an experiment with changes that are not committed: params.yaml, and a staged file."""
    main.edit("params.yaml", "beta: 0.0", "beta: 0.07")
    (main.folder / "new.txt").write_text("staged\n")
    (main.folder / "junk.txt").write_text("untracked\n")
    main.run("git add new.txt")
    output = main.run(f"{RUN} run one")
    main.run("git reset -q --hard && rm junk.txt")
    return output


def test_the_result_is_an_experiment_of_the_checkout(main, finished):
    assert finished.startswith("not carried over, because git does not track it: junk.txt\n")
    assert finished.endswith("take it over with: dvc exp apply one\n")
    # Who follows sees what the stages do, not what Snakemake says of it.
    assert re.search(r"stamps: 0 of 2 .*\ntrain@reasoning: attempt 1, \S+\n", finished)
    assert re.search(r"\nreport: done, 0:00:\d\d\none is saved; ", finished)
    row = shown(main)["one"]
    assert (row["words"], row["grpo.reasoning.trainer.beta"], row["seed"]) == ("4", "0.07", "42")
    assert shown(main)["main"]["words"] == "!"  # the checkout itself has no results
    # The commit is a child of the checkout's, with nothing in it that is DVC's.
    ref = main.run("git for-each-ref --format='%(refname)' 'refs/exps/*/*/one'").strip()
    assert main.run(f"git rev-parse {ref}^ main").split()[0] == main.run("git rev-parse main").strip()
    assert main.run(f"git diff --name-only main {ref}").split() == ["dvc.lock", "new.txt", "params.yaml"]
    # Remotes that are folders beside the checkout are so from the clone.
    remotes = subprocess.run(
        ["dvc", "remote", "list"], cwd=folder(main, "one"), capture_output=True, text=True, check=True
    ).stdout
    assert [Path(line.split()[1]) for line in remotes.splitlines()] == [
        main.folder.parent / "store",
        main.folder.parent / "mine",
    ]


def test_apply_restores_everything_without_running(main, finished):
    assert not (main.folder / "data/train").exists()
    main.run("dvc exp apply one")
    assert (main.folder / "data/train/model.txt").read_text() == "seed 42, beta 0.07\n"
    assert json.loads((main.folder / "metrics.json").read_text()) == {"words": 4}
    assert "up to date" in main.run("dvc status")
    # Also with a dvc.lock that git does not track, and one that differs.
    (main.folder / "dvc.lock").write_text('schema: "2.0"\nstages: {}\n')
    main.run("dvc exp apply one")
    assert "Running stage" not in main.run("dvc repro")
    main.run("git reset -q --hard && rm -rf dvc.lock metrics.json new.txt data/train data/report")


def test_a_branch_of_it_can_be_run(main, finished):
    """With `dvc exp save` it could not: the plots inside data/report were under git."""
    main.run("dvc exp branch one branch-of-one && git checkout -q branch-of-one && dvc checkout -q")
    main.edit("params.yaml", "seed: 42", "seed: 43")
    assert "Running stage 'report'" in main.run("dvc repro --force")
    main.run("git checkout -q -f main && git branch -q -D branch-of-one")
    main.run("rm -rf dvc.lock metrics.json data/train data/report")


def test_what_is_taken_or_finished(main, finished):
    assert main.run(f"{RUN} run one", fails=True).endswith(f"or remove it with: {RUN} remove one\n")
    folder(main, "left").mkdir()
    assert main.run(f"{RUN} run left", fails=True).endswith("or remove it with: rm -r .scratch/experiments/left\n")
    folder(main, "left").rmdir()
    assert "one is finished and saved; take it over with: dvc exp apply one" in main.run(
        f"{RUN} continue one", fails=True
    )
    assert re.search(r"one +saved +2/2 ", main.run(f"{RUN} list"))
    status = main.run(f"{RUN} status one")
    assert re.search(r"train@reasoning +done +1 ", status) and re.search(r"report +done +1 ", status)
    assert main.run(f"{RUN} stop one") == "nothing of one runs\n"


def test_remove(main, finished):
    """The last test that uses it."""
    kept = folder(main, "one").with_name("kept")
    folder(main, "one").rename(kept)
    # Also without its clone the name is taken.
    assert main.run(f"{RUN} run one", fails=True).endswith("or remove it with: dvc exp remove one\n")
    kept.rename(folder(main, "one"))
    output = main.run(f"{RUN} remove one")
    assert "removed the DVC experiment one (refs/exps/" in output and "removed .scratch/experiments/one" in output
    assert not list(folder(main, "one").parent.glob("one*")) and "one" not in shown(main)
    assert "there is no clone of an experiment 'one'" in main.run(f"{RUN} remove one", fails=True)


# Several


def test_a_sweep_runs_at_once_and_from_the_cache(main):
    output = main.run(f"{RUN} run s -S seed=1,2 'grpo.reasoning.trainer.beta=0.5'")
    assert "s-1: .scratch/experiments/s-1  grpo.reasoning.trainer.beta=0.5 seed=1\n" in output
    assert "s-1 | s-1 is saved" in output and "s-2 | s-2 is saved" in output
    assert {name: row["seed"] for name, row in shown(main).items() if name[:1] == "s"} == {"s-1": "1", "s-2": "2"}
    starts = [json.loads(file.read_text())["started"] for file in jobs_of(main, "train@reasoning", "s-1", "s-2")]
    ends = [json.loads(file.read_text())["ended"] for file in jobs_of(main, "report", "s-1", "s-2")]
    assert max(starts) < min(ends)
    # The same again costs no stage: the cache has it.
    again = main.run(f"{RUN} run again -S seed=1 -S grpo.reasoning.trainer.beta=0.5")
    assert "stamps: 2 of 2 stages are done; to do: nothing" in again and "Running stage" not in again
    assert shown(main)["again"]["seed"] == "1"
    assert re.search(r"train@reasoning +cached\n", main.run(f"{RUN} status again"))


def jobs_of(main: Checkout, stage: str, *names: str) -> list[Path]:
    return [folder(main, name) / f".scratch/jobs/{stage}.json" for name in names]


def test_combinations_keep_deletions(main):
    """DVC writes ~key as ~key=null where there is a sweep, which Hydra refuses."""
    assert combinations("n", ["~grpo.reasoning", "seed=1,2", "+task=[a,b]"]) == {
        "n-1": ["~grpo.reasoning", "+task=[a,b]", "seed=1"],
        "n-2": ["~grpo.reasoning", "+task=[a,b]", "seed=2"],
    }
    assert combinations("n", ["~grpo.reasoning"]) == {"n": ["~grpo.reasoning"]}


def test_of_two_runs_of_one_name_one_wins(main):
    both = " & ".join(
        f"(cd {main.folder} && {RUN} run twin -S seed=1 grpo.reasoning.trainer.beta=0.5 --detach; echo code $?)"
        for _ in range(2)
    )
    output = main.run(f"{both} & wait")
    assert sorted(re.findall(r"code (\d)", output)) == ["0", "1"]
    assert output.count("error: there is an experiment twin already") == 1
    main.run(f"{RUN} stop twin; {RUN} remove twin")
    assert not list(folder(main, "twin").parent.glob("twin*"))


# One that fails


def test_a_stage_that_fails_and_is_mended_in_the_clone(main):
    output = main.run(f"{RUN} run bad -S seed=666", fails=True)
    log = ".scratch/experiments/bad/.scratch/logs/train@reasoning/1.log"
    last = output.splitlines()[-1]
    assert last.startswith(f"error: train@reasoning failed, its log is {log}; mend it in .scratch/experiments/bad")
    assert last.endswith("write: python -m workflow.experiment continue bad")
    end = output[output.index(f"the last lines of {log}") :].splitlines()
    assert 20 <= len(end) <= 24 and "error: seed is 666; write another one" in end
    assert "bad" not in shown(main)
    assert re.search(r"bad +failed +0/2 .* seed=666", main.run(f"{RUN} list"))
    status = main.run(f"{RUN} status bad")
    assert re.search(r"train@reasoning +failed +1 .*failed to run: exec python stages.py train, exited with 1", status)
    assert re.search(r"report +waiting\n", status)

    # What the checkout changes does not reach the clone, a change in the clone does.
    stages = folder(main, "bad") / "stages.py"
    stages.write_text(stages.read_text().replace("== 666", "== 667"))
    assert "bad is saved" in main.run(f"{RUN} continue bad")
    assert shown(main)["bad"]["seed"] == "666"
    assert "== 667" in main.run("git show $(git for-each-ref --format='%(refname)' 'refs/exps/*/*/bad'):stages.py")
    assert re.search(r"train@reasoning +done +2 ", main.run(f"{RUN} status bad"))


def test_a_profile_that_snakemake_refuses(main, tmp_path):
    (tmp_path / "config.yaml").write_text("cores: 1\nset-threads: {tran: 1}\n")
    output = main.run(f"{RUN} run refused -S seed=1 grpo.reasoning.trainer.beta=0.5 --profile {tmp_path}", fails=True)
    assert "set-threads names the rule 'tran', which does not exist; write one of: train, report" in output
    assert f"; mend {os.path.relpath(tmp_path, main.folder)}/config.yaml, or " in output.splitlines()[-1]
    # The profile is the checkout's, or the user's own: what is mended there counts.
    (tmp_path / "config.yaml").rename(tmp_path / "gone.yaml")
    assert f"error: there is no profile '{tmp_path}'; write one of" in main.run(f"{RUN} continue refused", fails=True)
    assert re.search(r"refused +failed", main.run(f"{RUN} list"))
    assert re.search(r"train@reasoning +(cached|waiting)\n", main.run(f"{RUN} status refused"))
    assert main.run(f"{RUN} stop refused") == "nothing of refused runs\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("cores: 1\nset-threads: {nix: 1}\n")
    assert "names the rule 'nix'" in main.run(f"{RUN} continue refused --profile {other}", fails=True)
    (other / "config.yaml").write_text("cores: 1\n")
    assert "refused is saved" in main.run(f"{RUN} continue refused")


def test_a_batch_that_the_jobs_gpus_cannot_divide(main, tmp_path):
    (tmp_path / "config.yaml").write_text("cores: 1\nset-resources: {grpo: {hardware: gpu_8x80gb_server}}\n")
    output = main.run(f"{RUN} run x -S seed=1 --profile {tmp_path}", fails=True)
    assert re.fullmatch(
        r"error: params.yaml: grpo.reasoning.global_batch_size \d+ cannot be divided over 7 processes; .*\n", output
    )
    assert not folder(main, "x").exists()


def test_a_clone_whose_files_are_broken(main):
    """Users mend stages there, and write mistakes."""
    main.run(f"{RUN} run mended -S seed=2 grpo.reasoning.trainer.beta=0.5")
    params = folder(main, "mended") / "params.yaml"
    text = params.read_text()
    params.write_text("seed: [")
    listed = main.run(f"{RUN} list")
    assert "warning: .scratch/experiments/mended: " in listed and re.search(r"mended +saved +0/0 ", listed)
    said = main.run(f"{RUN} status mended", fails=True)
    assert re.search(r"^error: .scratch/experiments/mended: .*params.yaml.*; mend it there$", said, re.MULTILINE), said
    params.write_text(text)
    assert re.search(r"mended +saved +2/2 ", main.run(f"{RUN} list"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("x -S seed=fortytwo", "params.yaml: seed is 'fortytwo'; write what fits"),
        ("x -S seed=1,fortytwo", "params.yaml: seed is 'fortytwo'; write what fits"),
        ("x -S sed=1", "Could not override 'sed'"),
        ("x -S seed", "-S: "),
        ("x -S recipe=nix", "Could not find 'recipe/nix'"),
        ("x -S 'recipe=gsm8k_local'", "this recipe reads local files; write data_dir=/folder too"),
        ("x --profile nix", "there is no profile 'nix'; write one of local, slurm, or the folder of a config.yaml"),
        ("x/y", "'x/y' cannot be the name of an experiment; write 1 to 40 letters, digits, - and _"),
        ("a" * 39 + " -S seed=1,2", "cannot be the name of an experiment"),
        ("main", "main is a branch, tag or commit; write another name, such as main-exp"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(main, arguments, sentence):
    known = set(folder(main, "x").parent.glob("*"))
    output = main.run(f"{RUN} run {arguments}", fails=True)
    assert output.startswith("error: ") and sentence in output and output.count("\n") == 1
    assert set(folder(main, "x").parent.glob("*")) == known


def test_a_stage_that_reads_what_git_does_not_track(main):
    main.edit("dvc.yaml", "- stages.py", "- stages.py\n      - mine.py")
    (main.folder / "mine.py").touch()
    output = main.run(f"{RUN} run x -S seed=5", fails=True)
    assert output == "error: train@reasoning reads mine.py, which git does not track; write: git add mine.py\n"
    assert not folder(main, "x").exists()
    main.run("git checkout -q dvc.yaml && rm mine.py")


def test_where_it_is_called(main):
    environment = {**os.environ, "PYTHONPATH": str(main.folder)}
    done = subprocess.run(
        [sys.executable, "-m", "workflow.experiment", "list"],
        cwd=main.folder / "recipes",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "is not the top folder of a checkout of this repository; go there" in done.stderr
    # In a clone, also where .scratch is a link to another disk.
    clone = next(folder(main, "x").parent.glob("*/.scratch")).parent
    command = [sys.executable, "-m", "workflow.experiment", "list"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.stderr == f"error: this is the clone of an experiment; go to its checkout: cd {main.folder}\n"


# One that is interrupted


def test_stop_and_continue(main):
    clone = begin_waiting(main, "slow", seed=7)
    status = main.run(f"{RUN} status slow")
    assert status.startswith("slow: running (driver: process ")
    assert re.search(r"train@reasoning +running +1 .*train reasoning: \d+/1000, ETA 1:40, reward 0\.\d+\n", status)
    assert re.search(r"report +waiting\n", status)
    assert re.search(r"slow +running +0/2 ", main.run(f"{RUN} list"))
    assert re.search(r"error: slow is being run by process \d+ on \S+; ", main.run(f"{RUN} continue slow", fails=True))
    assert "error: slow is being run by" in main.run(f"{RUN} remove slow", fails=True)

    output = main.run(f"{RUN} stop slow")
    assert "stopping train@reasoning (process " in output
    assert output.endswith("slow is stopped; take it up again with: python -m workflow.experiment continue slow\n")
    assert not in_clone(clone, "workflow.job") and not in_clone(clone, "snakemake")
    assert re.search(r"slow +stopped +0/2 ", main.run(f"{RUN} list"))
    assert re.search(r"train@reasoning +stopped +1 ", main.run(f"{RUN} status slow"))

    (clone / ".scratch/wait").unlink()
    assert "train@reasoning: attempt 2, " in main.run(f"{RUN} continue slow")
    assert shown(main)["slow"]["seed"] == "7"


def test_a_killed_driver(main):
    clone = begin_waiting(main, "killed", seed=8)
    killed = the_driver(clone)
    killed.send_signal(signal.SIGKILL)
    wait_for(lambda: not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE)
    assert re.search(r"killed +killed +0/2 ", main.run(f"{RUN} list"))
    assert re.search(r"train@reasoning +running +1 ", main.run(f"{RUN} status killed"))
    assert "error: killed still has process " in main.run(f"{RUN} remove killed", fails=True)

    # The stage goes on, the next driver waits for it and does not run it again.
    main.run(f"{RUN} continue killed --detach")
    log = clone / ".scratch/driver.log"
    wait_for(
        lambda: re.search(r"waiting for train@reasoning \(process \d+\), which runs since before", log.read_text())
    )
    (clone / ".scratch/wait").unlink()
    wait_for(lambda: "killed is saved" in log.read_text())
    assert (clone / ".scratch/starts").read_text() == "train\n"
    assert shown(main)["killed"]["seed"] == "8"


def one(clone: Path, **facts: object) -> experiment.Experiment:
    known = {"name": "x", "base": "0" * 40, "profile": "local", "slurm": False, "overrides": [], "created": 0.0}
    return experiment.Experiment(folder=clone.resolve(), **known | facts)


def test_what_another_login_node_runs(tmp_path):
    clone = tmp_path / "x"
    (clone / ".scratch/jobs").mkdir(parents=True)
    (clone / experiment.LOCK).touch()
    record = clone / ".scratch/jobs/download@base.json"
    known = {"stage": "download@base", "node": "login1", "pid": 7, "job": None, "ended": None}
    record.write_text(json.dumps(known))
    assert experiment.elsewhere(one(clone)) == {"download@base (process 7 on login1)"}
    for refused in (experiment.end, experiment.delete):
        with pytest.raises(StageError, match=r"^x still has download@base \(process 7 on login1\); "):
            refused(one(clone))
    for dead in ({"ended": 1.0}, {"job": "12"}, {"node": socket.gethostname()}):
        record.write_text(json.dumps(known | dead))
        assert experiment.elsewhere(one(clone)) == set()
    record.write_text(json.dumps(known))
    os.utime(record, (time.time() - 200,) * 2)
    assert experiment.elsewhere(one(clone)) == set()


def test_a_stage_has_as_long_for_its_checkpoint_as_slurm_gives_it(tmp_path):
    config = tmp_path / "config.yaml"
    for extra, seconds in (("--signal=TERM@180", 300), ("--qos=a --signal=B:TERM@900", 900), ("", 300)):
        config.write_text(f"default-resources:\n  slurm_extra: \"'{extra}'\"\n")
        assert experiment.checkpoint_within(one(tmp_path, profile=str(tmp_path))) == seconds
    config.unlink()
    assert experiment.checkpoint_within(one(tmp_path, profile=str(tmp_path))) == 300


def test_what_does_not_stop_is_ended(tmp_path, monkeypatch, capsys):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    job = subprocess.Popen(
        [sys.executable, "-c", deaf, "workflow.job", "train"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "1\n"
    monkeypatch.setattr(experiment, "CHECKPOINT_WITHIN", 2.0)
    experiment.halt(one(tmp_path))
    assert job.wait() == -signal.SIGKILL
    said = capsys.readouterr().out
    assert said == f"stopping train (process {job.pid})\nending what did not stop within 2 seconds\n"


def test_interrupting_the_follower_leaves_the_driver(main):
    follower = subprocess.Popen(
        [sys.executable, "-m", "workflow.experiment", "run", "followed", "-S", "seed=7"],
        cwd=main.folder,
        stdout=subprocess.PIPE,
        text=True,
        # In tests that run in the background SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert follower.stdout is not None and follower.stdout.readline().startswith("followed: ")
    assert "Stage 'train@reasoning' is cached" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    rest, _ = follower.communicate(timeout=300)
    assert follower.returncode == 130
    assert "followed goes on without you; follow it with: tail -f .scratch/experiments/followed/.scratch/" in rest
    log = folder(main, "followed") / ".scratch/driver.log"
    wait_for(lambda: "followed is saved" in log.read_text())


# Tables


def test_progress_is_the_last_line_of_progress(tmp_path):
    log = tmp_path / "1.log"
    log.write_text("x\nsft cold_start: 20/60, ETA 0:10, loss 1.250\nsaving\n")
    assert progress(log) == "sft cold_start: 20/60, ETA 0:10, loss 1.250"
    log.write_text("x\nloading\n\n")
    assert (progress(log), last_line(log)) == ("", "loading")
    assert progress(tmp_path / "none") == last_line(tmp_path / "none") == ""
    assert hours(3725.4) == "1:02:05"


def test_a_table_is_120_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table([["a", "b"], ["long name", "x" * 200]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a          b" and lines[1] == "long name  " + "x" * 108 + "…" and len(lines[1]) == 120
