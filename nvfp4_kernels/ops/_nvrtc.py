"""Compiles csrc/<op>/cuda.cu where there is no nvcc: NVRTC, through CuPy, with a cache on disk.

CuPy's low-level calls need neither a driver nor a GPU. Its RawModule will not do: it appends an -arch without the suffix that
the FP4 instructions want, and -ftz=true, which changes results.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import struct
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "--fmad=false")  # as in CMakeLists.txt
PACKAGE = Path(__file__).parent.parent
# In an installed package csrc lies inside; in a checkout beside it.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")


@functools.lru_cache
def missing() -> str | None:
    """Why nothing can be compiled; None when it can. CuPy is imported no sooner than it is wanted."""
    try:
        _nvrtc().getVersion()
    except ImportError:
        return "CuPy, which calls NVRTC, is not installed (pip install 'nvfp4-kernels[cuda12]', or [cuda13])"
    except RuntimeError as error:
        return f"CuPy finds no NVRTC ({str(error).splitlines()[0]}; pip install 'cupy-cuda12x[ctk]' brings it)"
    return None


def _nvrtc():
    return importlib.import_module("cupy.cuda").nvrtc


def folder() -> Path:
    """NVFP4_CACHE, or nvfp4_kernels in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NVFP4_CACHE") or cache / "nvfp4_kernels")


def key(op: str, arch: str) -> str:
    """Of everything that the code depends on: the headers all ops share and the op's own, the compiler, the target."""
    read = hashlib.sha256(f"{_nvrtc().getVersion()} {arch} {FLAGS}".encode())
    for path in sorted(p for name in ("numerics", "arch", op) for p in (CSRC / name).iterdir()):
        read.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{op}-{arch}-{read.hexdigest()[:32]}"


def compiled(op: str, arch: str) -> bytes:
    """The cubin of an op's kernels for an architecture such as "90a", from the cache if it is there."""
    path = folder() / f"{key(op, arch)}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_source(op, arch)
    with contextlib.suppress(OSError):  # without a place for a cache each process compiles anew
        write_whole(path, code)
    return code


def write_whole(path: Path, content: bytes) -> None:
    """To a file of this process's own, then one rename: others see nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def whole(cubin: bytes) -> bytes:
    """With the last byte, which CuPy cuts off as it does a text's: a 0, for an ELF file ends with its headers here."""
    if not cubin.startswith(b"\x7fELF"):
        return cubin
    programs, sections, _, _, *sizes = struct.unpack_from("<QQIHHHHH", cubin, 32)  # from e_phoff to e_shnum
    return cubin.ljust(max(programs + sizes[0] * sizes[1], sections + sizes[2] * sizes[3]), b"\0")


def compile_source(op: str, arch: str, ptx: bool = False, before: str = "") -> bytes:
    """Compile now, to a cubin or, to be read, to PTX; `before`: lines before the source's own. Raises RuntimeError with
    NVRTC's first error."""
    nvrtc = _nvrtc()
    version = nvrtc.getVersion()
    if arch == "120f" and version < (12, 9):  # which does not know families
        arch = "120a"
    if arch == "103a" and version < (12, 9):
        raise RuntimeError(
            f"csrc/{op}/cuda.cu: NVRTC {version[0]}.{version[1]} does not know sm_103a; allowed: 12.9 and newer"
        )
    source = before + (CSRC / op / "cuda.cu").read_text()
    target = f"-arch={'compute' if ptx else 'sm'}_{arch}"
    options = (target, *FLAGS, f"-I{CSRC}", f"-I{CSRC / op}")  # NVRTC knows no folder of the source
    program = nvrtc.createProgram(source, f"{op}/cuda.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getPTX(program) if ptx else whole(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        first = next((line for line in log.splitlines() if "error" in line), log[:300])
        by = f"NVRTC {version[0]}.{version[1]}"
        raise RuntimeError(f"csrc/{op}/cuda.cu: {by} failed for sm_{arch}: {first}") from error
    finally:
        nvrtc.destroyProgram(program)
