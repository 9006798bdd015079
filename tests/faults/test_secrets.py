"""Tokens in the environment appear nowhere in what a whole run leaves behind, a failed stage's traces included."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.checkout import CANARIES, Checkout


def holds(file: Path) -> list[str]:
    """The canaries in a file, in what a parquet file has compressed too."""
    content = file.read_bytes()
    if content[:4] == b"PAR1":
        table = pq.read_table(file)
        content += f"{table.schema.metadata} {table.to_pylist()}".encode()
    return [name for name, value in CANARIES.items() if value.encode() in content]


def files(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if file.is_file() and ".venv" not in file.relative_to(folder).parts]
    assert len(found) > 300
    return found


def test_no_token_is_left_in_a_run(trained: Checkout) -> None:
    assert trained.run("echo $HF_TOKEN $WANDB_API_KEY").split() == list(CANARIES.values())
    assert not any(value in trained.first_run for value in CANARIES.values())
    kinds = {"parquet", "safetensors", "json", "html", "md", "csv", "tsv"}
    looked_at = files(trained.folder)
    assert kinds <= {file.suffix[1:] for file in looked_at}
    assert any(".dvc/cache/files" in str(file) for file in looked_at)
    assert {str(file): found for file in looked_at if (found := holds(file))} == {}


def test_no_token_is_left_by_a_stage_that_fails(tmp_path: Path) -> None:
    """One with a mistake in params.yaml, and one that meets what nobody has thought of."""
    checkout = Checkout(tmp_path)
    checkout.edit("params.yaml", "seed: 42", "seed: many")
    said = checkout.run("snakemake --cores 1 2>&1", fails=True)
    checkout.run("git checkout -q params.yaml")
    with (checkout.folder / "workflow/builtin.py").open("a") as code:
        code.write("\n\ndef make_model(*_, **options):\n    raise RuntimeError('broken')\n")
    said += checkout.run("dvc repro download@base", fails=True)
    assert "report it with .scratch/tracebacks/download-base.txt" in said
    assert not any(value in said for value in CANARIES.values())
    assert "RuntimeError: broken" in (checkout.folder / ".scratch/tracebacks/download-base.txt").read_text()
    assert {str(file): found for file in tmp_path.rglob("*") if file.is_file() and (found := holds(file))} == {}


def test_a_token_that_is_left_would_be_found(tmp_path: Path) -> None:
    for name, value in CANARIES.items():
        (tmp_path / "text").write_text(f"token={value}")
        assert holds(tmp_path / "text") == [name]
        pq.write_table(pa.table({"completion": ["x", f"my {value}"]}), tmp_path / "rows", compression="zstd")
        assert holds(tmp_path / "rows") == [name]
