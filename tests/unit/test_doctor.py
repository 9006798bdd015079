import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.checkout import CANARIES, ROOT
from workflow import doctor, locks

REAL_DISK_USAGE = shutil.disk_usage
NOBODY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
NAMES = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, as root")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with what the doctor reads, in which the test runs; a home of its own, and nobody's tokens."""
    for name in (*CANARIES, *NAMES, "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "HARDWARE", "NETRC", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    for name, value in {**NOBODY, "HOME": str(home), "HF_HOME": str(home / "hf")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    folder = tmp_path / "checkout"
    for part in (".dvc/tmp", "data", "requirements"):
        (folder / part).mkdir(parents=True)
    home.mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    for lock in ("cpu.txt", "cpu.override.txt", "gpu.txt"):
        shutil.copy(ROOT / "requirements" / lock, folder / "requirements")
    monkeypatch.chdir(folder)
    git("init", "-q")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    git(*identity, "commit", "-qm", "start", "--allow-empty")
    return folder


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script before all others in PATH."""
    (tmp_path / "bin").mkdir()

    def put(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return put


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder in memory, so on another file system than the checkout."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def examine(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command line."""
    command = [sys.executable, *options, "-m", "workflow.doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_sound_installation(checkout):
    git("config", "user.name", "test")
    git("config", "user.email", "test@example.invalid")
    code, said = examine(checkout)
    lines = said.splitlines()
    assert code == 0 and lines[-1].startswith("errors 0, "), said
    points = ["Python", "packages", "GPU", "hardware", "machine", "limits", "room", "links", "renaming", "locks"]
    points += ["locks", "DVC files", "git", "SLURM", *("HF_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN")]
    assert [line[9:31].strip() for line in lines[:-1]] == [*points, "HF_ENDPOINT"]
    assert [path.name for path in checkout.rglob("*doctor*")] == []


def test_a_broken_installation(checkout):
    lock = checkout / "requirements/cpu.txt"
    lock.write_text(re.sub(r"^trl==.*", "trl==0.1.0", lock.read_text(), flags=re.MULTILINE))
    (checkout / "dvc.lock").write_text("schema: '2.0'\nstages:\n  check: {cmd: [")
    login = checkout.parent / "home/hf/token"
    login.parent.mkdir()
    login.write_text(CANARIES["HF_TOKEN"])
    login.chmod(0o644)
    tokens = {"WANDB_API_KEY": CANARIES["WANDB_API_KEY"], "MODELSCOPE_API_TOKEN": "ms-canary"}
    code, said = examine(checkout, **tokens, HF_ENDPOINT="https://me:hub-canary@hub.example.invalid/path")
    assert code == 1
    found = {line[9:31].strip(): line for line in said.splitlines()}
    assert found["packages"].startswith("error") and "touch requirements/cpu.txt && make install" in found["packages"]
    assert found["DVC files"].startswith("error    DVC files             dvc.lock cannot be read")
    assert found["HF_TOKEN"].endswith(f"others can read {login}: chmod 600 {login}")
    assert found["WANDB_API_KEY"].split()[-1] == found["MODELSCOPE_API_TOKEN"].split()[-1] == "set"
    assert found["HF_ENDPOINT"].endswith("https://hub.example.invalid")
    assert said.splitlines()[-1].startswith("errors 2, warnings ")
    secrets = [*CANARIES.values(), "ms-canary", "hub-canary"]
    assert not any(secret[at : at + 8] in said for secret in secrets for at in range(len(secret) - 7))


def test_without_the_packages(checkout):
    code, said = examine(checkout, "-S")
    assert code == 1
    assert "absl-py missing" in said and "all else              not looked at without dvc: make install" in said


def test_elsewhere(tmp_path):
    code, said = examine(tmp_path)
    assert (code, said) == (1, "error: there is no .dvc/config here; run it in the folder of the repository\n")


def test_torch_is_not_imported_without_a_gpu(checkout):
    code = "import sys; from workflow import doctor; print(len(list(doctor.examine())), 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "18 False\n", done.stderr


def test_another_python(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 12, 1))
        found = doctor.check_python()
    assert found[0] == "error" and "need 3.11; make install PYTHON=" in found[1]


def test_commands_of_another_environment(checkout, command):
    assert doctor.check_python()[0] == "ok"
    command("accelerate", "exit 0")
    level, found = doctor.check_python()
    assert level == "warning" and "bin/accelerate; source .venv/bin/activate" in found


def test_packages_that_differ(checkout):
    lock = checkout / "requirements/cpu.txt"
    assert doctor.check_packages(lock)[0] == "ok"
    override = checkout / "requirements/cpu.override.txt"
    override.write_text(override.read_text().replace("torch==2", "torch==1"))
    assert doctor.check_packages(lock)[1].startswith("1 of ")
    override.unlink()
    lock.write_text(
        "ruamel_yaml==0.1 \\\n    --hash=sha256:00\nNo.Such==2\npytest==9 ; python_version > '3'\nruff==0\n"
    )
    level, found = doctor.check_packages(lock)
    assert level == "error" and found.startswith(f"4 of 4 are not as in {lock} (ruamel_yaml 0.")
    assert "No.Such missing, not 2" in found and ", …): touch" in found and "ruff" not in found


def test_the_build_of_torch_counts_where_the_lock_names_it(tmp_path, monkeypatch):
    (tmp_path / "torch-2.13.0+cu130.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    lock = tmp_path / "lock.txt"
    for version, level in {"2.13.0": "ok", "2.13.0+cu130": "ok", "2.13.0+cpu": "error", "2.13": "error"}.items():
        lock.write_text(f"torch=={version}\n")
        assert doctor.check_packages(lock)[0] == level


def test_the_lock_is_that_of_make_install(checkout, command):
    command("nvidia-smi", "exit 9")
    assert doctor.lock_file() == Path("requirements/cpu.txt")
    (checkout / ".venv").mkdir()
    for age, name in enumerate(["gpu", "cpu"]):  # first LOCK=requirements/gpu.txt alone, then an older cpu.txt too
        mark = checkout / f".venv/installed.{name}.txt"
        mark.touch()
        os.utime(mark, (1e9 - age, 1e9 - age))
        assert doctor.lock_file() == Path("requirements/gpu.txt")
    os.utime(mark)
    assert doctor.lock_file() == Path("requirements/cpu.txt")
    command("nvidia-smi", "exit 0")
    assert doctor.lock_file() == Path("requirements/gpu.txt")


@pytest.mark.parametrize(
    ("torch", "visible", "level", "found"),
    [
        ((True, "2.13.0+cu130 13.0 2"), None, "ok", "2 x NVIDIA H100, 580.1; torch 2.13.0+cu130 sees 2"),
        ((True, "2.13.0+cu130 13.0 0"), None, "error", "sees none: install a driver for CUDA 13.0"),
        ((True, "2.13.0+cu130 13.0 0"), "", "ok", "torch 2.13.0+cu130 sees 0"),
        ((True, "2.13.0+cpu None 0"), None, "error", "(2.13.0+cpu): make install LOCK=requirements/gpu.txt"),
        ((False, "ImportError: libcudart"), None, "error", "(ImportError: libcudart): make install LOCK="),
    ],
)
def test_gpus_and_torch(command, monkeypatch, torch, visible, level, found):
    command("nvidia-smi", "echo NVIDIA H100, 580.1; echo NVIDIA H100, 580.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answer = doctor.answer
    monkeypatch.setattr(doctor, "answer", lambda *c, **k: torch if c[0] == sys.executable else answer(*c, **k))
    said = doctor.check_gpu()
    assert said[0] == level and found in said[1]


def test_a_driver_that_does_not_answer(command):
    command("nvidia-smi", "echo couldn\\'t communicate with the NVIDIA driver; exit 9")
    level, found = doctor.check_gpu()
    assert level == "warning" and "communicate with the NVIDIA driver): mend the driver" in found


def test_an_unknown_hardware_file(monkeypatch):
    monkeypatch.setenv("HARDWARE", "cpu")
    assert doctor.check_hardware() == ("ok", "cpu: nodes 1, training processes on each 2")
    monkeypatch.setenv("HARDWARE", "tpu")
    level, found = doctor.check_hardware()
    assert level == "error" and "HARDWARE is 'tpu'; write one of: cpu, " in found


def usage(free: float, total: float = 1e12) -> Callable[[object], object]:
    return lambda path: REAL_DISK_USAGE(path)._replace(free=free, total=total)


def test_little_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", usage(0, total=64 * 2**20))
    level, found = doctor.check_machine()
    assert level == "warning" and found.endswith("/dev/shm 0.1 GiB: start the container with --shm-size=8g")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**19, "SC_PAGE_SIZE": 4096}.get)
    level, found = doctor.check_machine()
    assert level == "warning" and "memory 2.0 GiB" in found and found.endswith("takes 4 GiB of memory")


def test_low_limits(environment):
    code = "from workflow import doctor; print(doctor.check_limits())"
    command = f"ulimit -S -n 512 && ulimit -S -f 5000 && exec {sys.executable} -c '{code}'"
    said = subprocess.check_output(["bash", "-c", command], env=environment, text=True)
    assert said.startswith("('warning', '-n 512, -u ") and said.endswith(": ulimit -n 1024 -f unlimited')\n")


@pytest.mark.parametrize(("free", "level"), [(20e9, "ok"), (5e9, "warning"), (0.5e9, "error")])
def test_room(checkout, monkeypatch, free, level):
    monkeypatch.setattr(shutil, "disk_usage", usage(free))
    said = doctor.check_room([Path("data"), Path(".dvc/cache")])
    assert said[0] == level and said[1].startswith(f"data {free / 1e9:.1f} GB, .dvc/cache {free / 1e9:.1f} GB")
    assert ("make room (.scratch/checkpoints has" in said[1]) == (level != "ok")


@needs_root
def test_a_full_and_a_read_only_disk(checkout):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "data"], check=True)
    try:
        with pytest.raises(OSError, match="No space"), (checkout / "data/filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
        level, found = doctor.check_room([Path(".scratch"), Path("data")])
        assert level == "error" and found.startswith("data cannot be written to (No space left on device)")
        subprocess.run(["mount", "-o", "remount,ro", "data"], check=True)
        said = dict(doctor.examine())
    finally:
        subprocess.run(["umount", "--lazy", "data"], check=True)
    assert said["room"][0] == "error" and "(Read-only file system)" in said["room"][1]
    assert "links" not in said and "HF_ENDPOINT" in said


def test_links(checkout, other_disk):
    near = Path(".dvc/cache")  # not there yet
    level, found = doctor.check_links(near, ["copy", "reflink"])
    assert level == "ok" and found.startswith("copy of cache.type copy,reflink; possible are ")
    assert "hardlink, symlink, copy: outputs take twice their size" in found
    level, found = doctor.check_links(near, ["hardlink", "copy"])
    assert level == "warning" and "writes to the cache; dvc config cache.type reflink,copy" in found
    level, found = doctor.check_links(other_disk, ["hardlink"])
    assert level == "error" and found.startswith("None of cache.type hardlink; possible are symlink, copy: DVC cannot")
    assert not near.exists() and list(other_disk.iterdir()) == []


@pytest.mark.parametrize("lock", ["flock", "lockf"])
def test_locks(checkout, monkeypatch, lock):
    level, found = doctor.check_locks(Path(".scratch"))
    assert level == "ok" and re.fullmatch(r"\.scratch is on [a-z]\w+, where flock and fcntl hold", found)

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, lock, none)
    level, found = doctor.check_locks(Path(".scratch"))
    assert level == "error" and f"where {lock} fails (No locks available): use a local disk" in found
    monkeypatch.setattr(fcntl, lock, lambda *_: None)  # it says that it locked, and did not
    level, found = doctor.check_locks(Path(".scratch"))
    assert level == "error" and f"where {lock} does not keep a second process out" in found
    assert not list(checkout.glob(".doctor-*"))


