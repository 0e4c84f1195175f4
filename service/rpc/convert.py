"""Requests from protobuf to the domain, and all validation of them: the one place that decides what is acceptable.

Defaults are filled in first, then everything is checked and all violations are reported at once; then the model's name,
then the prompt is tokenised, then its length is checked. What comes out needs no further check. A conversation for a
model without a chat template is FEATURE_DISABLED: nothing is wrong with the field, this model lacks it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from model.interface import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, NO_LOGPROBS, ModelFacts, Sampling
from service.errors import (
    ContextLengthExceeded,
    ExceedsKvCapacity,
    FeatureDisabled,
    FieldViolation,
    InvalidField,
    ModelNotFound,
)
from service.generation import EndReason, GenerationRequest
from service.pb.quire.v1 import inference_pb2 as pb
from service.rpc.long_text import LongTextRoom
from service.rpc.model import ServedModel
from service.rpc.violations import Range, Violations
from service.text.chat import EncodedChat, Message, TemplateError

MAX_REQUEST_BYTES = 16 * 2**20
MAX_MESSAGES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_SALT_BYTES = 256
MAX_LABEL_CHARS = 128

BIAS = Range(-100, 100)
PRIORITY = Range(-100, 100)
SAMPLING_RANGES = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, is_open=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, is_open=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}
ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}


class Converter:
    """Turns requests into what the rest of the front end works with. Raises QuireErrors only."""

    def __init__(self, model: ServedModel, *, default_deadline_seconds: float, max_deadline_seconds: float) -> None:
        self._model = model
        self._default_deadline_seconds = default_deadline_seconds
        self._max_deadline_seconds = max_deadline_seconds
        self._prompts = LongTextRoom()
        self._texts = LongTextRoom()

    async def generation(
        self, request: pb.GenerateRequest | pb.StreamGenerateRequest, arrival: float, seconds_left: float | None
    ) -> GenerationRequest:
        """A validated generation. `seconds_left` is the caller's deadline, None when it brought none.

        Raises InvalidField, ModelNotFound, FeatureDisabled, ContextLengthExceeded, ExceedsKvCapacity, ServerStarting;
        QueueFull where too many long texts are waiting to be tokenised.
        """
        facts, spec = self._model.facts, request.spec
        violations = Violations()
        if violations.require(request.HasField("spec"), "spec", "is required"):
            self._check_prompt(spec, violations)
        sampling = to_sampling(spec, facts, violations)
        _check_stop(spec, facts.vocab_size, violations)
        _check_rest(spec, violations)
        violations.raise_any()
        self.check_model(spec.model)
        token_ids = await self._prompt_ids(spec)
        max_new_tokens, length_reason = self._room(spec.stop, len(token_ids))
        eos = () if spec.stop.ignore_eos else facts.eos_token_ids
        seconds = self._default_deadline_seconds if seconds_left is None else seconds_left
        return GenerationRequest(
            model=self._model.name,
            token_ids=token_ids,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            min_new_tokens=spec.stop.min_tokens,
            length_reason=length_reason,
            end_token_ids=tuple(sorted({*eos, *spec.stop.stop_token_ids})),
            stop_strings=tuple(spec.stop.stop_strings),
            include_stop_string=spec.stop.include_stop_string,
            wants_text=not spec.output.omit_text,
            keep_special_tokens=spec.output.keep_special_tokens,
            wants_token_ids=spec.output.return_token_ids,
            cache_root=None if spec.cache.bypass else spec.cache.salt.encode(),
            priority=spec.priority,
            client_request_id=spec.client_request_id,
            arrival=arrival,
            deadline=arrival + min(seconds, self._max_deadline_seconds),
        )

    async def tokens(self, request: pb.TokenizeRequest) -> EncodedChat:
        """Token ids of a text or a conversation that may be a prompt by its length; a plain text is not rendered."""
        violations = Violations()
        kind = request.WhichOneof("input")
        violations.require(kind is not None, "input", "exactly one of text and chat is required")
        if kind == "chat":
            _check_chat(request.chat, "chat", violations)
        violations.raise_any()
        self.check_model(request.model)
        if self._model.is_known:  # the bound is the context's, of which nothing is known while the model is loaded
            self._check_chars(len(request.text) + sum(len(message.content) for message in request.chat.messages))
        if kind == "chat":
            return await self._encode_chat(request.chat, "chat", self._texts)
        return EncodedChat(await self._encode_text(request.text, self._texts), "")

    async def text(self, request: pb.DetokenizeRequest) -> str:
        """Text of token ids."""
        facts, ids = self._model.facts, request.token_ids
        violations = Violations()
        most = self._model.shape.context_length
        if violations.require(len(ids) <= most, "token_ids", f"must be at most {most}"):
            _check_ids(ids, "token_ids", facts.vocab_size, violations)
        violations.raise_any()
        self.check_model(request.model)
        return await self._texts.run(
            len(ids), lambda: self._model.tokenizer.decode(list(ids), request.keep_special_tokens)
        )

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound unless it is the served one, or left to the server."""
        if name not in ("", self._model.name):
            raise ModelNotFound(metadata={"model": name[:MAX_LABEL_CHARS]})

    def _check_prompt(self, spec: pb.GenerationSpec, violations: Violations) -> None:
        kind = spec.WhichOneof("prompt")
        violations.require(kind is not None, "spec.prompt", "exactly one of text, token_ids and chat is required")
        if kind == "chat":
            _check_chat(spec.chat, "spec.chat", violations)
        elif kind == "token_ids":
            ids = spec.token_ids.ids
            violations.require(len(ids) > 0, "spec.token_ids.ids", "must not be empty")
            if len(ids) <= self._model.shape.context_length:  # more is refused for its length, not its contents
                _check_ids(ids, "spec.token_ids.ids", self._model.facts.vocab_size, violations)

    async def _prompt_ids(self, spec: pb.GenerationSpec) -> list[int]:
        kind = spec.WhichOneof("prompt")
        if kind == "token_ids":
            self._check_length(len(spec.token_ids.ids))
            return list(spec.token_ids.ids)
        if kind == "chat":
            self._check_chars(sum(len(message.content) for message in spec.chat.messages))
            ids = (await self._encode_chat(spec.chat, "spec.chat", self._prompts)).token_ids
        else:
            self._check_chars(len(spec.text))
            ids = await self._encode_text(spec.text, self._prompts)
        if not ids:
            raise _invalid(f"spec.{kind}", "must give at least one token")
        self._check_length(len(ids))
        return ids

    async def _encode_text(self, text: str, room: LongTextRoom) -> list[int]:
        return await room.run(len(text), lambda: self._model.tokenizer.encode(text))

    async def _encode_chat(self, chat: pb.Chat, field: str, room: LongTextRoom) -> EncodedChat:
        template, tokenizer = self._model.chat, self._model.tokenizer
        if template is None:
            raise FeatureDisabled(metadata={"feature": "chat"})
        messages = [Message(ROLES[message.role], message.content) for message in chat.messages]
        opens_turn = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        num_chars = sum(len(message.content) for message in messages)
        try:
            return await room.run(num_chars, lambda: template.encode(messages, tokenizer, opens_turn))
        except TemplateError:
            raise _invalid(f"{field}.messages", "the model's chat template does not take this conversation") from None

    def _check_chars(self, num_chars: int) -> None:
        """Refuses before tokenising what no tokens can fit."""
        if num_chars > self._model.max_prompt_chars:
            self._check_length(-(-num_chars // self._model.tokenizer.max_token_bytes))

    def _check_length(self, num_prompt: int, max_tokens: int = 1) -> None:
        """Raises ContextLengthExceeded or ExceedsKvCapacity unless both fit together."""
        shape = self._model.shape
        if num_prompt + max_tokens > shape.context_length:
            raise ContextLengthExceeded(metadata={"promptTokens": num_prompt, "limit": shape.context_length})
        if num_prompt + max_tokens > self._model.max_sequence_tokens:
            needed = -(-(num_prompt + max_tokens) // shape.block_size)
            raise ExceedsKvCapacity(metadata={"blocksNeeded": needed, "blocksTotal": shape.num_blocks})

    def _room(self, stop: pb.StopParams, num_prompt: int) -> tuple[int, EndReason]:
        """How many tokens may be generated, and what it means to generate them all."""
        if stop.HasField("max_tokens"):
            self._check_length(num_prompt, stop.max_tokens)
            return stop.max_tokens, EndReason.MAX_TOKENS
        room = min(self._model.shape.context_length, self._model.max_sequence_tokens) - num_prompt
        default = self._model.facts.default_max_tokens
        is_capped = default is not None and default < room
        most = default if default is not None and is_capped else room
        if stop.min_tokens > most:
            raise _invalid("spec.stop.min_tokens", f"must be at most {most} here")
        return most, EndReason.MAX_TOKENS if is_capped else EndReason.CONTEXT_LENGTH


def to_sampling(spec: pb.GenerationSpec, facts: ModelFacts, violations: Violations) -> Sampling:
    """Sampling with the model's defaults for what is unset; notes every violation."""
    given = spec.sampling
    defaults = Sampling(
        temperature=facts.default_temperature,
        top_p=facts.default_top_p,
        repetition_penalty=facts.default_repetition_penalty,
    )
    numbers: dict[str, float] = {}
    for name, allowed in SAMPLING_RANGES.items():
        value = getattr(given, name) if given.HasField(name) else getattr(defaults, name)
        violations.require(value in allowed, f"spec.sampling.{name}", f"must be in {allowed}")
        numbers[name] = value
    top_k = given.top_k if given.HasField("top_k") else facts.default_top_k
    violations.require(top_k <= facts.vocab_size, "spec.sampling.top_k", f"must be in [0, {facts.vocab_size}]")
    num_logprobs = spec.output.top_logprobs if spec.output.HasField("top_logprobs") else NO_LOGPROBS
    must = f"must be in [0, {MAX_TOP_LOGPROBS}]"
    violations.require(num_logprobs <= MAX_TOP_LOGPROBS, "spec.output.top_logprobs", must)
    return Sampling(
        **numbers,
        top_k=top_k,
        logit_bias=_logit_bias(given.logit_bias, facts.vocab_size, violations),
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        num_logprobs=num_logprobs,
    )


def _logit_bias(
    entries: Sequence[pb.LogitBias], vocab_size: int, violations: Violations
) -> tuple[tuple[int, float], ...]:
    field = "spec.sampling.logit_bias"
    if not violations.require(len(entries) <= MAX_LOGIT_BIAS, field, f"must have at most {MAX_LOGIT_BIAS} entries"):
        return ()
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        is_token = entry.token_id < vocab_size
        violations.require_entry(is_token, field, index, f"must be in [0, {vocab_size})", ".token_id")
        violations.require_entry(entry.bias in BIAS, field, index, f"must be in {BIAS}", ".bias")
        violations.require_entry(entry.token_id not in seen, field, index, "is named twice", ".token_id")
        seen.add(entry.token_id)
    return tuple((entry.token_id, entry.bias) for entry in entries)


def _check_stop(spec: pb.GenerationSpec, vocab_size: int, violations: Violations) -> None:
    stop, strings = spec.stop, spec.stop.stop_strings
    if stop.HasField("max_tokens"):
        violations.require(stop.max_tokens >= 1, "spec.stop.max_tokens", "must be at least 1")
        is_within = stop.min_tokens <= stop.max_tokens
        violations.require(is_within, "spec.stop.min_tokens", "must be at most max_tokens")
    field = "spec.stop.stop_strings"
    if violations.require(len(strings) <= MAX_STOP_STRINGS, field, f"must be at most {MAX_STOP_STRINGS}"):
        for index, string in enumerate(strings):
            holds = 1 <= len(string) <= MAX_STOP_STRING_CHARS
            violations.require_entry(holds, field, index, f"must have 1 to {MAX_STOP_STRING_CHARS} characters")
    violations.require(not (strings and spec.output.omit_text), "spec.output.omit_text", "excludes stop strings")
    ids, field = stop.stop_token_ids, "spec.stop.stop_token_ids"
    if violations.require(len(ids) <= MAX_STOP_TOKEN_IDS, field, f"must be at most {MAX_STOP_TOKEN_IDS}"):
        _check_ids(ids, field, vocab_size, violations)


def _check_rest(spec: pb.GenerationSpec, violations: Violations) -> None:
    salt_bytes = len(spec.cache.salt.encode())
    violations.require(salt_bytes <= MAX_SALT_BYTES, "spec.cache.salt", f"must have at most {MAX_SALT_BYTES} bytes")
    violations.require(spec.priority in PRIORITY, "spec.priority", f"must be in {PRIORITY}")
    label = spec.client_request_id
    is_label = len(label) <= MAX_LABEL_CHARS and label.isprintable()
    must = f"must have at most {MAX_LABEL_CHARS} characters, all printable"
    violations.require(is_label, "spec.client_request_id", must)


def _check_chat(chat: pb.Chat, field: str, violations: Violations) -> None:
    field += ".messages"
    num_messages = len(chat.messages)
    if violations.require(1 <= num_messages <= MAX_MESSAGES, field, f"must be 1 to {MAX_MESSAGES} messages"):
        for index, message in enumerate(chat.messages):
            violations.require_entry(message.role in ROLES, field, index, "must be a known role", ".role")


def _check_ids(ids: Sequence[int], field: str, vocab_size: int, violations: Violations) -> None:
    if max(ids, default=0) < vocab_size:
        return
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            violations.require_entry(False, field, index, f"must be in [0, {vocab_size})")


def _invalid(field: str, must: str) -> InvalidField:
    return InvalidField(violations=[FieldViolation(field, must)])
