"""Everything a GPU can tell, in one run: build, nvfp4 check, the tests, the benchmarks, one table.

    make gpu                                       on a machine with a GPU; writes benchmarks/results/<device>.json and .png
    python benchmarks/gpu/run.py --rehearse        tiny sizes on the CPU, the kernels interpreted; writes nothing

Needs nothing from the network: the interpreter that runs this has torch, Triton, pytest, pybind11, CMake, ninja. A step that
fails or overruns is told of in the summary, and the next one runs.
"""

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OURS = ("native", "triton")
# Seconds that a step may take, of 540 for all; benchmarks get what the others leave.
BUILD, CHECK, TESTS, WHOLE = 150, 120, 170, 530


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, benchmarks alone")
    parser.add_argument("--only", metavar="OP", help="benchmarks of one op alone; default: all")
    given = parser.parse_args()
    began = time.monotonic()
    if given.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
        print(table(measure("cpu", True, given.only, began + WHOLE)))
        return 0
    if find_spec("torch") is None and shutil.which("nvidia-smi"):
        print(
            "torch is not installed; do: make gpu PYTHON=an interpreter with torch, Triton and pytest", file=sys.stderr
        )
        return 2
    if not shutil.which("nvidia-smi") or not sees_gpu():
        print("no GPU here, so there is nothing to check or measure")
        return 0
    os.chdir(ROOT)
    steps = {}
    python = sys.executable
    os.environ["NVFP4_CUDA"] = "1"  # the CUDA kernels too; where nvcc is missing NVRTC compiles them at first use
    steps["build"] = step([python, "setup.py", "-q", "build_ext", "--inplace"], BUILD)
    if given.only is None:
        steps["nvfp4 check"] = step([python, "-m", "nvfp4_kernels", "check", "--out", "build/nvfp4-check.json"], CHECK)
        steps["tests"] = step([python, "-m", "pytest", *spread(), "--maxfail=20", "tests"], TESTS)
    rows = measure("cuda", False, given.only, began + WHOLE)
    from nvfp4_kernels.cli.bench import plot, store

    target = store(ROOT / "benchmarks", rows, parts=given.only is not None)
    plot(ROOT / "benchmarks", target)
    print(table(rows))
    for name, told in steps.items():
        print(f"{name:12} {told}")
    print(f"{time.monotonic() - began:.0f} s; in {target.relative_to(ROOT)}")
    return 0 if all(told.startswith("ok") for told in steps.values()) else 1


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def step(command: list[str], seconds: int) -> str:
    """Runs a command with its output shown; what became of it."""
    began = time.monotonic()
    print("$", *command, flush=True)
    child = subprocess.Popen(command, start_new_session=True)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                child.pid, signal.SIGKILL
            )  # what it has started goes too, or it runs beside what is measured next
        child.wait()
    return f"{'ok' if status == 0 else f'exit status {status}'}, {time.monotonic() - began:.0f} s"


def spread() -> list[str]:
    """pytest-xdist's flag, where it is there."""
    return ["-n", str(min(os.cpu_count() or 1, 8))] if find_spec("xdist") else []


def measure(device: str, small: bool, only: str | None, deadline: float) -> list[dict]:
    """Rows as nvfp4 bench writes them; what could not be measured is told of on stderr."""
    import torch

    import nvfp4_kernels as nk
    from benchmarks.gpu.cases import all_cases, finite
    from nvfp4_kernels.cli.bench import rows_of

    torch.manual_seed(0)
    seconds = timer(device)
    limits = {"copy": copy_rate(device, small, seconds), "matmul": matmul_rate(device, small, seconds)}
    print("  ".join(f"{name} {rate / 1e9:,.0f} G/s" for name, rate in limits.items()), flush=True)
    entries = []
    for case in (case for case in all_cases(device, small) if only in (None, case.op)):
        if time.monotonic() > deadline:
            print(f"no time left for {case.op} {case.name} and what follows", file=sys.stderr)
            break
        ours = [(name, case.ours, (name,)) for name in OURS] if case.forced else [("nvfp4_kernels", case.ours, ())]
        for name, run, backends in ours + [(name, run, ()) for name, run in case.theirs.items()]:
            try:
                with nk.backend(*backends):
                    if not finite(run()):
                        raise ArithmeticError("the result is not finite")
                    median = seconds(run)
            except nk.Refused:
                continue
            except Exception as error:
                print(f"{case.op} {case.name}, {name}: {type(error).__name__}: {error}"[:400], file=sys.stderr)
                continue
            extra = {key: value for key, value in case.about.items() if key != "limit"}
            extra["limit_bytes" if "bytes" in extra else "limit_flops"] = limits[case.about["limit"]]
            extra |= dict(op=case.op, case=case.name, backend=name, yardstick=name in case.theirs)
            entries.append({"extra_info": extra, "stats": {"median": median}})
            print(f"{case.op}, {case.name}, {name}: {median * 1e6:,.1f} us", flush=True)
    return rows_of({"benchmarks": entries})


def timer(device: str):
    """Median seconds of a function: CUDA events with the L2 cache flushed before each round; one call on the CPU."""
    if device == "cpu":

        def once(run) -> float:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

        return once
    from triton.testing import do_bench

    return lambda run: do_bench(run, warmup=20, rep=80, return_mode="median") / 1e3


def copy_rate(device: str, small: bool, seconds) -> float:
    import torch

    source = torch.ones(1 << (16 if small else 29), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(3))


def matmul_rate(device: str, small: bool, seconds) -> float:
    import torch

    n = 64 if small else 8192
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b.t()) for _ in range(3))


def table(rows: list[dict]) -> str:
    from nvfp4_kernels.cli.bench import render

    return render(rows)


if __name__ == "__main__":
    sys.exit(main())
