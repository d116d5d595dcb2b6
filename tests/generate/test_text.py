"""Pieces of text add up to the whole, split no character, and end before a stop string; chat templates as transformers'."""

import json

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.generate.chat import FolderTokenizer, render
from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.generate.loop import Pace, end_ids, stream
from nvfp4_kernels.generate.sample import Sampling
from nvfp4_kernels.generate.text import Detokenizer, StopStrings
from nvfp4_kernels.train.tokenizer import ByteTokenizer

TEXTS = ["plain", "naïve café", "数学は美しい 🙂🙃", "a\u0301 e\u0301", "🙂" * 5, ""]
TEMPLATE = """{%- for m in messages %}
<|im_start|>{{ m['role'] }}
{{ m['content'] | trim }}<|im_end|>
{%- if m.role == 'system' %}{{ raise_exception('no ' + m.role) }}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant {{ bos_token }}{{ messages | tojson }}{{ messages | tojson(ensure_ascii=True, separators=(",", ":")) }}
{%- if tools is not none %}tools{% endif %}{{ strftime_now("%%") }}
{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE of few merges: most characters beyond ASCII take several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|im_start|>", "<|im_end|>", "<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["plain text of plain words, the words of a text"] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pieces_of(tokenizer, ids, sizes):
    detokenizer, start, pieces = Detokenizer(tokenizer), 0, []
    while start < len(ids):
        size = next(sizes)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("sizes", [[1], [2, 1, 3]])
def test_pieces_are_whole_characters_and_the_whole_text(folder, kind, text, sizes):
    tokenizer = ByteTokenizer() if kind == "bytes" else FolderTokenizer(folder)
    ids = list(text.encode()) if kind == "bytes" else tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, iter(sizes * (len(ids) + 1)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert pieces[-1] == "" and len([piece for piece in pieces if piece]) >= min(len(text), 2) * (not text.isascii())


def test_what_is_no_utf8_becomes_replacements_and_holds_nothing_up():
    for ids in ([0x61, 0xFF, 0x62, 0xE2, 0x82], [0x80] * 9, [0xF0, 0x9F, 0x61], [0xC3]):
        pieces = pieces_of(ByteTokenizer(), ids, iter([1] * 20))
        assert "".join(pieces) == bytes(ids).decode("utf-8", "replace")


def test_a_decoder_that_minds_the_first_token():
    """SentencePiece drops the leading space of the first token that has a text; the pieces keep those of all others."""

    pieces = pieces_of(Words(), [1, 2, 3], iter([1, 1, 1]))
    assert pieces == ["w1", " w2", " w3", ""]
    assert pieces_of(Words(), [0, 1, 0, 0, 2, 3], iter([1] * 6)) == ["", "w1", "", "", " w2", " w3", ""]


@pytest.fixture(scope="module")
def pieces_and_bytes():
    """SentencePiece's way: ▁ is a space, dropped at the very beginning; what has no piece is spelled in byte tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hello": 256, "▁world": 257, "▁": 258, "<unk>": 259}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    decoders = tokenizers.decoders
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>"])

    class Fallback:
        bytewise = False

        def decode(self, ids):
            return inner.decode(list(ids)).encode()

    return Fallback()


@pytest.mark.parametrize("sizes", [[1], [2], [3, 1]])
def test_characters_in_byte_tokens_behind_each_other(pieces_and_bytes, sizes):
    """Where a run of byte tokens ends within a character, the decoder shows each of its bytes as U+FFFD, those of the
    characters before included, which were given already or came in the same push."""
    for text in ("你好吗", "🙂🙃", "né"):
        ids = [256, *text.encode(), 257]
        pieces = pieces_of(pieces_and_bytes, ids, iter(sizes * len(ids)))
        assert "".join(pieces) == f"Hello{text} world" and "\ufffd" not in "".join(pieces)
    broken = [256, *"你".encode(), 0xFF, 257]
    assert "".join(pieces_of(pieces_and_bytes, broken, iter([1] * 9))).endswith("\ufffd world")


