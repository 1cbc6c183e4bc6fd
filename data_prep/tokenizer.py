"""Tokenizers without transformers: text is always encoded as text, control tokens only ever come from us.

A literal `<|endoftext|>` inside a document is ordinary text here. Control tokens (those the tokenizer marks special)
enter a document through the template or as its end, never because a web page contains their spelling.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.data_prep.engines import Engine, HuggingFaceEngine, SentencePieceEngine
from megatron_mixcpt.data_prep.joining import Joining, find_joining
from megatron_mixcpt.errors import ConfigError

# What travels with the data, so that a checkpoint can be exported with its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass
class Tokenizer:
    """What the pipeline knows about a tokenizer.

    `control` maps the spelling of control tokens to ids; `vocab_size` counts added tokens.
    """

    kind: str  # "huggingface" | "sentencepiece"
    files: list[Path]
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    adds_bos: bool  # whether the tokenizer itself begins a text with bos
    control: dict[str, int]
    engine: Engine  # the reference: what it says is right
    decode: Any  # list[int] -> str
    chat_template: str | None = None
    joining: Joining | None = None  # how to encode a text that continues another
    definition: str | None = None  # tokenizer.json, for engines other than the reference
    special_names: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token ... as the template knows them

    @property
    def hash(self) -> str:
        """xxh3-128 over the names and bytes of the tokenizer's files, as they lie beside the data."""
        state = xxhash.xxh3_128()
        for path in self.files:
            data = path.read_bytes()
            state.update(f"{self._final_name(path)}\0{len(data)}\0".encode())
            state.update(data)
        return state.hexdigest()

    def _final_name(self, path: Path) -> str:
        if len(self.files) > 1:
            return path.name
        return "tokenizer.model" if self.kind == "sentencepiece" else "tokenizer.json"

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files beside the data."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            shutil.copyfile(path, folder / self._final_name(path))


def load_tokenizer(path: str | Path, *, eos_token: str | int | None = None) -> Tokenizer:
    """Load a Hugging Face directory, a `tokenizer.json` or a SentencePiece `.model`. `eos_token`: the end-of-document
    token's spelling or id, in place of what the files say.

    Raises ConfigError when there is no such tokenizer or it has no usable end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _load_huggingface(path / "tokenizer.json", path, eos_token)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return _load_sentencepiece(models[0], eos_token)
        if any(path.glob("*.gguf")):
            raise ConfigError(
                f"tokenizer: {path} holds a GGUF file, whose tokenizer is not read here. Make a directory of it with\n"
                f"  mixcpt convert --hf {path} --out CKPT && mixcpt export CKPT --out DIR\n"
                "and give that as tokenizer and as model.hf"
            )
        raise ConfigError(
            f"tokenizer: {path} has no tokenizer.json. For an older tokenizer, write one with "
            "`transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`"
        )
    if not path.is_file():
        raise ConfigError(f"tokenizer: {path} does not exist (give a directory, a tokenizer.json or a .model file)")
    if path.suffix == ".model":
        return _load_sentencepiece(path, eos_token)
    return _load_huggingface(path, None, eos_token)


def _load_huggingface(path: Path, folder: Path | None, eos_token: str | int | None) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError(f"tokenizer: {path} is not a tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    control = {token.content: index for index, token in sorted(added.items()) if token.special}
    settings = _read_settings(folder) if folder else {}
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            names[key] = value
    if eos_token is not None:
        names["eos_token"] = eos_token if isinstance(eos_token, str) else backend.id_to_token(eos_token)
    eos = names.get("eos_token")
    if eos is None:
        raise ConfigError(
            f"tokenizer: {path} does not say which token ends a document; set eos_token to one of: "
            f"{', '.join(list(control)[:12]) or '(it has no special tokens)'}"
        )
    ids: dict[str, int] = {}
    for key, name in names.items():
        index = backend.token_to_id(name)
        if index is not None:
            ids[key] = index
        elif key == "eos_token":
            raise ConfigError(f"tokenizer: eos_token {name!r} is not in the vocabulary of {path}")
    # Before special tokens are switched off in text: does the tokenizer begin a text with bos by itself?
    probe = backend.encode("a", add_special_tokens=True).ids
    adds_bos = ids.get("bos_token") is not None and probe[:1] == [ids["bos_token"]]
    definition = backend.to_str()
    after_control = False
    if control:
        name, index = next(iter(control.items()))
        marked = backend.encode(name + "x", add_special_tokens=False).ids
        after_control = marked != [index, *backend.encode("x", add_special_tokens=False).ids]
    backend.encode_special_tokens = True
    engine = HuggingFaceEngine(backend)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else [path]
    return Tokenizer(
        kind="huggingface",
        files=files,
        vocab_size=max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1),
        eos_id=ids["eos_token"],
        bos_id=ids.get("bos_token"),
        pad_id=ids.get("pad_token", ids["eos_token"]),
        adds_bos=adds_bos,
        control=control,
        engine=engine,
        decode=lambda tokens: backend.decode(tokens, skip_special_tokens=False),
        chat_template=_read_template(folder, settings) if folder else None,
        joining=find_joining(engine, after_control=after_control),
        definition=definition,
        special_names=names,
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings.update(json.loads((folder / name).read_text(encoding="utf-8")))
            except ValueError as error:
                raise ConfigError(f"tokenizer: {folder / name} is not valid JSON: {error}") from None
    return settings


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item["name"]: item["template"] for item in template}
        return named.get("default")
    return template


def _load_sentencepiece(path: Path, eos_token: str | int | None) -> Tokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError):
        raise ConfigError(f"tokenizer: {path} is not a SentencePiece model") from None
    size = processor.GetPieceSize()
    control = {processor.IdToPiece(i): i for i in range(size) if processor.IsControl(i)}
    eos = processor.eos_id() if eos_token is None else eos_token
    eos = control.get(eos, -1) if isinstance(eos, str) else eos
    if eos < 0:
        raise ConfigError(
            f"tokenizer: {path} has no end-of-document token; set eos_token to one of: {', '.join(control) or '(none)'}"
        )
    bos = processor.bos_id()
    engine = SentencePieceEngine(processor)
    return Tokenizer(
        kind="sentencepiece",
        files=[path],
        vocab_size=size,
        eos_id=eos,
        bos_id=bos if bos >= 0 else None,
        pad_id=processor.pad_id() if processor.pad_id() >= 0 else eos,
        adds_bos=bos >= 0,  # Llama's convention; a bare .model does not say
        control=control,
        engine=engine,
        joining=find_joining(engine, after_control=False),
        decode=lambda tokens: processor.decode([int(token) for token in tokens]),
    )
