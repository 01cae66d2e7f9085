"""An S3 server on this machine behind a proxy that fails as networks and servers do."""

import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem

KINDS = (
    "500",
    "503",
    "reset before",  # the server never sees the request
    "reset after",  # it has done what was asked; the answer is lost
    "cut answer",
    "cut upload",  # half of what is sent arrives
    "slow",
    "away",  # nobody listens for a while
)
SLOW = 0.3  # seconds
AWAY = 0.4


@dataclass
class Faults:
    """Which requests fail, and how; `choose(method, path)` names a kind or None."""

    choose: Callable[[str, str], str | None] = lambda method, path: None
    counts: Counter = field(default_factory=Counter)
    gone_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str) -> str | None:
        with self.lock:
            if time.monotonic() < self.gone_until:
                return "reset before"
            kind = self.choose(method, path)
            if kind is not None:
                self.counts[kind] += 1
            if kind == "away":
                self.gone_until = time.monotonic() + AWAY
            return kind


def _handler(port: int, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def relay(self) -> None:
            kind = faults.next(self.command, self.path)
            if kind in ("reset before", "away"):
                return self.reset()
            length = int(self.headers.get("Content-Length") or 0)
            if kind == "cut upload" and length:
                self.rfile.read(length // 2)
                return self.reset()
            body = self.rfile.read(length)
            if kind in ("500", "503"):
                code = "InternalError" if kind == "500" else "ServiceUnavailable"
                text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
                return self.answer(int(kind), {"Content-Type": "application/xml"}, text)
            if kind == "slow":
                time.sleep(SLOW)
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            server.request(self.command, self.path, body, dict(self.headers))
            found = server.getresponse()
            data = found.read()
            server.close()
            if kind == "reset after":
                return self.reset()
            cut = kind == "cut answer" and len(data) > 1
            self.answer(found.status, dict(found.getheaders()), data, cut)

        def answer(self, status: int, headers: dict, data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", len(data))
            size = length if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.reset()

        def reset(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = relay

    return Handler


@contextlib.contextmanager
def flaky_server(faults: Faults) -> Iterator[str]:
    """The address of the proxy."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(port, faults))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


@contextlib.contextmanager
def bucket(address: str, name: str) -> Iterator[None]:
    """Let `s3://name` stand for a bucket of the server at that address.

    It is not empty where a server of this process had it before: moto keeps them in one place.
    """
    S3FileSystem.clear_instance_cache()  # those of other tests speak to servers that are gone
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "anything")
        fsspec.url_to_fs(f"s3://{name}")[0].makedirs(name, exist_ok=True)
        yield
    S3FileSystem.clear_instance_cache()
