"""Does a checkpoint fit a model: each tensor has its place and shape, each place its tensor. What is wrong is told at once."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nvfp4_kernels.checkpoint import names
from nvfp4_kernels.checkpoint.source import CheckpointError, Entry
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedWeight

SHOWN = 10  # of each kind of problem
FORMATS = {"U8": NVFP4Weight, "F8_E4M3": FP8Weight}  # by the dtype of `weight`
_FLOATS = ("F32", "BF16", "F16", "F64")
_WORDS = {torch.uint8: ("U8",), torch.float8_e4m3fn: ("F8_E4M3",), torch.int64: ("I64",)}
EMBEDDINGS = "backbone.embeddings"
_CACHE_SCALES = {"k_proj": "k_scale", "v_proj": "v_scale"}
NOISE = ("noise", "up_noise", "down_noise")  # of our own checkpoints alone; drawn where a checkpoint has none


@dataclass
class Want:
    """A tensor of the model: of `experts` pieces of `shape`, or one. found: by piece, None being the whole. optional: what the
    checkpoint lacks of it is made up."""

    shape: tuple[int, ...]
    words: tuple[str, ...]
    experts: int | None = None
    optional: bool = False
    found: dict[int | None, tuple[Entry, bool]] = field(default_factory=dict)

    def missing(self) -> list[int | None]:
        if None in self.found or self.optional:
            return []
        return [e for e in (range(self.experts) if self.experts else [None]) if e not in self.found]


@dataclass
class Problems:
    """What is wrong, by kind: lines in the order in which they were found."""

    folder: Path
    lines: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, line: str) -> None:
        self.lines[kind].append(line)

    def check(self) -> None:
        """Raises CheckpointError with the first SHOWN of each kind and how many there are; nothing where all is well."""
        if not self.lines:
            return
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in self.lines.items())
        text = [f"checkpoint: {self.folder} does not fit its config.json: {counts}"]
        for kind, lines in self.lines.items():
            text += [f"  {kind}: {line}" for line in lines[:SHOWN]]
            text += [f"  {kind}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise CheckpointError("\n".join(text))


@dataclass
class Fit:
    """wants: every tensor of the model as the checkpoint stores it, by module and part. layers: the matrices that it stores
    quantized, by module, on the meta device. double: whether activations are fp64, which alone fp64 matrices multiply."""

    wants: dict[tuple[str, str], Want]
    layers: dict[str, QuantizedWeight]
    problems: Problems
    double: bool

    @property
    def kept(self) -> dict[str, QuantizedWeight]:
        """The layers that may stay quantized. Embeddings are looked up, not multiplied: they are decoded as they are read."""
        return {module: layer for module, layer in self.layers.items() if module != EMBEDDINGS}


def fit(model: nn.Module, entries: dict[str, Entry], folder: Path) -> Fit:
    """model: on the meta device, nothing in it quantized. Raises CheckpointError that lists all that does not fit."""
    placed = {name: names.place(name) for name in entries}
    parts: dict[str, dict[str, Entry]] = defaultdict(dict)  # of each module, those of its last expert
    for name, (where, _) in placed.items():
        parts[where.module][where.part] = entries[name]
    tensors = dict(_tensors(model))
    linear = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    layers = {}
    for module, found in parts.items():
        embeds = module == EMBEDDINGS and "weight_scale" in found
        if (module in linear or names.is_stack(module) or embeds) and (layer := _layer(module, found, tensors)):
            layers[module] = layer
    wants = {}
    for (module, part), tensor in tensors.items():
        if module not in layers or part == "bias":
            wants[module, part] = _want(module, part, tensor)
    for module, layer in layers.items():
        for part, buffer in layer.named_buffers():
            wants[module, part] = _want(module, part, buffer)
    for module in [module for module, _ in wants]:
        part = _CACHE_SCALES.get(module.rpartition(".")[2])
        if part in parts[module]:
            wants[module, part] = _want(module, part, torch.zeros((), device="meta"))
    problems = Problems(folder)
    _match(entries, placed, wants, problems)
    _tie(model, wants)
    for (module, part), want in wants.items():
        for expert in want.missing():
            problems.add("missing", names.tensor_name(names.Place(module, part, expert), "published"))
    problems.check()
    return Fit(wants, layers, problems, model.config.dtype == torch.float64)


def _tensors(model: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        where, _ = names.place(name)
        yield (where.module, where.part), tensor


def _layer(module: str, found: dict[str, Entry], tensors: dict) -> QuantizedWeight | None:
    """The layer that holds a matrix as the checkpoint does; None where that is not quantized."""
    plain, weight = tensors.get((module, "weight")), found.get("weight")
    if plain is None or weight is None or weight.dtype not in FORMATS:
        return None
    *experts, rows, cols = plain.shape
    kind = FORMATS[weight.dtype]
    if cols % kind.BLOCK:
        return None
    return kind(
        cols, rows, (module, "bias") in tensors, "input_scale" in found, experts[0] if experts else None, "meta"
    )


def _want(module: str, part: str, tensor: Tensor) -> Want:
    experts = tensor.shape[0] if names.is_stack(module) else None
    shape = tuple(tensor.shape if experts is None else tensor.shape[1:])
    scale = part.endswith(("_scale", "_scale_2")) and part not in _CACHE_SCALES.values()
    words = _WORDS.get(tensor.dtype, ("F32",) if scale else _FLOATS)
    unreached = part == "input_scale" and experts is not None  # by calibration, some of them
    return Want(shape, words, experts, optional=part in NOISE or unreached)


def _match(entries: dict[str, Entry], placed: dict, wants: dict[tuple[str, str], Want], problems: Problems) -> None:
    nearest = None
    for name, entry in entries.items():
        where, reciprocal = placed[name]
        want = wants.get((where.module, where.part))
        if want is None or (where.expert is not None and where.expert >= (want.experts or 0)):
            if nearest is None:
                nearest = names.Nearest(_all_names(wants))
            near = nearest(name) if len(problems.lines.get("unknown", ())) < SHOWN else None
            problems.add("unknown", f"{name} {list(entry.shape)}" + (f" (nearest: {near})" if near else ""))
            continue
        shape = want.shape if where.expert is not None or want.experts is None else (want.experts, *want.shape)
        if want.found and (where.expert is None or where.expert in want.found or None in want.found):
            problems.add("twice", f"{name} and {want.found.get(where.expert, next(iter(want.found.values())))[0].name}")
        want.found[where.expert] = (entry, reciprocal)
        if entry.shape != shape and not (math.prod(shape) == math.prod(entry.shape) == 1):
            problems.add("misshaped", f"{name} {list(entry.shape)}, wanted {list(shape)}")
        elif entry.dtype not in want.words:
            problems.add("of a wrong dtype", f"{name} {entry.dtype}, wanted {' or '.join(want.words)}")


def _all_names(wants: dict[tuple[str, str], Want]) -> Iterator[str]:
    for (module, part), want in wants.items():
        for expert in range(want.experts) if want.experts else [None]:
            yield names.tensor_name(names.Place(module, part, expert), "published")


def _tie(model: nn.Module, wants: dict[tuple[str, str], Want]) -> None:
    """Of tied weights a checkpoint may hold either or both; the embedding's is the one that is read."""
    if not model.config.tie_word_embeddings:
        return
    head, embeddings = wants.pop(("lm_head", "weight")), wants["backbone.embeddings", "weight"]
    if not embeddings.found:
        embeddings.found = head.found
