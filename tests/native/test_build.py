"""csrc beyond the ops: the C++ test program, the headers under nvcc, the build without a compiler, the fallback's notice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops._native import native

ROOT = Path(__file__).parent.parent.parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def run(*command, **environment):
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_kernels_without_python(tmp_path):
    """native_tests.cpp, hardly optimized and without sanitizers, for the scalar path alone; `make sanitize` does all."""
    sources = [*ROOT.glob("csrc/*/cpu.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("tests/native/*.cpp")]
    flags = ["-std=c++17", "-Og", "-ffp-contract=off", "-DNVFP4_ISA=scalar", "-Icsrc", "-pthread"]
    built = run(CXX, *flags, *map(str, sources), "-o", str(tmp_path / "native_tests"), "-ldl")
    assert built.returncode == 0, built.stderr[:2000]
    done = run(str(tmp_path / "native_tests"))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90a", "100a", "103a", "120f"])
def test_numerics_compile_for_gpus(arch, tmp_path):
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    out = str(tmp_path / "numerics.cubin")
    done = run("nvcc", "-std=c++17", "-Icsrc", "-cubin", gencode, "tests/native/numerics_device.cu", "-o", out)
    assert done.returncode == 0, done.stderr[:2000]


def test_numerics_are_freestanding():
    for path in (ROOT / "csrc" / "numerics").glob("*.h"):
        assert "#include <" not in path.read_text(), f"{path.name}: NVRTC has no standard headers"


def test_build_without_a_compiler_says_so_once():
    done = run(sys.executable, "setup.py", "build_ext", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("no C++ compiler found") == 1


@pytest.mark.skipif(shutil.which("false") is None, reason="no false")
def test_a_compiler_that_does_not_work_is_an_error_with_a_way_out(tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = run("env", "-C", str(tmp_path), sys.executable, "setup.py", "build_ext", CXX="false")
    assert done.returncode != 0 and "is not able to compile" in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.rstrip().endswith("or NVFP4_BUILD=python for the reference backend alone")


def test_package_works_without_the_module():
    code = (
        "import sys, warnings; sys.modules['nvfp4_kernels._native'] = None; warnings.simplefilter('always')\n"
        "import torch, nvfp4_kernels as nk\n"
        "q = nk.quantize(torch.randn(4, 32)); nk.matmul(q, q)\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reference backend, which is slow") == 1


@pytest.mark.skipif(native is None, reason="no native module")
def test_isa_from_the_environment():
    code = "from nvfp4_kernels import _native; print(_native.isa(), _native.set_isa('sse9'))"
    done = run(sys.executable, "-c", code, NVFP4_CPU_ISA="scalar")
    assert done.stdout.split() == ["scalar", "False"], done.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_instruction_set_runs_in_place_of_another():
    """Nothing of an object for one instruction set runs as the library is loaded, and none of its functions, which the linker
    may take for all of that name, has a name that another object has too."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/kernels_*.dir/csrc/*/cpu.cpp.o"))
    if not objects:
        pytest.skip("the module was not built here")
    for path in objects:
        isa = path.parent.parent.parent.name.removeprefix("kernels_").removesuffix(".dir")
        for line in run("nm", "--demangle", "--defined-only", str(path)).stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert not name.startswith(("_GLOBAL__sub_I", "__cxx_global_var_init")), f"{path}: {name}"
            assert kind not in "WVu" or f"nvfp4::{isa}::" in name or name.startswith("DW.ref."), f"{path}: {name}"
