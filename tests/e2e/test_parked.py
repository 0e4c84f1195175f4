"""A caller whose flow-control window is shut: its writer is parked, and its leaving still frees every block at once."""

import socket
import struct

import h2.config
import h2.connection
import h2.settings

from service.pb.quire.v1 import inference_pb2 as pb
from tests.e2e.conftest import Serve
from tests.e2e.server import Server, sample, wait_until

NUM_STREAMS = 4
MAX_TOKENS = 1000


class ShutWindow:
    """An HTTP/2 connection that grants its streams not one byte."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._connection.local_settings.initial_window_size = 0
        self._connection.initiate_connection()
        self._authority = server.address
        self._send()

    def stream_generate(self, spec: pb.GenerationSpec) -> int:
        """Asks for a stream and never reads it. Returns the stream's id."""
        stream_id = self._connection.get_next_available_stream_id()
        path = "/quire.v1.InferenceService/StreamGenerate"
        headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": self._authority}
        headers |= {"te": "trailers", "content-type": "application/grpc"}
        self._connection.send_headers(stream_id, list(headers.items()))
        message = pb.StreamGenerateRequest(spec=spec).SerializeToString()
        self._connection.send_data(stream_id, struct.pack(">BI", 0, len(message)) + message, end_stream=True)
        self._send()
        return stream_id

    def reset(self, stream_id: int) -> None:
        self._connection.reset_stream(stream_id, error_code=8)
        self._send()

    def close(self) -> None:
        self._socket.close()

    def _send(self) -> None:
        self._socket.sendall(self._connection.data_to_send())


def test_a_parked_caller_that_leaves_frees_its_blocks(serve: Serve) -> None:
    server = serve("--no-prefix-cache", "--reader-stall-seconds", "60")
    free = server.metric("quire_kv_blocks", state="free")
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[9] * 20))
    spec.stop.max_tokens, spec.stop.ignore_eos, spec.output.top_logprobs = MAX_TOKENS, True, 20
    reader = ShutWindow(server)
    streams = [reader.stream_generate(spec) for _ in range(NUM_STREAMS)]

    def are_parked() -> bool:
        text = server.scrape()
        # A token brings some 250 bytes; the transport takes 64 KiB of a stream before a write waits.
        return sample(text, "quire_generation_tokens_total") > NUM_STREAMS * 400

    wait_until(are_parked)
    assert server.metric("quire_kv_blocks", state="held") > 0, "they still run"
    for stream_id in streams:
        reader.reset(stream_id)
    wait_until(lambda: server.metric("quire_kv_blocks", state="free") == free)
    text = server.scrape()
    assert sample(text, "quire_requests_total", outcome="cancelled") == NUM_STREAMS
    assert sample(text, "quire_generation_tokens_total") < NUM_STREAMS * MAX_TOKENS, "ended before their time"
    reader.close()
