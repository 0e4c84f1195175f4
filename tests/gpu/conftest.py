"""Kernels for a card, run by Triton's interpreter (tests/conftest.py asks for it), where there is a Triton."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


class WithoutTriton(pytest.Module):
    """A file of tests that this machine cannot even import."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("triton is not installed; it has packages for Linux on x86-64 and 64-bit ARM only")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if importlib.util.find_spec("triton") is not None:
        return None
    return WithoutTriton.from_parent(parent, path=module_path)


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
