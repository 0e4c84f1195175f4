"""Renders conversations through a model's chat template. Owns the template and its sandbox.

Templates come from the operator's model directory, conversations from callers; nothing of either is executed outside
the sandbox. What a template sees follows transformers' `apply_chat_template`, and renders to the same text. It does not
know which roles the API allows, nor how long a prompt may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from service.errors import StartupError
from service.text.tokenizer import Tokenizer

MAX_RENDERED_CHARS = 16 * 2**20
"""A rendered conversation larger than this is refused while it renders."""

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points without meaning, from which marks are taken that no text in hand holds."""

TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""What a template with a mistake in it raises while it renders."""


class TemplateError(ValueError):
    """A conversation that the template refuses, with the template's own words where it gives any."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as the model gets it, and as a person can read it."""

    token_ids: list[int]
    text: str


class ChatTemplate:
    """A compiled chat template. Immutable; may be shared by everything in a process."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        """`special_tokens` are the template's variables, such as bos_token. Raises StartupError for a bad template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"chat template: {' '.join(str(error).split())}") from None
        self._source = source
        self._special_tokens = special_tokens or {}

    @classmethod
    def from_directory(cls, path: Path) -> ChatTemplate | None:
        """Loads chat_template.jinja, else the template in tokenizer_config.json; None when the model has neither.

        Raises StartupError for a file that cannot be read or a template that does not compile.
        """
        config = _read_config(path / "tokenizer_config.json")
        source = _read_text(path / "chat_template.jinja") or _default_template(config.get("chat_template"))
        if source is None:
            return None
        tokens = {name: _token_text(config[name]) for name in SPECIAL_TOKEN_NAMES if config.get(name) is not None}
        return cls(source, tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Without a generation prompt, a last message of the assistant is left open, so that the model continues it
        (transformers' `continue_final_message`). Raises TemplateError when the template refuses the conversation.
        """
        variables: list[dict[str, str]] = [{"role": m.role, "content": m.content} for m in messages]
        if add_generation_prompt or not messages or messages[-1].role != "assistant":
            return self._render(variables, add_generation_prompt)
        mark = self._unused_mark(messages)
        # The blank shows whether the template strips contents: then the open text must be stripped, too.
        variables[-1]["content"] += mark + " "
        before, found, after = self._render(variables, add_generation_prompt).rpartition(mark)
        if not found:
            raise TemplateError("the chat template leaves out the last message, so it cannot be continued")
        return before if after.startswith(" ") else before.rstrip()

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = True
    ) -> EncodedChat:
        """The conversation as token ids, in which no message can forge a turn.

        transformers tokenises the rendered text as a whole: a message that holds "<|im_end|>" ends its own turn and may
        speak as the system. Here a special token in a message is text like any other: it is cut in two where it begins,
        and the halves are tokenised apart. Conversations without one, nearly all, take the same ids as there. Turns
        written in plain text (Llama 2's "[INST]") cannot be told from a message's own words, and are not.
        """
        special = [re.escape(token) for token in tokenizer.special_tokens.values() if len(token) > 1]
        begins = re.compile(f"(?=(?:{'|'.join(special)}))(.)", re.DOTALL) if special else None
        if begins is None or not any(begins.search(message.content) for message in messages):
            text = self.render(messages, add_generation_prompt)
            return EncodedChat(tokenizer.encode(text, add_special_tokens=False), text)
        cut = self._unused_mark(messages)
        harmless = [Message(m.role, begins.sub(rf"\1{cut}", m.content)) for m in messages]
        parts = self.render(harmless, add_generation_prompt).split(cut)
        ids = [token_id for part in parts for token_id in tokenizer.encode(part, add_special_tokens=False)]
        return EncodedChat(ids, "".join(parts))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        pieces, num_chars = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(f"the rendered conversation is longer than {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
        except _Refusal as refusal:
            raise TemplateError(f"the chat template refuses this conversation: {refusal.message}") from None
        except TemplateError:
            raise
        except TEMPLATE_FAILURES as error:
            raise TemplateError("the chat template fails on this conversation") from error
        return "".join(pieces)

    def _unused_mark(self, messages: Sequence[Message]) -> str:
        """A character that neither the template nor any message holds. Raises TemplateError when they hold them all."""
        taken = set(self._source).union(*(message.content for message in messages))
        mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in taken), None)
        if mark is None:  # a StopIteration may not leave: no future takes one, so its caller would never be answered
            raise TemplateError("the conversation holds every character that could mark a place in it")
        return mark


class _Refusal(jinja2.TemplateError):
    """Raised by a template's own raise_exception()."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks the assistant's words for training: renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """namespace(), without the underscored names through which a template could reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a chat template may not set underscored names")


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What chat templates expect to find, as transformers provides it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _read_text(file: Path) -> str | None:
    """The file's text, None when there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file}: cannot be read: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read_text(file) or "{}")
    except ValueError as error:
        raise StartupError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise StartupError(f"{file}: not a JSON object")
    return config


def _default_template(value: Any) -> str | None:
    """tokenizer_config.json gives one template, or a list of named ones, of which "default" is for conversations."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
        return str(named["default"])
    except (TypeError, LookupError):
        raise StartupError('tokenizer_config.json: chat_template is neither a text nor a list with "default"') from None


def _token_text(value: Any) -> str:
    """A special token is written as its text, or as an object that has it."""
    return str(value["content"]) if isinstance(value, dict) else str(value)
