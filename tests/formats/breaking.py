"""Connections that break in the middle of a file: a file system in memory, and a proxy of TCP."""

import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class BreakingFileSystem(MemoryFileSystem):
    """A file system in memory whose connection breaks in the middle of the files it is told to."""

    protocol = "breaking"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    written: ClassVar[list[str]] = []
    read: ClassVar[list[tuple[str, int]]] = []
    sending: ClassVar[dict[str, int]] = {}
    asking: ClassVar[dict[str, int]] = {}
    pause = 0.0  # seconds that an upload takes

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("breaking://").strip("/")

    def put_file(self, lpath: str, rpath: str, *args: Any, **more: Any) -> None:
        if self._breaks(self.sending, rpath):
            data = Path(lpath).read_bytes()
            self.pipe_file(rpath, data[: len(data) // 2])
            raise ConnectionResetError("the connection broke")
        time.sleep(self.pause)
        self.written.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, *args, **more)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        if self._breaks(self.asking, path):
            raise ConnectionResetError("the connection broke")
        found: bytes = super().cat_file(path, start, end, **more)
        self.read.append((path.rpartition("/")[2], len(found)))
        return found

    def _breaks(self, left: dict[str, int], path: str) -> bool:
        name = next((each for each in left if path.endswith(each) and left[each]), None)
        if name is not None:
            left[name] -= 1
        return name is not None


@dataclass
class BreakingProxy:
    """Hands connections on to a server, but breaks those that send a file after some bytes."""

    server: tuple[str, int]
    name: bytes = b""
    broken: int = 0

    @contextmanager
    def serving(self) -> Iterator[int]:
        """The port that it has, as long as the block runs."""
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(proxy.server) as behind:
                    threading.Thread(target=_pumped, args=(behind, self.request)).start()
                    proxy.hand_on(self.request, behind)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_address[1]
            server.shutdown()

    def hand_on(self, request: socket.socket, behind: socket.socket) -> None:
        """What a client sends; 5,000 bytes of a request that puts the file."""
        left = None
        with suppress(OSError):
            while data := request.recv(65536):
                if left is None and self.name and b"PUT " in data and self.name in data:
                    left = 5000
                behind.sendall(data[:left])
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    self.broken += 1
                    gone = struct.pack("ii", 1, 0)
                    request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, gone)
                    break
        request.close()


def _pumped(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@contextmanager
def serving_s3() -> Iterator[tuple[BreakingProxy, dict[str, str]]]:
    """A server of S3, empty, behind a proxy; what the environment has to say of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = free.getsockname()
    command = [sys.executable, "-m", "moto.server", "-H", server[0], "-p", str(server[1])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = BreakingProxy(server)
    try:
        _wait_for(server)
        with proxy.serving() as port:
            said = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "DEFAULT_REGION": "us-east-1"}
            said |= {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "MAX_ATTEMPTS": "1"}
            yield proxy, {f"AWS_{name}": value for name, value in said.items()}
    finally:
        process.terminate()
        process.wait()


def _wait_for(server: tuple[str, int]) -> None:
    for _ in range(600):
        try:
            socket.create_connection(server, 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")
