"""What clients asked, what they were told, and when: the evidence that a history is judged by.

Laws:

* A history says only what clients saw: requests and replies as they were on the wire, and two times for each. It
  never holds anything that a server knows and told nobody.
* An operation whose outcome its client does not know stays open for ever: it may take effect at any moment after it
  was called, or never. Only an error that says "surely not done" (errors.py, `definite`) rules that out.

Theory. Times are numbers of one clock that all clients share, in any unit; only their order counts. An operation that
returned at 5 came before one that was called at 6, but is concurrent with one that was called at 5: where the clock
can't tell, nothing is claimed. Each attempt is an operation of its own: a client that asks again after an unknown
outcome has asked for two things, of which both may happen.

A history file is JSON lines, one operation each, in any order, so that `grep` and `jq` work on it:

    {"client":"c1","call":0.8,"return":1.2,"request":{"op":"put","key":"a","value":1},"reply":{"ok":true,"rev":7}}
    {"client":"c2","call":0.9,"return":null,"request":{"op":"incr","key":"n"},"reply":null}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from sys import float_info
from typing import Any, Final

from ddb.errors import BY_CODE, DdbError, Unreachable

DEFINITE: Final = frozenset(code for code, kind in BY_CODE.items() if kind.definite) | {Unreachable.code}


class BadHistory(DdbError):
    """A history that can't be read, or holds an operation that makes no sense."""

    code = "bad_history"


class Outcome(Enum):
    """What a client knows of its operation."""

    DONE = "done"
    UNKNOWN = "unknown"
    NOT_DONE = "not done"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request of one client.

    `request` and `reply` are as on the wire (docs/protocol.md); a reply need not hold all that ddb tells, and what it
    leaves out is not held against it. `reply` is None where none came, and `returned` is None where the client doesn't
    know when; a `returned` without a reply (the client gave up) is for pictures only.
    """

    client: str
    request: Mapping[str, Any]
    called: float
    returned: float | None = None
    reply: Mapping[str, Any] | None = None

    @property
    def outcome(self) -> Outcome:
        """Done, not done, or unknown, by what the reply says."""
        if self.reply is None:
            return Outcome.UNKNOWN
        if self.reply.get("ok", True) is True:
            return Outcome.DONE
        return Outcome.NOT_DONE if self.reply.get("error") in DEFINITE else Outcome.UNKNOWN

    def __str__(self) -> str:
        return f"{self.client}: {ask_in_short(self.request)} → {told_in_short(self)}"


def to_lines(history: Iterable[Operation]) -> Iterator[str]:
    """The lines of a history file, without line ends."""
    for operation in history:
        fields = {
            "client": operation.client,
            "call": operation.called,
            "return": operation.returned,
            "request": operation.request,
            "reply": operation.reply,
        }
        yield json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def from_lines(lines: Iterable[str]) -> list[Operation]:
    """The operations that the `lines` of a history file hold. Empty lines are passed over.

    Raises BadHistory, naming the line.
    """
    history = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            operation = Operation(
                fields["client"], fields["request"], fields["call"], fields.get("return"), fields.get("reply")
            )
            validate(operation)
        except BadHistory as error:
            raise BadHistory(f"Line {number} of the history: {error.message}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadHistory(f"Line {number} of the history is not an operation: {error!r}.") from None
        history.append(operation)
    return history


def validate(operation: Operation) -> None:
    """Raise BadHistory where `operation` can't have been: wrong types, a return before the call, a reply at no time."""
    if not isinstance(operation.client, str):
        raise BadHistory(f"`client` is a name, not {operation.client!r}.")
    if not isinstance(operation.request, Mapping) or not isinstance(operation.reply, Mapping | None):
        raise BadHistory("`request` is an object, and `reply` an object or null.")
    for name in ("items", "results"):
        parts = (operation.reply or {}).get(name, ())
        if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
            raise BadHistory(f"`{name}` is a list of objects.")
        if name == "items" and not all(isinstance(part.get("key"), str) for part in parts):
            raise BadHistory("An item has a `key`, a string.")
    if not _is_time(operation.called) or not (operation.returned is None or _is_time(operation.returned)):
        raise BadHistory("`call` is a number, and `return` a number or null.")
    if operation.returned is None:
        if operation.outcome is Outcome.DONE:
            raise BadHistory("What was answered has a time of its `return`.")
    elif operation.returned < operation.called:
        raise BadHistory(f"It returned at {operation.returned}, before its call at {operation.called}.")


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


# ---------------------------------------------------------------- in short


def ask_in_short(request: Mapping[str, Any]) -> str:
    """A request as a person would say it: `put a=1 if rev=3`."""
    op, key = request.get("op"), request.get("key")
    match op:
        case "put":
            text = f"put {key}={_json(request.get('value'))}"
        case "cas":
            text = f"cas {key} {_json(request.get('expect'))}→{_json(request.get('value'))}"
        case "incr":
            text = f"incr {key} by {request.get('by', 1)}"
        case "batch":
            text = f"batch {_parts(request.get('ops'))}"
        case "txn":
            text = f"txn {_parts(request.get('then'))}"
            if request.get("else"):
                text += f" else {_parts(request['else'])}"
        case "scan" | "count":
            where = request.get("prefix")
            text = (
                f"{op} {where}*" if where is not None else f"{op} {request.get('start', '')}…{request.get('end', '')}"
            )
        case _:
            text = f"{op} {key}"
    conditions = request.get("if") or []
    for condition in conditions if isinstance(conditions, list) else [conditions]:
        subjects = [name for name in ("rev", "version", "value", "exists") if name in condition]
        for name in subjects:
            of = f"{condition['key']}." if condition.get("key", key) != key else ""
            text += f" if {of}{name}{condition.get('op', '=')}{_json(condition[name])}"
    return text


def told_in_short(operation: Operation, revisions: bool = True) -> str:
    """What came back, as a person would say it: `1 (rev 3)`, or without `revisions` just `1`."""
    reply = operation.reply
    if operation.outcome is not Outcome.DONE or reply is None:
        return operation.outcome.value
    return _reply_in_short(reply, revisions)


def _reply_in_short(reply: Mapping[str, Any], revisions: bool) -> str:
    if reply.get("found") is False and "applied" not in reply:
        text = "absent"
    elif "results" in reply:
        succeeded = "" if reply.get("succeeded", True) else "else "
        text = f"{succeeded}[{', '.join(_reply_in_short(result, revisions) for result in reply['results'])}]"
    elif "items" in reply:
        text = f"{{{', '.join(_item(item) for item in reply['items'])}}}{'…' if reply.get('more') else ''}"
    elif "count" in reply:
        text = str(reply["count"])
    elif reply.get("applied") is False:
        text = "not applied"
    elif "value" in reply:
        text = _json(reply["value"])
    elif "deleted" in reply:
        text = "deleted" if reply["deleted"] else "nothing to delete"
    else:
        text = "ok"
    marks = [f"{name} {reply[name]}" for name in ("rev", "version") if revisions and reply.get(name)]
    return f"{text} ({', '.join(marks)})" if marks else text


def _item(item: Mapping[str, Any]) -> str:
    return f"{item.get('key')}={_json(item['value'])}" if "value" in item else str(item.get("key"))


def _parts(operations: Any) -> str:
    return "[" + ", ".join(ask_in_short(operation) for operation in operations or []) + "]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
