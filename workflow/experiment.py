"""Experiments in clones of their own: `python -m workflow.experiment run b -S grpo.reasoning.trainer.beta=0.04`.

Each runs in a git clone of this checkout, .scratch/experiments/NAME, which shares DVC's cache. So several run at once,
and neither `dvc status` nor an edit in the checkout disturbs them; files can be edited in the clone. A driver, one
process on this machine, starts Snakemake there and survives the end of the login session. When all stages are done, the
result is a DVC experiment of this repository: `dvc exp show` lists it, `dvc exp apply NAME` restores it.
"""

import argparse
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from workflow.compose import compose, first_lines
from workflow.job import SCRATCH, STOP, STOPPED, record_file
from workflow.launch import division, load_hardware
from workflow.params import Params, ParamsError, load_params
from workflow.pipeline import Stage, load_stages
from workflow.sources import some
from workflow.stage import StageError
from workflow.stamps import STAMPS

if TYPE_CHECKING:
    import psutil

EXPERIMENTS = SCRATCH / "experiments"
PROFILES = Path("workflow/profiles")

# In the clone of an experiment
FACTS = SCRATCH / "experiment.json"
LOCK = SCRATCH / "driver.lock"  # held with flock while a driver lives; says its host and process
LOG = SCRATCH / "driver.log"
SNAKEMAKE_LOG = SCRATCH / "snakemake.log"  # of the last driver
END = SCRATCH / "driver.json"  # how the last driver ended; none when it was killed

CHECKPOINT_WITHIN = 300.0  # seconds between the wish to stop and the end of those who do not, or what --signal gives
ALIVE_WITHIN = 120.0  # seconds since the last sign of life of a stage on another machine; NFS may show it a minute late
ASK_AGAIN = 30.0  # seconds after which a job is asked again: it may not have begun when it was asked
POLL = 1.0
WIDTH = 120  # columns of a table
LAST_LINES = 20
TOLD_EVERY = 15.0  # seconds between two lines about the progress of a stage
UNTRACKED = ("ls-files", "--others", "--exclude-standard")

COMMAND = "python -m workflow.experiment"


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    `folder` is its clone, `base` the commit it started from, `profile` a name or a path, `slurm` whether stages are, or
    were, jobs of SLURM.
    """

    name: str
    folder: Path
    base: str
    profile: str
    slurm: bool
    overrides: list[str]
    created: float

    @property
    def ref(self) -> str:
        """The ref that makes a commit an experiment for DVC."""
        return f"refs/exps/{self.base[:2]}/{self.base[2:]}/{self.name}"

    @property
    def shown(self) -> str:
        """The clone as a user would write it."""
        return str(EXPERIMENTS / self.name)


@dataclass(frozen=True)
class Job:
    """A job that SLURM has not finished."""

    id: str
    state: str  # SLURM's, e.g. RUNNING
    node: str
    reason: str  # why it waits
    stage: str


class Stopped(Exception):
    """The user wants the experiment to stop."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="start an experiment, or one per combination of a sweep")
    run.add_argument("name", metavar="NAME", help="of the DVC experiment; a sweep adds -1, -2, …")
    run.add_argument(
        "-S",
        "--set-param",
        metavar="key=value",
        action="extend",
        nargs="+",
        default=[],
        help="compose params.yaml as `dvc exp run -S` does; a,b is a sweep; without -S params.yaml is taken as it is",
    )
    run.add_argument(
        "--profile",
        default="local",
        help="a folder of workflow/profiles/, or the path of one of your own; default local",
    )
    resume = commands.add_parser("continue", help="take up an experiment that failed, was stopped, or was killed")
    resume.add_argument("--profile", help="another one from now on")
    for starts in (run, resume):
        starts.add_argument("--detach", action="store_true", help="do not follow it on the terminal")
    commands.add_parser("list", help="all experiments that have a clone")
    status = commands.add_parser("status", help="the stages of one experiment: where they run, how far they are")
    stop = commands.add_parser("stop", help="write checkpoints and end all jobs; continue takes it up again")
    remove = commands.add_parser("remove", help="delete the clone and the DVC experiment")
    drive = commands.add_parser("drive")  # what run and continue start; without help it is not listed
    drive.add_argument("--lock", type=int, required=True)
    for named in (resume, status, stop, remove, drive):
        named.add_argument("name", metavar="NAME")
    args = parser.parse_args()

    check_place()
    if args.command == "run":
        sys.exit(start(create(args.name, args.set_param, args.profile), args.detach))
    if args.command == "list":
        print_list()
        return
    experiment = find(args.name)
    if args.command == "continue":
        if saved(experiment):
            raise StageError(
                f"{experiment.name} is finished and saved; take it over with: dvc exp apply {experiment.name}"
            )
        if args.profile:
            slurm = experiment.slurm or uses_slurm(args.profile)
            experiment = replace(experiment, profile=args.profile, slurm=slurm)
        sys.exit(start([experiment], args.detach))
    if args.command == "status":
        print_status(experiment)
    if args.command == "stop":
        sys.exit(end(experiment))
    if args.command == "remove":
        delete(experiment)
    if args.command == "drive":
        drive_to_end(experiment)


