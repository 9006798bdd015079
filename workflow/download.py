"""Bring one source into data/: a model or a data set, with its origin, revision, licence and checksums.

Where it comes from is in workflow/sources.py. Nothing later in the pipeline reads anything outside data/, and this
is the only stage that may use the network.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from workflow import sources, stage
from workflow.params import Source, check_paths, load_params, pick

SCRATCH = Path(".scratch/download")
LIBRARIES = {
    "builtin": ["tokenizers", "transformers"],
    "hub": ["huggingface_hub"],
    "modelscope": ["modelscope-hub"],
    "path": [],
}


def bring(name: str, source: Source, seed: int, system_prompt: str | None, output: Path) -> dict[str, str]:
    """Fill the folder `output` with the files of a source; return its origin, licence and, on a hub, revision.

    From the Hugging Face Hub it goes on with what is there.
    """
    if source.origin != "hub":
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "source.json").unlink(missing_ok=True)
    if source.origin == "builtin":
        facts = sources.from_builtin(source, output, seed, system_prompt)
    elif source.origin == "path":
        facts = sources.from_path(name, source, output)
    elif source.origin == "hub":
        facts = sources.from_hub(name, source, output)
    else:
        facts = sources.from_modelscope(name, source, output)
    if source.chat_template is not None:
        sources.write_chat_template(output, source.chat_template)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name under sources in params.yaml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    stage.stoppable(f"download {args.name}")
    stage.alone(args.output)
    params = load_params()
    check_paths(params)
    source = pick(params.sources, args.name, "sources")
    folder = SCRATCH / f"{args.name}-{hashlib.sha256(source.model_dump_json().encode()).hexdigest()[:16]}"
    facts = bring(args.name, source, params.seed, params.system_prompt, folder)
    files = sources.checksums(folder)
    if not files:
        raise stage.StageError(f"sources.{args.name} has no files; point path at a folder with data in it")
    # The content names the revision where no hub does: the same files have the same revision.
    revision = facts.get("revision") or hashlib.sha1(json.dumps(files).encode()).hexdigest()
    provenance = {**facts, "revision": revision, "files": files}
    (folder / "source.json").write_text(json.dumps(provenance, indent=2) + "\n")
    stage.check_cache([folder])  # here, where the next attempt finds the files: DVC removes an output before it
    if args.output.exists():
        shutil.rmtree(args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, args.output)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    summary = f"{len(files)} files, {size / 1e6:.1f} MB, revision {revision[:8]}"
    stage.record(
        args.log, "download", args.name, LIBRARIES[source.origin], summary, [args.output], bytes=size, **provenance
    )


if __name__ == "__main__":
    stage.run(main)
