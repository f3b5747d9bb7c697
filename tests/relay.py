"""A network between nodes that a test can cut, in user space: no firewall, no privileges.

Each node listens on a loopback address of its own (127.0.0.11, .12, …), which its outgoing connections come from, too; and it
advertises a port of this network, which carries what arrives there to the node. So every connection among nodes passes
here, and shows who is at its two ends.

`cut(node)` is a dropped route: connections stay open, and nothing comes through any more. That is what a firewall's
DROP does, and the hardest case: nobody is told that anything broke. `heal` lets flow what had been held back, like TCP's
own retransmissions would.

`slow` makes the way long: what arrives is passed on only after a while, in its order. Where a kernel can't delay (netem),
that is how it is done.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from tests.harness import Cluster, NodeServer

BUFFER_BYTES_MAX = 1 << 20


@dataclass(eq=False)
class _Flow:
    """One direction of one connection: bytes from `source` to `sink`."""

    source: socket.socket
    sink: socket.socket
    ends: frozenset[str]  # the hosts of the nodes at its two ends
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)  # with the time at which each arrives
    held: bytearray = field(default_factory=bytearray)
    ended: bool = False

    @property
    def full(self) -> bool:
        return len(self.held) + sum(len(data) for _, data in self.under_way) >= BUFFER_BYTES_MAX

    def arrive(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            self.held += self.under_way.popleft()[1]


class Network:
    """The network of a `cluster` that is not started yet and whose nodes have a host each. A context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._nodes = {node.host: node for node in cluster.nodes}
        assert len(self._nodes) == len(cluster.nodes), "each node needs a host of its own"
        self._listeners: dict[socket.socket, NodeServer] = {}
        self._flows: dict[socket.socket, _Flow] = {}
        self._cut: set[str] = set()
        self._cut_seen: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._delay_s = (0.0, 0.0)
        self._lot = random.Random(1)
        for node in cluster.nodes:
            listener = socket.create_server(("127.0.0.1", 0))
            self._listeners[listener] = node
            node.flags += ["--advertise", f"127.0.0.1:{listener.getsockname()[1]}"]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, *nodes: NodeServer) -> None:
        """When this returns, nothing passes any more between any of `nodes` and any other node."""
        with self._changed:
            self._cut = {node.host for node in nodes}
            self._changed.wait_for(lambda: self._cut_seen == self._cut, 5.0)

    def slow(self, least_s: float, most_s: float) -> None:
        """From now on each piece of a stream takes so many seconds, drawn between these bounds; those before it go first."""
        self._delay_s = (least_s, most_s)

    def heal(self) -> None:
        """Let everything pass again, without delay."""
        self._delay_s = (0.0, 0.0)
        self.cut()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._thread.join()
        for end in [*self._flows, *self._listeners]:
            end.close()

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                cut = self._cut_seen = set(self._cut)
                self._changed.notify_all()
            with selectors.DefaultSelector() as selector:
                for listener in self._listeners:
                    selector.register(listener, selectors.EVENT_READ)
                for source, flow in self._flows.items():
                    if not self._held_back(flow, cut) and not flow.ended and not flow.full:
                        selector.register(source, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(0.001 if any(self._delay_s) else 0.01)]
            for end in ready:
                if end in self._listeners:
                    self._accept(end, self._listeners[end])  # type: ignore[index, arg-type]
                elif end in self._flows:
                    self._receive(self._flows[end])  # type: ignore[index]
            now = time.monotonic()
            for flow in list(self._flows.values()):
                flow.arrive(now)
                if not self._held_back(flow, cut):
                    self._send(flow)

    def _held_back(self, flow: _Flow, cut: set[str]) -> bool:
        """Whether exactly one end is on the other side of the cut."""
        return len(flow.ends & cut) == 1 and len(flow.ends) == 2

    def _accept(self, listener: socket.socket, node: NodeServer) -> None:
        with contextlib.suppress(OSError):
            near, (host, _) = listener.accept()
            try:
                far = socket.create_connection((node.host, node.port), timeout=1.0)
            except OSError:
                near.close()
                return
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends = frozenset({host, node.host} & self._nodes.keys())
            self._flows[near] = _Flow(near, far, ends)
            self._flows[far] = _Flow(far, near, ends)

    def _receive(self, flow: _Flow) -> None:
        try:
            data = flow.source.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        flow.ended = not data
        arrives_at = time.monotonic() + self._lot.uniform(*self._delay_s)
        if flow.under_way:
            arrives_at = max(arrives_at, flow.under_way[-1][0])
        flow.under_way.append((arrives_at, data))

    def _send(self, flow: _Flow) -> None:
        try:
            while flow.held:
                del flow.held[: flow.sink.send(flow.held)]
        except BlockingIOError:
            return
        except OSError:
            flow.held.clear()
            flow.under_way.clear()
            flow.ended = True
        if flow.ended and not flow.held and not flow.under_way:
            for end in (flow.source, flow.sink):
                self._flows.pop(end, None)
                end.close()
