"""What only a measurement can decide, and what `nvfp4 tune` found on a device.

A question is which backend serves a kind of an op's calls, or which tile a Triton kernel takes; its answers are a short list in
the code. The first, the expected best, holds where nobody has measured: a call measures nothing. All tiles on a list give the
same bits, and kernels whose threads add up among themselves have no list; two backends may differ in the last bits.

Answers come from the file that `nvfp4 tune` wrote for the device on this machine, if its sources are these, and then from the
one that the package has for the architecture, if it has one. Both are read once a process; with NVFP4_TUNED=0 never.
"""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from nvfp4_kernels.ops import _device, _nvrtc

FEW = 64  # rows of a product, or sequences, that are bound by memory

_tables: dict[torch.device, dict[str, object]] = {}
trial: tuple[dict, dict] | None = None  # answers that are being tried, and the questions that were asked


def _matmul(a, b, *rest) -> str:
    names = [str(x.dtype)[6:] if isinstance(x, torch.Tensor) else type(x).__name__ for x in (a, b)]
    return f"{' x '.join(names)}, {'few' if a.shape[0] <= FEW else 'many'} rows"


def _quantize(x, row, col, *rest) -> str:
    forms = [spec for spec in (row, col) if spec is not None]
    noisy, turned = any(spec.stochastic for spec in forms), any(spec.hadamard is not None for spec in forms)
    return f"{len(forms)} forms{', stochastic' if noisy else ''}{', rotated' if turned else ''}"


def _state_update(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, *options) -> str:
    few, noisy = "few" if len(x) <= FEW else "many", "" if noise is None else ", noise"
    return f"{str(state.dtype)[6:]}, {few} sequences{noisy}"


# The ops of which CUDA and Triton serve the same calls, and the kinds of these, by the arguments of `refuses`.
KINDS: dict[str, Callable[..., str]] = {"matmul": _matmul, "quantize": _quantize, "state_update": _state_update}


def answer(device: torch.device, answers: tuple, question: Callable[[], str]):
    """The one of `answers` that was the fastest on the device, the first where nobody has measured."""
    if trial is not None:
        trial[1][question()] = answers
        return trial[0].get(question(), answers[0])
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = {name: entry["answer"] for name, entry in entries(device).items()}
    given = table.get(question()) if table else None
    return given if given in answers else answers[0]


def tile(first, changes: tuple[dict, ...], device: torch.device, *about: object):
    """`first`, a kernel's tile as a function of the problem gives it, with that one of `changes` that was the fastest for it.
    about: the kernel, and what else the times depend on."""
    change = answer(device, changes, lambda: " ".join(map(str, (*about, first))))
    return replace(first, **change) if change else first


@contextlib.contextmanager
def trying(answers: dict[str, object]) -> Iterator[dict[str, tuple]]:
    """Within it these answers hold and no others; gives the questions that were asked, and the answers to choose from."""
    global trial
    trial = answers, {}
    try:
        yield trial[1]
    finally:
        trial = None


def entries(device: torch.device | str) -> dict[str, dict]:
    """What is known of a device: question -> {answer; us: microseconds of each answer; from: who measured them}."""
    chip = next((chip for chip in _device.chips() if chip.device == str(device)), None)
    if chip is None or os.environ.get("NVFP4_TUNED") == "0":
        return {}
    return _read(shipped(chip.arch)) | _read(path(chip))


def shipped(arch: str) -> Path:
    """The answers that come with the package for an architecture; `nvfp4 tune --save-default` writes them."""
    return Path(__file__).with_name(f"measured_{arch}.json")


def path(chip: _device.Chip) -> Path:
    """The answers that were found on this machine."""
    return _nvrtc.folder() / f"tuned-{chip.slug}.json"


def save(chip: _device.Chip, found: dict[str, dict]) -> None:
    """Adds what was found on a device to its file. Of two processes at once the last one's file stays, whole."""
    about = {"device": chip.name, "arch": chip.arch, "source": source(), "answers": _read(path(chip)) | found}
    _nvrtc.write_whole(path(chip), json.dumps(about, indent=1).encode())
    _tables.clear()


def _read(file: Path) -> dict[str, dict]:
    """Nothing where there is no such file, or it is of other sources."""
    try:
        found = json.loads(file.read_text())
        if "source" in found and found["source"] != source():
            return {}
        origin = found.get("results", "nvfp4 tune on this machine")
        return {name: {"answer": e["answer"], "us": e["us"], "from": origin} for name, e in found["answers"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is not what nvfp4 tune writes, and is ignored ({error!r})", stacklevel=2)
        return {}


@functools.lru_cache
def source() -> str:
    """Of all that the times depend on: the kernels and what launches them, and Triton's version."""
    read = hashlib.sha256()
    for folder, kinds in ((Path(__file__).parent, (".py",)), (_nvrtc.CSRC, (".cu", ".cuh", ".h"))):
        for file in sorted(p for p in folder.rglob("*") if p.suffix in kinds):
            read.update(file.name.encode() + b"\0" + file.read_bytes())
    with contextlib.suppress(metadata.PackageNotFoundError):
        read.update(metadata.version("triton").encode())
    return read.hexdigest()[:32]