# Making experiments


def check_place() -> None:
    """Raise StageError unless the current folder is a checkout in which experiments can be made."""
    here = Path.cwd()
    if here.parent.name == EXPERIMENTS.name and (here / FACTS).is_file():
        raise StageError(
            f"this is the clone of an experiment; go to its checkout: cd {git('config', 'remote.origin.url')}"
        )
    if not Path("dvc.yaml").is_file() or not Path(".git").exists():
        raise StageError(f"{here} is not the top folder of a checkout of this repository; go there")


def create(name: str, overrides: list[str], profile: str) -> list[Experiment]:
    """Make the clones of an experiment, or of each combination of a sweep; nothing is left of them after an error.

    Raises:
        StageError: the name is taken, an override or the profile is wrong, a stage reads what git does not track.
    """
    slurm = uses_slurm(profile)
    if slurm and shutil.which("sbatch") is None:
        raise StageError(
            f"{profile} starts jobs with sbatch, which is not here; go to a login node, or leave --profile out"
        )
    base = git("rev-parse", "--verify", "HEAD^{commit}")
    git("var", "GIT_COMMITTER_IDENT")
    sweep = combinations(name, overrides)
    for each in sweep:
        check_name(each)
    EXPERIMENTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=EXPERIMENTS) as part:
        params = {each: Path(part) / f"{each}.yaml" for each in sweep}
        for each, file in params.items():
            write_params(sweep[each], file)
            check_hardware(profile, load_params(file))
        made = [
            Experiment(each, (EXPERIMENTS / each).resolve(), base, profile, slurm, sweep[each], time.time())
            for each in sweep
        ]
        for experiment in made:
            clone(experiment, Path(part) / experiment.name, params[experiment.name])
        place(made, Path(part))
    left_out = [file for file in git(*UNTRACKED).splitlines() if file != "dvc.lock"]
    if left_out:
        print(f"not carried over, because git does not track it: {some(left_out)}")
    for experiment in made:
        print(f"{experiment.name}: {experiment.shown}  {' '.join(experiment.overrides)}".rstrip())
    return made


def place(made: list[Experiment], part: Path) -> None:
    """Move finished clones to where they belong, all or none; of two runs of one name only one can do this."""
    placed = []
    for experiment in made:
        try:
            (part / experiment.name).rename(experiment.folder)
        except OSError:
            for earlier in placed:
                shutil.rmtree(earlier.folder)
            if experiment.folder.exists():
                raise StageError(taken(experiment.name)) from None
            raise
        placed.append(experiment)


def combinations(name: str, overrides: list[str]) -> dict[str, list[str]]:
    """The overrides of each experiment by name; `key=a,b` makes two."""
    from dvc.utils.hydra import get_hydra_sweeps, to_hydra_overrides
    from hydra.errors import HydraException

    try:
        swept = [text for text in overrides if to_hydra_overrides([text])[0].is_sweep_override()]
    except HydraException as error:
        raise StageError(f"-S: {first_lines(error)}; write key=value") from None
    if not swept:
        return {name: overrides}
    # DVC writes deletions (~key) anew in a way that Hydra then refuses, so they stay out of this.
    fixed = [text for text in overrides if text not in swept]
    sweeps = [sweep["params.yaml"] for sweep in get_hydra_sweeps({"params.yaml": swept})]
    return {f"{name}-{number}": [*fixed, *sweep] for number, sweep in enumerate(sweeps, 1)}


def check_name(name: str) -> None:
    """Raise StageError for a name that is not one, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise StageError(f"{name!r} cannot be the name of an experiment; write 1 to 40 letters, digits, - and _")
    if (EXPERIMENTS / name).exists() or refs(name):
        raise StageError(taken(name))
    if git("rev-parse", "--verify", "--quiet", name, fails=True):
        raise StageError(f"{name} is a branch, tag or commit; write another name, such as {name}-exp")


def taken(name: str) -> str:
    if (EXPERIMENTS / name / FACTS).is_file():
        remove = f"{COMMAND} remove {name}"
    else:  # made by dvc exp run, or a folder that is no clone
        remove = f"dvc exp remove {name}" if refs(name) else f"rm -r {EXPERIMENTS / name}"
    return f"there is an experiment {name} already; write another name, or remove it with: {remove}"


def refs(name: str) -> list[str]:
    """The refs of DVC experiments of this name, on whichever commit."""
    return git("for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}").split()


def saved(experiment: Experiment) -> bool:
    """Whether the result is a DVC experiment of this repository."""
    return bool(refs(experiment.name))


def write_params(overrides: list[str], file: Path) -> None:
    """Write the params.yaml of an experiment: this checkout's, or composed from recipes/ where there are overrides."""
    if not overrides:
        load_params()
        shutil.copy("params.yaml", file)
        return
    compose(overrides, file)
    try:
        load_params(file)
    except ParamsError as error:
        raise StageError(str(error).replace(str(file), "params.yaml")) from None


