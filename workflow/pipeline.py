"""dvc.yaml resolved for other runners: which stages there are, what each needs, and with which parameters.

`load_stages` is pure: it reads dvc.yaml, params.yaml and pyproject.toml, takes no lock, never looks at dvc.lock or at
data/.
"""

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml after foreach, matrix and ${…} are resolved.

    `name` is DVC's, e.g. `sft@cold_start`; `entry` is the part before the @; `upstream` are the names of the
    stages whose outputs it reads; `files` are its other dependencies (code); `params` are values by key.
    """

    name: str
    entry: str
    command: str
    upstream: tuple[str, ...]
    files: tuple[str, ...]
    outs: tuple[str, ...]
    params: dict[str, Any]


def load_stages(root: Path = Path()) -> dict[str, Stage]:
    """Every stage of the pipeline by name, in the order of dvc.yaml."""
    import yaml
    from dvc.parsing import DataResolver
    from dvc.repo import Repo

    definition = yaml.safe_load((root / "dvc.yaml").read_text())
    resolver = DataResolver(Repo(str(root)), str(root), definition)
    resolved = resolver.resolve()["stages"]
    values = {
        "params.yaml": resolver.context.value,
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text()),
    }
    outs = {
        name: [*map(_path, stage["outs"]), *map(_path, stage.get("metrics", []))] for name, stage in resolved.items()
    }
    made_at = {out: name for name in outs for out in outs[name]}
    made_inside: dict[str, list[str]] = {}
    for out, name in made_at.items():
        for folder in _folders(out):
            made_inside.setdefault(folder, []).append(name)
    stages = {}
    for name, stage in resolved.items():
        deps = [_path(dep) for dep in stage.get("deps", [])]
        upstream = {
            dep: [*(made_at[path] for path in (dep, *_folders(dep)) if path in made_at), *made_inside.get(dep, [])]
            for dep in deps
        }
        stages[name] = Stage(
            name=name,
            entry=name.partition("@")[0],
            command=stage["cmd"],
            upstream=tuple(dict.fromkeys(other for dep in deps for other in upstream[dep])),
            files=tuple(dep for dep in deps if not upstream[dep]),
            outs=tuple(outs[name]),
            params=_params(stage.get("params", []), values),
        )
    return stages


def made(name: str, root: Path = Path()) -> str:
    """What dvc.lock says that a stage made: a path and its hash per line."""
    outs = _locked((root / "dvc.lock").read_text())["stages"][name]["outs"]
    return "".join(f"{out['path']} {out['md5']}\n" for out in outs)


@lru_cache(maxsize=1)
def _locked(text: str) -> dict[str, Any]:
    """The content of a dvc.lock, which is asked about every stage; libyaml reads it seven times as fast as Python."""
    import yaml

    return yaml.load(text, Loader=yaml.CSafeLoader)


def check_profile(settings: Any) -> None:
    """Raise Snakemake's WorkflowError where a profile gives resources to a rule that is no entry of dvc.yaml.

    Args:
        settings: Snakemake's ResourceSettings, made from the profile and the command line.
    """
    import yaml
    from snakemake.exceptions import WorkflowError

    entries = list(yaml.safe_load(Path("dvc.yaml").read_text())["stages"])  # some may have no stage in this recipe
    for option, rules in (("resources", settings.overwrite_resources), ("threads", settings.overwrite_threads)):
        for rule in rules:
            if rule not in entries:
                raise WorkflowError(
                    f"set-{option} names the rule {rule!r}, which does not exist; write one of: {', '.join(entries)}"
                )


def _path(entry: str | dict[str, Any]) -> str:
    """The path of a dependency or output, which may carry options."""
    return str(PurePosixPath(entry if isinstance(entry, str) else next(iter(entry))))


def _folders(path: str) -> list[str]:
    """The folders that a path lies in, the next one first."""
    return [str(folder) for folder in PurePosixPath(path).parents][:-1]


def _params(entries: list[Any], values: dict[str, Any]) -> dict[str, Any]:
    keys = []
    for entry in entries:
        if isinstance(entry, str):
            keys.append(("params.yaml", entry))
        else:  # a file with some of its keys, or with none for the whole file
            keys += [(file, key) for file, some in entry.items() for key in some or [""]]
    found = {}
    for file, key in keys:
        value = values[file]
        for part in filter(None, key.split(".")):
            value = value[part]
        found[f"{file}:{key}"] = value
    return found