def test_locks_that_other_nodes_do_not_see(checkout, monkeypatch):
    monkeypatch.setattr(doctor, "answer", lambda *_: (True, "nfs rw,relatime,vers=3,nolock,proto=tcp"))
    level, found = doctor.check_locks(Path("data"))
    assert level == "warning" and found.startswith("data is on nfs with nolock, so no other node sees its locks: use")
    monkeypatch.setattr(doctor, "answer", lambda *_: (True, "nfs4   rw,relatime,vers=4.2,local_lock=none"))
    assert doctor.check_locks(Path("data")) == ("ok", "data is on nfs4, where flock and fcntl hold")


def test_renaming(checkout, other_disk):
    assert doctor.check_rename() == ("ok", "from .scratch to data in one step")
    (checkout / ".scratch").symlink_to(other_disk)
    level, found = doctor.check_rename()
    assert level == "warning" and "(Invalid cross-device link), so models are copied" in found


@pytest.mark.parametrize(
    ("file", "text"), [(locks.RWLOCK, '{"write": {"/data": {"pid"'), (locks.LOCK_FILE, "schema: '2.0'\nstages: {a: [")]
)
def test_files_that_a_killed_dvc_cut_off(checkout, file, text):
    assert doctor.check_dvc_files()[0] == "ok"
    file.write_text(text)
    level, found = doctor.check_dvc_files()
    assert level == "error" and found.startswith(f"{file} cannot be read") and found.endswith("workflow.locks")
    assert file.read_text() == text  # mending is for workflow.locks
    assert len(locks.mend()) == 1
    assert doctor.check_dvc_files()[0] == "ok"


