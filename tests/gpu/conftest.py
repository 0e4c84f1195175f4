"""Kernels for a card, run by Triton's interpreter (tests/conftest.py asks for it), where there is a Triton."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


class Unavailable(pytest.Module):
    """A file of tests that this machine cannot even import."""

    reason: str

    def collect(self) -> list[pytest.Item]:
        pytest.skip(self.reason)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The image of a card's machine may lack what the service needs; then the engine's tests are left out alone."""
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed; it has packages for Linux on x86-64 and 64-bit ARM only"
    elif "engine" in module_path.name and not all(map(importlib.util.find_spec, ("msgspec", "pydantic"))):
        reason = "msgspec or pydantic is not installed, which the engine needs"
    if reason is None:
        return None
    module: Unavailable = Unavailable.from_parent(parent, path=module_path)
    module.reason = reason
    return module


@pytest.fixture
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter's product of tiles add input after input, as an instruction does whose way is one.

    Its own is a library's, which adds up in another way for another tile, or another place in it.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: object) -> Any:
        total = acc.data.copy()
        for index in range(a.data.shape[1]):
            total += a.data[:, index : index + 1] * b.data[index : index + 1]
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
