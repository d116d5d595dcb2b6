"""matmul: quantized x quantized, bf16 x quantized weight, bf16 x bf16. Yardstick: torch's bf16 matmul (linear) of its shape.

The limit of large products is torch's bf16 rate at 2048^3; of few rows, the copy bandwidth over the weight as it is stored.
"""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops._dispatch import implementation

# (m, n, k): square; the three products of a small layer's step (forward, input gradient, weight gradient)
PRODUCTS = (*((n, n, n) for n in (128, 256, 512, 1024, 2048)), (4096, 512, 192), (4096, 192, 512), (512, 192, 4096))
FEW_ROWS = tuple((m, 4096, 4096) for m in (1, 2, 4, 8, 16, 32, 64))


def values(x):
    return x.float() if isinstance(x, torch.Tensor) else x.dequantize()


def measure(benchmark, run, truth, shape, case, backend, dtype, **amounts):
    assert ((run().float() - truth).norm() / truth.norm()).item() < 1e-2
    benchmark.extra_info.update(
        op="matmul", case=f"{case} {'x'.join(map(str, shape))}", backend=backend, dtype=dtype, **amounts
    )
    benchmark.pedantic(
        run, rounds=30, iterations=max(1, round(2e8 / (shape[0] * shape[1] * shape[2]))), warmup_rounds=3
    )


@pytest.mark.parametrize("kind", ["torch", "bf16", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_product(benchmark, matmul_rate, shape, kind):
    torch.manual_seed(0)
    m, n, k = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    amounts = {"flops": 2 * m * n * k, "limit_flops": matmul_rate, "yardstick": kind == "torch"}
    if m == n == k:
        amounts |= {"series": "square product", "size": m, "axis": "rows, columns and length"}
    if kind == "torch":
        measure(benchmark, lambda: a @ b.t(), a.float() @ b.float().t(), shape, "product", kind, "bf16", **amounts)
        return
    block = {"nvfp4": "1x16", "mxfp8": "1x32", "bf16": None}[kind]
    left, right = (nk.quantize(x, block=block) if block else x for x in (a, b))
    truth = values(left) @ values(right).t()
    run = implementation("matmul", "native").run
    call = (left, right, None, torch.bfloat16, None, False)
    measure(benchmark, lambda: run(*call), truth, shape, "product", "native", kind, **amounts)


@pytest.mark.parametrize("kind", ["torch", "bf16", "bf16 x nvfp4", "fp32 x nvfp4", "nvfp4 x nvfp4"])
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_weight_only(benchmark, copy_bandwidth, shape, kind):
    torch.manual_seed(0)
    m, n, k = shape
    a, b = torch.randn(m, k), torch.randn(n, k).bfloat16()
    place = {"series": f"weight {n}x{k}", "size": m, "axis": "rows"}
    if kind == "torch":
        a = a.bfloat16()
        truth, amounts = a.float() @ b.float().t(), {"bytes": b.nbytes, "limit_bytes": copy_bandwidth} | place
        measure(
            benchmark,
            lambda: torch.nn.functional.linear(a, b),
            truth,
            shape,
            "weight",
            kind,
            "bf16",
            yardstick=True,
            **amounts,
        )
        return
    weight = b if kind == "bf16" else nk.quantize(b)
    a = {"bf16": a.bfloat16(), "fp32": a, "nvfp4": nk.quantize(a)}[kind.split(" ")[0]]
    truth = values(a) @ values(weight).t()
    run = implementation("matmul", "native").run
    call = (a, weight, None, torch.bfloat16, None, False)
    amounts = {"bytes": weight.nbytes, "limit_bytes": copy_bandwidth, "yardstick": False} | place
    measure(benchmark, lambda: run(*call), truth, shape, "weight", "native", kind, **amounts)
