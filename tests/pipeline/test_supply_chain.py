"""What is installed is what was locked; nothing in the package runs text or data as code."""

import ast
import base64
import csv
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from requirements import licences

ROOT = Path(__file__).parents[2]
SETUPTOOLS = "setuptools-80.0-py3-none-any.whl"
PYTHON = """#!/bin/sh
[ "$2" = venv ] || exec {python} "$@"
{python} -m venv --without-pip .venv
echo 'exec {python} -m pip --python {folder}/.venv/bin/python "$@"' >.venv/bin/pip
chmod +x .venv/bin/pip
"""
# A line of code, and the rule that refuses it.
VIOLATIONS = {
    'exec("1")': "S102",
    'eval("1")': "S307",
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "import joblib": "TID251",
    "import dill": "TID251",
    "import cloudpickle": "TID251",
    "import pickle\npickle.loads(b'')": "S301",
    "import pandas\npandas.read_pickle('a')": "S301",
    "import marshal\nmarshal.loads(b'')": "S302",
    "import yaml\nyaml.load('')": "S506",
    "import subprocess\nsubprocess.run('ls', shell=True)": "S602",
    "run('ls', shell=True)": "S604",
    "import os\nos.system('ls')": "S605",
    "import os\nos.popen('ls')": "S605",
    "import tarfile\ntarfile.open('a').extractall()": "S202",
    "import os\nos.chmod('a', 0o777)": "S103",
    "import tempfile\ntempfile.mktemp()": "S306",
    "import requests\nrequests.get('a')": "S113",
    "import requests\nrequests.get('a', timeout=1, verify=False)": "S501",
    "import ssl\nssl._create_unverified_context()": "S323",
    "from paramiko import client as c\ns = c.SSHClient()\ns.set_missing_host_key_policy(c.AutoAddPolicy)": "S507",
    "try:\n    a()\nexcept Exception:\n    pass": "S110",
}
UNSAFE = {
    "AutoModel.from_pretrained(folder, trust_remote_code=True)": "trust_remote_code",
    "AutoModel.from_pretrained(folder, trust_remote_code=wanted)": "trust_remote_code",
    "AutoModel.from_pretrained(folder, **{'trust_remote_code': True})": "trust_remote_code",
    "options['trust_remote_code'] = True": "trust_remote_code",
    "model.trust_remote_code = True": "trust_remote_code",
    "dict(trust_remote_code=1)": "trust_remote_code",
    "torch.load(file)": "torch.load",
    "torch.load(file, weights_only=False)": "torch.load",
    "torch.load(file, weights_only=safe)": "torch.load",
    "from torch import load": "torch.load",
    "numpy.load(file, allow_pickle=True)": "allow_pickle",
}
SAFE = (
    "AutoModel.from_pretrained(folder, trust_remote_code=False)",
    "REFUSED = {'trust_remote_code': 'code from a model repository is never run'}",
    "torch.load(file, map_location='cpu', weights_only=True)",
    "json.load(file)",
)


def unsafe(code: str) -> list[str]:
    """What could run code that comes with a model, by name: what ruff has no rule for."""
    found = []

    def look(name: str, value: ast.expr, harmless: tuple[object, ...] = (False,)) -> None:
        if name in ("trust_remote_code", "allow_pickle") and not (
            isinstance(value, ast.Constant) and (value.value in harmless or isinstance(value.value, str))
        ):
            found.append(name)

    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.keyword(arg=str(name), value=value):
                look(name, value)
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant):
                        look(str(key.value), value)
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))], value=value):
                look(name, value)
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=value):
                look(name, value)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                only = [word.value for word in keywords if word.arg == "weights_only"]
                if not (only and isinstance(only[0], ast.Constant) and only[0].value is True):
                    found.append("torch.load")
            case ast.ImportFrom(module="torch", names=names) if any(name.name == "load" for name in names):
                found.append("torch.load")
    return found


@pytest.mark.parametrize(("code", "name"), UNSAFE.items())
def test_unsafe_loading_is_seen(code, name):
    assert unsafe(code) == [name]


