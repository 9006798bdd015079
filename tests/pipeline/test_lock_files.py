"""requirements/*.txt are complete, plain, have checksums, agree with pyproject.toml and are what is installed."""

import re
import shutil
import subprocess
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ("cpu", "gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Not in the lock: torchvision and its like break with the CPU build of torch.
UNWANTED = {"torchaudio", "torchcodec", "torchvision"}


def entries(lock: str) -> list[str]:
    """One string for each package of a file of `requirements`: version and checksums."""
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    return re.sub(r" \\\n {4}", " ", text).splitlines()


def pins(lock: str) -> dict[str, str]:
    """Versions by name, with the torch that `make install` takes for CPUs."""
    taken = entries(lock) + (entries("cpu.override")[-1:] if lock == "cpu" else [])
    found = dict(entry.split(" ")[0].split("==") for entry in taken)
    assert len(found) > 200
    return found


def declared() -> list[tuple[str, str]]:
    """(group, requirement) of everything pyproject.toml asks for."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return [(group, requirement) for group, requirements in groups.items() for requirement in requirements]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_is_one_version_with_its_checksums_and_nothing_else(lock):
    """No address of an index, no option: they are of the machine that installs."""
    pattern = r"[a-z0-9][a-z0-9-]*==[0-9][A-Za-z0-9.+]*( --hash=sha256:[0-9a-f]{64})+"
    assert [entry for entry in entries(lock) if not re.fullmatch(pattern, entry)] == []
    names = [entry.split("==")[0] for entry in entries(lock)]
    assert names == sorted(set(names))
    assert all(name == canonicalize_name(name) for name in names)
    for entry in entries(lock):
        _, *checksums = entry.split(" ")
        assert checksums == sorted(set(checksums))


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize(("group", "requirement"), declared())
def test_what_is_asked_for_is_locked(lock, group, requirement):
    wanted = Requirement(requirement)
    (version,) = (specifier.version for specifier in wanted.specifier if specifier.operator == "==")
    name = canonicalize_name(wanted.name)
    if group in LOCKS and group != lock:
        assert name not in pins(lock)
    elif (lock, name) == ("cpu", "torch"):
        assert pins(lock)[name] == f"{version}+cpu"
    else:
        assert pins(lock)[name] == version


def test_everything_is_looked_at():
    assert {group for group, _ in declared()} >= {"", "train", "generate", "cpu", "gpu", "score", "report", "dev"}
    assert len(declared()) > 30


def test_nothing_that_breaks_the_cpu_torch():
    assert not UNWANTED & set(pins("cpu"))


def test_the_override_is_the_asked_for_torch_as_two_wheels():
    """It has the checksums of x86_64 and aarch64, and stands in no other file: most indexes do not have it."""
    (torch,) = [entry for entry in entries("cpu.override") if not entry.startswith("#")]
    (asked,) = {requirement for _, requirement in declared() if requirement.startswith("torch==")}
    assert re.fullmatch(re.escape(f"{asked}+cpu") + r"( --hash=sha256:[0-9a-f]{64}){2}", torch)
    assert not any(entry.startswith("torch==") for entry in entries("cpu"))


def test_the_two_locks_differ_only_where_hardware_does():
    """A result may not depend on which of two files a library of the pipeline came from."""
    cpu, gpu = pins("cpu"), pins("gpu")
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different <= {"torch", "triton", "setuptools", "apache-tvm-ffi"}


def test_installed_is_what_is_locked():
    """The lock that `make install` takes on this machine."""
    query = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    locked = pins("gpu" if query else "cpu")
    # setuptools, where another test has imported it, puts its own copies of some packages on the path.
    here = distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(found.name): found.version for found in here}
    assert {name: installed.get(name) for name in locked} == locked
    if not query:
        assert not UNWANTED & set(installed)
