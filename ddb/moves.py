"""From a history to moves: what each operation does to which rows, and what its client was told of that.

Laws:

* What surely never happened, and what tells nothing, is no evidence and becomes no move.
* A request that makes no sense is refused here (BadHistory), so whoever searches meets none.

Theory. A *component* is a set of keys that no operation connects with any other key, so it can be judged by
itself: linearizability is local (Herlihy and Wing 1990, theorem 1). Most components are one key; a txn, a batch or a
scan ties several together.

Where all who read agree never to have seen a value, it makes no difference which value it was: such values become one,
UNSEEN. So the states that differ only in what nobody saw are the same state, and writes of unknown outcome which nobody
saw are each other's equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ddb.history import BadHistory, Operation, Outcome
from ddb.revisions import written_at
from ddb.spec import (
    UNSEEN,
    Batch,
    Command,
    Condition,
    Delete,
    Get,
    Incr,
    Put,
    Range,
    Reply,
    Stamp,
    State,
    Txn,
    Value,
    agrees,
    is_integer,
    text_of,
)  # fmt: skip

CONDITION_SUBJECTS: Final = ("rev", "version", "value", "exists")
TOLD: Final = frozenset({"found", "value", "rev", "created", "version", "applied", "deleted", "succeeded", "count"})
OF_REVISIONS: Final = frozenset({"rev", "created", "version"})


@dataclass(slots=True)
class Move:
    """An operation, ready to be tried: the command, what was told of it, and what is known of it beforehand.

    `told` is None where the outcome is unknown. `rev` is the revision of the write: told, or seen by somebody else.
    `blind` says that it may be done in any state, and that what it leaves does not depend on the state; `steady`, that
    it never changes the state. `gives` are all values that it may put anywhere, but for those in opaque rows (see
    Component), and `wants` those that it must find. `hint` is where in the order of revisions it should be. `version`
    is a row, and the version that it must have before (0: absent).
    """

    operation: Operation
    command: Command
    told: Reply | None
    rev: int | None
    read_rev: int | None  # of the state that a scan or count saw
    stamps: tuple[Stamp, ...]  # more than one where nobody knows whether its condition held
    blind: bool
    steady: bool
    gives: tuple[Value, ...] = ()
    wants: tuple[Value, ...] = ()
    hint: float | None = None
    version: tuple[int, int] | None = None


@dataclass(slots=True)
class Component:
    """Some keys and all that was done to them. `moves` are in the order of their calls; what surely never happened
    and what tells nothing (reads without a reply) is not among them.

    `versions` are counted if somebody was told one, and revisions `tracked` likewise. `unclaimed` leads from each
    revision that a write was told to the next that none was; `bound` are those that are known of unknown moves. In
    `opaque` rows, moves may put values that nothing tells beforehand; elsewhere, values of `once` are put there by one
    move at most.
    """

    keys: tuple[str, ...]
    unclaimed: Mapping[int, int]
    moves: list[Move] = field(default_factory=list)
    versions: bool = False
    tracked: bool = False
    bound: set[int] = field(default_factory=set)
    deletes: bool = False  # there is a move that may remove a key
    growth_max: int = 1  # by how much one move can raise a key's version
    opaque: set[int] = field(default_factory=set)
    once: set[Value] = field(default_factory=set)

    @property
    def initial(self) -> State:
        """The state before everything: no keys."""
        return 0, (None,) * len(self.keys)

    def successors(self, state: State, move: Move) -> tuple[State, ...]:
        """The states that `move` may lead to from `state`: none where it can't have been told what it was told."""
        last, before = state
        rev, stamps = move.rev, move.stamps
        if rev is not None:
            if rev <= last:
                return ()
            last = rev
        elif self.tracked and not move.steady:
            lowest = self.unclaimed.get(last + 1, last + 1)
            while lowest in self.bound:
                lowest = self.unclaimed.get(lowest + 1, lowest + 1)
            stamps = tuple(Stamp(~(lowest - 1), stamp.versions, stamp.choice) for stamp in stamps)
            last = lowest
        elif move.read_rev is not None and move.read_rev < last:
            return ()
        found: tuple[State, ...] = ()
        for stamp in stamps:
            rows = list(before)
            reply = move.command.run(rows, stamp)
            if reply is not None and (move.told is None or agrees(reply, move.told)):
                after = (last, tuple(rows))
                if after not in found:
                    found += (after,)
        return found


