"""Builds csrc into nvfp4_kernels/_native through CMake, Ninja and pybind11. Imports no torch: the module links none.

Without a C++ compiler the package installs as pure Python and runs on its reference backend. With one, a compile error is
an error. Environment: CXX (the compiler), CUDA_ARCHS (see CMakeLists.txt), NVFP4_BUILD=python to leave csrc out on purpose.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CUDA = os.environ.get("NVFP4_CUDA", "0") not in ("", "0")


def compiler() -> str | None:
    """The C++ compiler CMake would take: CXX if set, else what is on the path."""
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def tool(name: str) -> str:
    """A build tool: on the path, or where pip put it beside this Python."""
    return shutil.which(name) or str(Path(sys.executable).parent / name)


def run(*command: str) -> None:
    """Run a build command; on failure print its output, name the first error, and say what goes without a compiler."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = done.stdout.splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -5)
        words = " ".join(" ".join(lines[first:][:6]).split())  # CMake's reasons stand some lines below
        sys.exit(
            f"csrc: {command[0]} failed: {words}; do: set CXX, or NVFP4_BUILD=python for the reference backend alone"
        )


class BuildNative(build_ext):
    def run(self):
        if os.environ.get("NVFP4_BUILD") == "python":
            print(
                "csrc: left out, as NVFP4_BUILD=python asks; nvfp4_kernels will run on its reference backend",
                flush=True,
            )
        elif compiler() is None:
            print(
                "csrc: no C++ compiler found; installing without it, on the (slow) reference backend. "
                "Install g++ or clang++, or set CXX, and install again for the CPU kernels",
                file=sys.stderr,
                flush=True,
            )
        else:
            super().run()

    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_CXX_COMPILER": compiler(),
            "NVFP4_MODULE_DIR": target.parent,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "NVFP4_CUDA": "ON" if CUDA else "OFF",
            "CUDA_ARCHS": os.environ.get("CUDA_ARCHS", ""),
        }
        cache = build / "CMakeCache.txt"
        same = re.compile(rf"^CMAKE_CXX_COMPILER:\w+={re.escape(options['CMAKE_CXX_COMPILER'])}$", re.M)
        if cache.exists() and not same.search(cache.read_text()):
            shutil.rmtree(build)  # another compiler: CMake would start over anyway, with a warning
        if not CUDA:
            shutil.rmtree(target.parent / "_cuda", ignore_errors=True)
        run(
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            *(f"-D{name}={value}" for name, value in options.items() if value),
        )
        run(tool("cmake"), "--build", str(build))

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        kernels = ROOT / "nvfp4_kernels" / "_cuda"
        shutil.rmtree(kernels, ignore_errors=True)  # those of other sources would take other parameters
        if CUDA:
            shutil.copytree(Path(self.build_lib) / "nvfp4_kernels" / "_cuda", kernels)


class ShipSources(build_py):
    """Puts csrc into the package as well: NVRTC compiles the CUDA sources at first use where there was no nvcc."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "nvfp4_kernels" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("nvfp4_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": ShipSources},
)
