"""A server that says what it is told to, byte by byte: answers in turn, on a Unix socket."""

import json
import socket
import threading
from contextlib import contextmanager, suppress
from inspect import signature

HANG_UP = object()  # a scripted answer: close the connection without a byte


class Script:
    """A server that gives its answers in turn and keeps what it was asked.

    An answer is bytes, HANG_UP, a function of the request that makes one, or a function of connection and request
    that sends what it likes, and returns HANG_UP to be the last. With `head_only` the bodies of
    requests are left unread.
    """

    def __init__(self, path, answers):
        self.requests = []
        self.head_only = False
        self.connections = 0
        self._answers = iter(answers)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    @contextmanager
    def running(self):
        self._thread.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._thread.join(10)

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection, connection.makefile("rb") as stream, suppress(ConnectionError):
                while (request := _read_request(stream, self.head_only)) is not None:
                    self.requests.append(request)
                    answer = next(self._answers, HANG_UP)
                    if callable(answer) and len(signature(answer).parameters) == 2:
                        if answer(connection, request) is HANG_UP:
                            break
                        continue
                    answer = answer(request) if callable(answer) else answer
                    if answer is HANG_UP:
                        break
                    connection.sendall(answer)
                    if b"Connection: close" in answer or b"Keep-Alive: gone" in answer:
                        break


def _read_request(stream, head_only):
    try:
        line = stream.readline().decode()
        if not line:
            return None
        headers = {}
        while (header := stream.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = b"" if head_only else stream.read(int(headers.get("content-length", 0)))
    except ConnectionError:
        return None
    method, path, _ = line.split()
    return method, path, headers, body


def reply(body=b"", status=200, **headers):
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def infer_reply(header, raw=b""):
    encoded = json.dumps({"model_name": "m", "model_version": "1", **header}).encode()
    return reply(encoded + raw, Inference_Header_Content_Length=len(encoded))


def echo(request):
    """Answer an inference with its own inputs, renamed x -> x_out, in binary."""
    _, _, headers, body = request
    length = int(headers["inference-header-content-length"])
    asked = json.loads(body[:length])
    outputs = [{**tensor, "name": f"{tensor['name']}_out"} for tensor in asked["inputs"]]
    return infer_reply({"outputs": outputs, "id": asked.get("id", "")}, body[length:])
