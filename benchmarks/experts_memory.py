"""Memory of one training step of the experts' two matrices, from the token matrix to its gradient, beside torch's own parts.

    python benchmarks/experts_memory.py                 a table for the sizes below
    python benchmarks/experts_memory.py --tokens 2048

saved: bytes of the tensors that autograd keeps from forward for backward, each storage once, without the parameters, the token
matrix and the routing, which all variants are given. peak: the most that lives at once during the step beyond what lived before
it, gradients included: on a GPU torch's own count, on a CPU the sum of what torch's allocator hands out and gets back, as its
profiler records it (the scratch memory of C++ kernels, some hundred KB a thread, is not in it). formula: what backward needs,
per pair of token and expert: the hidden values in bf16 (2 bytes x width) and, in NVFP4, wgrad's operands in four bits
(9 / 16 byte x (size + width)), without the padding of groups to whole blocks.
The yardstick: x.index_select for the gather, torch._grouped_mm, the squared ReLU and the weight in torch, index_add_.
"""

import argparse
import json

import torch
from torch.profiler import ProfilerActivity, profile

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.experts import quantize_experts
from nvfp4_kernels.recipe import HIGH, NVFP4

SIZES = {  # experts, top_k, size (hidden or latent), width
    "Nano / 16": (128, 6, 672, 464),
    "Super / 16": (512, 22, 256, 672),
}


def grouped_mm(x, up, down, routing, weights):
    top_k, offsets = routing.indices.shape[1], routing.offsets[1:].int()
    token = routing.order // top_k
    rows = x.index_select(0, token)
    up, down = (w.to(x.dtype).transpose(1, 2) for w in (up, down))
    hidden = torch._grouped_mm(rows, up, offs=offsets)
    hidden = (hidden.relu().square() * weights[:, None]).to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, torch._grouped_mm(hidden, down, offs=offsets))


def ours(recipe, forms):
    def block(x, up, down, routing, weights):
        noises = torch.tensor([1, 0], device=x.device), torch.tensor([2, 0], device=x.device)
        y = nk.experts(x, up, down, routing, weights, (recipe, recipe), noises, forms)
        return nk.unpermute(y, routing)

    return block


def saved_bytes(call, given: set[int]) -> int:
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call()  # alive until all is counted, and so no address is used twice
    size = sum(bytes for place, bytes in kept.items() if place not in given)
    del y
    return size


def peak_bytes(step, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    living = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        living += event.nbytes()
        most = max(most, living)
    return most


def measured(name: str, tokens: int, device: torch.device) -> list[dict]:
    count, top_k, size, width = SIZES[name]
    x = torch.randn(tokens, size, device=device).bfloat16().requires_grad_()
    up, down = (
        torch.nn.Parameter(torch.randn(count, *shape, device=device) * 0.05) for shape in ((width, size), (size, width))
    )
    routing = nk.route(torch.randn(tokens, count, device=device), None, top_k)
    weights = torch.rand(tokens * top_k, device=device).requires_grad_()
    forms = [quantize_experts(w, NVFP4) for w in (up, down)]
    formula = {"bf16": 2 * width, "nvfp4": 2 * width + (size + width) * 9 / 16}
    given = [x, up, down, weights, *routing.__dict__.values(), *[p for pair in forms for f in pair for p in f[:3]]]
    places = {t.untyped_storage().data_ptr() for t in given}
    dy, rows = torch.randn(tokens, size, device=device).bfloat16(), []
    for variant, call, kind in (
        ("torch._grouped_mm", grouped_mm, "bf16"),
        ("nvfp4_kernels, bf16", ours(HIGH, (None, None)), "bf16"),
        ("nvfp4_kernels, nvfp4", ours(NVFP4, tuple(forms)), "nvfp4"),
    ):
        leaves = (x, up, down, weights)

        def step(call=call, leaves=leaves):
            return torch.autograd.grad(call(x, up, down, routing, weights), leaves, dy)

        step()
        saved = saved_bytes(lambda call=call: call(x, up, down, routing, weights), places)
        rows.append({
            "case": name, "tokens": tokens, "variant": variant, "device": device.type,
            "saved_bytes_a_token": round(saved / tokens), "formula_bytes_a_token": round(top_k * formula[kind]),
            "peak_bytes_a_token": round(peak_bytes(step, device) / tokens),
            "weight_gradients_bytes_a_token": round(2 * up.nbytes / tokens),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES:
        for row in measured(name, given.tokens, device):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
