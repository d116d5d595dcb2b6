"""Everything a GPU can tell, in one run: build, nvfp4 check, nvfp4 tune, the tests, the benchmarks, one table.

    make gpu                                       on a machine with a GPU; writes benchmarks/results/<device>.json and .png
    python benchmarks/gpu/run.py --rehearse        tiny sizes on the CPU, the kernels interpreted; writes nothing

Needs nothing from the network: the interpreter that runs this has torch, Triton, pytest, pybind11, CMake, ninja. A step that
fails or overruns is told of in the summary, and the next one runs; so is a benchmark that crashes, and those after it run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURE = ROOT / "benchmarks" / "gpu" / "measure.py"
sys.path.insert(0, str(ROOT))
# Seconds that a step may take, of 540 for all. The tests get what is left but for the benchmarks' share, these all the rest:
# about 200 runs at the sizes that count, 0.1 s each and what compiling takes; then 350 for the curves, 0.03 s each.
BUILD, CHECK, TUNE, BENCHMARKS, WHOLE = 150, 120, 60, 110, 530
OVER = "no time left"
HANGS = 60  # seconds in which a single benchmark must come to an end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, benchmarks alone")
    parser.add_argument("--only", metavar="OP", help="benchmarks of one op alone; default: all")
    given = parser.parse_args()
    deadline = time.monotonic() + WHOLE
    if given.rehearse:
        print(table(measure(["cpu", "--small"], given.only, deadline)))
        return 0
    if not sees_gpu():
        if not driver_sees_gpu():
            print("no GPU here, so there is nothing to check or measure")
            return 0
        print(
            "this machine has a GPU, and torch is not installed or sees none; do: make gpu PYTHON=an interpreter with torch "
            "for CUDA, Triton and pytest",
            file=sys.stderr,
        )
        return 2
    os.chdir(ROOT)
    steps = {}
    python = sys.executable
    os.environ["NVFP4_CUDA"] = "1"  # the CUDA kernels too; where nvcc is missing NVRTC compiles them at first use
    steps["build"] = step([python, "setup.py", "-q", "build_ext", "--inplace"], BUILD)
    if given.only is None:
        steps["nvfp4 check"] = step([python, "-m", "nvfp4_kernels", "check", "--out", "build/nvfp4-check.json"], CHECK)
        steps["nvfp4 tune"] = step([python, "-m", "nvfp4_kernels", "tune", "--seconds", str(TUNE - 15)], TUNE)
        files = sorted(
            (ROOT / "tests").rglob("test_*.py"), key=lambda path: (not path.stem.startswith("test_gpu"), path)
        )
        steps["tests"] = suite(files, deadline - BENCHMARKS - time.monotonic())
    rows = measure(["cuda"], given.only, deadline)
    where = "nothing measured"
    if rows:
        from nvfp4_kernels.cli.bench import plot, store

        where = plot(ROOT / "benchmarks", store(ROOT / "benchmarks", rows, parts=given.only is not None))
        print(table(rows))
    for name, told in steps.items():
        print(f"{name:12} {told}")
    print(f"{time.monotonic() - deadline + WHOLE:.0f} s; {where}")
    return 0 if rows and all(told.startswith("ok") for told in steps.values()) else 1


def sees_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def driver_sees_gpu() -> bool:
    asked = ["nvidia-smi", "--list-gpus"]
    return bool(shutil.which(asked[0])) and "GPU 0" in subprocess.run(asked, capture_output=True, text=True).stdout


def step(command: list[str], seconds: float) -> str:
    """Runs a command with its output shown; what became of it."""
    began = time.monotonic()
    print("$", *command, flush=True)
    child = subprocess.Popen(command, start_new_session=True)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds} s"
    finally:
        end(child)
    return f"{'ok' if status == 0 else f'exit status {status}'}, {time.monotonic() - began:.0f} s"


def end(child: subprocess.Popen) -> None:
    """With what it has started, which would run beside the next step."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def suite(files: list[Path], seconds: float) -> str:
    """Runs tests in a few processes at once; what became of them, each failure printed, and what a process was stopped at."""
    began = time.monotonic()
    count = min(os.cpu_count() or 1, 12, len(files))
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--maxfail=20"]
    command += ["--continue-on-collection-errors"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    print("$", *command, f"tests, in {count} processes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.txt" for i in range(count)]
        with contextlib.ExitStack() as stack:
            children = []
            for i, log in enumerate(logs):
                out = {"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT}
                child = subprocess.Popen([*command, *files[i::count]], **out, env=environment, start_new_session=True)
                stack.callback(end, child)
                children.append(child)
            while time.monotonic() < began + seconds and any(child.poll() is None for child in children):
                time.sleep(0.1)
            statuses = [child.poll() for child in children]
        texts = [log.read_text(errors="replace") for log in logs]
    totals = {}
    for text, status in zip(texts, statuses, strict=True):
        lines = text.rstrip().splitlines() or [""]
        if status is None:  # before its summary: by the lines of each test
            counts = [(1, kind.lower()) for kind in re.findall(r" (PASSED|FAILED|SKIPPED|ERROR)\b.*%\]", text)]
            failures = [line for line in lines if re.search(r" (FAILED|ERROR) +\[", line)] + [f"stopped at {lines[-1]}"]
        else:
            counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
            failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
            failures = failures or (lines[-20:] if status not in (0, 5) else [])
        for number, kind in counts:
            totals[kind] = totals.get(kind, 0) + int(number)
        print(*failures, sep="\n", end="\n" if failures else "")
    told = [f"{number} {kind}" for kind, number in totals.items()]
    if None in statuses:
        told.append(f"{statuses.count(None)} of {count} processes stopped")
    good = all(status in (0, 5) for status in statuses)  # 5: every file of a process was skipped
    return f"{'ok' if good else 'not ok'}, {', '.join([*told, f'{time.monotonic() - began:.0f} s'])}"


def measure(arguments: list[str], only: str | None, deadline: float) -> list[dict]:
    """Rows as nvfp4 bench writes them; what could not be measured is told of on stderr. In a process of its own, and where that
    dies, loses the device or hangs, in another one from the next benchmark on."""
    from nvfp4_kernels.cli.bench import rows_of

    resume = ["0", "0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        while True:
            command = [sys.executable, MEASURE, arguments[0], log, *arguments[1:], "--resume", *resume]
            command += ["--only", only] if only else []
            child = subprocess.Popen(command, start_new_session=True)
            status = watch(child, log, deadline)
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            last = next((line for line in reversed(lines) if "resume" in line), {"what": "nothing", "resume": (0, 0)})
            if status == OVER:
                print(f"{status} for {last['what']} and what follows", file=sys.stderr)
            elif status != "exit status 0":
                print(f"{last['what']}: {status}", file=sys.stderr)
                before, resume = resume, [str(number) for number in last["resume"]]
                if resume != before:
                    continue
            return rows_of({"benchmarks": [line["entry"] for line in lines if "entry" in line]})


def watch(child: subprocess.Popen, log: Path, deadline: float) -> str:
    """Waits for a process that writes a log, and ends it where it stops to; what became of it."""
    size, since = -1, time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if log.stat().st_size != size:
                size, since = log.stat().st_size, now
            if now > deadline:
                return OVER
            if now > since + HANGS:
                return f"hung for {HANGS} s"
        return f"exit status {child.returncode}"
    finally:
        end(child)


def table(rows: list[dict]) -> str:
    from nvfp4_kernels.cli.bench import render

    return render(rows)


if __name__ == "__main__":
    sys.exit(main())