def check_hardware(profile: str, params: Params) -> None:
    """Raise ParamsError where a batch cannot be divided over the GPUs that a profile gives to a training.

    The stage `check` runs on this machine, and cannot know those of the jobs.
    """
    resources = read_profile(profile).get("set-resources")
    rules = resources if isinstance(resources, dict) else {}
    for kind in ("sft", "grpo"):
        match rules.get(kind):
            case {"hardware": str(name)}:
                hardware = load_hardware(name)
                for phase in getattr(params, kind):
                    division(params, hardware, kind, phase)


def clone(experiment: Experiment, folder: Path, params: Path) -> None:
    """Clone the checkout into a folder, with its uncommitted changes, its lock file, its settings and other params."""
    git("clone", "--quiet", "--local", str(Path.cwd()), str(folder))
    git("checkout", "--quiet", "--detach", experiment.base, folder=folder)
    changes = folder.with_suffix(".diff")
    plain = ["--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/"]
    git("diff", experiment.base, "--binary", *plain, f"--output={changes.resolve()}")
    if changes.stat().st_size:
        git("apply", "--index", "--whitespace=nowarn", str(changes.resolve()), folder=folder)
    if Path("dvc.lock").is_file():
        shutil.copy("dvc.lock", folder)  # as in a checkout that does not commit it
    shutil.copy(params, folder / "params.yaml")
    for setting in git("config", "--local", "--get-regexp", "^user\\.", fails=True).splitlines():
        git("config", *setting.split(" ", 1), folder=folder)
    configure_dvc(folder)
    check_files(folder)
    (folder / SCRATCH).mkdir()
    (folder / LOCK).touch()
    write_facts(experiment, folder)


def write_facts(experiment: Experiment, folder: Path) -> None:
    """Note in a clone what `find` reads there."""
    facts = {name: value for name, value in asdict(experiment).items() if name != "folder"}
    part = folder / f"{FACTS}.part"
    part.write_text(json.dumps(facts, indent=2) + "\n")
    part.replace(folder / FACTS)


def configure_dvc(folder: Path) -> None:
    """Give a clone this checkout's cache, its local settings, and its remotes where they are folders beside it."""
    from dvc.config import Config
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    def absolute(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, RelPath) else value for key, value in settings.items()}

    repo = Repo()
    with Config(str(folder / ".dvc")).edit("local", validate=False) as settings:
        for level in ("repo", "local"):
            for section, values in repo.config.read(level).items():
                if section in ("remote", "machine", "db"):
                    for name, options in values.items():
                        settings[section].setdefault(name, {}).update(absolute(options))
                elif level == "local":
                    settings.setdefault(section, {}).update(absolute(values))
        settings["cache"]["dir"] = str(Path(repo.cache.local_cache_dir).resolve())
    repo.close()


def stages_in(folder: Path) -> dict[str, Stage]:
    """The stages of a clone.

    Raises:
        StageError: its dvc.yaml or params.yaml cannot be read.
    """
    from dvc.exceptions import DvcException
    from yaml import YAMLError

    try:
        return load_stages(folder)
    except (DvcException, YAMLError) as error:
        raise StageError(f"{os.path.relpath(folder)}: {' '.join(str(error).split())}; mend it there") from None


def check_files(folder: Path) -> None:
    """Raise StageError when a clone lacks what its stages read."""
    for name, each in stages_in(folder).items():
        for file in each.files:
            if not (folder / file).exists():
                raise StageError(f"{name} reads {file}, which git does not track; write: git add {file}")
    for name, source in load_params(folder / "params.yaml").sources.items():
        for key, path in (("path", source.path), ("options.corpus", source.options.get("corpus"))):
            if path is not None and not (folder / path).exists():
                known = Path(path).resolve() if Path(path).exists() else "an existing file or folder"
                raise StageError(f"sources.{name}.{key} is {path!r}, which is not there in a clone; write {known}")


