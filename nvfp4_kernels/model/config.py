"""HybridConfig: the geometry of a Nemotron-H model, in the field names of its published config.json.

Read with `HybridConfig.load(folder)`, written with `config.save(folder)`. Fields of a config.json that mean nothing here
are kept in `extra` and written back, so that a round trip loses nothing. Nothing here imports torch before it is asked for a
dtype: the command line looks at configs first.
"""

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_LAYER_NAMES = {"mamba": "M", "linear_attention": "M", "moe": "E", "attention": "*", "full_attention": "*", "mlp": "-"}
_ALIASES = {
    "norm_eps": "layer_norm_epsilon", "rms_norm_eps": "layer_norm_epsilon", "dtype": "torch_dtype",
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias", "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit", "mamba_dt_init_floor": "time_step_floor", "num_local_experts": "n_routed_experts",
}  # fmt: skip
# What a config.json may say only in this one way: the model has no other form of it.
_FIXED = {
    "model_type": ("nemotron_h",), "mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu", "swish"),
    "sliding_window": (None,), "attention_dropout": (0,), "hidden_dropout": (0,), "residual_in_fp32": (False,),
}  # fmt: skip
# Null is what converters from Megatron write where nothing is set: these then are as if nothing were said.
_UNSET = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern", "n_group", "topk_group", "torch_dtype")
_DERIVED = (
    "model_type",
    "mlp_hidden_act",
    "mamba_hidden_act",
    "num_hidden_layers",
    "architectures",
    "layers_block_type",
    "layer_types",
    "mtp_layers_block_type",
)
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class HybridConfig:
    """The geometry of a Nemotron-H model, in the field names of its published config.json.

    hybrid_override_pattern: a letter a layer: M Mamba-2, E mixture of experts, * attention, - dense MLP. torch_dtype: of the
    activations. `load(folder)` reads a config.json, `save(folder)` writes one, `replace(**changes)` gives another.
    Raises ValueError for fields that do not fit together.
    """

    hybrid_override_pattern: str
    vocab_size: int = 131072
    hidden_size: int = 4096
    tie_word_embeddings: bool = False
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 262144
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    torch_dtype: str = "bfloat16"  # of the activations; parameters are float32 in training
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    attention_bias: bool = False
    # dense MLP
    intermediate_size: int = 21504
    mlp_bias: bool = False
    # Mamba-2; the inner width is mamba_num_heads * mamba_head_dim (config.json's `expand` is not used)
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    mamba_proj_bias: bool = False
    chunk_size: int = 128
    time_step_min: float = 0.001  # these three shape dt_bias's start only
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    # mixture of experts
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    n_shared_experts: int = 1
    moe_shared_expert_intermediate_size: int = 7688  # the width of all shared experts together
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    # multi-token prediction: physical blocks (0 or 1) and how many tokens ahead training looks with the one block's weights
    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = "*E"
    mtp_num_depths: int = 2
    mtp_loss_scaling_factor: float = 0.3
    # start and balancing
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    router_bias_update_rate: float = 1e-3
    router_aux_loss_coef: float = 1e-4
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        limits = self.time_step_limit
        if not isinstance(limits, (tuple, list)) or len(limits) != 2 or not all(isinstance(x, Real) for x in limits):
            raise ValueError(f"time_step_limit: got {limits!r}; allowed: two numbers, 0 <= low <= high")
        object.__setattr__(self, "time_step_limit", tuple(float(limit) for limit in limits))
        _check(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.torch_dtype)

    def replace(self, **changes) -> "HybridConfig":
        """A copy with some fields changed. Raises ValueError, naming the field, for one that does not exist."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict) -> "HybridConfig":
        """From the fields of a config.json. Fields that mean nothing here go to `extra`.

        Raises ValueError, naming the field, what it holds and what is allowed, where the model would not be what the file says.
        """
        said = dict(values)
        values = {_ALIASES[name]: value for name, value in said.items() if name in _ALIASES}
        for name, value in said.items():  # of two names for a field the published modelling code reads ours
            if name not in _ALIASES and (value is not None or name not in values):
                values[name] = value
        for name, allowed in _FIXED.items():
            if name in values and values[name] not in allowed:
                raise ValueError(f"{name}: got {values[name]!r}; allowed: {', '.join(map(repr, allowed))}")
        values.pop("quantization_config", None)  # of the tensors beside the file, not of the model
        layers = values.get("num_hidden_layers")
        for pattern, *lists in (
            ("hybrid_override_pattern", "layers_block_type", "layer_types"),
            ("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
        ):
            for name in lists:
                if values.get(name):  # the list of names wins over the pattern, as in transformers
                    values[pattern] = "".join(_letter(name, layer) for layer in values[name])
        if not isinstance(values.get("hybrid_override_pattern"), str):
            raise ValueError(
                "hybrid_override_pattern: got nothing; allowed: one letter a layer, of " + " ".join(LETTERS)
            )
        for name in _UNSET:
            if values.get(name, 0) is None:
                del values[name]
        if values.get("num_key_value_heads", 0) is None and "num_attention_heads" in values:  # as transformers has it
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None and values.get("attention_head_dim"):  # Nemotron-H's name for it
            values["head_dim"] = values["attention_head_dim"]
        if values.pop("use_bias", False):
            values["mamba_proj_bias"] = True
        if type(values.get("torch_dtype")).__name__ == "dtype":
            values["torch_dtype"] = str(values["torch_dtype"]).removeprefix("torch.")
        limits = values.get("time_step_limit")
        if not limits:
            values.pop("time_step_limit", None)
        elif isinstance(limits, (list, tuple)):  # transformers 5 writes infinity as {"__float__": "Infinity"}
            values["time_step_limit"] = [float(x["__float__"]) if x == {"__float__": "Infinity"} else x for x in limits]
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {name: value for name, value in values.items() if name in names}
        aside = {name: value for name, value in values.items() if name not in names and name not in _DERIVED}
        config = cls(**given, extra=aside)
        if layers not in (None, config.num_hidden_layers):
            pattern = f"{config.num_hidden_layers}, the length of hybrid_override_pattern"
            raise ValueError(f"num_hidden_layers: got {layers}; allowed: {pattern}")
        return config

    def to_dict(self) -> dict:
        """The fields as config.json holds them, `extra` included."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        limit = values.pop("time_step_limit")
        if limit != (0.0, math.inf):  # published files say nothing where nothing is clamped
            values["time_step_limit"] = list(limit)
        head = {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]}
        fixed = {"num_hidden_layers": self.num_hidden_layers, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
        # transformers knows the list only under its own names and derives it from the pattern.
        return head | self.extra | values | fixed

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HybridConfig":
        """From a config.json or the folder that holds one. Raises ValueError for a file that is no config of this family."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got a {type(values).__name__}; allowed: a JSON object of config fields")
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes config.json into the folder `path` (or to `path` itself where it ends in .json)."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / "config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path


def _letter(name: str, layer: str) -> str:
    if layer not in _LAYER_NAMES:
        raise ValueError(f"{name}: got {layer!r}; allowed: {', '.join(_LAYER_NAMES)}")
    return _LAYER_NAMES[layer]


def _known(changes: dict) -> None:
    names = [f.name for f in dataclasses.fields(HybridConfig)]
    for name in changes:
        if name not in names:
            near = difflib.get_close_matches(name, names, 3)
            raise ValueError(
                f"{name}: no such field of HybridConfig; "
                + (f"near: {', '.join(near)}" if near else f"allowed: {', '.join(names)}")
            )


def _check(config: HybridConfig) -> None:
    def demand(holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(config, name)!r}; allowed: {allowed}")

    letters = "letters " + ", ".join(f"{letter} ({what})" for letter, what in LETTERS.items())
    for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
        pattern = getattr(config, name)
        demand(isinstance(pattern, str) and len(pattern) > 0 and set(pattern) <= set(LETTERS), name, letters)
    optional = {"moe_latent_size"}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "int" or f.type is int or f.name in optional and value is not None:
            least = 0 if f.name in ("num_nextn_predict_layers", "n_shared_experts") else 1
            demand(
                isinstance(value, int) and not isinstance(value, bool) and value >= least,
                f.name,
                f"an integer >= {least}",
            )
        if f.type == "bool" or f.type is bool:
            demand(isinstance(value, bool), f.name, "true, false")
        if f.type == "float" or f.type is float:
            number = isinstance(value, Real) and not isinstance(value, bool)
            demand(number and 0 <= value < math.inf, f.name, "a number >= 0")
        if f.name.endswith("_token_id"):
            ids = value if isinstance(value, list) and f.name == "eos_token_id" else [value]
            known = all(i is None or isinstance(i, int) and not isinstance(i, bool) for i in ids)
            demand(known, f.name, "a token id" + (", or a list of them" if f.name == "eos_token_id" else ""))
    demand(config.torch_dtype in _DTYPES, "torch_dtype", ", ".join(_DTYPES))
    demand(2 <= config.conv_kernel <= 4, "conv_kernel", "2, 3, 4")
    demand(config.num_nextn_predict_layers <= 1, "num_nextn_predict_layers", "0, 1 (one block serves every depth)")
    demand(
        config.num_attention_heads % config.num_key_value_heads == 0,
        "num_key_value_heads", f"a divisor of num_attention_heads ({config.num_attention_heads})",
    )  # fmt: skip
    demand(
        config.mamba_num_heads % config.n_groups == 0,
        "n_groups", f"a divisor of mamba_num_heads ({config.mamba_num_heads})",
    )  # fmt: skip
    demand(
        config.num_experts_per_tok <= config.n_routed_experts,
        "num_experts_per_tok", f"at most n_routed_experts ({config.n_routed_experts})",
    )  # fmt: skip
    demand(
        config.n_routed_experts % config.n_group == 0,
        "n_group", f"a divisor of n_routed_experts ({config.n_routed_experts})",
    )  # fmt: skip
    demand(config.topk_group <= config.n_group, "topk_group", f"at most n_group ({config.n_group})")
    demand(
        config.num_experts_per_tok <= config.n_routed_experts // config.n_group * config.topk_group,
        "topk_group", f"groups with at least num_experts_per_tok ({config.num_experts_per_tok}) experts together",
    )  # fmt: skip
    low, high = config.time_step_limit
    demand(0 <= low <= high, "time_step_limit", "two numbers, 0 <= low <= high")
    demand(
        0 < config.time_step_min <= config.time_step_max,
        "time_step_min",
        f"above 0, at most time_step_max ({config.time_step_max})",
    )
