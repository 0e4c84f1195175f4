"""A load test from nothing: starts a server, loads it with locust, stops it, writes loadtest/out/report.html.

    python -m loadtest.run [--users 16] [--seconds 30] [--profile chat] [--out DIR] [-- flags of quire serve]

Prints the figures; the last line of output is one JSON document. Exits with 1 when a request failed or none ended.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import URLError

from loadtest.machine import OUT, ROOT, cpu_times, describe, noise, others_share
from loadtest.report import Sample, as_text, read_streams, summarise, write_page
from loadtest.server import RunningServer, running_server
from loadtest.workloads import PROFILES

SAMPLE_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one load test. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse(arguments)
    begun = datetime.now(UTC)
    given.out.mkdir(parents=True, exist_ok=True)
    streams_file = given.out / "streams.jsonl"
    with running_server(given.out / "server.log", given.serve) as server:
        print(f"the server at {server.address} was ready after {server.ready_seconds:.1f} s", flush=True)
        print(f"{given.seconds} s with {given.users} users, {given.profile} lengths", flush=True)
        before = cpu_times()
        with sampling(server) as samples:
            run_locust(given, server.address, streams_file)
        others = others_share(before, cpu_times())
    streams = read_streams(streams_file)
    summary = {
        "loadtest": given.profile,
        "date": f"{begun:%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", "-m", "loadtest.run", *arguments]),
        "machine": describe(),
        "users": given.users,
        "seconds": given.seconds,
        "others_share": round(others, 3),
        **summarise(streams),
    }
    write_page(given.out / "report.html", summary, streams, samples)
    print(as_text(summary))
    if warning := noise(others):
        print(warning, file=sys.stderr, flush=True)
    print(f"wrote {given.out / 'report.html'}")
    print(json.dumps(summary))
    return 0 if streams and not summary["failed"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, default=16, help="users at once (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="length of the test (default: %(default)s)")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="chat", help="lengths (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for report and logs (default: loadtest/out)")
    parser.add_argument("serve", nargs="*", help="after --: flags for quire serve")
    given = parser.parse_args(arguments)
    if min(given.users, given.seconds) < 1:
        parser.error("users and seconds must be at least 1")
    return given


def run_locust(given: argparse.Namespace, address: str, streams_file: Path) -> None:
    """Locust in a process of its own: it patches the standard library. Raises CalledProcessError when it breaks."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
    command += ["--users", str(given.users), "--spawn-rate", str(given.users), "--run-time", f"{given.seconds}s"]
    command += ["--host", address, "--lengths", given.profile, "--streams", str(streams_file.resolve())]
    command += ["--only-summary", "--exit-code-on-error", "0", "--loglevel", "WARNING"]
    command += ["--json-file", str(given.out.resolve() / "locust")]  # instead of tables on the console
    subprocess.run(command, check=True, cwd=ROOT, timeout=given.seconds + 120)


@contextmanager
def sampling(server: RunningServer) -> Iterator[list[Sample]]:
    """Reads the server's metrics twice a second while the block runs, from a thread of its own."""
    samples: list[Sample] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            try:
                samples.append(Sample(time.monotonic(), server.metrics()))
            except (URLError, TimeoutError) as error:
                print(f"no metrics: {error}", file=sys.stderr)

    thread = threading.Thread(target=sample, name="metrics")
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
