import pytest

from tests.distributed.together import Pair


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """As the two processes have."""


@pytest.fixture(scope="session")
def pair():
    made = Pair()
    yield made
    made.close()
