"""nvfp4 check: every op on this machine, each backend against the reference, a process for each op."""

import argparse
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HELP = "Check every op of every backend on this machine against the reference, and write a report to send back."
EXAMPLE = "nvfp4 check --device cuda"
SECONDS = 60  # of an op's process without a new line, before it is given up
WHOLE = 110  # of all; what is not through by then is given up too
TOO_LATE = f"not through after {WHOLE} s in all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one"
    )
    parser.add_argument("--op", metavar="NAME", default=None, help="one op alone; default: all; e.g. --op quantize")
    parser.add_argument(
        "--out", metavar="FILE", default="nvfp4-check.json", help="the report; default nvfp4-check.json"
    )


def run(arguments: argparse.Namespace) -> int:
    from nvfp4_kernels.cli import info
    from nvfp4_kernels.cli.main import nearest
    from nvfp4_kernels.cli.models import check_file
    from nvfp4_kernels.ops import _device, _dispatch

    check_file("out", arguments.out)
    device = arguments.device or _device.default_device()
    _known_device(device)
    if arguments.op not in (None, *_dispatch.TABLE):
        raise ValueError(f"op: no op {arguments.op}; {nearest(arguments.op, _dispatch.TABLE)}")
    ops = [arguments.op] if arguments.op else list(_dispatch.TABLE)
    began = time.monotonic()
    with ThreadPoolExecutor(min(len(ops), os.cpu_count() or 1, 8)) as pool:
        order = pool.submit(_probe, device)
        of_each = pool.map(lambda op: check(op, _dispatch.TABLE[op], device, began + WHOLE), ops)
        found = dict(zip(ops, of_each, strict=True))
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "machine": info.collect(),
        "stochastic_rounding": order.result(),
        "ops": found,
    }
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    print(f"{time.monotonic() - began:.0f} s; the whole report is in {arguments.out}")
    return 1 if any(row["result"] in BAD for rows in found.values() for row in rows) else 0


BAD = ("FAIL", "error", "crash", "not run")


def check(op: str, backends: tuple[str, ...], device: str, until: float) -> list[dict]:
    """The results of one op, a dict for each case and backend; a backend that takes its process down costs its own only.

    until: of time.monotonic, when there is no time left.
    """
    rows, left = [], list(backends)
    while left:
        late = time.monotonic() >= until
        made, ending = ([], TOO_LATE) if late else _process(op, device, left, until)
        rows += [row for row in made if row["result"] != "started"]
        if ending is None:
            return rows
        at = made[-1] if made else {"case": "before the first", "backend": left[0], "result": "started"}
        case = at["case"] if at["result"] == "started" else f"after {at['case']}"
        result = "not run" if late else "crash"
        rows.append({"case": case, "backend": at["backend"], "result": result, "detail": ending})
        left = left[left.index(at["backend"]) + 1 :]
    return rows


def _process(op: str, device: str, backends: list[str], until: float) -> tuple[list[dict], str | None]:
    """The lines of a process that checks these backends, and how it ended when not well."""
    command = [sys.executable, "-m", "nvfp4_kernels.testing.run", op, device, *backends]
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()
    complaints: list[str] = []

    def read():
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threads = [threading.Thread(target=read), threading.Thread(target=lambda: complaints.extend(child.stderr))]
    for thread in threads:
        thread.start()
    rows, ending = [], None
    try:
        while (line := lines.get(timeout=max(0, min(SECONDS, until - time.monotonic())))) is not None:
            rows.append(json.loads(line))
    except queue.Empty:
        ending = f"nothing within {SECONDS} s" if time.monotonic() < until else TOO_LATE
        child.kill()
    status = child.wait()
    for thread in threads:
        thread.join()
    if status and ending is None:
        last = next((line.strip() for line in reversed(complaints) if line.strip()), "")
        ending = f"signal {-status}" if status < 0 else f"exit status {status}: {last[:300]}"
    return rows, ending


def _known_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"device: got {device!r} ({text}); allowed: cpu, or a device that torch sees") from None


def _probe(device: str) -> list[dict] | str:
    """In a process too: what asks a chip may take it down."""
    code = "import json, sys; from nvfp4_kernels.testing.rounding_probe import probe; print(json.dumps(probe(sys.argv[1])))"
    command = [sys.executable, "-c", code, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"could not be asked: nothing within {SECONDS} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return f"could not be asked: {last[:300]}"
    return json.loads(done.stdout)


def render(report: dict) -> str:
    from nvfp4_kernels.cli.text import columns

    backends = list(dict.fromkeys(row["backend"] for rows in report["ops"].values() for row in rows))
    notes: dict[str, int] = {}
    table = [[report["device"], *backends]]
    for op, rows in report["ops"].items():
        cells = [_cell([row for row in rows if row["backend"] == name], notes) for name in backends]
        table.append([op, *cells])
    lines = columns(table) + [f"[{number}] {text}" for text, number in notes.items()]
    for op, rows in report["ops"].items():
        lines += [
            f"{op}, {r['backend']}, {r['case']}: {r['result']}: {r['detail']}" for r in rows if r["result"] in BAD
        ]
    order = report["stochastic_rounding"]
    if isinstance(order, str):
        lines.append(f"stochastic rounding: {order}")
    else:
        for value, answer in enumerate(order):
            read = ", ".join(f"bit {bit}: 2^{weight}" for bit, weight in answer["weights"].items())
            lines.append(
                f"stochastic rounding: operand {value} lands in nibble {answer['nibble']}, reads {read or 'nothing'}"
            )
    return "\n".join(lines)


def _cell(rows: list[dict], notes: dict[str, int]) -> str:
    """What a backend did over all cases of an op: how many passed, and the worst that happened."""
    if not rows:
        return "-"
    results = [row["result"] for row in rows]
    passed, worst = results.count("pass"), next((bad for bad in BAD if bad in results), None)
    if worst:
        return f"{worst} ({passed} of {len(rows)} pass)"
    refused = [row["detail"] for row in rows if row["result"] == "refused"]
    marks = ", ".join(f"[{notes.setdefault(text, len(notes) + 1)}]" for text in dict.fromkeys(refused))
    if not passed:
        return f"no {marks}"
    return f"pass {passed}" + (f", refused {len(refused)} {marks}" if refused else "")