def components(history: Sequence[Operation], revisions: bool, claimed: Iterable[int] | None = None) -> list[Component]:
    """The components of `history`, by their first keys. Without `revisions`, whatever was told of revisions and
    versions is disregarded. `claimed` are the revisions that writes were told; those in `history` when not given.

    Raises BadHistory where an operation isn't one that the specification knows.
    """
    unclaimed: dict[int, int] = {}
    for rev in sorted(revisions_claimed(history) if claimed is None else claimed, reverse=True):
        unclaimed[rev] = unclaimed.get(rev + 1, rev + 1)
    judged = [operation for operation in history if _is_evidence(operation)]
    found = [_Reader(keys, operations, revisions).component(unclaimed) for keys, operations in _connected(judged)]
    return sorted(found, key=lambda component: component.keys)


def revisions_claimed(history: Iterable[Operation]) -> list[int]:
    """The revisions that the writes of `history` were told to have."""
    return [rev for operation in history if (rev := written_at(operation)) is not None]


def _is_evidence(operation: Operation) -> bool:
    request = operation.request
    if request.get("op") in ("get", "scan", "count"):
        return operation.outcome is Outcome.DONE and request.get("read", "linearizable") == "linearizable"
    return operation.outcome is not Outcome.NOT_DONE


def _connected(history: Sequence[Operation]) -> Iterator[tuple[tuple[str, ...], list[Operation]]]:
    """The finest division of the keys that no operation crosses: union-find, over keys and operations."""
    touched = [set(_keys_of(operation.request)) | set(_keys_told(operation.reply)) for operation in history]
    every = sorted(set().union(*touched))
    parents: dict[str | int, str | int] = {key: key for key in every}

    def root(item: str | int) -> str | int:
        while (parent := parents[item]) != item:
            parents[item] = item = parents[parent]
        return item

    for number, operation in enumerate(history):
        parents[number] = number
        for inside in _ranges_of(operation.request):
            touched[number].update(filter(inside, every))
        for key in touched[number]:
            parents[root(key)] = root(number)
    members: dict[str | int, tuple[list[str], list[Operation]]] = {}
    for key in every:
        members.setdefault(root(key), ([], []))[0].append(key)
    for number, operation in enumerate(history):
        members.setdefault(root(number), ([], []))[1].append(operation)
    for keys, operations in members.values():
        if operations:
            yield tuple(keys), sorted(operations, key=lambda operation: operation.called)


def _keys_of(request: Mapping[str, Any]) -> Iterator[str]:
    """The keys that a request names."""
    if "key" in request:
        yield _string(request["key"], "`key`")
    for condition in _listed(request.get("if")):
        if "key" in condition:
            yield _string(condition["key"], "a condition's `key`")
    for part in ("ops", "then", "else"):
        for operation in _listed(request.get(part)):
            yield from _keys_of(operation)


def _keys_told(reply: Mapping[str, Any] | None) -> Iterator[str]:
    """The keys that a reply's items name."""
    if reply is not None:
        for item in _listed(reply.get("items")):
            yield _string(item.get("key"), "an item's `key`")
        for result in _listed(reply.get("results")):
            yield from _keys_told(result)


def _ranges_of(request: Mapping[str, Any]) -> Iterator[Callable[[str], bool]]:
    """For each range of keys that a request reads, what is inside."""
    if request.get("op") in ("scan", "count"):
        yield _range(request)
    for part in ("then", "else"):
        for operation in _listed(request.get(part)):
            yield from _ranges_of(operation)


def _range(request: Mapping[str, Any]) -> Callable[[str], bool]:
    prefix, start, end = (request.get(name) for name in ("prefix", "start", "end"))
    for name, value in (("prefix", prefix), ("start", start), ("end", end)):
        if value is not None:
            _string(value, f"`{name}`")
    if prefix is not None:
        return lambda key: key.startswith(prefix)
    return lambda key: (start or "") <= key and (end is None or key < end)


