"""Attention on a card against its limit: decode at several batches and contexts, and a long prompt.

    python -m loadtest.gpu.attention --records FILE

FlashAttention-3 is measured beside our own kernels where it computes; where it does not, a record says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from loadtest.gpu.attention_cases import BLOCK_SIZE, Cache, Case, Flash3, Spans, Tiles, Way
from loadtest.gpu.limits import rates_of
from loadtest.gpu.measure import compile_ahead, measure, open_device
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import names_of, shape_of
from loadtest.models import ModelShape
from model.gpu.attention import DECODE, PREFILL, Heads, Tile
from model.gpu.flash_attention import FlashAttention, find_fault
from model.interface import GpuAttention

BATCHES = (1, 8, 32, 64, 128, 256)
SPANS = (
    *(Spans(batch, 1024) for batch in BATCHES),
    *(Spans(batch, 8192) for batch in BATCHES),
    *(Spans(1, length, length) for length in (1024, 8192, 32_768)),
    Spans(1, 8192, 1024),
)
DRY_SPANS = (Spans(2, 70), Spans(1, 40, 40))
TILES = Tiles(DECODE, PREFILL)
DRY_TILES = Tiles(Tile(16, 16, 32, 4, 3), Tile(16, 16, 64, 4, 3))
POOL_TOKENS = 256 * 8192
DRY_POOL_TOKENS = 1024
TOLERANCE = 0.01
"""Relative, of results in bfloat16."""
COMPILE_SECONDS = 40.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code."""
    options = parse_part("attention", arguments)
    if not options.is_dry:
        shapes = [shape_of(name, is_dry=False) for name in names_of(options.is_dry)]
        compile_ahead(
            [partial(compile_kernels, shape, TILES, is_decode) for shape in shapes for is_decode in (True, False)],
            COMPILE_SECONDS,
        )
    tiles = DRY_TILES if options.is_dry else TILES
    is_sound = [measure_model(options, name, GpuAttention.TRITON, tiles) for name in names_of(options.is_dry)]
    for name in names_of(options.is_dry):
        fault = find_flash_fault(options, name)
        if fault is None:
            is_sound.append(measure_model(options, name, GpuAttention.FLASH_ATTENTION_3, Flash3()))
        else:
            options.records.write("attention left out", model=name, by=GpuAttention.FLASH_ATTENTION_3, why=fault)
    return 0 if all(is_sound) else 1


def find_flash_fault(options: PartOptions, name: str) -> str | None:
    """Why FlashAttention-3 does not compute a model's heads here; None where it does."""
    if options.is_dry:
        return "there is no card in a dry run"
    shape = shape_of(name, is_dry=False)
    fault = find_fault(shape.head_dim, torch.bfloat16, torch.cuda.get_device_capability())
    if fault is not None:
        return fault
    heads = Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, shape.head_dim**-0.5)
    try:
        FlashAttention(heads, 1, torch.device("cuda"))
    except ValueError as refusal:
        return str(refusal)
    return None


def compile_kernels(shape: ModelShape, tiles: Tiles, is_decode: bool) -> None:
    """Launches the kernels of a kind of step once, with splits to merge where decode has some."""
    cache = Cache(shape, 4096, torch.device("cuda"))
    Case(cache, Spans(2, 2048) if is_decode else Spans(1, 256, 256), tiles).calls()[0]()
    torch.cuda.synchronize()


def measure_model(options: PartOptions, name: str, by: GpuAttention, way: Way) -> bool:
    """All steps of one model's heads, in one way. Returns whether every result was right."""
    device, rates, shape = open_device(options.is_dry), rates_of(options), shape_of(name, options.is_dry)
    cache = Cache(shape, DRY_POOL_TOKENS if options.is_dry else POOL_TOKENS, device)
    is_sound = True
    for spans in DRY_SPANS if options.is_dry else SPANS:
        case = Case(cache, spans, way)
        error = case.error()
        is_sound &= error < TOLERANCE
        timing, limit = measure(case.calls(), device), spans.least_seconds(shape, rates)
        options.records.write(
            "attention",
            model=name,
            by=by,
            phase="decode" if spans.is_decode else "prefill",
            batch=spans.num_rows,
            context=spans.context,
            tokens=spans.num_tokens,
            us=1e6 * timing.seconds,
            share=limit / timing.seconds,
            noise=timing.noise,
            error=error,
            is_right=error < TOLERANCE,
        )
    return is_sound


if __name__ == "__main__":
    sys.exit(main())
