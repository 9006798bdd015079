"""The stage download, run as its real command against a hub on this machine, and what is left of it offline."""

import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import HubServer

ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(2000)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model and a data set, with what people put beside them."""
    folder = tmp_path_factory.mktemp("repos")
    model, data = folder / "models/tiny/base", folder / "datasets/tiny/problems"
    shutil.copytree(tiny_model, model)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1.0\n---\nA model.\n")
    for name in ("modeling_tiny.py", "pytorch_model.bin", "training_args.bin", "onnx/model.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"never downloaded")
    (data / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), data / "data/train-00000.parquet", compression="none")
    (data / "extra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:50]))
    (data / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\nProblems.\n")
    (data / "problems.py").write_text("raise SystemExit('never run')\n")
    (data / "dataset_infos.json").write_text("{}")
    return folder


@pytest.fixture
def hub(repos: Path) -> Iterator[HubServer]:
    with HubServer(repos) as server:
        yield server


@dataclasses.dataclass
class Done:
    """A run of the command."""

    ok: bool
    said: str
    folder: Path
    log: Path

    @property
    def files(self) -> set[str]:
        return {str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()}

    @property
    def source(self) -> dict[str, Any]:
        return json.loads((self.folder / "source.json").read_text())

    @property
    def error(self) -> str:
        """The one sentence that a failed run ends with."""
        assert not self.ok and not self.log.exists()
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.said, self.said
        return lines[0]


@pytest.fixture
def download(hub, sound, write_params, environment, tmp_path) -> Callable[..., Done]:
    """Runs the command for one source, which comes from tiny/base or tiny/problems where it does not say from where."""

    def run(name: str, token: str | None = None, env: dict[str, str] | None = None, **keys: Any) -> Done:
        into = "models" if name == "base" else "raw"
        if "origin" not in keys:
            keys = {"origin": "hub", "repo": "tiny/base" if name == "base" else "tiny/problems", **keys}
            keys.setdefault("revision", hub.revision(keys["repo"], "models" if name == "base" else "datasets"))
        (tmp_path / "problems.jsonl").touch()  # of the recipe's other source
        sound["sources"][name] = {"into": into, **keys}
        write_params(sound)
        folder, log = tmp_path / "data" / into / name, tmp_path / "data/logs/download" / name
        done = subprocess.run(
            [sys.executable, "-m", "workflow.download", name, "--output", str(folder), "--log", str(log)],
            cwd=tmp_path,
            env={**environment, **hub.environment(tmp_path, token), **(env or {})},
            text=True,
            capture_output=True,
        )
        assert done.returncode in (0, 1)
        return Done(done.returncode == 0, done.stdout + done.stderr, folder, log)

    return run


def assert_same(done: Done, repo: Path, without: set[str] = frozenset()) -> None:
    """What was downloaded has the repository's bytes, and source.json their checksums."""
    assert done.ok, done.said
    for name in done.files - {"source.json"} - without:
        assert (done.folder / name).read_bytes() == (repo / name).read_bytes(), name
    files = {name: hashlib.sha256((done.folder / name).read_bytes()).hexdigest() for name in done.files}
    files.pop("source.json")
    assert done.source["files"] == files


# What comes and what is noted


def test_a_data_set(download, hub, repos):
    done = download("problems")
    assert done.files == {"data/train-00000.parquet", "extra.jsonl", "README.md", "source.json"}
    assert_same(done, repos / "datasets/tiny/problems")
    noted = {
        "origin": "tiny/problems",
        "revision": hub.revision("tiny/problems", "datasets"),
        "licence": "mit, cc-by-4.0",
    }
    assert {key: done.source[key] for key in noted} == noted
    log = json.loads((done.log / "stage.json").read_text())
    assert log["stage"] == "download" and log["item"] == "problems" and log["bytes"] > 50_000
    assert {key: log[key] for key in done.source} == done.source
    assert list(log["versions"]) == ["huggingface_hub"]
    asked = [path for method, path, _ in hub.requests if "resolve" in path]
    assert asked and not [path for path in asked if path.endswith((".py", "infos.json"))]


