"""nvfp4 plan: what runs in each layer of a model, in which format, by which backend, and why. Nothing is allocated."""

import argparse
import json

from nvfp4_kernels.cli.text import ranges

HELP = "Each linear layer of a model: its operands' formats, the backend that serves them here, and why."
EXAMPLE = "nvfp4 plan --preset ultra-550b --recipe nemotron3"
OPERANDS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
BITS = {"nvfp4": 4.5, "mxfp8": 8.25, "bf16": 16.0, "fp32": 32.0}  # a value, with its share of the block's scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nvfp4_kernels.cli.train import PRESETS, RECIPES

    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="tiny",
        metavar="NAME",
        help=f"the model ({', '.join(PRESETS)}); default tiny",
    )
    parser.add_argument("--config", metavar="PATH", default=None, help="a config.json in place of --preset")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="nvfp4",
        metavar="NAME",
        help=f"the recipe ({', '.join(RECIPES)}); default nvfp4",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="in a micro-batch, by which backends are asked; default 8192",
    )
    parser.add_argument("--layers", action="store_true", help="a line for every layer; default: like layers together")
    parser.add_argument("--json", action="store_true", help="every layer as JSON; default: a table")


def run(arguments: argparse.Namespace) -> int:
    report = collect(arguments)
    print(json.dumps(report, indent=2) if arguments.json else render(report, arguments.layers))
    return 0


