"""Real servers: one shared by the tests that leave it as it was, and a maker of others."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.server import Server, serving

Serve = Callable[..., Server]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model with default settings."""
    with serving(tmp_path_factory.mktemp("server") / "log") as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers with flags of one's own; all are gone at the end."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(serving(tmp_path / "log", *flags))
