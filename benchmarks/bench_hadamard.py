"""hadamard: bf16 to bf16, rotated; GB/s read and written. Yardstick: the reference backend, eager torch."""

import pytest
import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.ops._dispatch import implementation

WIDTHS = (256, 512, 1024, 2048, 4096)  # of square inputs


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard(benchmark, copy_bandwidth, width, backend):
    torch.manual_seed(0)
    x = torch.randn(width, width).bfloat16()
    run = implementation("hadamard", backend).run
    y = run(x, DEFAULT_SIGNS)
    assert torch.equal(y, implementation("hadamard", "reference").run(x, DEFAULT_SIGNS))
    benchmark.extra_info.update(
        op="hadamard",
        case=f"{width}x{width}",
        series="16 values at a time",
        size=width * width,
        axis="values",
        backend=backend,
        dtype="bf16",
        bytes=x.nbytes + y.nbytes,
        limit_bytes=copy_bandwidth,
        yardstick=backend == "reference",
    )
    benchmark.pedantic(run, (x, DEFAULT_SIGNS), rounds=3 if backend == "reference" else 15, warmup_rounds=1)