def _listed(value: Any) -> Sequence[Mapping[str, Any]]:
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, Mapping):
            raise BadHistory(f"An object is missing where {item!r} stands.")
    return items


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadHistory(f"{name} is a string, not {value!r}.")
    return value


# ----------------------------------------------------- from requests to moves


class _Reader:
    """Makes the moves of one component."""

    def __init__(self, keys: tuple[str, ...], operations: list[Operation], revisions: bool) -> None:
        self._keys = keys
        self._positions = {key: position for position, key in enumerate(keys)}
        self._operations = operations
        self._revisions = revisions
        self._seen: set[str] = set()  # JSON texts of values
        self._blurred = False  # whether values are compared so that more than their texts matters
        self._counted = False  # whether there is an incr, to which every integer matters

    def component(self, unclaimed: Mapping[int, int]) -> Component:
        told = [
            self._told(operation.reply) if operation.outcome is Outcome.DONE else None for operation in self._operations
        ]
        for operation in self._operations:
            self._note_uses(operation.request)
        component = Component(self._keys, unclaimed)
        component.versions = any(map(_tells_version, told))
        component.tracked = any(move_told is not None and _tells_revision(move_told) for move_told in told)
        for operation, reply in zip(self._operations, told, strict=True):
            try:
                move = self._move(operation, reply, component)
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                raise BadHistory(
                    f"{dict(operation.request)!r} is not a request that can be judged: {error!r}."
                ) from None
            component.moves.append(move)
            parts = list(_parts(move.command))
            component.deletes = component.deletes or any(isinstance(part, Delete) for part in parts)
            component.opaque.update(_unforeseen(move))
            component.growth_max = max(component.growth_max, len(parts))
        _recognise(component)
        return component

    def _told(self, reply: Mapping[str, Any] | None) -> Reply:
        """What can be judged of a reply, its values as texts, which are noted as seen."""
        told: Reply = {}
        for name, value in (reply or {}).items():
            if name in TOLD and (self._revisions or name not in OF_REVISIONS):
                if name in OF_REVISIONS and type(value) is not int:
                    raise BadHistory(f"`{name}` is a whole number, not {value!r}.")
                told[name] = self._saw(value) if name == "value" else value
        if reply and "results" in reply:
            told["results"] = [self._told(result) for result in _listed(reply["results"])]
        if reply and "items" in reply:
            told.pop("rev", None)  # of the whole state, not of a row
            told["more"] = reply.get("more")
            told["items"] = [{"key": item["key"], **self._told(item)} for item in _listed(reply["items"])]
        if reply and "count" in reply:
            told.pop("rev", None)
        return told

    def _saw(self, value: Any) -> str:
        text = text_of(value)
        self._seen.add(text)
        return text

    def _note_uses(self, request: Mapping[str, Any]) -> None:
        """Note which values a request compares, or counts with."""
        for condition in _listed(request.get("if")):
            if "value" in condition:
                self._compared(condition["value"], condition.get("op", "="))
        if request.get("op") == "cas":
            self._compared(request.get("expect"), "=")
        self._counted = self._counted or request.get("op") == "incr"
        for part in ("ops", "then", "else"):
            for operation in _listed(request.get(part)):
                self._note_uses(operation)

    def _compared(self, value: Any, op: str) -> None:
        self._saw(value)
        if op in ("<", ">") or isinstance(value, float | list | dict):
            self._blurred = True

    def _text_to_write(self, value: Any) -> str:
        text = text_of(value)
        indifferent = not self._blurred and not (self._counted and isinstance(value, int))
        if text not in self._seen and indifferent and (value is None or isinstance(value, str | int | bool)):
            return UNSEEN
        return text

    def _move(self, operation: Operation, told: Reply | None, component: Component) -> Move:
        command, request_key = self._command(operation.request), operation.request.get("key")
        if told is not None and getattr(command, "conditions", None) is not None and not isinstance(command, Txn):
            told.setdefault("applied", True)
        if told is not None and operation.reply and operation.reply.get("key", request_key) != request_key:
            told["key"] = operation.reply["key"]  # the answer to another question, which no right reply has
        own = told is not None and told.get("applied", True) and not isinstance(command, Get | Range)
        rev = told.get("rev") if told is not None and own else None
        read_rev = None
        if isinstance(command, Range) and operation.reply is not None and self._revisions:
            read_rev = operation.reply.get("rev")
        if not isinstance(read_rev, int | None):
            raise BadHistory(f"A revision is a whole number, not {read_rev!r}.")
        conditional = isinstance(command, Txn) or getattr(command, "conditions", None) is not None
        choice = told.get("applied", told.get("succeeded")) if told is not None else None
        choices = (True,) if not conditional else (True, False) if choice is None else (bool(choice),)
        overwrites = not conditional and isinstance(command, Batch | Put | Delete)
        move = Move(
            operation, command, told, rev, read_rev,
            tuple(Stamp(~0 if rev is None else rev, component.versions, choice) for choice in choices),
            blind=overwrites and not told and not (component.tracked or component.versions),
            steady=rev is None and told is not None and _changes_nothing(command, told),
        )  # fmt: skip
        _add_hints(move, component.versions)
        return move

    def _command(self, request: Mapping[str, Any]) -> Command:
        op = request.get("op")
        if op in ("scan", "count"):
            inside = _range(request)
            keys = [key for key in self._keys if inside(key)]
            if request.get("reverse"):
                keys.reverse()
            return Range(tuple(keys), tuple(self._positions[key] for key in keys))
        if op == "batch":
            commands = tuple(self._command(operation) for operation in _listed(request["ops"]))
            return Batch(commands, _union(commands))
        if op == "txn":
            then, otherwise = (tuple(self._command(o) for o in _listed(request.get(part))) for part in ("then", "else"))
            return Txn(self._conditions(request, None) or (), then, otherwise, _union(then + otherwise))
        if op not in ("put", "cas", "delete", "incr", "get"):
            raise BadHistory(f"The op {op!r} is none that a history can be judged by.")
        return self._of_one_key(op, request)

    def _of_one_key(self, op: str, request: Mapping[str, Any]) -> Command:
        position = self._positions[_string(request.get("key"), "`key`")]
        writes = frozenset({position})
        if op == "get":
            return Get(position)
        if op == "incr":
            by = request.get("by", 1)
            if type(by) is not int:
                raise BadHistory(f"`by` is a whole number, not {by!r}.")
            return Incr(position, by, writes)
        if op == "delete":
            return Delete(position, self._conditions(request, position), writes)
        conditions = self._conditions(request, position)
        if op == "cas":
            conditions = (Condition(position, "value", "=", text_of(request.get("expect"))), *(conditions or ()))
        return Put(position, self._text_to_write(request["value"]), conditions, writes)

    def _conditions(self, request: Mapping[str, Any], own: int | None) -> tuple[Condition, ...] | None:
        if request.get("if") is None:
            return None
        found = []
        for condition in _listed(request["if"]):
            (subject,) = (name for name in CONDITION_SUBJECTS if name in condition)
            position = self._positions[condition["key"]] if "key" in condition or own is None else own
            wanted = condition[subject]
            op = condition.get("op", "=")
            if subject != "value" and not isinstance(wanted, int):
                raise BadHistory(f"A condition's `{subject}` is a number, or true or false, not {wanted!r}.")
            if op not in ("=", "!=", "<", ">"):
                raise BadHistory(f"A condition's `op` is =, !=, < or >, not {op!r}.")
            found.append(Condition(position, subject, op, text_of(wanted) if subject == "value" else wanted))
        return tuple(found)


