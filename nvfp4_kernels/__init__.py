"""NVFP4 training and inference: handwritten kernels and the hybrid Mamba-2 / attention / mixture-of-experts model over them.

The public names live in nvfp4_kernels.api, which is read at the first use of one of them: importing the package alone, as the
command line does for --help, loads no torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nvfp4_kernels.api import *  # noqa: F403


def __getattr__(name: str):
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'nvfp4_kernels' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("nvfp4_kernels.api"), name)


def __dir__() -> list[str]:
    from nvfp4_kernels import api

    return sorted([*globals(), *api.__all__])
