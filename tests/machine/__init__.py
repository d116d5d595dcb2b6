"""A machine that executes PTX: compiled kernels, Triton's and ours, run on the CPU as the PTX ISA words their instructions.

The interpreter of Triton runs a kernel's source and the host model of csrc/arch runs ours behind g++; neither sees what the
compiler made of it, nor the text of inline assembly. This reads the PTX itself. It shares nothing with the kernels: parse.py
reads the text, machine.py keeps lanes and blocks, and the files of instructions say what each does on arrays, one element a
lane. launch.py puts it in the place of Triton's launcher and of the CUDA driver.
"""

import os

ON = "NVFP4_MACHINE" in os.environ  # whether the tests of this process run on it (plugin.py)
