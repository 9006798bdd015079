"""Where models and data come from: the Hugging Face Hub, ModelScope, files on disk, or the pipeline itself.

What the stage `download` notes of a source, in its source.json and in its log:

    origin    `owner/name` on the Hub, `modelscope:owner/name`, `path:<its last part>`, `builtin:<name>`
    revision  the commit, 40 hex digits; a path or builtin has none, so there it is the sha1 of the checksums
    licence   the recipe's; where that is unknown, the one on the repository's card on the Hub
    files     sha256 of every file as it lies on disk, after the recipe's chat_template was written into it

From a hub comes only what the pipeline reads: weights as safetensors, configuration, tokenizer and chat template of a
model; parquet, jsonl and json files of a data set, and csv files where `files` names them (they often repeat what a
parquet file has); README and licence of both. Code and pickles never do, and nothing here or later sets
trust_remote_code. Whatever can be found out before the first byte of a file is: access,
revision, missing files, room on the disk. Every file is compared with the checksum that the hub lists.

Tokens come from the environment only (HF_TOKEN, MODELSCOPE_API_TOKEN) or from an earlier login.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workflow.params import Source
from workflow.stage import Progress, StageError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling

T = TypeVar("T")

DOCUMENTS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
DATA_FILES = ("*.parquet", "*.jsonl", "*.json")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # about a data set
# Whatever `files` of a source asks for.
SUFFIXES = {
    "models": (".safetensors", ".json", ".model", ".txt", ".jinja", ".md"),
    "raw": (".parquet", ".jsonl", ".json", ".csv", ".md"),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8, 16)  # seconds
LONGEST_WAIT = 300  # whatever the Hub asks for
NETWORK = "this needs the network: where the compute nodes have none, run `dvc repro download` on one that has"


def from_builtin(source: Source, output: Path, seed: int, system_prompt: str | None) -> dict[str, str]:
    """Make a builtin in the folder `output`; return its origin and licence."""
    from workflow import builtin

    makers = {
        "qwen2": builtin.make_model,
        "aime": builtin.write_aime,
        "bespoke_stratos": builtin.write_bespoke_stratos,
        "bespoke_stratos_messages": builtin.write_bespoke_stratos_messages,
        "gpqa": builtin.write_gpqa,
        "gsm8k": builtin.write_gsm8k,
        "numina_tir": builtin.write_numina_tir,
        "questions": builtin.write_questions,
    }
    makers[source.builtin](output, seed=seed, system_prompt=system_prompt, **source.options)
    return {"origin": f"builtin:{source.builtin}", "licence": source.licence}


def from_path(name: str, source: Source, output: Path) -> dict[str, str]:
    """Copy a folder or file from disk into the folder `output`; return its origin and licence.

    Raises:
        StageError: it is a model without configuration, safetensors or tokenizer.
    """
    path = Path(source.path)
    for file in path.rglob("*"):
        if not (file.is_file() or file.is_dir()):  # a link to nothing, or a pipe, which would be read for ever
            raise StageError(
                f"sources.{name}: {file} is no file that can be read; remove it, or name its folder's parts"
            )
    if source.into == "models":
        there = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        check_model(f"sources.{name}: {path}", there, there)
        check_architecture(f"sources.{name}: {path}", path / "config.json")
    try:
        if path.is_dir():
            shutil.copytree(path, output, dirs_exist_ok=True)
        else:
            shutil.copy(path, output / path.name)
    except (shutil.Error, PermissionError) as error:
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        if "No space left" in str(first):
            raise StageError(f"sources.{name}: {path} does not fit on the disk of {output}; make room there") from error
        raise StageError(f"sources.{name}: {path} cannot be copied ({first}); make all of it readable") from error
    return {"origin": f"path:{path.name}", "licence": source.licence}


def from_hub(name: str, source: Source, output: Path) -> dict[str, str]:
    """Download a model or data set from the Hugging Face Hub into the folder `output`.

    HF_ENDPOINT names another hub than huggingface.co. A file that already lies in the user's own Hugging Face cache
    is copied from there.

    Returns:
        origin, revision and licence.

    Raises:
        StageError: as in `look_up`; nothing usable in it, not enough room, or a file that twice came with other bytes
            than the Hub lists.
    """
    info = look_up(name, source)
    from huggingface_hub import hf_hub_download

    listed = {file.rfilename: file for file in info.siblings}

    def fetch(file: str) -> None:
        """Get one file; where its bytes are not the listed ones, once more."""
        for cache in (None, output / ".cache"):  # not again a damaged copy from the user's own cache
            with hub_errors(name, source):
                path = patiently(
                    hf_hub_download,
                    source.repo,
                    file,
                    repo_type=kind(source),
                    revision=source.revision,
                    local_dir=output,
                    cache_dir=cache,
                )
            if is_as_listed(Path(path), listed[file]):
                return
            Path(path).unlink()
        raise StageError(
            f"sources.{name}: {file} of {source.repo} came twice with other bytes than the Hub lists; try again later, "
            "and if it stays so, tell the repository's owner"
        )

    files = choose(name, source, sorted(listed))
    fetch_all(name, source, {file: listed[file].size for file in files}, output, fetch)
    shutil.rmtree(output / ".cache")
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license") or "unknown"  # license_name where license is other
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return {
        "origin": source.repo,
        "revision": source.revision,
        "licence": licence if source.licence == "unknown" else source.licence,
    }


def look_up(name: str, source: Source) -> "ModelInfo | DatasetInfo":
    """What the Hub says of a repository at its revision, files and sizes too; none of them is downloaded.

    Raises:
        StageError: no network, no such repository or revision, or this account may not read it.
    """
    os.environ["HF_HUB_OFFLINE"] = "0"  # stage.quiet() keeps every other stage off the network
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(name, source):
        # Without a timeout it would wait for ever on a node whose packets are dropped.
        info = patiently(
            api.repo_info,
            source.repo,
            repo_type=kind(source),
            revision=source.revision,
            files_metadata=True,
            timeout=30,
        )
        if info.gated:  # a gated repository shows to everybody what is in it
            patiently(api.auth_check, source.repo, repo_type=kind(source))
    return info


def from_modelscope(name: str, source: Source, output: Path) -> dict[str, str]:
    """Download a model or data set from ModelScope into the folder `output`, with ModelScope's own client.

    The client itself waits, resumes, and compares each file with the sha256 that ModelScope lists for it.
    MODELSCOPE_ENDPOINT names another place than modelscope.cn.

    Returns:
        origin, revision and licence.

    Raises:
        StageError: the client is not installed, or as in `from_hub`.
    """
    os.environ["TQDM_DISABLE"] = "1"
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import (
            AuthenticationError,
            HubError,
            NetworkError,
            NotExistError,
            PermissionDeniedError,
        )
    except ImportError:
        raise StageError(
            f"sources.{name} comes from ModelScope, whose client is not installed; run: "
            "pip install 'open-r1-pipeline[modelscope]'"
        ) from None

    api = HubApi()

    def fetch(file: str) -> None:
        entry = listed[file]
        api.download_file(
            source.repo,
            kind(source),
            file,
            revision=source.revision,
            local_dir=output,
            expected_sha256=entry.sha256,
            file_size=entry.size,
        )

    where = f"sources.{name}: {source.repo} on ModelScope"
    try:
        entries = api.list_repo_files(source.repo, kind(source), revision=source.revision)
        listed = {entry.path: entry for entry in entries if not entry.is_dir}
        files = choose(name, source, sorted(listed))
        fetch_all(name, source, {file: listed[file].size for file in files}, output, fetch)
    except NotExistError as error:
        raise StageError(f"{where} or its revision {source.revision} does not exist; mend repo or revision") from error
    except (AuthenticationError, PermissionDeniedError) as error:
        raise StageError(f"{where} is not open to this account; set MODELSCOPE_API_TOKEN") from error
    except NetworkError as error:
        raise StageError(f"{where} cannot be reached; {NETWORK}") from error
    except HubError as error:
        raise StageError(f"{where}: {str(error).splitlines()[0]}; try again later") from error
    return {"origin": f"modelscope:{source.repo}", "revision": source.revision, "licence": source.licence}


# What is in a repository


def kind(source: Source) -> str:
    """What both hubs call a source."""
    return "model" if source.into == "models" else "dataset"


def choose(name: str, source: Source, there: list[str]) -> list[str]:
    """The files to download: those that match the source's `files`, or what is needed where it names none.

    A `*` matches any characters, those that part folders too, as in huggingface_hub.

    Raises:
        StageError: nothing matches, or what matches is not a model.
    """
    wanted = source.files or (MODEL_FILES if source.into == "models" else DATA_FILES)
    files = [
        file
        for file in there
        if any(fnmatchcase(file, glob) for glob in wanted)
        and file.endswith(SUFFIXES[source.into])
        and Path(file).name not in NO_ROWS
    ]
    where = f"sources.{name}: {source.repo}"
    for file in files:
        if file.startswith("/") or ".." in file.split("/"):
            raise StageError(f"{where} lists the file {file!r}, which leaves its folder; name another repository")
    if source.into == "models":
        check_model(where, files, there)
    elif not files:
        raise StageError(
            f"{where} has no parquet, jsonl, json or csv file that matches {', '.join(wanted)}; name others under "
            f"sources.{name}.files (it has: {some(there)})"
        )
    return files + [file for file in there if file not in files and any(fnmatchcase(file, d) for d in DOCUMENTS)]


def check_model(where: str, files: list[str], there: list[str]) -> None:
    """Raise StageError when the files are not those of a model with its tokenizer; `there` is what could be had."""
    if "config.json" not in files:
        raise StageError(f"{where} has no config.json, so it is not a model; name another (it has: {some(there)})")
    if not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in there if file.endswith(PICKLES)]
        if pickles:
            raise StageError(
                f"{where} has its weights as pickles only ({some(pickles)}), which run code when they are loaded; "
                "name a repository, revision or folder with model.safetensors"
            )
        raise StageError(f"{where} has no model*.safetensors; name another (it has: {some(there)})")
    if not any(file in TOKENIZERS for file in files):
        raise StageError(
            f"{where} has no tokenizer (none of {', '.join(TOKENIZERS)}); name one that has, or save the tokenizer "
            f"of the model it was made from beside it (it has: {some(there)})"
        )


def check_architecture(where: str, config: Path) -> None:
    """Raise StageError when a config.json is of no language model that transformers itself can make."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    content = json.loads(config.read_text())
    model_type = content.get("model_type", "none")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        why = "needs code of its own, which is never run" if "auto_map" in content else "is no causal language model"
        raise StageError(f"{where}: model_type {model_type} {why}; name one that transformers itself has")


