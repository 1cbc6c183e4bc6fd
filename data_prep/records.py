"""From a record (a dict) to documents: every kind in its plain form.

Plain form: turns joined by `separator`, no template, an end-of-document token at the end. The separator before an
answer belongs to the prompt, so prompt and answer are encoded apart exactly as they are when the model is asked.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.documents import ROLES, Document, Piece
from megatron_mixcpt.data_prep.format import (
    KIND_CHOSEN,
    KIND_INSTRUCTION,
    KIND_REJECTED,
    ROLE_ASSISTANT,
    ROLE_TEXT,
    TEXT_KINDS,
    pack_flags,
)
from megatron_mixcpt.data_prep.template import BadRecord, compile_template, get_value, template_keys
from megatron_mixcpt.data_prep.tokenizer import Tokenizer

Record = Mapping[str, Any]
Renderer = Callable[[Record], list[Document]]
Message = dict[str, Any]

OTHER_NAMES = {"human": "user", "gpt": "assistant", "function": "tool"}


def make_renderer(source: SourceConfig, tokenizer: Tokenizer, *, add_bos: bool) -> Renderer:
    """The function that turns records of `source` into documents. It raises BadRecord for a record it cannot use."""
    frame = Frame(tokenizer, add_bos)
    if source.kind in TEXT_KINDS:
        return _text_renderer(source, frame)
    layout: Callable[[list[Message], int, Any], Document]
    if source.format == "chat":
        from megatron_mixcpt.data_prep.chat import ChatRenderer

        layout = ChatRenderer(source, tokenizer).document
    else:
        layout = PlainRenderer(source, frame).document
    read = _instruction_reader(source) if source.kind == "instruction" else _preference_reader(source)
    kinds = (KIND_INSTRUCTION,) if source.kind == "instruction" else (KIND_CHOSEN, KIND_REJECTED)

    def render(record: Record) -> list[Document]:
        tools = get_value(record, source.tools) if source.tools else None
        documents = [layout(messages, kind, tools) for messages, kind in zip(read(record), kinds)]
        # A chat template may also trim what tells them apart.
        if len(documents) == 2 and documents[0].contents == documents[1].contents:
            raise BadRecord("no preference", "chosen and rejected are the same once they are laid out")
        return documents

    return render


class Frame:
    """What stands around every plain document: bos where the tokenizer wants one, and the end-of-document token."""

    def __init__(self, tokenizer: Tokenizer, add_bos: bool) -> None:
        self._bos = tokenizer.bos_id if add_bos else None
        self._eos = tokenizer.eos_id

    def around(self, pieces: list[Piece], kind: int, end_flags: int) -> list[Piece]:
        """`pieces` with their frame; `end_flags` are those of the end token."""
        begin: list[Piece] = [] if self._bos is None else [(self._bos, pack_flags(kind, ROLE_TEXT, False))]
        return [*begin, *pieces, (self._eos, end_flags)]


def _text_renderer(source: SourceConfig, frame: Frame) -> Renderer:
    assert source.text is not None
    fill = compile_template(source.text)
    kind = TEXT_KINDS[source.kind]
    flags = pack_flags(kind, ROLE_TEXT, True)

    def render(record: Record) -> list[Document]:
        text = fill(record)
        if not text or text.isspace():
            raise BadRecord("empty", "the text is empty")
        return [Document(kind, frame.around([(text, flags)], kind, flags))]

    return render


class PlainRenderer:
    """Lays turns out without a template: `prompt + separator + answer`, and so on for further turns."""

    def __init__(self, source: SourceConfig, frame: Frame) -> None:
        self._separator = source.separator
        self._answers_only = source.loss == "answer"
        self._frame = frame

    def document(self, messages: list[Message], kind: int, tools: Any) -> Document:
        """One conversation as a document of `kind`."""
        pieces: list[Piece] = []
        pending = ""  # a separator belongs to the turn after an answer, and to the turn before any other
        flags = 0
        for index, message in enumerate(messages):
            role = ROLES[message["role"]]
            text = plain_content(message)
            last = index == len(messages) - 1
            if role != ROLE_ASSISTANT:
                text = pending + text + ("" if last else self._separator)
                pending = ""
            else:
                text = pending + text
                pending = self._separator
            flags = pack_flags(kind, role, not self._answers_only or role == ROLE_ASSISTANT)
            pieces.append((text, flags))
        return Document(kind, self._frame.around(pieces, kind, flags))


def plain_content(message: Message) -> str:
    """The text of a turn; tool calls, which have no text of their own, are written as JSON."""
    content = message.get("content") or ""
    calls = message.get("tool_calls")
    if calls:
        try:
            content += ("\n" if content else "") + orjson.dumps(calls).decode()
        except TypeError as error:  # a value of a parquet file that JSON does not know
            raise BadRecord("wrong type", f"tool_calls: {error}") from None
    return content


def _instruction_reader(source: SourceConfig) -> Callable[[Record], tuple[list[Message], ...]]:
    if source.messages is not None:
        key = source.messages

        def read_messages(record: Record) -> tuple[list[Message], ...]:
            messages = check_messages(get_value(record, key), key)
            if not any(ROLES[message["role"]] == ROLE_ASSISTANT for message in messages):
                raise BadRecord("no answer", f"key {key!r} has no assistant turn")
            return (messages,)

        return read_messages
    assert source.prompt is not None and source.response is not None
    prompt, response = compile_template(source.prompt), compile_template(source.response)
    return lambda record: (_pair(prompt(record), response(record), "response"),)


def _preference_reader(source: SourceConfig) -> Callable[[Record], tuple[list[Message], ...]]:
    assert source.chosen is not None and source.rejected is not None
    if source.prompt is not None:
        prompt = compile_template(source.prompt)
        chosen, rejected = compile_template(source.chosen), compile_template(source.rejected)

        def read_texts(record: Record) -> tuple[list[Message], ...]:
            asked = prompt(record)
            return _differ(_pair(asked, chosen(record), "chosen"), _pair(asked, rejected(record), "rejected"))

        return read_texts
    if source.messages is not None:
        key = source.messages
        chosen, rejected = compile_template(source.chosen), compile_template(source.rejected)

        def read_answers(record: Record) -> tuple[list[Message], ...]:
            asked = check_messages(get_value(record, key), key)
            sides = []
            for name, fill in (("chosen", chosen), ("rejected", rejected)):
                answer = fill(record)
                _not_empty(answer, name)
                sides.append([*asked, {"role": "assistant", "content": answer}])
            return _differ(*sides)

        return read_answers
    keys = [template_keys(template)[0] for template in (source.chosen, source.rejected)]

    def read_conversations(record: Record) -> tuple[list[Message], ...]:
        first, second = (check_messages(get_value(record, key), key) for key in keys)
        for key, messages in zip(keys, (first, second)):
            if ROLES[messages[-1]["role"]] != ROLE_ASSISTANT:
                raise BadRecord("no answer", f"key {key!r} does not end with an assistant turn")
        if first[:-1] != second[:-1]:
            raise BadRecord("different prompts", "chosen and rejected differ before the last turn")
        return _differ(first, second)

    return read_conversations


def _pair(prompt: str, answer: str, name: str) -> list[Message]:
    _not_empty(prompt, "prompt")
    _not_empty(answer, name)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _differ(first: list[Message], second: list[Message]) -> tuple[list[Message], list[Message]]:
    if first == second:
        raise BadRecord("no preference", "chosen and rejected are the same")
    return first, second


def _not_empty(text: str, name: str) -> None:
    if not text or text.isspace():
        raise BadRecord("empty", f"the {name} is empty")


def check_messages(value: Any, key: str) -> list[Message]:
    """`value` as a list of {role, content}, also in the {from, value} spelling. Raises BadRecord."""
    if not isinstance(value, list) or not value:
        raise BadRecord("wrong type", f"key {key!r} must be a non-empty list of messages")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise BadRecord("wrong type", f"{key}[{index}] is {type(item).__name__}, not a message")
        # Columns of parquet and arrow hold a null for every field that another row has.
        message = {name: content for name, content in item.items() if content is not None}
        if "from" in message and "role" not in message:
            message["role"], message["content"] = message.pop("from"), message.pop("value", None)
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str):
            role = message["role"] = OTHER_NAMES.get(role, role)
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord("unknown role", f"{key}[{index}] has role {role!r}; known: {', '.join(ROLES)}")
        if message.get("tool_calls") and content is None:
            message["content"] = ""
        elif not isinstance(content, str):
            raise BadRecord("wrong type", f"{key}[{index}].content is {type(content).__name__}, not a string")
        elif not content.strip() and not message.get("tool_calls"):
            raise BadRecord("empty", f"{key}[{index}].content is empty")
        messages.append(message)
    return messages
