"""The tokenizer of a Hugging Face folder: tokenizer.json through the `tokenizers` package, and its chat template."""

import json
from datetime import datetime
from pathlib import Path

from nvfp4_kernels.checkpoint.source import read_json
from nvfp4_kernels.checkpoint.tokenizer_json import open_tokenizer


class FolderTokenizer:
    """encode(text) -> ids with the special tokens that the tokenizer adds to a plain text, decode(ids) -> bytes without
    special tokens, chat(messages) -> ids of a conversation that awaits the answer.

    Raises ValueError where the folder has no tokenizer.json, ImportError where a package is missing.
    """

    bytewise = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"model: {folder} holds no tokenizer.json; do: copy the tokenizer's files into it")
        self.inner = open_tokenizer(path, "model")

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, ids) -> bytes:
        return self.inner.decode([int(i) for i in ids]).encode()

    def chat(self, messages: list[dict]) -> list[int]:
        """messages: {"role": ..., "content": ...} each. Raises ValueError where there is no template or it refuses them."""
        text = render(self._template(), messages, **self._special_tokens())
        return self.inner.encode(text, add_special_tokens=False).ids

    def _template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._config().get("chat_template")
        if isinstance(template, list):  # several by name, of which "default" is for chats
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not template:
            raise ValueError(f"chat: {self.folder} has no chat_template; do: give the prompt without --chat")
        return template

    def _config(self) -> dict:
        path = self.folder / "tokenizer_config.json"
        return read_json(path) if path.is_file() else {}

    def _special_tokens(self) -> dict[str, str]:
        tokens = {name: value for name, value in self._config().items() if name.endswith("_token")}
        return {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in tokens.items()
            if isinstance(value, (str, dict))
        }


def render(template: str, messages: list[dict], **variables) -> str:
    """A chat template as transformers renders it: sandboxed, blocks trimmed, with the prompt for the answer at its end."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat: a chat template needs a package; do: pip install jinja2") from error

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, by which trainers find the answers: here what is between them."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = refuse
    try:
        variables |= dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        return environment.from_string(template).render(**variables)
    except Exception as error:  # a template is code, and may raise any
        raise ValueError(f"chat: the chat template refuses ({' '.join(str(error).split())})") from error


def _tojson(value, ensure_ascii: bool = False, indent: int | None = None, **options) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