def test_a_model_and_its_chat_template(download, hub, repos):
    done = download("base", chat_template=TEMPLATE)
    wanted = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "source.json"}
    assert done.files == wanted
    assert_same(done, repos / "models/tiny/base", without={"chat_template.jinja", "tokenizer_config.json"})
    assert (done.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert done.source["licence"] == "tiny-1.0" and done.source["origin"] == "tiny/base"
    # Whether transformers can make it is known before the weights come.
    order = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET"]
    assert order.index("config.json") < order.index("model.safetensors")


def test_the_recipes_licence_is_kept(download):
    assert download("problems", licence="apache-2.0").source["licence"] == "apache-2.0"


def test_only_the_files_that_are_named(download, repos):
    done = download("problems", files=["data/*.parquet", "*.py"])
    assert done.files == {"data/train-00000.parquet", "README.md", "source.json"}
    assert_same(done, repos / "datasets/tiny/problems")


def test_the_token_goes_to_the_hub_and_not_to_its_storage(download, hub):
    hub.gated["tiny/problems"] = {"hf_mine"}
    assert download("problems", token="hf_mine").ok
    sent = {path: headers.get("authorization") for _, path, headers in hub.requests}
    stored = [path for path in sent if path.startswith("/storage/")]
    assert stored and not any(sent[path] for path in stored)
    assert {sent[path] for path in sent if "/api/datasets" in path or "/resolve/" in path} == {"Bearer hf_mine"}


# Connections that fail


def test_a_cut_connection_goes_on_where_it_ended(download, hub, tmp_path):
    """The client writes 10 MiB at a time, and goes on after the last of them."""
    hub.folder = tmp_path / "repos"
    large = hub.folder / "datasets/tiny/large"
    large.mkdir(parents=True)
    (large / "train.parquet").write_bytes(random.Random(0).randbytes(24 * 2**20))
    hub.faults["train.parquet"] = ["cut", "cut"]
    done = download("problems", repo="tiny/large")
    assert_same(done, large)
    ranges = [headers.get("range") for _, _, headers in hub.served("train.parquet")]
    assert ranges == [None, f"bytes={10 * 2**20}-", f"bytes={10 * 2**20}-"]


def test_a_connection_that_is_reset_starts_the_file_again(download, hub, repos):
    hub.faults["train-00000.parquet"] = ["reset"]
    assert_same(download("problems"), repos / "datasets/tiny/problems")
    assert len(hub.served("train-00000.parquet")) == 2


@pytest.mark.parametrize("where", ["/revision/{revision}", "train-00000.parquet"])
@pytest.mark.parametrize("status", ["429", "503"])
def test_a_busy_hub_is_waited_for(where, status, download, hub, repos):
    where = where.format(revision=hub.revision("tiny/problems", "datasets"))
    hub.faults[where] = [status]
    start = time.monotonic()
    assert_same(download("problems"), repos / "datasets/tiny/problems")
    assert time.monotonic() - start > 1  # Retry-After, or the first wait
    assert len(hub.served(where)) == 2


@pytest.mark.parametrize("file", ["data/train-00000.parquet", "extra.jsonl"])
def test_a_wrong_byte_is_mended(file, download, hub, repos):
    hub.faults[file] = ["wrong byte"]
    assert_same(download("problems"), repos / "datasets/tiny/problems")
    assert len(hub.served(file)) == 2


@pytest.mark.parametrize("file", ["data/train-00000.parquet", "extra.jsonl"])
def test_a_file_that_stays_wrong_is_an_error(file, download, hub):
    hub.faults[file] = ["wrong byte", "wrong byte"]
    done = download("problems")
    assert f"sources.problems: {file} of tiny/problems came twice with other bytes" in done.error
    assert not (done.folder / file).exists() and not (done.folder / "source.json").exists()


def test_a_hub_whose_xet_storage_fails(download, hub, repos):
    hub.xet = True
    done = download("problems")
    assert "tiny/problems could not be got from Xet storage (" in done.error and "HF_HUB_DISABLE_XET=1" in done.error
    assert [path for _, path, _ in hub.requests if "/reconstructions/" in path]
    assert not done.folder.exists()
    assert_same(download("problems", env={"HF_HUB_DISABLE_XET": "1"}), repos / "datasets/tiny/problems")


def test_what_lies_in_the_users_own_cache_is_copied_unless_it_is_damaged(download, hub, repos, environment, tmp_path):
    revision = hub.revision("tiny/problems", "datasets")
    hf = Path(sys.executable).parent / "hf"
    command = [hf, "download", "tiny/problems", "--repo-type", "dataset", "--revision", revision]
    subprocess.run(command, env={**environment, **hub.environment(tmp_path)}, check=True, capture_output=True)
    (cached,) = (tmp_path / "hf/hub").rglob("extra.jsonl")
    cached.resolve().write_bytes(cached.read_bytes()[::-1])
    assert_same(download("problems"), repos / "datasets/tiny/problems")
    assert len(hub.served("train-00000.parquet")) == 1 and len(hub.served("extra.jsonl")) == 2


def test_no_network(download, hub):
    closed = HubServer(hub.folder)
    with closed:
        pass
    done = download("problems", env={"HF_ENDPOINT": closed.url})
    assert f"sources.problems: {closed.url} cannot be reached" in done.error
    assert "dvc repro download" in done.error


# What is found out before anything is downloaded


def assert_nothing_came(done: Done, hub: HubServer) -> None:
    assert done.files == set()
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path or "/storage/" in path]


