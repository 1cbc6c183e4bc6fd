"""The chat format: conversations laid out by the tokenizer's own template, with control tokens only from the template.

A user may write `<|im_end|>` in a message. Before rendering, control strings inside messages are hidden behind
placeholders; whatever control string the rendered text then holds was written by the template, and becomes a control
token. The placeholders turn back into the original characters, encoded as text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.documents import ROLES, Document, Piece
from megatron_mixcpt.data_prep.format import ROLE_ASSISTANT, ROLE_TEXT, pack_flags
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.data_prep.tokenizer import Tokenizer
from megatron_mixcpt.errors import ConfigError

Message = dict[str, Any]
# Private-use characters: no template compares them and no text holds them by accident.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDER_PATTERN = re.compile("\ue000([0-9]+)\ue001")


class ChatRenderer:
    """Turns a list of messages into a document in the tokenizer's chat format."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"source {source.name}: format: chat needs a tokenizer with a chat template; "
                "give a Hugging Face directory that has one, or use format: plain"
            )
        self._render = compile_chat_template(tokenizer.chat_template, tokenizer.special_names)
        self._answers_only = source.loss == "answer"
        self._control = tokenizer.control
        self._literals = sorted((text for text in tokenizer.control if text), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, self._literals)) + ")") if self._literals else None

    def document(self, messages: list[Message], kind: int, tools: Any) -> Document:
        """One conversation as a document of `kind`. Raises BadRecord if the template refuses it."""
        messages, tools = self._hide(messages), self._hide(tools)
        turns = list(self._turns(messages, tools))
        pieces: list[Piece] = []
        done = ""
        for number, (index, role, asked, upto) in enumerate(turns):
            if number + 1 < len(turns):
                *_, following_asked, following = turns[number + 1]
                upto = self._continued(upto, following if following_asked is None else following_asked)
            begin = done
            if role == ROLE_ASSISTANT:
                # Nobody asked for an answer that stands first: it is given, with the opening that the template writes.
                begin = (asked or done) if index else upto
                if not (begin.startswith(done) and upto.startswith(begin)):
                    raise _rewritten()
                # The opening of an answer ("<|im_start|>assistant") is given to the model, not predicted by it.
                pieces += self._pieces(begin[len(done) :], kind, ROLE_TEXT, False)
                _require_calls(messages[index], upto[len(done) :])
            elif not upto.startswith(done):
                raise _rewritten()
            pieces += self._pieces(upto[len(begin) :], kind, role, role == ROLE_ASSISTANT)
            done = upto
        if not pieces:
            raise BadRecord("template", "the chat template refuses this conversation")
        return Document(kind, pieces)

    def _turns(self, messages: list[Message], tools: Any) -> Iterator[tuple[int, int, str | None, str]]:
        """(index, role, the text that asks for it where the template has one, the text with it) of each message."""
        for index, message in enumerate(messages):
            upto = self._text(messages[: index + 1], tools, prompt=False)
            if upto is None:
                # Some templates refuse a conversation that is not complete, e.g. one that is only a system turn.
                continue
            role = ROLES[message["role"]]
            asked = self._text(messages[:index], tools, prompt=True) if role == ROLE_ASSISTANT else None
            yield index, role, asked, upto

    def _continued(self, text: str, following: str) -> str:
        """`text` without what the template writes at the end of a conversation alone (Phi's end of text): control
        tokens and white space that are not in the one that goes on. Raises BadRecord where more differs."""
        while not following.startswith(text):
            ending = next((literal for literal in self._literals if text.endswith(literal)), text[-1:])
            if not (ending in self._control or ending.isspace()):
                raise _rewritten()
            text = text.removesuffix(ending)
        return text

    def _text(self, messages: list[Message], tools: Any, *, prompt: bool) -> str | None:
        if not messages:
            return "" if not prompt else None
        from jinja2.exceptions import TemplateError

        try:
            return self._render(messages, tools, prompt)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # what its code may meet
            if prompt or len(messages) < 2:
                return None
            raise BadRecord("template", f"the chat template refuses this conversation: {error}") from None

    def _pieces(self, text: str, kind: int, role: int, answer: bool) -> list[Piece]:
        """`text` cut at its control tokens. An answer ends with its last control token; white space after it is not
        something the model should learn to say."""
        parts = [part for part in (self._split.split(text) if self._split else [text]) if part]
        last = max((i for i, part in enumerate(parts) if part in self._control), default=len(parts) - 1)
        pieces: list[Piece] = []
        for index, part in enumerate(parts):
            target = (not self._answers_only) or (answer and index <= last)
            content: str | int = self._control[part] if part in self._control else self._show(part)
            # White space after an answer's last control token belongs to nobody.
            pieces.append((content, pack_flags(kind, ROLE_TEXT if answer and index > last else role, target)))
        return pieces

    def _hide(self, value: Any) -> Any:
        """`value` with every control string in its strings replaced by a placeholder."""
        if isinstance(value, str):
            if "\ue000" in value:
                raise BadRecord("private-use character", "the text holds U+E000, which marks hidden control strings")
            for number, literal in enumerate(self._literals):
                if literal in value:
                    value = value.replace(literal, PLACEHOLDER.format(number))
            return value
        if isinstance(value, list):
            return [self._hide(item) for item in value]
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        return value

    def _show(self, text: str) -> str:
        return PLACEHOLDER_PATTERN.sub(lambda match: self._literals[int(match[1])], text)


def _rewritten() -> BadRecord:
    return BadRecord("unstable template", "the chat template rewrites earlier turns of this conversation")


def _require_calls(message: Message, said: str) -> None:
    """Raise BadRecord where the template leaves a tool call out: the model would learn to say nothing in its place."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name is not None and str(name) not in said:
            raise BadRecord("template", f"the chat template does not write the call of {name} down; use format: plain")


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The control token with which the chat template ends an answer; None where there is no template, or none."""
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        return None
    answer = "an answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        render = compile_chat_template(tokenizer.chat_template, tokenizer.special_names)
        after = render(messages, None, False).rpartition(answer)[2].lstrip()
    except (ConfigError, TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None  # whoever needs the template is told
    ends = [literal for literal in tokenizer.control if literal and after.startswith(literal)]
    return tokenizer.control[max(ends, key=len)] if ends else None


def compile_chat_template(
    chat_template: str, special_names: Mapping[str, Any]
) -> Callable[[list[Message], Any, bool], str]:
    """A function (messages, tools, add_generation_prompt) -> text, with the environment that transformers gives
    templates (documented in its "chat templating" guide), but on a fixed day.

    `special_names`: bos_token and the like, as the template knows them. Raises ConfigError for a broken template.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks what an assistant says; the roles of the turns tell that already."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [loopcontrols, GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        import json

        return json.dumps(value, ensure_ascii=False, indent=indent)

    def now(form: str) -> str:
        # A fixed day: the same conversation must give the same bytes tomorrow.
        return datetime(2024, 1, 1, tzinfo=timezone.utc).strftime(form)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now
    try:
        template = environment.from_string(chat_template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"tokenizer: its chat template does not parse, line {error.lineno}: {error.message}"
        ) from None

    def render(messages: list[Message], tools: Any, prompt: bool) -> str:
        return template.render(
            messages=messages, tools=tools, add_generation_prompt=prompt, documents=None, **special_names
        )

    return render
