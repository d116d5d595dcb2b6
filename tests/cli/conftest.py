"""Commands run as a user runs them: with plain torch.empty, which the whole suite's fixture of this name poisons."""

import pytest
import torch
from torch.utils._device import _device_constructors


@pytest.fixture(autouse=True)
def poisoned_empty():
    # Which functions `with torch.device("meta")` redirects is remembered from its first use, maybe in a poisoned test.
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
