"""What a repository has to have, what of it is downloaded, how it is checked; without a network."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from workflow import sources
from workflow.params import Source
from workflow.stage import StageError

COMMIT = "0123456789" * 4
MODEL = ["config.json", "model.safetensors", "tokenizer.json"]


def hub(into: str, files: list[str] | None = None, origin: str = "hub") -> Source:
    return Source(into=into, origin=origin, repo="owner/name", revision=COMMIT, files=files or [])


# What is chosen


def test_of_a_model_comes_what_transformers_reads():
    wanted = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    documents = ["LICENSE", "README.md"]
    left = [
        ".gitattributes",
        "consolidated.safetensors",
        "figures/benchmark.jpg",
        "modeling_qwen2.py",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "pytorch_model-00001-of-00002.bin",
        "training_args.bin",
    ]
    assert sources.choose("base", hub("models"), wanted + left + documents) == wanted + documents


def test_of_a_data_set_come_its_rows():
    wanted = ["data/train-00000-of-00002.parquet", "main/test.jsonl", "train.json"]
    left = [".gitattributes", "data/train.arrow", "dataset_infos.json", "gsm8k.py", "main/dataset_info.json", "x.pkl"]
    assert sources.choose("problems", hub("raw"), wanted + left + ["README.md"]) == [*wanted, "README.md"]


def test_files_name_what_comes_but_never_code_or_pickles():
    there = ["data/a.parquet", "data/b.parquet", "main/a.parquet", "load.py", "rows.pkl", "rows.bin"]
    assert sources.choose("x", hub("raw", ["data/*"]), there) == there[:2]
    assert sources.choose("x", hub("raw", ["*"]), there) == there[:3]
    assert sources.choose("gpqa_diamond", hub("raw", ["a.csv"]), ["a.csv", "b.csv", "a.zip"]) == ["a.csv"]
    files = ["*.json", "model.safetensors", "*.py", "*.bin"]
    assert sources.choose("x", hub("models", files), [*MODEL, "x.py", "pytorch_model.bin"]) == MODEL


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["README.md"], "has no config.json, so it is not a model; name another (it has: README.md)"),
        ([], "(it has: nothing)"),
        (["config.json", "tokenizer.json"], "has no model*.safetensors"),
        (["config.json", "tokenizer.json", "adapter_model.safetensors"], "has no model*.safetensors"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "as pickles only (pytorch_model.bin)"),
        (["config.json", "tokenizer.json", "original/consolidated.00.pth"], "as pickles only (original/consolidated"),
        (["config.json", "model.safetensors", "tokenizer_config.json"], "has no tokenizer"),
        (["config.json", "model.safetensors", "original/tokenizer.model"], "has no tokenizer"),
    ],
)
def test_a_model_that_is_none(there, said):
    with pytest.raises(StageError) as error:
        sources.choose("base", hub("models"), there)
    assert said in str(error.value) and str(error.value).startswith("sources.base: owner/name ")


def test_only_ten_names_are_listed():
    there = [f"{n:02d}.csv" for n in range(12)]
    with pytest.raises(StageError, match=r"\(it has: 00.csv, .*, 09.csv and 2 more\)"):
        sources.choose("problems", hub("raw"), there)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen2"}, None),
        ({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, None),  # its code is not needed
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "x.Y"}},
            "model_type mystery needs code of its own, which is never run; name one",
        ),
        ({"model_type": "vit"}, "model_type vit is no causal language model; name one that"),
        ({}, "model_type none is no causal"),
    ],
)
def test_architecture(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if said is None:
        sources.check_architecture("sources.base", tmp_path / "config.json")
        return
    with pytest.raises(StageError) as error:
        sources.check_architecture("sources.base", tmp_path / "config.json")
    assert said in str(error.value)


# Downloading


def test_room_is_looked_at_first(tmp_path):
    fetched = []
    with pytest.raises(StageError, match=r"sources.x: owner/name needs 9000000000.00 GB and .* has room for \d"):
        sources.fetch_all("x", hub("raw"), {"a.parquet": 9 * 10**18}, tmp_path, fetched.append)
    assert fetched == []
    sources.fetch_all("x", hub("raw"), {"b.parquet": 5, "a.parquet": 5}, tmp_path, fetched.append)
    assert fetched == ["a.parquet", "b.parquet"]


def test_what_a_killed_download_has_needs_no_room(tmp_path):
    size = shutil.disk_usage(tmp_path).free + 10**9
    with (tmp_path / "a.parquet").open("wb") as there:
        there.truncate(size)  # takes no room either
    fetched = []
    sources.fetch_all("x", hub("raw"), {"a.parquet": size}, tmp_path, fetched.append)
    assert fetched == ["a.parquet"]


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "http://127.0.0.1")
    return HfHubHTTPError("…", response=httpx.Response(status, headers=headers, request=request))


@pytest.mark.parametrize(
    "raised",
    [answer(429), answer(429, **{"Retry-After": "0"}), answer(502), httpx.ReadError(""), httpx.RemoteProtocolError("")],
)
def test_passing_failures_are_waited_for(raised, monkeypatch):
    monkeypatch.setattr(sources, "WAITS", (0, 0, 0))
    failures = [raised] * 3

    def request(value: int, factor: int) -> int:
        if failures:
            raise failures.pop()
        return value * factor

    assert sources.patiently(request, 6, factor=7) == 42
    failures += [raised] * 4
    with pytest.raises(type(raised)):
        sources.patiently(request, 6, factor=7)
    assert failures == []


@pytest.mark.parametrize(
    "raised", [answer(401), answer(404), httpx.ConnectError(""), httpx.ConnectTimeout(""), OSError()]
)
def test_lasting_failures_are_not(raised):
    asked = []

    def request() -> None:
        asked.append(1)
        raise raised

    with pytest.raises(type(raised)):
        sources.patiently(request)
    assert asked == [1]


def test_retry_after_is_how_long_it_waits(monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", waited.append)
    failures = [
        answer(429, **{"Retry-After": "37"}),
        answer(429, **{"Retry-After": "tomorrow"}),
        answer(500),
        answer(429, **{"Retry-After": "86400"}),
    ]

    def request() -> None:
        if failures:
            raise failures.pop(0)

    sources.patiently(request)
    assert waited == [37, 2, 4, sources.LONGEST_WAIT]
    assert capsys.readouterr().out.splitlines()[0] == "the Hub is busy or the connection broke: again in 37 s"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (answer(503), "/datasets/owner/name answered 503 Service Unavailable; try again later"),
        (httpx.ConnectError("gone"), " cannot be reached (gone); this needs the network: "),
    ],
)
def test_why_a_file_did_not_come_is_said(reason, said):
    """hf_hub_download asks twice for a file's metadata, then says that it is not on disk either."""
    with pytest.raises(StageError) as error, sources.hub_errors("problems", hub("raw")):
        raise LocalEntryNotFoundError("not found in the local cache") from reason
    assert str(error.value).startswith("sources.problems: ") and said in str(error.value)


