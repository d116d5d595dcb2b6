"""The process in which benchmarks/gpu/run.py has its cases timed: python benchmarks/gpu/measure.py DEVICE LOG [--small] ...

Each line of the log says what comes next and where to resume if it is the end of this process (a kernel that crashes, loses
the device or hangs), or has what a run gave.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
OURS = ("native", "triton")
LOST = 3  # exit status: nothing more can be done with the device in this process
FEW = 20  # milliseconds for a size of a curve, 80 for a case that counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("log", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", metavar="OP")
    parser.add_argument("--resume", type=int, nargs=2, default=(0, 0), metavar=("GROUP", "RUN"))
    given = parser.parse_args()
    if given.small:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    import torch

    torch.manual_seed(0)
    with given.log.open("a", buffering=1) as log:
        return measure(given, lambda **line: log.write(json.dumps(line) + "\n"))


def measure(given: argparse.Namespace, tell: Callable[..., object]) -> int:
    import nvfp4_kernels as nk
    from benchmarks.gpu.cases import finite
    from nvfp4_kernels.tune.measure import timer

    tell(resume=given.resume, what="the limits")
    usual, few = timer(given.device), timer(given.device, FEW)
    limits = {"copy": copy_rate(given, usual), "matmul": matmul_rate(given, usual)}
    print("  ".join(f"{name} {rate / 1e9:,.0f} G/s" for name, rate in limits.items()), flush=True)
    for resume, sweep, case, name, run, backends in runs(given, tell):
        what = f"{case.op}, {case.name}, {name}"
        tell(resume=resume, what=what)
        try:
            with nk.backend(*backends):
                if not finite(run()):
                    raise ArithmeticError("the result is not finite")
                median = (few if sweep else usual)(run)
        except nk.Refused:
            continue
        except Exception as error:
            complain(what, error)
            if is_lost(given.device):
                return LOST
            continue
        extra = {key: value for key, value in case.about.items() if key != "limit"}
        extra["limit_bytes" if "bytes" in extra else "limit_flops"] = limits[case.about["limit"]]
        extra |= dict(op=case.op, case=case.name, backend=name, yardstick=name in case.theirs)
        extra["dtype"] = "" if extra["yardstick"] else extra["dtype"]  # a yardstick's is in its name
        tell(entry={"extra_info": extra, "stats": {"median": median}})
        print(f"{what}: {median * 1e6:,.1f} us", flush=True)
    return 0


def runs(given: argparse.Namespace, tell: Callable[..., object]) -> Iterator[tuple]:
    """Every run from given.resume on: where to resume behind it, whether it is of a sweep, its case, name, function, backends.

    First every group at the sizes that count, then those of the curves. A group ends where its inputs cannot be made.
    """
    from benchmarks.gpu.cases import GROUPS

    first, skipped = given.resume
    turns = [(group, sweep) for sweep in (False, True) for group in GROUPS]
    for index, (group, sweep) in list(enumerate(turns))[first:]:
        made, count = group(given.device, given.small, sweep), 0
        while True:
            what = f"{group.__name__}: inputs"
            tell(resume=(index + 1, 0), what=what)
            try:
                case = next(made, None)
            except Exception as error:
                complain(what, error)
                if is_lost(given.device):
                    sys.exit(LOST)
                break
            if case is None:
                break
            ours = [(name, case.ours, (name,)) for name in OURS] if case.forced else [("nvfp4_kernels", case.ours, ())]
            for name, run, backends in ours + [(name, run, ()) for name, run in case.theirs.items()]:
                count += 1
                if given.only in (None, case.op) and (index > first or count > skipped):
                    yield (index, count), sweep, case, name, run, backends


def complain(what: str, error: Exception) -> None:
    print(f"{what}: {type(error).__name__}: {error}"[:400], file=sys.stderr, flush=True)


def is_lost(device: str) -> bool:
    """Whether the device gives only errors from now on; memory that an error has freed goes back to it."""
    import torch

    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def copy_rate(given: argparse.Namespace, seconds) -> float:
    import torch

    source = torch.ones(1 << (16 if given.small else 29), dtype=torch.bfloat16, device=given.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(3))


def matmul_rate(given: argparse.Namespace, seconds) -> float:
    import torch

    n = 64 if given.small else 8192
    a, b = torch.randn(2, n, n, device=given.device).bfloat16()
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b.t()) for _ in range(3))


if __name__ == "__main__":
    sys.exit(main())
