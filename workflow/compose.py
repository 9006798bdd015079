"""Compose params.yaml from recipes/ with DVC's own Hydra support.

`python -m workflow.compose recipe=gsm8k_local data_dir=/data` writes what `dvc exp run -S recipe=gsm8k_local …`
would run with.
"""

import sys
from pathlib import Path


def main() -> None:
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    recipes = Path("recipes").resolve()
    try:
        compose_and_dump("params.yaml", str(recipes), None, "config", "", sys.argv[1:])
    except (HydraException, OmegaConfBaseException) as error:
        names = ", ".join(sorted(file.stem for file in (recipes / "recipe").glob("*.yaml")))
        sys.exit(f"error: {str(error).splitlines()[0]} (recipes: {names})")


if __name__ == "__main__":
    main()
