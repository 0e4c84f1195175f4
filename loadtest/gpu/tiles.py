"""Which tiles attention should take on a card: sizes, warps, stages, splits and the grid, one changed at a time.

    python -m loadtest.gpu.tiles --records FILE

Every choice is checked against float32 before it is timed. The last records name the best for decode and for prefill:
the least geometric mean of times by those of the present choice, and where the present one is best, so it is said.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import exp, log
from statistics import fmean

from loadtest.gpu.attention import DRY_POOL_TOKENS, DRY_TILES, TILES, TOLERANCE, compile_kernels
from loadtest.gpu.attention_cases import Cache, Case, Spans, Tiles
from loadtest.gpu.limits import rates_of
from loadtest.gpu.measure import Call, compile_ahead, measure, open_device
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import names_of, shape_of
from loadtest.models import ModelShape

DECODE_SPANS = (Spans(1, 1024), Spans(8, 1024), Spans(64, 1024), Spans(256, 1024), Spans(1, 8192), Spans(32, 8192))
PREFILL_SPANS = (Spans(1, 1024, 1024), Spans(1, 8192, 8192), Spans(8, 512, 512))
DRY_SPANS = {"decode": (Spans(2, 70),), "prefill": (Spans(1, 40, 40),)}
SPANS = {"decode": DECODE_SPANS, "prefill": PREFILL_SPANS}
POOL_TOKENS = 2**19
COMPILE_SHARE = 0.5
"""Of the time that there is, which compiling may take at most."""
LEAST_SECONDS = 5.0
"""With less left, no choice is begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code: 1 where the present choice failed or the time was short."""
    options = parse_part("tiles", arguments)
    shapes = {name: shape_of(name, options.is_dry) for name in names_of(options.is_dry)}
    present = DRY_TILES if options.is_dry else TILES
    choices = {phase: list(choices_of(phase, present)) for phase in SPANS}
    if options.is_dry:
        choices = {phase: tried[:2] for phase, tried in choices.items()}
    else:
        compile_ahead(list(compilations(choices, shapes.values())), COMPILE_SHARE * options.left())
    device, is_whole = open_device(options.is_dry), True
    for name, shape in shapes.items():
        cache = Cache(shape, DRY_POOL_TOKENS if options.is_dry else POOL_TOKENS, device)
        for phase, tried in choices.items():
            is_whole &= measure_phase(options, name, phase, tried, cache)
    return 0 if is_whole else 1


def compilations(choices: Mapping[str, Sequence[Tiles]], shapes: Iterable[ModelShape]) -> Iterator[Call]:
    """A launch of every kernel; the grid is no part of one."""
    for phase, tried in choices.items():
        for tiles in dict.fromkeys(replace(tiles, per_multiprocessor=1) for tiles in tried):
            for shape in shapes:
                yield partial(compile_kernels, shape, tiles, phase == "decode")


def choices_of(phase: str, present: Tiles) -> Iterator[Tiles]:
    """The present choice of a phase, then what differs from it in one thing or in two that belong together."""
    tile, change = present.tile_of(phase), partial(present.with_tile, phase)
    yield present
    for per_multiprocessor in (1, 3, 4):
        yield replace(present, per_multiprocessor=per_multiprocessor)
    for num_stages in sorted({2, 3, 4} - {tile.num_stages}):
        yield change(replace(tile, num_stages=num_stages))
    for num_warps in sorted({4, 8} - {tile.num_warps}):
        yield change(replace(tile, num_warps=num_warps))
    for num_keys in sorted({32, 128} - {tile.num_keys}):
        yield change(replace(tile, num_keys=num_keys))
        yield change(replace(tile, num_keys=num_keys, num_stages=2))
    if phase == "decode":
        for split in sorted({256, 1024, 2048} - {tile.split}):
            yield change(replace(tile, split=split))
    else:
        yield change(replace(tile, num_lanes=64, num_warps=4))
        yield change(replace(tile, num_lanes=64, num_warps=4, num_stages=2))


def measure_phase(options: PartOptions, name: str, phase: str, tried: Sequence[Tiles], cache: Cache) -> bool:
    """Every choice on every step of a phase, and which is best.

    Returns whether the time sufficed for all, and the present choice, the first, computed what it should.
    """
    rates = rates_of(options)
    spans = (DRY_SPANS if options.is_dry else SPANS)[phase]
    seconds: dict[Tiles, list[float]] = {}
    is_whole = True
    for tiles in tried:
        if options.left() < LEAST_SECONDS:
            print(f"no time is left for {phase} of {name} with {tiles}")
            is_whole = False
            break
        found = measure_choice(options, cache, spans, tiles)
        chosen = describe(phase, tiles)
        if isinstance(found, str):
            options.records.write("tile", model=name, phase=phase, **chosen, failure=found)
            continue
        seconds[tiles] = found
        shares = [each.least_seconds(cache.shape, rates) / taken for each, taken in zip(spans, found, strict=True)]
        labels = [f"{each.num_rows}x{each.num_tokens}@{each.context}" for each in spans]
        options.records.write("tile", model=name, phase=phase, **chosen, shares=dict(zip(labels, shares, strict=True)))
    if tried[0] in seconds:
        scores = {tiles: relative_time(found, seconds[tried[0]]) for tiles, found in seconds.items()}
        best = min(scores, key=scores.__getitem__)
        options.records.write(
            "best tile",
            model=name,
            phase=phase,
            **describe(phase, best),
            is_present=best == tried[0],
            time_by_present=scores[best],
        )
    return is_whole and tried[0] in seconds


def measure_choice(options: PartOptions, cache: Cache, spans: Sequence[Spans], tiles: Tiles) -> list[float] | str:
    """Seconds of each step, or why they cannot be had."""
    seconds = []
    for each in spans:
        try:
            case = Case(cache, each, tiles)
            if not (error := case.error()) < TOLERANCE:
                return f"wrong by {error:.2g}"
            seconds.append(measure(case.calls(), cache.device).seconds)
        except Exception as failure:
            # Too much shared memory, say: what cannot be launched is one choice fewer.
            return f"{type(failure).__name__}: {failure}"[:200]
    return seconds


def describe(phase: str, tiles: Tiles) -> dict[str, int]:
    """A choice in words."""
    return asdict(tiles.tile_of(phase)) | {"programs_per_multiprocessor": tiles.per_multiprocessor}


def relative_time(found: Sequence[float], present: Sequence[float]) -> float:
    """The geometric mean of times by the present ones."""
    return exp(fmean(log(new / old) for new, old in zip(found, present, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
