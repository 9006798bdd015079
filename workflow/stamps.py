"""Lay down the stamps of the stages that are done, so that Snakemake starts no job for them.

DVC decides what is done: a stage whose outputs fit its inputs, or can be had from the run cache. Run it before
`snakemake`, on the login node; `workflow.experiment` does. Snakemake's own memory of earlier runs is thrown away.
"""

import argparse
import shutil
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from workflow import locks, stage
from workflow.pipeline import load_stages, made

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

STAMPS = Path(".scratch/stamps")
BENCHMARKS = Path(".scratch/benchmarks")
MEMORY = (Path(".snakemake/metadata"), Path(".snakemake/incomplete"))


def lay(root: Path = Path()) -> list[str]:
    """Write the stamp of every stage that is up to date, restoring what the run cache has; return the others' names."""
    from dvc.repo import Repo, lock_repo
    from dvc.stage.exceptions import StageCmdFailedError

    for folder in (STAMPS, *MEMORY):
        shutil.rmtree(root / folder, ignore_errors=True)
    (root / STAMPS).mkdir(parents=True)
    stages = load_stages(root)
    order = TopologicalSorter({name: one.upstream for name, one in stages.items()}).static_order()
    left: list[str] = []
    with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        known = {one.addressing: one for one in repo.index.stages}
        for name in order:
            if any(upstream in left for upstream in stages[name].upstream):
                left.append(name)
                continue
            found = known[name]
            if found.changed() and in_place(found):
                # The cache had no room for it, or has lost it: what is made need not be made again.
                repo.commit(name, force=True)
                if found.changed():
                    raise stage.StageError(f"{name} is made, but {repo.cache.local.path} has no room for it; make room")
            elif found.changed():
                # Every changed parameter makes check run again, and no other stage: it takes a second, so it runs here.
                if not restorable(repo, found) and name != "check":
                    left.append(name)
                    continue
                try:
                    found.run()
                except StageCmdFailedError:
                    left.append(name)  # Snakemake will say why
                    continue
                found.dump(update_pipeline=False)
            (root / STAMPS / name).write_text(made(name, root))
            if (measured := root / BENCHMARKS / f"{name}.tsv").exists():
                measured.touch()  # for Snakemake it is an output, older than the stamps it comes after
    return left


def in_place(found: "PipelineStage") -> bool:
    """Whether the working tree has just what dvc.lock says of a stage, whatever the cache has."""
    return not (found.changed_stage() or found.changed_deps() or any(out.workspace_status() for out in found.outs))


def restorable(repo: "Repo", changed: "PipelineStage") -> bool:
    """Whether DVC's caches have the outputs of a stage whose inputs are there; the stage is then ready for run()."""
    from dvc.stage.cache import RunCacheNotFoundError

    if changed.changed_stage() or not changed.deps_cached():
        # dvc.lock is about other inputs, so its outputs are not the ones to look for.
        changed.save_deps()
        for out in changed.outs:
            out.clear()
    try:
        repo.stage_cache.restore(changed, dry=True)
    except RunCacheNotFoundError:
        return False
    return True


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if list(Path(".snakemake/locks").glob("*")):
        raise stage.StageError(
            "Snakemake runs in this folder, or was killed here; wait for it, or write: snakemake --unlock"
        )
    for said in locks.mend():
        print(said)
    left = lay()
    done = len(list(STAMPS.iterdir()))
    print(f"stamps: {done} of {done + len(left)} stages are done; to do: {', '.join(left) or 'nothing'}")


if __name__ == "__main__":
    stage.run(main)