def test_a_revision_that_does_not_exist(download, hub):
    done = download("problems", revision="0" * 40)
    assert f"tiny/problems has no revision {'0' * 40}; write one of the commits at {hub.url}/datasets/" in done.error
    assert_nothing_came(done, hub)


@pytest.mark.parametrize(("token", "advice"), [(None, "`hf auth login` or set HF_TOKEN"), ("hf_a", "that may read it")])
def test_a_repository_that_does_not_exist(token, advice, download, hub):
    done = download("problems", token=token, repo="tiny/problem", revision="0" * 40)
    assert f"there is no dataset tiny/problem on {hub.url}" in done.error and advice in done.error
    hub.private["tiny/problems"] = {"hf_mine"}
    done = download("problems", token=token)
    assert "there is no dataset tiny/problems" in done.error and advice in done.error
    assert_nothing_came(done, hub)


@pytest.mark.parametrize(("token", "advice"), [(None, "and log in with"), ("hf_a", "with the account of this token")])
def test_a_gated_repository(token, advice, download, hub):
    hub.gated["tiny/base"] = {"hf_mine"}
    done = download("base", token=token)
    assert f"tiny/base is gated; accept its terms at {hub.url}/tiny/base {advice}" in done.error
    assert_nothing_came(done, hub)


def test_a_token_that_is_no_longer_valid(download, hub):
    done = download("problems", token="hf_expired")
    assert "does not accept the token; log in with `hf auth login` or set HF_TOKEN" in done.error
    assert_nothing_came(done, hub)


def test_too_little_room(download, hub):
    hub.sizes["data/train-00000.parquet"] = 10**15
    done = download("problems")
    assert "sources.problems: tiny/problems needs 1000000.00 GB and" in done.error and "has room for" in done.error
    assert_nothing_came(done, hub)


def test_no_file_matches(download, hub):
    done = download("problems", files=["test/*.parquet"])
    assert "that matches test/*.parquet" in done.error
    assert "(it has: README.md, data/train-00000.parquet, dataset_infos.json, extra.jsonl, problems.py)" in done.error
    assert_nothing_came(done, hub)


@pytest.fixture
def spoilt(hub, repos, tmp_path) -> Path:
    """The model's repository, to be spoilt for one test."""
    hub.folder = tmp_path / "repos"
    shutil.copytree(repos, hub.folder)
    return hub.folder / "models/tiny/base"


def test_only_pickles(download, hub, spoilt):
    (spoilt / "model.safetensors").unlink()
    done = download("base")
    assert "tiny/base has its weights as pickles only (pytorch_model.bin, training_args.bin)" in done.error
    assert_nothing_came(done, hub)


def test_no_tokenizer(download, hub, spoilt):
    (spoilt / "tokenizer.json").unlink()
    done = download("base")
    assert "sources.base: tiny/base has no tokenizer (none of tokenizer.json, " in done.error
    assert_nothing_came(done, hub)


def test_a_model_that_needs_code_of_its_own(download, hub, spoilt):
    config = json.loads((spoilt / "config.json").read_text())
    own = {"model_type": "tiny", "auto_map": {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}}
    (spoilt / "config.json").write_text(json.dumps(config | own))
    done = download("base")
    assert "tiny/base: model_type tiny needs code of its own, which is never run" in done.error
    assert not hub.served("model.safetensors")


# From ModelScope


@pytest.fixture
def modelscope(hub, environment) -> Callable[..., dict[str, Any]]:
    """Keyword arguments that download a repository of the hub through ModelScope's client, where it is installed."""
    client = pytest.importorskip("modelscope_hub", reason="pip install 'open-r1-pipeline[modelscope]'")
    paths = [environment["PYTHONPATH"], str(Path(client.__file__).parents[1])]

    def keys(name: str, **more: str) -> dict[str, Any]:
        repo, kind = ("tiny/base", "models") if name == "base" else ("tiny/problems", "datasets")
        source = {"origin": "modelscope", "repo": repo, "revision": hub.revision(repo, kind), **more}
        return {"env": {"PYTHONPATH": ":".join(paths)}, **source}

    return keys


