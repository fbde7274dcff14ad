"""Stands before an object store and hurts what passes: a rule says, request by request, what becomes of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, urlsplit

from tests.storage.relay import Relay, endpoint_of, relayed
from tests.storage.servers import Server

PASS = "pass"
LOSE_REQUEST = "lose the request"  # the store never hears of it
LOSE_REPLY = "lose the reply"  # the store does it
CUT_REPLY = "cut the reply"  # in the middle of its body
STRIP_CONDITION = "strip the condition"  # as a store does that does not know of it
# A number, such as "503", is answered in the store's place.
CONDITIONS = ("if-none-match", "x-goog-if-generation-match")


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # of the object, in the bucket
    query: Mapping[str, str]
    conditional: bool

    @property
    def kind(self) -> str:
        """What it is, in the words of S3's reference, also where it is sent to Azure."""
        return self._azure_kind() or self._s3_kind()

    def _azure_kind(self) -> str:
        kinds = {
            ("PUT", "block"): "UploadPart",
            ("PUT", "blocklist"): "CompleteMultipartUpload",
            ("GET", "list"): "ListObjectsV2",
            ("POST", "batch"): "DeleteObjects",
        }
        return kinds.get((self.method, self.query.get("comp", "")), "")

    def _s3_kind(self) -> str:
        match self.method, "uploads" in self.query, "uploadId" in self.query:
            case "POST", True, _:
                return "CreateMultipartUpload"
            case "PUT", _, True:
                return "UploadPart"
            case "POST", _, True:
                return "CompleteMultipartUpload"
            case "DELETE", _, True:
                return "AbortMultipartUpload"
            case "GET", True, _:
                return "ListMultipartUploads"
            case "GET", _, _ if "list-type" in self.query:
                return "ListObjectsV2"
            case "POST", _, _:
                return "DeleteObjects"
            case method, _, _:
                return {"GET": "GetObject", "PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}[method]


Rule = Callable[[Request], str]


@dataclass
class Proxy:
    server: Server
    rule: Rule = lambda _: PASS
    requests: list[Request] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.requests)

    def always(self, action: str) -> None:
        self.rule = lambda _: action

    def once(self, kind: str, action: str, times: int = 1) -> None:
        """Do this to the next requests of this kind."""
        left = [times]
        lock = threading.Lock()

        def rule(request: Request) -> str:
            with lock:
                if request.kind != kind or not left[0]:
                    return PASS
                left[0] -= 1
                return action

        self.rule = rule


@contextmanager
def proxy_of(upstream: Server) -> Iterator[Proxy]:
    with relayed(upstream, _Handler) as server:
        server.proxy = Proxy(replace(upstream, endpoint=endpoint_of(server)))  # type: ignore[attr-defined]
        yield server.proxy  # type: ignore[attr-defined]


class _Handler(Relay):
    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = urlsplit(self.path)
        conditional = any(name in self.headers for name in CONDITIONS)
        path = parts.path.lstrip("/").partition("/")[2]
        request = Request(self.command, path, dict(parse_qsl(parts.query, True)), conditional)
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        proxy.requests.append(request)
        action = proxy.rule(request)
        if action == LOSE_REQUEST:
            return self._hang_up()
        if action.isdigit():
            return self._answer(int(action), {}, b"<Error><Code>Trouble</Code><Message>made</Message></Error>")
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if action == STRIP_CONDITION:
            headers = {name: value for name, value in headers.items() if name.lower() not in CONDITIONS}
        status, found, data = self.ask(self.command, self.path, body, headers)
        if action == LOSE_REPLY:
            return self._hang_up()
        return self._answer(status, found, data, cut=action == CUT_REPLY)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - the library's names

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        said = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", said if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
