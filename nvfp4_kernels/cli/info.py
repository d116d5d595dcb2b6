"""nvfp4 info: versions, devices, and which backend serves which op on this machine, or why not."""

import argparse
import inspect
import json
import math
import platform
from importlib import metadata

HELP = "What this machine has, and which backend serves each op on it (or why not)."
EXAMPLE = "nvfp4 info --json"
PACKAGES = ("torch", "numpy", "triton", "cupy", "safetensors", "tokenizers", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON; default: a table")


def run(arguments: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


def collect() -> dict:
    """Everything as plain values; a part that fails says so and spoils nothing else."""
    import torch

    from nvfp4_kernels import __version__
    from nvfp4_kernels.ops import _device, _tuned

    versions = {"nvfp4_kernels": __version__, "python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with its build, such as +cu128, of which the metadata do not always tell
    versions["cuda"] = torch.version.cuda or "-"
    chips = [{"device": c.device, "name": c.name, "arch": c.arch, "notes": c.notes} for c in _device.chips()]
    return {
        "versions": versions,
        "devices": chips,
        "cpu": {"instructions": _instructions(), "threads": torch.get_num_threads()},
        "gpu": "none" if len(chips) == 1 else f"{len(chips) - 1}",
        "ops": {chip["device"]: _ops(chip["device"]) for chip in chips},
        "tuned": {chip["device"]: _tuned.entries(chip["device"]) for chip in chips if chip["arch"] != "cpu"},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _instructions() -> str:
    """What the native module chose at run time; why there is none where it is missing."""
    from nvfp4_kernels.ops import _native

    return str(_native.native.isa()) if _native.native is not None else f"not asked: {_native.missing}"


def _ops(device: str) -> dict[str, dict[str, str]]:
    """op -> backend -> "ok", "first" (the one that is taken) or the reason against it."""
    from nvfp4_kernels.ops import _dispatch

    table = {}
    for op in _dispatch.TABLE:
        try:
            call = _call(op, _dispatch.implementation(op, "reference").refuses, device)
            reasons = {name: _refusal(op, name, device) for name in _dispatch.candidates(op, call)}
        except Exception as error:
            table[op] = {"?": f"{type(error).__name__}: {error}"}
            continue
        first = next((name for name, reason in reasons.items() if reason is None), None)
        table[op] = {n: "first" if n == first else "ok" if reason is None else reason for n, reason in reasons.items()}
    return table


def _refusal(op: str, backend: str, device: str) -> str | None:
    from nvfp4_kernels.ops import _dispatch

    if backend not in _dispatch.TABLE[op]:
        return "no such implementation"
    try:
        implementation = _dispatch.implementation(op, backend)
    except ImportError as error:
        return f"does not import: {error}"
    return implementation.refuses(*_call(op, implementation.refuses, device))


def _call(op: str, refuses, device: str) -> list:
    """Arguments of an ordinary call: bf16, sizes that are multiples of 16, the nvfp4 recipe."""
    import torch

    from nvfp4_kernels.formats.groups import Stack
    from nvfp4_kernels.formats.spec import QuantSpec
    from nvfp4_kernels.ops.quantize.op import quantize

    x = torch.ones(32, 32, dtype=torch.bfloat16, device=device)
    if op == "quantize":
        return [
            x,
            QuantSpec(),
            QuantSpec("1x16", "stochastic", 0xD7E8),
            torch.zeros(2, dtype=torch.int64, device=device),
        ]
    if op == "hadamard":
        return [x, 0xD7E8]
    if op == "dequantize":
        q = quantize(x)
        return [q.codes, q.scales, q.global_scale, 32, torch.bfloat16]
    if op == "matmul":
        return [quantize(x), quantize(x), None, torch.bfloat16, None, False]
    tokens, heads, shared, A = x.view(1, 32, 2, 16), x.new_ones(1, 32, 2), x.view(1, 32, 1, 32), x.new_ones(2).float()
    if op == "causal_conv1d":
        return [x[None], x.new_ones(32, 4), None, None, None, True]
    if op == "gated_rms_norm":
        return [x, x, x.new_ones(32), 1e-5, 32, False]
    if op == "selective_scan":
        return [tokens, heads, A, shared, shared, None, None, None, None, True, 0.0, math.inf, 16]
    if op == "conv_scan":
        return [x[None].repeat(1, 1, 3), heads, x.new_ones(96, 4), None, A, *[None] * 5, 1, 32, 0.0, math.inf, 16]
    if op == "state_update":
        row = [t[:, :1] for t in (tokens, heads, shared)]
        state = x.new_ones(1, 2, 16, 32)
        return [state, row[0], row[1], A, row[2], row[2], *[None] * 6, True, 0.0, math.inf]
    if op in ("grouped_matmul", "grouped_relu2", "expert_mlp"):
        stack, index = Stack(x[None]), torch.tensor([0, 32], device=device)
        routed = op == "expert_mlp"
        return [x, x, index, index, index, stack, stack] if routed else [Stack(x), stack, index, x.dtype, None]
    if op == "mixer_scan":
        options = [None] * 3 + [1, 0.0, math.inf, 1e-5, 16]
        return [x[None].repeat(1, 1, 3), x[None], heads, x.new_ones(96, 4), None, A, A, A, x.new_ones(32), *options]
    if op == "mixer_step":
        state = x.new_ones(1, 2, 16, 32).float()
        return [x[None, :1], x, state, *[None] * 10]
    if op == "moe_step":
        return [x, x, None, (Stack(x[None]),) * 2 + (None,) * 4, (1, 1.0, 1, 1, True)]
    return [x] * len(inspect.signature(refuses).parameters)


def render(report: dict) -> str:
    v = report["versions"]
    lines = [" · ".join(f"{name} {v[name]}" for name in ("nvfp4_kernels", "python", *PACKAGES, "cuda"))]
    lines += [f"{c['device']:8}{c['name']} ({c['arch']}): {c['notes']}" for c in report["devices"]]
    lines.append(
        f"cpu kernels {report['cpu']['instructions']}, {report['cpu']['threads']} threads · gpu {report['gpu']}"
    )
    for device, ops in report["ops"].items():
        backends = list(dict.fromkeys(name for row in ops.values() for name in row))
        lines += [
            "",
            f"{device:16}" + "".join(f"{name:12}" for name in backends) + "(first: taken when nothing is forced)",
        ]
        notes = {}
        for op, row in ops.items():
            cells = []
            for name in backends:
                cell = row.get(name, "-")
                if cell not in ("ok", "first", "-"):
                    cell = f"no [{notes.setdefault(cell, len(notes) + 1)}]"
                cells.append(f"{cell:12}")
            lines.append(f"{op:16}" + "".join(cells).rstrip())
        lines += [f"[{number}] {reason}" for reason, number in notes.items()]
    for device, tuned in report["tuned"].items():
        lines += ["", f"{device}, choices measured: {len(tuned) or 'none; nvfp4 tune measures them'}"]
        lines += [f"{question}: {json.dumps(e['answer'])}, by {e['from']}" for question, e in tuned.items()]
    return "\n".join(lines)
