"""grouped_matmul of quantized operands against loops in fp64 over the very values that they decode to, for every load."""

import dataclasses

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Columns, Stack, group_starts, most_runs
from nvfp4_kernels.formats.signs import sign_mask
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from tests import machine
from tests.ops.test_grouped_matmul import LOADS, drawn, error, offsets
from tests.oracles.experts_brute import E2M1, E4M3, grouped, groups_of

SPECS = {"nvfp4": nk.QuantSpec("1x16"), "mxfp8": nk.QuantSpec("1x32"), "rotated": nk.QuantSpec("1x16", hadamard=0xD7E8)}
SPECS |= {"tiles": nk.QuantSpec("16x16")}
RUNS = {"nvfp4": 16, "mxfp8": 32, "rotated": 16, "plain": 1}
LIMIT = 1e-6


@pytest.fixture(params=["reference", "native", "triton"])
def serving(request):
    runs = _triton.triton and (_triton.INTERPRETED or machine.ON or torch.cuda.is_available())
    if request.param == "triton" and not runs:
        pytest.skip("Triton neither interpreted nor on a device")

    def product(*operands):
        with nk.backend(request.param):
            return grouped_matmul(*operands)

    return product


def values_of(form):
    """fp64 values [rows, K padded] of a quantized matrix, by tables."""
    codes, scales = form.codes.view(torch.uint8), form.scales.view(torch.uint8)
    if isinstance(form, nk.MXFP8Tensor):
        return E4M3[codes.long()] * torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    values = E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    return values * E4M3[scales.long()].repeat_interleave(16, -1) * form.global_scale.double()


def stack_of(kind, groups, n, k, dtype=torch.float32):
    """(operand, its values [groups, n, K padded]), each matrix of another size."""
    matrices = [(drawn(n, k) * 2.0**g).to(dtype) for g in range(groups)]
    if kind == "plain":
        plain = torch.stack(matrices)
        return plain, plain.double()
    if kind == "fp8":
        codes = torch.stack(matrices).div(4).to(torch.float8_e4m3fn)
        scales = torch.randn(groups)
        return Stack(codes, None, scales), E4M3[codes.view(torch.uint8).long()] * scales.double()[:, None, None]
    forms = [nk.quantize(m, SPECS[kind]) for m in matrices]
    names = ("codes", "scales") if kind == "mxfp8" else ("codes", "scales", "global_scale")
    parts = [
        torch.stack([getattr(f, name).view(torch.uint8) if name != "global_scale" else f.global_scale for f in forms])
        for name in names
    ]
    parts = [parts[0].view(forms[0].codes.dtype), parts[1].view(forms[0].scales.dtype), *parts[2:]]
    return Stack(*parts, *[None] * (3 - len(parts)), SPECS[kind].hadamard), torch.stack([values_of(f) for f in forms])


def rows_of(kind, rows, k, dtype):
    x = drawn(rows, k, dtype=dtype)
    if kind == "plain":
        return x, x.double()
    form = nk.quantize(x, SPECS[kind])
    return form, values_of(form)


def columns_of(kind, x, sizes):
    """(x.T of x [rows, cols] by groups, the values [cols, K padded] of each group)."""
    if kind == "plain":
        return x.t(), [x[span].double().t() for _, span in groups_of(sizes)]
    spec, run = SPECS[kind], RUNS[kind]
    forms = [nk.quantize(x[span], spec, transpose=True) for _, span in groups_of(sizes)]
    runs = most_runs(len(x), len(sizes), run)

    def joined(name, width):
        lines = torch.cat([getattr(f, name).view(torch.uint8) for f in forms], 1)
        rest = torch.zeros(lines.shape[0], runs * width - lines.shape[1], dtype=torch.uint8)
        return torch.cat([lines, rest], 1).view(getattr(forms[0], name).dtype)

    codes = joined("codes", 8 if run == 16 else 32)
    scales = None if run == 32 else torch.stack([f.global_scale for f in forms])
    starts = group_starts(offsets(sizes), run)
    return Columns(codes, joined("scales", 1), scales, starts, spec.hadamard), [values_of(f) for f in forms]


