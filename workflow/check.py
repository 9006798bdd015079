"""Check params.yaml, the files that it names and how its batches divide, before anything runs.

What this stage writes never changes, so it is the first of the pipeline without making anything run again.
"""

import argparse
from pathlib import Path

from workflow import stage
from workflow.launch import check_batches, load_hardware
from workflow.params import ParamsError, check_paths, check_recipes, load_params
from workflow.rewards import check_rewards


def check_folders() -> None:
    """Raise ParamsError when an output would land outside of the repository, by a link that is not DVC's own."""
    root = Path.cwd()
    for folder in (Path("data"), *(path for path in Path("data").glob("*") if path.is_dir() or path.is_symlink())):
        if folder.is_symlink() and not folder.resolve().is_relative_to(root):
            raise ParamsError(
                f"{folder} is a link to {folder.resolve()}, outside of the repository; make it a folder, and keep what "
                "is large elsewhere with: dvc cache dir --local /large/disk, dvc config --local cache.type symlink"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    check_paths(params)
    check_recipes()
    check_folders()
    check_batches(params, load_hardware())
    for phase in params.grpo.values():
        check_rewards(phase)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("params.yaml is sound\n")
    print(f"check: params.yaml is sound: recipe {params.recipe}, phases {', '.join(params.phases) or 'none'}")


if __name__ == "__main__":
    stage.run(main)
