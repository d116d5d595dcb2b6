"""state_update, one token, against the formula element by element in float64."""

import math

import pytest
import torch

from nvfp4_kernels.ops.state_update.op import state_update


def inputs(batch=2, heads=4, head_dim=3, groups=2, state=5, dtype=torch.float64):
    made = dict(
        state=torch.randn(batch, heads, head_dim, state), x=torch.randn(batch, heads, head_dim), dt=torch.randn(batch, heads),
        A=-torch.rand(heads), B=torch.randn(batch, groups, state), C=torch.randn(batch, groups, state), D=torch.randn(heads),
        z=torch.randn(batch, heads, head_dim), dt_bias=torch.randn(heads),
    )  # fmt: skip
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def element(v, b, h, p, dt_softplus=True):
    g = h // (v["x"].shape[1] // v["B"].shape[1])
    step = float(v["dt"][b, h] + (v["dt_bias"][h] if v.get("dt_bias") is not None else 0))
    step = math.log1p(math.exp(step)) if dt_softplus else max(step, 0.0)
    u = step * float(v["x"][b, h, p])
    after = [
        math.exp(float(v["A"][h]) * step) * float(s) + u * float(k)
        for s, k in zip(v["state"][b, h, p], v["B"][b, g], strict=True)
    ]
    y = sum(s * float(c) for s, c in zip(after, v["C"][b, g], strict=True))
    y += float(v["D"][h]) * float(v["x"][b, h, p]) if v.get("D") is not None else 0
    z = v.get("z")
    return (y if z is None else y * float(z[b, h, p]) / (1 + math.exp(-float(z[b, h, p])))), after


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_against_the_formula(without, dt_softplus):
    values = {name: tensor for name, tensor in inputs().items() if name not in without}
    before = {name: tensor.clone() for name, tensor in values.items()}
    y = state_update(**values, dt_softplus=dt_softplus)
    for b in range(2):
        for h in range(4):
            for p in range(3):
                expected, after = element(before, b, h, p, dt_softplus)
                assert math.isclose(y[b, h, p], expected, rel_tol=1e-12, abs_tol=1e-12)
                torch.testing.assert_close(values["state"][b, h, p], torch.tensor(after, dtype=torch.float64))


def test_state_keeps_its_dtype_and_memory():
    values = inputs(dtype=torch.float32)
    values["x"], values["z"] = values["x"].bfloat16(), values["z"].bfloat16()
    state = values["state"] = values["state"].bfloat16()
    y = state_update(**values)
    assert y.dtype == torch.bfloat16 and values["state"] is state and state.isfinite().all()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="state: got shape"):
        state_update(**(inputs() | {"state": torch.zeros(2, 4, 3, 4)}))
    with pytest.raises(ValueError, match="B: got 3 groups"):
        state_update(**(inputs() | {"B": torch.zeros(2, 3, 5)}))
