"""A step's matrix products on a card: torch's own, and those that a runner may choose so that rows' bits are alike.

    python -m loadtest.gpu.products --records FILE

For each weight and number of rows: the time, the share of the limit, and whether a row has the bits that it has alone.
Then, for each number of rows, all products of a step, and what a way costs there against torch's own.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from loadtest.gpu.limits import rates_of
from loadtest.gpu.measure import (
    Call,
    Timing,
    compile_ahead,
    measure,
    num_sets,
    open_device,
    random_tensor,
    relative_error,
    unwritten,
)
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import Matrix, matrices_of, names_of, shape_of
from loadtest.gpu.summary import BASELINE
from loadtest.roofline import MachineRates
from model.gpu.device import CudaDevice
from model.gpu.products import Product, forbid_split_sums, library_product
from model.gpu.products import candidates as all_candidates

NUM_ROWS = (1, 8, 32, 64, 128, 256)
PROMPT_ROWS = 8192
DRY_VOCAB_SIZE = 70
DRY_NUM_ROWS = (1, 3)
DRY_PROMPT_ROWS = 17
DRY_SHARED_BYTES = 227 * 2**10
CHECKED_ROWS = 16
TOLERANCE = 0.01
"""Relative, of results in bfloat16."""
COMPILE_SECONDS = 30.0
LEAST_SECONDS = 5.0
"""With less left, no matrix is begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code: 1 where a result was wrong or the time was too short."""
    options = parse_part("products", arguments)
    if not options.is_dry:
        compile_ahead(list(compilations()), COMPILE_SECONDS)
    models = names_of(options.is_dry)
    steps = {name: Steps(options, name) for name in models}
    is_sound = [steps[name].measure({BASELINE: library_product}) for name in models]
    forbid_split_sums(open_device(options.is_dry))  # for all of the process: torch's own came first
    is_sound += [steps[name].measure(candidates(options.is_dry)) for name in models]
    return 0 if all(is_sound) else 1


def candidates(is_dry: bool) -> dict[str, Product]:
    """What a runner may choose between, by name; of a dry run, in which kernels are slow, the first and the last."""
    shared_bytes = DRY_SHARED_BYTES if is_dry else CudaDevice().shared_bytes
    found = [(each.name, each.product) for each in all_candidates(shared_bytes)]
    return dict([found[0], found[-1]] if is_dry else found)


def compilations() -> Iterator[Call]:
    """Launches of the candidates for every weight, with few rows and with many."""
    for model in names_of(is_dry=False):
        for matrix in matrices_of(shape_of(model, is_dry=False)):
            for num_rows in (1, 256, 1024):
                yield partial(compile_product, matrix, num_rows)


def compile_product(matrix: Matrix, num_rows: int) -> None:
    """Multiplies once in each way that a runner may choose."""
    device = torch.device("cuda")
    x, (weight,) = random_tensor(num_rows, matrix.num_inputs, device=device), weights_of(matrix, 1, device)
    for product in candidates(is_dry=False).values():
        product(x, weight, None, output_of(matrix, x))
    torch.cuda.synchronize()


def output_of(matrix: Matrix, x_MI: Tensor) -> Tensor:
    """Room for a product: logits are float32."""
    dtype = torch.float32 if matrix.is_last else x_MI.dtype
    return unwritten(len(x_MI), matrix.num_outputs, device=x_MI.device, dtype=dtype)


def weights_of(matrix: Matrix, count: int, device: torch.device) -> list[Tensor]:
    """Some weights of one shape."""
    scale = matrix.num_inputs**-0.5
    return [random_tensor(matrix.num_outputs, matrix.num_inputs, device=device, scale=scale) for _ in range(count)]


class Steps:
    """All products of one model's steps, matrix after matrix, in one way after another."""

    def __init__(self, options: PartOptions, model: str) -> None:
        self._options, self._model = options, model
        shape = shape_of(model, options.is_dry)
        self._matrices = matrices_of(replace(shape, vocab_size=DRY_VOCAB_SIZE) if options.is_dry else shape)
        self._num_rows = DRY_NUM_ROWS if options.is_dry else NUM_ROWS
        self._prompt_rows = DRY_PROMPT_ROWS if options.is_dry else PROMPT_ROWS
        self._seconds: dict[tuple[str, int], float] = defaultdict(float)
        self._has_own_bits: dict[tuple[str, int], bool] = defaultdict(lambda: True)

    def measure(self, ways: Mapping[str, Product]) -> bool:
        """Measures some ways, and writes each product and their sums. Returns whether all is there and right."""
        is_sound = True
        for matrix in self._matrices:
            if self._options.left() < LEAST_SECONDS:
                print(f"no time is left for {self._model} {matrix.name}")
                return False
            is_sound &= self._measure_matrix(matrix, ways)
        for way in ways:
            for rows in (*self._num_rows, self._prompt_rows):
                self._write_sum(way, rows)
        return is_sound

    def _measure_matrix(self, matrix: Matrix, ways: Mapping[str, Product]) -> bool:
        device, rates = open_device(self._options.is_dry), rates_of(self._options)
        weights = weights_of(matrix, num_sets(2 * matrix.num_outputs * matrix.num_inputs, device), device)
        # Of a prompt, one row meets the last matrix.
        counts = self._num_rows if matrix.is_last else (*self._num_rows, self._prompt_rows)
        x = random_tensor(max(counts), matrix.num_inputs, device=device)
        is_sound = True
        for rows in counts:
            for way, product in ways.items():
                error, has_own_bits = examine(product, matrix, x[:rows], weights[0])
                timing = time_product(product, matrix, x[:rows], weights)
                is_sound &= error < TOLERANCE
                self._seconds[way, rows] += matrix.count * timing.seconds
                self._has_own_bits[way, rows] &= has_own_bits
                self._options.records.write(
                    "product",
                    model=self._model,
                    matrix=matrix.name,
                    way=way,
                    rows=rows,
                    us=1e6 * timing.seconds,
                    share=least_seconds(matrix, rows, rates) / timing.seconds,
                    noise=timing.noise,
                    error=error,
                    is_right=error < TOLERANCE,
                    has_bits_of_alone=has_own_bits,
                )
        return is_sound

    def _write_sum(self, way: str, rows: int) -> None:
        matrices = [matrix for matrix in self._matrices if rows in self._num_rows or not matrix.is_last]
        rates = rates_of(self._options)
        limit = sum(matrix.count * least_seconds(matrix, rows, rates) for matrix in matrices)
        seconds = self._seconds[way, rows]
        self._options.records.write(
            "products of a step",
            model=self._model,
            way=way,
            rows=rows,
            ms=1e3 * seconds,
            share=limit / seconds,
            cost=seconds / self._seconds[BASELINE, rows] - 1,
            has_bits_of_alone=self._has_own_bits[way, rows],
        )


