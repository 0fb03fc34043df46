"""A real HTTP server on this machine that answers as it is told, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator


class Hub:
    """Knows one token.

    Attributes:
        asked: path and Authorization of each request.
        sent_bytes: of bodies.
        answer: what it says to a request; the default one knows the token.
    """

    def __init__(self, token: str, scheme: str, port: int) -> None:
        self.token, self.port = token, port
        self.url = f"{scheme}://127.0.0.1:{port}/me"
        self.asked: list[tuple[str, str | None]] = []
        self.sent_bytes = 0
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self.know

    def know(self, request: BaseHTTPRequestHandler) -> None:
        known = request.headers.get("Authorization") == f"Bearer {self.token}"
        self.say(request, 200 if known else 401, {"user": "ada"} if known else {"error": "who?"})

    def say(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: Any = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        request.end_headers()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.stream(request, [data])

    def stream(self, request: BaseHTTPRequestHandler, parts: Iterable[bytes]) -> None:
        with suppress(OSError):  # who asked may have heard enough
            for part in parts:
                self.sent_bytes += request.wfile.write(part)
                request.wfile.flush()


@contextmanager
def serving(token: str = "", tls: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """A server that is there for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append((self.path, self.headers.get("Authorization")))
            hub.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        hub = Hub(token, "http" if tls is None else "https", server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
