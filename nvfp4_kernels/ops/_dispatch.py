"""Who runs what: one table, read at call time.

TABLE names the implementations of each op, fastest first as measured. An implementation is the module of that name in the
op's folder; its `refuses(...)` gives None or the reason it cannot serve the call, its `run(...)` serves it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

TABLE: dict[str, tuple[str, ...]] = {
    "quantize": ("native", "triton", "reference"),
    "dequantize": ("native", "triton", "reference"),
    "hadamard": ("native", "triton", "reference"),
    "matmul": ("native", "triton", "reference"),
    "grouped_matmul": ("native", "triton", "reference"),
    "expert_mlp": ("native", "triton", "reference"),
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


def candidates(op: str) -> tuple[str, ...]:
    """The backends that may serve `op` now, in order of preference."""
    return _forced or TABLE[op]


def forced(name: str) -> bool:
    """Whether the user named this backend, alone or among others."""
    return name in _forced


def refusals(op: str, *args) -> dict[str, str | None]:
    """For each candidate: None, or why it cannot serve a call with these arguments."""
    return {
        name: implementation(op, name).refuses(*args) if name in TABLE[op] else f"{op} has no {name} implementation"
        for name in candidates(op)
    }


def select(op: str, *args) -> ModuleType:
    """The first candidate that can serve the call. Raises Refused, with each one's reason, when there is none."""
    for name in candidates(op):
        if name in TABLE[op] and implementation(op, name).refuses(*args) is None:
            return implementation(op, name)
    reasons = refusals(op, *args)
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    others = (
        f"; allow more, as in NVFP4_BACKEND={_forced[0]},reference" if _forced and "reference" not in _forced else ""
    )
    raise Refused(f"{op}: no allowed backend can serve this call ({told}){others}", reasons)
