"""The stage generate with real vLLM engines: killed anywhere and started again, and on several engines side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from workflow import engine, launch
from workflow.miniature import MODEL
from workflow.params import ParamsError
from workflow.stage import StageError

QUESTIONS, SAMPLES, CHUNK = 900, 4, 128
CHUNKS = -(-QUESTIONS * SAMPLES // CHUNK)
TASK = {
    "answer": "latex",
    "n_samples": SAMPLES,
    "temperature": 1.0,
    "top_p": 0.95,
    "max_tokens": 32,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("generate"))


def make_inputs(folder: Path) -> Path:
    """A model, questions, params.yaml and hardware files with small chunks."""
    from workflow.builtin import make_model

    (folder / "model").mkdir()
    make_model(folder / "model", seed=1, system_prompt="Think.", **MODEL)
    rows = [
        {"id": f"sums-{n:06d}", "prompt": [{"role": "user", "content": f"What is {n} + {n % 7}?"}]}
        for n in range(QUESTIONS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
    params = {
        "recipe": "sums",
        "seed": 42,
        "system_prompt": None,
        "sources": {"base": {"into": "models", "origin": "builtin", "builtin": "qwen2"}}
        | {"sums": {"into": "raw", "origin": "builtin", "builtin": "questions", "options": {"rows": 9}}},
        "prepare": {
            "sums": {"source": "sums", "format": "math", "tokenizer": "base", "max_prompt_length": 99, "max_length": 99}
        },
        "sft": {},
        "grpo": {},
        "generate": {"models": ["base"]},
        "tasks": {"sums": TASK},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for name, options in {"one": {}, "two": {"engines": 2}, "full": {"engines": 2, "ahead": 1024}}.items():
        hardware = yaml.safe_load((launch.HERE / "hardware/cpu.yaml").read_text())
        hardware["vllm"]["kv_cache_memory_bytes"] = 2**28
        hardware["generation"] |= {"chunk": CHUNK, **options}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(hardware))
    return folder


def start(inputs: Path, folder: Path, hardware: str = "one") -> subprocess.Popen:
    """Start the stage in a folder, with the params.yaml there or else the one of `inputs`."""
    if not (folder / "params.yaml").exists():
        (folder / "params.yaml").write_text((inputs / "params.yaml").read_text())
    command = [sys.executable, "-m", "workflow.generate", "sums", "--model", str(inputs / "model")]
    command += ["--questions", str(inputs / "questions.parquet"), "--output", "out/sums.parquet", "--log", "log"]
    environment = os.environ | {"HARDWARE": str(inputs / f"{hardware}.yaml"), "PYTHONPATH": str(launch.HERE.parent)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run = start(inputs, folder)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert list((folder / ".scratch/generate").iterdir()) == []
    return folder / "out/sums.parquet"


def finished(folder: Path) -> list[Path]:
    return sorted(folder.glob(".scratch/generate/*/*.parquet"))


def test_every_sample_is_there_in_order(whole: Path, inputs: Path) -> None:
    table = pq.read_table(whole)
    assert table["id"].to_pylist() == [f"sums-{n:06d}" for n in range(QUESTIONS) for _ in range(SAMPLES)]
    assert table["sample"].to_pylist() == list(range(SAMPLES)) * QUESTIONS
    assert len(set(table["seed"].to_pylist())) > 0.999 * len(table)
    assert max(table["tokens"].to_pylist()) == TASK["max_tokens"]
    by_reason = dict.fromkeys(table["finish_reason"].to_pylist())
    assert set(by_reason) <= {"length", "stop"}
    assert "length" in by_reason
    settings = json.loads(table.schema.metadata[b"generation"])
    assert {name: settings[name] for name in TASK if name != "answer"} == {
        k: v for k, v in TASK.items() if k != "answer"
    }
    assert settings["tensor_parallel_size"] == 1
    assert len(settings["chat_template_sha256"]) == 64


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("victim", ["generate", "engine", "asked"])
def test_killed_and_started_again_gives_the_same_bytes(victim: str, inputs: Path, tmp_path: Path, whole: Path) -> None:
    run = start(inputs, tmp_path)
    while len(finished(tmp_path)) < 2:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    processes = psutil.Process(run.pid).children(recursive=True)
    (one,) = [child for child in processes if "workflow.engine" in words(child)]
    if victim == "engine":
        one.kill()
    else:
        run.send_signal(signal.SIGKILL if victim == "generate" else signal.SIGTERM)
    output, _ = run.communicate()
    assert run.returncode == {"generate": -signal.SIGKILL, "engine": 128 + signal.SIGKILL, "asked": 75}[victim]
    assert psutil.wait_procs(processes, timeout=launch.GRACE + 20)[1] == []
    assert not (tmp_path / "out").exists()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == (victim != "generate"), output
    said = {"engine": "was ended by SIGKILL", "asked": "was stopped; the same command goes on from there"}
    assert all(error.startswith(f"error: engine 0 {said[victim]}") for error in errors)
    there = finished(tmp_path)
    assert 2 <= len(there) < CHUNKS, "it was too quick to be killed in the middle"
    stamps = {file: file.stat().st_mtime_ns for file in there}
    (there[0].parent / "000001.99.part").write_bytes(b"half a chunk")

    again = start(inputs, tmp_path)
    while len(finished(tmp_path)) == len(there) and again.poll() is None:
        assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items() if file.exists())
        time.sleep(0.01)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert f"generate: {len(there) * CHUNK} samples are there from a run that did not end" in output
    assert (tmp_path / "out/sums.parquet").read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "log/stage.json").read_text())["samples_kept"] == len(there) * CHUNK
    assert list((tmp_path / ".scratch/generate").iterdir()) == []


@pytest.mark.parametrize("hardware", ["two", "full"])
def test_two_engines_share_the_chunks(hardware: str, inputs: Path, tmp_path: Path, whole: Path) -> None:
    """`full` takes chunks in advance, as on GPUs, where what shares a batch with a sample may differ."""
    run = start(inputs, tmp_path, hardware)
    tokens = {}
    while run.poll() is None:
        for file in tmp_path.glob(".scratch/generate/*/engine*.json"):
            with suppress(FileNotFoundError):  # removed just now
                text = file.read_text()
                if text.endswith("}"):
                    tokens[file.name] = json.loads(text)["tokens"]
        time.sleep(0.01)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert set(tokens) == {"engine0.json", "engine1.json"}
    assert min(tokens.values()) > 0
    found, expected = pq.read_table(tmp_path / "out/sums.parquet"), pq.read_table(whole)
    assert sum(tokens.values()) == sum(found["tokens"].to_pylist())
    assert [found[name] for name in ("id", "sample", "seed")] == [expected[name] for name in ("id", "sample", "seed")]
    if hardware == "two":
        assert (tmp_path / "out/sums.parquet").read_bytes() == whole.read_bytes()


def test_what_does_not_fit_the_context_is_one_sentence(inputs: Path, tmp_path: Path) -> None:
    text = (inputs / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("max_tokens: 32", "max_tokens: 100000"))
    output, _ = (run := start(inputs, tmp_path)).communicate()
    assert run.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "tasks.sums.max_tokens need" in errors[0]
    most = int(errors[0].split("write max_tokens ")[1].split()[0])
    assert 0 < most < 100_000
    assert "Traceback" not in output


def test_an_engine_for_each_group_of_gpus() -> None:
    from workflow.generate import engines

    hardware = launch.Hardware(
        processes=8, accelerate="ddp", tokens_per_device={"sft": 1, "grpo": 1}, vllm={"tensor_parallel_size": 2}
    )
    devices = tuple("01234567")
    found = engines(hardware, devices, 99, ["sums"])
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in found] == ["0,1", "2,3", "4,5", "6,7"]
    assert [command.argv[-4:] for command in found] == [["--engines", "4", "--number", str(n)] for n in range(4)]
    assert len(engines(hardware, devices, 3, ["sums"])) == 3, "no more engines than chunks"
    (alone,) = engines(hardware, (), 99, ["sums"])
    assert alone.environment == {}
    with pytest.raises(ParamsError, match=r"1 engines .* on 2 GPUs each .* and 1 may be used"):
        engines(hardware, ("0",), 99, ["sums"])
    four = hardware.model_copy(update={"generation": launch.Generation(engines=4)})
    with pytest.raises(ParamsError, match="4 engines"):
        engines(four, tuple("01"), 99, ["sums"])


def test_the_hardware_file_leaves_to_the_task_what_is_its() -> None:
    with pytest.raises(ValueError, match="seed is set by the stage generate"):
        launch.Hardware(processes=1, accelerate="ddp", tokens_per_device={"sft": 1, "grpo": 1}, vllm={"seed": 1})


@pytest.mark.parametrize(("count", "message"), [(5, "has 3 questions and the task asks 5"), (None, "at least 1")])
def test_fewer_questions_than_asked_are_an_error(tmp_path: Path, count: int | None, message: str) -> None:
    from workflow.generate import read_questions

    table = pa.table({"id": ["a", "b", "c"], "prompt": ["", "", ""]}).slice(0, 3 if count else 0)
    pq.write_table(table, tmp_path / "questions.parquet")
    with pytest.raises(StageError, match=message):
        read_questions(tmp_path / "questions.parquet", count)


def test_chunks_cover_every_request_once_and_are_taken_once(tmp_path: Path) -> None:
    parts = engine.chunks(1000, 64)
    assert [request for part in parts for request in part] == list(range(1000))
    engine.chunk_file(tmp_path, 2).touch()
    first, second = engine.take(tmp_path, 5), engine.take(tmp_path, 5)
    assert [next(first), next(second), next(second), next(first, None)] == [0, 1, 3, 4]
    assert list(second) == []


def test_a_chunk_belongs_to_its_inputs(inputs: Path, tmp_path: Path) -> None:
    import shutil

    from workflow.generate import fingerprint

    model = shutil.copytree(inputs / "model", tmp_path / "model")
    hardware = launch.Hardware(processes=1, accelerate="ddp", tokens_per_device={"sft": 1, "grpo": 1})
    others = hardware.model_copy(update={"generation": launch.Generation(chunk=3)})
    environment = hardware.model_copy(update={"environment": {"VLLM_ATTENTION_BACKEND": "x"}})
    quick = hardware.model_copy(update={"vllm": {"enforce_eager": True}})
    questions = [{"id": "a", "prompt": [{"role": "user", "content": "?"}]}]
    known = {
        fingerprint(model, questions, {"seed": 1}, hardware, ["torch"]),
        fingerprint(model, [{**questions[0], "id": "b"}], {"seed": 1}, hardware, ["torch"]),
        fingerprint(model, questions, {"seed": 2}, hardware, ["torch"]),
        fingerprint(model, questions, {"seed": 1}, others, ["torch"]),
        fingerprint(model, questions, {"seed": 1}, quick, ["torch"]),
        fingerprint(model, questions, {"seed": 1}, environment, ["torch"]),
    }
    assert fingerprint(inputs / "model", questions, {"seed": 1}, hardware, ["torch"]) in known
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    known.add(fingerprint(model, questions, {"seed": 1}, hardware, ["torch"]))
    assert len(known) == 7
