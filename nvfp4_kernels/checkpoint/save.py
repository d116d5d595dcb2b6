"""A model into the folder of a checkpoint: written beside it, fsynced, then put in its place."""

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nvfp4_kernels.checkpoint import names
from nvfp4_kernels.checkpoint.files import Item, safetensors, sync_folder, write
from nvfp4_kernels.checkpoint.fit import NOISE
from nvfp4_kernels.checkpoint.modelopt import write_quantization
from nvfp4_kernels.checkpoint.snapshot import MANIFEST, UNFINISHED
from nvfp4_kernels.checkpoint.source import COMPANIONS, INDEX, SINGLE, CheckpointError
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedWeight

Read = Callable[[str], Tensor]
LAYOUTS = ("published", "transformers", "modelopt")
SHARD_BYTES = 5e9  # of a shard at most, where nobody says
REPLACED = ("config.json", "hf_quant_config.json", INDEX, SINGLE, "model-*-of-*.safetensors")
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def what_is_quantized(model: nn.Module) -> str | None:
    """What of it is quantized: "matrices", "KV cache" where that is all, or None."""
    return "matrices" if quantized_layers(model) else "KV cache" if model.kv_cache_algorithm else None


def described(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict, in which what is held packed is without values: unpacked all at once it would be in memory twice."""
    with contextlib.ExitStack() as stack:
        for layer in quantized_layers(model).values():
            if isinstance(layer, NVFP4Weight):
                stack.enter_context(layer.without_values())
        return model.state_dict()


def _value(model: nn.Module, tensors: dict[str, Tensor], name: str) -> Tensor:
    owner, _, part = name.rpartition(".")
    return getattr(model.get_submodule(owner), part) if tensors[name].is_meta else tensors[name]


def items(model: nn.Module, layout: str, dtype: torch.dtype | None, read: Read | None = None) -> Iterator[Item]:
    """Every tensor under its name in `layout`, in the model's order. dtype: of all but bits, scales and the routers' bias.

    read: gives the values by the names of the state_dict, one after the other, for a model on the meta device.
    """
    layers, tensors = quantized_layers(model), described(model)
    read = read or functools.lru_cache(1)(functools.partial(_value, model, tensors))  # each expert asks for all
    for name, tensor in tensors.items():
        where, _ = names.place(name)
        tied = model.config.tie_word_embeddings and name == "lm_head.weight"
        if where.part in NOISE or tied:
            continue
        fixed = (
            where.part in _SCALES or where.module.endswith(".gate") or where.module in layers and where.part != "bias"
        )
        kept = tensor.dtype if fixed or dtype is None else dtype
        if names.is_stack(where.module) and layout != "transformers":
            for e, part in enumerate(tensor):
                title = names.tensor_name(where._replace(expert=e), layout)
                yield Item(title, kept, tuple(part.shape), lambda name=name, e=e: read(name)[e])
        else:
            title = names.tensor_name(where, layout)
            yield Item(title, kept, tuple(tensor.shape), lambda name=name: read(name))
    for module, layer in layers.items():
        if not isinstance(layer, NVFP4Weight) and layer.input_scale is None:
            # Loaders of FP8 want a scale for the input; 1 casts it as it is, saturating at 448.
            for e in range(layer.experts) if layer.experts else [None]:
                title = names.tensor_name(names.Place(module, "input_scale", e), layout)
                yield Item(title, torch.float32, (), lambda: torch.ones(()))


def shards(written: list[Item], limit: float) -> list[list[Item]]:
    """In order; a shard has at most `limit` bytes, or one tensor that has more."""
    groups, size = [[]], 0
    for item in written:
        if groups[-1] and size + item.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.bytes
    return groups


def account(model: nn.Module) -> tuple[dict, dict]:
    """ModelOpt's account of what is quantized, by the names of the published layout."""
    layers, algorithms, others = quantized_layers(model), {}, []
    for module, layer in layers.items():
        algorithm = "FP8" if not isinstance(layer, NVFP4Weight) else "W4A16_NVFP4"
        if algorithm != "FP8" and layer.input_scale is not None:
            algorithm = "NVFP4"
        for e in range(layer.experts) if layer.experts else [None]:
            algorithms[names.published_module(module, "published", e)] = algorithm
    for name, tensor in described(model).items():
        where, _ = names.place(name)
        if where.module in layers or where.part != "weight" or tensor.dim() < 2:
            continue
        stack = names.is_stack(where.module)
        others.append(f"{where.module.rpartition('.')[0]}*" if stack else where.module)
    if not any(name.startswith("mtp.") for name in layers) and model.mtp is not None:
        others = [name for name in others if not name.startswith("mtp.")] + ["mtp*"]
    scaled = any(name.endswith(("k_scale", "v_scale")) for name, _ in model.named_buffers())
    return write_quantization(algorithms, dict.fromkeys(others), "FP8" if scaled else model.kv_cache_algorithm)


def write_folder(
    model: nn.Module, folder: Path, layout: str, limit: float, dtype: torch.dtype | None, read: Read | None
) -> None:
    """Everything but what is merely copied, into an empty folder."""
    groups = shards(list(items(model, layout, dtype, read)), limit)
    weights, total = {}, sum(item.bytes for group in groups for item in group)
    for i, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write(folder / name, safetensors(group, {"format": "pt"}))  # transformers reads no file without this word
        weights |= {item.name: name for item in group}
    texts = {}
    if len(groups) > 1:
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weights}
    config = model.config.to_dict() | {"use_bias": model.config.mamba_proj_bias}  # transformers' word for it
    if dtype is not None:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if layout == "modelopt":
        texts["hf_quant_config.json"], config["quantization_config"] = account(model)
    texts["config.json"] = config
    for name, values in texts.items():
        write(folder / name, [(json.dumps(values, indent=2) + "\n").encode()])


def copy_companions(source: Path | None, folder: Path) -> None:
    if source is None:
        return
    if not source.is_dir():
        raise CheckpointError(
            f"checkpoint: {source}, where the model was read, is gone, and with it the tokenizer; do: set model.source to "
            "another folder that holds it, or to None to save without"
        )
    for path in sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if p.is_file()}):
        write(folder / path.name, [path.read_bytes()])


def replace(final: Path, part: Path) -> None:
    """`part` in the place of `final`; what else lies in `final` moves along."""
    if not final.exists():
        part.rename(final)
    else:
        for path in final.iterdir():
            owned = any(path.match(pattern) for pattern in REPLACED) and path.is_file()
            if owned or (part / path.name).exists():
                continue
            if path.is_dir():
                shutil.copytree(path, part / path.name, copy_function=os.link, symlinks=True)
            else:
                os.link(path, part / path.name, follow_symlinks=False)
        sync_folder(part)
        old = final.with_name(f"{UNFINISHED}old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            part.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(final.parent)


def save(
    model: nn.Module, path: Path, layout: str, limit: float, dtype: torch.dtype | None, read: Read | None = None
) -> None:
    """read: as of `items`. Raises CheckpointError with what was at `path` left as it was."""
    trained = any((path / name).exists() for name in ("run.json", MANIFEST))
    if path.is_dir() and any(path.iterdir()) and (trained or not (path / "config.json").exists()):
        raise CheckpointError(f"checkpoint: {path} holds files that are no checkpoint; do: name another folder")
    part = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        copy_companions(model.source, part)
        write_folder(model, part, layout, limit, dtype, read)
        sync_folder(part)
        replace(path, part)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "its disk is full" if full else f"it cannot be written ({error.strerror})"
            raise CheckpointError(f"checkpoint: {path}: {why}; what was there is as it was") from error
        raise
