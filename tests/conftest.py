import fcntl
import os
import shutil
import time

import pytest

from tests.checkout import ROOT, Checkout, tried

# What is quick comes first, then what a user does first.
ORDER = (
    *("tests/unit/", "tests/pipeline/", "tests/e2e/test_pipeline.py"),
    # Two workers take a file each: the long ones early, so that both end together.
    *("tests/faults/test_kills.py", "tests/slurm/test_dag.py", "tests/faults/"),
)
# The longest last: what they try in full, others try in small.
LAST = ("tests/e2e/test_miniatures.py", "tests/e2e/test_golden.py", "tests/e2e/test_every_task.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files."""
    files = {item: str(item.path.relative_to(ROOT)) for item in items}
    last = {file: place for place, file in enumerate(LAST, start=1)}
    items.sort(key=lambda item: (last.get(files[item], 0), *(not files[item].startswith(start) for start in ORDER)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin no test after TEST_UNTIL, in seconds since 1970: where time is limited, a slow machine runs fewer."""
    if "TEST_UNTIL" in os.environ and time.time() > float(os.environ["TEST_UNTIL"]):
        pytest.skip("the time is over (TEST_UNTIL)")


# Commits of the tests have an author, whoever runs them.
for WHO in ("AUTHOR", "COMMITTER"):
    os.environ[f"GIT_{WHO}_NAME"] = "test"
    os.environ[f"GIT_{WHO}_EMAIL"] = "test@example.invalid"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkout:
    """A checkout in which `make repro` has run once, committed. Several workers share its making, not it."""
    folder = tmp_path_factory.mktemp("trained")
    alone = "workerinput" not in vars(request.config)
    shared = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    source, said = shared / "source", shared / "first_run.txt"
    commands = [tried("make repro"), tried("git add dvc.lock")]
    with (shared / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.is_file():
            source.mkdir()
            first_run, _ = map(Checkout(source).run, commands)
            said.write_text(first_run)
    shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True)
    checkout = Checkout.in_folder(folder)
    checkout.first_run = said.read_text()
    return checkout
