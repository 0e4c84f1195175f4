"""For every test."""

import os

import pytest

# Read by the OpenMP runtime when torch is imported: threads that wait must not spin, or two busy processes on two cores
# slow each other down a hundredfold. The engine process sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def native_attention() -> str:
    """For tests that compare bits: only the compiled attention promises them, so without it they cannot run."""
    import torch

    from model.attention.base import load_attention

    try:
        return load_attention("native", torch.float32, 64).name
    except ValueError as error:
        pytest.skip(str(error))
