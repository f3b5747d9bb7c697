"""A watcher for tests of real clusters, which resumes by itself as docs/protocol.md says, and believes nothing.

Laws: it speaks frames by itself, like the harness: a broken client can't hide a broken server. It resumes from the last
revision that it has seen, and skips as many events of that revision as it had: what is told twice otherwise, or out of
order, is an error that it keeps.
"""

from __future__ import annotations

import json
import socket
import threading
from types import TracebackType
from typing import Any, Self

from tests.harness import NodeServer, wait

SILENCE_MAX_S = 8.0  # there is progress every 5 s


class Onlooker:
    """A thread that watches `what` (`key` or `prefix`) through `nodes`: the first, and the next one where that fails.

    `events` are the changes in the order in which they came; `resumed` is how often it had to begin again.
    """

    def __init__(self, nodes: list[NodeServer], *, since: int | None = None, **what: str) -> None:
        self.nodes = nodes
        self.what = what
        self.events: list[dict[str, Any]] = []
        self.resumed = -1
        self.errors: list[str] = []
        self.progress = 0
        self._since = since
        self._last = 0
        self._seen_of_last = 0
        self._stopped = False
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="onlooker")

    def __enter__(self) -> Self:
        self._thread.start()
        wait(lambda: self.resumed >= 0, what="the watch has begun")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if self._connection is not None:
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._thread.join(SILENCE_MAX_S + 5)
        assert not self._thread.is_alive()

    def wait_for(self, rev: int, timeout_s: float = 30.0) -> None:
        """Wait until everything up to `rev` was told."""
        wait(lambda: max(self._last, self.progress) >= rev, timeout_s, f"told everything up to {rev}")

    # -- the thread

    def _run(self) -> None:
        position = 0
        while not self._stopped:
            node = self.nodes[position % len(self.nodes)]
            try:
                with socket.create_connection((node.host, node.port), timeout=2.0) as connection:
                    self._connection = connection
                    self._watch(connection)
            except (OSError, ValueError, ConnectionError) as error:
                if not self._stopped and not isinstance(error, OSError):
                    self.errors.append(repr(error))
            self._connection = None
            position += 1

    def _watch(self, connection: socket.socket) -> None:
        request: dict[str, Any] = {"op": "watch", **self.what}
        first = self._last or (self._since if self._since is not None else 0)
        if first:
            request["from"] = first
        payload = json.dumps(request).encode()
        connection.sendall(b"%d\n%b\n" % (len(payload), payload))
        connection.settimeout(SILENCE_MAX_S)
        with connection.makefile("rb") as stream:
            reply = _frame(stream)
            if not reply["ok"]:
                if reply["error"] not in ("no_leader", "shutting_down", "timeout", "overloaded"):
                    self.errors.append(f"refused: {reply}")
                return
            self.resumed += 1
            if self._since is None and not self._last:
                self._since = reply["rev"] + 1
            to_skip = self._seen_of_last
            while not self._stopped:
                to_skip = self._take(_frame(stream), to_skip)

    def _take(self, event: dict[str, Any], to_skip: int) -> int:
        if event["event"] == "error":
            if event["error"] not in ("shutting_down", "compacted", "overloaded"):
                self.errors.append(f"ended: {event}")
            raise ConnectionResetError(event["message"])
        rev = event["rev"]
        if event["event"] == "progress":
            self.progress = max(self.progress, rev)
            return 0 if rev > self._last else to_skip
        if rev == self._last and to_skip:
            told_before = self.events[len(self.events) - to_skip]
            if event != told_before:
                self.errors.append(f"told {event} in the place of {told_before}")
            return to_skip - 1
        if rev < self._last:
            self.errors.append(f"{event} came behind revision {self._last}")
        if to_skip:
            self.errors.append(f"{to_skip} events of revision {self._last} are told no more; {event} came")
        self._seen_of_last = self._seen_of_last + 1 if rev == self._last else 1
        self._last = rev
        self.events.append(event)
        return 0


def _frame(stream: Any) -> dict[str, Any]:
    head = stream.readline()
    if not head.endswith(b"\n"):
        raise ConnectionResetError("the stream has ended")
    payload = stream.read(int(head) + 1)
    if not payload.endswith(b"\n"):
        raise ConnectionResetError("the stream has ended within a frame")
    content: dict[str, Any] = json.loads(payload)
    return content
