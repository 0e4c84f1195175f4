"""Many callers at once: nothing lost, nothing changed by the neighbours, everything given back, everything counted."""

import asyncio
import shutil
import subprocess
from typing import Any

import pytest

from service.client.aio import Client
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import Delta, Finished, Started
from tests.e2e.conftest import Serve
from tests.e2e.server import Server, sample, wait_until

NUM_STREAMS = 64


def request(index: int) -> dict[str, Any]:
    """One of many different requests: greedy and seeded, short and long prompts, with and without penalties."""
    prompt = [4 + (index * 37 + position * 11) % 4000 for position in range(1 + (index * 29) % 300)]
    options: dict[str, Any] = {"max_tokens": 24 + index % 16, "ignore_eos": True, "return_token_ids": True}
    if index % 2:
        options |= {"temperature": 0.9, "top_p": 0.95, "top_k": 50 if index % 3 else 0, "seed": index}
    else:
        options |= {"temperature": 0.0, "repetition_penalty": 1.2 if index % 4 else 1.0}
    return {"prompt": prompt, **options}


async def stream(client: Client, index: int, **more: Any) -> tuple[int, ...]:
    """The tokens of one request; the client itself checks that sequence numbers have no gap."""
    tokens: list[int] = []
    told = 0
    async with client.stream(**{**request(index), **more}) as events:
        async for event in events:
            match event:
                case Started():
                    assert not tokens
                case Delta():
                    tokens += event.token_ids
                    told += event.num_tokens
                case Finished():
                    assert event.usage.completion_tokens == len(tokens) == told
    return tuple(tokens)


async def alone_and_together(address: str, indices: list[int]) -> None:
    async with Client(address) as client:
        alone = [await stream(client, index, bypass_cache=True) for index in indices]
        together = await asyncio.gather(*(stream(client, index) for index in range(NUM_STREAMS)))
        assert [together[index] for index in indices] == alone
        warm = await asyncio.gather(*(stream(client, index) for index in indices))
        assert warm == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_same_answer_alone_among_63_others_and_from_a_warm_cache(serve: Serve, dtype: str) -> None:
    server = serve("--dtype", dtype)
    await alone_and_together(server.address, list(range(0, NUM_STREAMS, 5)))


async def test_a_pool_of_twice_one_request_serves_32_with_equal_answers(serve: Serve, server: Server) -> None:
    # 300 + 39 tokens at most: 22 blocks of 16.
    small = serve("--num-blocks", "44")
    async with Client(server.address) as client:
        expected = await asyncio.gather(*(stream(client, index) for index in range(32)))
    async with Client(small.address) as client:
        assert await asyncio.gather(*(stream(client, index) for index in range(32))) == expected
    wait_until(lambda: small.metric("quire_kv_blocks", state="held") == 0)


async def test_counters_equal_what_the_callers_saw(serve: Serve) -> None:
    server = serve()
    async with Client(server.address) as client:
        answers = await asyncio.gather(*(stream(client, index) for index in range(20)))
        with pytest.raises(QuireClientError):
            await client.generate("x", max_tokens=10_000_000)
        async with client.stream([5] * 10, max_tokens=900, ignore_eos=True) as events:
            await anext(aiter(events))
    wait_until(lambda: server.metric("quire_requests_total", outcome="cancelled") == 1)
    text = server.scrape()
    assert sample(text, "quire_requests_accepted_total") == 21
    assert sample(text, "quire_requests_total", outcome="ok") == 20
    assert sample(text, "quire_rejections_total", reason="CONTEXT_LENGTH_EXCEEDED") == 1
    assert sample(text, "quire_time_to_first_token_seconds_count") == 21
    generated = sum(map(len, answers))
    assert generated < sample(text, "quire_generation_tokens_total") <= generated + 900
    assert sample(text, "quire_request_generation_tokens_sum") == generated
    prompts = sum(len(request(index)["prompt"]) for index in range(20)) + 10
    assert sample(text, "quire_prompt_tokens_total") == prompts


async def test_accepted_equals_ended_plus_open_at_every_scrape(serve: Serve) -> None:
    server = serve()
    is_done = asyncio.Event()

    async def scrape() -> int:
        num_scrapes = 0
        while not is_done.is_set():
            text = await asyncio.to_thread(server.scrape)
            open_now = sample(text, "quire_num_requests_running") + sample(text, "quire_num_requests_waiting")
            ended = sample(text, "quire_requests_total")
            assert sample(text, "quire_requests_accepted_total") == ended + open_now
            num_scrapes += 1
        return num_scrapes

    async with Client(server.address) as client:
        scraper = asyncio.create_task(scrape())
        for _ in range(2):
            await asyncio.gather(*(stream(client, index) for index in range(40)))
        is_done.set()
        assert await scraper > 3


def test_metrics_are_clean(server: Server) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    with BlockingClient(server.address) as client:
        client.generate("x", max_tokens=4)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=server.scrape(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_cancelled_callers_leave_nothing_behind(serve: Serve) -> None:
    server = serve("--max-num-seqs", "8", "--no-prefix-cache")
    free = server.metric("quire_kv_blocks", state="free")

    async def leave_after(client: Client, index: int, num_events: int) -> None:
        async with client.stream([7] * (50 + index), max_tokens=800, ignore_eos=True) as events:
            for _ in range(num_events):
                await anext(aiter(events))

    async with Client(server.address) as client:
        # Beyond the eight that run, the others wait: a timeout leaves those in the queue.
        leaving = [asyncio.create_task(leave_after(client, index, 1 + index % 5)) for index in range(32)]
        await asyncio.sleep(0.3)
        for task in leaving[::2]:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        wait_until(lambda: server.metric("quire_kv_blocks", state="free") == free)
        assert (await client.get_load()).running_requests == 0
    text = server.scrape()
    assert sample(text, "quire_requests_accepted_total") == sample(text, "quire_requests_total")


async def test_a_deadline_frees_everything(serve: Serve) -> None:
    server = serve("--no-prefix-cache", "--max-num-seqs", "2")
    free = server.metric("quire_kv_blocks", state="free")
    async with Client(server.address) as client:
        results = await asyncio.gather(
            *(
                client.generate([9] * 100, max_tokens=900, ignore_eos=True, timeout_seconds=0.1 + 0.02 * index)
                for index in range(12)
            ),
            return_exceptions=True,
        )
    codes = {result.code for result in results if isinstance(result, QuireClientError)}
    assert codes <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert "DEADLINE_EXCEEDED" in codes
    wait_until(lambda: server.metric("quire_kv_blocks", state="free") == free)
