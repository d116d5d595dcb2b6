"""The Triton state_update against the formula in float64, and its noise against Philox and the rule in Python's integers."""

import math
from fractions import Fraction

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.state_update import triton as implementation

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("triton"):
        yield


def inputs(batch=2, tokens=3, heads=4, head_dim=3, groups=2, size=5, slots=None, dtype=torch.float32):
    def normal(*shape):
        return torch.randn(shape, device=DEVICE)

    made = dict(
        state=normal(slots or batch, heads, head_dim, size).to(dtype), x=normal(batch, tokens, heads, head_dim),
        dt=normal(batch, tokens, heads) - 2, A=-normal(heads).abs(), B=normal(batch, tokens, groups, size),
        C=normal(batch, tokens, groups, size), D=normal(heads), z=normal(batch, tokens, heads, head_dim),
        dt_bias=normal(heads),
    )  # fmt: skip
    return made


def oracle(v, dt_softplus=True, dt_limit=(0.0, math.inf), slots=None):
    """y [batch, tokens, ...] and the states after each token, in float64."""
    v = {name: tensor.double() for name, tensor in v.items() if tensor is not None}
    batch, tokens, heads, head_dim = v["x"].shape
    slots = list(range(batch)) if slots is None else slots
    y = torch.zeros_like(v["x"])
    states = y.new_zeros(batch, tokens, heads, head_dim, v["B"].shape[-1])
    for b, slot in enumerate(slots):
        for h in range(heads):
            g = h // (heads // v["B"].shape[2])
            state = v["state"][slot, h]
            for t in range(tokens):
                step = float(v["dt"][b, t, h] + (v["dt_bias"][h] if "dt_bias" in v else 0))
                step = math.log1p(math.exp(step)) if dt_softplus else step
                step = min(max(step, dt_limit[0]), dt_limit[1])
                x = v["x"][b, t, h]
                state = math.exp(v["A"][h] * step) * state + step * torch.outer(x, v["B"][b, t, g])
                total = state @ v["C"][b, t, g] + (v["D"][h] * x if "D" in v else 0)
                z = v["z"][b, t, h] if "z" in v else None
                y[b, t, h] = total if z is None else total * z / (1 + torch.exp(-z))
                states[b, t, h] = state
    return y, states


def close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus, dt_limit", [(True, (0.0, math.inf)), (True, (0.05, 0.2)), (False, (0.0, 1.0))])
def test_against_the_formula(without, dt_softplus, dt_limit):
    values = {name: tensor for name, tensor in inputs().items() if name not in without}
    y, states = oracle(values, dt_softplus, dt_limit)
    close(nk.state_update(**values, dt_softplus=dt_softplus, dt_limit=dt_limit), y)
    close(values["state"], states[:, -1])


@pytest.mark.parametrize(
    "heads, head_dim, groups, size", [(3, 80, 1, 16), (2, 1, 2, 1), (4, 17, 4, 130), (2, 64, 1, 128)]
)
def test_shapes(heads, head_dim, groups, size):
    values = inputs(1, 2, heads, head_dim, groups, size)
    values["D"] = torch.randn(heads, head_dim, device=DEVICE)
    expected, states = oracle(values)
    close(nk.state_update(**values), expected)
    close(values["state"], states[:, -1])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_indices(index):
    values = inputs(batch=3, slots=6)
    before = values["state"].clone()
    y, states = oracle(values, slots=[4, 0, 1])
    got = nk.state_update(**values, indices=torch.tensor([4, -1, 1], dtype=index, device=DEVICE))
    close(got[[0, 2]], y[[0, 2]])
    assert (got[1] == 0).all()
    close(values["state"][[4, 1]], states[[0, 2], -1])
    untouched = [0, 2, 3, 5]
    assert torch.equal(values["state"][untouched], before[untouched])


def test_intermediate_keeps_the_state():
    values = inputs()
    before, intermediate = values["state"].clone(), torch.full((2, 3, 4, 3, 5), math.nan, device=DEVICE)
    y, states = oracle(values)
    close(nk.state_update(**values, intermediate=intermediate), y)
    close(intermediate, states)
    assert torch.equal(values["state"], before)


@pytest.mark.parametrize("dtype, noisy", [(torch.float32, False), (torch.float16, False), (torch.float16, True)])
def test_several_tokens_are_as_many_calls(dtype, noisy):
    """To the bit, slots and strided views included."""
    values = inputs(slots=4, dtype=dtype)
    indices, one_by_one = torch.tensor([3, 1], device=DEVICE), values["state"].clone()
    noise = torch.tensor([7, 40], device=DEVICE) if noisy else None
    ys = []
    for t in range(3):
        token = {n: v[:, t] if n in ("x", "dt", "B", "C", "z") else v for n, v in values.items()}
        step = None if noise is None else noise + torch.tensor([0, t], device=DEVICE)
        ys.append(nk.state_update(**(token | {"state": one_by_one}), indices=indices, noise=step))
    y = nk.state_update(**values, indices=indices, noise=noise)
    assert torch.equal(y, torch.stack(ys, 1)) and torch.equal(values["state"], one_by_one)


