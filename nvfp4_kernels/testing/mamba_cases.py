"""Cases of what lies between the projections of a Mamba-2 layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from nvfp4_kernels.ops.mixer_step.op import mixer_step
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update
from nvfp4_kernels.testing.case import BF16, FP16, FP32, Case, Inputs, drawn, with_gradients


def _causal_conv1d() -> Iterator[Case]:
    for dtype, (batch, length, channels), width, tolerance in (
        (FP32, (2, 17, 48), 4, 2e-5),
        (BF16, (1, 130, 320), 4, 1e-2),
        (FP32, (1, 1, 16), 2, 2e-5),
    ):

        def make(dtype=dtype, batch=batch, length=length, channels=channels, width=width) -> Inputs:
            x, dy = (drawn(batch, length, channels, dtype=dtype, seed=seed) for seed in (0, 1))
            return {"x": x, "weight": drawn(channels, width, seed=2), "bias": drawn(channels, seed=3), "dy": dy}

        run = partial(with_gradients, causal_conv1d, "x", "weight", "bias")
        yield Case("causal_conv1d", f"{str(dtype)[6:]} {batch}x{length}x{channels}", make, run, tolerance)


def _gated_rms_norm() -> Iterator[Case]:
    for dtype, (rows, channels, group), before, tolerance in (
        (FP32, (17, 48, 48), False, 2e-5),
        (FP32, (17, 160, 80), True, 2e-5),
        (BF16, (130, 1024, 256), False, 1e-2),
    ):

        def make(dtype=dtype, rows=rows, channels=channels) -> Inputs:
            x, z, dy = (drawn(rows, channels, dtype=dtype, seed=seed) for seed in range(3))
            return {"x": x, "z": z, "weight": drawn(channels, seed=3), "dy": dy}

        op = partial(gated_rms_norm, group_size=group, norm_before_gate=before)
        run = partial(with_gradients, op, "x", "z", "weight")
        yield Case("gated_rms_norm", f"{str(dtype)[6:]} {rows}x{channels}, groups of {group}", make, run, tolerance)


def _scan_inputs(batch: int, length: int, heads: int, head_dim: int, groups: int, state: int, dtype) -> Inputs:
    x, z, dy = (drawn(batch, length, heads, head_dim, dtype=dtype, seed=seed) for seed in range(3))
    B, C = (drawn(batch, length, groups, state, dtype=dtype, seed=seed) for seed in (3, 4))
    dt, A = drawn(batch, length, heads, dtype=dtype, seed=5), -drawn(heads, seed=6).exp()
    more = {"D": drawn(heads, seed=7), "dt_bias": drawn(heads, seed=8)}
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "z": z, "dy": dy} | more


def _selective_scan() -> Iterator[Case]:
    for dtype, sizes, tolerance in (
        (FP32, (2, 17, 4, 16, 2, 16), 2e-5),
        (FP32, (1, 200, 2, 80, 1, 64), 2e-5),
        (BF16, (1, 300, 8, 64, 2, 128), 2e-2),
    ):
        make = partial(_scan_inputs, *sizes, dtype)
        run = partial(with_gradients, selective_scan, "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        name = "{}x{}, {} heads of {}, {} groups, state {}".format(*sizes)
        yield Case("selective_scan", f"{str(dtype)[6:]} {name}", make, run, tolerance)


def _conv_scan() -> Iterator[Case]:
    # with many multiprocessors longer sequences than 1,024 tokens are cut into segments
    for dtype, length, tolerance in ((FP32, 17, 2e-5), (BF16, 1100, 2e-2)):

        def make(dtype=dtype, length=length) -> Inputs:
            given = _scan_inputs(1, length, 2, 64, 1, 128, dtype)
            xBC = torch.cat([given[name].flatten(2) for name in "xBC"], -1)
            taps = {"conv_weight": drawn(384, 4, scale=0.5, seed=9), "conv_bias": drawn(384, seed=10)}
            return {name: given[name] for name in ("dt", "A", "D", "dt_bias", "dy")} | {"xBC": xBC} | taps

        op = lambda **given: conv_scan(**given, groups=1, state=128)[0]  # noqa: E731
        run = partial(with_gradients, op, "xBC", "dt", "conv_weight", "conv_bias", "A", "D", "dt_bias")
        yield Case("conv_scan", f"{str(dtype)[6:]} {length} tokens", make, run, tolerance)


def _state_update() -> Iterator[Case]:
    for dtype, stochastic, tolerance in ((FP32, False, 1e-5), (BF16, False, 1e-2), (FP16, True, 2e-3)):

        def make(dtype=dtype, stochastic=stochastic) -> Inputs:
            inputs = _scan_inputs(3, 2, 4, 64, 2, 128, FP32)
            del inputs["dy"]
            noise = torch.tensor([99, 3]) if stochastic else None
            slots = torch.tensor([4, -1, 0])
            return inputs | {"state": drawn(5, 4, 64, 128, dtype=dtype, seed=9), "indices": slots, "noise": noise}

        def run(state, **given) -> dict:
            state = state.clone()
            return {"y": state_update(state, **given), "state": state}

        name = f"{str(dtype)[6:]} state{', stochastic' if stochastic else ''}, slots, 2 tokens"
        yield Case("state_update", name, make, run, tolerance)


def _mixer_step() -> Iterator[Case]:
    for dtype, tokens, tolerance in ((FP32, 1, 2e-5), (BF16, 2, 1e-2)):

        def make(dtype=dtype, tokens=tokens) -> Inputs:
            heads, groups, head_dim, state, slots = 4, 2, 64, 128, 5
            inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
            per_head = {name: drawn(heads, seed=seed) for seed, name in enumerate(("D", "dt_bias"), 3)}
            return per_head | {
                "projected": drawn(3, tokens, inner + channels + heads, dtype=dtype),
                "windows": drawn(slots, channels, 3, dtype=dtype, seed=1),
                "states": drawn(slots, heads, head_dim, state, seed=2),
                "conv_weight": drawn(channels, 4, scale=0.5, seed=5),
                "conv_bias": drawn(channels, seed=6),
                "A": -drawn(heads, seed=7).abs(),
                "norm_weight": drawn(inner, seed=8),
                "groups": groups,
                "indices": torch.tensor([4, -1, 0]),
            }

        def run(windows, states, **given) -> dict:
            windows, states = windows.clone(), states.clone()
            return {"y": mixer_step(windows=windows, states=states, **given), "windows": windows, "states": states}

        yield Case("mixer_step", f"{str(dtype)[6:]}, slots, {tokens} tokens", make, run, tolerance)


def _mixer_scan() -> Iterator[Case]:
    # of 20 sequences and 8 heads a group the clusters of the CUDA kernel fill half of any chip
    for dtype, batch, length, tolerance in ((FP32, 1, 17, 2e-5), (BF16, 20, 70, 2e-2)):

        def make(dtype=dtype, batch=batch, length=length) -> Inputs:
            heads, state = 8, 128
            inner, channels = heads * 64, heads * 64 + 2 * state
            projected = drawn(batch, length, inner + channels + heads, dtype=dtype)
            z, xBC, dt = projected.split((inner, channels, heads), -1)
            per_head = {name: drawn(heads, seed=seed) for seed, name in enumerate(("D", "dt_bias"), 1)}
            return per_head | {
                "xBC": xBC,
                "z": z,
                "dt": dt,
                "conv_weight": drawn(channels, 4, scale=0.5, seed=3),
                "conv_bias": drawn(channels, seed=4),
                "A": -drawn(heads, seed=5).exp(),
                "norm_weight": drawn(inner, seed=6),
                "groups": 1,
                "conv_state": drawn(batch, channels, 3, dtype=dtype, seed=7),
                "initial_state": drawn(batch, heads, 64, state, seed=8),
            }

        def run(**given) -> dict:
            return dict(zip(("y", "conv_state", "state"), mixer_scan(**given), strict=True))

        yield Case("mixer_scan", f"{str(dtype)[6:]}, {batch} x {length} tokens", make, run, tolerance)


MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
    "selective_scan": _selective_scan,
    "conv_scan": _conv_scan,
    "state_update": _state_update,
    "mixer_step": _mixer_step,
    "mixer_scan": _mixer_scan,
}
