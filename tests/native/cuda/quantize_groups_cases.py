"""quantize over groups of rows and over stacks in CUDA, on the host model, against the reference bit for bit."""

import pytest
import torch

from nvfp4_kernels.formats.groups import group_starts
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops._dispatch import implementation
from nvfp4_kernels.ops.quantize import _cuda, reference
from nvfp4_kernels.ops.quantize._forms import Groups
from tests import machine
from tests.ops.quantize_checks import NOISE, far_apart, same_bytes

PLAIN, SR, TILES = QuantSpec(), QuantSpec(rounding="stochastic"), QuantSpec("16x16")
TURNED, TURNED_SR = QuantSpec(hadamard=DEFAULT_SIGNS), QuantSpec(rounding="stochastic", hadamard=DEFAULT_SIGNS)
CHOOSING, MXFP8 = QuantSpec(four_over_six="mse"), QuantSpec("1x32")
LOADS = ([5, 0, 33, 16, 1, 0, 17], [0, 0, 70, 0], [200], [0, 1, 0], [0, 0, 0], [64, 128, 65], [])
run = implementation("quantize", "native").run


def drawn(*shape, dtype=torch.bfloat16):
    x = torch.randn(shape) * torch.exp(torch.randn(shape))
    return (x * torch.linspace(0.1, 30, shape[-2])[:, None]).to(dtype)  # groups differ in size


def places(sizes, run=16):
    offsets = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
    return Groups(offsets, group_starts(offsets, run))


def assert_same(x, row, col, groups=None, amax=None):
    wanted, found = reference.run(x, row, col, NOISE, groups, amax), run(x, row, col, NOISE, groups, amax)
    for part, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert same_bytes(a, b), f"part {part} of {row} / {col}, x {list(x.shape)} {x.dtype} {groups}"


@pytest.mark.parametrize("sizes", LOADS, ids=str)
def test_groups(model, sizes):
    """The recipe's activation and gradient, one form alone, and a choice of scales; 100 columns: no multiple of a tile."""
    groups = places(sizes)
    x = drawn(sum(sizes), 100)
    for row, col in ((PLAIN, TURNED), (SR, TURNED_SR), (None, PLAIN), (TURNED, CHOOSING)):
        assert_same(x, row, col, groups)
    for row, col in ((MXFP8, MXFP8), (None, MXFP8)):
        assert_same(x, row, col, places(sizes, 32))
    assert [kernel for kernel in model.kernels if "values" in kernel] == []
    assert_same(x[:, :40].float(), PLAIN, TURNED, groups)
    assert_same(x.t().contiguous().t(), PLAIN, TURNED, groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gathered_rows(dtype):
    """Each token at several places or at none, in rows that begin anywhere; beyond the tokens lie zeros."""
    sizes, rows = [5, 0, 130, 16, 1], torch.randint(0, 40, (152,))
    odd = drawn(40, 101, dtype=dtype)[:, 1:]
    for x in (odd, odd.contiguous(), odd[:, ::2]):
        for col in (TURNED, SR, MXFP8):
            assert_same(x, None, col, places(sizes, col.run)._replace(rows=rows))
    rows[[3, 70, 151]] = torch.tensor([-1, 40, 1 << 40])
    inside = rows.clone()
    inside[[3, 70, 151]] = 40
    gathered = torch.cat([odd, torch.zeros_like(odd[:1])])[inside]
    found, wanted = (
        run(odd, None, TURNED, NOISE, places(sizes)._replace(rows=rows)),
        reference.run(gathered, None, TURNED, NOISE, places(sizes)),
    )
    assert all(same_bytes(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_far_apart():
    x, groups = drawn(40, 40), places([2, 0, 38])
    with far_apart(x) as far:
        for given in (groups, groups._replace(rows=torch.arange(39, -1, -1))):
            row = PLAIN if given is groups else None
            found, wanted = run(far, row, TURNED_SR, NOISE, given), reference.run(x, row, TURNED_SR, NOISE, given)
            assert all(same_bytes(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("down", [1, 3])
def test_blocks_of_several_tiles(monkeypatch, down):
    monkeypatch.setattr(_cuda, "tiles_down", lambda *_: down)
    for sizes in ([63, 64, 65, 0, 191, 192, 193, 1], [400, 7]):
        assert_same(drawn(sum(sizes), 40), PLAIN, TURNED_SR, places(sizes))


def test_given_amaxes(model):
    x, groups = drawn(70, 40), places([5, 0, 33, 32])
    for amax in ([0.5, 0.0, 70.0, 3.0], [1.0, 2.0, float("nan"), 1.0]):
        amax = torch.tensor([amax, [1.0, 0.0, 32.0, 64.0], [3.0, 0.25, 40.0, -1.0]])
        for row, col in ((PLAIN, TURNED), (SR, PLAIN), (None, CHOOSING), (TURNED, TURNED_SR)):
            assert_same(x, row, col, groups, amax[:1])
            assert_same(x, row, col, groups, amax)
        assert_same(x, None, MXFP8, places([5, 0, 33, 32], 32), amax)
    assert sum(kernel.startswith("amax") for kernel in model.kernels) == 4


def test_more_groups_than_threads():
    sizes = [(7 * e) % 5 for e in range(150)]
    assert_same(drawn(sum(sizes), 20), SR, TURNED_SR, places(sizes))


def test_a_bad_value_stays_in_its_group():
    for bad in ("nan", "inf"):
        x = drawn(48, 32)
        x[20, 3] = float(bad)
        for col in (TURNED, PLAIN):
            assert_same(x, PLAIN, col, places([16, 16, 16]))
        global_scales = run(x, None, TURNED, None, places([16, 16, 16]))[5]
        assert global_scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "wrong", [[0, 90, 10, 96], [-5, 40, 200], [96, 0, 96], [1 << 40, (1 << 40) + 96, 96], [5, 5, 5]]
)
def test_wrong_offsets_reach_nothing_outside(wrong):
    """The sanitizer looks on; what is written is anybody's guess."""
    if machine.ON and wrong in ([0, 90, 10, 96], [-5, 40, 200]):
        pytest.skip("groups that overlap write different columns to the same places, at which the machine stops")
    offsets = torch.tensor(wrong)
    for starts in (group_starts(offsets, 16), torch.tensor([-(1 << 40), 1 << 40, 16, 7][: len(wrong)])):
        for row, col in ((SR, TURNED_SR), (MXFP8, MXFP8)):
            run(drawn(96, 24), row, col, NOISE, Groups(offsets, starts))


@pytest.mark.parametrize("shape", [(3, 96, 80), (2, 17, 40), (1, 1, 1), (0, 8, 8), (2, 0, 16)])
def test_stacks(shape):
    for row, col in ((TILES, TILES), (SR, TURNED_SR), (PLAIN, None), (None, CHOOSING), (MXFP8, MXFP8)):
        for dtype in (torch.bfloat16, torch.float32):
            assert_same(drawn(*shape, dtype=dtype), row, col)


def test_views_of_stacks():
    w = drawn(4, 48, 64)
    for x in (w.mT, w[1:, 3:20, 8:50], w[::2], w.transpose(0, 1), w[:, :, ::3], w[:1].expand(3, 48, 64)):
        for row, col in ((TILES, TILES), (PLAIN, TURNED_SR)):
            assert_same(x, row, col)


def test_a_bad_value_stays_in_its_matrix():
    w = drawn(3, 32, 32)
    w[1, 4, 5] = float("nan")
    assert_same(w, TILES, TILES)
    assert_same(w, PLAIN, TURNED)
