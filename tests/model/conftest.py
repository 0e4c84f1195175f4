"""Fixtures of the model's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.attention.base import load_attention


@pytest.fixture(scope="session")
def native_attention() -> str:
    """For tests that compare bits: only the compiled attention promises them, so without it they cannot run."""
    try:
        return load_attention("native", torch.float32, 64).name
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
