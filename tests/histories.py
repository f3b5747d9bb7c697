"""Histories to judge: written by hand, made with the real state machine, and judged by brute force."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddb import commands, kv
from ddb.history import Operation, Outcome
from tests.test_kv import batch_of

Request = dict[str, Any]
NOT_DONE = {"ok": False, "error": "no_leader", "message": "There is no leader."}


def op(client: str, called: float, returned: float | None, asked: str, **reply: Any) -> Operation:
    """One operation, its request in short: `put a 1`, `get a`, `delete a`, `incr a 2`, `cas a 1 2`, or JSON.

    No reply where `returned` is None. The reply is `ok`, with whatever else is given.
    """
    told = None if returned is None else {"ok": True, **reply}
    return Operation(client, ask(asked), called, returned, told)


def ask(asked: str) -> Request:
    """The request that `asked` says in short."""
    if asked.startswith("{"):
        return dict(json.loads(asked))
    name, key, *rest = asked.split()
    values = [json.loads(text) for text in rest]
    fields = {"put": ["value"], "get": [], "delete": [], "incr": ["by"], "cas": ["expect", "value"]}[name]
    return {"op": name, "key": key, **dict(zip(fields, values, strict=True))}


def got(client: str, called: float, returned: float, key: str, value: Any, **reply: Any) -> Operation:
    """A get that found `value`; None: nothing."""
    return op(client, called, returned, f"get {key}", found=value is not None, value=value, **reply)


class Database:
    """The real machine, one request at a time."""

    def __init__(self) -> None:
        self.table = kv.MemoryTable()
        self.machine = kv.Machine(self.table)

    def __call__(self, request: Request) -> dict[str, Any]:
        if request["op"] in commands.READS:
            reply = kv.answer(self.table, commands.prepare_read(request), self.machine.applied)
        else:
            (reply,) = self.machine.apply_batch(batch_of(self.machine.applied + 1, request))
        return dict(json.loads(reply))


@dataclass(frozen=True)
class Load:
    """What the clients of a simulated history do."""

    operations: int
    clients: int
    keys: int = 1
    unknown: float = 0.0  # share of the writes that get no reply
    happen: float = 0.5  # share of these that take effect all the same
    late: float = 0.3  # share of these that do so after their clients gave up
    deletes: bool = True
    various: bool = False  # transactions, batches, scans and increments too
    bare: bool = False  # replies say nothing of revisions and versions
    values: int = 0  # so many different values, 0: each its own


def simulate(seed: int, load: Load) -> list[Operation]:
    """A history that is linearizable: each operation takes effect at a random moment between its call and its return."""
    chance = random.Random(seed)
    free = [0.0] * load.clients
    plans: list[tuple[float, int, Operation]] = []
    for number in range(load.operations):
        client = min(range(load.clients), key=lambda client: free[client])
        called = free[client] + chance.random() * 0.2
        lasted = 0.01 + chance.random() * 2
        free[client] = called + lasted + 0.001
        request = _request(chance, load, number)
        point = called + chance.random() * lasted
        reply: dict[str, Any] | None = {}
        if chance.random() < load.unknown:
            reply = None
            if chance.random() >= load.happen:
                point = float("inf")
            elif chance.random() < load.late:
                point = called + lasted + chance.random() * 20
        plans.append((point, number, Operation(f"c{client}", request, called, called + lasted, reply)))
    database = Database()
    history: list[Operation] = []
    for point, _, operation in sorted(plans, key=lambda plan: plan[:2]):
        reply = database(dict(operation.request)) if point < float("inf") else None
        history.append(operation if operation.reply is None else replace(operation, reply=_bare(reply, load.bare)))
    return sorted(history, key=lambda operation: operation.called)


def _bare(reply: Any, bare: bool) -> Any:
    if not bare or not isinstance(reply, dict | list):
        return reply
    if isinstance(reply, list):
        return [_bare(item, bare) for item in reply]
    return {name: _bare(item, bare) for name, item in reply.items() if name not in ("rev", "created", "version")}


def _request(chance: random.Random, load: Load, number: int) -> Request:
    key = f"k{chance.randrange(load.keys)}"
    value = f"v{chance.randrange(load.values) if load.values else number}"
    kind = chance.random()
    if load.various and kind < 0.4:
        return _various(chance, load, key, value)
    if kind < 0.6:
        return {"op": "get", "key": key}
    if kind < 0.7:
        return {"op": "put", "key": key, "value": value, "if": {"exists": chance.random() < 0.5}}
    if kind < 0.77 and load.deletes:
        return {"op": "delete", "key": key}
    return {"op": "put", "key": key, "value": value}


def _various(chance: random.Random, load: Load, key: str, value: str) -> Request:
    other = f"k{chance.randrange(load.keys)}"
    move = [{"op": "put", "key": other, "value": value}, {"op": "delete", "key": key}, {"op": "get", "key": other}]
    count = {"op": "incr", "key": f"n{chance.randrange(2)}", "by": chance.randint(-1, 2)}
    return chance.choice(
        [
            {
                "op": "txn",
                "if": [{"key": key, "exists": True}],
                "then": move,
                "else": [count, {"op": "get", "key": key}],
            },
            {"op": "txn", "if": [{"key": key, "value": value}], "then": [{"op": "get", "key": other}]},
            {
                "op": "batch",
                "ops": [{"op": "put", "key": key, "value": value}, {"op": "put", "key": other, "value": value}],
            },
            {"op": "scan", "prefix": "k", "limit": chance.randint(1, 3), "reverse": chance.random() < 0.5},
            {"op": "count", "start": "k", "end": "o"},
            {"op": "delete", "key": key, "if": {"value": value}},
            {"op": "put", "key": key, "value": value, "if": {"version": chance.randint(0, 2)}},
            {"op": "put", "key": key, "value": value, "if": {"value": "v3", "op": chance.choice("<>=")}},
            count,
            count,
            {"op": "get", "key": "n0"},
        ]
    )


def spoil(chance: random.Random, history: Sequence[Operation]) -> list[Operation]:
    """The history with one thing changed: a reply that another got, or a time."""
    spoilt = list(history)
    at = chance.randrange(len(spoilt))
    operation = spoilt[at]
    names = ("op", "if", "limit", "reverse")
    alike = [o for o in history if all(o.request.get(name) == operation.request.get(name) for name in names)]
    others = [
        o
        for o in alike
        if o.reply and o.reply != operation.reply and o.request.get("key") == operation.request.get("key")
    ]
    returned = operation.returned or operation.called
    if others and operation.reply and chance.random() < 0.8:
        spoilt[at] = replace(operation, reply=chance.choice(others).reply)
    elif chance.random() < 0.5:
        spoilt[at] = replace(operation, called=operation.called - chance.random() * 3)
    else:
        spoilt[at] = replace(operation, returned=returned - chance.random() * (returned - operation.called))
    return spoilt


def brute_force(history: Sequence[Operation]) -> bool:
    """Whether the real machine, in any order that the times allow, answers what was told, revisions aside."""
    done = [operation for operation in history if operation.outcome is Outcome.DONE]
    unknown = [o for o in history if o.outcome is Outcome.UNKNOWN and o.request["op"] not in commands.READS]
    return any(
        _order_exists([*done, *some], frozenset(), ())
        for count in range(len(unknown) + 1)
        for some in itertools.combinations(unknown, count)
    )


def _order_exists(operations: list[Operation], placed: frozenset[int], order: tuple[int, ...]) -> bool:
    if len(placed) == len(operations):
        return True
    rest = [number for number in range(len(operations)) if number not in placed]
    first_return = min(_returned(operations[number]) for number in rest)
    return any(
        _fits([operations[n] for n in (*order, number)])
        and _order_exists(operations, placed | {number}, (*order, number))
        for number in rest
        if operations[number].called <= first_return
    )


def _fits(order: Sequence[Operation]) -> bool:
    database = Database()
    replies = [database(dict(operation.request)) for operation in order]
    last = order[-1]
    if last.outcome is Outcome.UNKNOWN:
        return True
    return bool(_bare(replies[-1], True) == _bare(last.reply, True))


def _returned(operation: Operation) -> float:
    known = operation.outcome is Outcome.DONE and operation.returned is not None
    return operation.returned if known and operation.returned is not None else float("inf")
