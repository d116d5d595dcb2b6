"""What lies in a checkpoint's folder: its config, its tensors by name, how it is quantized. No tensor is read here.

Recognized by the files, never by the folder's name:
    config.json with model.safetensors, or with model.safetensors.index.json and the shards that it names
    run.json with checkpoints/step_*/   a run of `nvfp4 train`: its newest whole snapshot
    manifest.json                       one such snapshot
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.checkpoint.modelopt import read_quantization
from nvfp4_kernels.model.config import HybridConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Copied as they are from where a model was read to where it is saved: what a tokenizer and generation are made of, and
# the code that a config.json may name.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "configuration_*.py", "modeling_*.py",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MTP_BLOCK = re.compile(r"mtp\.layers\.\d+\.eh_proj\.")  # a block of multi-token prediction has one


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says what and what to do."""


class Entry(NamedTuple):
    """A tensor in a shard, a file. dtype: safetensors' word for it (F32, BF16, F8_E4M3, U8, ...). start: of its bytes."""

    shard: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Source:
    """folder: of the config. companions: of the tokenizer and the like, absolute, None where there are none. quantization: of
    `read_quantization`, None where nothing is said of it."""

    folder: Path
    companions: Path | None
    config: HybridConfig
    entries: dict[str, Entry]
    quantization: dict | None


def open_source(path: str | Path) -> Source:
    """Raises CheckpointError for a folder that holds no whole checkpoint, ValueError for a config of another model."""
    folder, companions = Path(path), Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint: {folder} {what}; allowed: the folder of a checkpoint or of a run")
    if (folder / "run.json").exists():
        found, damaged = snapshot.newest(folder / "checkpoints")
        if found is None:
            why = damaged[0] if damaged else f"checkpoint: {folder} holds no snapshot yet; do: let it train further"
            raise CheckpointError(why)
        folder = found.path
        tokenizer = Path(read_json(companions / "run.json").get("tokenizer", "bytes"))
        companions = tokenizer.parent if tokenizer.is_file() else folder
    elif (folder / snapshot.MANIFEST).exists():
        folder = snapshot.load(folder).path
    shards = find_shards(folder)
    values = read_json(folder / "config.json")
    path = folder / "hf_quant_config.json"
    in_file = read_json(path) if path.exists() else None
    quantization = read_quantization(in_file, values.pop("quantization_config", None))
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"checkpoint: {name} stands in both {Path(entries[name].shard).name} and {shard.name}"
                )
            entries[name] = entry
    try:
        config = HybridConfig.from_dict(_with_blocks_counted(values, entries))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    there = any(path.is_file() for pattern in COMPANIONS for path in companions.glob(pattern))
    return Source(folder, companions.absolute() if there else None, config, entries, quantization)


def _with_blocks_counted(values: dict, entries: Iterable[str]) -> dict:
    """Megatron-Bridge says of a block of multi-token prediction how often training used it, not how often it is there (issue
    5946 there)."""
    used = values.get("num_nextn_predict_layers")
    blocks = {found[0] for name in entries if (found := _MTP_BLOCK.match(name))}
    if not isinstance(used, int) or used < 2 or len(blocks) > 1:
        return values
    return {"mtp_num_depths": used} | values | {"num_nextn_predict_layers": 1}


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, in order."""
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    if (folder / INDEX).exists():
        weights = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise CheckpointError(f"checkpoint: {folder / INDEX} has no weight_map of tensor to file; do: copy it anew")
        names = sorted(set(weights.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX}: got {outside[0]!r}; allowed: names of files in this folder")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise CheckpointError(
                f"checkpoint: {folder} lacks {len(missing)} of the {len(names)} shards that its index names: "
                f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; do: download them"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    if len(files) > 1:
        raise CheckpointError(
            f"checkpoint: {folder} holds {len(files)} shards and no {INDEX}; do: copy the index that belongs to them"
        )
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        why = (
            f"holds {pickles[0]}, a pickle, which may run any code when it is read, and no safetensors; "
            "do: have it converted to safetensors where it comes from"
            if pickles
            else "holds no *.safetensors; allowed: the folder of a checkpoint or of a run"
        )
        raise CheckpointError(f"checkpoint: {folder} {why}")
    return files


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, after checking that all their bytes are there."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"checkpoint: {path} is no safetensors file, or cut short; do: copy it anew")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(str(path), name, t["dtype"], tuple(t["shape"]), t["data_offsets"][0])
                for name, t in header.items()
            }
            wanted = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint: {path} is no safetensors file, its header is damaged") from error
    if size != wanted:
        raise CheckpointError(
            f"checkpoint: {path} is cut short or grown, {size} bytes of {wanted}; do: copy or download it anew"
        )
    return entries


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist; allowed: the folder of a whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} is no JSON ({error}); do: copy it anew") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: got a {type(values).__name__}; allowed: a JSON object")
    return values
