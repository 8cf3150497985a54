"""A hub on loopback that lists and sends files, and misbehaves as a hub or a network does."""

import contextlib
import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import huggingface_hub.constants
import pytest

from at2po_env.data.cache import SAMPLE
from at2po_env.data.catalog import FLASHRAG

QUESTIONS = (SAMPLE / "bamboogle.jsonl").read_bytes()
PATH = f"/datasets/{FLASHRAG}/resolve/main/bamboogle/test.jsonl"
HALF = len(QUESTIONS) // 2


class Hub:
    """A small hub: files, faults (one is used up per transfer) and the byte ranges that were asked for.

    It lists what `files` has; `lies` are bodies that it sends instead, `listed` are fields of listings to
    change.
    """

    def __init__(self) -> None:
        self.files = {PATH: QUESTIONS}
        self.lies: dict[str, bytes] = {}
        self.listed: dict[str, object] = {}
        self.answer: bytes | None = None
        self.faults: list[str] = []
        self.ranges: list[str | None] = []
        self.large = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                """List some files: /api/datasets/OWNER/NAME/paths-info/main."""
                asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
                repo = self.path.removeprefix("/api").removesuffix("/paths-info/main")
                found = [path for path in asked if f"{repo}/resolve/main/{path}" in hub.files]
                hub.send_json(self, [hub.entry(repo, path) for path in found])

            def do_GET(self) -> None:
                """List a folder (/api/datasets/OWNER/NAME/tree/main/FOLDER?...) or send a file."""
                repo, listing, rest = self.path.removeprefix("/api").partition("/tree/main/")
                if listing:
                    start = f"{repo}/resolve/main/"
                    paths = [path.removeprefix(start) for path in hub.files if path.startswith(start)]
                    folder = {"type": "directory", "path": f"{rest.partition('?')[0]}/old", "oid": "0"}
                    hub.send_json(self, [*(hub.entry(repo, path) for path in paths), folder])
                else:
                    hub.send_file(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def entry(self, repo: str, path: str) -> dict[str, object]:
        """Describe a file as the hub does; large ones have their SHA-256, others git's SHA-1 of a blob."""
        content = self.files[f"{repo}/resolve/main/{path}"]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git}
        if self.large:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 100}
        return entry | self.listed

    def send_json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode() if self.answer is None else self.answer
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def send_file(self, request: BaseHTTPRequestHandler) -> None:
        content = self.lies.get(request.path, self.files.get(request.path))
        asked = request.headers["Range"]
        self.ranges.append(asked)
        fault = self.faults.pop(0) if self.faults else ""
        start = (
            int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "ignores range" else 0
        )
        if content is None or fault.isdigit() or (start and start >= len(content)):
            request.send_error(int(fault or (404 if content is None else 416)))
            return
        body = content[max(start - 5, 0) if fault == "wrong range" else start :]
        request.send_response(206 if start else 200)
        if start:
            request.send_header(
                "Content-Range", f"bytes {len(content) - len(body)}-{len(content) - 1}/{len(content)}"
            )
        if fault == "gzip":
            request.send_header("Content-Encoding", "gzip")
            body = gzip.compress(body)
        request.send_header("ETag", '"1"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:HALF] if fault == "drops" else body)
        if fault == "drops":
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that answers until the end of the block, whether or not the environment forbids hubs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()
