"""grouped_relu2, forward and backward, against loops in fp64 over the very operands, for every load, on every backend."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.grouped_relu2.op import grouped_relu2, grouped_relu2_backward
from tests.ops.quantize_checks import same_bytes
from tests.ops.test_grouped_matmul import FLOATS, LOADS, drawn, error, offsets, stack
from tests.ops.test_hadamard import matrix
from tests.oracles.experts_brute import decode, grouped, groups_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the NaNs that the interpreter meets
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16


@pytest.fixture(params=("native", "triton", "reference"))
def device(request):
    """Of the tensors, on each backend."""
    if request.param == "triton" and _triton.triton is None:
        pytest.skip("Triton is not installed")
    with nk.backend(request.param):
        yield DEVICE if request.param == "triton" else "cpu"


def moved(device, *given):
    """Tensors, stacks and None on a device."""
    parts = ([x] if x is None or isinstance(x, torch.Tensor) else x for x in given)
    for x, part in zip(given, parts, strict=True):
        made = [t.to(device) if isinstance(t, torch.Tensor) else t for t in part]
        yield Stack(*made) if isinstance(x, Stack) else made[0]


def check(device, sizes, a, b, exact, h, weights, rows=None):
    """All results of forward, and of backward through h. exact: fp64 of b; rows: which row of a each is."""
    a_there, b_there, o, h_there, w_there, rows_there = moved(device, a, b, offsets(sizes), h, weights, rows)
    up, squares, up_most = grouped_relu2(a_there, b_there, o, w_there, None, rows_there, True, DEFAULT_SIGNS)
    assert torch.equal(up, grouped_matmul(a_there, b_there, o, rows=rows_there))
    picked = a_there if rows is None else a_there[rows_there]
    dh, dweights, again, dh_most = grouped_relu2_backward(
        picked, b_there, o, h_there, w_there, True, True, DEFAULT_SIGNS
    )
    product, unit = grouped(a.double() if rows is None else a.double()[rows], exact, sizes), torch.finfo(a.dtype).eps
    assert {t.dtype for t in (up, squares, dh, again)} == {a.dtype} and error(up.cpu(), product) < max(unit, 1e-5)
    w = 1.0 if weights is None else weights.double()[:, None]
    for got, hidden in ((squares, up), (again, h)):  # of values as they are rounded, and rounded once
        wanted = hidden.cpu().double().clamp(min=0) ** 2 * w
        smallest = torch.finfo(a.dtype).smallest_normal
        assert ((got.cpu().double() - wanted).abs() <= (unit / 2 + 2**-22) * wanted + smallest).all()
    r = h.double().clamp(min=0)
    assert error(dh.cpu(), 2 * r * w * product) < max(unit, 1e-5)
    assert dweights is None if weights is None else error(dweights.cpu(), (r * r * product).sum(1)) < 1e-5
    for (most, none, turned), values in ((up_most, squares), (dh_most, dh)):
        assert most.tolist() == [float(values[g].abs().max()) if sizes[e] else 0.0 for e, g in groups_of(sizes)]
        assert not none.any()
        for e, g in groups_of(sizes):
            x = torch.nn.functional.pad(values[g].cpu().double(), (0, 0, 0, -sizes[e] % 16))
            wanted = float((x.t().unflatten(1, (-1, 16)) @ matrix(DEFAULT_SIGNS)).abs().max()) if sizes[e] else 0.0
            assert abs(float(turned[e]) - wanted) <= wanted * 2**-8 and turned[e] == turned[e].bfloat16()


@pytest.mark.parametrize("sizes", [[5, 0, 17, 1], [0, 0], [3, 0, 130]], ids=str)
def test_quantizes_as_without(device, sizes):
    """What the recipe makes of the squares and of the gradient, its amaxes handed in or found by itself."""
    row, col = QuantSpec(rounding="stochastic"), QuantSpec(rounding="stochastic", hadamard=DEFAULT_SIGNS)
    rows = sum(sizes)
    given = (*moved(device, drawn(rows, 16, dtype=BF16), drawn(len(sizes), 48, 16, dtype=BF16), offsets(sizes)),)
    (h,) = moved(device, drawn(rows, 48, dtype=BF16))
    _, squares, most = grouped_relu2(*given, amax=True, signs=DEFAULT_SIGNS)
    dh, _, _, dh_most = grouped_relu2_backward(*given, h, amax=True, signs=DEFAULT_SIGNS)
    for values, amax in ((squares, most), (dh, dh_most)):
        forms = [nk.quantize_groups(values, given[2], row, col, 5, handed) for handed in (None, amax)]
        alone, together = ((r.codes, r.scales, r.global_scale, *c[:3]) for r, c in forms)
        assert all(map(same_bytes, alone, together))


@pytest.mark.parametrize(
    "load, dtype", [*((load, BF16) for load in LOADS), *(("one group", dtype) for dtype in FLOATS[1:])]
)
def test_loads(device, load, dtype):
    sizes, rows = LOADS[load], sum(LOADS[load])
    a, h, plain = (
        drawn(rows, 80).mul(0.05).to(dtype),
        drawn(rows, 33, dtype=dtype),
        drawn(len(sizes), 33, 80, dtype=dtype),
    )
    quantized = stack(len(sizes), 33, 80)
    check(device, sizes, a, plain, plain.double(), h, torch.rand(rows))
    check(device, sizes, a, quantized, decode(*quantized[:3]), h, None)


@pytest.mark.parametrize("n, k", [(48, 64), (1856, 48), (48, 1856)])
def test_shapes(device, n, k):
    """Of gathered rows and a stack's transposes, h strided."""
    a, b, h = drawn(7, k, dtype=BF16), drawn(3, k, n, dtype=BF16).transpose(1, 2), drawn(n, 17, dtype=BF16).t()
    check(device, [5, 0, 12], a, b, b.double(), h, torch.rand(17), torch.randint(7, (17,)))


