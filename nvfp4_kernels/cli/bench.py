"""nvfp4 bench: runs benchmarks/bench_<op>.py under pytest-benchmark and prints one table."""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HELP = "Run the benchmarks, print one table, write benchmarks/results/<device>.json and a plot."
EXAMPLE = "nvfp4 bench --op quantize"
NOTHING_RAN = 5  # pytest's exit status where no test is left
PEERS = ("triton", "transformers", "mamba_ssm", "causal_conv1d")  # whose versions a result depends on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", metavar="NAME", default=None, help="run bench_NAME.py alone; default: all; e.g. --op matmul"
    )
    parser.add_argument(
        "--filter", metavar="TEXT", default=None, help="cases whose name matches, as pytest -k; default: all"
    )
    parser.add_argument(
        "--folder", metavar="PATH", default=None, help="where bench_*.py are; default: this checkout's benchmarks/"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON; default: a table")


def run(arguments: argparse.Namespace) -> int:
    folder = find_folder(arguments.folder)
    files = sorted(folder.glob("bench_*.py")) if arguments.op is None else [folder / f"bench_{arguments.op}.py"]
    known = ", ".join(sorted(f.stem.removeprefix("bench_") for f in folder.glob("bench_*.py")))
    if not known:
        raise ValueError(f"folder: {folder} holds no bench_*.py; do: name the benchmarks of a checkout")
    if not files[0].exists():
        raise ValueError(f"op: got {arguments.op!r}; allowed: {known}")
    raw = folder / "results" / ".run.json"
    raw.parent.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        f"--benchmark-json={raw}",
        "--benchmark-columns=median",
        *map(str, files),
    ]
    command += ["-k", arguments.filter] if arguments.filter else []
    path = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode == NOTHING_RAN:
        raise ValueError(
            f"filter: got {arguments.filter!r}; allowed: part of a case's name (do: another --filter or --op)"
        )
    if done.returncode != 0 or not raw.exists():
        tail = [line for line in done.stdout.splitlines() if line.startswith(("E ", "ERROR", "FAILED"))] or [
            "no output"
        ]
        raise RuntimeError(f"bench: pytest failed ({tail[0].removeprefix('E ').strip()}); do: {' '.join(command)}")
    rows = rows_of(json.loads(raw.read_text()))
    raw.unlink()
    if not rows:
        raise ValueError("bench: no case ran; do: another --op or --filter")
    target = store(folder, rows, parts=arguments.filter is not None)
    print(json.dumps(rows, indent=2) if arguments.json else render(rows))
    print(plot(folder, target), file=sys.stderr)
    return 0


def find_folder(given: str | None) -> Path:
    here = Path(__file__).resolve().parents[2] / "benchmarks"
    folder = Path(given) if given else here if here.is_dir() else Path("benchmarks")
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} does not exist; do: run in a checkout of the source, or give --folder")
    return folder.resolve()


def rows_of(report: dict) -> list[dict]:
    """A row for each benchmark, from its median and extra_info: op, case, backend, dtype; bytes, flops, items (of one
    run); yardstick (true: the others of the same op and case are compared with the fastest of these); limit_bytes,
    limit_flops (a second, measured in the same run); series, size, axis (what the case shares with cases of other sizes,
    its size, and what that counts, as "rows": a curve of the plot)."""
    rows = []
    for entry in report["benchmarks"]:
        extra, seconds = entry["extra_info"], entry["stats"]["median"]
        row = {name: extra.get(name, "") for name in ("op", "case", "backend", "dtype")}
        row |= {"seconds": seconds, "yardstick": bool(extra.get("yardstick"))}
        row |= {name: extra[name] for name in ("series", "size", "axis") if name in extra}
        for amount in ("bytes", "flops", "items"):
            if extra.get(amount):
                row[f"{amount}_per_second"] = extra[amount] / seconds
                if extra.get(f"limit_{amount}"):
                    row["share_of_limit"] = row[f"{amount}_per_second"] / extra[f"limit_{amount}"]
        rows.append(row)
    for row in rows:
        peers = [r for r in rows if r["yardstick"] and (r["op"], r["case"]) == (row["op"], row["case"])]
        if peers and not row["yardstick"]:
            best = min(peers, key=lambda r: r["seconds"])
            row |= {"times_yardstick": best["seconds"] / row["seconds"], "against": _name(best)}
    return rows


def _name(row: dict) -> str:
    return " ".join(part for part in (row["backend"], row["dtype"]) if part)


def store(folder: Path, rows: list[dict], parts: bool) -> Path:
    """Merges the rows into results/<device>.json: what did not run this time stays. parts: of an op only some cases ran."""
    import torch

    from nvfp4_kernels import __version__
    from nvfp4_kernels.ops import _device, _tuned
    from nvfp4_kernels.ops._native import native

    chip = _device.chips()[-1]
    isa = native.isa() if native and chip.arch == "cpu" else None  # names of processors do not tell
    target = folder / "results" / f"{'-'.join(filter(None, (chip.slug, isa)))}.json"

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in (("op", "case", "backend", "dtype") if parts else ("op",)))

    ran = {key(row) for row in rows}
    kept = [row for row in json.loads(target.read_text())["rows"] if key(row) not in ran] if target.exists() else []
    git = shutil.which("git")
    commit = subprocess.run(
        [git, "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip() if git else ""  # fmt: skip
    header = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": chip.name,
        "arch": chip.arch,
        "isa": isa,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "version": __version__,
        "threads": torch.get_num_threads(),
    }
    if tuned := _tuned.entries(chip.device):
        header["tuned"] = tuned
    target.write_text(json.dumps(header | {"rows": kept + rows}, indent=1) + "\n")
    return target


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


def render(rows: list[dict]) -> str:
    from nvfp4_kernels.cli.text import columns

    cells = [["op", "case", "backend", "dtype", "time", "GB/s", "GFLOP/s", "items/s", "% of limit", "x yardstick"]]
    for row in rows:
        cells.append(
            [
                *(row[name] for name in ("op", "case", "backend", "dtype")),
                _time(row["seconds"]),
                f"{row['bytes_per_second'] / 1e9:.2f}" if "bytes_per_second" in row else "-",
                f"{row['flops_per_second'] / 1e9:.1f}" if "flops_per_second" in row else "-",
                f"{row['items_per_second']:,.0f}" if "items_per_second" in row else "-",
                f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "-",
                f"{row['times_yardstick']:.2f}x {row['against']}" if "times_yardstick" in row else "-",
            ]
        )
    return "\n".join(columns(cells, right=(4, 5, 6, 7, 8)))


def _time(seconds: float) -> str:
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e3), ("us", 1e6)) if seconds * s >= 1 or u == "us")
    return f"{seconds * scale:.3g} {unit}"


def plot(folder: Path, target: Path) -> str:
    """Draws what is stored; where all of it lies, and why there is no plot if there is none."""
    script = folder / "plot.py"
    if not script.exists():
        return f"in {target}"
    if find_spec("matplotlib") is None:
        return f"in {target}; no plot: matplotlib is not installed"
    done = subprocess.run([sys.executable, str(script), str(target)], stdout=subprocess.DEVNULL, check=False)
    return f"in {target}{' and its .png' if done.returncode == 0 else '; no plot: see above'}"
