"""Kernels for a card, run by Triton's interpreter (tests/conftest.py asks for it), where there is a Triton."""

import importlib.util
from pathlib import Path

import pytest


class WithoutTriton(pytest.Module):
    """A file of tests that this machine cannot even import."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("triton is not installed; it has packages for Linux on x86-64 and 64-bit ARM only")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if importlib.util.find_spec("triton") is not None:
        return None
    return WithoutTriton.from_parent(parent, path=module_path)
