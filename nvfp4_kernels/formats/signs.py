"""Sign vectors of the random Hadamard transform as 16-bit masks: bit i set means sign i is negative."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sign_mask(signs: int | Sequence[int] | Tensor) -> int:
    """The mask of 16 signs, each +1 or -1; a mask passes through. Raises TypeError or ValueError for anything else."""
    if isinstance(signs, int) and not isinstance(signs, bool):
        if not 0 <= signs < 1 << 16:
            raise ValueError(f"signs: got {signs}; allowed: a 16-bit mask or 16 values of +1 and -1")
        return signs
    given = signs.tolist() if isinstance(signs, Tensor) else signs
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"signs: got {given!r}; allowed: a 16-bit mask or 16 values of +1 and -1")
    values = [int(s) for s in given]
    if len(values) != 16 or any(s not in (1, -1) for s in values):
        raise ValueError(f"signs: got {values}; allowed: a 16-bit mask or 16 values of +1 and -1")
    return sum(1 << i for i, s in enumerate(values) if s < 0)


def random_signs(seed: int) -> int:
    """A mask drawn from `seed`. Both operands of one GEMM must share it. Raises TypeError or ValueError naming the argument."""
    if not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}; allowed: an int")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: got {seed}; allowed: an int of 64 bits")
    return int(torch.randint(0, 1 << 16, (), generator=torch.Generator().manual_seed(seed)))
