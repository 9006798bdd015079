"""List the licence of every locked package in requirements/licences.csv: `make licences`.

A package's own metadata say it: its licence expression, else its classifiers, else the first line of the field
License. Those of packages that are not installed here, as the ones for GPUs, come from the package index, through pip.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
TABLE = HERE / "licences.csv"
LOCKS = {"cpu": ("cpu.txt", "cpu.override.txt"), "gpu": ("gpu.txt",)}
PIP = "pip==26.3"  # the one of Python 3.11 knows no licence expressions
COPYLEFT = re.compile(r"GPL|MPL|EPL|EUPL|CDDL|GNU|Mozilla|Eclipse")
# Packages whose metadata say nothing: as the licence file in their wheel says.
FROM_FILE = {
    "agent-client-protocol": "Apache-2.0",
    "conda-inject": "MIT",
    "math-verify": "Apache-2.0",
    "oss-harmony": "Apache-2.0",
    "quack-kernels": "Apache-2.0",
    "snakemake-interface-common": "MIT",
    "snakemake-interface-logger-plugins": "MIT",
    "snakemake-interface-report-plugins": "MIT",
    "snakemake-interface-scheduler-plugins": "MIT",
    "snakemake-interface-storage-plugins": "MIT",
    "torchcodec": "BSD-3-Clause",
}
REMARKS = {
    "cuda-toolkit": "an empty package that only asks for others, without a licence",
    "docutils": "a few of its files are under the GPL",
    "grandalf": "or EPL-1.0, by its licence file",
    "instanttensor": "Apache-2.0, by its licence field",
    **dict.fromkeys(("intel-cmplr-lib-ur", "intel-openmp"), "Intel End User License Agreement for Developer Tools"),
    **dict.fromkeys(FROM_FILE, "by the licence file in its wheel"),
}


def wanted() -> dict[tuple[str, str], list[str]]:
    """The locks in which each name and version is."""
    found: dict[tuple[str, str], list[str]] = {}
    for lock, files in LOCKS.items():
        for file in files:
            for pin in re.findall(r"^([a-z0-9-]+)==(\S+)", (HERE / file).read_text(), re.MULTILINE):
                found.setdefault(pin, []).append(lock)
    return dict(sorted(found.items()))


def licence(name: str, expression: str | None, classifiers: list[str], field: str | None) -> str:
    """The licence by the metadata of a package, else by its licence file, else 'UNKNOWN'."""
    named = [re.sub(r"^License :: (OSI Approved :: )?", "", text) for text in classifiers if text.startswith("License")]
    named = [text for text in named if text != "OSI Approved"]
    line = (field or "").strip().split("\n")[0].strip()
    return expression or "; ".join(named) or line or FROM_FILE.get(name, "UNKNOWN")


def installed() -> dict[tuple[str, str], str]:
    """Licences by name and version."""
    found = {}
    for package in distributions():
        data = package.metadata
        name = re.sub("[-_.]+", "-", data["Name"].lower())
        terms = licence(name, data["License-Expression"], data.get_all("Classifier", []), data["License"])
        found[name, package.version] = terms
    return found


def on_index(pins: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The same, as the package index says."""
    with TemporaryDirectory() as folder:
        names, report = Path(folder, "names.txt"), Path(folder, "report.json")
        names.write_text("".join(f"{name}=={version}\n" for name, version in pins))
        pip = ["uv", "tool", "run", "--quiet", "--from", PIP, "pip", "--python", sys.executable, "install", "-qq"]
        options = ["--dry-run", "--no-deps", "--ignore-installed", "--report", report, "--requirement", names]
        subprocess.run([*pip, *options], check=True)
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    said = {re.sub("[-_.]+", "-", data["name"].lower()): data for data in packages}
    return {
        (name, version): licence(
            name,
            said[name].get("license_expression"),
            said[name].get("classifier", []),
            said[name].get("license"),
        )
        for name, version in pins
    }


def kind(terms: str) -> str:
    """'copyleft' or 'proprietary', where one of the licences is."""
    return "copyleft" if COPYLEFT.search(terms) else "proprietary" if re.search("Proprietary", terms) else ""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pins, known = wanted(), installed()
    try:
        known |= on_index([pin for pin in pins if pin not in known])
    except subprocess.CalledProcessError:
        sys.exit("error: the package index does not have all that is not installed here; see what pip said above")
    rows = [
        (*pin, " ".join(locks), known[pin], kind(known[pin]), REMARKS.get(pin[0], "")) for pin, locks in pins.items()
    ]
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("package", "version", "locks", "licence", "kind", "remark"))
        table.writerows(rows)
    unknown = [row[0] for row in rows if row[3] == "UNKNOWN" and not row[5]]
    if unknown:
        sys.exit(f"error: {', '.join(unknown)}: no licence is known; look at their files and add them to FROM_FILE")


if __name__ == "__main__":
    main()
