"""The native gated_rms_norm on every instruction set against the formula in float64, and what its bits may not depend on."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops._dispatch import Refused
from nvfp4_kernels.ops.gated_rms_norm import native
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from tests.ops.test_gated_rms_norm import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 240
GROUPS = (1, 16, 80, CHANNELS)
FORMS = ("before", "after", "none")  # where the gate comes


def inputs(shape=(3, 11, CHANNELS), dtype=torch.float32, form="before"):
    x, z = torch.randn(shape).to(dtype), torch.randn(shape).mul(2).to(dtype)
    weight = torch.rand(shape[-1]) + 0.5
    return dict(x=x, weight=weight) if form == "none" else dict(x=x, z=z, weight=weight)


def results(function, given, dy, group_size, form):
    """y and the gradients by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    y = function(leaves["x"], leaves.get("z"), leaves["weight"], 1e-5, group_size, form == "after")
    y.backward(dy)
    return dict(y=y.detach()) | {name: t.grad for name, t in leaves.items()}


def in_torch(x, z, weight, eps, group_size, norm_before_gate):
    """The formula in operations of x's dtype, each rounded."""
    gate = None if z is None else torch.nn.functional.silu(z)
    u = x if norm_before_gate or gate is None else x * gate
    parts = u.unflatten(-1, (-1, group_size))
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(x.dtype)
    return y * gate if norm_before_gate and gate is not None else y


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def native_norm(*arguments):
    with nk.backend("native"):
        return gated_rms_norm(*arguments)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_error_is_at_most_twice_that_of_torch(isa, dtype, form, group_size):
    given = inputs(dtype=dtype, form=form)
    dy = torch.randn_like(given["x"])
    exact = results(oracle, {name: t.double() for name, t in given.items()}, dy.double(), group_size, form)
    got, plain = (results(f, given, dy, group_size, form) for f in (native_norm, in_torch))
    for name, value in got.items():
        assert value.dtype == (dy if name == "y" else given[name]).dtype
        assert value.isfinite().all(), name
        known = ~plain[name].isnan()  # torch 2.10, not 2.13, divides some fp16 infinities by each other
        assert known.all() or TORCH < (2, 13), name

        def error(made, name=name, known=known):
            return (made[name].double() - exact[name])[known].norm() / exact[name][known].norm()

        # groups of one are signs times gates: there all but cancels in the gradient of x, and both only round what is left
        assert error(got) <= 2 * error(plain) + torch.finfo(torch.float32).eps, (name, error(got), error(plain))


@pytest.mark.parametrize("channels", [1, 2, 15, 17, 33, 80, 129])
def test_odd_sizes(isa, channels):
    for form in FORMS:
        given = inputs((5, channels), form=form)
        dy = torch.randn(5, channels)
        exact = results(oracle, {name: t.double() for name, t in given.items()}, dy.double(), channels, form)
        for name, value in results(native_norm, given, dy, channels, form).items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_give_the_same_bits(isa, dtype, form):
    wide = torch.randn(3, 11, 2 * CHANNELS + 20).to(dtype)
    given = inputs(dtype=dtype, form=form)
    views = given | {"x": wide[..., 3 : CHANNELS + 3]}
    if form != "none":
        views["z"] = wide[..., CHANNELS + 7 : 2 * CHANNELS + 7]
    turned = {name: t if name == "weight" else t.mT.contiguous().mT for name, t in views.items()}
    copies = {name: t.contiguous() for name, t in views.items()}
    dy = torch.randn(11, 3, CHANNELS).to(dtype).transpose(0, 1)
    expected = results(native_norm, copies, dy.contiguous(), 80, form)
    for arguments in (views, turned):
        leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
        y = native_norm(leaves["x"], leaves.get("z"), leaves["weight"], 1e-5, 80, form == "after")
        y.backward(dy)
        equal(expected, dict(y=y.detach()) | {name: t.grad for name, t in leaves.items()})


@pytest.mark.parametrize("rows", [40, 2500])  # blocks of 16 rows in the sums of weight's gradient, and larger ones
def test_threads_change_no_bit(isa, rows):
    given = inputs((rows, CHANNELS), torch.bfloat16)
    dy = torch.randn(rows, CHANNELS).bfloat16()
    expected = results(native_norm, given, dy, 80, "before")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            equal(expected, results(native_norm, given, dy, 80, "before"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,)])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows_and_one(shape, form):
    given = inputs(shape, form=form)
    got = results(native_norm, given, torch.ones(shape), 4, form)
    assert got["y"].shape == got["x"].shape == shape and got["y"].isfinite().all()
    assert shape == (12,) or not got["weight"].any()


def test_zeros_and_nan_keep_to_their_group(isa):
    given = inputs((2, 32))
    given["x"][0], given["x"][1, 16] = 0, float("nan")
    got = results(native_norm, given, torch.ones(2, 32), 16, "before")
    assert not got["y"][0].any() and got["x"][0].isfinite().all() and got["z"][0].isfinite().all()
    for name in ("y", "x", "z"):
        assert got[name][1, :16].isfinite().all() and got[name][1, 16:].isnan().all(), name


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(weight):
    given = inputs(dtype=torch.bfloat16)
    given["weight"] = given["weight"].to(weight)
    dy = torch.randn_like(given["x"])
    got = results(native_norm, given, dy, 16, "before")
    expected = results(native_norm, given | {"weight": given["weight"].float()}, dy, 16, "before")
    assert got["weight"].dtype == weight
    expected["weight"] = expected["weight"].to(weight)
    equal(got, expected)


def test_refuses_fp64():
    x = torch.randn(2, 4).double()
    assert native.refuses(x, None, x[0]) is not None
    with pytest.raises(Refused, match="not torch.float64"):
        native_norm(x, None, x[0])


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(backend, form):
    given = {name: t.requires_grad_() for name, t in inputs((3, 24), form=form).items()}
    arguments = (given["x"], given.get("z"), given["weight"], 1e-5, 8, form == "after")
    torch.library.opcheck(torch.ops.nvfp4.gated_rms_norm, arguments)
