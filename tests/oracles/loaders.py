"""How vLLM decides what a module of its Nemotron-H is quantized with, from ModelOpt's account of a checkpoint.

Its rules in our words (layers/quantization/modelopt.py and models/nemotron_h.py): backbone is called model there,
q, k and v are one module, and so are all experts of a layer; a name "x*" excludes x and what lies in it.
"""

from fnmatch import fnmatch


def algorithms(account: dict, prefixes: list[str]) -> dict[str, str | None]:
    """account: hf_quant_config.json's "quantization" or config.json's quantization_config. prefix of vLLM -> algorithm."""
    excluded = account["exclude_modules"] if "exclude_modules" in account else account.get("ignore", [])
    names = []
    for name in excluded:
        names += [name[:-1], name[:-1] + ".*"] if name.endswith("*") and not name.endswith(".*") else [name]
    names = [renamed(name) for name in names if not name.startswith("mtp")]
    layers = {renamed(name): layer["quant_algo"] for name, layer in account.get("quantized_layers", {}).items()}
    mixed = account["quant_algo"] == "MIXED_PRECISION"
    assert layers or not mixed
    return {p: None if skipped(p, names) else named(p, layers) if mixed else account["quant_algo"] for p in prefixes}


def renamed(name: str) -> str:
    name = "model" + name.removeprefix("backbone") if name.startswith("backbone") else name
    return name.replace("embeddings", "embed_tokens")


def pieces(prefix: str) -> list[str]:
    stem, _, leaf = prefix.rpartition(".")
    return [f"{stem}.{part}_proj" for part in "qkv"] if leaf == "qkv_proj" else [prefix]


def skipped(prefix: str, names: list[str]) -> bool:
    found = {any(p == name for name in names) for p in pieces(prefix)}
    assert len(found) == 1, f"some parts of {prefix} are quantized and some are not"
    if "experts" in prefix:
        found = {any(prefix in name for name in names if "experts" in name)}
    return found.pop() or any(name in prefix and name != prefix or fnmatch(prefix, name) for name in names)


def named(prefix: str, layers: dict[str, str]) -> str | None:
    found = {layers[p] for p in pieces(prefix) if p in layers}
    assert len(found) < 2, f"{prefix} would be of {found}"
    within = (algorithm for name, algorithm in layers.items() if name.startswith(prefix + "."))
    return found.pop() if found else next(within, None)
