"""The checkpoints of a training phase: what they belong to, which of them are whole, and when they may go.

They lie in `<CHECKPOINTS>/<fingerprint>/checkpoint-<step>/`, outside the stage's outputs, which DVC removes before it
runs a stage again. The trainer writes one (workflow/training.py) and seals it with a manifest, last of all: sha256 and
size of every file. A run that was stopped or killed goes on from the newest one that is as it was written. When the
training has ended, its folder is called `<fingerprint>.finished` until DVC has the model (launch.drop_finished).
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from workflow.launch import HERE, Hardware, Kind, division, sequence_length
from workflow.params import GRPOPhase, Params

MANIFEST = "manifest.json"
RUN = "run.json"
LIBRARIES = (
    *("accelerate", "datasets", "deepspeed", "peft", "tokenizers", "torch", "transformers", "trl"),
    *("latex2sympy2_extended", "math-verify"),
)
# Whose text decides what is learned, or what a checkpoint holds.
MODULES: dict[Kind, tuple[str, ...]] = {
    "sft": ("chat_template", "rows", "sft", "training"),
    "grpo": ("chat_template", "grpo", "prompts", "rewards", "rollouts", "rows", "training", "verify"),
}
# Of the hardware file, what a training does not depend on.
NOT_TRAINING = {"checkpoint_minutes", "generation", "memory_gib", "vllm"}


def fingerprint(kind: Kind, name: str, params: Params, hardware: Hardware, model: Path, dataset: Path) -> str:
    """A name for everything that a training depends on, its spread over processes included: 32 hexadecimal digits.

    Checkpoints of other inputs are never taken for this phase's, and a checkpoint fits the processes that wrote it.

    Args:
        model: the folder of the model to start from.
        dataset: the prepared parquet.

    Raises:
        ParamsError: the global batch cannot be divided over the processes.
    """
    phase = getattr(params, kind)[name]
    parts = {
        "what": [kind, name, params.seed],
        "phase": phase.model_dump(),
        "hardware": hardware.model_dump(exclude=NOT_TRAINING),
        "divided": [*division(params, hardware, kind, name), sequence_length(params, kind, name)],
        "model": _digests(model),
        "dataset": _digests(dataset),
        "rewards": _digests(Path(phase.rewards_read)) if isinstance(phase, GRPOPhase) else {},
        "versions": [version(library) for library in LIBRARIES],
        "code": [(HERE / f"{module}.py").read_text() for module in MODULES[kind]],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def take_up(folder: Path) -> Path | None:
    """The checkpoint that a run in this folder goes on from; None where it has to begin.

    Makes the folder, takes back one that is called finished, and removes what is newer than the checkpoint.
    """
    finished = _finished(folder)
    if finished.is_dir():
        finished.rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = newest(folder)
    for checkpoint in _all(folder):
        if found is None or step(checkpoint) > step(found):
            shutil.rmtree(checkpoint)
    return found


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; says in one sentence what is wrong with each newer one."""
    checkpoints = _all(folder)
    while checkpoints:
        checkpoint = checkpoints.pop()
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        instead = f"{checkpoints[-1].name} is taken instead" if checkpoints else "the training begins anew"
        print(f"warning: {checkpoint}: {wrong}; {instead}", flush=True)
    return None


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming a file, or None."""
    try:
        known = json.loads((checkpoint / MANIFEST).read_text())
        files = {name: (of["size"], of["sha256"]) for name, of in known["files"].items()}
        float(known["seconds"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not written to its end"
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is damaged"
    except OSError as error:  # of a disk that fails
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, _) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    try:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, [checkpoint / name for name in files])
            for (name, (_, sha256)), digest in zip(files.items(), digests, strict=True):
                if digest != sha256:
                    return f"{name} has changed since it was written"
    except OSError as error:  # of a disk that fails
        return f"a file cannot be read ({error})"
    return None


def keep_two(folder: Path) -> None:
    """Remove all but the newest checkpoint, which is sealed, and the one before it."""
    for checkpoint in _all(folder)[:-2]:
        shutil.rmtree(checkpoint)


def seal(checkpoint: Path, seconds: float) -> None:
    """Put a checkpoint on the disk, and then the manifest that says so.

    Args:
        seconds: that were trained so far, in all sittings.
    """
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file != checkpoint / MANIFEST]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync, [*files, *{file.parent for file in files}]))
        digests = list(pool.map(_sha256, files))
    known = {
        str(file.relative_to(checkpoint)): {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    part = checkpoint / f"{MANIFEST}.part"
    part.write_text(json.dumps({"seconds": round(seconds, 1), "files": known}, indent=2) + "\n")
    _sync(part)
    part.replace(checkpoint / MANIFEST)
    _sync(checkpoint)
    _sync(checkpoint.parent)


def seconds_trained(checkpoint: Path) -> float:
    """The seconds that were trained, in all sittings, until a sealed checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())["seconds"]


def step(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def finish(folder: Path) -> None:
    """Keep the newest checkpoint of a training that has ended, for the case that its model is lost before DVC has it.

    A training that was too short to have one leaves nothing.
    """
    sealed = [checkpoint for checkpoint in _all(folder) if (checkpoint / MANIFEST).is_file()]
    if not sealed:
        shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.is_dir() and path != sealed[-1]:
            shutil.rmtree(path)
        elif path.is_file() and path.name != RUN:
            path.unlink()
    folder.rename(_finished(folder))


def _finished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.finished")


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest last."""
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)), key=step)


def _digests(path: Path) -> dict[str, str]:
    """The sha256 of a file, or of every file in a folder, by its path there; of nothing where there is nothing."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor() as pool:
        return {
            str(file.relative_to(path)): digest for file, digest in zip(files, pool.map(_sha256, files), strict=True)
        }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