def profile_folder(profile: str) -> Path:
    """The folder of a Snakemake profile of this checkout, by name or path.

    It describes the cluster, not the experiment, so all experiments use this checkout's, as it is when they start.
    """
    for folder in (PROFILES / profile, Path(profile)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(file.parent.name for file in PROFILES.glob("*/config.yaml"))
    raise StageError(f"there is no profile {profile!r}; write one of {some(known)}, or the folder of a config.yaml")


def read_profile(profile: str) -> dict[str, Any]:
    """What a profile says."""
    import yaml

    file = profile_folder(profile) / "config.yaml"
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise StageError(f"{os.path.relpath(file)} is not a mapping in YAML: {' '.join(str(error).split())}") from None


def uses_slurm(profile: str) -> bool:
    """Whether stages are SLURM jobs with this profile."""
    return read_profile(profile).get("executor") == "slurm"


def git(*arguments: str, folder: Path = Path(), fails: bool = False) -> str:
    """What a git command prints; where it fails, nothing if it may, else its last words as a StageError."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode and not fails:
        raise StageError(f"git {arguments[0]} failed in {folder.resolve()}: {' '.join(done.stderr.split())}")
    return done.stdout.strip() if done.returncode == 0 else ""


def find(name: str) -> Experiment:
    """An experiment by name."""
    if not (EXPERIMENTS / name / FACTS).is_file():
        known = [each.name for each in everything()]
        known = f"write one of: {some(known)}" if known else f"start it with: {COMMAND} run {name}"
        raise StageError(f"there is no clone of an experiment {name!r}; {known}")
    folder = (EXPERIMENTS / name).resolve()
    return Experiment(folder=folder, **json.loads((folder / FACTS).read_text()))


def everything() -> list[Experiment]:
    """All experiments that have a clone, the oldest first."""
    found = [find(file.parts[-3]) for file in EXPERIMENTS.glob(f"*/{FACTS}")]
    return sorted(found, key=lambda experiment: (experiment.created, experiment.name))


# Starting and following drivers


def start(experiments: list[Experiment], detach: bool) -> int:
    """Start drivers and follow them to their end; returns the exit code of the first that fails."""
    begun = {experiment.name: launch(experiment) for experiment in experiments}
    if not detach:
        return follow(experiments, begun)
    for experiment in experiments:
        print(f"{experiment.name} is running; look at it with: {COMMAND} status {experiment.name}")
    return 0


def launch(experiment: Experiment) -> int:
    """Start the driver of an experiment in a session of its own; returns where its output begins in the log."""
    profile_folder(experiment.profile)
    lock = take(experiment)
    write_facts(experiment, experiment.folder)
    (experiment.folder / STOP).unlink(missing_ok=True)
    (experiment.folder / END).unlink(missing_ok=True)
    with (experiment.folder / LOG).open("ab") as log:
        begin = log.tell()
        command = [sys.executable, "-m", "workflow.experiment", "drive", experiment.name, "--lock", str(lock.fileno())]
        # The lock belongs to the open file that the driver inherits, so it is held without a gap.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    sign(lock, process.pid)
    lock.close()
    return begin


def take(experiment: Experiment) -> IO[str]:
    """Take the lock of an experiment; a StageError says who has it."""
    lock = (experiment.folder / LOCK).open("r+")
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # somebody may only be looking
        except OSError as error:
            raise StageError(
                f"{experiment.shown} cannot be locked ({error.strerror}); make .scratch a link to a folder on a file "
                "system with flock, e.g. NFS, or Lustre mounted with -o flock"
            ) from None
        else:
            sign(lock, os.getpid())
            return lock
    host, pid = lock.read().split()
    raise StageError(
        f"{experiment.name} is being run by process {pid} on {host}; wait for it, or stop it with: "
        f"{COMMAND} stop {experiment.name}"
    )


def sign(lock: IO[str], pid: int) -> None:
    """Say in a lock file who holds it, in one write of one length."""
    os.pwrite(lock.fileno(), f"{socket.gethostname()} {pid}".ljust(120).encode(), 0)


def driver(experiment: Experiment) -> str | None:
    """Host and process of the driver, or None when there is none."""
    with (experiment.folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip()
    return None


def follow(experiments: list[Experiment], begun: dict[str, int]) -> int:
    """Print what drivers print until they end."""
    logs = {each.name: (each.folder / LOG).open(errors="replace") for each in experiments}
    for name, log in logs.items():
        log.seek(begun[name])
    try:
        alive = True
        while alive:
            alive = any(driver(each) for each in experiments)  # asked before the log is read to its end
            for name, log in logs.items():
                for line in log.readlines():
                    print(line if len(logs) == 1 else f"{name} | {line}", end="", flush=True)
            if alive:
                time.sleep(POLL)
    except KeyboardInterrupt:
        for each in experiments:
            print(
                f"\n{each.name} goes on without you; follow it with: tail -f {each.shown}/{LOG}; "
                f"stop it with: {COMMAND} stop {each.name}"
            )
        return 128 + signal.SIGINT
    codes = [ended(each).get("code", 1) for each in experiments]
    for each in experiments:
        if not ended(each):
            print(f"error: the driver of {each.name} was killed; its jobs go on; write: {again(each)}")
    return next((code for code in codes if code), 0)


def ended(experiment: Experiment) -> dict[str, Any]:
    """How the last driver ended: state and exit code; empty when it was killed, or lives."""
    file = experiment.folder / END
    return json.loads(file.read_text()) if file.is_file() else {}


# The driver


def drive_to_end(experiment: Experiment) -> None:
    """Run all stages and save the result; how it ended is in driver.json, whatever happens.

    Raises:
        StageError: a stage failed.
    """
    sys.stdout.reconfigure(line_buffering=True)  # into a log, in the order of what others write there
    state, code = "failed", 1
    try:
        drive(experiment)
        state, code = "finished", 0
    except Stopped:
        halt(experiment)
        print(f"{experiment.name} is stopped; take it up again with: {again(experiment)}")
        state, code = "stopped", STOPPED
    finally:
        write_end(experiment, state, code)
    sys.exit(code)


def write_end(experiment: Experiment, state: str, code: int) -> None:
    """Note how a driver ended."""
    part = experiment.folder / f"{END}.part"
    part.write_text(json.dumps({"state": state, "code": code, "ended": time.time()}) + "\n")
    part.replace(experiment.folder / END)


def drive(experiment: Experiment) -> None:
    """Take up what an earlier driver left, run what is not done, save the result."""
    wait_for_earlier_jobs(experiment)
    if run_in(experiment, "workflow.stamps"):
        raise StageError(f"the stages that are done could not be found, see above; then write: {again(experiment)}")
    since = time.time()
    arguments = ["--profile", str(profile_folder(experiment.profile)), "--nolock"]
    if uses_slurm(experiment.profile):
        arguments += ["--slurm-jobname-prefix", experiment.name]
    if run_in(experiment, "snakemake", *arguments, output=SNAKEMAKE_LOG):
        raise StageError(failure(experiment, since))
    save(experiment)
    print(
        f"{experiment.name} is saved; compare it with: dvc exp show; take it over with: dvc exp apply {experiment.name}"
    )


def run_in(experiment: Experiment, module: str, *arguments: str, output: Path | None = None) -> int:
    """Run a Python module in the clone, with the clone's code, and tell what the stages do meanwhile.

    Args:
        output: a file in the clone that takes what it prints, anew; None leaves it in the driver's log.

    Returns:
        Its exit code.

    Raises:
        Stopped: the user wants to stop; the process is killed.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONUNBUFFERED"] = "1"
    with (experiment.folder / (output or LOG)).open("wb" if output else "ab") as log:
        news = News(experiment, Path(log.name), log.tell())
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=experiment.folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Without a driver nothing starts jobs. PR_SET_PDEATHSIG of linux/prctl.h
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),
        )
    while process.poll() is None:
        news.tell()
        if (experiment.folder / STOP).exists():
            process.kill()  # SIGTERM lets Snakemake wait for its jobs, SIGINT cancels them
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
    news.tell()
    if (experiment.folder / STOP).exists():
        raise Stopped
    return process.returncode


