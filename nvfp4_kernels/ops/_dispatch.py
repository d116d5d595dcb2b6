"""Who runs what: one table, read at call time.

TABLE names the implementations of each op, in the order in which they are asked. An implementation is the module of that name
in the op's folder; its `refuses(...)` gives None or the reason it cannot serve the call, its `run(...)` serves it.

On CPUs the order is measured (benchmarks/results/amd-epyc-avx512bf16.json). On GPUs, where "native" is CUDA, it is not: there
are no figures of a GPU yet. It is predicted there, from the bytes that the kernels move and the instructions that they are
compiled to (benchmarks/bounds.py, which writes benchmarks/results/bounds.json): TRITON_FIRST has the calls in which Triton's
bound is clearly the shorter; CUDA keeps its place where the bounds are close, or nobody has worked them out.

First comes what the user names (NVFP4_BACKEND, `backend`), then what `nvfp4 tune` measured on this machine, then what came
measured with the package (_tuned.py), then TRITON_FIRST, then TABLE.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

from nvfp4_kernels.ops import _device, _tuned

TABLE: dict[str, tuple[str, ...]] = {
    "quantize": ("native", "triton", "reference"),
    "dequantize": ("native", "triton", "reference"),
    "hadamard": ("native", "triton", "reference"),
    "matmul": ("native", "triton", "reference"),
    "grouped_matmul": ("native", "triton", "reference"),
    "grouped_relu2": ("native", "triton", "reference"),
    "expert_mlp": ("native", "triton", "reference"),
    "moe_step": ("native", "reference"),
    "route": ("native", "triton", "reference"),
    "router_logits": ("native", "reference"),
    "permute": ("native", "triton", "reference"),
    "causal_conv1d": ("native", "triton", "reference"),
    "selective_scan": ("native", "triton", "reference"),
    "conv_scan": ("native", "triton", "reference"),
    "state_update": ("native", "triton", "reference"),
    "gated_rms_norm": ("native", "triton", "reference"),
    "mixer_step": ("native", "reference"),
    "mixer_scan": ("native", "triton", "reference"),
    "relu2": ("native", "triton", "reference"),
}
# By op and kind of calls (_tuned.KINDS), the targets of csrc on which Triton is asked before CUDA. Predicted, not measured:
# benchmarks/results/bounds.json, to which a test holds it. Target 80, which serves all of its generation, is judged by A100.
FAST_MEMORY = ("80", "90a", "100a", "103a")
TRITON_FIRST: dict[str, dict[str, tuple[str, ...]]] = {
    "state_update": {
        f"{dtype}, {few} sequences, noise": FAST_MEMORY for dtype in ("float16", "bfloat16") for few in ("few", "many")
    },
}
BACKENDS = tuple(dict.fromkeys(name for names in TABLE.values() for name in names))

_modules: dict[tuple[str, str], ModuleType] = {}


class Refused(RuntimeError):
    """No allowed implementation can serve the call; the message, and `reasons` by backend, say why."""

    def __init__(self, message: str, reasons: dict[str, str | None]):
        super().__init__(message)
        self.reasons = reasons


def _parse(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ValueError(f"backend: got {', '.join(unknown)}; allowed: {', '.join(BACKENDS)}, or several with commas")
    return names


# A module global and no ContextVar: autograd runs backward on threads of its own.
_forced: tuple[str, ...] = _parse(os.environ.get("NVFP4_BACKEND", ""))


@contextlib.contextmanager
def backend(*names: str) -> Iterator[None]:
    """Allow only the named backends, in this order: `with nk.backend("reference"):`.

    A call that none of them can serve raises Refused with the reasons. NVFP4_BACKEND=reference (or =native,reference)
    does the same for the whole process. Holds for all threads. Raises ValueError for an unknown name.
    """
    global _forced
    before, _forced = _forced, _parse(",".join(names))
    try:
        yield
    finally:
        _forced = before


def implementation(op: str, name: str) -> ModuleType:
    """The module that implements `op` in backend `name`."""
    key = (op, name)
    if key not in _modules:
        _modules[key] = importlib.import_module(f"nvfp4_kernels.ops.{op}.{name}")
    return _modules[key]


def candidates(op: str, args: tuple = ()) -> tuple[str, ...]:
    """The backends that may serve `op` now, in order of preference; args: those of the call, where there is one."""
    first = None if _forced or not args else measured(op, args) or predicted(op, args)
    return (_forced or TABLE[op]) if first is None else (first, *(name for name in TABLE[op] if name != first))


def measured(op: str, args: tuple) -> str | None:
    """The backend that was the fastest in such a call on its device; None where nobody has measured."""
    if op not in _tuned.KINDS:
        return None
    return _tuned.answer(args[0].device, (None, *TABLE[op]), lambda: f"{op}: {_tuned.KINDS[op](*args)}")


def predicted(op: str, args: tuple) -> str | None:
    """The backend whose bound is the shorter in such a call on its device; None where that is the table's, or not known."""
    target = _device.cuda_target(args[0].device) if op in TRITON_FIRST else None
    return "triton" if target and target in TRITON_FIRST[op].get(_tuned.KINDS[op](*args), ()) else None


def forced(name: str) -> bool:
    """Whether the user named this backend, alone or among others."""
    return name in _forced


def refusals(op: str, *args) -> dict[str, str | None]:
    """For each candidate: None, or why it cannot serve a call with these arguments."""
    return {
        name: implementation(op, name).refuses(*args) if name in TABLE[op] else f"{op} has no {name} implementation"
        for name in candidates(op, args)
    }


def select(op: str, *args) -> ModuleType:
    """The first candidate that can serve the call. Raises Refused, with each one's reason, when there is none."""
    # a CPU's order is the table's: a decoded token would feel the question
    asked = op in _tuned.KINDS and (not args[0].is_cpu or _tuned.trial is not None)
    for name in candidates(op, args if asked else ()):
        if name in TABLE[op] and implementation(op, name).refuses(*args) is None:
            return implementation(op, name)
    reasons = refusals(op, *args)
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    others = (
        f"; allow more, as in NVFP4_BACKEND={_forced[0]},reference" if _forced and "reference" not in _forced else ""
    )
    raise Refused(f"{op}: no allowed backend can serve this call ({told}){others}", reasons)
