"""HybridModel.from_pretrained and .save_pretrained: a model from a checkpoint's folder, and into one."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from nvfp4_kernels.checkpoint.fit import fit
from nvfp4_kernels.checkpoint.load import fill, insert_layers
from nvfp4_kernels.checkpoint.save import LAYOUTS, SHARD_BYTES, save, what_is_quantized
from nvfp4_kernels.checkpoint.source import Source, open_source
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.recipe import LinearRecipe, Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def from_pretrained(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: "torch.device | str | None" = None,
    recipe: "Recipe | LinearRecipe | str" = "bf16",
    quantized: str = "keep",
) -> HybridModel:
    """The model in the folder `path`, in eval mode. What the folder holds is seen from its files:

    the published layout (backbone.*, one tensor an expert, mtp.*) and transformers' (model.*, experts stacked), in one
    file or in shards with an index; ModelOpt's FP8, NVFP4 and mixed exports; NVFP4 of compressed-tensors; a state_dict
    beside its config.json, and what `nvfp4 train` writes (of a run its newest whole snapshot). Safetensors only: nothing
    is unpickled.

    dtype: of the matrices; None: as stored, but fp32 of dequantized ones, and of fp64 unless activations are. Vectors,
        convolutions and routers are fp32 always. Activations have config.torch_dtype.
    device: where the tensors go, one by one; None: torch's default. The host holds at most one shard besides.
    recipe: as for HybridModel; it says nothing about matrices that are kept quantized.
    quantized: "keep" leaves quantized matrices as they are, modules of nn.quantized that pass gradients on and are not
        trained; "dequantize" makes of them weights to be trained (and drops input scales and those of a KV cache).
        Quantized embeddings are decoded either way.

    Raises ValueError in words that say what to do; of tensors that are unknown, missing, misshaped or of a wrong dtype,
    all at once, with the nearest name.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; allowed: None, {', '.join(map(str, DTYPES))}")
    if quantized not in ("keep", "dequantize"):
        raise ValueError(f"quantized: got {quantized!r}; allowed: 'keep', 'dequantize'")
    source = open_model(path)
    with torch.device("meta"):
        model = HybridModel(source.config, recipe)
    device = torch.get_default_device() if device is None else torch.device(device)
    fitted = fit(model, source.entries, source.folder)
    if quantized == "keep":
        insert_layers(model, fitted.kept, fitted.problems)
        model.kv_cache_algorithm = (source.quantization or {}).get("kv_cache")
    fill(model, fitted, dtype, device, quantized == "dequantize")
    model.source = source.companions
    return model.eval()


def save_pretrained(
    model: HybridModel,
    path: str | os.PathLike,
    layout: str = "published",
    max_shard_bytes: float = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model into the folder `path`, whole or not at all: what was there stays until all is written and fsynced.

    layout: "published" (backbone.*, one tensor an expert, mtp.*), "transformers" (model.*, experts stacked), or, for a
        model with quantized matrices or KV cache and only for such a one, "modelopt" (hf_quant_config.json and
        quantization_config, as vLLM reads them; an FP8 matrix without input_scale gets 1).
    max_shard_bytes: a larger model is split into files of at most so many bytes, with an index.
    dtype: of everything but quantized matrices, scales and the routers; None: as the model has them. The published
        checkpoints have torch.bfloat16.

    Tokenizer, generation_config.json and the like come along from `model.source`. Raises ValueError.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; allowed: None, {', '.join(map(str, DTYPES))}")
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}; allowed: more than 0")
    quantized = what_is_quantized(model)
    if quantized is None and layout == "modelopt":
        raise ValueError("layout: got 'modelopt' for a model of which nothing is quantized; allowed: the others")
    if quantized and layout != "modelopt":
        raise ValueError(
            f"layout: got {layout!r} for a model with quantized {quantized}; allowed: 'modelopt', or a model that was "
            "read with quantized='dequantize'"
        )
    save(model, Path(path).resolve(), layout, max_shard_bytes, dtype)


def read_config(path: str | os.PathLike) -> HybridConfig:
    """That of the model which from_pretrained gives. Raises ValueError as it does."""
    return open_model(path).config


def open_model(path: str | os.PathLike) -> Source:
    """What lies in the folder, with the config of the model that from_pretrained gives. Raises ValueError as it does.

    What transformers 5 saves has the config of multi-token prediction and none of its tensors.
    """
    source = open_source(Path(path))
    config = source.config
    if not config.num_nextn_predict_layers or any(name.startswith("mtp.") for name in source.entries):
        return source
    warnings.warn(f"checkpoint: {source.folder} holds no tensors of mtp.*: the model is without", stacklevel=3)
    return replace(source, config=config.replace(num_nextn_predict_layers=0))


# The model is a storey below and knows no files; these two are its methods wherever this module is imported, as api.py does.
HybridModel.from_pretrained = staticmethod(from_pretrained)
HybridModel.save_pretrained = save_pretrained
