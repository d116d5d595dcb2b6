"""Work on a second stream of a GPU, beside what the caller launches meanwhile."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def aside(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Begins function(x) on a GPU's second stream; what is returned waits for it there and gives its result.

    Elsewhere, and where torch.compile orders the work, the function runs when its result is asked for. Backward runs on the
    streams of forward: autograd sees to that. Captured by a CUDA graph, the two become branches of it.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return lambda: function(x)
    main, side = torch.cuda.current_stream(x.device), _second(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = function(x)
    x.record_stream(side)  # backward reads it there, and may be the last to hold it

    def joined() -> Tensor:
        main.wait_stream(side)
        y.record_stream(main)
        return y

    return joined


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
