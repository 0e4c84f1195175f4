"""Limits from bytes and operations: those of a model that can be reckoned by hand."""

from __future__ import annotations

import pytest

from loadtest.models import CARD_SHAPES, config
from loadtest.roofline import (
    MachineRates,
    ModelCost,
    context_sum,
    decode_step_seconds,
    least_figures,
    least_time,
)
from loadtest.workloads import Work

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 100,
}
COST = ModelCost(layer_weights=1000, head_weights=500, attention_width=10, kv_width=4)
LIMITS: dict[str, float | None] = {
    "memory_bytes_per_second": 10.0,
    "l3_bytes_per_second": 100.0,
    "l3_bytes": 1000.0,
    "bf16_flops": 200.0,
    "fp32_flops": 50.0,
    "int8_ops": None,
}


def test_costs_come_from_the_config() -> None:
    cost = ModelCost.from_config(CONFIG)
    assert cost.layer_weights == 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16)
    assert (cost.head_weights, cost.attention_width, cost.kv_width) == (800, 2 * 8, 2 * 2 * 4)
    assert cost.weight_bytes("int8") * 2 == cost.weight_bytes("bf16")


def test_weights_that_fit_the_cache_are_read_from_it() -> None:
    small, large = (MachineRates.of(LIMITS, "bf16", size) for size in (999, 1001))
    assert small == MachineRates(100.0, 200.0, 200.0)
    assert large == MachineRates(10.0, 200.0, 200.0)


def test_a_machine_without_the_instruction_sets_no_limit() -> None:
    assert MachineRates.of(LIMITS, "int8", 10) is None


def test_one_stream_is_bound_by_the_weights() -> None:
    rates = MachineRates(bytes_read=3000.0, product_operations=1e9, attention_operations=1e9)
    least = least_time(COST, rates, "bf16", [Work((1,) * 4, 3)])
    assert least.prefill_seconds == pytest.approx(1.0)
    assert least.decode_seconds == pytest.approx((2 * 3000 + 2 * 4 * (5 + 6)) / 3000)
    figures = least_figures("W1", least, [Work((1,) * 4, 3)])
    assert figures["ms_per_token"] == pytest.approx(1_000 * least.decode_seconds / 2)
    assert figures["prefill_tokens_per_second"] == pytest.approx(4.0)


def test_a_batch_is_bound_by_its_operations() -> None:
    rates = MachineRates(bytes_read=1e12, product_operations=1000.0, attention_operations=100.0)
    works = [Work((1,) * 2, 2), Work((1,) * 3, 2)]
    least = least_time(COST, rates, "bf16", works)
    assert least.prefill_seconds == pytest.approx(2 * (5 * 1000 + 2 * 500) / 1000 + 4 * 10 * (3 + 6) / 100)
    assert least.decode_seconds == pytest.approx(2 * 2 * 1500 / 1000 + 4 * 10 * (3 + 4) / 100)
    total = least.prefill_seconds + least.decode_seconds
    assert least_figures("W2", least, works) == {"output_tokens_per_second": pytest.approx(4 / total)}


def test_latencies_among_streams_have_no_such_limit() -> None:
    rates = MachineRates(1.0, 1.0, 1.0)
    works = [Work((1,), 2)]
    assert least_figures("W5", least_time(COST, rates, "bf16", works), works) == {}


def test_contexts_are_those_of_the_tokens_after_the_first() -> None:
    assert context_sum(4, 3) == 5 + 6
    assert context_sum(4, 1) == 0


CARD = MachineRates.of_card({"bytes_per_second": 4.3e12, "bf16_flops": 790e12})
"""An H200's, which the figures below were reckoned with by hand."""


@pytest.mark.parametrize(
    ("name", "batch", "milliseconds"),
    [("8B", 1, 3.52), ("8B", 64, 5.49), ("8B", 256, 12.85), ("1B", 1, 0.58), ("1B", 128, 1.57), ("1B", 256, 2.80)],
)
def test_a_decode_step_reads_its_weights_or_computes_and_then_reads_its_past(
    name: str, batch: int, milliseconds: float
) -> None:
    cost = ModelCost.from_config(config(CARD_SHAPES[name]))
    assert 1_000 * decode_step_seconds(cost, CARD, "bf16", [1024] * batch) == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(
    ("name", "length", "milliseconds"), [("8B", 8192, 167), ("8B", 32_768, 935), ("1B", 8192, 25.7)]
)
def test_a_cards_prompt_is_bound_by_its_operations(name: str, length: int, milliseconds: float) -> None:
    cost = ModelCost.from_config(config(CARD_SHAPES[name]))
    least = least_time(cost, CARD, "bf16", [Work((1,) * length, 1)])
    assert 1_000 * least.prefill_seconds == pytest.approx(milliseconds, rel=0.02)