def test_views_of_wider_tensors():
    values = inputs(slots=2)
    wide = torch.randn(2, 3, 100, device=DEVICE)
    values["x"], values["B"] = wide[..., 3:15].unflatten(-1, (4, 3)), wide[..., 20:30].unflatten(-1, (2, 5))
    states = torch.randn(2, 3, 4, 3, 5, device=DEVICE)  # of three layers
    values["state"] = states[:, 1]
    before = states.clone()
    y, after = oracle(values)
    close(nk.state_update(**values), y)
    close(states[:, 1], after[:, -1])
    assert torch.equal(states[:, 0], before[:, 0]) and torch.equal(states[:, 2], before[:, 2])


def philox(block: int, seed: int, offset: int) -> list[int]:
    """The eight halfwords of a draw of Philox4x32-10, as Salmon et al. define it."""
    words = [block & 0xFFFFFFFF, block >> 32, offset & 0xFFFFFFFF, offset >> 32]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(b >> 32) ^ words[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ words[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [half for word in words for half in (word & 0xFFFF, word >> 16)]


def rounded(v: float, half: int, dtype: torch.dtype) -> float:
    """The multiple of v's last place in dtype at or below |v| + half / 2^16 of a place, with v's sign."""
    if not math.isfinite(v) or v == 0:
        return v
    mantissa, lowest = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    place = Fraction(2) ** (max(math.frexp(abs(v))[1] - 1, lowest) - mantissa)
    return math.copysign(float((Fraction(abs(v)) / place + Fraction(half, 1 << 16)).__floor__() * place), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 24, 5])
def test_noise_is_philox_and_the_rule_bit_for_bit(dtype, size):
    """A = 0 and steps of 1 make the state before rounding a sum that fp32 holds in every place the rule looks at."""
    seed, offset, batch, tokens, heads, head_dim = 2**45 + 123, 2**32 - 1, 2, 2, 2, 3
    state = torch.randint(-60, 61, (batch, heads, head_dim, size), device=DEVICE).to(dtype)
    state[0, 0, 0, 0], state[0, 0, 0, 1], state[1, 0, 0, 2] = math.nan, -math.inf, 0.0
    state[1, 1] *= 2.0**-20 if dtype == torch.float16 else 2.0**-100  # fp16: among the subnormals
    x, steps = (
        torch.ones(batch, tokens, heads, head_dim, device=DEVICE),
        torch.ones(batch, tokens, heads, device=DEVICE),
    )
    B = torch.randint(-999, 1000, (batch, tokens, heads, size), device=DEVICE) * 2.0**-12
    B[1, :, 1] *= 2.0**-20 if dtype == torch.float16 else 2.0**-100
    expected = state.double().cpu()
    for t in range(tokens):
        after = (expected + B[:, t, :, None].double().cpu()).flatten().tolist()
        halves = [half for block in range(-(-len(after) // 8)) for half in philox(block, seed, offset + t)]
        values = [rounded(v, half, dtype) for v, half in zip(after, halves, strict=False)]
        expected = torch.tensor(values, dtype=torch.float64).view(state.shape)
    noise = torch.tensor([seed, offset], device=DEVICE)
    nk.state_update(state, x, steps, torch.zeros(heads, device=DEVICE), B, B, dt_softplus=False, noise=noise)
    torch.testing.assert_close(state.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_small_steps_keep_their_relative_accuracy():
    """softplus of -9 is 1.2e-4, where log(1 + exp(x)) has lost 3 digits in fp32."""
    values = inputs(tokens=1) | {"dt": torch.full((2, 1, 4), -9.0, device=DEVICE), "dt_bias": None}
    values["state"].zero_()
    expected = oracle(values)[1][:, -1]
    nk.state_update(**values)
    torch.testing.assert_close(values["state"].double(), expected, rtol=1e-6, atol=0)


def test_nan_steps_stay_nan():
    values = inputs(tokens=1)
    values["dt"][0, 0, 1] = math.nan
    y = nk.state_update(**values)
    assert y[0, 0, 1].isnan().all() and y.isnan().sum() == 3
    assert values["state"][0, 1].isnan().all() and values["state"].isnan().sum() == 15


def test_tiles_are_8_kilobytes():
    assert implementation.tile(64, 128, 4) == (16, 128) and implementation.tile(64, 128, 2) == (32, 128)
    assert implementation.tile(80, 16, 4) == (128, 16) and implementation.tile(3, 4096, 4) == (1, 4096)


def test_refusals_say_why():
    values = inputs()
    states = torch.randn(2, 4, 5, 3, device=DEVICE).transpose(2, 3)
    with pytest.raises(nk.Refused, match="inside a slot"):
        nk.state_update(**(values | {"state": states}))
    with pytest.raises(nk.Refused, match="float64"):
        nk.state_update(**(values | {"state": values["state"].double()}))
