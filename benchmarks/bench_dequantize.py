"""dequantize: codes and scales to bf16 or fp32; GB/s read and written. Yardstick: the reference backend, eager torch."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops._dispatch import implementation

WIDTHS = (256, 512, 1024, 2048, 4096)  # of square tensors


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", ["1x16", "1x32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_dequantize(benchmark, copy_bandwidth, width, block, dtype, backend):
    torch.manual_seed(0)
    q = nk.quantize(torch.randn(width, width).bfloat16(), block=block)
    call = (q.codes, q.scales, getattr(q, "global_scale", None), width, dtype)
    run = implementation("dequantize", backend).run
    y = run(*call)
    assert torch.equal(y, implementation("dequantize", "reference").run(*call))
    benchmark.extra_info.update(
        op="dequantize",
        case=f"{block} {width}x{width} to {str(dtype)[6:]}",
        series=f"{block} to {str(dtype)[6:]}",
        size=width * width,
        axis="values",
        backend=backend,
        dtype=str(dtype)[6:],
        bytes=q.nbytes + y.nbytes,
        limit_bytes=copy_bandwidth,
        yardstick=backend == "reference",
    )
    benchmark.pedantic(run, call, rounds=3 if backend == "reference" else 15, warmup_rounds=1)
