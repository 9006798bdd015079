"""DVC's remotes as the documentation uses them: an SSH server and an S3 server on this machine, and a group's cache."""

import getpass
import hashlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.checkout import Checkout

# What is in DVC's hands in these tests: the second source is large enough for its push to be interrupted.
TARGETS = "check download@arithmetic download@large"
PARTS, PART_SIZE = 6, 10 * 2**20
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")

needs_sshd = pytest.mark.skipif(SSHD is None, reason="no sshd here; install it: apt-get install openssh-server")


def clone(checkout: Checkout, folder: Path) -> Checkout:
    """What a second person has after `git clone`."""
    checkout.run(f"git clone -q . {folder}")
    return Checkout.in_folder(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose sources are made and committed; it has no remote."""
    source = tmp_path_factory.mktemp("large")
    for part in range(PARTS):
        (source / f"{part}.bin").write_bytes(os.urandom(PART_SIZE))
    checkout = Checkout(tmp_path_factory.mktemp("made"))
    large = f"  large: {{into: raw, origin: path, path: {source}}}"
    checkout.edit("params.yaml", "sources:\n", f"sources:\n{large}\n")
    checkout.run(f"dvc repro {TARGETS}")
    checkout.commit("sources")
    return checkout


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, SSH configuration, credential or proxy of the person who runs the tests."""
    for name in ("SSH_AUTH_SOCK", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "home").mkdir()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The folder of a running sshd that listens on 127.0.0.1 only: its port, its keys and the store that it serves."""
    folder = tmp_path / "server"
    folder.mkdir()
    for key in ("host", "user", "wrong"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    settings = {
        "Port": (folder / "port").read_text(),
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": folder / "pid",
        "PermitRootLogin": "prohibit-password",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, and the package's service makes it
    start(folder)
    yield folder
    if (folder / "pid").is_file():
        kill(folder)


@pytest.fixture
def bucket(alone: None) -> Iterator[Any]:
    """An empty bucket (boto3) of a running S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    service = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    address = "http://{}:{}".format(*service.get_host_and_port())
    access = {"aws_access_key_id": "me", "aws_secret_access_key": "secret"}
    bucket = boto3.resource("s3", endpoint_url=address, region_name="us-east-1", **access).Bucket("group")
    bucket.create()
    yield bucket
    service.stop()


def start(folder: Path) -> None:
    """Start sshd and wait until it listens."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    deadline = time.monotonic() + 20
    while "Server listening" not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


def kill(folder: Path) -> None:
    """End sshd and every connection at once, as a power failure does."""
    listener = psutil.Process(int((folder / "pid").read_text()))
    processes = [*listener.children(recursive=True), listener]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=20)
    (folder / "pid").unlink()


def half_way(store: Path) -> bool:
    """Whether a large object is being written to a remote."""
    for path in store.glob("files/md5/*/*.tmp"):
        with suppress(FileNotFoundError):  # it is complete since, and has its name
            if path.stat().st_size > 2**20:
                return True
    return False


def add_ssh_remote(checkout: Checkout, server: Path) -> None:
    """A remote that git takes to everybody; what is one's own stays in .dvc/config.local."""
    checkout.run(f"dvc remote add --default store ssh://{getpass.getuser()}@127.0.0.1{server}/store")
    checkout.run(f"dvc remote modify store port {(server / 'port').read_text()}")
    checkout.run(f"dvc remote modify --local store keyfile {server}/user")
    checkout.commit("remote")


def whole_objects(store: Path) -> int:
    """How many objects a remote has; each must have the content that its name says."""
    objects = [path for path in store.glob("files/md5/*/*") if path.suffix != ".tmp"]
    for path in objects:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.stem
    return len(objects)


def assert_nothing_to_do(checkout: Checkout) -> None:
    assert "Data and pipelines are up to date" in checkout.run(f"dvc status {TARGETS}")
    done = checkout.run(f"dvc repro {TARGETS}")
    assert "Running stage" not in done and done.count("didn't change, skipping") == len(TARGETS.split())


@needs_sshd
def test_what_one_pushes_over_ssh_another_pulls(made, server, alone, tmp_path):
    mine = clone(made, tmp_path / "mine")
    mine.run(f"dvc cache dir --local {made.folder}/.dvc/cache")
    add_ssh_remote(mine, server)
    assert "files pushed" in mine.run(f"dvc push --run-cache {TARGETS}")
    assert "in sync" in mine.run(f"dvc status --cloud {TARGETS}")
    assert whole_objects(server / "store") > PARTS

    theirs = clone(mine, tmp_path / "theirs")
    theirs.run(f"dvc remote modify --local store keyfile {server}/user")
    theirs.run(f"dvc pull {TARGETS}")
    assert len(list(theirs.folder.glob("data/raw/large/*.bin"))) == PARTS
    assert_nothing_to_do(theirs)

    # Without a dvc.lock that knows the result, the run cache does.
    theirs.run("rm -r dvc.lock data .dvc/cache")
    done = theirs.run(f"dvc repro --pull {TARGETS}")
    assert "Running stage" not in done and done.count("is cached - skipping run") == len(TARGETS.split())
    # DVC writes the stages in the order in which it took up the targets.
    lock, other = (yaml.safe_load((each.folder / "dvc.lock").read_text()) for each in (mine, theirs))
    assert lock == other


@needs_sshd
def test_a_server_that_dies_during_a_push(made, server, alone, tmp_path):
    mine = clone(made, tmp_path / "mine")
    mine.run(f"dvc cache dir --local {made.folder}/.dvc/cache")
    add_ssh_remote(mine, server)
    with ThreadPoolExecutor(1) as thread:
        push = thread.submit(mine.run, f"dvc push {TARGETS}", fails=True)
        while not half_way(server / "store"):
            assert not push.done(), push.result()
            time.sleep(0.005)
        kill(server)
        said = push.result()
    assert re.search("^ERROR: failed to transfer '", said, re.M) and "Traceback" not in said, said
    before = whole_objects(server / "store")
    said = mine.run(f"dvc push {TARGETS}", fails=True)
    assert "Connect call failed ('127.0.0.1'" in said and "Traceback" not in said, said

    start(server)
    assert "files pushed" in mine.run(f"dvc push {TARGETS}")
    assert "in sync" in mine.run(f"dvc status --cloud {TARGETS}")
    assert whole_objects(server / "store") > max(before, PARTS)


@needs_sshd
def test_a_wrong_key(made, server, alone, tmp_path):
    mine = clone(made, tmp_path / "mine")
    add_ssh_remote(mine, server)
    mine.run(f"dvc remote modify --local store keyfile {server}/wrong")
    said = mine.run("dvc pull check", fails=True)
    assert f"Permission denied for user {getpass.getuser()} on host 127.0.0.1" in said and "Traceback" not in said, said
    mine.run(f"dvc remote modify --local store keyfile {server}/missing")
    said = mine.run("dvc pull check", fails=True)
    assert f"No such file or directory: '{server}/missing'" in said and "Traceback" not in said, said


def test_what_one_pushes_to_s3_another_pulls(made, bucket, tmp_path):
    mine = clone(made, tmp_path / "mine")
    mine.run(f"dvc cache dir --local {made.folder}/.dvc/cache")
    mine.run("dvc remote add --default store s3://group/open-r1")
    mine.run(f"dvc remote modify store endpointurl {bucket.meta.client.meta.endpoint_url}")
    mine.commit("remote")
    said = mine.run("dvc push check", fails=True)
    assert "Unable to locate credentials" in said and "Traceback" not in said, said
    credentials = "AWS_ACCESS_KEY_ID=me AWS_SECRET_ACCESS_KEY=secret"
    assert "files pushed" in mine.run(f"{credentials} dvc push --run-cache {TARGETS}")
    keys = [item.key for item in bucket.objects.all()]
    assert all(key.startswith(("open-r1/files/md5/", "open-r1/runs/")) for key in keys) and len(keys) > PARTS

    theirs = clone(mine, tmp_path / "theirs")
    theirs.run("dvc remote modify --local store access_key_id me")
    theirs.run("dvc remote modify --local store secret_access_key secret")
    theirs.run(f"dvc pull {TARGETS}")
    assert_nothing_to_do(theirs)
    assert "config.local" not in theirs.run("git status --short")

    theirs.run("dvc remote modify store url s3://nobodys/open-r1")
    said = theirs.run("dvc push check", fails=True)
    assert "The specified bucket does not exist" in said and "Traceback" not in said, said


def test_a_group_shares_one_cache(made, tmp_path):
    """Every member's checkout has its own config.local; nothing is computed, copied or stored twice."""
    cache = tmp_path / "cache"
    cache.mkdir()
    members = [clone(made, tmp_path / name) for name in ("one", "other")]
    for member in members:
        member.run(f"dvc cache dir --local {cache}")
        member.run("dvc config --local cache.shared group && dvc config --local cache.type symlink")
        (member.folder / "dvc.lock").unlink()
    one, other = (member.run(f"umask 077; dvc repro {TARGETS}") for member in members)
    assert one.count("Running stage") == other.count("is cached - skipping run") == len(TARGETS.split())
    assert "Running stage" not in other
    for member in members:
        assert_nothing_to_do(member)
        parts = list((member.folder / "data/raw/large").glob("*.bin"))
        assert len(parts) == PARTS and all(part.resolve().is_relative_to(cache) for part in parts)
    # The group may add to every folder and read every object, whatever umask a member has.
    for path in cache.rglob("*"):
        mode = path.stat().st_mode & 0o7777
        assert mode == 0o2775 if path.is_dir() else mode & 0o444 == 0o444, f"{path}: {mode:o}"
