"""CUDA graphs: a function's kernels recorded once, then launched together, with no more from the host than that."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor


class CudaGraph:
    """run() as a graph. `replay` runs it anew on what its inputs hold then; its result is good until the next replay.

    run: of no arguments, gives a tensor; it is called three times, and must leave no trace with the inputs as they are.
    memory: a graph_pool_handle; graphs that are replayed one at a time may share it.
    Raises RuntimeError where the host waits for the device in it, which no graph can hold.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device, memory: tuple):
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()  # kernels are compiled, libraries take their workspaces
                with _no_waiting():
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # other threads may do as they please meanwhile: serve another GPU, or watch over NCCL
            with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
                self._result = run()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result


def recorder(device: torch.device) -> Callable | None:
    """What makes a graph of a function on this device: gives an object with `replay`, or None, with a warning that says why.
    None where there are no graphs. Those that it makes are to be replayed one at a time."""
    return partial(_recorded, device, torch.cuda.graph_pool_handle()) if device.type == "cuda" else None


def _recorded(device: torch.device, memory: tuple, run: Callable[[], Tensor]) -> CudaGraph | None:
    try:
        return CudaGraph(run, device, memory)
    except RuntimeError as error:
        warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=2)
        return None


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
