"""Commands run as a user runs them: with plain torch.empty, which the whole suite's fixture of this name poisons."""

import pytest


@pytest.fixture(autouse=True)
def poisoned_empty():
    pass


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass
