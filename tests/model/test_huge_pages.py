"""Memory for packed weights: zeroed, aligned, disjoint, and there as long as somebody reads it."""

from __future__ import annotations

import gc

import pytest
import torch

from model.huge_pages import ALIGNMENT, HUGE_PAGE, REGION, HugePages


def test_tensors_are_zero_aligned_and_apart() -> None:
    memory = HugePages()
    tensors = [memory.zeros(3, size, dtype=torch.int32) for size in (1, 7, 64, 5)]
    for tensor in tensors:
        assert tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous()
        assert tensor.count_nonzero() == 0
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    assert tensors[0].data_ptr() % HUGE_PAGE == 0


def test_what_does_not_fit_into_a_region_gets_its_own() -> None:
    memory = HugePages()
    small, large = memory.zeros(8, dtype=torch.float32), memory.zeros(REGION + 1, dtype=torch.uint8)
    large[-1] = 1
    assert large[-1] == 1 and small.count_nonzero() == 0


def test_a_tensor_outlives_its_owner() -> None:
    tensor = HugePages().zeros(1000, dtype=torch.int64)
    gc.collect()
    assert tensor.fill_(3).sum() == 3000


@pytest.mark.parametrize("num_bytes", [1 << 50, (1 << 63) - 1, 1 << 63, 10**30])
def test_no_memory_is_one_clear_line(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"^no memory for \d+ bytes$"):
        HugePages().zeros(num_bytes, dtype=torch.uint8)
