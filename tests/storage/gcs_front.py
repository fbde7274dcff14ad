"""A front of GCS's XML API before an S3 server: the two differ in names, which are translated here request by request.

It is no GCS: it shows what ftrain asks by `gs://` and how it takes the answers, where these are as GCS's reference has
them. No server that speaks this API is to be had as a package. Sources: Cloud Storage, XML API reference (headers,
multipart uploads, DELETE Object).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from tests.storage.relay import Relay, endpoint_of, relayed
from tests.storage.servers import GcsServer, S3Server, gcs_account

SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
DROPPED = ("connection", "host", "authorization")
OWN = ("connection", "content-length", "transfer-encoding")


@contextmanager
def gcs_front(upstream: S3Server) -> Iterator[GcsServer]:
    """Before a server that does not prove signatures."""
    with gcs_account() as account, relayed(upstream, _Handler) as server:
        yield GcsServer(endpoint_of(server), account)


class _Handler(Relay):
    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = urlsplit(self.path)
        path = parts.path.replace("%2F", "/") + (f"?{parts.query}" if parts.query else "")
        if self.command == "DELETE" and not parts.query and self.ask("HEAD", path, b"", self._as_s3())[0] == 404:
            return self._answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")  # S3 says that all is well
        return self._answer(*self.ask(self.command, path, body, self._as_s3()))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - the library's names

    def _as_s3(self) -> dict[str, str]:
        return dict(self._translated())

    def _translated(self) -> Iterator[tuple[str, str]]:
        yield "authorization", SIGNED
        for name, value in self.headers.items():
            if name.lower() == "x-goog-if-generation-match":
                assert value == "0"  # "if there is none", the only one that ftrain asks for
                yield "if-none-match", "*"
            elif name.lower() not in DROPPED:
                yield name.lower().replace("x-goog-meta-", "x-amz-meta-"), value

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        said = str(len(data))
        for name, value in headers.items():
            if name.lower() == "content-length" and self.command == "HEAD":
                said = value
            elif name.lower() not in OWN:
                self.send_header(name.lower().replace("x-amz-meta-", "x-goog-meta-"), value)
        self.send_header("x-goog-generation", "1")
        self.send_header("Content-Length", said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
