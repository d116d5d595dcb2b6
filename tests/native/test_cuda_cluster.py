"""What the host model says to wrong uses of a cluster's shared memory and barrier."""

import ctypes
import struct

import pytest
import torch

from tests.native import test_cuda

pytestmark = test_cuda.pytestmark

FAULTS = {
    "none": None,
    "too_early": "no barrier of the cluster yet",
    "read_early": None,
    "unsent": "stores to another block that no barrier of the cluster follows",
    "twice": "arrived twice",
    "not_arrived": "a wait without an arrival",
    "not_waited": "a barrier of the cluster that it never waited for",
    "ended": "the block has ended",
    "unaligned": "no multiple of the store's size",
    "elsewhere": "a block that the cluster has not",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    test_cuda.build(library, "tests/native/cluster_faults.cu", flags=("-Wall", "-Wextra", "-Werror"))
    return ctypes.CDLL(str(library))


def launched(faults, fault, blocks):
    """What each thread was told, and the model's complaint."""
    out = torch.zeros(blocks, 32)
    parameters = struct.pack("Qq", out.data_ptr(), list(FAULTS).index(fault))
    return out, test_cuda.complaint(faults, "neighbours", blocks, 32, 128, parameters)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_tells_of(faults, fault):
    told, complaint = launched(faults, fault, 4 if fault == "none" else 2)
    if FAULTS[fault] is not None:
        assert complaint and FAULTS[fault] in complaint
    elif fault == "none":
        assert complaint is None and told[:, 0].tolist() == [1, 0, 1, 0] and (told == told[:, :1]).all()
    else:  # one block at least has read before the other's stores had to be there
        assert complaint is None and not (told == torch.tensor([[1.0], [0.0]])).all()


def test_whole_clusters_alone(faults):
    assert "no multiple of the cluster" in launched(faults, "none", 3)[1]
