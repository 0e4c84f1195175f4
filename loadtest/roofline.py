"""The least time in which a machine can do a workload, from bytes moved and operations done. Standard library only.

A model's products read every weight once a step and do two operations per weight and token; attention reads the keys
and values of a token's context and does four operations per element of its query and position. Nothing else is counted,
and reading and computing are taken to overlap entirely, among the requests of a batch over the whole workload, so that
no engine that reads such weights can be faster. Weights are counted at their precision, bfloat16 as 2 bytes: an engine
that keeps them smaller without loss, as Quire does in 12 bits, reads less and can pass the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.workloads import Work

KV_ELEMENT_BYTES = 2
WEIGHT_BYTES = {"bf16": 2, "int8": 1, "fp32": 4}
"""Of a weight as its precision has it. An engine that keeps it smaller without loss is not held to this."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model's arithmetic consists of."""

    layer_weights: int
    """Weights of all layers' matrices."""
    head_weights: int
    """Weights of the last matrix, which only tokens that are drawn from need."""
    attention_width: int
    """Elements of all layers' queries of one token."""
    kv_width: int
    """Elements of all layers' keys and values of one token."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelCost:
        """From a config.json of the Llama family."""
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        q_size, kv_size = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
        layer = 2 * hidden * (q_size + kv_size) + 3 * hidden * config["intermediate_size"]
        head = config["vocab_size"] * hidden
        return cls(num_layers * layer, head, num_layers * q_size, 2 * num_layers * kv_size)

    @property
    def weights(self) -> int:
        """All that a step reads."""
        return self.layer_weights + self.head_weights

    def weight_bytes(self, precision: str) -> int:
        """Their size."""
        return WEIGHT_BYTES[precision] * self.weights


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What the machine can do in a second at one precision of the weights."""

    bytes_read: float
    product_operations: float
    attention_operations: float

    @classmethod
    def of(cls, limits: Mapping[str, float | None], precision: str, weight_bytes: float) -> MachineRates | None:
        """From measured limits; None where the machine has no instruction for the precision, or a limit is missing."""
        in_cache = weight_bytes < (limits["l3_bytes"] or 0)
        bytes_read = limits["l3_bytes_per_second" if in_cache else "memory_bytes_per_second"]
        products = limits[{"bf16": "bf16_flops", "fp32": "fp32_flops", "int8": "int8_ops"}[precision]]
        attention = limits["fp32_flops" if precision == "fp32" else "bf16_flops"]
        return cls(bytes_read, products, attention) if bytes_read and products and attention else None

    @classmethod
    def of_card(cls, limits: Mapping[str, float]) -> MachineRates:
        """Of a card, in bfloat16: what it copies, bytes read and written counted, and its rate of products."""
        return cls(limits["bytes_per_second"], limits["bf16_flops"], limits["bf16_flops"])


@dataclass(frozen=True, slots=True)
class LeastTime:
    """Seconds of computing and of reading, for a workload's prompts and for the tokens after each one's first."""

    prefill_computing: float
    prefill_reading: float
    decode_computing: float
    decode_reading: float

    @property
    def prefill_seconds(self) -> float:
        """Of the prompts alone."""
        return max(self.prefill_computing, self.prefill_reading)

    @property
    def decode_seconds(self) -> float:
        """Of the tokens after the first alone."""
        return max(self.decode_computing, self.decode_reading)

    @property
    def seconds(self) -> float:
        """Of both, where prompts are computed while others decode."""
        return max(self.prefill_computing + self.decode_computing, self.prefill_reading + self.decode_reading)


def least_time(cost: ModelCost, rates: MachineRates, precision: str, works: Sequence[Work]) -> LeastTime:
    """Of requests that begin together: prompts as one batch, then as many steps as the longest answer takes."""
    weight_seconds = cost.weight_bytes(precision) / rates.bytes_read
    prompts = [len(work.prompt) for work in works]
    products = 2 * (sum(prompts) * cost.layer_weights + len(works) * cost.head_weights)
    attention = 4 * cost.attention_width * sum(length * (length + 1) / 2 for length in prompts)
    prefill = products / rates.product_operations + attention / rates.attention_operations

    num_tokens = sum(work.num_new - 1 for work in works)
    contexts = sum(context_sum(len(work.prompt), work.num_new) for work in works)
    computing = 2 * num_tokens * cost.weights / rates.product_operations
    computing += 4 * cost.attention_width * contexts / rates.attention_operations
    reading = max(work.num_new - 1 for work in works) * weight_seconds
    reading += KV_ELEMENT_BYTES * cost.kv_width * contexts / rates.bytes_read
    return LeastTime(prefill, weight_seconds, computing, reading)


def decode_step_seconds(cost: ModelCost, rates: MachineRates, precision: str, contexts: Sequence[int]) -> float:
    """Of one step of a token for each context: products, which read weights meanwhile, and then keys and values.

    Unlike a whole workload's, a step's attention has nothing to overlap with: it waits for each layer's products.
    """
    reading = cost.weight_bytes(precision) / rates.bytes_read
    computing = 2 * len(contexts) * cost.weights / rates.product_operations
    return max(reading, computing) + KV_ELEMENT_BYTES * cost.kv_width * sum(contexts) / rates.bytes_read


def context_sum(num_prompt: int, num_new: int) -> int:
    """Positions that the tokens after the first look at, added up: each sees all before it and itself."""
    return sum(range(num_prompt + 1, num_prompt + num_new))


def least_figures(workload: str, least: LeastTime, works: Sequence[Work]) -> dict[str, float]:
    """The limits of a workload's figures, by the runners' names; none for latencies, which scheduling decides."""
    if workload == "W5":
        return {}
    num_new = sum(work.num_new for work in works)
    in_turn = least.prefill_seconds + least.decode_seconds
    found = {"output_tokens_per_second": num_new / (in_turn if len(works) == 1 else least.seconds)}
    if workload == "W1":
        found["prefill_tokens_per_second"] = len(works[0].prompt) / least.prefill_seconds
        found["ms_per_token"] = 1_000 * least.decode_seconds / (num_new - 1)
    return found
