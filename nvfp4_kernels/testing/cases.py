"""The calls that every backend must answer as the reference does: shapes, inputs, and by how much it may differ."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor, pack
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.formats.tensor import QuantizedTensor
from nvfp4_kernels.ops._dispatch import backend
from nvfp4_kernels.ops.dequantize.op import dequantize
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.grouped_relu2.op import grouped_relu2, grouped_relu2_backward
from nvfp4_kernels.ops.hadamard.op import hadamard
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.moe_step.op import moe_step
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.quantize.op import quantize, quantize_groups, quantize_pair, quantize_stack
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing, route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.testing import mamba_cases
from nvfp4_kernels.testing.case import BF16, FP16, FP32, Case, Inputs, drawn, with_gradients


def cases(op: str) -> list[Case]:
    """The cases of one op, small ones first. Raises KeyError for an op without cases."""
    return list(_MAKERS[op]())


def _quantize() -> Iterator[Case]:
    noise = torch.tensor([0x123456789, 7])
    plain, stochastic = QuantSpec(), QuantSpec("1x16", "stochastic")
    rotated = QuantSpec(hadamard=DEFAULT_SIGNS)
    pairs = {
        "1x16": (plain, None),
        "16x16 pair": (QuantSpec("16x16"), QuantSpec("16x16")),
        "x: 1x16, Hadamard columns": (plain, rotated),
        "dy: stochastic, Hadamard columns": (stochastic, QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)),
        "four_over_six mae": (QuantSpec(four_over_six="mae"), None),
        "four_over_six mse, columns": (None, QuantSpec(four_over_six="mse")),
        "MXFP8 pair": (QuantSpec("1x32"), QuantSpec("1x32")),
    }
    sources = {
        "bf16 17x48": lambda: drawn(17, 48, dtype=BF16),
        "fp32 130x1856": lambda: drawn(130, 1856),
        "fp16 1x80 strided": lambda: drawn(80, 2, dtype=FP16).t()[:1],
    }
    for title, (row, col) in pairs.items():
        for source, make in sources.items():
            run = partial(_pair, row=row, col=col)
            yield Case("quantize", f"{title}, {source}", lambda make=make: {"x": make(), "noise": noise}, run)
    special = {
        "zeros": lambda: torch.zeros(16, 32),
        "1e38": lambda: drawn(16, 32, scale=1e38).clamp(-3e38, 3e38),
        "1e-38": lambda: drawn(16, 32, scale=1e-38),
        "NaN": lambda: drawn(16, 32).index_fill(1, torch.tensor([3]), float("nan")),
        "Inf": lambda: drawn(16, 32).index_fill(1, torch.tensor([3]), float("inf")),
    }
    for title, make in special.items():
        run = partial(_pair, row=plain, col=rotated)
        yield Case("quantize", title, lambda make=make: {"x": make(), "noise": noise}, run)

    mxfp8 = QuantSpec("1x32")
    groups = {
        "x": (plain, rotated, None),
        "dy, stochastic": (stochastic, QuantSpec("1x16", "stochastic", DEFAULT_SIGNS), None),
        "gathered, Hadamard": (None, rotated, 50),
        "gathered, MXFP8": (None, mxfp8, 50),
        "MXFP8": (mxfp8, mxfp8, None),
    }
    for title, (row, col, tokens) in groups.items():

        def make(tokens=tokens) -> Inputs:
            offsets = torch.tensor([0, 5, 0, 130, 16, 1]).cumsum(0)
            rows = None if tokens is None else torch.arange(152) * 7 % tokens
            return {"x": drawn(tokens or 152, 100, dtype=BF16), "offsets": offsets, "rows": rows, "noise": noise}

        yield Case("quantize", f"groups: {title}", make, partial(_groups, row=row, col=col))
    run = partial(_stacks, row=QuantSpec("16x16"), col=QuantSpec("16x16"))
    yield Case("quantize", "stack: 16x16 pair", lambda: {"x": drawn(3, 130, 48), "noise": noise}, run)


def _groups(
    x: Tensor, offsets: Tensor, rows: Tensor | None, noise: Tensor, row: QuantSpec | None, col: QuantSpec
) -> dict:
    form, columns = quantize_groups(x, offsets, row, col, noise, rows=rows)
    return _parts("columns", columns) | ({} if row is None else {"row": form})


def _stacks(x: Tensor, noise: Tensor, row: QuantSpec, col: QuantSpec) -> dict:
    forms = quantize_stack(x, row, col, noise)
    return _parts("row", forms[0]) | _parts("column", forms[1])


def _parts(name: str, form: Columns | Stack) -> dict:
    """Values and scales as bytes, and the global scales where there are some."""
    made = {f"{name}.{part}": getattr(form, part).view(torch.uint8) for part in ("values", "scales")}
    return made if form.global_scales is None else made | {f"{name}.global_scales": form.global_scales}


def _pair(x: Tensor, noise: Tensor, row: QuantSpec | None, col: QuantSpec | None) -> dict:
    forms = zip(("row", "column"), (row, col), quantize_pair(x, row, col, noise), strict=True)
    return {name: form for name, spec, form in forms if spec is not None}


def _dequantize() -> Iterator[Case]:
    for spec in (QuantSpec(), QuantSpec("16x16"), QuantSpec("1x32")):
        for dtype in (BF16, FP32):
            yield Case(
                "dequantize",
                f"{spec.block} to {str(dtype)[6:]}",
                lambda spec=spec: {"q": _on_cpu(drawn(33, 1856), spec)},
                lambda q, dtype=dtype: {"x": dequantize(q, dtype)},
            )


def _hadamard() -> Iterator[Case]:
    for dtype, shape in ((BF16, (17, 48)), (FP32, (130, 1000)), (FP16, (3, 16))):
        make = lambda dtype=dtype, shape=shape: {"x": drawn(*shape, dtype=dtype)}  # noqa: E731
        yield Case("hadamard", f"{str(dtype)[6:]} {shape}", make, lambda x: {"y": hadamard(x)})


def _matmul() -> Iterator[Case]:
    specs = {"nvfp4": QuantSpec(), "16x16": QuantSpec("16x16"), "mxfp8": QuantSpec("1x32")}
    for title, a_spec, b_spec, (m, n, k) in (
        ("nvfp4 x nvfp4", "nvfp4", "16x16", (17, 48, 64)),
        ("nvfp4 x nvfp4", "nvfp4", "nvfp4", (130, 200, 1856)),
        ("nvfp4 x nvfp4", "nvfp4", "nvfp4", (3, 34, 80)),
        ("mxfp8 x mxfp8", "mxfp8", "mxfp8", (33, 96, 320)),
        ("bf16 x nvfp4", None, "nvfp4", (1, 256, 1856)),
        ("bf16 x nvfp4", None, "nvfp4", (16, 256, 512)),
        ("bf16 x nvfp4", None, "nvfp4", (130, 1856, 256)),
    ):

        def make(a_spec=a_spec, b_spec=b_spec, m=m, n=n, k=k) -> Inputs:
            a, b = drawn(m, k, dtype=BF16), drawn(n, k, dtype=BF16, seed=1)
            a = a if a_spec is None else _on_cpu(a, specs[a_spec])
            return {"a": a, "b": _on_cpu(b, specs[b_spec]), "bias": drawn(n, seed=2), "total": drawn(m, n, seed=3)}

        def run(a, b, bias, total) -> dict:
            added = matmul(a, b, FP32, out=total.clone(), accumulate=True)
            return {"y": matmul(a, b, FP32), "y + bias": matmul(a, b, FP32, bias=bias), "accumulated": added}

        yield Case("matmul", f"{title}, {m}x{n}x{k}", make, run, 1e-5)
        if a_spec is None:
            run_packed = lambda a, b, **rest: run(a, PackedNVFP4Tensor.pack(b), **rest)  # noqa: E731
            yield Case("matmul", f"{title} packed, {m}x{n}x{k}", make, run_packed, 1e-5)


def _stack(groups: int, rows: int, cols: int, seed: int) -> dict[str, Tensor]:
    """The parts of an NVFP4 stack, each matrix quantized by itself; the scales as bytes."""
    forms = [_on_cpu(drawn(rows, cols, seed=seed + g), QuantSpec("16x16")) for g in range(groups)]
    parts = {part: torch.stack([getattr(f, part) for f in forms]) for part in ("codes", "scales", "global_scale")}
    return parts | {"scales": parts["scales"].view(torch.uint8)}


def _packed(codes: Tensor, scales: Tensor, global_scale: Tensor) -> Stack:
    return Stack(*pack(codes, scales), global_scale)


def _grouped_matmul() -> Iterator[Case]:
    for sizes, n, k in (([5, 0, 17, 1], 48, 64), ([0, 70, 0], 80, 1856), ([12, 13, 40], 1856, 48)):

        def make(sizes=sizes, n=n, k=k) -> Inputs:
            offsets = torch.tensor([0, *sizes]).cumsum(0)
            x, dy = drawn(sum(sizes), k, dtype=BF16), drawn(sum(sizes), n, dtype=BF16, seed=1)
            return {"x": x, "dy": dy, "w": drawn(len(sizes), n, k, dtype=BF16, seed=2), "offsets": offsets} | _stack(
                len(sizes), n, k, 3
            )

        def run(x, dy, w, offsets, codes, scales, global_scale) -> dict:
            nvfp4 = Stack(codes, scales.view(torch.float8_e4m3fn), global_scale)
            return {
                "y": grouped_matmul(x, w, offsets, FP32),
                "y of NVFP4": grouped_matmul(x, nvfp4, offsets, FP32),
                "y of FP8": grouped_matmul(x, Stack(w.to(torch.float8_e4m3fn), None, global_scale), offsets, FP32),
                "dx": grouped_matmul(dy, w.transpose(1, 2), offsets, FP32),
                "dx of NVFP4": grouped_matmul(dy, nvfp4.mT, offsets, FP32),
                "dw": grouped_matmul(dy.t(), x.t(), offsets, FP32),
            }

        def run_packed(x, dy, w, offsets, **stack) -> dict:
            return {"y": grouped_matmul(x, _packed(**stack), offsets, FP32)}

        yield Case("grouped_matmul", f"{sizes} rows, {n}x{k}", make, run, 1e-5)
        yield Case("grouped_matmul", f"{sizes} rows, {n}x{k} packed", make, run_packed, 1e-5)


def _grouped_relu2() -> Iterator[Case]:
    for sizes, n, k in (([5, 0, 17, 1], 48, 64), ([0, 70, 0], 80, 1856), ([12, 13, 40], 1856, 48)):

        def make(sizes=sizes, n=n, k=k) -> Inputs:
            rows, offsets = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
            given = {"x": drawn(rows, k), "h": drawn(rows, n), "weights": drawn(rows, seed=1).abs(), "offsets": offsets}
            return given | {"w": drawn(len(sizes), n, k, seed=2)} | _stack(len(sizes), n, k, 3)

        def run(x, h, weights, offsets, w, codes, scales, global_scale) -> dict:
            names = (
                "h",
                "a",
                "dh",
                "dweights",
                "a again",
                "amax of a",
                "turned / found",
                "amax of dh",
                "turned / found, dh",
            )
            made = {}
            nvfp4 = Stack(codes, scales.view(torch.float8_e4m3fn), global_scale)
            for title, stack in (("plain", w), ("NVFP4", nvfp4)):
                *results, most = grouped_relu2(x, stack, offsets, weights, amax=True, signs=DEFAULT_SIGNS)
                *more, dh_most = grouped_relu2_backward(x, stack, offsets, h, weights, True, True, DEFAULT_SIGNS)
                results += more
                for values, amax in ((results[1], most), (results[2], dh_most)):
                    results += amax[0], _handed_in_to_found(values, offsets, amax)
                made |= {f"{name}, {title}": result for name, result in zip(names, results, strict=True)}
            return made

        yield Case("grouped_relu2", f"{sizes} rows, {n}x{k}", make, run, 1e-5)


def _handed_in_to_found(x: Tensor, offsets: Tensor, amax: Tensor) -> Tensor:
    """One for each group whose rotated columns have the global scale that quantization finds by itself."""
    forms = (
        quantize_groups(x, offsets, None, QuantSpec(hadamard=DEFAULT_SIGNS), amax=most)[1] for most in (amax, None)
    )
    return torch.div(*(form.global_scales for form in forms))


def _expert_mlp() -> Iterator[Case]:
    for tokens, experts, top_k, size, width in ((17, 8, 3, 48, 80), (1, 8, 2, 64, 1856), (64, 4, 4, 32, 48)):

        def make(tokens=tokens, experts=experts, top_k=top_k, size=size, width=width) -> Inputs:
            routing = route(drawn(tokens, experts), None, top_k, 2.5)
            x, up = drawn(tokens, size, dtype=BF16, scale=0.1), drawn(experts, width, size, dtype=BF16, seed=1)
            return {"x": x, "up": up} | vars(routing) | _stack(experts, size, width, 2)

        def run(x, up, codes, scales, global_scale, **routing) -> dict:
            return {
                "y": expert_mlp(x, Routing(**routing), up, Stack(codes, scales.view(torch.float8_e4m3fn), global_scale))
            }

        def make_packed(make=make, experts=experts, size=size, width=width) -> Inputs:
            up = _stack(experts, width, size, 1)
            return {name: x for name, x in make().items() if name != "up"} | {f"up_{part}": up[part] for part in up}

        def run_packed(x, up_codes, up_scales, up_global_scale, codes, scales, global_scale, **routing) -> dict:
            up, down = _packed(up_codes, up_scales, up_global_scale), _packed(codes, scales, global_scale)
            return {"y": expert_mlp(x, Routing(**routing), up, down)}

        title = f"{tokens} tokens, {top_k} of {experts}, {size}x{width}"
        yield Case("expert_mlp", title, make, run, 1e-2)
        yield Case("expert_mlp", f"{title} packed", make_packed, run_packed, 1e-2)


def _moe_step() -> Iterator[Case]:
    for tokens, groups in ((1, 1), (33, 4)):

        def make(tokens=tokens) -> Inputs:
            names = "shared_up", "shared_down", "fc1", "fc2", "up"
            shapes = (1, 96, 64), (1, 64, 96), (1, 32, 64), (1, 64, 32), (8, 80, 32)
            plain = {
                n: drawn(*s, dtype=BF16, scale=0.1, seed=i) for i, (n, s) in enumerate(zip(names, shapes, strict=True))
            }
            plain |= {
                "x": drawn(tokens, 64, dtype=BF16, seed=5),
                "router": drawn(8, 64, seed=6),
                "bias": drawn(8, seed=7),
            }
            return plain | _stack(8, 32, 80, 8)

        def run(codes, scales, global_scale, groups=groups, **given) -> dict:
            down = Stack(codes, scales.view(torch.float8_e4m3fn), global_scale)
            return {"y": moe_step(**given, down=down, top_k=2, scale=2.5, n_group=groups, topk_group=(groups + 1) // 2)}

        yield Case("moe_step", f"{tokens} tokens, 2 of 8 in {groups} groups, 64x96, 32x80", make, run, 1e-2)


def _route() -> Iterator[Case]:
    for tokens, experts, top_k, groups, kept in (
        (17, 8, 2, 1, 1),
        (1, 512, 22, 1, 1),
        (130, 64, 6, 8, 4),
        (3, 4, 4, 1, 1),
    ):

        def make(tokens=tokens, experts=experts) -> Inputs:
            return {"logits": drawn(tokens, experts), "bias": drawn(experts, scale=0.1, seed=1)}

        def run(logits, bias, top_k=top_k, groups=groups, kept=kept) -> dict:
            r = route(logits, bias, top_k, 2.5, groups, kept)
            return {"weights": r.weights, "indices": r.indices, "offsets": r.offsets, "order": r.order}

        yield Case("route", f"{tokens} tokens, {top_k} of {experts}, {groups} groups", make, run, 1e-6)


def _router_logits() -> Iterator[Case]:
    for dtype, (tokens, hidden, experts) in ((FP32, (17, 80, 8)), (BF16, (130, 1856, 128)), (FP16, (1, 48, 5))):

        def make(dtype=dtype, tokens=tokens, hidden=hidden, experts=experts) -> Inputs:
            x = drawn(tokens, hidden, dtype=dtype)
            return {"x": x, "weight": drawn(experts, hidden, seed=1), "dy": drawn(tokens, experts, seed=2)}

        title = f"{str(dtype)[6:]} {tokens}x{hidden}, {experts} experts"
        tolerance = 2e-5 if dtype == FP32 else 1e-2
        yield Case("router_logits", title, make, partial(with_gradients, router_logits, "x", "weight"), tolerance)


def _permute() -> Iterator[Case]:
    for tokens, features in ((17, 48), (1, 16), (64, 1856)):

        def make(tokens=tokens, features=features) -> Inputs:
            routing = route(drawn(tokens, 8), None, 2)
            parts = dict(indices=routing.indices, offsets=routing.offsets, inverse=routing.inverse, order=routing.order)
            return {"x": drawn(tokens, features), "weights": routing.weights} | parts

        def run(x, weights, indices, offsets, inverse, order) -> dict:
            routing = Routing(indices, weights, offsets, inverse, order)
            rows = permute(x, routing)
            return {"rows": rows, "sums": unpermute(rows, routing, weights)}

        yield Case("permute", f"{tokens}x{features}", make, run, 1e-6)


def _relu2() -> Iterator[Case]:
    for dtype, tolerance in ((FP32, 1e-6), (BF16, 1e-2)):

        def make(dtype=dtype) -> Inputs:
            x, weights = drawn(17, 80, dtype=dtype), drawn(17, seed=1).abs()
            return {"x": x, "weights": weights, "dy": drawn(17, 80, dtype=dtype, seed=2)}

        yield Case("relu2", f"{str(dtype)[6:]} 17x80", make, partial(with_gradients, relu2, "x", "weights"), tolerance)


def _on_cpu(x: Tensor, spec: QuantSpec = QuantSpec()) -> QuantizedTensor:  # noqa: B008
    """Quantized by the reference, whichever backend the case is about."""
    with backend("reference"):
        return quantize(x, spec)


_MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "hadamard": _hadamard,
    "matmul": _matmul,
    "grouped_matmul": _grouped_matmul,
    "grouped_relu2": _grouped_relu2,
    "expert_mlp": _expert_mlp,
    "moe_step": _moe_step,
    "route": _route,
    "router_logits": _router_logits,
    "permute": _permute,
    "relu2": _relu2,
    **mamba_cases.MAKERS,
}
