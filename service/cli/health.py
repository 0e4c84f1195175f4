"""Ask a running server for its health: prints the status, exits with 0 for SERVING and 1 otherwise."""

from __future__ import annotations

import argparse

from service.cli.connection import add_connection, connected
from service.client.channel import SERVICE
from service.client.types import HealthStatus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--service",
        metavar="NAME",
        default=SERVICE,
        help='"" for the process, quire.live for liveness; default: readiness',
    )
    add_connection(parser)
    parser.set_defaults(timeout=5.0)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    with connected(arguments.address) as client:
        status = client.health(arguments.service, timeout_seconds=arguments.timeout)
    print(status)
    return 0 if status is HealthStatus.SERVING else 1
