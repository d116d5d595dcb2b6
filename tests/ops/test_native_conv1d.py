"""The native causal_conv1d on every instruction set against sums in float64, and what its bits may not depend on."""

import pytest
import torch
import torch.nn.functional as F

import nvfp4_kernels as nk
from nvfp4_kernels.ops._dispatch import Refused
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from tests.drawing import given, settings, st
from tests.ops.test_causal_conv1d import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITHOUT = ((), ("bias",), ("initial_state",), ("bias", "initial_state"))
ENDS = ("x", "weight", "bias", "initial_state")


def inputs(batch=2, length=41, channels=35, width=4, dtype=torch.float32, without=(), sequences=None):
    made = dict(
        x=torch.randn(batch, length, channels).to(dtype), weight=torch.randn(channels, width) / 2,
        bias=torch.randn(channels), initial_state=torch.randn(sequences or batch, channels, width - 1).to(dtype),
    )  # fmt: skip
    return {name: t for name, t in made.items() if name not in without}


def slopes(arguments, sequences=None):
    """Gradients to send into y and the states."""
    x, weight = arguments["x"], arguments["weight"]
    state = torch.randn(sequences or x.shape[0], x.shape[2], weight.shape[1] - 1)
    return torch.randn_like(x), state.to(x.dtype)


def convolution(x, weight, bias=None, initial_state=None, activation="silu", cu_seqlens=None):
    with nk.backend("native"):
        return causal_conv1d(x, weight, bias, activation, initial_state, True, cu_seqlens)


def in_float64(x, weight, bias=None, initial_state=None, activation="silu"):
    history = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1) if initial_state is None else initial_state
    state = torch.cat([history, x.transpose(1, 2)], 2)[:, :, x.shape[1] :]
    return oracle(x, weight, bias, activation, initial_state), state


def in_torch(x, weight, bias=None, initial_state=None, activation="silu"):
    """torch's grouped convolution in x's dtype."""
    width = weight.shape[1]
    history = x.new_zeros(x.shape[0], x.shape[2], width - 1) if initial_state is None else initial_state
    whole = torch.cat([history, x.transpose(1, 2)], 2)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(whole, weight.to(x.dtype)[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if activation else y), whole[:, :, x.shape[1] :]


def results(function, arguments, dy, dstate, **options):
    """y, the state and the gradients by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y, state = function(**leaves, **options)
    torch.autograd.backward((y, state), (dy, dstate))
    return dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_error_is_at_most_twice_that_of_torch(isa, dtype, width, activation):
    for without in WITHOUT:
        arguments = inputs(width=width, dtype=dtype, without=without)
        dy, dstate = slopes(arguments)
        wide = {name: t.double() for name, t in arguments.items()}
        exact = results(in_float64, wide, dy.double(), dstate.double(), activation=activation)
        got, plain = (results(f, arguments, dy, dstate, activation=activation) for f in (convolution, in_torch))
        for name, value in got.items():
            assert value.dtype == (arguments[name] if name in arguments else dy).dtype
            error, yardstick = ((made[name].double() - exact[name]).norm() for made in (got, plain))
            # fp32 sums in another order may be off by a little where torch's happen not to be
            slack = torch.finfo(torch.float32).eps * exact[name].norm()
            assert error <= 2 * yardstick + slack, (without, name, error / exact[name].norm(), yardstick)


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 80])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 33, 131])  # walks are 64 tokens long
def test_odd_sizes(isa, channels, length):
    arguments = inputs(2, length, channels)
    dy, dstate = slopes(arguments)
    exact = results(in_float64, {n: t.double() for n, t in arguments.items()}, dy.double(), dstate.double())
    for name, value in results(convolution, arguments, dy, dstate).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_wider_tensors(isa, dtype):
    """x inside a projection's output, or with its axes turned; a strided state and gradient: the bits of contiguous copies."""
    wide = torch.randn(2, 41, 60).to(dtype)
    views = inputs(dtype=dtype) | {"x": wide[..., 7:42]}
    turned = views | {name: views[name].mT.contiguous().mT for name in ("x", "weight", "initial_state")}
    copies = {name: t.contiguous() for name, t in views.items()}
    dy, dstate = torch.randn(41, 2, 35).to(dtype).transpose(0, 1), torch.randn(2, 3, 35).to(dtype).mT
    for cu_seqlens in (None, torch.tensor([0, 30, 82])):  # over the border of the rows
        expected = results(convolution, copies, dy.contiguous(), dstate.contiguous(), cu_seqlens=cu_seqlens)
        for arguments in (views, turned):
            leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
            y, state = convolution(**leaves, cu_seqlens=cu_seqlens)
            torch.autograd.backward((y, state), (dy, dstate))
            equal(expected, dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()})


