"""ModelOpt's account of a quantized checkpoint, both ways: hf_quant_config.json and config.json's quantization_config.

The tensors speak for themselves (a uint8 weight is NVFP4, a float8_e4m3fn one FP8), so reading needs the account only to
refuse what these modules are not; writing gives loaders (vLLM, TensorRT-LLM, transformers) all that they look for.
Source: ModelOpt's export/quant_utils.py and convert_hf_config.py, vLLM's quantization/modelopt.py.
"""

from collections.abc import Iterable, Mapping

from nvfp4_kernels import __version__
from nvfp4_kernels.checkpoint import compressed_tensors

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8")
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_GROUPS = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "NVFP4": {"input_activations": _NVFP4, "weights": _NVFP4},
    "W4A16_NVFP4": {"weights": _NVFP4},
}


def read_quantization(in_file: dict | None, in_config: dict | None) -> dict | None:
    """{"method", "kv_cache": "FP8" or None} from config.json's quantization_config, or else from hf_quant_config.json.

    Raises ValueError for a method, an algorithm or a cache format of which nothing here can read the values.
    """
    if in_config is None:
        if in_file is None:
            return None
        details = in_file.get("quantization", {})
        _require_object("quantization", details)
        kv_cache = details.get("kv_cache_quant_algo")
        method = "modelopt"
    else:
        _require_object("quantization_config", in_config)
        details = in_config.get("quantization", in_config)
        _require_object("quantization_config", details)
        kv_cache = details.get("kv_cache_quant_algo") or _cache_format(details.get("kv_cache_scheme"))
        method = str(in_config.get("quant_method", "modelopt"))
    if kv_cache not in (None, "", "FP8"):
        raise ValueError(f"kv_cache_quant_algo: got {kv_cache!r}; allowed: FP8, or none")
    if method == compressed_tensors.METHOD:
        compressed_tensors.check(details)
    elif method.startswith("modelopt"):
        _check(details)
    else:
        raise ValueError(f"quant_method: got {method!r}; allowed: modelopt, {compressed_tensors.METHOD}")
    return {"method": method, "kv_cache": kv_cache or None}


def _require_object(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {value!r}; allowed: a JSON object")


def _cache_format(scheme: dict | str | None) -> str | None:
    """ModelOpt writes an object for FP8 and the bare name of every other format."""
    if not scheme or isinstance(scheme, str):
        return scheme or None
    _require_object("kv_cache_scheme", scheme)
    bits, kind = scheme.get("num_bits", 8), scheme.get("type", "float")
    return "FP8" if (bits, kind) == (8, "float") else f"{bits}-bit {kind}"


def _check(details: dict) -> None:
    algorithm = str(details.get("quant_algo") or "").upper()
    named = [algorithm] if algorithm else []  # none where the cache alone is quantized
    if algorithm == "MIXED_PRECISION":
        layers = details.get("quantized_layers") or {}
        named = sorted({str(layer.get("quant_algo")).upper() for layer in layers.values()})
    for name in named:
        if name not in ALGORITHMS:
            raise ValueError(f"quant_algo: got {name!r}; allowed: {', '.join(ALGORITHMS)}, MIXED_PRECISION of these")
    sizes = {details.get("group_size")} | {
        x.get("group_size") for x in (details.get("quantized_layers") or {}).values()
    }
    if wrong := sizes - {None, 16}:
        raise ValueError(f"group_size: got {wrong.pop()}; allowed: 16, the block of NVFP4")


def write_quantization(algorithms: Mapping[str, str], others: Iterable[str], kv_cache: str | None) -> tuple[dict, dict]:
    """(hf_quant_config.json, config.json's quantization_config).

    algorithms: one of ALGORITHMS for each quantized matrix, by its name in the checkpoint, that of an expert included; none
        where the cache alone is quantized.
    others: the matrices that are not quantized, or patterns for them. kv_cache: "FP8" or None.
    """
    kinds = sorted(set(algorithms.values()))
    details: dict = {"quant_algo": "MIXED_PRECISION" if len(kinds) > 1 else kinds[0] if kinds else None}
    details["kv_cache_quant_algo"] = kv_cache
    if not kinds:
        groups = []
    elif len(kinds) == 1:
        details |= {"group_size": 16} if "NVFP4" in kinds[0] else {}
        details["exclude_modules"] = list(others)
        groups = [_GROUPS[kinds[0]] | {"targets": ["Linear"]}]
    else:
        # A layer that is not named here is not quantized: that is how loaders read a mixed checkpoint.
        details["quantized_layers"] = {name: _layer(algorithm) for name, algorithm in algorithms.items()}
        groups = [
            _GROUPS[kind] | {"targets": sorted(name for name, algorithm in algorithms.items() if algorithm == kind)}
            for kind in kinds
        ]
    producer = {"name": "nvfp4_kernels", "version": __version__}
    in_config = {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": details.get("exclude_modules", []),
        "quant_algo": details["quant_algo"],
        "producer": producer,
        "quant_method": "modelopt",
    }
    if "quantized_layers" in details:
        in_config["quantized_layers"] = details["quantized_layers"]
    if kv_cache:
        in_config["kv_cache_scheme"] = _FP8
    return {"producer": producer, "quantization": details}, in_config


def _layer(algorithm: str) -> dict:
    return {"quant_algo": algorithm} | ({"group_size": 16} if "NVFP4" in algorithm else {})
