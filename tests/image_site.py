"""A web server on the loopback, with good answers and bad ones, for tests of `image_urls.py`."""

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from PIL import Image

from .test_image import encoded, noise

PICTURE = encoded(Image.fromarray(noise()))


class Site(BaseHTTPRequestHandler):
    """Good answers and bad ones, by the path; `requests` has the paths and headers so far."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        name = unquote(self.path.split("?")[0].strip("/")).replace("-", "_").replace(".", "_")
        getattr(self, f"answer_{name}", self.answer_nothing)()

    def send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(content)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def answer_nothing(self) -> None:
        self.send(404)

    def answer_a_png(self) -> None:
        self.send(200, PICTURE)

    answer_café_png = answer_a_png

    def answer_moved(self) -> None:
        self.send(302, Location="/a.png")

    def answer_loop(self) -> None:
        self.send(301, Location="loop?again")

    def answer_private(self) -> None:
        self.send(307, Location="http://10.0.0.1/a.png")

    def answer_named(self) -> None:
        self.send(308, Location=f"http://inside.example:{self.server.server_port}/a.png")

    def answer_file(self) -> None:
        self.send(302, Location="file:///etc/passwd")

    def answer_large(self) -> None:
        self.send(200, b"", Content_Length=str(10**9))

    def answer_endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")

    def answer_cut_off(self) -> None:
        self.send(200, PICTURE[:99], Content_Length=str(len(PICTURE)))

    def answer_slow_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for letter in b"X-Slow: " + b"a" * 40:
            time.sleep(0.1)
            self.wfile.write(bytes([letter]))

    def answer_slow_body(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "40")
        self.end_headers()
        for _ in range(40):
            time.sleep(0.1)
            self.wfile.write(b"a")

    def answer_text(self) -> None:
        self.send(200, b"<html>no picture</html>")

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Site)
    server.requests = []
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
