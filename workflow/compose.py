"""Compose params.yaml from recipes/ with DVC's own Hydra support.

`python -m workflow.compose recipe=gsm8k_local data_dir=/data` writes what `dvc exp run -S recipe=gsm8k_local …`
would run with.
"""

import sys
import warnings
from pathlib import Path

RECIPES = Path("recipes")


def main() -> None:
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    warnings.simplefilter("ignore")  # DVC passes Hydra an argument that will go away
    try:
        compose_and_dump("params.yaml", str(RECIPES.resolve()), None, "config", "", sys.argv[1:])
    except InterpolationToMissingValueError:
        sys.exit('error: this recipe reads local files: write SET="data_dir=/folder" (or data_dir=/folder) too')
    except (HydraException, OmegaConfBaseException) as error:
        names = ", ".join(sorted(file.stem for file in (RECIPES / "recipe").glob("*.yaml")))
        sys.exit(f"error: {' '.join(str(error).splitlines()[:2])} (recipes: {names})")


if __name__ == "__main__":
    main()