class News:
    """Prints when stages are queued, begin and end, and how far they are; in the driver's log, for those who follow."""

    def __init__(self, experiment: Experiment, log: Path, begin: int) -> None:
        self.experiment, self.log, self.read = experiment, log, begin
        self.records = read_records(experiment)
        self.progress: dict[str, tuple[float, str]] = {}

    def tell(self) -> None:
        """Print what changed since the last call."""
        with self.log.open("rb") as log:
            log.seek(self.read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for job, (name, _) in submitted(whole.decode(errors="replace")).items():
            print(f"{name}: queued as SLURM job {job}")
        records = read_records(self.experiment)
        for name, record in records.items():
            before = self.records.get(name, {"started": None, "ended": None})
            if record["started"] != before["started"]:
                where = f"SLURM job {record['job']} on {record['node']}" if record["job"] else record["node"]
                print(f"{name}: attempt {record['attempt']}, {where}")
            if record["ended"] is None:
                self.tell_progress(name, self.experiment.folder / record["log"])
            elif record["ended"] != before["ended"]:
                how = {0: "done", STOPPED: "stopped"}.get(record["code"], "failed")
                print(f"{name}: {how}, {hours(record['ended'] - record['started'])}")
        self.records = records

    def tell_progress(self, name: str, log: Path) -> None:
        told, before = self.progress.get(name, (0.0, ""))
        if time.monotonic() - told > TOLD_EVERY:
            now = progress(log)
            self.progress[name] = (time.monotonic(), now)
            if now and now != before:
                print(now)


def submitted(output: str) -> dict[str, tuple[str, str]]:
    """The stage and the log of each SLURM job that Snakemake says it submitted."""
    found = re.findall(r"submitted with SLURM jobid (\d+) \(log: (.*/([^/]+)/\d+\.log)\)", output)
    return {job: (name, log) for job, log, name in found}


def wait_for_earlier_jobs(experiment: Experiment) -> None:
    """Wait for what a killed driver left running, so that no stage runs twice at the same time."""
    told: set[str] = set()
    while True:
        if (experiment.folder / STOP).exists():
            raise Stopped
        jobs = {f"{job.stage} (SLURM job {job.id}, {job.node or job.state})" for job in slurm_jobs(experiment)}
        own = [*processes(experiment, "workflow.job"), *processes(experiment, "snakemake")]
        waited = jobs | {f"{stage_of(process)} (process {process.pid})" for process in own} | elsewhere(experiment)
        for each in sorted(waited - told):
            print(f"waiting for {each}, which runs since before")
        told |= waited
        if not waited:
            return
        time.sleep(POLL * (3 if jobs else 1))


def failure(experiment: Experiment, since: float) -> str:
    """Why Snakemake failed, in a sentence; the last lines of the log that says more are printed before it."""
    output = (experiment.folder / SNAKEMAKE_LOG).read_text(errors="replace")
    records = read_records(experiment)
    for record in sorted(records.values(), key=lambda record: record["started"]):
        if record["code"] and record["ended"] >= since:
            log = print_last_lines(experiment, record["log"])
            if record["code"] == STOPPED:
                return f"{record['stage']} was stopped, and not queued again; write: {again(experiment)}"
            mend = f"mend it in {experiment.shown} and write: {again(experiment)}"
            return f"{record['stage']} failed, its log is {log}; {mend}"
    jobs = submitted(output)
    for job, status in re.findall(r"SLURM-job '(\w+)' failed, SLURM status is: '(\w+)'", output):
        name, slurm_log = jobs[job]
        began = name in records and records[name]["job"] == job
        log = print_last_lines(experiment, records[name]["log"] if began else slurm_log)
        return (
            f"SLURM job {job}, {name}, ended with {status}, its log is {log}; give it what it needs in "
            f"{profile_shown(experiment)}, or mend it in {experiment.shown}, and write: {again(experiment)}"
        )
    refused = re.search(r"sbatch failed\. The error message was '(.*?)'\.\n", output, re.DOTALL)
    if refused:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in refused[1].splitlines())
        return f"SLURM refused a job: {reason}; change {profile_shown(experiment)} and write: {again(experiment)}"
    log = print_last_lines(experiment, str(SNAKEMAKE_LOG))
    said = re.findall(r"^(?:.*Error in file .*, line \d+:\n|\w*Error:\n|\S+: error: )(.+)$", output, re.MULTILINE)
    reason = f": {said[0]}" if said else ""
    mend = f"mend {profile_shown(experiment)}, or what {log} says, and write: {again(experiment)}"
    return f"Snakemake failed{reason}; {mend}"


