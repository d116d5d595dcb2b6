"""What is written is what is read: every layout, every bit, one file or many, and what a folder holds besides."""

import json
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file, save_file

import nvfp4_kernels as nk
from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.nn.quantized import NVFP4Weight
from tests.oracles import loaders
from tests.oracles.checkpoints import BASE, CASES, decode, drawn_fp8, drawn_nvfp4, published, randomize, write


def model_of(**changes):
    return randomize(nk.HybridModel(nk.HybridConfig(**(BASE | changes))))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_bitwise(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(*(t[name].contiguous().reshape(-1).view(torch.uint8) for t in (a, b))), name


def without_noise(model):
    return {name: t for name, t in model.state_dict().items() if not name.endswith("noise")}


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("case", ["biases", "mtp-latent", "attention-bias", "tied"])
def test_own_round_trip(case, layout, tmp_path):
    more = {"attention-bias": dict(attention_bias=True), "tied": dict(tie_word_embeddings=True)}
    model = model_of(**(CASES | more)[case])
    model.save_pretrained(tmp_path / "a", layout)
    again = nk.HybridModel.from_pretrained(tmp_path / "a")
    assert_bitwise(without_noise(model), without_noise(again))
    assert again.config == model.config and not again.training
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == (case == "tied")
    assert all(not t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert all(r.load.eq(0).all() for r in again.routers().values())
    other = "published" if layout == "transformers" else "transformers"
    again.save_pretrained(tmp_path / "b", other, max_shard_bytes=50_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    third = nk.HybridModel.from_pretrained(tmp_path / "b")
    assert_bitwise(without_noise(model), without_noise(third))
    third.save_pretrained(tmp_path / "c", layout)
    assert (tmp_path / "c/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert (tmp_path / "c/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()


def test_fp64_is_kept_where_it_can_be_multiplied(tmp_path):
    tensors = {name: t.double() for name, t in published(model_of()).items()}
    for name in ("float64", "bfloat16"):
        write(tmp_path / name, model_of(torch_dtype=name).config.to_dict(), tensors)
        model = nk.HybridModel.from_pretrained(tmp_path / name)
        assert model.lm_head.weight.dtype == (torch.float64 if name == "float64" else torch.float32)
        assert model(torch.arange(6)[None]).isfinite().all()


def test_names_are_the_published_ones(tmp_path):
    model = model_of(**CASES["mtp-latent"])
    model.save_pretrained(tmp_path / "a")
    assert_bitwise(tensors_of(tmp_path / "a"), published(model))
    model.save_pretrained(tmp_path / "b", "transformers")
    names = set(tensors_of(tmp_path / "b"))
    assert {"model.layers.1.mixer.experts.up_proj", "model.embeddings.weight", "lm_head.weight"} <= names
    assert "mtp.layers.0.mixer.experts.down_proj" in names and not any(n.startswith("backbone") for n in names)


@pytest.mark.parametrize("backbone", ["backbone", "model"])
def test_embeddings_in_the_singular(backbone, tmp_path):
    """As transformers 5 saved them until its pull request 48075."""
    model = model_of()
    tensors = {name.replace("backbone", backbone): t for name, t in published(model).items()}
    tensors[f"{backbone}.embedding.weight"] = tensors.pop(f"{backbone}.embeddings.weight")
    write(tmp_path, model.config.to_dict(), tensors)
    assert_bitwise(without_noise(nk.HybridModel.from_pretrained(tmp_path)), without_noise(model))


def test_a_block_counted_as_often_as_it_is_used(tmp_path):
    """As Megatron-Bridge wrote num_nextn_predict_layers (its issue 5946); blocks of weights of their own are another matter."""
    model = model_of(**CASES["mtp-latent"])
    config, tensors = model.config.to_dict() | {"num_nextn_predict_layers": 3}, published(model)
    del config["mtp_num_depths"]
    write(tmp_path / "a", config, tensors)
    again = nk.HybridModel.from_pretrained(tmp_path / "a")
    assert_bitwise(without_noise(again), without_noise(model))
    assert again.config == model.config.replace(mtp_num_depths=3)
    block = {
        n.replace("mtp.layers.0.", "mtp.layers.2."): t.clone()
        for n, t in tensors.items()
        if n.startswith("mtp.layers.0.")
    }
    write(tmp_path / "b", config, tensors | block)
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers: got 3; allowed: 0, 1 \(one block"):
        nk.HybridModel.from_pretrained(tmp_path / "b")
    write(tmp_path / "c", config, {n: t for n, t in tensors.items() if not n.startswith("mtp.")})
    with pytest.warns(UserWarning, match="no tensors of mtp"):
        assert nk.HybridModel.from_pretrained(tmp_path / "c").mtp is None


def test_bf16_checkpoint_bit_for_bit(tmp_path):
    """The published form: everything BF16 but the routers' bias; A_log, D, dt_bias and routers are fp32 in the model."""
    model = model_of(**CASES["mtp-latent"])
    tensors = {
        n: t if n.endswith("gate.e_score_correction_bias") else t.bfloat16() for n, t in published(model).items()
    }
    wide = {n: t.float() if n.endswith("gate.weight") else t for n, t in tensors.items()}
    write(tmp_path / "a", model.config.to_dict() | {"torch_dtype": "bfloat16", "some_field": [1, None]}, tensors, 3)
    again = nk.HybridModel.from_pretrained(tmp_path / "a")
    for name, parameter in again.named_parameters():
        narrow = parameter.dim() >= 2 and not name.endswith(("conv1d.weight", "gate.weight"))
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
    again.save_pretrained(tmp_path / "b", dtype=torch.bfloat16, max_shard_bytes=30_000)
    assert_bitwise(tensors_of(tmp_path / "b"), wide)
    assert json.loads((tmp_path / "b/config.json").read_text())["some_field"] == [1, None]
    full = nk.HybridModel.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    for name, parameter in full.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name).float())
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wide.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wide.values())
    sizes = [p.stat().st_size for p in (tmp_path / "b").glob("*.safetensors")]
    largest = max(t.nbytes for t in wide.values())
    assert max(sizes) <= max(30_000, largest) + 20_000 and len(sizes) > 3  # and a header


def test_model_is_all_its_own(tmp_path):
    """What is loaded shares no memory with the files, which may be replaced while it lives."""
    model = model_of()
    model.save_pretrained(tmp_path / "a")
    again = nk.HybridModel.from_pretrained(tmp_path / "a")
    before = {name: t.clone() for name, t in without_noise(again).items()}
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_bitwise(without_noise(again), before)


def quantized_checkpoint(folder, kinds, **changes):
    """A ModelOpt checkpoint of drawn bits and its matrices in float64. kinds: end of a module's name -> its format."""
    generator = torch.Generator().manual_seed(5)
    model = model_of(hidden_size=64, moe_latent_size=32, torch_dtype="bfloat16", **changes)
    tensors = {n: t if "gate." in n else t.bfloat16() for n, t in published(model).items()}
    wanted, layers = {}, {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        kind = next((kind for end, kind in kinds.items() if module.endswith(end)), None)
        if kind is None:
            continue
        parts = (drawn_fp8 if kind == "FP8" else drawn_nvfp4)(*tensors[name].shape, generator)
        if kind == "W4A16_NVFP4":
            del parts["input_scale"]
        wanted[module] = decode(parts)
        tensors |= {f"{module}.{part}": t for part, t in parts.items()}
        layers[module] = {"quant_algo": kind} | ({} if kind == "FP8" else {"group_size": 16})
    algorithms = {layer["quant_algo"] for layer in layers.values()}
    details = {"quant_algo": algorithms.pop(), "exclude_modules": [], "kv_cache_quant_algo": "FP8"}
    if algorithms:
        details |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    write(folder, model.config.to_dict(), tensors, 2, hf_quant_config={"producer": {}, "quantization": details})
    return tensors, wanted, layers


def matrix(model, module: str) -> torch.Tensor:
    stem, expert, leaf = module.rsplit(".", 2)
    if not stem.endswith(".experts"):
        return model.get_submodule(module).weight
    return model.get_parameter(f"{stem}.{leaf}")[int(expert)]


MIXED = {"in_proj": "FP8", "shared_experts.up_proj": "FP8", "fc1_latent_proj": "FP8", ".up_proj": "NVFP4",
         ".down_proj": "NVFP4"}  # fmt: skip
QUANTIZED = {
    "nvfp4": {"in_proj": "NVFP4", "out_proj": "NVFP4", "up_proj": "NVFP4", "down_proj": "NVFP4"},
    "w4a16": {"up_proj": "W4A16_NVFP4", "down_proj": "W4A16_NVFP4"},
    "fp8": {"_proj": "FP8"},
    "mixed": MIXED,
    "experts mixed": {"up_proj": "FP8", "down_proj": "NVFP4"},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_modelopt(kind, tmp_path):
    tensors, wanted, layers = quantized_checkpoint(tmp_path / "a", QUANTIZED[kind], num_nextn_predict_layers=1)
    kept = nk.HybridModel.from_pretrained(tmp_path / "a")
    plain = nk.HybridModel.from_pretrained(tmp_path / "a", quantized="dequantize")
    for module, value in wanted.items():
        assert torch.equal(matrix(plain, module).double(), value.float().double()), module
    ids, config = torch.randint(0, 96, (2, 9)), kept.config.replace(torch_dtype="float32")
    with torch.no_grad():
        kept.config = plain.config = config
        logits = kept(ids), plain(ids)
    torch.testing.assert_close(*logits, atol=1e-4 * logits[1].std().item(), rtol=0)
    assert {n for n, _ in kept.named_parameters()} < {n for n, _ in plain.named_parameters()}
    kept.config = kept.config.replace(torch_dtype="bfloat16")
    kept.save_pretrained(tmp_path / "b", "modelopt", dtype=torch.bfloat16, max_shard_bytes=60_000)
    assert_bitwise(tensors_of(tmp_path / "b"), tensors)
    account = json.loads((tmp_path / "b/hf_quant_config.json").read_text())["quantization"]
    assert account["kv_cache_quant_algo"] == "FP8"
    in_config = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert in_config["quant_method"] == "modelopt" and in_config["quant_algo"] == account["quant_algo"]
    assert in_config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    matrices = {n.removesuffix(".weight") for n in tensors if tensors[n].dim() > 1 and n.endswith(".weight")}
    if len({layer["quant_algo"] for layer in layers.values()}) > 1:
        assert account["quant_algo"] == "MIXED_PRECISION"
        assert account["quantized_layers"] == in_config["quantized_layers"] == layers
        targets = [name for group in in_config["config_groups"].values() for name in group["targets"]]
        assert sorted(targets) == sorted(layers) and in_config["ignore"] == []
    else:  # every matrix that is not quantized is excluded, and none that is
        assert in_config["ignore"] == account["exclude_modules"]
        assert account["group_size" if kind != "fp8" else "quant_algo"] == (16 if kind != "fp8" else "FP8")
        excluded = {m for m in matrices if any(fnmatchcase(m, p) for p in account["exclude_modules"])}
        assert excluded == matrices - set(layers)


LETTERS = {
    "M": ("in_proj", "out_proj"), "E": ("experts", "shared_experts.up_proj", "shared_experts.down_proj", "fc1_latent_proj",
    "fc2_latent_proj"), "*": ("qkv_proj", "o_proj"), "-": ("up_proj", "down_proj"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*QUANTIZED, "attention"])
def test_account_as_vllm_reads_it(kind, tmp_path):
    kinds = (QUANTIZED | {"attention": {f"{part}_proj": "FP8" for part in "qkv"}})[kind]
    _, _, layers = quantized_checkpoint(tmp_path / "a", kinds, num_nextn_predict_layers=1)
    model = nk.HybridModel.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", "modelopt")
    account = json.loads((tmp_path / "b/hf_quant_config.json").read_text())["quantization"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= account.keys() or account[
        "quant_algo"
    ] != "NVFP4"
    wanted = {"lm_head": None}
    for i, letter in enumerate(model.config.hybrid_override_pattern):
        for part in LETTERS[letter]:
            of_one = {"experts": "experts.0.up_proj", "qkv_proj": "q_proj"}.get(part, part)
            algorithm = layers.get(f"backbone.layers.{i}.mixer.{of_one}", {}).get("quant_algo")
            wanted[f"model.layers.{i}.mixer.{part}"] = algorithm
    assert loaders.algorithms(account, list(wanted)) == wanted
    in_config = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert loaders.algorithms(in_config, list(wanted)) == wanted


def test_account_in_the_config_alone_and_cache_scales(tmp_path):
    """As Super's: quantization_config in config.json, scales of the KV cache beside k_proj and v_proj."""
    tensors, _, layers = quantized_checkpoint(tmp_path / "a", MIXED)
    for name, scale in (("k_proj.k_scale", 0.5), ("v_proj.v_scale", 0.25)):
        tensors[f"backbone.layers.3.mixer.{name}"] = torch.tensor(scale)
    config = json.loads((tmp_path / "a/config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": [],
        "kv_cache_scheme": scheme,
    }  # fmt: skip
    write(tmp_path / "c", config, tensors)
    model = nk.HybridModel.from_pretrained(tmp_path / "c")
    assert model.backbone.layers[3].mixer.k_proj.k_scale == 0.5 and model.kv_cache_algorithm == "FP8"
    model.save_pretrained(tmp_path / "d", "modelopt", dtype=torch.bfloat16)
    assert_bitwise(tensors_of(tmp_path / "d"), tensors)
    plain = nk.HybridModel.from_pretrained(tmp_path / "c", quantized="dequantize")
    plain.save_pretrained(tmp_path / "e", "transformers")
    assert "quantization_config" not in json.loads((tmp_path / "e/config.json").read_text())
    assert not any("k_scale" in name for name in tensors_of(tmp_path / "e"))


ALONE = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
IN_CONFIG = {"quant_method": "modelopt", "ignore": [], "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize("account", ["file", "config"])
def test_cache_alone_is_quantized(account, tmp_path):
    """As ModelOpt writes it: no algorithm for the weights, which are in high precision."""
    model = model_of()
    tensors, config = published(model), model.config.to_dict()
    scales = {f"backbone.layers.3.mixer.{x}_proj.{x}_scale": torch.tensor(0.5) for x in "kv"}
    files = {"hf_quant_config": {"quantization": ALONE}} if account == "file" else {}
    config |= {} if files else {"quantization_config": IN_CONFIG}
    write(tmp_path, config, tensors | scales, **files)
    again = nk.HybridModel.from_pretrained(tmp_path)
    assert again.kv_cache_algorithm == "FP8" and again.backbone.layers[3].mixer.v_proj.v_scale == 0.5
    assert_bitwise({n: t for n, t in without_noise(again).items() if n not in scales}, without_noise(model))
    with pytest.raises(
        ValueError, match="layout: got 'published' for a model with quantized KV cache; allowed: 'modelopt'"
    ):
        again.save_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "b", "modelopt")
    saved = nk.HybridModel.from_pretrained(tmp_path / "b")
    assert saved.kv_cache_algorithm == "FP8"
    assert_bitwise(without_noise(saved), without_noise(again))


def test_cache_scales_beside_the_projections(tmp_path):
    """As compressed-tensors has them: of the attention, in the activations' dtype, of shape [1]."""
    model = model_of()
    scales = {f"backbone.layers.3.mixer.{x}_scale": torch.tensor([0.25], dtype=torch.bfloat16) for x in "kv"}
    write(tmp_path, model.config.to_dict(), published(model) | scales)
    attention = nk.HybridModel.from_pretrained(tmp_path).backbone.layers[3].mixer
    assert attention.k_proj.k_scale.dtype == torch.float32 and attention.k_proj.k_scale == 0.25
    assert attention.v_proj.v_scale == 0.25


def test_compressed_tensors(tmp_path):
    """The same bits under llm-compressor's names, whose global scales are divisors, of shape [1]."""
    tensors, wanted, layers = quantized_checkpoint(tmp_path / "a", {"up_proj": "NVFP4", "in_proj": "NVFP4",
                                                                    "down_proj": "NVFP4"})  # fmt: skip
    for module in layers:
        tensors[f"{module}.weight_packed"] = tensors.pop(f"{module}.weight")
        tensors[f"{module}.weight_global_scale"] = 1 / tensors.pop(f"{module}.weight_scale_2").reshape(1)
        tensors[f"{module}.input_global_scale"] = 1 / tensors.pop(f"{module}.input_scale").reshape(1)
        wanted[module] = decode({
            "weight": tensors[f"{module}.weight_packed"], "weight_scale": tensors[f"{module}.weight_scale"],
            "weight_scale_2": 1 / tensors[f"{module}.weight_global_scale"],
        })  # fmt: skip
    config = json.loads((tmp_path / "a/config.json").read_text())
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": False}
    group = {"weights": weights, "input_activations": weights | {"dynamic": "local"}, "targets": ["Linear"]}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip
    write(tmp_path / "c", config, tensors)
    plain = nk.HybridModel.from_pretrained(tmp_path / "c", quantized="dequantize")
    for module, value in wanted.items():
        assert torch.equal(matrix(plain, module).double(), value.float().double()), module
    kept = nk.HybridModel.from_pretrained(tmp_path / "c")
    module = next(m for m in layers if m.endswith("in_proj"))
    assert kept.get_submodule(module).input_scale == 1 / tensors[f"{module}.input_global_scale"][0]
    kept.save_pretrained(tmp_path / "d", "modelopt")
    again = nk.HybridModel.from_pretrained(tmp_path / "d")
    assert_bitwise(without_noise(again), without_noise(kept))


@pytest.mark.parametrize("kind", ["NVFP4", "FP8"])
def test_embeddings_that_are_quantized(kind, tmp_path):
    """As ModelOpt's recipe for Nano 4B makes them, weights alone; nothing here looks quantized rows up."""
    quantized_checkpoint(tmp_path / "a", QUANTIZED["w4a16"])
    config, tensors = json.loads((tmp_path / "a/config.json").read_text()), tensors_of(tmp_path / "a")
    draw = drawn_fp8 if kind == "FP8" else drawn_nvfp4
    parts = draw(*tensors.pop("backbone.embeddings.weight").shape, torch.Generator().manual_seed(2))
    del parts["input_scale"]
    write(tmp_path / "c", config, tensors | {f"backbone.embeddings.{part}": t for part, t in parts.items()}, 2)
    wanted = decode(parts).float()
    for quantized in ("keep", "dequantize"):
        model = nk.HybridModel.from_pretrained(tmp_path / "c", quantized=quantized)
        assert torch.equal(model.backbone.embeddings.weight, wanted)
        assert isinstance(model.get_submodule("backbone.layers.1.mixer.shared_experts.up_proj"), NVFP4Weight) == (
            quantized == "keep"
        )
        assert model(torch.arange(5)[None]).isfinite().all()
    narrow = nk.HybridModel.from_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    assert torch.equal(narrow.backbone.embeddings.weight, wanted.bfloat16())
    narrow.save_pretrained(tmp_path / "d", "modelopt")
    again = nk.HybridModel.from_pretrained(tmp_path / "d")
    assert_bitwise(without_noise(again), without_noise(narrow))


@pytest.mark.parametrize("left", ["out", "NaN", "0, a divisor"])
def test_experts_that_calibration_did_not_reach(left, tmp_path):
    """Their input_scale is missing (ModelOpt), NaN or a divisor of 0 (llm-compressor); the largest of the stack's stands in."""
    tensors, wanted, _ = quantized_checkpoint(tmp_path / "a", QUANTIZED["nvfp4"])
    stack, unreached = (
        "backbone.layers.1.mixer.experts",
        ("experts.2.up_proj", "experts.0.up_proj", "experts.7.down_proj"),
    )
    for name in [n for n in tensors if n.endswith("input_scale") and any(u in n for u in unreached)]:
        if left == "NaN":
            tensors[name] = torch.tensor(torch.nan)
        else:
            del tensors[name]
        if left.startswith("0"):
            tensors[name.replace("input_scale", "input_global_scale")] = torch.zeros(1)
    files = {"hf_quant_config": json.loads((tmp_path / "a/hf_quant_config.json").read_text())}
    write(tmp_path / "c", json.loads((tmp_path / "a/config.json").read_text()), tensors, **files)
    with pytest.warns(
        UserWarning, match="no input_scale for 6 matrices of experts, which its calibration did not reach"
    ):
        kept = nk.HybridModel.from_pretrained(tmp_path / "c")
    for part, missing in (("up_proj", (2, 0)), ("down_proj", (7,))):
        reached = [tensors[f"{stack}.{e}.{part}.input_scale"] for e in range(8) if e not in missing]
        scales = kept.get_submodule(f"{stack}.{part}").input_scale
        assert all(scales[e] == max(reached) for e in missing)
        assert [s for e, s in enumerate(scales) if e not in missing] == reached
    kept.save_pretrained(tmp_path / "d", "modelopt")
    assert all(t.isfinite().all() for n, t in tensors_of(tmp_path / "d").items() if n.endswith("input_scale"))
    plain = nk.HybridModel.from_pretrained(tmp_path / "c", quantized="dequantize")
    for module, value in wanted.items():
        assert torch.equal(matrix(plain, module).double(), value.float().double()), module


def test_experts_of_which_calibration_reached_none(tmp_path):
    tensors, *_ = quantized_checkpoint(tmp_path / "a", QUANTIZED["nvfp4"])
    for name in [n for n in tensors if n.endswith("down_proj.input_scale") and ".experts." in n]:
        tensors[name] = torch.tensor(torch.inf)
    write(tmp_path / "c", json.loads((tmp_path / "a/config.json").read_text()), tensors)
    with pytest.raises(
        ValueError, match=r"with NaN, infinite or negative scales: .*1.mixer.experts.down_proj.input_scale"
    ):
        nk.HybridModel.from_pretrained(tmp_path / "c")


def test_fp8_without_input_scale_gets_one(tmp_path):
    tensors, _, layers = quantized_checkpoint(tmp_path / "a", QUANTIZED["fp8"])
    write(tmp_path / "c", json.loads((tmp_path / "a/config.json").read_text()),
          {n: t for n, t in tensors.items() if not n.endswith("input_scale")})  # fmt: skip
    nk.HybridModel.from_pretrained(tmp_path / "c").save_pretrained(tmp_path / "d", "modelopt")
    written = tensors_of(tmp_path / "d")
    assert all(written[f"{module}.input_scale"] == 1 for module in layers)


def test_half_quantized_experts(tmp_path):
    quantized_checkpoint(tmp_path / "a", {"experts.0.up_proj": "NVFP4", ".up_proj": "NVFP4"})
    with pytest.raises(ValueError, match=r"half quantized: .*experts.down_proj; do: quantized='dequantize'"):
        nk.HybridModel.from_pretrained(tmp_path / "a")
    nk.HybridModel.from_pretrained(tmp_path / "a", quantized="dequantize")(torch.zeros(1, 3, dtype=torch.int64))


def test_layout_must_suit_the_model(tmp_path):
    quantized_checkpoint(tmp_path / "a", QUANTIZED["fp8"])
    kept = nk.HybridModel.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="layout: got 'published' for a model with quantized matrices"):
        kept.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="layout: got 'modelopt' for a model of which nothing is quantized"):
        model_of().save_pretrained(tmp_path / "b", "modelopt")
    assert not (tmp_path / "b").exists()


def test_companions_travel(tmp_path, monkeypatch):
    model = model_of()
    files = {"tokenizer": {"a": 1}, "generation_config": {"eos_token_id": [2, 11]}, "special_tokens_map": {}}
    write(tmp_path / "a", model.config.to_dict(), published(model), **files)
    (tmp_path / "a/chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "a/notes.txt").write_text("not ours")
    monkeypatch.chdir(tmp_path)
    again = nk.HybridModel.from_pretrained("a")
    monkeypatch.chdir("/")
    again.save_pretrained(tmp_path / "b")
    for name in (*(f"{name}.json" for name in files), "chat_template.jinja"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "b/notes.txt").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "a/tokenizer.json"])
def test_run_and_snapshot(tokenizer, tmp_path, monkeypatch):
    """The newest whole snapshot of a run, noise included; the tokenizer that the run was trained with travels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for place in (".", "a"):
        (tmp_path / place / "tokenizer.json").write_text(f'{{"in": "{place}"}}')
    models = {}
    for step in (1, 2, 3):
        model = models[step] = model_of()
        tensors, texts = {"model": model.state_dict(), "rng": {}}, {"config.json": json.dumps(model.config.to_dict())}
        snapshot.save(tmp_path / "run/checkpoints", step, tensors, {}, texts, keep=3)
    (tmp_path / "run/run.json").write_text(json.dumps({"tokenizer": tokenizer}))
    (tmp_path / "run/config.json").write_text("{}")
    damaged = tmp_path / "run/checkpoints/step_00000003/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000002"):
        assert_bitwise(dict(nk.HybridModel.from_pretrained(folder).state_dict()), dict(models[2].state_dict()))
    with pytest.raises(ValueError, match="CRC-32"):
        nk.HybridModel.from_pretrained(damaged.parent)
    nk.HybridModel.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "out")
    travelled = tmp_path / "out/tokenizer.json"
    assert travelled.exists() == (tokenizer != "bytes") and (tokenizer == "bytes" or '"a"' in travelled.read_text())


def test_a_plain_state_dict_is_read(tmp_path):
    model = nk.HybridModel(nk.HybridConfig(**(BASE | CASES["mtp"])))
    model.config.save(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = nk.HybridModel.from_pretrained(tmp_path, recipe="nvfp4")
    assert_bitwise(dict(model.state_dict()), dict(again.state_dict()))  # the noise too
    assert again.recipe.name == "nvfp4"
