"""The load: users that stream generations over gRPC, one after the other, and what each stream was like.

    locust -f loadtest/locustfile.py --headless -u 16 -r 16 -t 30s --host 127.0.0.1:50051 --lengths chat

A closed loop: a user sends its next request when its last one has ended. Locust's statistics get three events: `ttft`
once per stream that had a token, `itl` for every gap between two tokens, `e2e` once per stream, failed ones under their
reason; its totals add them all up and mean nothing. With --streams FILE, every stream is also written as one JSON line,
from which loadtest.report makes its page; streams that the end of the test cut off are left out of both.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locust import User, events, task  # first: it patches the standard library for gevent
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

# isort: split
import gevent
import grpc.experimental.gevent as grpc_gevent

from loadtest.timing import StreamTimes
from loadtest.workloads import PROFILES, ProfileWorks, Work
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import Delta

grpc_gevent.init_gevent()  # after the patching, before the first channel

REQUEST_SECONDS = 120.0


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Our own flags."""
    parser.add_argument("--lengths", choices=sorted(PROFILES), default="chat", help="distribution of lengths")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and lengths")
    parser.add_argument("--streams", default="", help="file that gets one JSON line per stream")


@events.init.add_listener
def open_record(environment: Environment, **_: Any) -> None:
    """Gives the run a record; users find it in the environment."""
    path = environment.parsed_options.streams if environment.parsed_options else ""
    environment.quire_record = Record(Path(path) if path else None)  # type: ignore[attr-defined]


@events.quitting.add_listener
def close_record(environment: Environment, **_: Any) -> None:
    """Writes what is left."""
    environment.quire_record.close()  # type: ignore[attr-defined]


class Record:
    """One JSON line per finished stream, in the order of their ends; without a file, nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w") if path else None
        self.num_users = 0

    def write(self, stream: StreamTimes) -> None:
        if self._file:
            self._file.write(json.dumps(asdict(stream)) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


class StreamingUser(User):
    """Streams one generation after the other, over a channel of its own."""

    def on_start(self) -> None:
        """Connects, and asks what the model can hold."""
        self.record: Record = self.environment.quire_record
        self.client = BlockingClient(str(self.host))
        model = self.client.get_model(timeout_seconds=10)
        options = self.environment.parsed_options
        assert options is not None, "locust parses its command line"
        self.record.num_users += 1
        seed = 1_000_003 * options.seed + self.record.num_users
        self.works = ProfileWorks(PROFILES[options.lengths], seed, model.context_length, model.vocab_size)

    def on_stop(self) -> None:
        """Hangs up."""
        self.client.close()

    @task
    def generate(self) -> None:
        """One stream, from request to end."""
        work = self.works.next()
        times = StreamTimes(time.monotonic(), len(work.prompt))
        error: QuireClientError | None = None
        try:
            self._read(work, times)
        except QuireClientError as failure:
            error = failure
            times.reason = failure.reason or failure.code
            gevent.sleep(min(failure.retry_after_seconds or 0.1, 1.0))
        self._report(times, error)

    def _read(self, work: Work, times: StreamTimes) -> None:
        stream = self.client.stream(
            work.prompt, max_tokens=work.num_new, ignore_eos=True, timeout_seconds=REQUEST_SECONDS
        )
        try:
            with stream:
                for event in stream:
                    if isinstance(event, Delta):
                        times.arrived(time.monotonic(), event.num_tokens)
        finally:
            times.ended_at = time.monotonic()

    def _report(self, times: StreamTimes, error: QuireClientError | None) -> None:
        self.record.write(times)
        if times.arrivals:
            self._fire("ttft", times.ttft_seconds, 0, None)
            for gap in times.gaps():
                self._fire("itl", gap, 0, None)
        self._fire("e2e", times.e2e_seconds, times.num_tokens, error)

    def _fire(self, name: str, seconds: float, size: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=1_000 * seconds,
            response_length=size,
            exception=error,
            context={},
        )
