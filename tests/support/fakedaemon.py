"""A stand-in for the daemon: answers given pages on a Unix socket, and remembers what it was asked."""

import json
import mmap
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np


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
    handler = _Handler

    def __init__(self, path, pages):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.pages, self.asked = pages, []
        super().__init__(str(path), self.handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _InferHandler(_Handler):
    """Runs `server.model` on numpy arrays, in binary or in registered shared memory, as Triton's documents say."""

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.asked.append((self.command, self.path, body))
        try:
            page = server.pages.get(f"{self.command} {self.path}")
            if page is not None:
                self._say(*(page if isinstance(page, tuple) else (200, page)))
            elif self.path.endswith("/infer"):
                self._infer(body, int(self.headers["Inference-Header-Content-Length"]))
            else:
                self._share(self.path.split("/"), body)
        except _Refused as refused:
            self._say(refused.args[0], {"error": refused.args[1]})

    def _say(self, status, document, raw=b"", **headers):
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data) + len(raw)))
        self.end_headers()
        self.wfile.write(data + raw)

    def _share(self, path, body):
        regions = self.server.regions
        match path:
            case ["", "v2", "systemsharedmemory", "status"]:
                self._say(200, [{"name": name} for name in regions])
            case ["", "v2", "systemsharedmemory", "region", name, "register"]:
                told = json.loads(body)
                if self.server.takes_none:
                    raise _Refused(*self.server.takes_none)
                if name in regions:
                    raise _Refused(400, f"region {name} is registered")
                with Path(f"/dev/shm{told['key']}").open("r+b") as file:  # noqa: S108 - keys of POSIX shared memory
                    regions[name] = mmap.mmap(file.fileno(), told["byte_size"])
                self.server.ever.add(name)
                if self.server.loses_answers:
                    self.close_connection = True
                else:
                    self._say(200, {})
            case ["", "v2", "systemsharedmemory", "region", name, "unregister"]:
                regions.pop(name, None)
                self._say(200, {})
            case _:
                raise _Refused(404, f"no page {self.path}")

    def _infer(self, body, json_bytes):
        asked = json.loads(body[:json_bytes])
        rest = body[json_bytes:]
        inputs = {}
        for tensor in asked["inputs"]:
            where = tensor["parameters"]
            if "shared_memory_region" in where:
                raw = self._located(where)
            else:
                raw, rest = rest[: where["binary_data_size"]], rest[where["binary_data_size"] :]
            inputs[tensor["name"]] = np.frombuffer(raw, np.float32).reshape(tensor["shape"])
        outputs = self.server.model(inputs)
        wanted = {output["name"]: output.get("parameters", {}) for output in asked.get("outputs", ())}
        described, raws = [], []
        for name, value in outputs.items():
            where = wanted.get(name, {})
            spec = {"name": name, "datatype": "FP32", "shape": list(value.shape)}
            if "shared_memory_region" in where:
                room = self._located(where)
                if value.nbytes > len(room):
                    raise _Refused(400, f"output {name}: expected room of {value.nbytes}, got {len(room)}")
                room[: value.nbytes] = value.tobytes()
            else:
                spec["parameters"] = {"binary_data_size": value.nbytes}
                raws.append(value.tobytes())
            described.append(spec)
        document = {"model_name": "m", "model_version": "1", "outputs": described}
        size = len(json.dumps(document).encode())
        self._say(200, document, b"".join(raws), Inference_Header_Content_Length=size)

    def _located(self, where):
        region = self.server.regions.get(where["shared_memory_region"])
        if region is None:
            raise _Refused(400, f"Unable to find shared memory region: '{where['shared_memory_region']}'")
        at = where.get("shared_memory_offset", 0)
        if at + where["shared_memory_byte_size"] > len(region):
            raise _Refused(400, "outside the region")
        return memoryview(region)[at : at + where["shared_memory_byte_size"]]


class _Refused(Exception):
    pass


class SharingDaemon(FakeDaemon):
    """A stand-in that takes shared memory: `model` maps input arrays (FP32) to output arrays (FP32).

    `pages` overrides what it would answer, to refuse; `takes_none` is (status, text) for every region. `forget` is
    what a restart does to registrations. `ever` has the names of all regions there were.
    """

    handler = _InferHandler

    def __init__(self, path, model, takes_none=None):
        self.model, self.takes_none = model, takes_none
        self.regions, self.ever = {}, set()
        self.loses_answers = False  # to registrations, which it carries out and then hangs up
        super().__init__(path, {})

    def forget(self):
        self.regions.clear()

    @property
    def infers(self):
        """The JSON of every inference, and how many bytes of tensors came through the socket with it."""
        found = []
        for _, path, body in self.asked:
            if path.endswith("/infer"):
                header, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
                found.append((header, len(body) - end))
        return found
