"""Which sizes steps are padded to, and that what was captured is what is done."""

from __future__ import annotations

import pytest
import torch

from model.gpu.graphs import Buckets, Graphs, Size
from tests.gpu.late_device import LateDevice


def test_a_step_gets_the_next_bucket() -> None:
    buckets = Buckets()
    for num_rows, bucket in ((1, 1), (3, 4), (8, 8), (9, 16), (193, 224), (256, 256), (257, 257)):
        assert buckets.of_rows(num_rows) == bucket
        assert buckets.of_step(num_rows, num_rows, 2048, 512, is_decode=True) == Size(bucket, bucket, True)
    for num_tokens, bucket in ((2, 64), (64, 64), (65, 128), (500, 512), (1024, 1024)):
        assert buckets.of_step(num_tokens, 1, 2048, 256, is_decode=False) == Size(bucket, min(bucket, 256), False)


def test_a_step_without_a_bucket_is_padded_as_far_as_there_is_room() -> None:
    for num_tokens, padded in ((1025, 1152), (1152, 1152), (1153, 1280), (1900, 1920), (1921, 2000), (2000, 2000)):
        assert Buckets().of_step(num_tokens, 3, 2000, 256, is_decode=False) == Size(padded, 3, False)


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "decode", "mixed"),
    [(1, 1, (1,), (64,)), (5, 64, (1, 2, 4, 8), (64,)), (8, 65, (1, 2, 4, 8), (64, 128))],
)
def test_no_bucket_is_larger_than_needed(
    max_rows: int, max_tokens: int, decode: tuple[int, ...], mixed: tuple[int, ...]
) -> None:
    assert Buckets().up_to(max_rows, max_tokens) == Buckets(decode, mixed)
    assert Buckets().up_to(4096, 65536) == Buckets()


def test_every_bucket_is_captured_the_largest_first() -> None:
    buckets = Buckets((1, 2, 4), (3, 64))
    sizes = buckets.sizes(max_wanted=4)
    assert sizes == [(64, 4, False), (4, 4, True), (3, 3, False), (2, 2, True), (1, 1, True)]
    for num_tokens in range(1, 65):
        assert buckets.of_step(num_tokens, 1, 64, 4, is_decode=num_tokens < 5) in sizes


def test_what_was_captured_is_replayed_and_no_line_of_it_runs_again() -> None:
    device, graphs = LateDevice(), Graphs(LateDevice())
    graphs = Graphs(device)
    number, numbers = torch.zeros(2), []

    def work() -> None:
        numbers.append(1)
        number.add_(len(numbers)).mul_(torch.ones(2) * 2)

    graphs.capture("a", work)
    assert (number.tolist(), numbers, len(graphs)) == ([2, 2], [1], 1)
    graphs.enqueue("a", work)
    graphs.enqueue("b", work)
    assert number.tolist() == [2, 2]
    device.free_bytes()
    assert (number.tolist(), numbers) == ([2 * ((2 + 1) * 2 + 2)] * 2, [1, 1])
