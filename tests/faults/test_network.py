"""A download that is killed goes on with the files that are missing.

Connections that are cut or reset, wrong bytes, busy hubs and revisions that do not exist are in
tests/unit/test_download.py; a run without a network is in tests/e2e/test_pipeline.py.
"""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

from tests.checkout import ROOT
from tests.hub_server import HubServer


def test_a_download_that_is_killed_goes_on(tmp_path: Path) -> None:
    repo = tmp_path / "repos/datasets/tiny/problems"
    repo.mkdir(parents=True)
    rng = random.Random(1)
    for name in ("first.parquet", "second.parquet"):
        (repo / name).write_bytes(rng.randbytes(40_000_000))  # huggingface_hub writes pieces of 10 MiB
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with HubServer(tmp_path / "repos") as hub:
        revision = hub.revision("tiny/problems", "datasets")
        source = {"into": "raw", "origin": "hub", "repo": "tiny/problems", "revision": revision}
        params["sources"]["traces"] = source
        YAML(typ="safe").dump(copy.deepcopy(params), tmp_path / "params.yaml")
        command = [sys.executable, "-m", "workflow.download", "traces", "--output", "data/traces", "--log", "log"]
        options = {"cwd": tmp_path, "env": environment | hub.environment(tmp_path), "text": True}
        hub.faults["second.parquet"] = 3 * ["hang"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        scratch = tmp_path / ".scratch/download"
        while not (
            list(scratch.glob("*/first.parquet"))
            and any(file.stat().st_size > 10_000_000 for file in scratch.rglob("*.incomplete"))
        ):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "data").exists()
        hub.faults.clear()
        before = len(hub.requests)
        done = subprocess.run(command, capture_output=True, **options)
        assert done.returncode == 0, done.stderr
        for name in ("first.parquet", "second.parquet"):
            assert (tmp_path / "data/traces" / name).read_bytes() == (repo / name).read_bytes()
        asked = [path for method, path, _ in hub.requests[before:] if method == "GET"]
        assert not [path for path in asked if path.endswith("first.parquet")], "it was there"
        assert [path for path in asked if path.endswith("second.parquet")]
    assert list(tmp_path.glob(".scratch/download/*")) == []