@pytest.mark.parametrize("prompt", [
    [256], [256, 258], [260, 256, 260, 260], [256, *"你好".encode()], ["è".encode()[1]] * 9 + [256]
])  # fmt: skip
def test_a_continuation_keeps_its_leading_space(pieces_and_bytes, prompt):
    """The first token of it is not the first of the text."""
    for new in ([257, 256], [*"好".encode(), 257]):
        detokenizer = Detokenizer(pieces_and_bytes, prompt)
        got = "".join(detokenizer.push([token]) for token in new) + detokenizer.finish()
        assert pieces_and_bytes.decode(prompt) + got.encode() == pieces_and_bytes.decode(prompt + new)
    alone = Detokenizer(pieces_and_bytes, [260])
    assert alone.push([257]) == "world"


def test_a_stream_keeps_the_space_behind_the_prompt(build):
    model = build("M*", vocab_size=40)
    prompt, whole = [3, 5], model.generate(torch.tensor([[3, 5]]), 6)[0].tolist()
    text = "".join(stream(Engine(model, slots=1), Words(), prompt, max_new_tokens=6))
    assert (Words().decode(prompt).decode() + text).split(" ") == [f"w{i}" for i in whole if i]


@pytest.mark.parametrize("stops, parts, want, stopped", [
    (["END"], ["a", "E", "N", "x", "EN", "D", "more"], "aENx", True), (["END"], ["aE", "N"], "aEN", False),
    (["b", "ab"], ["xab"], "x", True), (["aab"], ["aa", "ab", "z"], "a", True), ([], ["a", "b"], "ab", False),
    (["\n\n"], ["one\n", "two\n", "\n"], "one\ntwo", True),
])  # fmt: skip
def test_text_ends_before_the_first_stop_string(stops, parts, want, stopped):
    ending = StopStrings(stops)
    got = "".join(ending.push(part) for part in parts) + ending.finish()
    assert (got, ending.stopped) == (want, stopped)


@pytest.mark.parametrize("stop", ["END", ["a", ""], [b"a"]])
def test_bad_stops(stop):
    with pytest.raises(ValueError, match="stop: got"):
        StopStrings(stop)


@pytest.mark.parametrize("speculative", [0, 2])
def test_stream(build, speculative):
    model = build("M*", vocab_size=260, num_nextn_predict_layers=1)
    engine, pace = Engine(model, slots=1, speculative=speculative), Pace()
    arguments = (engine, ByteTokenizer(), list(b"once"), Sampling(1.0, seed=4), 60)
    text = "".join(stream(*arguments, pace=pace))
    request = engine.add(list(b"once"), Sampling(1.0, seed=4), 60)
    for _ in engine.run():
        pass
    assert text == ByteTokenizer().decode(request.tokens).decode("utf-8", "replace")
    assert pace.prompt_tokens == 4 and pace.new_tokens == 59 and pace.prompt_seconds > 0 < pace.new_seconds
    assert "prefill 4 tokens" in str(pace) and ("acceptance length" in str(pace)) == bool(speculative)
    stop = text[20:23]
    stopped = "".join(stream(*arguments, stop=[stop]))
    assert stopped == text[: text.index(stop)] and not engine.busy
    for piece in stream(*arguments):
        assert piece
        break
    assert not engine.busy and engine._free == [0]  # whoever stops listening frees the slot


def test_chat_templates_are_rendered_as_transformers_does(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer, messages = FolderTokenizer(folder), [{"role": "user", "content": " ça va <b>? "}]
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render(TEMPLATE, messages, bos_token="<s>") == want and "<|im_start|>user\nça va" in want
    assert tokenizer.chat(messages) == theirs(want, add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match=r"chat: the chat template refuses \(no system\)"):
        tokenizer.chat([{"role": "system", "content": "x"}])
    with pytest.raises(ValueError, match="chat: the chat template refuses"):
        render("{{ messages.__class__.__mro__ }}", messages)  # the sandbox
    with pytest.raises(ValueError, match=r"chat: the chat template refuses \(can only concatenate str"):
        render("{{ 'a' + 1 }}", messages)
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}."
    assert render(marked, messages) == theirs.apply_chat_template(messages, chat_template=marked, tokenize=False)


