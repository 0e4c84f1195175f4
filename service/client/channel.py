"""Where a server is and how to stay connected to it: addresses, and the channel options and service config we ship.

Both clients use it; so may callers with a gRPC client of their own (`SERVICE_CONFIG` is plain JSON).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SERVICE = "quire.v1.InferenceService"

SERVICE_CONFIG: Mapping[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # Replicas that are loading or draining say NOT_SERVING and are passed over.
    "healthCheckConfig": {"serviceName": SERVICE},
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            # gRPC retries only until the first message, which Quire sends with the first token: no text is ever
            # repeated. Both codes mean that nothing was generated; the server says how long to wait
            # (grpc-retry-pushback-ms), which gRPC honours in place of the backoff.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    # A failure costs one token, a success gives back half of one, and below half of the tokens nothing is retried:
    # when more than a third of all calls fail, retries would only add to the load.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5},
}

RETRY_BUFFER_BYTES = 4 * 2**20
"""Requests up to this size can be sent again; gRPC's own limit, 256 KiB, is smaller than a long prompt of token ids."""

MAX_ANSWER_BYTES = 64 * 2**20
"""A whole generation with log-probabilities is larger than gRPC's default of 4 MiB."""

BASE_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
]

RESOLVERS = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:")


def channel_options() -> list[tuple[str, Any]]:
    """Options of a channel for generations: retries, balancing, health checks."""
    return [
        *BASE_OPTIONS,
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
    ]


def probe_options() -> list[tuple[str, Any]]:
    """Options of a channel that asks a server how it is: it must reach one that says NOT_SERVING, at once."""
    return [*BASE_OPTIONS, ("grpc.enable_retries", 0)]


def target(address: str) -> str:
    """The gRPC target of an address: host:port, [v6]:port, unix:path, or a resolver's own form (dns:///host:port).

    Raises ValueError with one clear line. gRPC itself takes a missing port for 443 and a URL for a host name.
    """
    if address.startswith(RESOLVERS):
        if not address.partition(":")[2].strip("/"):
            raise ValueError(f"address {address!r}: nothing after the resolver's name")
        return address
    if "://" in address or "/" in address:
        raise ValueError(f"address {address!r}: write host:port, without a scheme or path")
    host, separator, port = address.rpartition(":")
    if not separator or not host:
        raise ValueError(f"address {address!r}: write host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"address {address!r}: write an IPv6 address as [address]:port")
    if any(character.isspace() for character in host):
        raise ValueError(f"address {address!r}: a host name has no blanks")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) <= 65_535):
        raise ValueError(f"address {address!r}: the port must be a number from 1 to 65535")
    return address
