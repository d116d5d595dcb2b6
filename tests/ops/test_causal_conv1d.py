"""causal_conv1d against sums written out in float64."""

import pytest
import torch

from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d


def oracle(x, weight, bias, activation, initial_state=None):
    """Token by token, tap by tap, for [batch, length, channels]."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    rows = []
    for b in range(batch):
        for t in range(length):
            total = x.new_zeros(channels) if bias is None else bias
            for k in range(width):
                source = t - width + 1 + k
                if source >= 0:
                    total = total + weight[:, k] * x[b, source]
                elif initial_state is not None:
                    total = total + weight[:, k] * initial_state[b, :, source + width - 1]
            rows.append(total * torch.sigmoid(total) if activation else total)
    return torch.stack(rows).view(x.shape)


def inputs(batch=2, length=9, channels=5, width=4, dtype=torch.float64):
    x = torch.randn(batch, length, channels, dtype=dtype)
    return x, torch.randn(channels, width, dtype=dtype), torch.randn(channels, dtype=dtype)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [True, False])
def test_values(width, length, activation, biased):
    x, weight, bias = inputs(length=length, width=width)
    state = torch.randn(2, 5, width - 1, dtype=torch.float64)
    bias = bias if biased else None
    torch.testing.assert_close(causal_conv1d(x, weight, bias, activation), oracle(x, weight, bias, activation))
    y, last = causal_conv1d(x, weight, bias, activation, initial_state=state, return_state=True)
    torch.testing.assert_close(y, oracle(x, weight, bias, activation, state))
    history = torch.cat([state, x.transpose(1, 2)], 2)
    torch.testing.assert_close(last, history[:, :, -(width - 1) :])


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("packed", [True, False])
def test_gradcheck(activation, packed):
    x, weight, bias = inputs(length=6, channels=3)
    cu_seqlens = torch.tensor([0, 2, 3, 12]) if packed else None
    state = torch.randn(3 if packed else 2, 3, 3, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias, state)]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: causal_conv1d(x, w, b, activation, s, return_state=True, cu_seqlens=cu_seqlens), tensors
    )


def test_strided_input_and_gradient():
    wide = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    x = wide[..., 4:9]
    _, weight, bias = inputs()
    dy = torch.randn(9, 2, 5, dtype=torch.float64).transpose(0, 1)
    got = torch.autograd.grad(causal_conv1d(x, weight, bias), wide, dy)[0]
    expected = torch.autograd.grad(oracle(x, weight, bias, "silu"), wide, dy)[0]
    torch.testing.assert_close(got, expected)


def test_packed_sequences_are_separate_sequences():
    x, weight, bias = inputs(batch=2, length=10)
    bounds = [0, 1, 4, 10, 16, 18, 20]
    state = torch.randn(len(bounds) - 1, 5, 3, dtype=torch.float64)
    y, last = causal_conv1d(x, weight, bias, "silu", state, True, torch.tensor(bounds, dtype=torch.int32))
    flat = x.flatten(0, 1)
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        expected = oracle(flat[None, start:end], weight, bias, "silu", state[i : i + 1])
        torch.testing.assert_close(y.flatten(0, 1)[start:end], expected[0])
        history = torch.cat([state[i], flat[start:end].t()], 1)
        torch.testing.assert_close(last[i], history[:, -3:])


def test_neighbours_cannot_leak():
    x, weight, bias = inputs(batch=1, length=12)
    cu_seqlens = torch.tensor([0, 5, 9, 12])
    before = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)[:, 5:9]
    x[:, :5], x[:, 9:] = float("nan"), float("nan")
    assert torch.equal(before, causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)[:, 5:9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_at_most_twice_that_of_the_dtype(dtype):
    x, weight, bias = (t.to(dtype) for t in inputs(length=33, channels=16))
    y = causal_conv1d(x, weight.float(), bias.float())
    assert y.dtype == dtype
    exact = oracle(x.double(), weight.double(), bias.double(), "silu")
    unit = torch.finfo(dtype).eps
    magnitude = oracle(x.double().abs(), weight.double().abs(), bias.double().abs(), None)
    assert ((y.double() - exact).abs() <= 2 * unit * magnitude).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 4)), "x: got shape"),
        (dict(weight=torch.zeros(4, 4)), "weight: got shape"),
        (dict(weight=torch.zeros(5, 5)), "weight: got width 5; allowed: 2, 3, 4"),
        (dict(bias=torch.zeros(4)), "bias: got shape"),
        (dict(activation="gelu"), "activation: got 'gelu'; allowed: 'silu', None"),
        (dict(initial_state=torch.zeros(2, 5, 4)), "initial_state: got shape"),
        (dict(cu_seqlens=torch.zeros(1, dtype=torch.int32)), "cu_seqlens: got shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(dict(x=x, weight=weight, bias=bias) | change))
