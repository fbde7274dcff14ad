"""A server that hands what it is asked to another one."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.storage.servers import Server


@contextmanager
def relayed(upstream: Server, handler: type[Relay]) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port, in threads of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.upstream = urlsplit(upstream.endpoint).netloc  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def endpoint_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


class Relay(BaseHTTPRequestHandler):
    """What becomes of a request is a subclass's to say; `ask` is how it asks the other server."""

    protocol_version = "HTTP/1.1"

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass
