"""What is measured on a GPU, each beside its yardstick in torch: each size is drawn when its turn comes.

A case gives the amounts that must move or be computed; benchmarks/gpu/run.py times it with CUDA events and an L2 cache flushed
before each round. `small` sizes serve a rehearsal on a CPU: there the kernels run in Triton's interpreter. A group is called
twice: for the sizes that count, and, once every group has had its turn, for those that make curves of them (`sweep`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import nvfp4_kernels as nk
from benchmarks.bench_causal_conv1d import plain as plain_conv1d
from benchmarks.bench_selective_scan import listing
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.layout import swizzle_128x4
from nvfp4_kernels.formats.packed import pack
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.formats.tensor import NVFP4Tensor, QuantizedTensor
from nvfp4_kernels.nn.moe import MoE
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops.conv_scan.op import conv_scan as run_conv_scan
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MULTIPLIED = ((128, 4096, 4096), (4096, 4096, 4096), (8192, 4096, 4096), (8192, 10304, 2688))  # rows, columns, length


@dataclass
class Case:
    """ours: run under each backend of ours that serves it, or (not forced) as the dispatch decides.

    theirs: yardsticks by name. about: dtype; bytes or flops; limit, "copy" or "matmul"; series, size and axis of a plot.
    """

    op: str
    name: str
    ours: Callable[[], object]
    theirs: dict[str, Callable[[], object]] = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    forced: bool = True


def draw(*shape: int, dtype=BF16, device="cuda") -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=FP32).to(dtype)


def at(series: str, size: int, axis: str) -> dict:
    """The place of a case on a curve."""
    return dict(series=series, size=size, axis=axis)


def quantize(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Bytes: the input twice (amax, then codes), the codes and scales once. Yardstick: the same rule in eager torch."""
    signs = QuantSpec(hadamard=DEFAULT_SIGNS)
    noisy = QuantSpec("1x16", "stochastic")
    forms = {
        "1x16": (QuantSpec(), None),
        "16x16": (QuantSpec("16x16"), None),
        "pair 16x16 (weight)": (QuantSpec("16x16"), QuantSpec("16x16")),
        "pair 1x16 + RHT (x)": (QuantSpec(), signs),
        "pair SR + RHT SR (dy)": (noisy, QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)),
    }
    noise = torch.tensor([1, 2], device=device)
    for rows, cols in matrices(small, sweep):
        for name, (row, col) in forms.items():
            x = draw(rows, cols, device=device)
            run = lambda x=x, row=row, col=col: nk.quantize_pair(x, row, col, noise)  # noqa: E731
            written = sum(0.5625 * x.numel() for spec in (row, col) if spec)
            about = dict(dtype="bf16", bytes=2 * x.nbytes + written, limit="copy") | at(name, x.numel(), "values")
            yield Case("quantize", f"{name} {rows}x{cols}", run, {"eager torch": _by("reference", run)}, about)


def matrices(small: bool, sweep: bool) -> tuple[tuple[int, int], ...]:
    if small:
        return ((16, 64),) if sweep else ((32, 64),)
    return tuple((rows, 4096) for rows in ((64, 256, 1024, 2048, 16384) if sweep else (8192,)))


def _by(backend: str, run: Callable) -> Callable:
    def forced():
        with nk.backend(backend):
            return run()

    return forced


