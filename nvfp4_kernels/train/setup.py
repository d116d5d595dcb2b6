"""What a run is built from: settings to config, model, corpus and batches; and a finished run back to a model."""

from itertools import islice
from pathlib import Path

import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.checkpoint.huggingface import from_pretrained, read_config
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset
from nvfp4_kernels.ops._device import default_device
from nvfp4_kernels.recipe import Recipe, get_recipe
from nvfp4_kernels.train.corpus import Corpus, load_corpus
from nvfp4_kernels.train.data import Batch, Packer, split_documents
from nvfp4_kernels.train.ranks import shard
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.tokenizer import load_tokenizer


def build_config(settings: Settings) -> HybridConfig:
    if settings.from_:
        return read_config(settings.from_)
    return HybridConfig.load(settings.config) if settings.config else preset(settings.preset)


def build_model(
    config: HybridConfig, settings: Settings, recipe: Recipe | None = None, resumed: Path | None = None
) -> HybridModel:
    """The same weights for the same seed, whatever the recipe.

    resumed: a snapshot of the run, which tells how the matrices of the checkpoint that it began from are kept. What is sharded
    is whole on the host first, in each process.
    """
    torch.manual_seed(settings.seed)
    recipe = recipe or get_recipe(settings.recipe)
    if settings.from_:
        folder, device = resumed or settings.from_, "cpu" if settings.shard else default_device()
        model = from_pretrained(folder, torch.float32, device, recipe, settings.quantized)
    else:
        model = HybridModel(config, recipe=recipe)
    model.train_only(settings.patterns)
    model.checkpoint_activations = settings.checkpoint_activations
    if settings.shard:
        shard(model)
    return model.to(default_device())


def load_data(settings: Settings, config: HybridConfig, tokenizer) -> Corpus:
    data = None if settings.data is None else Path(settings.data)
    return load_corpus(data, tokenizer, config.vocab_size, settings.bin_dtype)


def split(settings: Settings, corpus: Corpus) -> tuple[Packer, list[Batch]]:
    """The training packer and the fixed validation batches, the same for every recipe and seed."""
    train, held = split_documents(corpus.starts, settings.validation, settings.batch * settings.length)
    packer = Packer(corpus.ids, train, settings.batch, settings.length, settings.seed, corpus.end_label)
    if len(held) == 0:
        return packer, []
    wanted = max(
        1, min(settings.validation_tokens, int((held[:, 1] - held[:, 0]).sum())) // (settings.batch * settings.length)
    )
    checks = Packer(corpus.ids, held, settings.batch, settings.length, 0, corpus.end_label)
    return packer, list(islice(checks, wanted))


def load_run(run: Path):
    """(model, tokenizer, step) of a run's newest whole snapshot, on the device that this machine computes on.

    Raises ValueError where there is none.
    """
    settings = Settings.load(run, "model")
    found, damaged = snapshot.newest(Path(run) / "checkpoints")
    if found is None:
        raise ValueError(damaged[0] if damaged else f"model: {run} holds no checkpoint yet; do: let it train further")
    config = HybridConfig.load(found.path)
    model = from_pretrained(found.path, device=default_device(), recipe=get_recipe(settings.recipe))
    return model, load_tokenizer(settings.tokenizer, config.vocab_size, config.eos_token_id), found.step
