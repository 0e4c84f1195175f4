"""A real server on a card: how soon it is ready, what arrives through gRPC of the engine's rate, and W6.

    python -m loadtest.gpu.server --records FILE --model 8B --models DIR

W6 is an open loop of a chat's lengths at rising rates, each for some seconds, until the 99th percentiles are past what
MLPerf's interactive scenario allows an 8B model.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from statistics import median

from loadtest.gpu.engine import REPEATS, options_of
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import shape_of
from loadtest.gpu.summary import THROUGH_GRPC
from loadtest.gpu.works import CARD, DRY, closed_works
from loadtest.open_loop import Bounds, figures_of, offer
from loadtest.peers.quire import as_flags, figures
from loadtest.server import ServerFailed, running_server
from loadtest.targets import GrpcTarget
from loadtest.timing import StreamTimes
from loadtest.workloads import CHAT, ProfileWorks, Work

BOUNDS = Bounds(ttft_ms=500.0, tpot_ms=30.0)
FIRST_RATE = 4.0
RATE_FACTOR = 1.5
RATE_SECONDS = 6.0
CHAT_CONTEXT = 8192
MAX_RATES = 12
DRY_RATE_SECONDS, DRY_MAX_RATES, DRY_CONTEXT = 0.5, 1, 64
MIN_BATCH = 64
"""Of the throughput that is compared: fewer streams are bound by latency."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code: 1 where the server failed, or the open loop found no bound."""
    options = parse_part("server", arguments)
    log = options.models.parent / f"gpu-server-{options.model}.log"
    try:
        with running_server(log, as_flags(options_of(options))) as server:
            options.records.write("ready", model=options.model, seconds=server.ready_seconds)
            is_whole = asyncio.run(measure(options, server.address))
    except ServerFailed as failure:
        print(log.read_text()[-4_000:])
        print(failure)
        return 1
    return 0 if is_whole else 1


async def measure(options: PartOptions, address: str) -> bool:
    """Everything that is asked of one server. Returns whether the open loop came to its end."""
    target = GrpcTarget(address)
    try:
        await measure_throughput(options, target)
        return await measure_open_loop(options, target)
    finally:
        await target.close()


async def measure_throughput(options: PartOptions, target: GrpcTarget) -> None:
    """The engine's larger batches; the summary compares them with what the engine's part found."""
    sizes, least = (DRY, 0) if options.is_dry else (CARD, MIN_BATCH)
    vocab_size = vocab_size_of(options)
    for (workload, batch), works in closed_works(sizes, vocab_size).items():
        if batch < least:
            continue
        repeats = 1 if options.is_dry else REPEATS
        runs = [figures(await target.run(works, use_cache=False)) for _ in range(repeats)]
        found = {key: median([run[key] for run in runs]) for key in runs[0]}
        options.records.write(
            "workload", engine=THROUGH_GRPC, model=options.model, workload=workload, batch=batch, **found
        )


async def measure_open_loop(options: PartOptions, target: GrpcTarget) -> bool:
    """W6: rates one after another, until bounds break; the last record names the highest one for which they held.

    Returns whether it came to that, which a dry run need not: it does not where the time is short.
    """

    async def answer(work: Work, due: float) -> StreamTimes:
        return (await target.answer(work, use_cache=False, sent_at=due)).times

    seconds = DRY_RATE_SECONDS if options.is_dry else RATE_SECONDS
    context = DRY_CONTEXT if options.is_dry else CHAT_CONTEXT
    highest, rate, is_bound = 0.0, FIRST_RATE, False
    for number in range(DRY_MAX_RATES if options.is_dry else MAX_RATES):
        if options.left() < 3 * seconds:
            print(f"no time is left for a rate of {rate:g}")
            break
        works = ProfileWorks(CHAT, number, context, vocab_size_of(options))
        streams = await offer(answer, iter(works.next, None), rate, seconds, seed=number)
        found = figures_of(streams, seconds, BOUNDS)
        is_held = BOUNDS.holds(found)
        options.records.write("W6", model=options.model, rate=rate, **found, is_held=is_held)
        if not is_held:
            is_bound = True
            break
        highest, rate = rate, rate * RATE_FACTOR
    options.records.write("W6 highest rate", model=options.model, rate=highest, is_bound=is_bound)
    return is_bound or options.is_dry


def vocab_size_of(options: PartOptions) -> int:
    """Of the model that is served."""
    return shape_of(options.model, options.is_dry).vocab_size


if __name__ == "__main__":
    sys.exit(main())