def decoding(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    for rows, cols in matrices(small, sweep):
        x = draw(rows, cols, device=device)
        q = nk.quantize(x)
        name = f"{rows}x{cols}"
        about = dict(dtype="bf16", bytes=x.nbytes + q.nbytes, limit="copy") | at("to bf16", x.numel(), "values")
        theirs = {"copy of as many bytes": _copy(about, device)}
        yield Case("dequantize", name, lambda q=q: q.dequantize(BF16), theirs, about)
        about = dict(dtype="bf16", bytes=2 * x.nbytes, limit="copy") | at("bf16", x.numel(), "values")
        yield Case("hadamard", name, lambda x=x: nk.hadamard(x), {"copy of as many bytes": x.clone}, about)


def _copy(about: dict, device: str) -> Callable:
    return torch.empty(int(about["bytes"]) // 2, dtype=torch.uint8, device=device).clone


def matmul(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Quantized operands, and weights alone; few rows are bound by the packed weight's bytes, many by arithmetic."""
    sizes = ((32, 48, 64),) if small else (*MULTIPLIED, (8192, 8192, 8192))
    squares = ((16, 16, 16),) if small else tuple((n, n, n) for n in (256, 512, 1024, 2048, 16384))
    for m, n, k in squares if sweep else sizes:
        a, b = draw(m, k, device=device), draw(n, k, device=device)
        qa, qb = nk.quantize(a), nk.quantize(b, block="16x16")
        about = dict(dtype="nvfp4", flops=2 * m * n * k, limit="matmul")
        about |= at("NVFP4 x NVFP4, square", m, "rows, columns and length") if m == n == k else {}
        run = lambda qa=qa, qb=qb: nk.matmul(qa, qb, BF16)  # noqa: E731
        theirs = {"torch bf16": lambda a=a, b=b: a @ b.t()}
        if _device.fp4_tensor_cores(torch.device(device)):
            theirs["cuBLAS NVFP4, scales swizzled beforehand"] = _cublas_nvfp4(qa, qb)
        yield Case("matmul", f"NVFP4 x NVFP4 {m}x{n}x{k}", run, theirs, about)
    n, k = (48, 64) if small else (4096, 14336)
    b = draw(n, k, device=device)
    qb = nk.quantize(b)
    packed = nk.PackedNVFP4Tensor.pack(qb)
    sizes = (1, 17, 65) if small else (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192)
    for m in ((2,) if small else (2, 8, 32, 4096)) if sweep else sizes:
        a = draw(m, k, device=device)
        amount = dict(bytes=qb.nbytes, limit="copy") if m <= 64 else dict(flops=2 * m * n * k, limit="matmul")
        run = lambda a=a: nk.matmul(a, qb, BF16)  # noqa: E731
        about = dict(dtype="bf16") | amount | at(f"bf16 x NVFP4 weight {n}x{k}", m, "rows")
        yield Case("matmul", f"bf16 x NVFP4 weight {m}x{n}x{k}", run, {"torch bf16": lambda a=a: a @ b.t()}, about)
        run = lambda a=a: nk.matmul(a, packed, BF16)  # noqa: E731
        name = f"bf16 x packed NVFP4 weight {m}x{n}x{k}"
        theirs = {"torch bf16": lambda a=a: a @ b.t()}
        if m > 64:  # where Triton decodes as it multiplies, and CUDA in another way, by the number of rows and the chip
            theirs["Triton, unpacked weight"] = _by("triton", lambda a=a: nk.matmul(a, qb, BF16))
        about |= at(f"bf16 x packed NVFP4 weight {n}x{k}", m, "rows")
        yield Case("matmul", name, run, theirs, about, False)


def _cublas_nvfp4(a: NVFP4Tensor, b: NVFP4Tensor) -> Callable:
    """Without the global scales, which cuBLAS would take as a factor of its own."""
    codes = [x.codes.view(torch.float4_e2m1fn_x2) for x in (a, b)]
    scales = [swizzle_128x4(x.scales) for x in (a, b)]
    return lambda: torch._scaled_mm(codes[0], codes[1].t(), *scales, out_dtype=BF16)


def linear(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Forward and backward, the weight quantized in each step as in training without gradient accumulation; each backend
    alone, and what the dispatch takes."""
    sizes = ((32, 48, 64),) if small else ((8192, 4096, 4096), (8192, 10304, 2688))
    other = ((16, 48, 64),) if small else tuple((m, 4096, 4096) for m in (512, 1024, 2048, 4096, 16384))
    for m, n, k in other if sweep else sizes:
        x, w, dy = draw(m, k, device=device), draw(n, k, dtype=FP32, device=device), draw(m, n, device=device)
        x.requires_grad_()
        w.requires_grad_()
        narrow = w.detach().to(BF16).requires_grad_()

        def ours(x=x, w=w, dy=dy):
            return torch.autograd.grad(nk.linear(x, w, recipe="nvfp4"), (x, w), dy)

        def theirs(x=x, w=narrow, dy=dy):
            return torch.autograd.grad(F.linear(x, w), (x, w), dy)

        about = dict(dtype="nvfp4", flops=6 * m * n * k, limit="matmul")
        about |= at(f"forward and backward, weight {n}x{k}", m, "tokens")
        for forced in (True, False):
            yield Case("linear", f"forward and backward {m}x{n}x{k}", ours, {"torch bf16": theirs}, about, forced)


def layers(small: bool, sweep: bool) -> dict[str, tuple[int, ...]]:
    """Mamba-2 layers: batch, length, heads, head_dim, groups, state."""
    if small:
        return {"tiny short": (1, 32, 2, 16, 1, 16)} if sweep else {"tiny": (1, 64, 2, 16, 1, 16)}
    if sweep:
        return {f"Nano {length >> 10}k": (1, length, 64, 64, 8, 128) for length in (1024, 2048, 4096, 16384, 32768)}
    return {
        "Nano 8k": (1, 8192, 64, 64, 8, 128),
        "Nano 8 x 8k": (8, 8192, 64, 64, 8, 128),
        "Nano 64k": (1, 65536, 64, 64, 8, 128),
        "Super 8k": (1, 8192, 128, 64, 8, 128),
    }


def selective_scan(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Bytes: x, B, C, dt and y once, backward as many again with their gradients. The interpreter has no bf16 products."""
    dtype = FP16 if small else BF16
    for name, (batch, length, heads, head_dim, groups, state) in layers(small, sweep).items():
        x, dy = (draw(batch, length, heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        B, C = (draw(batch, length, groups, state, dtype=dtype, device=device) for _ in range(2))
        dt = (draw(batch, length, heads, dtype=FP32, device=device) - 4).to(dtype)
        A = -torch.rand(heads, device=device) * 15 - 1
        D, bias = (torch.randn(heads, device=device) for _ in range(2))
        leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D, bias)]
        chunk = 32 if small else 128

        def forward(leaves=leaves):
            with torch.no_grad():
                return nk.selective_scan(*leaves[:6], dt_bias=leaves[6])

        def both(leaves=leaves, dy=dy):
            return torch.autograd.grad(nk.selective_scan(*leaves[:6], dt_bias=leaves[6]), leaves, dy)

        def chunked(leaves=leaves, chunk=chunk):
            with torch.no_grad():
                return listing(*leaves, chunk, dtype)

        def chunked_both(leaves=leaves, dy=dy, chunk=chunk):
            return torch.autograd.grad(listing(*leaves, chunk, dtype), leaves, dy)

        once = 2 * x.nbytes + B.nbytes + C.nbytes + dt.nbytes
        for title, run, peer, amount in (
            ("forward", forward, {"torch, chunked": chunked}, once),
            ("forward and backward", both, {"torch, chunked": chunked_both}, 3 * once),
        ):
            yield Case(
                "selective_scan", f"{title}, {name}", run, peer | _mamba_ssm(leaves, dy, title != "forward"),
                dict(dtype=str(dtype)[6:], bytes=amount, limit="copy") | along(f"{title}, ", name, batch, length),
            )  # fmt: skip


def along(title: str, name: str, batch: int, length: int) -> dict:
    """The place of a layer among others that differ in length alone."""
    return at(f"{title}{name.split(' ')[0]}, {batch} x length", length, "length")


def conv_scan(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Forward, beside its two ops one after the other; and mixer_scan, beside conv_scan and then the norm. Bytes: xBC, dt, y
    and, of mixer_scan, z once."""
    dtype = FP16 if small else BF16
    for name, (batch, length, heads, head_dim, groups, state) in layers(small, sweep).items():
        inner, shared = heads * head_dim, groups * state
        xBC = draw(batch, length, inner + 2 * shared, dtype=dtype, device=device)
        dt = (draw(batch, length, heads, dtype=FP32, device=device) - 4).to(dtype)
        taps = [draw(inner + 2 * shared, *size, dtype=FP32, device=device) for size in ((4,), ())]
        A, D, bias = (-torch.rand(heads, device=device) for _ in range(3))
        given = (xBC, dt, *taps, A, D, bias, groups, state)

        def apart(given=given, widths=(inner, shared, shared)):
            xBC, dt, weight, conv_bias, A, D, bias, groups, _ = given
            x, B, C = nk.causal_conv1d(xBC, weight, conv_bias).split(widths, -1)
            x, B, C = x.unflatten(-1, (len(A), -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
            return nk.selective_scan(x, dt, A, B, C, D, dt_bias=bias)

        about = dict(dtype=str(dtype)[6:], bytes=xBC.nbytes + dt.nbytes + batch * length * inner * 2, limit="copy")
        about |= along("", name, batch, length)
        yield Case("conv_scan", name, lambda given=given: run_conv_scan(*given), {"the two ops": apart}, about)
        z, norm = draw(batch, length, inner, dtype=dtype, device=device), torch.ones(inner, device=device)

        def whole(given=given, z=z, norm=norm):
            with torch.no_grad():
                return mixer_scan(given[0], z, *given[1:7], norm, given[7])

        def in_turn(given=given, z=z, norm=norm):
            with torch.no_grad():
                y = run_conv_scan(*given)[0].flatten(2)
                return nk.gated_rms_norm(y, z, norm, group_size=y.shape[2] // given[7])

        about = about | dict(bytes=about["bytes"] + z.nbytes)
        yield Case("mixer_scan", name, whole, {"conv_scan, then the norm": in_turn}, about)


def _mamba_ssm(leaves: list[torch.Tensor], dy: torch.Tensor, backward: bool) -> dict:
    """mamba_ssm's Triton, where it is installed or lies on the path."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return {}
    x, dt, A, B, C, D, bias = leaves

    def run():
        with torch.set_grad_enabled(backward):
            y = mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)
            return torch.autograd.grad(y, leaves, dy) if backward else y

    return {"mamba_ssm": run}


def state_update(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """One token of Nano's layer. Bytes: each state read and written."""
    heads, head_dim, groups, state = (2, 16, 1, 16) if small else (64, 64, 8, 128)
    sizes = (1, 3) if small else (1, 8, 64, 256)
    for batch in ((2,) if small else (2, 4, 16, 32, 128)) if sweep else sizes:
        for dtype, stochastic in ((FP32, False), (FP16, True)):
            kept = draw(batch, heads, head_dim, state, dtype=dtype, device=device)
            x, dt = draw(batch, heads, head_dim, device=device), draw(batch, heads, device=device)
            B, C = (draw(batch, groups, state, device=device) for _ in range(2))
            A, D, bias = (-torch.rand(heads, device=device) for _ in range(3))
            noise = torch.tensor([1, 2], device=device) if stochastic else None
            given = (x, dt, A, B, C, D)
            run = lambda s=kept, g=given, n=noise, b=bias: nk.state_update(s, *g, dt_bias=b, noise=n)  # noqa: E731

            def plain(s=kept, g=given, b=bias):
                x, dt, A, B, C, D = g
                step = F.softplus(dt.float() + b)[..., None, None]
                B, C = (t.repeat_interleave(heads // groups, 1).float() for t in (B, C))
                s.copy_(s * torch.exp(step * A[:, None, None]) + step * x.float()[..., None] * B[:, :, None])
                return ((s.float() @ C[..., None])[..., 0] + x * D[:, None]).to(x.dtype)

            kind = f"{str(dtype)[6:]}{' stochastic' if stochastic else ''}"
            about = dict(dtype=str(dtype)[6:], bytes=2 * kept.nbytes, limit="copy") | at(kind, batch, "sequences")
            yield Case("state_update", f"batch {batch}, {kind}", run, {"torch": plain}, about)


def neighbours(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """causal_conv1d and gated_rms_norm at Nano's sizes; bytes: inputs, outputs and, backward, their gradients."""
    sizes = (32,) if small else (8192,)
    for length in ((16,) if small else (256, 1024, 2048, 4096, 32768)) if sweep else sizes:
        yield from _neighbours(device, length, *((48, 32, 16) if small else (6144, 4096, 512)))


def _neighbours(device: str, length: int, channels: int, inner: int, group: int) -> Iterator[Case]:
    x, dy = (draw(1, length, channels, device=device) for _ in range(2))
    leaves = [x.requires_grad_()] + [
        draw(*s, dtype=FP32, device=device).requires_grad_() for s in ((channels, 4), (channels,))
    ]
    narrow = [t.detach().to(BF16).requires_grad_() for t in leaves]
    y, z, dn = (draw(length, inner, device=device) for _ in range(3))
    norm_leaves = [y.requires_grad_(), z.requires_grad_(), torch.ones(inner, device=device, requires_grad=True)]

    def plain_norm(y, z, weight):
        u = (y.float() * F.silu(z.float())).unflatten(-1, (-1, group))
        return ((u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight).to(y.dtype)

    norm = lambda y, z, w: nk.gated_rms_norm(y, z, w, group_size=group)  # noqa: E731
    for op, ours, theirs, mine, peers, grad, once in (
        ("causal_conv1d", nk.causal_conv1d, plain_conv1d, leaves, narrow, dy, x.nbytes),
        ("gated_rms_norm", norm, plain_norm, norm_leaves, norm_leaves, dn, y.nbytes),
    ):
        tensors = 2 if op == "causal_conv1d" else 3
        for backward in (False, True):

            def call(f, given, grad=grad, backward=backward):
                with torch.set_grad_enabled(backward):
                    out = f(*given)
                return torch.autograd.grad(out, given, grad) if backward else out

            amount = (tensors + 2 * tensors - 1 if backward else tensors) * once
            title = "forward and backward" if backward else "forward"
            yield Case(
                op, f"{title} {length} tokens",
                lambda call=call, f=ours, given=mine: call(f, given),
                {"torch": lambda call=call, f=theirs, given=peers: call(f, given)},
                dict(dtype="bf16", bytes=amount, limit="copy") | at(title, length, "tokens"),
            )  # fmt: skip


def moe(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Routed experts with shared expert and latent projections, forward and backward, in training mode; bf16 weights on both
    sides. Ours computes the balance loss too."""
    sizes = {"tiny": (32, 4, 2, 48, 32, None)} if small else {
        "Nano": (2688, 128, 6, 1856, 3712, None),
        "Super": (4096, 512, 22, 2688, 5376, 1024),
    }  # fmt: skip
    lengths = ((5,) if small else (512, 2048, 4096, 16384)) if sweep else (17 if small else 8192,)
    for name, (hidden, experts, top_k, width, shared, latent) in tuple(sizes.items())[: 1 if sweep else None]:
        layer = MoE(hidden, experts, top_k, width, shared, latent).to(device)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        layer.to(BF16)
        layer.gate.float()
        for tokens in lengths:
            x, dy = draw(1, tokens, hidden, device=device).requires_grad_(), draw(1, tokens, hidden, device=device)
            rows, size = tokens * top_k, latent or hidden
            flops = 3 * 2 * (rows * 2 * size * width + tokens * 2 * hidden * (shared + (latent or 0)))

            def ours(layer=layer, x=x, dy=dy):
                return torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], dy)

            title = f"forward and backward, {name}"
            about = dict(dtype="bf16", flops=flops, limit="matmul") | at(title, tokens, "tokens")
            grouped = hasattr(torch, "_grouped_mm") and device != "cpu"
            theirs = {"torch._grouped_mm": _grouped(layer, x, dy)} if grouped else {}
            yield Case("moe", f"{title}, {tokens} tokens", ours, theirs, about, False)


def _grouped(layer: MoE, x: torch.Tensor, dy: torch.Tensor) -> Callable:
    """The same block by torch._grouped_mm over eagerly permuted rows, its weights in bf16 beforehand."""
    up, down = (
        t.detach().to(BF16).transpose(1, 2).requires_grad_() for t in (layer.experts.up_proj, layer.experts.down_proj)
    )
    dense = [
        m.weight.detach().to(BF16).requires_grad_()
        for m in (layer.shared_experts.up_proj, layer.shared_experts.down_proj)
    ]
    latent = [m.weight.detach().to(BF16).requires_grad_() for m in (layer.fc1_latent_proj, layer.fc2_latent_proj) if m]
    gate, top_k, scale = layer.gate.weight, layer.gate.options[0], layer.gate.options[1]
    leaves = [x, up, down, gate, *dense, *latent]

    def run():
        tokens = x[0]
        scores = torch.sigmoid(tokens.float() @ gate.t())
        chosen = scores.topk(top_k, 1)
        weights = chosen.values / chosen.values.sum(1, keepdim=True) * scale
        order = chosen.indices.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.indices.flatten(), minlength=up.shape[0]).cumsum(0).to(torch.int32)
        inner = F.linear(tokens, latent[0]) if latent else tokens
        rows = inner[order // top_k]
        hidden = F.relu(torch._grouped_mm(rows, up, offs=ends)).square()
        back = torch._grouped_mm(hidden, down, offs=ends) * weights.flatten()[order, None].to(BF16)
        y = torch.zeros_like(inner).index_add(0, order // top_k, back)
        y = F.linear(y, latent[1]) if latent else y
        y = y + F.linear(F.relu(F.linear(tokens, dense[0])).square(), dense[1])
        return torch.autograd.grad(y[None], leaves, dy)

    return run


def moe_decode(device: str, small: bool, sweep: bool) -> Iterator[Case]:
    """Routed experts of a decoded batch, from the routing to the weighted sum, over packed NVFP4 stacks. Bytes: of the experts
    that the batch asks for, each once; stacks larger than the L2 cache together."""
    sizes = {"tiny": (48, 4, 2, 80)} if small else {
        "Nano": (2688, 128, 6, 1856),
        "Super": (1024, 512, 22, 2688),
    }  # fmt: skip
    usual = (1, 5) if small else (1, 8, 64)
    batches = ((3,) if small else (2, 4, 16, 32)) if sweep else usual
    for name, (size, experts, top_k, width) in sizes.items():
        plain = [_stack(experts, *shape, device) for shape in ((width, size), (size, width))]
        packed = [Stack(*pack(*stack[:2]), stack.global_scales) for stack in plain]
        for tokens in batches:
            routing = nk.route(draw(tokens, experts, dtype=FP32, device=device), None, top_k)
            x, touched = draw(tokens, size, device=device), int((routing.offsets.diff() > 0).sum())
            about = dict(dtype="bf16", bytes=touched * 2 * size * width * 9 // 16, limit="copy")
            about |= at(name, tokens, "tokens")
            ours = lambda x=x, routing=routing, stacks=packed: expert_mlp(x, routing, *stacks)  # noqa: E731
            theirs = {
                "Triton, unpacked stacks": _by(
                    "triton", lambda x=x, routing=routing, stacks=plain: expert_mlp(x, routing, *stacks)
                )
            }
            yield Case("moe decode", f"{name}, {tokens} tokens, {touched} experts", ours, theirs, about, False)


def _stack(experts: int, rows: int, cols: int, device: str) -> Stack:
    """Random codes under scales of 0.5 to 1.9."""
    codes = torch.randint(0, 256, (experts, rows, cols // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(48, 64, (experts, rows, cols // 16), dtype=torch.uint8, device=device)
    return Stack(codes, scales.view(torch.float8_e4m3fn), torch.full((experts,), 0.01, device=device))


GROUPS = (quantize, decoding, matmul, linear, selective_scan, conv_scan, state_update, neighbours, moe, moe_decode)


def all_cases(device: str, small: bool = False) -> Iterator[Case]:
    """Every case at the sizes that count."""
    for group in GROUPS:
        yield from group(device, small, False)


def finite(result: object) -> bool:
    """Whether every floating-point number of a result is finite: a time of garbage is no time."""
    if isinstance(result, QuantizedTensor):
        return finite(result.dequantize(FP32))
    if isinstance(result, torch.Tensor):
        return (
            not result.is_floating_point() or result.element_size() == 1 or math.isfinite(float(result.float().sum()))
        )
    return all(finite(part) for part in result) if isinstance(result, (tuple, list)) else True
