"""Output of one generation on its way to its caller: text from tokens, and the place where it waits to be taken.

It knows neither who reads, nor why a sequence ends but for its stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.interface import TokenLogprobs
from service.text.detokenizer import Detokenizer
from service.text.stop import StopMatcher
from service.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. `logprobs` holds, where asked for, each token's id and log-probabilities."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    num_tokens: int = 0


class Mailbox:
    """One place for what the caller has not taken yet; new output joins it."""

    def __init__(self) -> None:
        self._clear()

    def put_token(self, token_id: int, logprobs: TokenLogprobs | None, keep_id: bool) -> None:
        self._num_tokens += 1
        if keep_id:
            self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append((token_id, logprobs))

    def put_text(self, text: str) -> None:
        if text:
            self._texts.append(text)

    def take(self) -> Delta | None:
        """All of it, None when it is empty."""
        if not self._num_tokens and not self._texts:
            return None
        delta = Delta("".join(self._texts), self._token_ids, self._logprobs, self._num_tokens)
        self._clear()
        return delta

    def _clear(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []
        self._num_tokens = 0


class TextStream:
    """Text of one generation: whole characters, without the stop string that ended it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_strings: Sequence[str],
        include_stop_string: bool,
        min_tokens: int,
        end_token_ids: Sequence[int],
        keep_special_tokens: bool,
    ) -> None:
        """No stop string counts that is complete before `min_tokens` tokens."""
        self._detokenizer = Detokenizer(tokenizer, keep_special_tokens)
        self._matcher = StopMatcher(stop_strings, include_stop_string)
        self._min_tokens = min_tokens
        # What ends a sequence is no part of its text, unless special tokens were asked for.
        self._silent_ids = frozenset() if keep_special_tokens else frozenset(end_token_ids)
        self._num_tokens = 0

    def push(self, token_id: int) -> tuple[str, str | None]:
        """New text, and the stop string that this token completed."""
        self._num_tokens += 1
        text = "" if token_id in self._silent_ids else self._detokenizer.push(token_id)
        return self._matcher.push(text, can_match=self._num_tokens >= self._min_tokens)

    def finish(self) -> tuple[str, str | None]:
        """What was held back, once no token can follow; it may complete a stop string."""
        text, matched = self._matcher.push(self._detokenizer.finish(), can_match=self._num_tokens >= self._min_tokens)
        return (text, matched) if matched is not None else (text + self._matcher.finish(), None)