def test_modelscope(modelscope, download, hub, repos):
    hub.faults["train-00000.parquet"] = ["wrong byte", "429"]
    done = download("problems", **modelscope("problems", licence="mit"))
    assert done.files == {"data/train-00000.parquet", "extra.jsonl", "README.md", "source.json"}
    assert_same(done, repos / "datasets/tiny/problems")
    assert done.source["origin"] == "modelscope:tiny/problems" and done.source["licence"] == "mit"
    assert done.source["revision"] == hub.revision("tiny/problems", "datasets")
    assert len(hub.served("train-00000.parquet")) == 3
    done = download("base", **modelscope("base"))
    assert done.files >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not done.files & {"pytorch_model.bin", "modeling_tiny.py"}
    assert_same(done, repos / "models/tiny/base")


def test_modelscope_has_no_such_revision(modelscope, download):
    done = download("problems", **modelscope("problems", revision="0" * 40))
    assert "tiny/problems on ModelScope or its revision 00000" in done.error and done.files == set()


def test_modelscope_without_network(modelscope, download, hub):
    keys = modelscope("problems")
    keys["env"]["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:1"
    assert "sources.problems: tiny/problems on ModelScope cannot be reached" in download("problems", **keys).error


# From here


def test_files_on_disk(download, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    done = download("problems", origin="path", path="rows.jsonl", licence="MIT")
    assert done.files == {"rows.jsonl", "source.json"}
    assert done.source["origin"] == "path:rows.jsonl" and done.source["licence"] == "MIT"
    assert done.source["revision"] == hashlib.sha1(json.dumps(done.source["files"]).encode()).hexdigest()


def test_a_model_on_disk(download, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "mine")
    done = download("base", origin="path", path="mine")
    assert_same(done, tiny_model)
    assert done.source["origin"] == "path:mine" and "model.safetensors" in done.files
    shutil.rmtree(done.folder)
    shutil.rmtree(done.log)
    (tmp_path / "mine/tokenizer.json").unlink()
    assert "sources.base: mine has no tokenizer" in download("base", origin="path", path="mine").error


def test_an_empty_folder(download, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "sources.problems has no files" in download("problems", origin="path", path="empty").error


def test_a_builtin(download, hub):
    first = download("problems", origin="builtin", builtin="questions", options={"rows": 5})
    assert first.files == {"test.jsonl", "source.json"} and first.source["origin"] == "builtin:questions"
    assert len((first.folder / "test.jsonl").read_text().splitlines()) == 5
    assert hub.requests == []


# Afterwards

OFFLINE = """
import socket, subprocess, sys
from pathlib import Path
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
except OSError as error:
    print("network:", error)
else:
    sys.exit("the network is not cut")
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("data/models/base")
model = AutoModelForCausalLM.from_pretrained("data/models/base")
ids = tokenizer("What is 1 + 1?", return_tensors="pt")
print("tokens:", model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] - ids["input_ids"].shape[1])
"""
PREPARE = "prepare problems --raw data/raw --tokenizer data/models/base --output data/p.parquet --log data/logs/prepare"


def test_what_follows_needs_no_network(download, hub, sound, environment, tmp_path):
    """In a network namespace with no interface up, model, tokenizer and rows load and the stage prepare runs."""
    cut = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*cut, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not permit network namespaces (unshare --map-root-user --net)")
    sound["prepare"]["problems"] |= {"max_prompt_length": 500, "max_length": 900, "files": "**/*.parquet"}
    assert download("base").ok and download("problems").ok
    # Without the stages' own HF_HUB_OFFLINE: it is the files that suffice, not the switch that hides what is missing.
    env = {**environment, **hub.environment(tmp_path), "HF_HUB_OFFLINE": "0"}
    script = [sys.executable, "-c", OFFLINE, hub.url.rpartition(":")[2]]
    asked = len(hub.requests)
    inside = subprocess.run([*cut, *script], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert inside.returncode == 0, inside.stderr
    assert "network: " in inside.stdout and "tokens: 3" in inside.stdout
    outside = subprocess.run(script, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert outside.returncode == 1 and "the network is not cut" in outside.stderr
    stage = subprocess.run(
        [*cut, sys.executable, "-m", *f"workflow.{PREPARE}".split()],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
    )
    assert stage.returncode == 0, stage.stderr
    assert pq.ParquetFile(tmp_path / "data/p.parquet").metadata.num_rows == len(ROWS)
    assert len(hub.requests) == asked
