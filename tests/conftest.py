import pytest

from tests.checkout import Checkout


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which `make repro` has run once, committed."""
    checkout = Checkout(tmp_path_factory.mktemp("trained"))
    checkout.first_run = checkout.readme("make repro")
    checkout.readme("git add dvc.lock")
    return checkout
