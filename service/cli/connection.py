"""How commands reach a server: the flags for it, and what is said when a call fails."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from service.cli.answer import count
from service.cli.options import named_by_flag
from service.cli.parser import CommandFailed, positive_seconds
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.errors import StartupError

PROBE_SECONDS = 1.0

HINTS = {
    "CONTEXT_LENGTH_EXCEEDED": "shorten the prompt or ask for fewer tokens (--max-tokens)",
    "EXCEEDS_KV_CAPACITY": "shorten the prompt, or serve with a larger --kv-cache-mib",
    "MODEL_NOT_FOUND": "leave out --model to use the only one",
    "DEADLINE_UNREACHABLE": "allow more time with --timeout",
    "DEADLINE_EXCEEDED": "allow more time with --timeout, or ask for fewer tokens",
}
"""What a person at a terminal can do about a reason."""

USER_MISTAKES = ("INVALID_ARGUMENT", "NOT_FOUND")
"""Status codes that refuse what the user gave, as this process does with what it can judge itself."""


def add_connection(parser: argparse.ArgumentParser) -> None:
    """--address and --timeout."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="server to call, also unix:PATH; default: QUIRE_ADDRESS, else this machine at QUIRE_PORT or 50051",
    )
    parser.add_argument("--timeout", type=positive_seconds, metavar="SECONDS", help="deadline of each call")


@contextmanager
def connected(address: str | None) -> Iterator[BlockingClient]:
    """A client. Its errors become one line: StartupError for a bad address, `failure` for a call that fails."""
    try:
        client = BlockingClient(address or _default_address())
    except ValueError as error:
        raise StartupError(str(error)) from None
    with client:
        try:
            yield client
        except QuireClientError as error:
            raise failure(error, client) from None


def failure(error: QuireClientError, client: BlockingClient, num_tokens: int = 0) -> StartupError | CommandFailed:
    """A call's error as the command's: StartupError where the server refuses what the user gave."""
    kind = StartupError if error.code in USER_MISTAKES else CommandFailed
    return kind(explain(error, client, num_tokens))


def explain(error: QuireClientError, client: BlockingClient, num_tokens: int = 0) -> str:
    """What went wrong, `num_tokens` of an answer having come, and what can be done, in one line."""
    if error.violations:
        return "; ".join(named_by_flag(f"{bad.field}: {bad.description}") for bad in error.violations)
    if error.code == "DEADLINE_EXCEEDED" and num_tokens:
        return f"the answer was cut by the timeout after {count(num_tokens)}; {HINTS['DEADLINE_EXCEEDED']}"
    if error.reason is None:
        return _explain_connection(error, client)
    hint = HINTS.get(error.reason)
    if error.retry_after_seconds is not None:
        hint = f"try again in {error.retry_after_seconds:.1f} s"
    return f"{error}{f'; {hint}' if hint else ''}"


def _explain_connection(error: QuireClientError, client: BlockingClient) -> str:
    """gRPC's own errors name addresses and causes at length, and tell a loading server from none in no simple way."""
    if error.code == "DEADLINE_EXCEEDED":
        return f"no answer from {client.address} within the timeout; {HINTS['DEADLINE_EXCEEDED']}"
    if error.code != "UNAVAILABLE":
        return str(error)
    try:
        status = client.health(timeout_seconds=PROBE_SECONDS)
    except QuireClientError:
        return f"no server answers at {client.address}; start one with `quire serve`, or name another with --address"
    return f"the server at {client.address} takes no requests now ({status}): it is starting or stopping; try again"


def _default_address() -> str:
    # Imported only here: pydantic takes longer to import than the rest of `quire health --address …` to run.
    from service.config import default_address

    return default_address()
