"""What the host model says to blocks that read what others have stored without the fences between."""

import ctypes
import struct

import pytest
import torch

from tests.native import test_cuda

pytestmark = test_cuda.pytestmark

FAULTS = {
    "none": None,
    "not_released": "of what no fence has followed yet",
    "not_acquired": "without a fence before it",
    "counted_early": "of what no fence has followed yet",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    test_cuda.build(library, "tests/native/fence_faults.cu", flags=("-Wall", "-Wextra", "-Werror"))
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_tells_of(faults, fault):
    """In some order of threads and blocks; and in none when nothing is wrong."""
    told = []
    for seed in range(1, 9):
        parts, arrived, out = torch.zeros(4, 64, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(64)
        parameters = struct.pack("QQQq", *(t.data_ptr() for t in (parts, arrived, out)), list(FAULTS).index(fault))
        told.append(test_cuda.complaint(faults, "parts_with_fault", 4, 64, 0, parameters, seed))
        assert told[-1] or (out == 1 + 2 + 3 + 4).all()
    assert any(told) == (fault != "none") and all(FAULTS[fault] in said for said in told if said)
