"""What the client gives and takes: plain frozen values. Knows neither gRPC nor protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""What to continue: text as it stands, token ids, or a conversation."""


class Options(TypedDict, total=False):
    """Keywords of a generation, one per field of the API's GenerationSpec; left out or None takes the server's default.

    Units, ranges and defaults are stated where the fields are defined, in inference.proto.
    """

    model: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop_strings: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_string: bool | None
    return_token_ids: bool | None
    top_logprobs: int | None
    omit_text: bool | None
    keep_special_tokens: bool | None
    cache_salt: str | None
    bypass_cache: bool | None
    priority: int | None
    client_request_id: str | None
    add_generation_prompt: bool | None


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    UNKNOWN = "unknown"
    """A reason that a newer server has and this client does not know."""


class HealthStatus(StrEnum):
    """What a server says of a service's health."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's log-probability, and the most likely tokens' beside it, most likely first."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a generation, with its first token."""

    generation_id: str
    model: str
    prompt_tokens: int
    cached_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. `num_tokens` counts new tokens, whether or not they show in the text yet."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation took, in tokens; `preemptions` counts how often it was recomputed."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What a generation took, measured by the server from the request's arrival."""

    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a generation. `stop_match` is the stop string or the token that ended it, for STOP."""

    reason: FinishReason
    stop_match: str | int | None
    usage: Usage
    timing: Timing


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    started: Started
    finished: Finished


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids, and for a conversation the text that the chat template made of it."""

    token_ids: tuple[int, ...]
    rendered_text: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """What options take that are left out. `max_tokens` None: only the context limits."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_tokens: int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server enforces on every request."""

    max_sequence_tokens: int
    max_running_requests: int
    max_waiting_requests: int
    max_waiting_tokens: int
    default_deadline_seconds: float
    max_deadline_seconds: float
    max_request_bytes: int
    max_stop_strings: int
    max_top_logprobs: int
    reader_stall_seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    digest: str
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    defaults: Defaults
    limits: Limits


@dataclass(frozen=True, slots=True)
class Load:
    """How loaded a server is."""

    running_requests: int
    waiting_requests: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    block_size: int
    tokens_per_second: float
    estimated_queue_seconds: float
    accepting: bool
