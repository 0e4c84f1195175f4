"""A scripted server per test: gRPC keeps its retry throttle by address, and tests must not share it."""

from collections.abc import Iterator

import pytest

from tests.client.server import FakeServer, running


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as server:
        yield server
