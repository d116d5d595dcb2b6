"""quantize over groups of rows and over stacks, against quantize_pair of each by itself: bit for bit, in every backend."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import group_starts
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops._dispatch import implementation
from nvfp4_kernels.ops.quantize._forms import Groups
from tests import machine
from tests.drawing import given, settings, st

LOADS = {
    "mixed": [5, 0, 33, 16, 1, 0, 17],
    "one takes all": [0, 0, 70, 0],
    "one group": [40],
    "one token": [0, 1, 0],
    "no tokens": [0, 0, 0],
    "full runs": [32, 64],
}
ROW = QuantSpec("1x16")
COLS = {
    "nearest": QuantSpec("1x16"),
    "transform": QuantSpec("1x16", "nearest", DEFAULT_SIGNS),
    "four over six": QuantSpec("1x16", four_over_six="mse"),
    "mxfp8": QuantSpec("1x32"),
}
NOISE = torch.tensor([1234567, 89])
RUNS = _triton.triton is not None and (_triton.INTERPRETED or machine.ON)
BACKENDS = [
    "reference",
    "native",
    pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="Triton is not interpreted")),
]


@pytest.fixture(params=BACKENDS)
def on(request):
    with nk.backend(request.param):
        yield request.param


def offsets(sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])


def drawn(*shape, dtype=torch.bfloat16):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 4
    return (x * torch.linspace(0.1, 30, shape[-2]).view(-1, 1)).to(dtype)  # groups differ in size


def same(a, b):
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parts(form):
    return form.codes, form.scales, getattr(form, "global_scale", None)


def check_group(columns, e, wanted, run):
    """Group e of `columns` holds the bytes of `wanted`, the form of its transpose."""
    codes, scales, global_scale = parts(wanted)
    begin, end = columns.starts[e].item() // run, columns.starts[e + 1].item() // run
    width = 8 if global_scale is not None else run
    same(columns.values[:, begin * width : end * width], codes)
    same(columns.scales[:, begin:end], scales)
    if global_scale is not None:
        same(columns.global_scales[e : e + 1], global_scale.view(1))


@pytest.mark.parametrize(
    "kind, dtype", list(zip(COLS, (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16), strict=True))
)
@pytest.mark.parametrize("load", LOADS)
def test_each_group_is_a_tensor_of_its_own(on, load, kind, dtype):
    sizes, col = LOADS[load], COLS[kind]
    x, o = drawn(sum(sizes), 40, dtype=dtype), offsets(sizes)
    row_form, columns = nk.quantize_groups(x, o, ROW, col)
    assert columns.values.shape[0] == 40 and columns.hadamard == col.hadamard
    with nk.backend("reference"):
        for part, wanted in zip(parts(row_form), parts(nk.quantize_pair(x, ROW, None)[0]), strict=True):
            same(part.flatten(), wanted.flatten())
        for e, size in enumerate(sizes):
            check_group(columns, e, nk.quantize(x[o[e] : o[e] + size], col, transpose=True), col.run)
    used = columns.starts[-1].item() // col.run
    assert not columns.scales[:, used:].view(torch.uint8).any()
    assert (
        not columns.values[:, used * (columns.values.shape[1] // max(columns.scales.shape[1], 1)) :]
        .view(torch.uint8)
        .any()
    )


def test_stochastic_noise_is_that_of_the_place_in_the_form(on):
    col = QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    x = drawn(96, 24)
    _, one = nk.quantize_groups(x, offsets([96]), QuantSpec("1x16", "stochastic"), col, NOISE)
    _, plain = nk.quantize_pair(x, QuantSpec("1x16", "stochastic"), col, NOISE)
    same(one.values, plain.codes)
    same(one.scales, plain.scales)
    x = drawn(32, 24).repeat(2, 1)
    _, two = nk.quantize_groups(x, offsets([32, 32]), None, col, NOISE)
    assert not torch.equal(two.values[:, :16], two.values[:, 16:32])  # equal groups, other noise
    same(two.scales[:, :2].contiguous(), two.scales[:, 2:4].contiguous())
    with nk.backend("reference"):
        _, wanted = nk.quantize_groups(x, offsets([32, 32]), None, col, NOISE)
    same(two.values, wanted.values)


def test_nan_stays_in_its_group(on):
    x = drawn(48, 16)
    x[20, 3] = float("nan")
    _, columns = nk.quantize_groups(x, offsets([16, 16, 16]), None, COLS["transform"])
    assert columns.global_scales.isnan().tolist() == [False, True, False]
    with nk.backend("reference"):
        check_group(columns, 2, nk.quantize(x[32:], COLS["transform"], transpose=True), 16)


@pytest.mark.parametrize("kind", ["nearest", "transform"])
def test_given_amaxes(on, kind):
    x, sizes, col = drawn(70, 40), [5, 0, 33, 32], COLS[kind]
    turned = torch.tensor([[2.0, 0.5, 7.0, -8.0], [1.5, 2.0, -60.0, 0.25]])
    for values in ([0.5, 0.0, -70.0, 3.0], [1.0, 2.0, float("nan"), 1.0]):
        values, o = torch.tensor(values), offsets(sizes)
        for amax, row in ((values, ROW), (torch.stack((values, *turned)), COLS["transform"])):
            row_form, columns = nk.quantize_groups(x, o, row, col, amax=amax)
            amax = amax.view(-1, len(sizes)).abs()
            with nk.backend("reference"):
                wanted = nk.quantize(x, row, amax=amax[:2].amax(1))
                for part, other in zip(parts(row_form), parts(wanted), strict=True):
                    same(part.flatten(), other.flatten())
                for e, size in enumerate(sizes):
                    wanted = nk.quantize(x[o[e] : o[e] + size], col, transpose=True, amax=amax[::2, e])
                    check_group(columns, e, wanted, col.run)
            alone, _ = nk.quantize_groups(x, o, row, None, amax=amax)
            same(alone.codes, row_form.codes)


@pytest.mark.parametrize("kind", ["nearest", "mxfp8", "stochastic"])
@pytest.mark.parametrize("load", LOADS)
def test_rows_are_gathered_as_they_are_read(on, load, kind):
    """The form of the gathered rows, of row-major x and of another; a token that no row reads may hold anything."""
    col = COLS.get(kind, QuantSpec("1x16", "stochastic", DEFAULT_SIGNS))
    rows, o = torch.randint(0, 9, (sum(LOADS[load]),)), offsets(LOADS[load])
    x = drawn(40, 9, dtype=torch.float32).t() if kind == "nearest" else drawn(9, 40)
    x[[token for token in range(9) if token not in rows]] = float("nan")
    _, found = nk.quantize_groups(x, o, None, col, NOISE, rows=rows)
    with nk.backend("reference"):
        gathered = torch.stack([x[r] for r in rows]) if len(rows) else x[:0]
        _, wanted = nk.quantize_groups(gathered, o, None, col, NOISE)
    for a, b in zip(found[:4], wanted[:4], strict=True):
        if b is not None:
            same(a, b)


def test_views(on):
    wide = drawn(40, 64)
    o = offsets([7, 0, 33])
    for x in (wide[:, ::2], drawn(32, 40).t(), wide[:, 3:]):
        _, columns = nk.quantize_groups(x, o, ROW, COLS["transform"])
        _, wanted = nk.quantize_groups(x.contiguous(), o, ROW, COLS["transform"])
        same(columns.values, wanted.values)
        same(columns.scales, wanted.scales)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9), cols=st.integers(1, 40))
def test_any_sizes(sizes, cols):
    x, o = drawn(sum(sizes), cols), offsets(sizes)
    col = QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    with nk.backend("reference"):
        _, wanted = nk.quantize_groups(x, o, None, col, NOISE)
    with nk.backend("native"):
        _, found = nk.quantize_groups(x, o, None, col, NOISE)
    for a, b in zip(wanted[:4], found[:4], strict=True):
        same(a, b)


SPECS = {
    "weights": (QuantSpec("16x16"), QuantSpec("16x16")),
    "1x16": (ROW, QuantSpec("1x16", "nearest", DEFAULT_SIGNS)),
    "row alone": (ROW, None),
    "column alone": (None, QuantSpec("16x16", four_over_six="mae")),
    "mxfp8": (QuantSpec("1x32"), QuantSpec("1x32")),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 17, 40), (1, 1, 1), (0, 8, 8), (2, 0, 16)])
def test_each_matrix_of_a_stack_is_a_tensor_of_its_own(on, kind, shape):
    w = drawn(*shape) if 0 not in shape else torch.zeros(shape)
    row, col = SPECS[kind]
    stacks = nk.quantize_stack(w, row, col)
    for stack, spec, index in zip(stacks, (row, col), (0, 1), strict=True):
        assert stack.values.shape[0] == shape[0]
        if spec is None:
            assert torch.equal(stack.values, w.transpose(1, 2) if index else w)
            continue
        for e in range(shape[0]):
            with nk.backend("reference"):
                wanted = nk.quantize_pair(w[e], row, col)[index]
            for part, found in zip(parts(wanted), stack, strict=False):
                if part is not None:
                    same(found[e].flatten(), part.flatten())


def test_stacks_draw_by_their_place(on):
    row, col = QuantSpec("1x16", "stochastic"), QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    w = drawn(1, 32, 48).repeat(2, 1, 1)
    found = nk.quantize_stack(w, row, col, NOISE)
    with nk.backend("reference"):
        wanted = nk.quantize_stack(w, row, col, NOISE)
        plain = nk.quantize_pair(w[0], row, col, NOISE)
    for a, b, p in zip(found, wanted, plain, strict=True):
        same(a.values, b.values)
        same(a.values[0], p.codes)
        assert not torch.equal(a.values[0], a.values[1])


def test_errors():
    x, o = drawn(8, 16), offsets([3, 5])
    for wrong, error, text in (
        (dict(offsets=o.int()), TypeError, "offsets: got torch.int32"),
        (dict(offsets=o[None]), ValueError, "offsets: got shape"),
        (dict(col=QuantSpec("16x16")), ValueError, "col: got block 16x16"),
        (dict(row=QuantSpec("16x16")), ValueError, "row: got block 16x16"),
        (dict(x=x[None]), ValueError, "x: got 3 dimensions"),
        (dict(amax=torch.ones(3)), ValueError, r"amax: got shape \[3\]; allowed: 2 in all"),
        (dict(rows=torch.arange(8)), ValueError, "row: got .*; allowed: None beside rows"),
        (dict(row=None, col=None, rows=torch.arange(8)), ValueError, "col: got None; allowed: a QuantSpec beside rows"),
        (dict(row=None, rows=torch.arange(8).int()), TypeError, "rows: got torch.int32"),
        (dict(row=None, rows=torch.arange(8) + 1), ValueError, "rows: got 1 to 8; allowed: 0 to 7"),
        (dict(row=None, rows=torch.arange(7)), ValueError, "offsets: got .* ascending numbers from 0 to 7"),
    ):
        given_ = dict(x=x, offsets=o, row=ROW, col=COLS["nearest"]) | wrong
        with pytest.raises(error, match=text):
            nk.quantize_groups(**given_)
    with pytest.raises(ValueError, match="x: got 2 dimensions"):
        nk.quantize_stack(x, ROW, None)


@pytest.mark.parametrize("wrong", [[0, 5, 3, 8], [0, 3, 9], [1, 8], [0, 3, 7]])
@pytest.mark.parametrize("name", ["reference", "native"])
def test_offsets_that_do_not_fit(name, wrong):
    with nk.backend(name), pytest.raises(ValueError, match="offsets: got .*ascending numbers from 0 to 8"):
        nk.quantize_groups(drawn(8, 16), torch.tensor(wrong), ROW, COLS["nearest"])


@pytest.mark.skipif(not RUNS, reason="Triton is not interpreted")
@pytest.mark.parametrize("wrong", [[0, 90, 10, 96], [-5, 40, 200], [150, 200, 96], [1 << 40, (1 << 40) + 96, 96]])
def test_wrong_offsets_reach_nothing_outside(wrong):
    """NaN lies around x: whoever reads there says so."""
    if machine.ON and wrong == [0, 90, 10, 96]:
        pytest.skip("groups that overlap write different columns to the same places, at which the machine stops")
    offsets_, around = torch.tensor(wrong), torch.full((400, 24), float("nan")).bfloat16()
    x = around[100:196].copy_(drawn(96, 24))
    for starts in (group_starts(offsets_, 16), torch.tensor([-(1 << 40), 1 << 40, 16, 7][: len(wrong)])):
        parts_ = implementation("quantize", "triton").run(x, ROW, COLS["nearest"], None, Groups(offsets_, starts))
        assert parts_[2].isfinite() and parts_[5].isfinite().all()


@pytest.mark.skipif(not RUNS, reason="Triton is not interpreted")
def test_rows_out_of_range_are_zeros_where_nobody_can_say_so():
    rows, o, x = torch.tensor([2, -1, 0, 3, 1 << 40, 1]), offsets([4, 2]), drawn(3, 24)
    arguments, starts = (None, COLS["transform"], None), group_starts(o, 16)
    found = implementation("quantize", "triton").run(x, *arguments, Groups(o, starts, rows))
    gathered = torch.stack([x[r] if 0 <= r < 3 else torch.zeros_like(x[0]) for r in rows])
    for a, b in zip(
        found, implementation("quantize", "reference").run(gathered, *arguments, Groups(o, starts)), strict=True
    ):
        same(a, b)


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("rows", [None, 6_000_000])
def test_many_rows_fit_a_grid(rows):
    """Its second axis ends at 65,535 programs, 64 rows of each."""
    with _triton.recorded((9, 0)) as launches, torch.device("meta"):
        x, places = torch.empty(5_000_000, 64, dtype=torch.bfloat16), torch.empty(9, dtype=torch.int64)
        groups = Groups(places, places, None if rows is None else torch.empty(rows, dtype=torch.int64))
        implementation("quantize", "triton").run(x, None, COLS["transform"], None, groups)
    assert len(launches) == 2 and all(n <= 65535 for *_, grid in launches for n in grid[1:])


def test_opcheck():
    o = offsets([3, 0, 30])
    starts = torch.tensor([0, 16, 16, 48])
    for arguments in (
        (drawn(33, 20), str(ROW), str(COLS["transform"]), None, o, starts),
        (drawn(33, 20), str(ROW), str(COLS["nearest"]), None, o, starts, None, torch.ones(3)),
        (drawn(33, 20), "", str(COLS["mxfp8"]), None, o, torch.tensor([0, 32, 32, 64])),
        (drawn(4, 20), "", str(COLS["transform"]), None, o, starts, torch.arange(33) % 4),
        (drawn(2, 33, 20), str(QuantSpec("16x16")), str(QuantSpec("16x16")), None),
    ):
        torch.library.opcheck(torch.ops.nvfp4.quantize, arguments)
