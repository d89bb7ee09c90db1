"""A small web server that misbehaves as it is told, and counts."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self

Rule = Callable[[int, str], str]  # number of the GET from 1, and name → what is done


def always_well(number: int, name: str) -> str:
    return "well"


class Server:
    """Files by name, over HTTP on this machine.

    What a rule may answer: well; drop (half of the body, then the end); silent (nothing at all); stuck (half
    of the body, then nothing); late (half of the body, and other bytes when `wake` is set); slow (in ten
    parts, a tenth of a second apart); wrong (other bytes of the same length); or a status, as 500.
    """

    def __init__(self, files: dict[str, bytes], rule: Rule = always_well) -> None:
        self.files, self.rule = files, rule
        self.asked: Counter[str] = Counter()  # GETs by name
        self.total = 0
        self.wake = threading.Event()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/shards"

    def count(self, name: str) -> int:
        with self.lock:
            self.asked[name] += 1
            self.total += 1
            return self.total

    def close(self) -> None:
        self.over.set()
        self.wake.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.over.is_set():
            self.close()


class _Handler(BaseHTTPRequestHandler):
    site: ClassVar[Server]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._begin(self._name())

    def do_PUT(self) -> None:
        assert self.headers["Transfer-Encoding"] == "chunked"
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        if "/" in self._name():
            self._refuse(404)
            return
        self.site.files[self._name()] = body
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        name = self._name()
        done = self.site.rule(self.site.count(name), name)
        if done == "silent":
            self.site.over.wait()
            self.close_connection = True
        elif done.isdigit():
            self._refuse(int(done))
        elif (body := self._begin(name)) is not None:
            self._send(body, done)

    def _name(self) -> str:
        return self.path.partition("?")[0].removeprefix("/shards/")

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _begin(self, name: str) -> bytes | None:
        body = self.site.files.get(name)
        if body is None:
            self._refuse(404)
            return None
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            first, last = int(part[1]), int(part[2] or len(body) - 1)
            total, body = len(body), body[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def _send(self, body: bytes, how: str) -> None:
        half = len(body) // 2
        if how == "wrong":
            self.wfile.write(bytes(255 - byte for byte in body))
        elif how == "slow":
            tenth = -(-len(body) // 10)
            for start in range(0, len(body), tenth):
                self.wfile.write(body[start : start + tenth])
                self.site.over.wait(0.1)
        elif how == "late":
            self.wfile.write(body[:half])
            self.site.wake.wait()
            self.wfile.write(bytes(len(body) - half))
        elif how in ("drop", "stuck"):
            self.wfile.write(body[:half])
            if how == "stuck":
                self.site.over.wait()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            assert how == "well", how
            self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has gone; some tests want that
            self.close_connection = True
