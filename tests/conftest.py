"""For every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from model.native.library import Kernels

# Read by the OpenMP runtime when torch is imported: threads that wait must not spin, or two busy processes on two cores
# slow each other down a hundredfold. The engine process sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read when triton is imported: kernels for a card run in its interpreter. Said here, since transformers imports torch's
# compiler and with it triton: once triton's own functions are compiled ones, interpreted kernels cannot call them.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-level", metavar="LEVEL", help="run as on a machine whose fastest instruction set level is this one"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hides faster levels from this process, and names the level to every server that a test starts."""
    name = config.getoption("--cpu-level")
    if name is None:
        return
    from model.native import levels, library

    names = [level.name for level in levels.LEVELS]
    if name not in names:
        raise pytest.UsageError(f"--cpu-level: {name!r} is none of {names}")
    runnable = [level for level in library.runnable_levels() if names.index(level.name) >= names.index(name)]
    if not any(level.name == name for level in runnable):
        raise pytest.UsageError(f"--cpu-level: this machine cannot execute {name!r}")
    library.runnable_levels = lambda: runnable  # type: ignore[assignment]
    os.environ["QUIRE_CPU_LEVEL"] = name


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native_kernels() -> Kernels:
    """For tests that compare bits: only the compiled kernels promise them, so without them they cannot run."""
    from model.native.library import open_kernels

    try:
        return open_kernels()
    except ValueError as error:
        pytest.skip(str(error))
