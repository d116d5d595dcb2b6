"""The model and the tokenizer of a path on the command line, and a quantized model's folder.

What `check_...` looks at is there before torch is: a wrong path is told at once. They raise ValueError naming the flag.
"""

import os
import shutil
from pathlib import Path


def load_model(path: Path):
    """(model, tokenizer, step) of a run of nvfp4 train, (model, None, None) of the folder of a checkpoint; the model on the
    device that this machine computes on."""
    from nvfp4_kernels.checkpoint.huggingface import from_pretrained
    from nvfp4_kernels.ops._device import default_device
    from nvfp4_kernels.train.setup import load_run

    if (path / "run.json").is_file():
        return load_run(path)
    require_checkpoint(path)
    return from_pretrained(path, device=default_device()), None, None


def require_checkpoint(path: Path, flag: str = "model") -> None:
    """Raises ValueError where there is neither that nor a run."""
    if not (path / "config.json").is_file():
        what = "holds" if path.exists() else "does not exist: it holds"
        raise ValueError(
            f"{flag}: {path} {what} no run (run.json) and no checkpoint (config.json); do: name a folder of either"
        )


def check_model(flag: str, path: Path, tokenizer: bool = True):
    """A run, of which a snapshot has begun to be written, or a checkpoint, whole by its header and (`tokenizer`) with a
    tokenizer.json. Returns its HybridConfig."""
    from nvfp4_kernels.checkpoint.source import open_source
    from nvfp4_kernels.model.config import HybridConfig
    from nvfp4_kernels.train.settings import Settings

    if (path / "run.json").is_file():
        Settings.load(path, flag)
        snapshots = sorted((path / "checkpoints").glob("step_*"))
        if not snapshots:
            raise ValueError(f"{flag}: {path} holds no checkpoint yet; do: let it train further")
        return HybridConfig.load(path) if (path / "config.json").is_file() else None
    require_checkpoint(path, flag)
    if tokenizer and not (path / "tokenizer.json").is_file():
        do = f"copy the tokenizer's files into {path}"
        raise ValueError(f"tokenizer: got {path / 'tokenizer.json'}, which is no file; do: {do}")
    return open_source(path).config


def check_config(path: str | None) -> None:
    """That of --config; None for none."""
    from nvfp4_kernels.model.config import HybridConfig

    if path is None:
        return
    try:
        HybridConfig.load(path)
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"config: {error.filename} {why}; do: give a config.json, or its folder") from None
    except ValueError as error:
        raise ValueError(f"config: {path}: {str(error).removeprefix(f'{path}: ')}") from None


def check_text(flag: str, path: str | None) -> bytes | None:
    """A file with text in it, which is returned; None for none."""
    from nvfp4_kernels.train.corpus import looks_binary

    if path is None:
        return None
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"{flag}: {path} {why}; do: give a text file") from None
    if not text:
        raise ValueError(f"{flag}: got 0 tokens in {path}; allowed: at least 2 (do: give a file with text in it)")
    if looks_binary(text[: 1 << 16]):
        raise ValueError(f"{flag}: {path} is binary, not text; do: give a text file")
    return text


def check_number(flag: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{flag}: got {value}; allowed: at least {least}")


def load_with_tokenizer(path: Path):
    """(model, tokenizer), the tokenizer as a training has it: of bytes, without special tokens."""
    model, tokenizer, _ = load_model(path)
    return model, tokenizer or tokenizer_beside(path, model.config)


def tokenizer_beside(path: Path, config):
    """That of a checkpoint's folder."""
    from nvfp4_kernels.train.tokenizer import load_tokenizer

    return load_tokenizer(str(path / "tokenizer.json"), config.vocab_size, config.eos_token_id)


def check_out(out: Path) -> None:
    """A folder that is not there, or is empty, and can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already; do: name another folder")
    check_folder(out)


def check_folder(out: Path) -> None:
    """A folder that can be written to, or made."""
    at = out.absolute()
    while not at.exists():
        at = at.parent
    why = "is no folder" if not at.is_dir() else "" if os.access(at, os.W_OK | os.X_OK) else "is not writable"
    if why:
        raise ValueError(f"out: {out} cannot be written, {at} {why}; do: name another folder")


def check_file(flag: str, path: str | None) -> None:
    """A file that can be written, or made: minutes of work are not to be lost for want of a folder."""
    if path is None:
        return
    file = Path(path)
    what = None
    if file.is_dir():
        what = "is a folder"
    elif not file.parent.is_dir():
        what = f"cannot be written, {file.parent} is no folder"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        what = f"cannot be written, {file if file.exists() else file.parent} is not writable"
    if what:
        raise ValueError(f"{flag}: {path} {what}; do: name another file")


def save_quantized(model, tokenizer, out: Path, write_more, read=None):
    """The checkpoint in ModelOpt's layout, its tokenizer, what write_more(folder) adds: whole at `out`, or nothing there.
    Returns what write_more does.

    In the published layout where the plan left all in high precision. read: of a model on the meta device, what gives
    its tensors by their names.
    """
    from nvfp4_kernels.checkpoint.save import SHARD_BYTES, save, what_is_quantized
    from nvfp4_kernels.train.byte_level import tokenizer_json

    part = out.with_name(f".writing-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        layout = "modelopt" if what_is_quantized(model) else "published"
        save(model, part.resolve(), layout, SHARD_BYTES, None, read)
        if not (part / "tokenizer.json").exists():  # of a run, which names its tokenizer and does not hold it
            bytewise = tokenizer.name == "bytes"
            text = tokenizer_json(tokenizer) if bytewise else Path(tokenizer.name).read_text(encoding="utf-8")
            (part / "tokenizer.json").write_text(text, encoding="utf-8")
        result = write_more(part)
        if out.exists():
            out.rmdir()  # empty: check_out saw to it
        part.rename(out)
        return result
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def read_text(flag: str, path: str | None, tokenizer):
    """The tokens of a text file; None for no path. Raises ValueError naming `flag`."""
    from nvfp4_kernels.ptq.evaluate import Text

    text = check_text(flag, path)
    return None if text is None else Text.encode(text, tokenizer, path, flag)