def test_the_package_loads_nothing_that_runs_code():
    assert [unsafe(code) for code in SAFE] == [[]] * len(SAFE)
    modules = sorted((ROOT / "workflow").rglob("*.py"))
    assert len(modules) > 40
    assert {module.name: unsafe(module.read_text()) for module in modules if unsafe(module.read_text())} == {}


def test_every_violation_is_named_by_ruff(tmp_path):
    for number, code in enumerate(VIOLATIONS):
        (tmp_path / f"planted_{number}.py").write_text(f"{code}\n")
    command = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run([*command, "--output-format", "concise", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    said = re.findall(r"planted_(\d+)\.py:\S+ (\w+) ", done.stdout)
    assert [
        (code, rule) for number, (code, rule) in enumerate(VIOLATIONS.items()) if (str(number), rule) not in said
    ] == []


def test_no_rule_is_switched_off_in_the_package():
    """Neither for a line nor for a file."""
    code = "\n".join(module.read_text() for module in (ROOT / "workflow").rglob("*.py"))
    assert re.findall(r"# (?:ruff: )?noqa(?:: ?(?:S\d|TID)|\s*$)", code, re.MULTILINE) == []
    assert "per-file-ignores" not in (ROOT / "pyproject.toml").read_text()


def test_a_lock_has_the_checksums_of_what_fits(tmp_path):
    wheels = {
        "1": "a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "2": "a-1-cp311-cp311-manylinux_2_28_aarch64.whl",
        "3": "a-1-cp38-abi3-manylinux2014_x86_64.whl",
        "4": "a-1-py2.py3-none-any.whl",
        "5": "a-1+cpu-py3-none-linux_x86_64.whl",
        "6": "a-1-cp310-cp310-manylinux_2_17_x86_64.whl",
        "7": "a-1-cp312-abi3-manylinux_2_17_x86_64.whl",
        "8": "a-1-cp311-cp311-musllinux_1_2_x86_64.whl",
        "9": "a-1-cp311-cp311-macosx_11_0_arm64.whl",
        "a": "a-1-cp311-cp311-win_amd64.whl",
        "b": "a-1-cp311-cp311-manylinux_2_17_i686.whl",
    }
    files = [
        f'{{url = "https://example.invalid/{name}", hashes = {{sha256 = "{key}"}}}}' for key, name in wheels.items()
    ]
    source = '{url = "https://example.invalid/a-1.tar.gz", hashes = {sha256 = "0"}}'
    pylock = f'[[packages]]\nname = "a"\nversion = "1"\nsdist = {source}\nwheels = [{", ".join(files)}]\n'
    assert lock(tmp_path, pylock) == (0, "")
    fitting = " \\\n".join(f"    --hash=sha256:{key}" for key in "012345")
    assert (tmp_path / "lock.txt").read_text() == f"a==1 \\\n{fitting}\n"
    pylock = f'[[packages]]\nname = "a"\nversion = "1"\nwheels = [{files[-1]}]\n'
    assert lock(tmp_path, pylock) == (1, "error: a 1 has no file for CPython 3.11 on Linux\n")


def table() -> list[dict[str, str]]:
    with licences.TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_locked_package_has_its_licence_in_the_table():
    listed = {(row["package"], row["version"]): row["locks"].split() for row in table()}
    assert listed == licences.wanted() and len(listed) == len(table()) > 380
    assert listed["torch", "2.13.0+cpu"] == ["cpu"] and listed["torch", "2.13.0"] == ["gpu"]
    unknown = [row["package"] for row in table() if row["licence"] in ("", "UNKNOWN")]
    assert unknown == [row["package"] for row in table() if row["licence"] == "UNKNOWN" and row["remark"]]
    assert unknown == ["cuda-toolkit"]


def test_the_table_says_what_installed_packages_say():
    installed = licences.installed()
    rows = [row for row in table() if (row["package"], row["version"]) in installed]
    assert len(rows) > 300
    assert [row for row in rows if row["licence"] != installed[row["package"], row["version"]]] == []


def test_copyleft_is_marked():
    marked = {row["package"] for row in table() if row["kind"] == "copyleft"}
    assert marked >= {"asyncssh", "certifi", "chardet", "grandalf", "orjson", "pebble", "pycountry", "pygit2", "tqdm"}
    assert marked == {row["package"] for row in table() if re.search("GPL|MPL|Mozilla|GNU", row["licence"])}
    assert {row["package"] for row in table() if row["kind"] == "proprietary" and "cpu" in row["locks"]} == {
        "intel-cmplr-lib-ur",
        "intel-openmp",
    }


@pytest.mark.parametrize(
    ("expression", "classifiers", "field", "licence"),
    [
        ("MIT", ["License :: OSI Approved :: BSD License"], "GPL", "MIT"),
        (
            None,
            ["License :: OSI Approved :: BSD License", "License :: Public Domain"],
            "x",
            "BSD License; Public Domain",
        ),
        (None, ["License :: OSI Approved", "Topic :: Licenses"], "Apache-2.0\n\nTerms", "Apache-2.0"),
        (None, [], None, "UNKNOWN"),
        ("", [], "  \n", "UNKNOWN"),
    ],
)
def test_where_a_licence_is_taken_from(expression, classifiers, field, licence):
    assert licences.licence("no-such-package", expression, classifiers, field) == licence
    assert licences.licence("math-verify", expression, classifiers, field) in (licence, "Apache-2.0")


def lock(folder: Path, pylock: str) -> tuple[int, str]:
    """Exit code and errors of the command that writes lock.txt."""
    (folder / "pylock.toml").write_text(pylock)
    command = [sys.executable, ROOT / "requirements/lock.py", folder / "pylock.toml", folder / "lock.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def wheel(folder: Path, name: str) -> str:
    """Write a wheel with one module; return its checksum."""
    package, version, *_ = name.split("-")
    info = f"{package}-{version}.dist-info"
    texts = {
        f"{package}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digest = {path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()) for path, text in texts.items()}
    record = [f"{path},sha256={digest[path].decode().rstrip('=')},{len(text)}" for path, text in texts.items()]
    with ZipFile(folder / name, "w") as archive:
        for path, text in {**texts, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,", ""])}.items():
            archive.writestr(path, text)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("checksum", "installed", "said"),
    [
        ("{right}", True, "No module named 'setuptools."),  # the made-up one cannot install the pipeline itself
        ("0" * 64, False, "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE"),
        ("", False, "Hashes are required in --require-hashes mode"),
    ],
    ids=["right", "wrong", "none"],
)
def test_make_install_takes_only_files_with_the_locked_checksum(tmp_path, environment, checksum, installed, said):
    """The real recipe, with a lock of two packages that lie in a folder."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "files").mkdir()
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    right = wheel(tmp_path / "files", "tampered-1.0-py3-none-any.whl")
    checksums = {
        "setuptools==80.0": wheel(tmp_path / "files", SETUPTOOLS),
        "tampered==1.0": checksum.format(right=right),
    }
    hashes = {
        package: f" \\\n    --hash=sha256:{checksum}" if checksum else "" for package, checksum in checksums.items()
    }
    (tmp_path / "requirements/gpu.txt").write_text("".join(f"{package}{hashes[package]}\n" for package in hashes))
    python = tmp_path / "python"  # makes the environment, but with this pip: `ensurepip` takes ten seconds
    python.write_text(PYTHON.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    only_here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "files"), "PIP_CONFIG_FILE": os.devnull}
    command = ["make", "install", "LOCK=requirements/gpu.txt", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | only_here, capture_output=True, text=True)
    packages = tmp_path / ".venv/lib/python3.11/site-packages"
    assert done.returncode == 2 and said in done.stdout + done.stderr
    assert (packages / "setuptools-80.0.dist-info").is_dir()
    assert (packages / "tampered").is_dir() == installed
    assert not (tmp_path / ".venv/installed.gpu.txt").exists()
