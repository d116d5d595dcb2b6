"""Limits of this machine, measured in the run that is compared with them."""

import statistics
import time

import pytest
import torch


def median_seconds(run, rounds: int = 15) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes read and written a second by torch's copy of 64 MB, larger than the cache of most machines."""
    source = torch.ones(1 << 25, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


@pytest.fixture(scope="session")
def matmul_rate() -> float:
    """Operations a second of torch's bf16 matmul at 2048^3."""
    a, b = torch.randn(2, 2048, 2048).bfloat16()
    return 2 * 2048**3 / median_seconds(lambda: a @ b.t(), rounds=7)


@pytest.fixture(scope="session")
def fp32_matmul_rate() -> float:
    """The same in fp32."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / median_seconds(lambda: a @ b.t(), rounds=5)
