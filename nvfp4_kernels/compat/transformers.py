"""One call that makes transformers' Mamba-2 models run on our kernels, on any device, and gives them back."""

import functools
import importlib
import inspect

from nvfp4_kernels.compat import causal_conv1d, mamba_ssm

# The models of transformers 5 whose modeling file has its own copies of the five functions.
MODELS = ("nemotron_h", "mamba2", "bamba", "zamba2", "granitemoehybrid", "falcon_h1")
FUNCTIONS = {
    "causal_conv1d_fn": causal_conv1d.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
    "mamba2_split_conv1d_scan_combined": mamba_ssm.mamba_split_conv1d_scan_combined,
    "mamba2_selective_state_update": mamba_ssm.selective_state_update,
    "mamba2_chunk_scan": mamba_ssm.mamba_chunk_scan_combined,
}


class Patch:
    """What patch_transformers changed; `undo` (or the end of a `with`) puts it back."""

    def __init__(self, replaced: list[tuple]):
        self._replaced = replaced

    def undo(self) -> None:
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def patch_transformers(*models: str) -> Patch:
    """Replace convolution, scan and state update in transformers' models, all of MODELS or those named.

    Models built before and after use the kernels, forward, backward and decoding. In training without a cache transformers
    hands the weight of a mixer's out_proj to the fused function, past its module: whatever recipe nk.convert gave that layer,
    this product is then in high precision.

    Raises ImportError without transformers 5, ValueError for a model that is not among MODELS, RuntimeError where a model's
    file has the names no more.
    """
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"models: got {', '.join(unknown)}; allowed: {', '.join(MODELS)}")
    replaced = []
    for model in models or MODELS:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        missing = [name for name in FUNCTIONS if not hasattr(module, name)]
        if missing:
            version = importlib.import_module("transformers").__version__
            raise RuntimeError(
                f"transformers: {version} has no {', '.join(missing)} in {module.__name__}; allowed: a version that has"
            )
        replaced += [(module, name, getattr(module, name)) for name in FUNCTIONS]
    for module, name, _ in replaced:
        setattr(module, name, _known_arguments(FUNCTIONS[name]))
    return Patch(replaced)


def _known_arguments(function):
    """transformers hands every keyword of the model's forward down; a kernel takes those that it has."""
    known = set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        return function(*arguments, **{name: value for name, value in keywords.items() if name in known})

    return call
