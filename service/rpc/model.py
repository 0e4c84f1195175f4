"""What is served: one model's name, its text side from the start, and its facts once the engine has said hello.

It knows neither requests nor protobuf.
"""

from __future__ import annotations

from model.interface import ModelFacts, RunnerShape
from service.engine.messages import Hello
from service.errors import UNMEASURED_RETRY_SECONDS, ServerStarting
from service.text.chat import ChatTemplate
from service.text.tokenizer import Tokenizer


class ServedModel:
    """The one model of this server."""

    def __init__(self, name: str, tokenizer: Tokenizer, chat: ChatTemplate | None) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.chat = chat
        self._hello: Hello | None = None

    def learn(self, hello: Hello) -> None:
        """Takes what the engine runs; a restarted engine runs the same."""
        self._hello = hello

    @property
    def is_known(self) -> bool:
        """Whether the engine was up once."""
        return self._hello is not None

    @property
    def facts(self) -> ModelFacts:
        """Raises ServerStarting until the engine was up once."""
        return self._known().facts

    @property
    def shape(self) -> RunnerShape:
        """Raises ServerStarting until the engine was up once."""
        return self._known().shape

    @property
    def max_sequence_tokens(self) -> int:
        """Largest prompt and output together that the key/value pool can hold."""
        return self.shape.num_blocks * self.shape.block_size

    @property
    def max_prompt_chars(self) -> int:
        """No text with more characters fits the context: a token holds `max_token_bytes` at most."""
        return self.shape.context_length * self.tokenizer.max_token_bytes

    def _known(self) -> Hello:
        if self._hello is None:
            raise ServerStarting(retry_after_seconds=UNMEASURED_RETRY_SECONDS)
        return self._hello
