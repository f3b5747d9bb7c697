"""ddb's frames, as the load generator speaks them: `LENGTH LF PAYLOAD LF`, the payload one JSON object."""

from __future__ import annotations

import json
import socket

from bench import dialect
from bench.plan import Plan

KEY = b"k%07d"


def frame(payload: bytes) -> bytes:
    """`payload` as one frame."""
    return b"%d\n%b\n" % (len(payload), payload)


def template(plan: Plan, op: str) -> bytes:
    """The frame of one request, with %07d where the key's number goes: all are of one length."""
    if op == "get":
        read = b',"read":"stale"' if plan.read == "stale" else b""
        body = b'{"op":"get","key":"' + KEY + b'"' + read + b"}"
    else:
        body = b'{"op":"put","key":"' + KEY + b'","value":"' + dialect.value(plan) + b'"}'
    return b"%d\n" % len(body % 0) + body + b"\n"


def failure(reply: bytes) -> str:
    """The code in a reply that is a failure; empty for one that is none."""
    try:
        value = json.loads(reply)
        return "" if value["ok"] is True else str(value["error"])
    except (ValueError, LookupError, TypeError):
        return "unreadable_reply"


class Connection:
    """See dialect.Dialect."""

    farewell = b""

    def __init__(self, plan: Plan) -> None:
        self._put = template(plan, "put")
        self._get = template(plan, "get")
        self._part = b'{"op":"put","key":"' + KEY + b'","value":"' + dialect.value(plan) + b'"}'
        self.fill_keys_max = dialect.fill_keys(plan)

    def greet(self, connection: socket.socket) -> None:
        """Frames need no greeting."""

    def put(self, number: int) -> bytes:
        """See dialect.Dialect."""
        return self._put % number

    def get(self, number: int) -> bytes:
        """See dialect.Dialect."""
        return self._get % number

    def fill(self, first: int, count: int) -> bytes:
        """See dialect.Dialect."""
        parts = b",".join([self._part % number for number in range(first, first + count)])
        return frame(b'{"op":"batch","ops":[%b]}' % parts)

    def outcomes(self, data: bytes) -> tuple[list[str], bytes]:
        """See dialect.Dialect."""
        found = []
        start = 0
        while (line_feed := data.find(b"\n", start)) >= 0:
            end = line_feed + int(data[start:line_feed]) + 2
            if end > len(data):
                break
            ok = data.startswith(b'{"ok":true', line_feed + 1)
            found.append("" if ok else failure(data[line_feed + 1 : end]))
            start = end
        return found, data[start:]