def least_seconds(matrix: Matrix, num_rows: int, rates: MachineRates) -> float:
    """The limit of one product: the weights read, or its operations done."""
    size = matrix.num_outputs * matrix.num_inputs
    return max(2 * size / rates.bytes_read, 2 * num_rows * size / rates.product_operations)


def examine(product: Product, matrix: Matrix, x_MI: Tensor, weight_OI: Tensor) -> tuple[float, bool]:
    """The error against float32, and whether the first and the last row have the bits that each has alone."""
    out_MO = output_of(matrix, x_MI)
    product(x_MI, weight_OI, None, out_MO)
    expected = x_MI[-CHECKED_ROWS:].float() @ weight_OI.float().T
    error = relative_error(out_MO[-CHECKED_ROWS:], expected)
    has_own_bits = True
    for row in (0, len(x_MI) - 1):
        alone = output_of(matrix, x_MI[:1])
        product(x_MI[row : row + 1], weight_OI, None, alone)
        has_own_bits &= torch.equal(alone[0], out_MO[row])
    return error, has_own_bits


def time_product(product: Product, matrix: Matrix, x_MI: Tensor, weights: Sequence[Tensor]) -> Timing:
    """One product with each weight in turn."""
    out_MO = output_of(matrix, x_MI)
    calls: list[Call] = [partial(product, x_MI, weight, None, out_MO) for weight in weights]
    return measure(calls, x_MI.device)


if __name__ == "__main__":
    sys.exit(main())
