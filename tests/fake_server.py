"""A frames server that answers by script: what a real server does only in bad moments, it does on demand."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], "dict[str, Any] | bytes | None"]


class FakeServer:
    """Answers each request with what `answer` returns: an object as a frame, bytes as they are, None by closing.

    A context manager. `requests` are those received; `silent` requests are read and never answered.
    """

    def __init__(self, answer: Answer | None = None, port: int = 0) -> None:
        self.answer = answer or (lambda request: {"ok": True})
        self.requests: list[dict[str, Any]] = []
        self.silent = False
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def ops(self) -> list[str]:
        """The operations asked for, in order."""
        return [request["op"] for request in self.requests]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                for head in stream:
                    request = json.loads(stream.read(int(head) + 1))
                    self.requests.append(request)
                    if self.silent:
                        continue
                    reply = self.answer(request)
                    if reply is None:
                        return
                    if isinstance(reply, dict):
                        payload = json.dumps(reply).encode()
                        reply = b"%d\n%b\n" % (len(payload), payload)
                    connection.sendall(reply)
            except (OSError, ValueError):
                return

    def hang_up(self) -> None:
        """Reset every open connection; go on listening."""
        for connection in self._connections:
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already
        self._connections.clear()

    def close(self) -> None:
        """Stop listening and close every connection."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not every system lets a listener be shut down
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def failure(code: str, **fields: Any) -> dict[str, Any]:
    """A reply that says no."""
    return {"ok": False, "error": code, "message": f"The fake server says {code}.", **fields}