def _union(commands: Sequence[Command]) -> frozenset[int]:
    return frozenset().union(*(command.writes for command in commands))


def _parts(command: Command) -> Iterator[Command]:
    if isinstance(command, Batch | Txn):
        inner = command.commands if isinstance(command, Batch) else command.then + command.otherwise
        for part in inner:
            yield from _parts(part)
    else:
        yield command


def _unforeseen(move: Move) -> Iterator[int]:
    """The rows in which a move may leave values that nothing tells beforehand."""
    for part in _parts(move.command):
        if isinstance(part, Incr) and not (part is move.command and "value" in (move.told or {})):
            yield part.position


def _changes_nothing(command: Command, told: Reply) -> bool:
    if isinstance(command, Txn):
        taken = command.then + command.otherwise
        if "succeeded" in told:
            taken = command.then if told["succeeded"] else command.otherwise
        return not _union(taken)
    return not command.writes or told.get("applied") is False or told.get("deleted") == 0


def _tells_version(told: Reply | None) -> bool:
    return told is not None and (
        "version" in told
        or any(map(_tells_version, told.get("results", ())))
        or any(map(_tells_version, told.get("items", ())))
    )


def _tells_revision(told: Reply) -> bool:
    return (
        "rev" in told
        or "created" in told
        or any(map(_tells_revision, [*told.get("results", ()), *told.get("items", ())]))
    )


