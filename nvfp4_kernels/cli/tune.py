"""nvfp4 tune: which backend and which tiles are the fastest on this machine's GPU; what is found serves every later process."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

HELP = "Measure, once, which backends and tiles are the fastest on this GPU; later calls use them."
EXAMPLE = "nvfp4 tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU, kernels interpreted; writes nothing"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        default=None,
        help="begin nothing more after S s; default: all; e.g. --seconds 60",
    )
    parser.add_argument(
        "--save-default",
        metavar="FILE",
        default=None,
        help="no measuring: make what FILE, a result of make gpu, found the package's default for its architecture",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.seconds is not None and not arguments.seconds >= 0:
        raise ValueError(f"seconds: got {arguments.seconds}; allowed: 0 or more")
    if arguments.save_default:
        print(f"in {save_default(Path(arguments.save_default))}")
        return 0
    if arguments.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    from nvfp4_kernels.ops import _device, _triton, _tuned
    from nvfp4_kernels.tune.measure import timer

    gpu = next((chip for chip in _device.chips() if chip.arch != "cpu"), None)
    missing = _triton.missing if gpu or arguments.rehearse else "no GPU here"
    if missing:
        print(f"{missing}, so there is nothing to tune")
        return 0
    if arguments.rehearse:
        tune("cpu", True, timer("cpu"), lambda found: None, arguments.seconds)
        return 0
    tune(gpu.device, False, timer("cuda"), lambda found: _tuned.save(gpu, found), arguments.seconds)
    print(f"in {_tuned.path(gpu)}")
    return 0


def tune(device: str, small: bool, timer, save, seconds: float | None) -> None:
    """Backends first, then tiles, for which kernels are compiled. Saves after each case: what was found stays if this ends."""
    from nvfp4_kernels.tune.cases import cases
    from nvfp4_kernels.tune.measure import backends, tiles

    began = time.monotonic()
    for decide in (backends, tiles):
        for case in cases(device, small):
            if seconds is not None and time.monotonic() - began > seconds:
                print(f"no time left for the {decide.__name__} of {case.name} and what follows")
                return
            try:
                found = decide(case, timer)
            except Exception as error:  # of a kernel, or of a GPU that is too small
                print(f"{case.name}: {type(error).__name__}: {error}"[:400], file=sys.stderr)
                continue
            save(found)
            for question, entry in found.items():
                times = ", ".join(f"{name} {us:,.1f} us" for name, us in entry["us"].items())
                print(f"{question}: {json.dumps(entry['answer'])} of {times}", flush=True)


def save_default(results: Path) -> Path:
    """The file of the package, written of a result's. Raises ValueError for one that was not tuned."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no JSON"
        raise ValueError(f"save-default: {results}: {why}; allowed: what make gpu wrote on a GPU") from None
    from nvfp4_kernels.ops import _tuned

    if not isinstance(found, dict) or not found.get("tuned"):
        raise ValueError(f"save-default: {results} holds nothing tuned; allowed: what make gpu wrote on a GPU")
    about = {"device": found["device"], "results": f"benchmarks/results/{results.name}", "answers": found["tuned"]}
    target = _tuned.shipped(found["arch"])
    target.write_text(json.dumps(about, indent=1) + "\n")
    return target