@pytest.mark.parametrize("length", [41, 2100])  # blocks of 64 tokens in the sums of weight's gradient, and larger ones
def test_threads_change_no_bit(isa, length):
    arguments = inputs(2, length, dtype=torch.bfloat16)
    dy, dstate = slopes(arguments)
    expected = results(convolution, arguments, dy, dstate)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            equal(expected, results(convolution, arguments, dy, dstate))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_separate_sequences(isa, dtype):
    """A boundary at every position, empty sequences at the start, inside and at the end: the same bits as each alone."""
    for cut in range(37):
        bounds = [0, 0, cut, cut, 36, 72, 72]
        count = len(bounds) - 1
        arguments = inputs(2, 36, dtype=dtype, sequences=count, without=() if cut % 3 else ("initial_state",))
        dy, dstate = slopes(arguments, count)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32 if cut % 2 else torch.int64)
        got = results(convolution, arguments, dy, dstate, cu_seqlens=cu_seqlens)
        sums = dict(weight=0.0, bias=0.0)
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            alone = arguments | {"x": arguments["x"].flatten(0, 1)[None, start:end]}
            if "initial_state" in alone:
                alone["initial_state"] = alone["initial_state"][i : i + 1]
            expected = results(convolution, alone, dy.flatten(0, 1)[None, start:end], dstate[i : i + 1])
            for name in ("x", "y"):
                assert torch.equal(got[name].flatten(0, 1)[start:end], expected[name][0]), (cut, i, name)
            for name in {"state", "initial_state"} & expected.keys():
                assert torch.equal(got[name][i], expected[name][0]), (cut, i, name)
            sums = {name: total + expected[name].double() for name, total in sums.items()}
        for name, total in sums.items():
            torch.testing.assert_close(got[name].double(), total, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_state_carries_over_any_cut(data):
    length, width = data.draw(st.integers(1, 100), "length"), data.draw(st.integers(2, 4), "width")
    cut = data.draw(st.integers(0, length), "cut")
    dtype, silu = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from(["silu", None]), "activation")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    arguments = inputs(1, length, data.draw(st.integers(1, 40), "channels"), width, dtype)
    x = arguments.pop("x")
    y, last = convolution(x, **arguments, activation=silu)
    first, between = convolution(x[:, :cut], **arguments, activation=silu)
    second, end = convolution(x[:, cut:], **(arguments | {"initial_state": between}), activation=silu)
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(end, last)


def test_a_state_of_another_dtype(isa):
    for dtype in (torch.float32, torch.float64):  # which hold all bf16 values
        arguments = inputs(dtype=torch.bfloat16)
        dy, dstate = slopes(arguments)
        expected = results(convolution, arguments, dy, dstate)
        got = results(convolution, arguments | {"initial_state": arguments["initial_state"].to(dtype)}, dy, dstate)
        assert got["initial_state"].dtype == dtype
        got["initial_state"] = got["initial_state"].to(torch.bfloat16)
        equal(got, expected)


@pytest.mark.parametrize("bounds", [[0, 40, 30, 82], [0, 81], [1, 82], [0, -1, 82], [0, 90, 82]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # fp64: the reference
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_bounds_that_do_not_ascend(bounds, index, dtype):
    arguments = inputs(dtype=dtype, without=("initial_state",))
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        causal_conv1d(**arguments, cu_seqlens=torch.tensor(bounds, dtype=index))


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_no_tokens(batch, length):
    arguments = inputs(batch, length)
    dy, dstate = slopes(arguments)
    got = results(convolution, arguments, dy, dstate)
    assert got["y"].shape == arguments["x"].shape and torch.equal(got["state"], arguments["initial_state"])
    assert torch.equal(got["initial_state"], dstate) and not got["weight"].any() and not got["bias"].any()


def test_refuses_fp64():
    with pytest.raises(Refused, match="not torch.float64"):
        convolution(**inputs(dtype=torch.float64))


@pytest.mark.parametrize("without", WITHOUT)
def test_opcheck(backend, without):
    for cu_seqlens in (None, torch.tensor([0, 5, 18])):
        arguments = {n: t.requires_grad_() for n, t in inputs(2, 9, 5, without=without).items()}
        ends = [arguments.get(name) for name in ENDS]
        torch.library.opcheck(torch.ops.nvfp4.causal_conv1d, (*ends, cu_seqlens, True))
