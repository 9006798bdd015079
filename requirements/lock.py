"""Add to each version of a lock what its files must be: `make lock` calls it with what uv resolved.

    python requirements/lock.py .venv/pylock.cpu.toml requirements/cpu.txt

The checksums are those that the package index lists: of the wheels that fit CPython 3.11 on Linux, x86_64 and aarch64,
and of the source. Those of other systems are left out: they are nine tenths of all.
"""

import argparse
import re
import tomllib
from pathlib import Path

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PYTHON = (3, 11)
PLATFORM = re.compile(r"any|(manylinux\w+|linux)_(x86_64|aarch64)")
TAGS = {
    (tag.interpreter, tag.abi)
    for tags in (cpython_tags(PYTHON, ["cp311"], ["any"]), compatible_tags(PYTHON, "cp311", ["any"]))
    for tag in tags
}


def fits(wheel: str) -> bool:
    """Whether a wheel of this file name can be installed."""
    tags = parse_wheel_filename(wheel)[3]
    return any((tag.interpreter, tag.abi) in TAGS and PLATFORM.fullmatch(tag.platform) for tag in tags)


def lines(packages: list[dict]) -> list[str]:
    """A lock in the form that pip reads, of the packages of a pylock.toml (PEP 751)."""
    text = []
    for package in packages:
        files = [wheel for wheel in package.get("wheels", []) if fits(wheel["url"].rpartition("/")[2])]
        files += [package["sdist"]] if "sdist" in package else []
        if not files:
            raise SystemExit(f"error: {package['name']} {package['version']} has no file for CPython 3.11 on Linux")
        hashes = sorted(f"    --hash=sha256:{file['hashes']['sha256']}" for file in files)
        text.append(" \\\n".join([f"{package['name']}=={package['version']}", *hashes]))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resolved", type=Path, help="a pylock.toml, as uv writes it")
    parser.add_argument("lock", type=Path)
    arguments = parser.parse_args()
    packages = tomllib.loads(arguments.resolved.read_text())["packages"]
    arguments.lock.write_text("\n".join(lines(packages)) + "\n")


if __name__ == "__main__":
    main()
