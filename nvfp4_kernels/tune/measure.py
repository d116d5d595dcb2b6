"""Times the answers to the questions that a case makes the ops ask, and keeps the fastest."""

import json
import sys
import time
from collections.abc import Callable, Iterator

import torch

from nvfp4_kernels.formats.tensor import QuantizedTensor
from nvfp4_kernels.ops import _tuned
from nvfp4_kernels.ops._dispatch import Refused, backend
from nvfp4_kernels.tune.cases import Case, Make

LEAST_GAIN = 0.02  # for which the first answer is given up: less is noise
Timer = Callable[[Callable[[], object]], float]


def timer(device: str, milliseconds: float = 80) -> Timer:
    """Median seconds of a function, over rounds that take so long: CUDA events with the L2 cache flushed before each; one call
    on the CPU."""
    if device == "cpu":

        def once(run) -> float:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

        return once
    from triton.testing import do_bench

    return lambda run: do_bench(run, warmup=milliseconds / 4, rep=milliseconds, return_mode="median") / 1e3


def backends(case: Case, seconds: Timer) -> dict[str, dict]:
    """The question whose backend serves the case, with its answer; nothing where fewer than two serve it, and rightly."""
    us, results = {}, {}
    for name, make in case.makes.items():
        try:
            with backend(name), _tuned.trying({}):
                results[name], us[name] = _timed(make, seconds)
        except Refused:
            continue
    if len(us) < 2:
        return {}
    if not _close(results["native"], results["triton"]):
        print(f"{case.name}: native and triton differ; nvfp4 check tells who is wrong", file=sys.stderr)
        return {}
    run = _call(case.makes["triton"])
    with _tuned.trying({}) as asked:
        run()
    question = next(question for question, answers in asked.items() if answers[0] is None)
    return {question: {"answer": min(us, key=us.get), "us": us}}


def tiles(case: Case, seconds: Timer) -> dict[str, dict]:
    """The questions of the case's Triton kernels. A tile that does not fit the chip, or gives other bits, is no answer."""
    make, found = case.makes["triton"], {}
    with backend("triton"):
        try:
            run = _call(make)
            with _tuned.trying({}) as asked:
                expected = run()
        except Refused:
            return {}
        for question, answers in asked.items():
            us = {}
            for answer in answers:
                with _tuned.trying({name: entry["answer"] for name, entry in found.items()} | {question: answer}):
                    try:
                        result, taken = _timed(make, seconds)
                    except Exception as error:  # of the compiler or the driver
                        print(f"{case.name}, {answer}: {error}"[:200], file=sys.stderr)
                        continue
                if all(map(torch.equal, _bytes(result), _bytes(expected))):
                    us[json.dumps(answer)] = taken
                else:
                    print(f"{case.name}, {answer}: other bits", file=sys.stderr)
            first, best = json.dumps(answers[0]), min(us, key=us.get)
            best = best if us[best] < (1 - LEAST_GAIN) * us[first] else first
            found[question] = {"answer": json.loads(best), "us": us}
    return found


def _call(make: Make) -> Callable[[], object]:
    torch.manual_seed(0)
    return make()


def _timed(make: Make, seconds: Timer) -> tuple[object, float]:
    """What the first call gives, and microseconds of the next."""
    run = _call(make)
    return run(), round(1e6 * seconds(run), 2)


def _parts(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, QuantizedTensor):
        yield from result.tensors().values()
    else:
        for part in result:
            yield from () if part is None else _parts(part)


def _bytes(result: object) -> list[torch.Tensor]:
    return [part.contiguous().reshape(-1).view(torch.uint8) for part in _parts(result)]


def _close(a: object, b: object) -> bool:
    """To 1%: as the roundings of two right kernels may differ."""
    pairs = [(x.double(), y.double()) for x, y in zip(_parts(a), _parts(b), strict=True)]
    return all(bool((x - y).norm() <= 1e-2 * y.norm()) for x, y in pairs)
