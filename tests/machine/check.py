"""`nvfp4 check`'s cases on a chip of the machine: python -m tests.machine.check ARCH [BACKEND ...] [--op OP ...]

A line for each case: its op, name, backend, result, seconds, and the kernels that ran; of a failure what it was.
"""

import argparse
import os
import time

os.environ["TRITON_INTERPRET"] = "0"

from nvfp4_kernels.testing import cases, run  # noqa: E402
from tests.machine import launch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", type=int)
    parser.add_argument("backends", nargs="*", default=["triton"])
    parser.add_argument("--op", nargs="+", default=list(cases._MAKERS))
    parser.add_argument("--case", default="", help="a part of the case's name")
    given = parser.parse_args()
    for op in given.op:
        for backend in given.backends:
            for case in cases.cases(op):
                if given.case in case.name:
                    checked(given.arch, case, backend)


def checked(arch: int, case, backend: str) -> None:
    began = time.perf_counter()
    with launch.chip(arch) as launched:
        row = run.check(case, backend, "cpu")
        kernels = " ".join(dict.fromkeys(launched))
    seconds = time.perf_counter() - began
    print(f"{row['result']:8}{case.op:16}{backend:8}{seconds:6.1f} s  {case.name}  [{kernels}]", flush=True)
    if "detail" in row:
        print(f"        {row['detail']}", flush=True)


if __name__ == "__main__":
    main()
