"""What the clients of `ddb verify` ask: requests that collide, and that tell as much as possible about what they saw.

Laws:

* Chance comes in as an argument, so the same chance and the same replies give the same requests.
* Every put writes a value that nobody else writes, so whoever reads it knows whose it was.
* No request touches keys of two families, so each family's history can be judged by itself.

Theory. A search for an order takes longer the more is tied together, and the more of it is of unknown outcome. So keys
come in small *families*, and a family serves some hundred operations before a fresh one takes its place: long enough for
everything to happen to it, short enough to be judged in milliseconds (checker.py; linearizability is local).

A condition that never holds, or that always does, says little. So a client remembers what it was told of a key last,
and asks for just that: it holds unless somebody came in between, which is what is to be found out.
"""

from __future__ import annotations

import random
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

MIX: Final[Mapping[str, int]] = {
    "get": 34, "put": 20, "if": 14, "incr": 8, "txn": 8, "batch": 5, "delete": 5, "scan": 3, "stale": 3,
}  # fmt: skip
"""Kinds of requests, and how often each is asked when nothing else is said."""

KEYS_OF_FAMILY: Final = 3
REMEMBERED_MAX: Final = 64  # keys; a client soon comes to others

Request = dict[str, Any]
Seen = Mapping[str, Any]
"""what a reply told of one key: `found`, and where it was `value`, `rev`, `version`"""


class Fault(Enum):
    """What may happen to a node: kill -9; SIGSTOP, and SIGCONT a moment later; SIGTERM. Each with a return."""

    KILL = "kill"
    STOP = "stop"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Family:
    """Three keys that belong together: two registers and a counter, under one prefix."""

    prefix: str

    @property
    def registers(self) -> tuple[str, str]:
        """Keys whose values are texts."""
        return f"{self.prefix}a", f"{self.prefix}b"

    @property
    def counter(self) -> str:
        """The key whose value is an integer."""
        return f"{self.prefix}n"

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.registers, self.counter)


class Script:
    """What one client asks: `next` gives its next request, and `heard` wants to know what came back."""

    def __init__(self, client: str, mix: Mapping[str, int], chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self._kinds = [kind for kind, weight in mix.items() if weight]
        self._weights = [mix[kind] for kind in self._kinds]
        self._count = 0
        self._seen: dict[str, Seen] = {}
        self._ways: dict[str, Callable[[Family], Request]] = {
            "get": self._get, "put": self._put, "if": self._if, "incr": self._incr, "txn": self._txn,
            "batch": self._batch, "delete": self._delete, "scan": self._scan, "stale": self._stale,
        }  # fmt: skip

    def next(self, family: Family) -> Request:
        """A request about keys of `family`."""
        (kind,) = self._chance.choices(self._kinds, self._weights)
        return self._ways[kind](family)

    def heard(self, request: Request, reply: Mapping[str, Any]) -> None:
        """Remember what the `reply` to `request`, which is ok, told of a key."""
        key = request.get("key")
        if key is None or request.get("read") == "stale":
            return
        if request["op"] == "put" and reply.get("applied", True):
            reply = {**reply, "found": True, "value": request["value"]}
        elif request["op"] == "delete" and reply.get("applied", True):
            reply = {"found": False}
        self._seen.pop(key, None)
        self._seen[key] = reply
        if len(self._seen) > REMEMBERED_MAX:
            del self._seen[next(iter(self._seen))]

    def _value(self) -> str:
        self._count += 1
        return f"{self._client}.{self._count}"

    def _register(self, family: Family) -> str:
        return self._chance.choice(family.registers)

    def _get(self, family: Family) -> Request:
        return {"op": "get", "key": self._chance.choice(family.keys)}

    def _put(self, family: Family) -> Request:
        return {"op": "put", "key": self._register(family), "value": self._value()}

    def _delete(self, family: Family) -> Request:
        return {"op": "delete", "key": self._chance.choice(family.keys)}

    def _incr(self, family: Family) -> Request:
        return {"op": "incr", "key": family.counter, "by": self._chance.choice((1, 1, 2, -1))}

    def _if(self, family: Family) -> Request:
        key = self._register(family)
        condition: Request | list[Request] = self._condition(key)
        if self._chance.random() < 0.25:
            other = self._register(family)
            condition = [self._condition(key), {"key": other, "exists": self._chance.random() < 0.5}]
        if self._chance.random() < 0.2:
            return {"op": "delete", "key": key, "if": condition}
        return {"op": "put", "key": key, "value": self._value(), "if": condition}

    def _condition(self, key: str) -> Request:
        seen = self._seen.get(key)
        if seen is None:
            return {"exists": self._chance.random() < 0.5}
        if not seen.get("found"):
            return self._chance.choice([{"rev": 0}, {"exists": False}])
        told = [{name: seen[name]} for name in ("rev", "version", "value") if name in seen]
        return self._chance.choice([*told, {"exists": True}])

    def _txn(self, family: Family) -> Request:
        """Half of them move a value from one register to the other, half of them count what they do."""
        one, other = self._chance.sample(family.registers, 2)
        condition = {"key": one, **self._condition(one)}
        look = {"op": "get", "key": other}
        put = {"op": "put", "key": other, "value": self._value()}
        if self._chance.random() < 0.5:
            return {"op": "txn", "if": [condition], "then": [look, put, {"op": "delete", "key": one}], "else": [look]}
        count = {"op": "incr", "key": family.counter, "by": 1}
        return {"op": "txn", "if": [condition], "then": [put, count], "else": [count, look]}

    def _batch(self, family: Family) -> Request:
        return {"op": "batch", "ops": [{"op": "put", "key": key, "value": self._value()} for key in family.registers]}

    def _scan(self, family: Family) -> Request:
        if self._chance.random() < 0.3:
            return {"op": "count", "prefix": family.prefix}
        return {"op": "scan", "prefix": family.prefix, "reverse": self._chance.random() < 0.5}

    def _stale(self, family: Family) -> Request:
        return {**self._get(family), "read": "stale"}


# ---------------------------------------------------------------- options


def parse_mix(text: str) -> dict[str, int]:
    """The mix that `get=5,put=3` says; a kind without a number has the weight 1. Raises argparse.ArgumentTypeError."""
    found = {}
    for part in text.split(","):
        name, given, weight = part.strip().partition("=")
        if name not in MIX or (given and not (weight.isascii() and weight.isdigit())):
            raise ArgumentTypeError(f"{part!r} is none of {', '.join(MIX)}, with a number, like get=5")
        found[name] = int(weight[:6]) if given else 1
    if not any(found.values()):
        raise ArgumentTypeError(f"{text!r} leaves nothing to ask")
    return found


def mix_shown(mix: Mapping[str, int]) -> str:
    """A mix as `parse_mix` reads it."""
    return ",".join(f"{name}={weight}" for name, weight in mix.items())


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults that `kill,stop` names. Raises argparse.ArgumentTypeError."""
    try:
        return tuple(dict.fromkeys(Fault(name.strip()) for name in text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of {', '.join(fault.value for fault in Fault)}") from None
