"""ZooKeeper's protocol, as the load generator speaks it: jute records behind a length of four bytes.

Theory. A request is `length xid type path …`, a reply `length xid zxid err …`, in the order of the requests. A put is a
`setData` of a node that exists, a stale get a `getData` (the server answers from its own state). A linearizable get
is a `sync` and a `getData` behind it on the same connection, which is how ZooKeeper's documentation says to get one; both
are sent at once, and the reply to the first is not counted. (xids need not be unique: the server only echoes them.)
"""

from __future__ import annotations

import socket
import struct

from bench import dialect
from bench.plan import Plan

SESSION_MS = 30_000
CREATE, GET, SET, SYNC, CLOSE = 1, 4, 5, 9, -11
NODE_EXISTS = -110
SYNC_XID, XID = 1, 2
_REPLY = struct.Struct(">iiqi")


def record(kind: int, xid: int, body: bytes) -> bytes:
    """A request with its length before it."""
    return struct.pack(">iii", 8 + len(body), xid, kind) + body


def text(data: bytes) -> bytes:
    """A string or buffer."""
    return struct.pack(">i", len(data)) + data


def read(connection: socket.socket) -> bytes:
    """One record from a socket that blocks. Raises OSError."""
    with connection.makefile("rb", buffering=0) as stream:
        head = stream.read(4) or b""
        size = int.from_bytes(head, "big")
        data = b""
        while len(head) == 4 and len(data) < size and (more := stream.read(size - len(data))):
            data += more
    if len(head) < 4 or len(data) < size:
        raise ConnectionError("the server hung up")
    return data


class Connection:
    """See dialect.Dialect. A key is a node under the root."""

    fill_keys_max = 1
    farewell = record(CLOSE, XID, b"")

    def __init__(self, plan: Plan) -> None:
        path = text(b"/k%07d" % 0)
        self._digits = len(path) - 7
        held = text(dialect.value(plan))
        acl = struct.pack(">i", 1) + struct.pack(">i", 31) + text(b"world") + text(b"anyone")
        self._set = self._around(record(SET, XID, path + held + struct.pack(">i", -1)))
        self._create = self._around(record(CREATE, XID, path + held + acl + struct.pack(">i", 0)))
        self._read = self._around(record(GET, XID, path + b"\0"))
        self._sync = self._around(record(SYNC, SYNC_XID, path)) if plan.read == "linearizable" else None

    def _around(self, request: bytes) -> tuple[bytes, bytes]:
        """What stands before and after the seven digits of the path in `request`."""
        return request[: 12 + self._digits], request[12 + self._digits + 7 :]

    def greet(self, connection: socket.socket) -> None:
        """Open a session."""
        connection.sendall(text(struct.pack(">iqiq", 0, 0, SESSION_MS, 0) + text(bytes(16)) + b"\0"))
        read(connection)

    def put(self, number: int) -> bytes:
        """See dialect.Dialect."""
        before, after = self._set
        return b"%b%07d%b" % (before, number, after)

    def get(self, number: int) -> bytes:
        """See dialect.Dialect."""
        before, after = self._read
        if self._sync is None:
            return b"%b%07d%b" % (before, number, after)
        return b"%b%07d%b%b%07d%b" % (self._sync[0], number, self._sync[1], before, number, after)

    def fill(self, first: int, count: int) -> bytes:
        """See dialect.Dialect; of one key."""
        before, after = self._create
        return b"%b%07d%b" % (before, first, after)

    def outcomes(self, data: bytes) -> tuple[list[str], bytes]:
        """See dialect.Dialect."""
        found = []
        start, unpack = 0, _REPLY.unpack_from
        while len(data) - start >= 20:
            size, xid, _, error = unpack(data, start)
            end = start + 4 + size
            if end > len(data):
                break
            if xid != SYNC_XID:
                found.append("" if error in (0, NODE_EXISTS) else f"zookeeper_{error}")
            start = end
        return found, data[start:]