def test_other_failures_keep_their_own_words():
    with pytest.raises(StageError) as error, sources.hub_errors("problems", hub("raw")):
        raise OSError(28, "No space left on device")
    assert str(error.value) == "sources.problems: owner/name: [Errno 28] No space left on device"


def test_checksums_of_the_hub(tmp_path):
    """git's own id of a small file, sha256 of a large one."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n')
    blob = subprocess.run(["git", "hash-object", file], text=True, capture_output=True, check=True).stdout.strip()
    lfs = BlobLfsInfo(size=9, sha256=hashlib.sha256(b'{"a": 1}\n').hexdigest(), pointer_size=130)
    for listed in (
        RepoSibling("rows.jsonl", blob_id=blob),
        RepoSibling("rows.jsonl", blob_id="of the pointer", lfs=lfs),
    ):
        assert sources.is_as_listed(file, listed)
        file.write_text('{"a": 2}\n')
        assert not sources.is_as_listed(file, listed)
        file.write_text('{"a": 1}\n')


def test_checksums(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/large").write_bytes(b"x" * 3_000_000)
    (tmp_path / "a").write_bytes(b"")
    found = sources.checksums(tmp_path)
    assert list(found) == ["a", "b/large"]
    assert found["b/large"] == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_modelscope_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)  # as if it were not installed
    with pytest.raises(StageError, match=r"run: pip install 'open-r1-pipeline\[modelscope\]'"):
        sources.from_modelscope("problems", hub("raw", origin="modelscope"), tmp_path)


# The chat template

OLD, NEW = "{{ 'old' }}", "{{ 'new' }}"


def copy_tokenizer(model: Path, to: Path) -> dict[str, Any]:
    """Copy a tokenizer without its template; return its settings."""
    to.mkdir()
    for file in [*model.glob("tokenizer*"), model / "config.json"]:
        shutil.copy(file, to)
    settings = json.loads((to / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings and not (to / "chat_template.jinja").exists()
    return settings


def render(model: Path) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)


@pytest.mark.parametrize(
    "where", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/default.jinja"]
)
def test_the_recipes_chat_template_is_the_only_one(where, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    settings = copy_tokenizer(tiny_model, model)
    (model / where).parent.mkdir(exist_ok=True)
    (model / where).write_text(json.dumps(settings | {"chat_template": OLD}) if where.endswith(".json") else OLD)
    assert render(model) == "old"
    sources.write_chat_template(model, NEW)
    assert AutoTokenizer.from_pretrained(model).chat_template == NEW and render(model) == "new"
    assert json.loads((model / "tokenizer_config.json").read_text()) == settings


def test_transformers_prefers_the_file_to_the_key(tiny_model, tmp_path):
    """As the docstring of write_chat_template has it."""
    model = tmp_path / "model"
    settings = copy_tokenizer(tiny_model, model)
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": OLD}))
    (model / "chat_template.jinja").write_text(NEW)
    assert render(model) == "new"