def some(files: list[str]) -> str:
    """The first ten names in a row."""
    more = f" and {len(files) - 10} more" if len(files) > 10 else ""
    return (", ".join(files[:10]) or "nothing") + more


# Downloading


def fetch_all(name: str, source: Source, sizes: dict[str, int], output: Path, fetch: Callable[[str], None]) -> None:
    """Fetch the files into `output`, a model's config.json before its weights, after a look at the room there.

    Args:
        sizes: bytes of each file.
        fetch: gets one file, or raises.

    Raises:
        StageError: there is not enough room, or transformers cannot make such a model.
    """
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())  # of a download that was killed
    need, room = sum(sizes.values()) - there, shutil.disk_usage(output).free
    if need > room:
        raise StageError(
            f"sources.{name}: {source.repo} needs {need / 1e9:.2f} GB and {output} has room for {room / 1e9:.2f} GB; "
            "make room there, or clone onto a larger disk"
        )
    progress, done = Progress(f"download {name}, MB", ceil(sum(sizes.values()) / 1e6)), 0
    for file in sorted(sizes, key=lambda file: (file != "config.json", file)):
        fetch(file)
        if source.into == "models" and file == "config.json":
            check_architecture(f"sources.{name}: {source.repo}", output / file)
        done += sizes[file]
        progress.update(done // 1_000_000, file)


def patiently(request: Callable[..., T], *args: Any, **options: Any) -> T:
    """The result of a request to the Hub, repeated where the Hub is busy or the connection broke.

    huggingface_hub 1.33 itself repeats a file's metadata (429, 5xx) and the start of its download (429, with its
    Retry-After), and goes on with a file, by steps of 10 MiB, after the server closed the connection. It does not
    repeat `repo_info` and `auth_check`, nor a file whose connection was reset or whose download starts with a 5xx.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for wait in WAITS:
        try:
            return request(*args, **options)
        except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError):
            pass
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            asked = error.response.headers.get("Retry-After", "")
            wait = min(int(asked), LONGEST_WAIT) if asked.isdigit() else wait
        print(f"the Hub is busy or the connection broke: again in {wait} s", flush=True)
        time.sleep(wait)
    return request(*args, **options)


def is_as_listed(path: Path, listed: "RepoSibling") -> bool:
    """Whether a file has the checksum that the Hub lists: sha256 of a large (LFS) file, git's sha1 of a small one."""
    with path.open("rb") as handle:
        if listed.lfs is not None:
            return hashlib.file_digest(handle, "sha256").hexdigest() == listed.lfs.sha256
        start = b"blob %d\0" % path.stat().st_size
        return hashlib.file_digest(handle, lambda: hashlib.sha1(start)).hexdigest() == listed.blob_id


@contextmanager
def hub_errors(name: str, source: Source) -> Iterator[None]:
    """Turn what huggingface_hub raises in the `with` block into a StageError that says what to do."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_token

    hub, repo = constants.ENDPOINT, source.repo
    page = f"{hub}/{'datasets/' if source.into == 'raw' else ''}{repo}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except (httpx.HTTPError, OSError, RuntimeError) as raised:
        # hf_hub_download speaks of a file that it has not got, and keeps the reason.
        error = raised.__cause__ if isinstance(raised, LocalEntryNotFoundError) and raised.__cause__ else raised
        if isinstance(error, GatedRepoError):
            who = "with the account of this token" if get_token() else f"and {login}"
            text = f"{repo} is gated; accept its terms at {page} {who}"
        elif isinstance(error, RepositoryNotFoundError):
            who = "use a token of an account that may read it" if get_token() else login
            text = f"there is no {kind(source)} {repo} on {hub}, or it is private; mend repo, or {who}"
        elif isinstance(error, RevisionNotFoundError):
            text = f"{repo} has no revision {source.revision}; write one of the commits at {page}/commits/main"
        elif isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            text = f"{hub} does not accept the token; {login}"
        elif isinstance(error, HfHubHTTPError):
            text = f"{page} answered {error.response.status_code} {error.response.reason_phrase}; try again later"
        elif isinstance(error, httpx.HTTPError):
            text = f"{hub} cannot be reached ({error}); {NETWORK}"
        elif isinstance(error, RuntimeError):  # how hf_xet gives up, after minutes
            text = f"{repo} could not be got from Xet storage ({error}); try again later, or with HF_HUB_DISABLE_XET=1"
        else:
            text = f"{repo}: {str(error).splitlines()[0]}"
        raise StageError(f"sources.{name}: {text}") from raised


# After the download


def write_chat_template(folder: Path, template: str) -> None:
    """Make a template the only one of the tokenizer in a model folder.

    transformers 5 prefers chat_template.jinja to the key in tokenizer_config.json (tokenization_utils_base.py) but
    adds the ones in additional_chat_templates/, and other readers of the folder may prefer the key: both go.
    """
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings: dict[str, Any] = json.loads(config.read_text())
        settings.pop("chat_template", None)
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(template)


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path, sorted."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as handle:
            found[str(file.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found
