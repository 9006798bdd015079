"""Compose params.yaml from recipes/ with DVC's own Hydra support.

`python -m workflow.compose recipe=gsm8k_local data_dir=/data` writes what `dvc exp run -S recipe=gsm8k_local …`
would run with; `task=[math_500,aime25]` replaces the recipe's tasks and `+task=[aime25]` adds to them (docs/tasks.md).
With `--miniature` the recipe is made small enough for a CPU (workflow/miniature.py).
"""

import sys
import warnings
from pathlib import Path

from workflow import stage
from workflow.miniature import shrink
from workflow.params import check_recipes

RECIPES = Path("recipes")
PARAMS = Path("params.yaml")


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if argument != "--miniature"]
    compose(overrides, PARAMS)
    if "--miniature" in sys.argv:
        from dvc.utils.serialize import dump_yaml

        from workflow.params import read_params

        dump_yaml(PARAMS, shrink(read_params(PARAMS)))


def compose(overrides: list[str], file: Path) -> None:
    """Write a params.yaml composed from recipes/, with overrides in Hydra's language.

    Raises:
        StageError: an override or a choice is wrong; says what there is to choose from.
    """
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    check_recipes(RECIPES)
    if any("oc.env" in override for override in overrides):
        raise stage.StageError("an override reads the environment (oc.env), which none may; write the value instead")
    warnings.simplefilter("ignore")  # DVC passes Hydra an argument that will go away
    try:
        compose_and_dump(str(file), str(RECIPES.resolve()), None, "config", "", overrides)
    except InterpolationToMissingValueError:
        raise stage.StageError("this recipe reads local files; write data_dir=/folder too") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise stage.StageError(f"{first_lines(error)} (recipes: {names('recipe')}; tasks: {names('task')})") from None


def first_lines(error: Exception) -> str:
    """What Hydra says, without the part that draws it."""
    return " ".join(str(error).splitlines()[:2]).strip()


def names(group: str) -> str:
    """What there is to choose from in a folder of recipes/."""
    return ", ".join(sorted(file.stem for file in (RECIPES / group).glob("*.yaml")))


if __name__ == "__main__":
    stage.run(main)