def collect(arguments: argparse.Namespace) -> dict:
    from nvfp4_kernels.cli.models import check_config, check_number

    check_number("tokens", arguments.tokens, 1)
    check_config(arguments.config)

    import torch

    from nvfp4_kernels.formats.groups import Stack
    from nvfp4_kernels.model.config import HybridConfig
    from nvfp4_kernels.model.hybrid import HybridModel
    from nvfp4_kernels.model.presets import preset
    from nvfp4_kernels.nn.linear import Linear
    from nvfp4_kernels.nn.moe import Experts, Router
    from nvfp4_kernels.ops._device import default_device
    from nvfp4_kernels.recipe import get_recipe

    config = HybridConfig.load(arguments.config) if arguments.config else preset(arguments.preset)
    recipe = get_recipe(arguments.recipe)
    with torch.device("meta"):
        model = HybridModel(config, recipe=recipe)
    layers, quantized = [], {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found = [(name, name, "weight", module.recipe, arguments.tokens)]
        elif isinstance(module, Experts):
            rows = max(1, arguments.tokens * config.num_experts_per_tok // config.n_routed_experts)
            found = [(f"{name}.{part}", name, part, module.recipes[part], rows) for part in ("up_proj", "down_proj")]
        elif isinstance(module, Router):
            found = [(name, name, "weight", None, arguments.tokens)]
        else:
            continue
        for label, owner, part, linear_recipe, rows in found:
            weight = model.get_submodule(owner).get_parameter(part)
            depth = model._depth(label)
            if linear_recipe is None:
                formats, why = {name: "fp32" for name in OPERANDS}, "router"
                with torch.device(default_device()):
                    backend = _taken("router_logits", torch.empty(rows, weight.shape[1], dtype=torch.bfloat16), weight)
            else:
                formats = {name: _format(getattr(linear_recipe, name)) for name in OPERANDS}
                why = recipe.explain(label, depth)[1]
                with torch.device(default_device()):
                    if isinstance(module, Experts) and not linear_recipe.quantized:
                        x = torch.empty(rows, weight.shape[-1], dtype=torch.bfloat16)
                        backend = _taken("grouped_matmul", Stack(x), Stack(weight), None, x.dtype)
                    else:
                        backend = _backend(linear_recipe, rows, *weight.shape[-2:])
            quantized[f"{owner}.{part}"] = formats["fprop_w"].split(":")[0]
            layers.append({
                "layer": label, "weight": list(weight.shape), "rows": rows, "operands": formats, "backend": backend,
                "why": why,
            })  # fmt: skip
    return {
        "model": arguments.config or arguments.preset, "recipe": recipe.name, "layers": layers,
        "weights": _totals(model, quantized),
    }  # fmt: skip


def _format(spec) -> str:
    """nvfp4 with what is particular about it: "nvfp4:16x16", "nvfp4:sr+rht", "mxfp8", "bf16"."""
    if spec is None:
        return "bf16"
    if spec.format == "mxfp8":
        return "mxfp8"
    marks = ["16x16"] if spec.block == "16x16" else []
    marks += ["sr"] if spec.stochastic else []
    marks += ["rht"] if spec.hadamard is not None else []
    marks += ["4/6"] if spec.four_over_six else []
    return "nvfp4" + (":" + "+".join(marks) if marks else "")


def _backend(recipe, rows: int, out: int, inner: int) -> str:
    """Who quantizes x, w and dy and who multiplies in the three GEMMs, asked with operands of the layer's own sizes."""
    import torch

    from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor

    if not recipe.quantized:
        return "torch"

    def operand(spec, height: int, width: int):
        if spec is None:
            return torch.empty(height, width, dtype=torch.bfloat16)
        blocks = -(-width // spec.run)
        if spec.format == "mxfp8":
            return MXFP8Tensor(
                torch.empty(height, blocks * 32, dtype=torch.float8_e4m3fn),
                torch.empty(height, blocks, dtype=torch.uint8),
                (height, width),
            )
        return NVFP4Tensor(
            torch.empty(height, blocks * 8, dtype=torch.uint8),
            torch.empty(height, blocks, dtype=torch.float8_e4m3fn),
            torch.ones(()),
            (height, width),
            spec.hadamard,
        )

    def pair(height: int, width: int, row, col) -> str:
        noise = torch.zeros(2, dtype=torch.int64)
        return _taken("quantize", torch.empty(height, width, dtype=torch.bfloat16), row, col, noise)

    def product(a, b, height: int, width: int, depth: int) -> str:
        operands = operand(a, height, depth), operand(b, width, depth)
        return _taken("matmul", *operands, None, torch.bfloat16, None, False)

    pairs = {
        "x": pair(rows, inner, recipe.fprop_x, recipe.wgrad_x),
        "w": pair(out, inner, recipe.fprop_w, recipe.dgrad_w),
        "dy": pair(rows, out, recipe.dgrad_dy, recipe.wgrad_dy),
    }
    products = {
        "fprop": product(recipe.fprop_x, recipe.fprop_w, rows, out, inner),
        "dgrad": product(recipe.dgrad_dy, recipe.dgrad_w, rows, inner, out),
        "wgrad": product(recipe.wgrad_dy, recipe.wgrad_x, out, inner, rows),
    }
    quantize, matmul = _alike("quantize", pairs), _alike("matmul", products)
    first = pairs["x"]
    return first if {first} == {*pairs.values(), *products.values()} else f"{quantize}, {matmul}"


def _taken(op: str, *call) -> str:
    from nvfp4_kernels.ops import _dispatch

    reasons = _dispatch.refusals(op, *call)
    name = next((name for name, reason in reasons.items() if reason is None), "none")
    why = ["measured by nvfp4 tune"] if _dispatch.measured(op, call) == name else []
    why += [f"{n}: {reason}" for n, reason in reasons.items() if reason is not None]
    return f"{name} ({'; '.join(why)})" if why else name


def _alike(op: str, answers: dict[str, str]) -> str:
    """`op native`, or, where not all calls are served alike, `op x, w native, op dy reference (...)`."""
    by_answer: dict[str, list[str]] = {}
    for call, answer in answers.items():
        by_answer.setdefault(answer, []).append(call)
    if len(by_answer) == 1:
        return f"{op} {next(iter(by_answer))}"
    return ", ".join(f"{op} {' and '.join(calls)} {answer}" for answer, calls in by_answer.items())


def _totals(model, quantized: dict[str, str]) -> dict[str, dict[str, float]]:
    """Parameters and bytes by the format a weight is computed in; master weights apart."""
    totals: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        # What no GEMM reads through a recipe: norms, A_log and the like in fp32, embeddings in bf16.
        kind = quantized.get(name, "bf16" if "embeddings" in name else "fp32")
        entry = totals.setdefault(kind, {"parameters": 0, "bytes": 0})
        entry["parameters"] += parameter.numel()
        entry["bytes"] += int(parameter.numel() * BITS[kind] / 8)
    count = sum(entry["parameters"] for entry in totals.values())
    total = {"parameters": count, "bytes": sum(entry["bytes"] for entry in totals.values())}
    return totals | {"total": total, "fp32 masters": {"parameters": count, "bytes": 4 * count}}


def render(report: dict, every: bool) -> str:
    from nvfp4_kernels.cli.text import columns

    rows = [["layer", "weight", "fprop x · w", "dgrad dy · w", "wgrad dy · x", "backend", "why"]]
    for names, layer in _grouped(report["layers"], every):
        o = layer["operands"]
        rows.append(
            [
                names,
                "x".join(map(str, layer["weight"])),
                f"{o['fprop_x']} · {o['fprop_w']}",
                f"{o['dgrad_dy']} · {o['dgrad_w']}",
                f"{o['wgrad_dy']} · {o['wgrad_x']}",
                layer["backend"],
                layer["why"],
            ]
        )
    lines = [f"{report['model']}, recipe {report['recipe']}", *columns(rows), ""]
    totals = [["weights in", "parameters", "bytes"]]
    for kind, entry in report["weights"].items():
        totals.append([kind, f"{entry['parameters']:,}", f"{entry['bytes'] / 1e9:.3f} GB"])
    notes = (
        "16x16: one scale for a tile · sr: stochastic rounding · rht: random Hadamard transform · 4/6: four over six"
    )
    return "\n".join([*lines, *columns(totals, right=(1, 2)), notes])


def _grouped(layers: list[dict], every: bool) -> list[tuple[str, dict]]:
    """Layers that differ in their index alone, together: backbone.layers.[0-12].mixer.in_proj."""
    groups: dict[tuple, list] = {}
    for layer in layers:
        prefix, found, rest = layer["layer"].partition("layers.")
        index, _, tail = rest.partition(".")
        key = (layer["layer"],) if every or not found else (prefix, tail, json.dumps({**layer, "layer": ""}))
        groups.setdefault(key, []).append((index, layer))
    named = []
    for key, members in groups.items():
        first = members[0][1]
        name = first["layer"] if len(key) == 1 else f"{key[0]}layers.[{ranges([int(i) for i, _ in members])}].{key[1]}"
        named.append((name if len(members) > 1 else first["layer"], first))
    return named
