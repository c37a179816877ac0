"""A stand-in for the daemon: answers given pages on a Unix socket, and remembers what it was asked."""

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):  # http.server finds it by this name
        self._answer()

    do_POST = do_GET  # noqa: N815 - likewise

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.asked.append((self.command, self.path, body))
        page = server.pages.get(f"{self.command} {self.path}", (404, {"error": f"no page {self.path}"}))
        status, document = page if isinstance(page, tuple) else (200, page)
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self):
        return "unix"  # a Unix peer has no address to look up

    def log_message(self, *_):
        pass


class FakeDaemon(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """`with FakeDaemon(socket, {"GET /path": document or (status, document)}) as daemon`."""

    daemon_threads = True

    def __init__(self, path, pages):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.pages, self.asked = pages, []
        super().__init__(str(path), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()
