"""Builds the gRPC server: its options, its services, its port. It knows no life cycle (service/server.py)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from service.errors import StartupError
from service.pb.quire.v1 import inference_pb2_grpc
from service.rpc.convert import MAX_REQUEST_BYTES
from service.rpc.health import READINESS, Health
from service.rpc.inference import InferenceServicer
from service.rpc.interceptors import StatusInterceptor

MAX_RESPONSE_BYTES = 64 * 2**20
MAX_CONNECTION_AGE_SECONDS = 3600
"""Connections are renewed now and then (gRPC adds its own jitter), so that callers spread over new replicas."""


def build(
    servicer: InferenceServicer,
    health: Health,
    *,
    reflection: bool,
    connection_grace_seconds: float,
    on_handled: Callable[[str, str], None],
) -> grpc.aio.Server:
    """A server without a port. Needs a running event loop. Connections that are too old end within the grace."""
    options = [
        ("grpc.so_reuseport", 0),  # otherwise a second server would silently share the port
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_SECONDS * 1000),
        ("grpc.max_connection_age_grace_ms", int(connection_grace_seconds * 1000)),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    ]
    server = grpc.aio.server(interceptors=[StatusInterceptor(on_handled)], options=options)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if reflection:
        _add_reflection(server)
    return server


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Opens the port; 0 takes a free one, which is returned. Raises StartupError when it is taken or not ours."""
    name = host.strip("[]")
    _try_port(name, port)
    try:
        return server.add_insecure_port(address_of(name, port))
    except RuntimeError:
        raise StartupError(f"cannot listen on {address_of(name, port)}") from None


def address_of(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _try_port(host: str, port: int) -> None:
    """Binds for a moment, because gRPC does not say what is wrong with an address, and logs lines of its own."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        failures = [failure for entry in found if (failure := _try_address(entry[0], entry[4])) is not None]
    except OSError as error:
        found, failures = [], [error]
    # One of several addresses may not exist here (localhost without IPv6); none may be in use.
    in_use = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    if in_use or len(failures) >= max(len(found), 1):
        reason = (in_use or failures)[0].strerror
        raise StartupError(f"cannot listen on {address_of(host, port)}: {reason} (--port 0 takes a free one)")


def _try_address(family: socket.AddressFamily, address: Any) -> OSError | None:
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            return error
    return None


def _add_reflection(server: grpc.aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    names = (READINESS, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