def test_where_templates_lie(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    messages = [{"role": "user", "content": "w"}]

    def text():
        tokenizer = FolderTokenizer(tmp_path)
        return tokenizer.decode(tokenizer.chat(messages)).decode()

    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert text() == "its own file"
    (tmp_path / "chat_template.jinja").unlink()
    many = [{"name": "tools", "template": "no"}, {"name": "default", "template": "default one"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": many}))
    assert text() == "default one"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no chat_template; do: give the prompt without --chat"):
        text()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        FolderTokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer.json; do: copy"):
        FolderTokenizer(tmp_path / "none")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match="do: pip install jinja2"):
        FolderTokenizer(folder).chat([])
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match="do: pip install tokenizers"):
        FolderTokenizer(folder)


def test_the_command_reads_a_hugging_face_folder(folder, build, capsys, tmp_path):
    from nvfp4_kernels.cli import main

    model = build("M*", vocab_size=300, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())

    def text(*more):
        assert main.main(["generate", "--model", str(tmp_path), "--prompt", "plain", "--tokens", "12", *more]) == 0
        return capsys.readouterr()

    plain = text("--temperature", "0")
    drafted = text("--temperature", "0", "--speculative", "2")
    assert plain.out == drafted.out and plain.out.startswith("plain")
    assert "decode 11 tokens" in plain.err and "mean acceptance length" in drafted.err
    chat = text("--chat", "--temperature", "0").out
    ids = FolderTokenizer(tmp_path).chat([{"role": "user", "content": "plain"}])
    new = model.generate(torch.tensor([ids]), 12)[0, len(ids) :]
    assert chat == FolderTokenizer(tmp_path).decode(new).decode() + "\n"
    first = int(model.generate(torch.tensor([FolderTokenizer(tmp_path).encode("plain")]), 1)[0, -1])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, first]}))
    assert text("--temperature", "0", "--quiet").out == "\n"
    read, ids = nk.HybridModel.from_pretrained(tmp_path), torch.tensor([FolderTokenizer(tmp_path).encode("plain")])
    assert torch.equal(read.generate(ids, 12), ids) and read.generate(ids, 2, stop_ids=[]).shape[1] == ids.shape[1] + 2


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "special": True}])
def test_answers_end_where_the_tokenizer_says(eos, build, tmp_path):
    """Some exports leave generation_config.json empty, and config.json names another token than the one that ends answers."""
    build("M", vocab_size=40, eos_token_id=2).save_pretrained(tmp_path)
    added = [{"id": 7, "content": "<start>"}, {"id": 11, "content": "<end>"}]
    files = {"generation_config": {}, "tokenizer_config": {"eos_token": eos}, "tokenizer": {"added_tokens": added}}
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    model = nk.HybridModel.from_pretrained(tmp_path)
    assert end_ids(model) == [2, 11]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 3]}))
    assert end_ids(model) == [2, 11, 3]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").unlink()
    assert end_ids(model) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 39, 40]}))
    assert end_ids(model) == [2, 39]  # the others are no tokens of the model, which Engine.add would refuse


def test_streams_of_one_engine_take_turns(build):
    """Whoever takes the step, each stream gives its whole text."""
    tokenizer, model = Letters(), build(vocab_size=40)
    prompts = [[1, 2, 3], [7, 5]]
    alone = ["".join(stream(Engine(model, slots=1), tokenizer, prompt, max_new_tokens=12)) for prompt in prompts]
    engine = Engine(model, slots=2)
    streams, texts = [stream(engine, tokenizer, prompt, max_new_tokens=12) for prompt in prompts], ["", ""]
    while any(stream is not None for stream in streams):
        for i, each in enumerate(streams):
            piece = None if each is None else next(each, None)
            texts[i] += piece or ""
            streams[i] = None if piece is None else each
    assert texts == alone


class Words:
    bytewise = False

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids if i).removeprefix(" ").encode()


class Letters:
    bytewise = True

    def decode(self, ids):
        return bytes(65 + i for i in ids)