def common(a, b):
    k = min(a.shape[-1], b.shape[-1])
    return a[..., :k], b[..., :k]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "kinds", ["nvfp4 nvfp4", "mxfp8 mxfp8", "rotated rotated", "nvfp4 mxfp8", "nvfp4 plain", "plain mxfp8", "plain fp8"]
)
def test_rows(serving, load, kinds):
    sizes, (left, right) = LOADS[load], kinds.split()
    for n, k in ((33, 80), (16, 17)):
        a, a_values = rows_of(left, sum(sizes), k, torch.bfloat16)
        b, b_values = stack_of(right, len(sizes), n, k, torch.bfloat16)
        truth = grouped(*common(a_values, b_values), sizes)
        y = serving(a, b, offsets(sizes), torch.float32)
        assert y.shape == (sum(sizes), n) and error(y, truth) < LIMIT
        assert torch.equal(serving(a, b, offsets(sizes), torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("load", ["mixed", "all to one", "one row", "no rows"])
@pytest.mark.parametrize("kinds", ["plain nvfp4", "nvfp4 tiles", "plain mxfp8", "plain fp8"])
def test_transposes(serving, load, kinds):
    """Of matrices [k, n] as stored, their rows padded: what passes gradients through weights that have no other form."""
    sizes, (left, right) = LOADS[load], kinds.split()
    for n, k in ((33, 80), (16, 17)):
        a, a_values = rows_of(left, sum(sizes), k, torch.bfloat16)
        b, b_values = stack_of(right, len(sizes), k, n, torch.bfloat16)
        truth = grouped(a_values[:, :k], b_values.mT, sizes)
        y = serving(a, b.mT, offsets(sizes), torch.float32)
        assert y.shape == truth.shape and error(y, truth) < LIMIT and not y[:, n:].any()
        assert torch.equal(serving(a, b.mT, offsets(sizes), torch.bfloat16), y.bfloat16())
        assert all(x is y for x, y in zip(b.mT.mT, b, strict=True)) or right == "fp8"


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "kinds", ["nvfp4 nvfp4", "mxfp8 mxfp8", "rotated rotated", "nvfp4 mxfp8", "nvfp4 plain", "plain mxfp8"]
)
def test_divided_sums(serving, load, kinds):
    sizes, (left, right) = LOADS[load], kinds.split()
    for m, n in ((33, 80), (16, 5)):
        a, a_values = columns_of(left, drawn(sum(sizes), m).bfloat16(), sizes)
        b, b_values = columns_of(right, drawn(sum(sizes), n).bfloat16(), sizes)
        truth = torch.stack([x @ y.t() for x, y in map(common, a_values, b_values)])
        y = serving(a, b, offsets(sizes), torch.float32)
        assert y.shape == (len(sizes), m, n) and error(y, truth) < LIMIT
        assert not any(y[e].any() for e, size in enumerate(sizes) if size == 0)


def picked(form, rows):
    """The rows of a quantized matrix, or of a plain one."""
    if isinstance(form, torch.Tensor):
        return form[rows]
    parts = (part.view(torch.uint8)[rows].view(part.dtype) for part in (form.codes, form.scales))
    codes, scales = parts
    return dataclasses.replace(form, codes=codes, scales=scales, shape=(len(rows), form.shape[1]))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", ["plain", "nvfp4", "mxfp8"])
def test_gathered_rows(serving, load, kind):
    """Of a in each format, and of the plain b of divided sums beside it: the bits of a product after a gather."""
    sizes, (n, k) = LOADS[load], (33, 80)
    rows = torch.randint(0, 7, (sum(sizes),))
    (a, a_values), (b, b_values) = rows_of(kind, 7, k, torch.bfloat16), stack_of(kind, len(sizes), n, k, torch.bfloat16)
    y = serving(a, b, offsets(sizes), torch.float32, rows)
    assert error(y, grouped(a_values[rows], b_values, sizes)) < LIMIT
    assert torch.equal(y, serving(picked(a, rows), b, offsets(sizes), torch.float32))
    (dy, dy_values), x = columns_of(kind, drawn(sum(sizes), n).bfloat16(), sizes), drawn(7, 40).bfloat16()
    y = serving(dy, x.t(), offsets(sizes), torch.float32, rows)
    parts = [x[rows[span]].double().t() for _, span in groups_of(sizes)]
    assert error(y, torch.stack([v[:, : p.shape[1]] @ p.t() for v, p in zip(dy_values, parts, strict=True)])) < LIMIT
    assert torch.equal(y, serving(dy, x[rows].t(), offsets(sizes), torch.float32))


@pytest.mark.skipif(
    _triton.triton is None or not (_triton.INTERPRETED or machine.ON), reason="Triton is not interpreted"
)
@pytest.mark.parametrize("kind", ["plain", "nvfp4"])
def test_rows_out_of_range_read_zeros_where_nobody_can_say_so(kind):
    """Called beneath the check on the CPU."""
    from nvfp4_kernels.ops.grouped_matmul import triton

    rows, inside = torch.tensor([2, -1, 0, 3, 1 << 40, 1]), torch.tensor([[True, False, True, False, False, True]]).t()
    a, a_values = rows_of(kind, 3, 32, torch.bfloat16)
    stack = Stack(a, None) if kind == "plain" else Stack(a.codes, a.scales, a.global_scale)
    w, o = drawn(1, 5, 32).bfloat16(), offsets([6])
    expected = torch.where(inside, a_values[rows.clamp(0, 2)], 0)
    assert error(triton.run(stack, Stack(w), o, torch.float32, rows), expected @ w[0].double().t()) < LIMIT
    x, dy = drawn(3, 8), drawn(6, 5)
    expected = dy.double().t() @ torch.where(inside, x[rows.clamp(0, 2)], 0).double()
    assert error(triton.run(Stack(dy.t()), Stack(x.t()), o, torch.float32, rows)[0], expected) < LIMIT


@pytest.mark.parametrize("n, k", [(1856, 48), (48, 1856), (17, 16)])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_shapes_on_each_instruction_set(isa, kind, n, k):
    sizes = [13, 0, 1, 6, 90]
    with nk.backend("native"):
        (a, a_values), (b, b_values) = rows_of(kind, 110, k, torch.float32), stack_of(kind, 5, n, k)
        assert error(grouped_matmul(a, b, offsets(sizes), torch.float32), grouped(a_values, b_values, sizes)) < LIMIT
        for dtype in (torch.bfloat16, torch.float32):
            for stored in (kind, "fp8"):
                (b, b_values), (dy, dy_values) = stack_of(stored, 5, n, k), rows_of("plain", 110, n, dtype)
                dx = grouped_matmul(dy, b.mT, offsets(sizes), torch.float32)
                assert error(dx, grouped(dy_values, b_values.mT, sizes)) < LIMIT
            x, x_values = rows_of("plain", 110, k, dtype)
            y = grouped_matmul(x, b, offsets(sizes), torch.float32)
            assert error(y, grouped(x_values, b_values, sizes)) < LIMIT
        (a, a_values), (b, b_values) = (columns_of(kind, drawn(110, width), sizes) for width in (n, k))
        truth = torch.stack([x @ y.t() for x, y in zip(a_values, b_values, strict=True)])
        assert error(grouped_matmul(a, b, offsets(sizes), torch.float32), truth) < LIMIT


def test_threads_change_nothing():
    sizes, before = [70, 0, 3, 200, 12, 15], torch.get_num_threads()
    calls = [(rows_of("nvfp4", 300, 512, torch.float32)[0], stack_of("nvfp4", 6, 170, 512)[0])]
    calls += [(drawn(300, 170), stack_of(kind, 6, 170, 512)[0].mT) for kind in ("nvfp4", "fp8")]
    calls += [tuple(columns_of("rotated", drawn(300, width), sizes)[0] for width in (64, 200))]
    results = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            with nk.backend("native"):
                results.append([grouped_matmul(*operands, offsets(sizes)) for operands in calls])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_group_is_the_product_of_its_own_operands_bit_for_bit():
    """As nk.matmul gives it, whose operands are quantized alike."""
    sizes = [70, 3, 0, 40]
    with nk.backend("native"):
        x, w = drawn(113, 96), drawn(4, 48, 96)
        row, forms = nk.quantize(x), [nk.quantize(m) for m in w]
        stack = Stack(*(torch.stack([getattr(f, part) for f in forms]) for part in ("codes", "scales", "global_scale")))
        y = grouped_matmul(row, stack, offsets(sizes))
        for e, span in groups_of(sizes):
            one = nk.NVFP4Tensor(row.codes[span], row.scales[span], row.global_scale, (span.stop - span.start, 96))
            assert torch.equal(y[span], nk.matmul(one, forms[e]))
        (a, _), (b, _) = (columns_of("rotated", part, sizes) for part in (x, drawn(113, 48)))
        assert a.hadamard == b.hadamard == SPECS["rotated"].hadamard


@pytest.mark.parametrize("part", ["a", "b"])
def test_a_bad_group_leaves_the_others_alone(serving, part):
    """NaN global scales of NVFP4, and NaN block scales of MXFP8, whose neighbour in memory is another group's."""
    sizes = [20, 0, 33, 17]
    for kind in ("nvfp4", "mxfp8"):
        x, dy = drawn(70, 40), drawn(70, 24)
        (x if part == "a" else dy)[25, 3] = float("nan")
        (a, _), (b, _) = columns_of(kind, x, sizes), columns_of(kind, dy, sizes)
        y = serving(a, b, offsets(sizes), torch.float32)
        line = y[2, 3] if part == "a" else y[2, :, 3]
        assert line.isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_registered_op_is_sound():
    sizes = [4, 0, 5]
    (a, _), (b, _) = (columns_of("nvfp4", drawn(9, n), sizes) for n in (5, 32))
    parts = [[x.values, x.scales.view(torch.uint8), x.global_scales, x.starts] for x in (a, b)]
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.nvfp4.grouped_matmul
    torch.library.opcheck(op, (*parts[0], *parts[1], offsets(sizes), None, "float32"), test_utils=checks)
    rows, stack = rows_of("nvfp4", 9, 32, torch.float32)[0], stack_of("nvfp4", 3, 5, 32)[0]
    parts = [[rows.codes, rows.scales.view(torch.uint8), rows.global_scale, None]]
    parts += [[stack.values, stack.scales.view(torch.uint8), stack.global_scales, None]]
    torch.library.opcheck(op, (*parts[0], *parts[1], offsets(sizes), None, "bfloat16"), test_utils=checks)
    plain = [drawn(9, 5), None, None, None]
    torch.library.opcheck(op, (*plain, *parts[1], offsets(sizes), None, "float32", True), test_utils=checks)
    fp8 = [torch.zeros(3, 8, 5, dtype=torch.uint8), None, torch.ones(3), None]
    torch.library.opcheck(op, (*plain, *fp8, offsets(sizes), None, "float32"), test_utils=checks)


def good():
    return dict(a=columns_of("nvfp4", torch.ones(5, 16), [2, 3])[0], b=torch.zeros(8, 5), offsets=offsets([2, 3]))


@pytest.mark.parametrize(
    "change, error_type, message",
    [
        (lambda g: dict(a=g["a"]._replace(hadamard=sign_mask([1] * 16))), ValueError, "a and b: got Hadamard signs 0 and None"),
        (lambda g: dict(a=g["a"]._replace(starts=torch.tensor([0, 16]))), ValueError, r"a: got starts torch.int64 \[2\]"),
        (lambda g: dict(a=g["a"]._replace(starts=torch.tensor([0, 16, 16]))), ValueError, "a and b: got starts without room"),
        (lambda g: dict(a=g["a"]._replace(starts=torch.tensor([0, 8, 32]))), ValueError, "a and b: got starts without room"),
        (lambda g: dict(a=g["a"]._replace(starts=torch.tensor([0, 16, 48]))), ValueError, "a and b: got starts without room"),
        (lambda g: dict(a=g["a"]._replace(scales=g["a"].scales[:, :1])), ValueError, "a: got scales"),
        (lambda g: dict(b=torch.zeros(2, 8, 5)), ValueError, "a: got Columns with a stack"),
        (lambda g: dict(b=g["a"], rows=torch.zeros(5, dtype=torch.int64)), ValueError, "b: got a quantized matrix with rows"),
        (lambda g: dict(a=nk.quantize(torch.ones(8, 5))), TypeError, "a: got NVFP4Tensor"),
        (
            lambda g: dict(a=rows_of("rotated", 5, 16, torch.float32)[0], b=stack_of("rotated", 2, 16, 16)[0].mT),
            ValueError, "b: got transposes of a rotated or packed form",
        ),
        (
            lambda g: dict(a=torch.zeros(5, 7), b=stack_of("fp8", 2, 3, 7)[0]._replace(global_scales=torch.ones(3))),
            ValueError, r"b: got FP8 \(torch.float8_e4m3fn, torch.float32, \(3,\)\)",
        ),
        (lambda g: dict(a=nk.quantize(torch.ones(5, 40)), b=torch.zeros(2, 8, 39)), ValueError, "a and b: got K = 40"),
        (lambda g: dict(b=torch.zeros(8, 5, dtype=torch.float64)), TypeError, "a, b and out_dtype"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error_type, message):
    given = good()
    given |= change(given)
    if error_type is TypeError and "out_dtype" in message:
        given["out_dtype"] = torch.float32
    with pytest.raises(error_type, match=message), nk.backend("native"):
        grouped_matmul(**given)
