"""quantize: bf16 [rows, cols] to codes and scales; GB/s of the input. Yardstick: the reference backend, eager torch.

The limit is the copy bandwidth over the bytes that must move: the input twice (amax, then codes) and the output once.
"""

import pytest
import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops._dispatch import implementation

WIDTHS = (256, 512, 1024, 2048, 4096)  # of square inputs
ACTIVATION = QuantSpec(), QuantSpec(hadamard=DEFAULT_SIGNS)
GRADIENT = QuantSpec("1x16", "stochastic"), QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
CASES = {
    "1x16": (QuantSpec(), None),
    "1x16 stochastic": (QuantSpec("1x16", "stochastic"), None),
    "16x16": (QuantSpec("16x16"), None),
    "1x16 of x.T": (None, QuantSpec()),
    "pair 16x16 (weight)": (QuantSpec("16x16"), QuantSpec("16x16")),
    "pair 1x16 + RHT (x)": ACTIVATION,
    "pair SR + RHT SR (dy)": GRADIENT,
    "four_over_six mae": (QuantSpec(four_over_six="mae"), None),
    "MXFP8": (QuantSpec("1x32"), None),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_quantize(benchmark, copy_bandwidth, case, width, backend):
    torch.manual_seed(0)
    x = torch.randn(width, width).bfloat16()
    row, col = CASES[case]
    noise = torch.tensor([1, 2])
    run = implementation("quantize", backend).run
    part = x[:64, :192]
    for mine, truth in zip(
        run(part, row, col, noise), implementation("quantize", "reference").run(part, row, col, noise), strict=True
    ):
        assert torch.equal(mine.flatten().view(torch.uint8), truth.flatten().view(torch.uint8))
    written = sum(form.nbytes for form in run(x, row, col, noise))
    limit = copy_bandwidth * x.nbytes / (2 * x.nbytes + written)
    benchmark.extra_info.update(
        op="quantize",
        case=f"{case} {width}x{width}",
        series=case,
        size=width * width,
        axis="values",
        backend=backend,
        dtype="bf16",
        bytes=x.nbytes,
        limit_bytes=limit,
        yardstick=backend == "reference",
    )
    benchmark.pedantic(run, (x, row, col, noise), rounds=1 if backend == "reference" else 15, warmup_rounds=1)