def test_run_to_run(device):
    given = (*moved(device, drawn(55, 80, dtype=BF16), drawn(6, 33, 80, dtype=BF16), offsets(LOADS["mixed"])),)
    h, weights = moved(device, drawn(55, 33, dtype=BF16), torch.rand(55))
    first, second = (
        (*grouped_relu2(*given, weights, amax=True), *grouped_relu2_backward(*given, h, weights, True, True))
        for _ in "12"
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(device, bad):
    """And its group's amax says so; but a negative infinity's square is zero."""
    x, b, h, o, w = drawn(6, 16), torch.ones(2, 5, 16), drawn(6, 5).abs() + 1, offsets([2, 4]), torch.rand(6) + 1
    x[3, 2], h[4, 1] = bad, bad
    x, b, h, o, w = moved(device, x, b, h, o, w)
    up, squares, most = grouped_relu2(x, b, o, w, amax=True)
    for t in (up, squares):
        assert t.isfinite().all(1).tolist() == [True, True, True, False, True, True]
    assert most[0].isfinite().tolist() == [True, False]
    dh, dweights, again, most = grouped_relu2_backward(x, b, o, h, w, True, True)
    assert dh.isfinite().sum(1).tolist() == [5, 5, 5, 0, 4, 5] and not again[4, 1].isfinite()
    assert dweights.isfinite().tolist() == [True, True, True, False, False, True]
    assert most[0].isfinite().tolist() == [True, False]
    if bad == math.inf:  # of the rows that a tile has too many none is the largest
        b[1] = bad
        up, squares, most = grouped_relu2(-x.abs() - 1, b, o, w, amax=True)
        assert up[2:].isinf().all() and not squares.any() and not most.any()


def test_registered_ops_are_sound():
    given = [torch.randn(3, 8), None, None, None, torch.randn(2, 5, 8), None, None, None]
    given += [torch.tensor([0, 1, 3]), None, "float32", False]
    for weights, wanted, signs in ((torch.rand(3), True, 7), (None, False, None)):
        torch.library.opcheck(torch.ops.nvfp4.grouped_relu2, (*given, weights, wanted, signs))
        h = torch.randn(3, 5)
        torch.library.opcheck(torch.ops.nvfp4.grouped_relu2_backward, (*given, h, weights, wanted, wanted, signs))


def test_errors_name_the_argument():
    a, b, o = torch.ones(3, 8), torch.ones(2, 5, 8), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"b: got 2 dimensions; allowed: 3, \[groups, N, K\]"):
        grouped_relu2(a, b[0], o)
    with pytest.raises(ValueError, match=r"weights: got shape \[2\]; allowed: \[3\], one for each row"):
        grouped_relu2(a, b, o, torch.ones(2))
    with pytest.raises(TypeError, match="weights: got torch.int64; allowed: a floating-point tensor"):
        grouped_relu2(a, b, o, torch.ones(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="weights: got a tensor that requires grad; .*nk.experts differentiates"):
        grouped_relu2(a, b, o, torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"h: got shape \[3, 8\]; allowed: \[3, 5\]"):
        grouped_relu2_backward(a, b, o, a)