def test_git(checkout, monkeypatch):
    level, found = doctor.check_git()
    assert level == "warning" and "no user.name, which dvc exp needs: git config --global user.name" in found
    git("config", "user.name", "test")
    assert "no user.email" in doctor.check_git()[1]
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "test@example.invalid")
    assert doctor.check_git() == ("ok", "a commit, and an identity")
    git("checkout", "-q", "--orphan", "empty")
    assert doctor.check_git()[0] == "error"
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.check_git()[0] == "error"


def test_slurm(command, monkeypatch):
    command("sbatch", "exit 1")
    command("sinfo", "echo gpu; echo cpu; echo gpu")
    assert doctor.check_slurm() == ("ok", "partitions cpu, gpu")
    command("sinfo", "echo usage; echo Unable to contact slurm controller >&2; exit 1")
    level, found = doctor.check_slurm()
    assert level == "warning" and found.startswith("no answer (Unable to contact slurm controller): ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.check_slurm() == ("ok", "none")


def test_a_command_that_hangs():
    there, said = doctor.answer("sleep", "60", seconds=0.1)
    assert not there and "timed out after 0.1 seconds" in said


def test_a_login_without_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    netrc = tmp_path / ".netrc"
    netrc.touch(0o600)
    for host, found in {
        "github.com": "neither set nor logged in",
        "api.wandb.ai": f"not set; the login in {netrc}",
    }.items():
        netrc.write_text(f"machine {host} login user password canary\n")
        level, said = doctor.check_token("WANDB_API_KEY", netrc, "wandb")
        assert level == "ok" and said.startswith(found) and "canary" not in said


@pytest.mark.parametrize("address", ["hub.example.invalid", "me:canary@hub.example.invalid", "ftp://me:canary@hub"])
def test_a_wrong_endpoint(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert doctor.check_endpoint() == ("error", "not an address: write https://host, or unset it")
