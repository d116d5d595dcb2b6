"""python -m nvfp4_kernels: the same as the command nvfp4."""

import sys

from nvfp4_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
