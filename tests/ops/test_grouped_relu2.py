"""grouped_relu2, forward and backward, against loops in fp64 over the very operands, for every load, on every backend."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.grouped_relu2.op import grouped_relu2, grouped_relu2_backward
from tests.ops.test_grouped_matmul import FLOATS, LOADS, drawn, error, offsets, stack
from tests.oracles.experts_brute import decode, grouped, groups_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(33, 80), (48, 64), (1856, 48), (48, 1856)]


@pytest.fixture(params=("native", "triton", "reference"))
def backend(request):
    """And where its tensors are to be."""
    if request.param == "triton" and _triton.triton is None:
        pytest.skip("Triton is not installed")
    with nk.backend(request.param):
        yield DEVICE if request.param == "triton" else "cpu"


def everything(device, x, b, o, h, weights):
    x, o, h, weights = (t if t is None else t.to(device) for t in (x, o, h, weights))
    b = b._replace(**{k: t.to(device) for k, t in b._asdict().items() if isinstance(t, torch.Tensor)})
    made = *grouped_relu2(x, b, o, weights, amax=True), *grouped_relu2_backward(x, b, o, h, weights, True, True)
    return [t if t is None else t.cpu() for t in made]


def check(device, sizes, n, k, dtype, weighted, b, exact):
    o, rows, unit = offsets(sizes), sum(sizes), torch.finfo(dtype).eps
    x, h, weights = (
        drawn(rows, k).mul(0.05).to(dtype),
        drawn(rows, n, dtype=dtype),
        torch.rand(rows) if weighted else None,
    )
    made = everything(device, x, b, o, h, weights)
    again = everything(device, x, b, o, h, weights)
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=True) if one is not None)
    up, a, a_most, dh, dweights, h_squared, dh_most = made
    product, w = grouped(x.double(), exact, sizes), weights.double()[:, None] if weighted else 1.0
    assert up.dtype == a.dtype == dh.dtype == dtype and error(up, product) < max(unit, 1e-5)
    for squares, hidden in ((a, up), (h_squared, h)):  # of the values as they are rounded, and rounded once
        wanted = hidden.double().clamp(min=0) ** 2 * w
        assert (
            (squares.double() - wanted).abs() <= (unit / 2 + 2**-23) * wanted + torch.finfo(dtype).smallest_normal
        ).all()
    r = h.double().clamp(min=0)
    assert error(dh, 2 * r * w * product) < max(unit, 1e-5)
    assert (dweights is None) == (not weighted)
    assert dweights is None or error(dweights, (r * r * product).sum(1)) < 1e-5
    for most, values in ((a_most, a), (dh_most, dh)):
        assert most.tolist() == [float(values[g].abs().max()) if sizes[e] else 0.0 for e, g in groups_of(sizes)]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_loads(backend, load, dtype):
    sizes = LOADS[load]
    plain, quantized = drawn(len(sizes), 33, 80, dtype=dtype), stack(len(sizes), 33, 80)
    check(backend, sizes, 33, 80, dtype, True, Stack(plain), plain.double())
    check(backend, sizes, 33, 80, dtype, False, quantized, decode(*quantized[:3]))
