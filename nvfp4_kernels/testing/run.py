"""One op's cases on one device, a line of JSON for each result: python -m nvfp4_kernels.testing.run OP DEVICE BACKEND ...

nvfp4 check starts this in a process of its own, so that a kernel that takes the process down costs one cell of its table.
"""

import json
import sys
import traceback

import torch

from nvfp4_kernels.formats.tensor import QuantizedTensor
from nvfp4_kernels.ops import _dispatch
from nvfp4_kernels.testing.case import Case
from nvfp4_kernels.testing.cases import cases
from nvfp4_kernels.testing.compare import difference


def check(case: Case, backend: str, device: str) -> dict:
    """{"case", "backend", "result"}: "pass", "refused", "FAIL" or "error", and "detail" for the last three."""
    about = {"case": case.name, "backend": backend}
    inputs = case.make()
    with _dispatch.backend("reference"):
        wanted = case.run(**inputs)
    moved = {name: x.to(device) if isinstance(x, (torch.Tensor, QuantizedTensor)) else x for name, x in inputs.items()}
    try:
        with _dispatch.backend(backend):
            got = case.run(**moved)
            if device != "cpu":
                torch.cuda.synchronize(device)
    except _dispatch.Refused as refusal:
        return about | {"result": "refused", "detail": refusal.reasons[backend]}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place.name}, line {place.lineno})"
        return about | {"result": "error", "detail": text}
    found = [text for name in wanted if (text := difference(name, got[name], wanted[name], case.tolerance))]
    return about | ({"result": "FAIL", "detail": found[0]} if found else {"result": "pass"})


def main(op: str, device: str, *backends: str) -> None:
    torch.manual_seed(0)
    for backend in backends:
        for case in cases(op):
            print(json.dumps({"case": case.name, "backend": backend, "result": "started"}), flush=True)
            row = check(case, backend, device)
            if row["result"] == "error" and _lost(device):
                sys.exit(f"the device answers no more after {row['detail']}")
            print(json.dumps(row), flush=True)


def _lost(device: str) -> bool:
    """Whether the device refuses all that this process asks of it from now on, as after a wrong address."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