def _add_hints(move: Move, versions: bool) -> None:
    """Fill in what is known of `move` beforehand; see Move."""
    command, told = move.command, move.told or {}
    move.wants = tuple((position, value) for position, value, _ in _found(command, told))
    if not move.steady:
        move.gives = tuple(_given(command, told))
    seen = move.rev if move.read_rev is None else move.read_rev
    if seen is None:
        seen = told.get("rev")
    if seen is not None:
        move.hint = seen if move.rev is not None else seen + 0.5
    if versions and "version" in told:
        if isinstance(command, Put | Incr):
            move.version = command.position, told["version"] - 1
        elif isinstance(command, Get):
            move.version = command.position, told["version"]


def _given(command: Command, told: Reply) -> Iterator[Value]:
    """The values that a command may leave, or have left meanwhile."""
    for part in _parts(command):
        if isinstance(part, Put):
            yield part.position, part.value
        elif isinstance(part, Delete):
            yield part.position, None
        elif isinstance(part, Incr) and part is command and "value" in told:
            yield part.position, told["value"]


def _found(command: Command, told: Reply) -> Iterator[tuple[int, str | None, int]]:
    """What a command must have found, by what was told of it: the position of a row, its value, and its revision (0
    where that was not told)."""
    if isinstance(command, Incr) and is_integer(told.get("value", "")):
        before = int(told["value"]) - command.by
        if before:  # else it was 0, or absent
            yield command.position, str(before), 0
    elif isinstance(command, Get) or (isinstance(command, Put | Delete) and told.get("applied") is False):
        if told.get("found") is False:
            yield command.position, None, 0
        elif "value" in told:
            yield command.position, told["value"], told.get("rev", 0)
    elif isinstance(command, Range):
        positions = dict(zip(command.keys, command.positions, strict=True))
        for item in told.get("items", ()):
            if "value" in item and item["key"] in positions:
                yield positions[item["key"]], item["value"], item.get("rev", 0)
    elif isinstance(command, Txn) and "succeeded" in told:
        written: set[int] = set()
        for part, result in zip(command.then if told["succeeded"] else command.otherwise, told.get("results", ())):
            yield from (found for found in _found(part, result) if found[0] not in written)
            written |= part.writes


def _recognise(component: Component) -> None:
    """Find the values that come but once. Where somebody saw one of an unknown move, and at which revision, that is the
    revision of the move: so it did happen, and where is known."""
    sources: dict[Value, Move | None] = {}
    for position in range(len(component.keys)):
        sources[position, None] = None
        if not component.deletes:
            component.once.add((position, None))
    for move in component.moves:
        for value in move.gives:
            if value in sources or value[0] in component.opaque:
                sources[value] = None
                component.once.discard(value)
            else:
                sources[value] = move
                component.once.add(value)
    for move in component.moves:
        for position, text, rev in _found(move.command, move.told or {}):
            source = sources.get((position, text))
            if rev > 0 and source is not None and source.told is None and source.rev is None:
                source.rev = source.hint = rev
                source.stamps = tuple(Stamp(rev, stamp.versions, stamp.choice) for stamp in source.stamps)
                component.bound.add(rev)
