"""Bring one source into data/: a model or a data set, with its origin, revision, licence and checksums.

A builtin is made on the spot (workflow/builtin.py); a path is copied from disk. Nothing later in the pipeline
reads anything outside data/.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from workflow import stage
from workflow.params import Source, check_paths, load_params, pick


def bring(source: Source, seed: int, system_prompt: str | None, output: Path) -> None:
    """Fill the folder `output` with the files of `source`."""
    output.mkdir(parents=True)
    if source.origin == "builtin":
        from workflow import builtin

        makers = {
            "qwen2": builtin.make_model,
            "bespoke_stratos": builtin.write_bespoke_stratos,
            "numina_tir": builtin.write_numina_tir,
            "questions": builtin.write_questions,
        }
        makers[source.builtin](output, seed=seed, system_prompt=system_prompt, **source.options)
        return
    path = Path(source.path)
    if path.is_dir():
        shutil.copytree(path, output, dirs_exist_ok=True)
    else:
        shutil.copy(path, output / path.name)


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path, sorted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name under sources in params.yaml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    check_paths(params)
    source = pick(params.sources, args.name, "sources")
    bring(source, params.seed, params.system_prompt, args.output)
    files = checksums(args.output)
    if not files:
        raise stage.StageError(f"sources.{args.name} has no files; point path at a folder with data in it")
    provenance = {
        "origin": f"builtin:{source.builtin}" if source.origin == "builtin" else f"path:{Path(source.path).name}",
        # The content names the revision where no hub does: the same files have the same revision.
        "revision": hashlib.sha1(json.dumps(files).encode()).hexdigest(),
        "licence": source.licence,
        "files": files,
    }
    (args.output / "source.json").write_text(json.dumps(provenance, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    summary = f"{len(files)} files, {size / 1e6:.1f} MB, revision {provenance['revision'][:8]}"
    stage.record(args.log, "download", args.name, ["tokenizers", "transformers"], summary, bytes=size, **provenance)


if __name__ == "__main__":
    stage.run(main)
