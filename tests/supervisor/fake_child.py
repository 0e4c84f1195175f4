"""A child process that behaves as the environment says: FAKE_ENGINE or FAKE_FRONT_END holds one of the names below."""

import os
import signal
import sys
import time
from pathlib import Path


def beat(fd: int, byte: bytes) -> None:
    try:
        os.write(fd, byte)
    except BrokenPipeError:
        sys.exit(0)


def main(variable: str) -> None:
    fd = int(sys.argv[sys.argv.index("--heartbeat-fd") + 1])
    sys.stdin.read()
    behaviour = os.environ[variable]
    record = Path(os.environ["FAKE_RECORD"])
    with record.open("a") as file:
        file.write(f"{variable} {os.getpid()}\n")
    num_terms = 0

    def on_term(*_: object) -> None:
        nonlocal num_terms
        num_terms += 1

    signal.signal(signal.SIGTERM, signal.SIG_DFL if behaviour == "loading" else on_term)
    if behaviour == "mistake":
        sys.exit(2)
    if behaviour == "crash":
        sys.exit(1)
    if behaviour == "loading":
        time.sleep(60)
    beat(fd, b"R")
    if behaviour == "silent":
        time.sleep(60)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.02)
        beat(fd, b".")
        if behaviour == "serve" and num_terms >= 1:
            sys.exit(0)
        if behaviour == "slow drain" and num_terms >= 2:
            sys.exit(0)
        if behaviour == "die later" and record.read_text().count(variable) < 3:
            sys.exit(1)