def print_last_lines(experiment: Experiment, log: str) -> str:
    """Print the end of a log in the clone; returns the log as a user would write it."""
    shown = os.path.relpath(experiment.folder / log)
    print(f"\nthe last lines of {shown}:", *tail(experiment.folder / log)[-LAST_LINES:], "", sep="\n")
    return shown


def again(experiment: Experiment) -> str:
    return f"{COMMAND} continue {experiment.name}"


def profile_shown(experiment: Experiment) -> str:
    """The file of the profile as a user would write it."""
    return os.path.relpath(profile_folder(experiment.profile) / "config.yaml")


def save(experiment: Experiment) -> None:
    """Make the state of the clone a DVC experiment of this repository.

    The commit is the one of `dvc exp run`. `dvc exp save` would not do: it puts files inside DVC's outputs (the plots)
    and a file of .dvc/tmp under git, and a branch made of such an experiment cannot be run.

    Raises:
        StageError: what ran is not what is in the clone now.
    """
    folder = experiment.folder
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "--quiet", "status", "--json"], cwd=folder, capture_output=True, text=True
    )
    if status.returncode:
        raise StageError(f"dvc status failed in {experiment.shown}: {' '.join(status.stderr.split())}")
    changed = json.loads(status.stdout)
    if changed:
        raise StageError(
            f"{some(sorted(changed))} changed in {experiment.shown} while it ran; run what changed: {again(experiment)}"
        )
    git("add", "--update", folder=folder)
    new = git(*UNTRACKED, folder=folder).splitlines()
    git("add", "--force", "dvc.lock", *[file for file in new if Path(file).name == ".gitignore"], folder=folder)
    tree = git("write-tree", folder=folder)
    commit = git("commit-tree", tree, "-p", experiment.base, "-m", f"experiment {experiment.name}", folder=folder)
    git("push", "--quiet", str(Path.cwd()), f"{commit}:{experiment.ref}", folder=folder)


# What runs


