"""A front-end process over the fake engine, for tests of the process."""

import sys

from service import server
from tests.rpc.fake_engine import FakeEngine


def connect(_socket_path: str, **callbacks: object) -> FakeEngine:
    return FakeEngine()(**callbacks)  # type: ignore[arg-type]


if __name__ == "__main__":
    server.EngineClient = connect  # type: ignore[assignment, misc]
    sys.exit(server.main())
