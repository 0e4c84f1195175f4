"""Builds requests from what callers of the client give. Knows field names, not ranges: the server validates."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from service.client.types import Message, Options, Prompt
from service.pb.quire.v1 import inference_pb2 as pb

ROLES = {"system": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}

OF_SPEC = ("model", "priority", "client_request_id")
OF_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip
OF_STOP = ("max_tokens", "min_tokens", "stop_strings", "stop_token_ids", "ignore_eos", "include_stop_string")
OF_OUTPUT = ("return_token_ids", "top_logprobs", "omit_text", "keep_special_tokens")
OF_CACHE = {"cache_salt": "salt", "bypass_cache": "bypass"}


def build_spec(prompt: Prompt, options: Options) -> pb.GenerationSpec:
    """The API's GenerationSpec.

    Raises ValueError for a value that its field cannot hold, TypeError for an unknown option.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    spec = pb.GenerationSpec()
    _set_prompt(spec, prompt, given.pop("add_generation_prompt", None))
    for token_id, bias in given.pop("logit_bias", {}).items():
        entry = spec.sampling.logit_bias.add()
        _set(entry, "token_id", token_id, "logit_bias")
        _set(entry, "bias", bias, "logit_bias")
    for name, value in given.items():
        message, field = _place(spec, name)
        _set(message, field, value, name)
    return spec


def build_chat(messages: Sequence[Message], add_generation_prompt: bool | None = None) -> pb.Chat:
    """The API's Chat. Raises ValueError for an unknown role."""
    unknown = [message.role for message in messages if message.role not in ROLES]
    if unknown:
        raise ValueError(f"role: {unknown[0]!r} is none of {', '.join(ROLES)}")
    chat = pb.Chat()
    for message in messages:
        _set(chat.messages.add(role=ROLES[message.role]), "content", message.content, "message")
    if add_generation_prompt is not None:
        chat.add_generation_prompt = add_generation_prompt
    return chat


def build_ids(ids: Sequence[int]) -> pb.TokenIds:
    """The API's TokenIds. Raises ValueError for what is no unsigned 32-bit number."""
    wrapped = pb.TokenIds()
    _set(wrapped, "ids", ids, "token ids")
    return wrapped


def build_tokenize(given: str | Sequence[Message], model: str) -> pb.TokenizeRequest:
    """The API's TokenizeRequest, for a text or a conversation."""
    if isinstance(given, str):
        return pb.TokenizeRequest(model=model, text=given)
    return pb.TokenizeRequest(model=model, chat=build_chat(given))


def build_detokenize(token_ids: Sequence[int], model: str, keep_special_tokens: bool) -> pb.DetokenizeRequest:
    """The API's DetokenizeRequest."""
    ids = build_ids(token_ids).ids
    return pb.DetokenizeRequest(model=model, token_ids=ids, keep_special_tokens=keep_special_tokens)


def is_conversation(prompt: Sequence[int] | Sequence[Message]) -> bool:
    """Whether a prompt that is no text holds messages rather than ids."""
    return len(prompt) > 0 and isinstance(prompt[0], Message)


def _set_prompt(spec: pb.GenerationSpec, prompt: Prompt, add_generation_prompt: bool | None) -> None:
    if isinstance(prompt, str):
        _set(spec, "text", prompt, "prompt")
    elif is_conversation(prompt):
        spec.chat.CopyFrom(build_chat(prompt, add_generation_prompt))  # type: ignore[arg-type]
    else:
        spec.token_ids.CopyFrom(build_ids(prompt))  # type: ignore[arg-type]
    if add_generation_prompt is not None and not spec.HasField("chat"):
        raise ValueError("add_generation_prompt: only for conversations")


def _place(spec: pb.GenerationSpec, name: str) -> tuple[Any, str]:
    """The message and the field that an option stands for."""
    parts: Mapping[str, tuple[str, ...]] = {"sampling": OF_SAMPLING, "stop": OF_STOP, "output": OF_OUTPUT}
    for part, names in parts.items():
        if name in names:
            return getattr(spec, part), name
    if name in OF_CACHE:
        return spec.cache, OF_CACHE[name]
    if name in OF_SPEC:
        return spec, name
    raise TypeError(f"unknown option: {name}")


def _set(message: Any, field: str, value: Any, name: str) -> None:
    """Sets a field; protobuf's complaints name neither the option nor, always, the value."""
    repeated = message.DESCRIPTOR.fields_by_name[field].is_repeated
    if repeated and isinstance(value, (str, bytes)):
        raise ValueError(f"{name}: a list is needed, not one text")
    try:
        getattr(message, field).extend(value) if repeated else setattr(message, field, value)
    except (TypeError, ValueError, OverflowError) as error:
        # The value may be a whole prompt: it is not repeated.
        why = " (not Unicode text)" if isinstance(error, UnicodeError) else ""
        raise ValueError(f"{name}: {reprlib.repr(value)} does not fit the field{why}") from None