def read_records(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """What workflow.job noted of the last attempt of each stage, by stage."""
    files = (experiment.folder / SCRATCH / "jobs").glob("*.json")
    return {record["stage"]: record for record in (json.loads(file.read_text()) for file in files)}


def slurm_jobs(experiment: Experiment) -> list[Job]:
    """The experiment's jobs that SLURM has not finished: those that were submitted in its clone."""
    if not experiment.slurm:
        return []
    if shutil.which("squeue") is None:
        raise StageError(f"{experiment.name} runs with SLURM, and squeue is not here; go to a login node")
    squeue = ["squeue", "--me", "--noheader", "--format", "%i|%T|%N|%r|%k|%Z"]
    done = subprocess.run(squeue, capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"squeue failed, try again later: {' '.join(done.stderr.split())}")
    jobs = []
    for line in done.stdout.splitlines():
        number, state, node, reason, comment, folder = line.split("|", 5)
        if Path(folder) == experiment.folder:
            # Snakemake's comment is rule_<rule>_wildcards_<stage>.
            jobs.append(Job(number, state, node, reason, comment.partition("_wildcards_")[2]))
    return jobs


def processes(experiment: Experiment, module: str) -> list["psutil.Process"]:
    """This machine's processes that run a Python module in the clone, outside of SLURM's jobs."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
        known = process.info
        if module in (known["cmdline"] or []) and known["cwd"] == str(experiment.folder):
            ours = (known["environ"] or {}).get("SLURM_JOB_ID") == os.environ.get("SLURM_JOB_ID")
            found += [process] if ours else []
    return found


def elsewhere(experiment: Experiment) -> set[str]:
    """Stages that another machine runs outside of SLURM's jobs, such as the login node of another session."""
    found = set()
    for name, record in read_records(experiment).items():
        if record["ended"] is None and record["job"] is None and record["node"] != socket.gethostname():
            # workflow.job touches it as long as the stage runs.
            seen = (experiment.folder / record_file(name)).stat().st_mtime
            if time.time() - seen < ALIVE_WITHIN:
                found.add(f"{name} (process {record['pid']} on {record['node']})")
    return found


def stage_of(process: "psutil.Process") -> str:
    """What a process of `processes` runs."""
    command = process.info["cmdline"]
    return command[command.index("workflow.job") + 1] if "workflow.job" in command else "Snakemake"


def checkpoint_within(experiment: Experiment) -> float:
    """Seconds that a stage has for its checkpoint when it is asked to end: as many as SLURM would give it, or more."""
    try:
        text = (profile_folder(experiment.profile) / "config.yaml").read_text()
    except StageError:
        return CHECKPOINT_WITHIN  # the profile is gone, and what runs is to end all the same
    return max([CHECKPOINT_WITHIN, *map(float, re.findall(r"--signal=(?:\w+:)?TERM@(\d+)", text))])


def halt(experiment: Experiment) -> None:
    """End all jobs: those that wait at once, those that run when they have written a checkpoint, or are late."""
    import psutil

    asked: dict[str | int, float] = {}  # when a job or process was asked to end
    begun = time.monotonic()
    late, within = False, checkpoint_within(experiment)
    while True:
        for process in processes(experiment, "snakemake"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        jobs, own = slurm_jobs(experiment), processes(experiment, "workflow.job")
        if not jobs and not own:
            return
        now = time.monotonic()
        if now - begun > within and not late:
            late = True
            print(f"ending what did not stop within {within:.0f} seconds")
        for job in jobs:
            # scancel may fail: the job ended just now.
            if job.state == "PENDING" or late:
                subprocess.run(["scancel", job.id])
            elif now - asked.get(job.id, 0) > ASK_AGAIN:
                print(f"stopping {job.stage} (SLURM job {job.id} on {job.node})")
                subprocess.run(["scancel", "--signal=TERM", job.id])
                asked[job.id] = now
        for process in own:
            with suppress(psutil.NoSuchProcess):
                if late:
                    for each in [*process.children(recursive=True), process]:
                        each.kill()
                elif now - asked.get(process.pid, 0) > ASK_AGAIN:
                    print(f"stopping {stage_of(process)} (process {process.pid})")
                    process.terminate()
                    asked[process.pid] = now
        time.sleep(POLL * (3 if jobs else 1))


def end(experiment: Experiment) -> int:
    """Stop an experiment; returns 0 when nothing of it runs any more."""
    stop = experiment.folder / STOP
    if driver(experiment):
        begin = (experiment.folder / LOG).stat().st_size
        stop.touch()
        follow([experiment], {experiment.name: begin})
        return int(driver(experiment) is not None)
    lock = take(experiment)
    if other := elsewhere(experiment):
        raise StageError(f"{experiment.name} still has {some(sorted(other))}; go there, and stop it from there")
    if slurm_jobs(experiment) or processes(experiment, "workflow.job"):
        stop.touch()
        halt(experiment)
        write_end(experiment, "stopped", STOPPED)
    lock.close()
    print(f"nothing of {experiment.name} runs")
    return 0


def delete(experiment: Experiment) -> None:
    """Remove the clone of an experiment, and its DVC experiment."""
    lock = take(experiment)
    jobs = [f"SLURM job {job.id}" for job in slurm_jobs(experiment)]
    jobs += [f"process {process.pid}" for process in processes(experiment, "workflow.job")]
    jobs += sorted(elsewhere(experiment))
    if jobs:
        raise StageError(f"{experiment.name} still has {some(jobs)}; stop it first: {COMMAND} stop {experiment.name}")
    for ref in refs(experiment.name):
        git("update-ref", "-d", ref)
        print(f"removed the DVC experiment {experiment.name} ({ref}); its outputs stay in the cache until dvc gc")
    (experiment.folder / FACTS).unlink()  # now it is no experiment, whatever happens to the rest
    gone = experiment.folder.with_name(f"{experiment.name}.part-{os.getpid()}")
    experiment.folder.rename(gone)
    lock.close()  # before the file goes: NFS keeps open ones, and with them their folder
    shutil.rmtree(gone)
    print(f"removed {experiment.shown}")


# Tables


def print_list() -> None:
    rows = [["name", "state", "stages", "started", "overrides"]]
    for experiment in everything():
        try:
            stages = stages_in(experiment.folder)
        except StageError as error:
            print(f"warning: {error}")
            stages = {}
        done = sum((experiment.folder / STAMPS / name).is_file() for name in stages)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(experiment.created))
        rows.append(
            [experiment.name, state(experiment), f"{done}/{len(stages)}", started, " ".join(experiment.overrides)]
        )
    if len(rows) == 1:
        print(f"there are no experiments; start one with: {COMMAND} run NAME -S key=value")
    else:
        print_table(rows)


def state(experiment: Experiment) -> str:
    """running, stopping, saved, finished, failed, stopped or killed."""
    if driver(experiment):
        return "stopping" if (experiment.folder / STOP).exists() else "running"
    return "saved" if saved(experiment) else ended(experiment).get("state", "killed")


def print_status(experiment: Experiment) -> None:
    held = driver(experiment)
    where = " (driver: process {1} on {0})".format(*held.split()) if held else ""
    print(f"{experiment.name}: {state(experiment)}{where}, in {experiment.shown}  {' '.join(experiment.overrides)}")
    # What is saved has no jobs, and can be looked at where there is no SLURM.
    jobs = {} if saved(experiment) else {job.stage: job for job in slurm_jobs(experiment)}
    own = {stage_of(process) for process in processes(experiment, "workflow.job")}
    records = read_records(experiment)
    rows = [["stage", "state", "attempt", "job", "node", "elapsed", ""]]
    for name in stages_in(experiment.folder):
        stamped = (experiment.folder / STAMPS / name).is_file()
        rows.append(row(experiment, name, stamped, jobs.get(name), name in own, records.get(name)))
    print_table(rows)


def row(
    experiment: Experiment, name: str, stamped: bool, job: Job | None, own: bool, record: dict[str, Any] | None
) -> list[str]:
    """What status says of one stage."""
    code = record["code"] if record else 0
    if job and job.state == "PENDING":
        state = "queued"
    elif job or own:
        state = "running"
    elif stamped:
        state = "done" if record and code == 0 else "cached"
    elif code == 0:
        state = "waiting"
    elif code == STOPPED or (experiment.folder / STOP).exists():
        state = "stopped"
    else:
        state = "failed"  # without a code it was killed
    begun = record is not None and (job is None or record["job"] == job.id)
    if not begun or state in ("queued", "cached", "waiting"):
        return [name, state, "", job.id if job else "", "", "", job.reason if job and state == "queued" else ""]
    log = experiment.folder / record["log"]
    note = {"running": progress(log) or last_line(log), "failed": last_line(log)}.get(state, "")
    until = record["ended"] or (time.time() if state == "running" else None)
    elapsed = hours(until - record["started"]) if until else "killed"
    return [name, state, str(record["attempt"]), record["job"] or "", record["node"], elapsed, note]


def progress(log: Path) -> str:
    """The last line of workflow.stage.Progress in a log: how far, how long still, loss or reward; else nothing."""
    return next((line for line in reversed(tail(log)) if re.match(r".*: \d+/\d+(, |$)", line)), "")


def last_line(log: Path) -> str:
    return next((line for line in reversed(tail(log)) if line.strip()), "")


def tail(log: Path) -> list[str]:
    """The last lines of a log, at most 64 KiB."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        return file.read().decode(errors="replace").splitlines()


def hours(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def print_table(rows: list[list[str]]) -> None:
    """Print columns of text, the last one cut where the line ends."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    width = max(WIDTH, shutil.get_terminal_size().columns)
    for texts in rows:
        line = "  ".join(text.ljust(size) for text, size in zip(texts, widths, strict=True)).rstrip()
        print(line if len(line) <= width else line[: width - 1] + "…")


if __name__ == "__main__":
    # Not stage.run: what it sets for this machine's libraries would reach the jobs on others.
    try:
        main()
    except (ParamsError, StageError) as error:
        sys.exit(f"error: {error}")
