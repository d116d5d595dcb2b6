"""compressed-tensors' account of an NVFP4 checkpoint (llm-compressor writes it); its tensors' names are in names.PACKED."""

METHOD = "compressed-tensors"
FORMAT = "nvfp4-pack-quantized"
_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def check(details: dict) -> None:
    """Raises ValueError where quantization_config speaks of anything but NVFP4 weights."""
    groups = details.get("config_groups") or {}
    for name, group in groups.items():
        form = group.get("format") or details.get("format")
        if form != FORMAT:
            raise ValueError(f"format: got {form!r} in {name}; allowed: {FORMAT}")
        weights = group.get("weights") or {}
        for field, allowed in _WEIGHTS.items():
            if field in weights and weights[field] != allowed:
                raise ValueError(f"{field}: got {weights[field]!r} for the weights of {name}; allowed: {allowed!r}")
    if not groups:
        raise ValueError("config_groups: got none; allowed: one or more groups of layers")
