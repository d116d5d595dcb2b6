"""tokenizer.json through the `tokenizers` package."""

from pathlib import Path


def open_tokenizer(path: Path, argument: str):
    """A tokenizers.Tokenizer, which takes a text as long as it is: truncation and padding, which a file keeps from the call
    before it was saved (a fine-tuning's, say), are left out, as transformers does. Raises ValueError naming `argument` for
    a malformed file, ImportError without the package."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{argument}: a tokenizer.json needs a package; do: pip install tokenizers") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises a bare Exception for any malformed file
        raise ValueError(f"{argument}: {path} is no tokenizer.json ({str(error).splitlines()[0]})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
