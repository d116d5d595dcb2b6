"""grouped_matmul against loops in fp64 over the very operands, for every load, on every instruction set and backend."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import pack
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from tests.oracles.experts_brute import decode, grouped, grouped_sums

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LOADS = {
    "mixed": [5, 0, 17, 1, 0, 32],
    "all to one": [0, 0, 55, 0],
    "one row": [0, 1, 0],
    "no rows": [0, 0],
    "few each": [3, 12, 13, 2, 7],
    "one group": [40],
}
SHAPES = [(48, 64), (1856, 48), (48, 1856), (17, 16), (33, 80)]  # of each matrix; K a multiple of 16


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


PACKED = torch.zeros(2, 1, 2, 32, 4, dtype=torch.int32), torch.zeros(2, 1, 1, 32, dtype=torch.int32)


def offsets(sizes):
    return torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])


def stack(groups, rows, cols):
    parts = [nk.quantize(drawn(rows, cols) * 2.0**g) for g in range(groups)]
    return Stack(*(torch.stack([getattr(p, name) for p in parts]) for name in ("codes", "scales", "global_scale")))


def error(y, truth):
    return ((y.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


@pytest.fixture
def on(request, isa):
    """On each instruction set of the native backend."""
    with nk.backend("native"):
        yield


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_plain_weights(on, load, dtype):
    sizes = LOADS[load]
    a, b = drawn(sum(sizes), 80, dtype=dtype), drawn(len(sizes), 33, 80, dtype=dtype)
    y = grouped_matmul(a, b, offsets(sizes), torch.float32)
    assert y.shape == (sum(sizes), 33) and error(y, grouped(a.double(), b.double(), sizes)) < 1e-6
    assert torch.equal(grouped_matmul(a, b, offsets(sizes)), y.to(dtype))  # rounded once


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nvfp4_weights(on, load, dtype):
    sizes = LOADS[load]
    a, b = drawn(sum(sizes), 80, dtype=dtype), stack(len(sizes), 33, 80)
    y = grouped_matmul(a, b, offsets(sizes), torch.float32)
    assert error(y, grouped(a.double(), decode(*b[:3]), sizes)) < 1e-6


@pytest.mark.parametrize("n, k", SHAPES)
def test_shapes(on, n, k):
    sizes = [13, 0, 1, 6, 40]
    for dtype in (torch.bfloat16, torch.float32):
        a, plain, quantized = drawn(60, k, dtype=dtype), drawn(5, n, k, dtype=dtype), stack(5, n, k)
        assert (
            error(grouped_matmul(a, plain, offsets(sizes), torch.float32), grouped(a.double(), plain.double(), sizes))
            < 1e-6
        )
        y = grouped_matmul(a, quantized, offsets(sizes), torch.float32)
        assert error(y, grouped(a.double(), decode(*quantized[:3]), sizes)) < 1e-6


@pytest.mark.parametrize("k", [1, 7, 31, 33, 100])
def test_odd_sums(on, k):
    """K of plain operands is free."""
    sizes = [2, 20]
    for dtype in FLOATS:
        a, b = drawn(22, k, dtype=dtype), drawn(2, 5, k, dtype=dtype)
        assert error(grouped_matmul(a, b, offsets(sizes), torch.float32), grouped(a.double(), b.double(), sizes)) < 1e-6


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_divided_sums(on, load, dtype):
    """The gradient of the weights: operands transposed in memory, and not; zero for a group without rows."""
    sizes = LOADS[load]
    for m, n in ((48, 40), (5, 130)):
        dy, x = drawn(sum(sizes), m, dtype=dtype), drawn(sum(sizes), n, dtype=dtype)
        truth = grouped_sums(dy.t().double(), x.t().double(), sizes)
        y = grouped_matmul(dy.t(), x.t(), offsets(sizes), torch.float32)
        assert y.shape == (len(sizes), m, n) and error(y, truth) < 1e-6
        assert not any(y[e].any() for e, size in enumerate(sizes) if size == 0)
        y = grouped_matmul(dy.t().contiguous(), x.t().contiguous(), offsets(sizes), torch.float32)
        assert error(y, truth) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_transposed_weights(on, dtype):
    """The gradient of the input reads each matrix by its columns."""
    sizes = [3, 0, 30, 100]
    a, b = drawn(133, 49, dtype=dtype), drawn(4, 49, 72, dtype=dtype).transpose(1, 2)
    y = grouped_matmul(a, b, offsets(sizes), torch.float32)
    assert error(y, grouped(a.double(), b.double(), sizes)) < 1e-6


def test_mixed_types_and_strides(on):
    sizes, wide = [2, 30], drawn(64, 200)
    for a_dtype in FLOATS:
        for b_dtype in FLOATS:
            for a in (wide[:32, 3:83].to(a_dtype), wide.to(a_dtype)[::2, 1:161:2], wide.t()[:32, :64].to(a_dtype)):
                b = drawn(2, 3 * 21, a.shape[1], dtype=b_dtype)[:, ::3]
                y = grouped_matmul(a, b, offsets(sizes), torch.float32)
                assert error(y, grouped(a.double(), b.double(), sizes)) < 1e-6


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gathered_rows(on, load, dtype):
    """Of plain and quantized weights, and where the sums are divided: the bits of a product after a gather, for any strides; a
    token that no row reads may hold anything."""
    sizes = LOADS[load]
    for tokens, k in ((1, 33), (30, 80)):
        rows = torch.randint(0, tokens, (sum(sizes),))
        plain, quantized = drawn(len(sizes), 33, k, dtype=dtype), stack(len(sizes), 33, 80)
        dy = drawn(sum(sizes), 49, dtype=dtype)
        for view in (lambda w: w, lambda w: w[::2, ::2], lambda w: w.t()):
            x = view(drawn(2 * k, 2 * k, dtype=dtype))[:tokens, :k]
            x[[t for t in range(tokens) if t not in rows]] = float("nan")
            gathered = torch.stack([x[t] for t in rows.tolist()]) if len(rows) else x[:0]
            calls = [(x, gathered, plain, grouped(gathered.double(), plain.double(), sizes))]
            if k == 80:
                calls += [(x, gathered, quantized, grouped(gathered.double(), decode(*quantized[:3]), sizes))]
            calls += [(dy.t(), dy.t(), None, grouped_sums(dy.t().double(), gathered.t().double(), sizes))]
            for a, ordered, b, truth in calls:
                y = grouped_matmul(a, x.t() if b is None else b, offsets(sizes), torch.float32, rows)
                assert y.shape == truth.shape and error(y, truth) < 1e-6
                b = gathered.t() if b is None else b
                assert torch.equal(y, grouped_matmul(ordered, b, offsets(sizes), torch.float32))


def test_threads_change_nothing(on):
    sizes, before = [70, 0, 3, 200, 12, 15], torch.get_num_threads()
    quantized, dy = stack(6, 170, 512), drawn(300, 64, dtype=torch.bfloat16)
    plain, a = drawn(6, 170, 512, dtype=torch.bfloat16), drawn(300, 512, dtype=torch.bfloat16)
    rows = torch.randint(0, 300, (300,))
    results = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            calls = (a, quantized), (a, plain), (dy.t(), a.t())
            results.append([grouped_matmul(*operands, offsets(sizes)) for operands in calls])
            results[-1] += [grouped_matmul(*operands, offsets(sizes), rows=rows) for operands in calls]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("g", [float("nan"), float("inf")])
def test_a_bad_global_scale_is_its_groups_own(on, g, count):
    b = stack(2, 5, 32)
    b = b._replace(global_scales=torch.tensor([1.0, g]))
    y = grouped_matmul(torch.ones(2 * count, 32), b, offsets([count, count]))
    assert y[:count].isfinite().all() and y[count:].isnan().all()


def test_special_values_stay_in_their_rows(on):
    a = torch.ones(50, 32)
    a[0, 3], a[9, 4] = float("inf"), float("nan")
    for b in (torch.rand(2, 5, 32) + 1, Stack(*(t for t in stack(2, 5, 32)))):
        y = grouped_matmul(a, b, offsets([1, 49]))
        assert not y[0].isfinite().any() and y[9].isnan().all()
        assert y[1:9].isfinite().all() and y[10:].isfinite().all()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_reference(dtype):
    for sizes in LOADS.values():
        groups, rows = len(sizes), sum(sizes)
        a, b, quantized = drawn(rows, 48, dtype=dtype), drawn(groups, 20, 48, dtype=dtype), stack(groups, 20, 48)
        with nk.backend("reference"):
            y = grouped_matmul(a, b, offsets(sizes))
            sums = grouped_matmul(a.t(), a.t(), offsets(sizes))
            decoded = grouped_matmul(a, quantized, offsets(sizes))
        unit = torch.finfo(dtype).eps
        assert error(y, grouped(a.double(), b.double(), sizes)) <= 2 * unit
        assert error(sums, grouped_sums(a.t().double(), a.t().double(), sizes)) <= 2 * unit
        assert error(decoded, grouped(a.double(), decode(*quantized[:3]), sizes)) <= max(2 * unit, 1e-6)


def test_registered_op_is_sound():
    a, b, o = drawn(9, 32), stack(3, 5, 32), offsets([4, 0, 5])
    parts = b.values, b.scales.view(torch.uint8), b.global_scales
    checks, nothing = ("test_schema", "test_faketensor"), [None] * 3
    w = stack(3, 16, 32)
    for b_parts in (parts, (*pack(*w[:2]), w.global_scales)):
        arguments = (a, *nothing, *b_parts, None, o, None, "bfloat16")
        torch.library.opcheck(torch.ops.nvfp4.grouped_matmul, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.nvfp4.grouped_matmul, (a.t(), *nothing, a.t(), *nothing, o, None, "float32"), test_utils=checks
    )
    x, rows = drawn(4, 32), torch.tensor([3, 3, 0, 1, 3, 2, 0, 0, 3])
    for operands in ((x, *nothing, *parts, None), (a.t(), *nothing, x.t(), *nothing)):
        torch.library.opcheck(torch.ops.nvfp4.grouped_matmul, (*operands, o, rows, "float32"), test_utils=checks)


@pytest.mark.parametrize(
    "change, error_type, message",
    [
        (dict(a=torch.zeros(3)), ValueError, "a: got 1 dimensions"),
        (dict(a=torch.zeros(3, 8)), ValueError, "a and b: got K = 8 and K = 16"),
        (dict(a=torch.zeros(3, 16, dtype=torch.int32)), TypeError, "a: got torch.int32"),
        (dict(offsets=torch.tensor([0, 3], dtype=torch.int32)), TypeError, "offsets: got torch.int32"),
        (dict(offsets=torch.tensor([0, 3])), ValueError, "offsets: got 2 numbers; allowed: 3"),
        (dict(offsets=torch.tensor([0, 2, 4])), ValueError, "offsets: got .* ascending numbers from 0 to 3"),
        (dict(offsets=torch.tensor([0, 4, 3])), ValueError, "offsets: got"),
        (dict(offsets=torch.tensor(0)), ValueError, r"offsets: got shape \[\]; allowed: one dimension"),
        (dict(offsets=torch.zeros(0, dtype=torch.int64)), ValueError, r"offsets: got no numbers; allowed: \[groups \+ 1\]"),
        (dict(rows=torch.zeros(3, dtype=torch.int32)), TypeError, "rows: got torch.int32; allowed: int64"),
        (dict(rows=torch.zeros(3, 1, dtype=torch.int64)), ValueError, r"rows: got shape \[3, 1\]; allowed: one dimension"),
        (dict(rows=torch.zeros(6, dtype=torch.int64)[::2]), ValueError, r"rows: got strides \(2,\)"),
        (dict(rows=torch.tensor([0, 3, 1])), ValueError, "rows: got 0 to 3; allowed: 0 to 2"),
        (dict(rows=torch.tensor([0, -1, 1])), ValueError, "rows: got -1 to 1; allowed: 0 to 2"),
        (dict(rows=torch.tensor([0, 1])), ValueError, "offsets: got .* ascending numbers from 0 to 2"),
        (dict(b=torch.zeros(5, 4), rows=torch.tensor([0, 4])), ValueError, "a and b: got K = 16 and K = 2"),
        (dict(b=torch.zeros(5, 4), a=torch.zeros(3, 2), rows=torch.tensor([0, 4])), ValueError, "rows: got 0 to 4"),
        (dict(b=torch.zeros(5, 4), a=torch.zeros(3, 2), rows=torch.tensor([0, 3])), ValueError, "offsets: got .* from 0 to 2"),
        (dict(b=Stack(torch.zeros(2, 5, 8))), ValueError, "a and b"),
        (dict(b=Stack(torch.zeros(2, 5, 8), torch.zeros(2, 5, 1), torch.zeros(2))), ValueError, "b: got codes torch.float32"),
        (
            dict(b=Stack(torch.zeros(2, 5, 8, dtype=torch.uint8), torch.zeros(2, 5, 1), torch.zeros(2))),
            ValueError, "b: got scales",
        ),
        (dict(b=torch.zeros(2, 5, 16, requires_grad=True)), RuntimeError, "b: got a tensor that requires grad"),
        (dict(b=Stack(PACKED[0], PACKED[1], None)), ValueError, "b: got scales None; allowed: torch.float32"),
        (dict(b=Stack(PACKED[0], PACKED[1][:1], torch.ones(2))), ValueError, "b: got scales .* beside packed values"),
        (dict(b=Stack(PACKED[0][:, :, :1], PACKED[1], torch.ones(2))), ValueError, "b: got packed values"),
        (dict(b=Stack(PACKED[0].expand(2, 3, 2, 32, 4), PACKED[1].repeat(1, 3, 1, 1), torch.ones(2))),
         ValueError, "b: got packed parts with strides"),
        (dict(a=torch.zeros(3, 144), b=Stack(*PACKED, torch.ones(2))), ValueError, "a and b: got K = 144 and K = 128"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(backend, change, error_type, message):
    good = dict(a=torch.zeros(3, 16), b=torch.zeros(2, 5, 16), offsets=torch.tensor([0, 2, 3]))
    with pytest.raises(error_type, match=message):
        grouped_matmul(**good | change)


def test_float64_beside_float32_is_refused():
    a, b, o = drawn(5, 16), drawn(2, 8, 16), offsets([3, 2])
    for operands in ((a, b, o, torch.float64), (a, b.double(), o), (a.double(), b, o)):
        with pytest.raises(
            TypeError, match="a, b and out_dtype: got torch.float32, torch.float64; allowed: float64 for all"
        ):
            grouped_matmul(*operands)
