"""What a client may ask of the data, and the one normal form in which the log keeps it.

Laws:

* A request is judged here, whole, before anything is proposed or waits for a quorum. What passes can be applied;
  whatever could still refuse it depends on the data alone (kv.py), so every node refuses it alike.
* Only what is needed to apply a command enters the log: `id`, `timeout` and unknown fields never do.
* The leader applies the command that `prepare` returns, the followers the decoding of its bytes. Both give the
  same rows, byte for byte.

Theory. A *command* is a JSON array, its name first. The shapes, with `?` where a part may be missing:

    ["put", KEY, VALUE, OPTIONS?]                     ["delete", KEY, {"if": [CONDITION, …]}?]
    ["incr", KEY, BY]                                 ["batch", [PUT or DELETE, …]]
    ["txn", [CONDITION, …], [COMMAND, …], [COMMAND, …]]
    ["get", KEY]    ["scan", RANGE]    ["count", RANGE]
    ["session_open"]    ["session_close", CLIENT]     ["lease_grant", TTL in ms]    ["lease_revoke", LEASE]
    ["once", CLIENT, SEQ, COMMAND]                    any write of a session but those that open or close one

    OPTIONS:   {"if": [CONDITION, …]}, {"lease": LEASE}, or both in one
    CONDITION: {"key": KEY, "op": "=", "rev": 12}, or "version", "value" or "exists" in the place of "rev"
    RANGE:     {"start": KEY, "end": KEY or null}, in a scan with "limit", "reverse" and "keys_only" besides

A prefix becomes a range, a condition's `key` and `op` are filled in, so whoever reads the log needs no rules to
understand it. In the form that `prepare` returns, a value to be put is already encoded: it is `bytes`, which JSON
never decodes to, so the machine can't take one for the other. A value is encoded once on the leader's way, and
the encoding is what rows keep.

A field on which a client's safety hangs (`client`, `seq`, `lease`) is refused where it has no effect: who believes a
retry safe must not be left in that belief.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from ddb.errors import BadRequest, TooLarge
from ddb.messages import Command
from ddb.wire import Quote, check_own, encode, encode_string

KEY_BYTES_MAX: Final = 4096
ENTRY_BYTES_MAX: Final = 16 << 20  # of one command in the log
OPERATIONS_MAX: Final = 10_000  # in one batch or txn
RANGE_READS_MAX: Final = 100  # scans and counts in one txn, for each may walk all the data
SCAN_LIMIT: Final = 1000  # items, when the request doesn't say
SCAN_LIMIT_MAX: Final = 10_000

TTL_MS_MAX: Final = 365 * 24 * 3600 * 1000  # of a lease
SEQ_MAX: Final = 2**53

SESSION_WRITES: Final = frozenset({"session_open", "session_close"})
WRITES: Final = frozenset({"put", "delete", "incr", "batch", "txn", "lease_grant", "lease_revoke"}) | SESSION_WRITES
READS: Final = frozenset({"get", "scan", "count"})
COMPARISONS: Final = frozenset({"=", "!=", "<", ">"})
SUBJECTS: Final = ("rev", "version", "value", "exists")

_UNUSUAL: Final = frozenset({"if", "lease", "client", "seq"})
_MISSING: Final = object()

Prepared = tuple[bytes, Command]


def prepare(request: dict[str, Any], quote: Quote = encode_string) -> Prepared:
    """Judge a write request. `quote` encodes the strings in it (wire.quoter).

    Returns its log entry, encoded, and the command that this entry says. Raises BadRequest or TooLarge with a
    sentence for the client. The order of `request`'s fields, and fields it doesn't know, make no difference.
    """
    op = request.get("op")
    if op == "put" and (plain := _plain_put(request, quote)) is not None:
        if len(plain[0]) > ENTRY_BYTES_MAX:
            raise _too_large(plain[0])
        return plain
    if op == "batch":
        prepared = _batch(request, quote)
    elif type(op) is str and op in _PREPARE:
        prepared = _PREPARE[op](request)
    else:
        raise BadRequest(f"{_shown(op)} is not a write; the writes are {_listed(sorted(WRITES))}.")
    if request.get("client") is not None or request.get("seq") is not None:
        prepared = _once(request, *prepared)
    return _sized(prepared)


def prepare_read(request: dict[str, Any]) -> Command:
    """Judge a read request (get, scan, count), and return the command to be answered later by `kv.answer`.

    Raises BadRequest or TooLarge. `read` and `max_lag` are the node's to look at: they say where and when to read.
    """
    op = request.get("op")
    if op == "get":
        key = request.get("key")
        if type(key) is str and 0 < len(key) <= 1024:
            return ["get", key]
        return ["get", _key(request)]
    if op == "scan":
        return ["scan", _scan(request)]
    if op == "count":
        return ["count", _range(request)]
    raise BadRequest(f"{_shown(op)} is not a read; the reads are {_listed(sorted(READS))}.")


def well_formed(entry: bytes, command: Any) -> bool:
    """Whether `command`, decoded from `entry`, has one of the shapes above.

    A leader asks this of what another member forwards. An entry that the machine can't apply would, once it is
    committed, stop every node, and stop it again at each start.
    """
    if len(entry) > ENTRY_BYTES_MAX or type(command) is not list or not command:
        return False
    try:
        check_own(entry, flat=type(command[-1]) is str and len(command) == 3)
    except BadRequest:
        return False
    if command[0] == "put" and len(command) == 3:
        return _is_key(command[1])
    return type(command[0]) is str and command[0] in _FORWARDED and _has_shape(command)


def prefix_end(prefix: str) -> str | None:
    """The least string above every string that begins with `prefix`; None where there is none.

    Keys are ordered by code points, which is the order of their UTF-8 bytes. The surrogates between U+D7FF and
    U+E000 are no characters, and nothing comes after U+10FFFF.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    last = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if last == 0xD800 else last)


# ------------------------------------------------------------------ writes


def _sized(prepared: Prepared) -> Prepared:
    if len(prepared[0]) > ENTRY_BYTES_MAX:
        raise _too_large(prepared[0])
    return prepared


def _too_large(entry: bytes) -> TooLarge:
    return TooLarge(f"The write takes {len(entry)} bytes in the log, where {ENTRY_BYTES_MAX} are allowed; split it.")


def _plain_put(request: dict[str, Any], quote: Quote) -> Prepared | None:
    """What `_put` makes of a put with nothing but a key and a value, in a third of the time: most writes are such. None
    where it takes a closer look."""
    key = request.get("key")
    value = request.get("value", _MISSING)
    if len(request) > 3 and not _UNUSUAL.isdisjoint(request):  # three are `op`, and these two
        return None
    # 1024 characters are 4096 bytes at most; a longer key is measured by `_key`.
    if type(key) is not str or not 0 < len(key) <= 1024 or value is _MISSING:
        return None
    data = quote(value) if type(value) is str else encode(value)
    return b'["put",%b,%b]' % (quote(key), data), ["put", key, data]


def _put(request: dict[str, Any]) -> Prepared:
    key = _key(request)
    if "value" not in request:
        raise BadRequest("A put needs a `value`: any JSON value, null included.")
    value = request["value"]
    data = encode_string(value) if type(value) is str else encode(value)
    options: dict[str, Any] = {}
    conditions = _conditions(request, key)
    if conditions is not None:
        options["if"] = conditions
    if request.get("lease") is not None:
        options["lease"] = _id(request, "lease")
    if not options:
        return b'["put",%b,%b]' % (encode_string(key), data), ["put", key, data]
    return b'["put",%b,%b,%b]' % (encode_string(key), data, encode(options)), ["put", key, data, options]


def _delete(request: dict[str, Any]) -> Prepared:
    key = _key(request)
    _refuse_lease(request)
    conditions = _conditions(request, key)
    command: Command = ["delete", key] if conditions is None else ["delete", key, {"if": conditions}]
    return encode(command), command


def _incr(request: dict[str, Any]) -> Prepared:
    key = _key(request)
    _refuse_lease(request)
    _refuse_condition(request, "incr")
    by = request.get("by", 1)
    if type(by) is not int:
        raise BadRequest(f"`by` must be a whole number, not {_shown(by)}.")
    command: Command = ["incr", key, by]
    return encode(command), command


def _batch(request: dict[str, Any], quote: Quote) -> Prepared:
    _refuse_lease(request)
    _refuse_condition(request, "batch")
    if "ops" not in request:
        raise BadRequest('A batch needs `ops`: a list like [{"op":"put","key":"a","value":1}].')
    entry, commands = _operations(request, "ops", {"put": _put, "delete": _delete}, quote)
    return b'["batch",%b]' % entry, ["batch", commands]


def _txn(request: dict[str, Any]) -> Prepared:
    _refuse_lease(request)
    conditions = _conditions(request, None) or []
    then, then_commands = _operations(request, "then", _IN_TXN)
    other, other_commands = _operations(request, "else", _IN_TXN)
    for name, commands in (("then", then_commands), ("else", other_commands)):
        if sum(c[0] in ("scan", "count") for c in commands) > RANGE_READS_MAX:
            raise TooLarge(f"`{name}` has more than {RANGE_READS_MAX} scans and counts; split the transaction.")
    return b'["txn",%b,%b,%b]' % (encode(conditions), then, other), ["txn", conditions, then_commands, other_commands]


def _session_open(request: dict[str, Any]) -> Prepared:
    if request.get("client") is not None or request.get("seq") is not None:
        raise BadRequest("A session is opened without `client` and `seq`; the reply says which `client` it is.")
    return b'["session_open"]', ["session_open"]


def _session_close(request: dict[str, Any]) -> Prepared:
    if request.get("seq") is not None:
        raise BadRequest("A session is closed without `seq`; to close it twice does no harm.")
    command: Command = ["session_close", _id(request, "client")]
    return encode(command), command


def _lease_grant(request: dict[str, Any]) -> Prepared:
    ttl_s: Any = request.get("ttl")
    if ttl_s.__class__ not in (int, float) or not 0.001 <= ttl_s <= TTL_MS_MAX / 1000:
        raise BadRequest(
            f"`ttl` is how long a lease lives without a keep-alive: 0.001 to {TTL_MS_MAX // 1000} seconds, "
            f"not {_shown(ttl_s)}."
        )
    command: Command = ["lease_grant", math.ceil(round(ttl_s * 1000, 6))]
    return encode(command), command


def _lease_revoke(request: dict[str, Any]) -> Prepared:
    command: Command = ["lease_revoke", _id(request, "lease")]
    return encode(command), command


def _once(request: dict[str, Any], entry: bytes, command: Command) -> Prepared:
    """The write `command` as one of a session."""
    if command[0] in SESSION_WRITES:
        return entry, command
    client, seq = _id(request, "client"), _id(request, "seq")
    return b'["once",%d,%d,%b]' % (client, seq, entry), ["once", client, seq, command]


def lease_of(request: dict[str, Any]) -> int:
    """The id in the `lease` field of a request. Raises BadRequest."""
    return _id(request, "lease")


def _id(request: dict[str, Any], name: str) -> int:
    number: Any = request.get(name)
    if not _is_id(number):
        raise BadRequest(f"{_ID_MEANS[name]}, not {_shown(number)}.")
    return int(number)


def _is_id(number: Any) -> bool:
    return type(number) is int and 0 < number <= SEQ_MAX


_ID_MEANS: Final = {
    "lease": "`lease` is the number that lease_grant answered",
    "client": "`client` is the number that session_open answered, and `seq` goes with it",
    "seq": "`seq` is a whole number from 1 on that grows with each new write of the session, and `client` goes with it",
}


def _operations(
    request: dict[str, Any],
    field: str,
    known: dict[str, Callable[[dict[str, Any]], Prepared]],
    quote: Quote = encode_string,
) -> tuple[bytes, list[Command]]:
    """The list of operations in `field` (none when it is missing), encoded and as commands."""
    operations = request.get(field, [])
    if type(operations) is not list:
        raise BadRequest(f"`{field}` must be a list of operations, not {_shown(operations)}.")
    if len(operations) > OPERATIONS_MAX:
        raise TooLarge(f"`{field}` has {len(operations)} operations, where {OPERATIONS_MAX} are allowed; split it.")
    entries: list[bytes] = []
    commands: list[Command] = []
    for number, operation in enumerate(operations):
        op = operation.get("op") if type(operation) is dict else None
        prepare_op = known.get(op) if type(op) is str else None
        if prepare_op is None:
            raise BadRequest(
                f"`{field}`[{number}] must be an object whose `op` is {_listed(sorted(known), 'or')}, "
                f"not {_shown(operation if op is None else op)}."
            )
        try:
            prepared = _plain_put(operation, quote) if op == "put" else None
            if prepared is None:
                if operation.get("if") is not None:
                    raise BadRequest("an operation has no condition of its own here; use the `if` of a txn.")
                if operation.get("client") is not None or operation.get("seq") is not None:
                    raise BadRequest("`client` and `seq` belong to the whole request, not to an operation.")
                prepared = prepare_op(operation)
        except BadRequest as error:
            raise BadRequest(f"`{field}`[{number}]: {error.message}") from None
        entries.append(prepared[0])
        commands.append(prepared[1])
    return b"[%b]" % b",".join(entries), commands


# -------------------------------------------------------------- conditions


def _conditions(request: dict[str, Any], own_key: str | None) -> list[dict[str, Any]] | None:
    """The conditions in `if`, normalised; None where there is no `if`."""
    given = request.get("if")
    if given is None:
        return None
    conditions = given if type(given) is list else [given]
    if len(conditions) > OPERATIONS_MAX:
        raise TooLarge(f"`if` has {len(conditions)} conditions, where {OPERATIONS_MAX} are allowed.")
    return [_condition(condition, own_key) for condition in conditions]


def _condition(condition: Any, own_key: str | None) -> dict[str, Any]:
    if type(condition) is not dict:
        raise BadRequest(f'A condition is an object like {{"key":"a","rev":12}}, not {_shown(condition)}.')
    if own_key is None or "key" in condition:
        key = _key(condition, "A condition's `key`")
    else:
        key = own_key
    op = condition.get("op", "=")
    if type(op) is not str or op not in COMPARISONS:
        raise BadRequest(f"A condition's `op` is {_listed(['=', '!=', '<', '>'], 'or')}, not {_shown(op)}.")
    subjects = [name for name in SUBJECTS if name in condition]
    if len(subjects) != 1:
        raise BadRequest("A condition tests exactly one of `rev`, `version`, `value` and `exists`.")
    (subject,) = subjects
    wanted = condition[subject]
    if subject in ("rev", "version") and (type(wanted) is not int or wanted < 0):
        raise BadRequest(f"A condition's `{subject}` is a whole number, 0 for an absent key, not {_shown(wanted)}.")
    if subject == "exists" and (type(wanted) is not bool or op not in ("=", "!=")):
        raise BadRequest("A condition's `exists` is true or false, compared with `=` or `!=`.")
    return {"key": key, "op": op, subject: wanted}


# ------------------------------------------------------------------- reads


def _scan(request: dict[str, Any]) -> dict[str, Any]:
    limit = request.get("limit", SCAN_LIMIT)
    if type(limit) is not int or not 1 <= limit <= SCAN_LIMIT_MAX:
        raise BadRequest(f"`limit` must be a whole number from 1 to {SCAN_LIMIT_MAX}, not {_shown(limit)}.")
    flags = {name: request.get(name, False) for name in ("reverse", "keys_only")}
    for name, value in flags.items():
        if type(value) is not bool:
            raise BadRequest(f"`{name}` must be true or false, not {_shown(value)}.")
    return {**_range(request), "limit": limit, **flags}


def _range(request: dict[str, Any]) -> dict[str, Any]:
    bounds = {name: request.get(name) for name in ("prefix", "start", "end")}
    for name, value in bounds.items():
        if value is not None:
            # The next page begins behind the longest key; the end of a prefix may be longer than the prefix.
            _check_key_size(value, f"`{name}`", KEY_BYTES_MAX + (0 if name == "prefix" else 4))
    prefix, start, end = bounds["prefix"], bounds["start"], bounds["end"]
    if prefix is None:
        return {"start": start or "", "end": end}
    if start is not None or end is not None:
        raise BadRequest("Give either `prefix`, or `start` and `end`, not both.")
    return {"start": prefix, "end": prefix_end(prefix)}


# ------------------------------------------------- commands of other members


def _has_shape(command: Any) -> bool:
    match command:
        case ["put", key, _] | ["delete", key] | ["get", key]:
            return _is_key(key)
        case ["delete", key, {"if": conditions, **more}]:
            return _is_key(key) and not more and _are_conditions(conditions)
        case ["put", key, _, {**options}]:
            return _is_key(key) and _are_options(options)
        case ["incr", key, by]:
            return _is_key(key) and type(by) is int
        case ["scan", {"start": str(), "end": str() | None, "limit": limit, "reverse": bool(), "keys_only": bool()}]:
            return type(limit) is int and 1 <= limit <= SCAN_LIMIT_MAX
        case ["count", {"start": str(), "end": str() | None}]:
            return True
        case ["batch", list(commands)]:
            return _are_commands(commands, ("put", "delete"))
        case ["txn", conditions, list(then), list(other)]:
            known = tuple(_IN_TXN)
            return _are_conditions(conditions) and _are_commands(then, known) and _are_commands(other, known)
        case ["session_open"]:
            return True
        case ["session_close" | "lease_revoke", number]:
            return _is_id(number)
        case ["lease_grant", ttl_ms]:
            return type(ttl_ms) is int and 0 < ttl_ms <= TTL_MS_MAX
        case ["once", client, seq, [str(op), *_] as command]:
            return _is_id(client) and _is_id(seq) and op in WRITES - SESSION_WRITES and _has_shape(command)
    return False


def _are_commands(commands: list[Any], known: tuple[str, ...]) -> bool:
    return len(commands) <= OPERATIONS_MAX and all(
        type(c) is list and c and c[0] in known and _has_shape(c) and _is_unconditional(c) for c in commands
    )


def _is_unconditional(command: list[Any]) -> bool:
    options = command[3:] if command[0] == "put" else command[2:] if command[0] == "delete" else []
    return not options or "if" not in options[0]


def _are_options(options: dict[Any, Any]) -> bool:
    return (
        bool(options)
        and options.keys() <= {"if", "lease"}
        and ("if" not in options or _are_conditions(options["if"]))
        and ("lease" not in options or _is_id(options["lease"]))
    )


def _are_conditions(conditions: Any) -> bool:
    try:
        return type(conditions) is list and [_condition(c, None) for c in conditions] == conditions
    except (BadRequest, TooLarge):
        return False


def _is_key(key: Any) -> bool:
    return type(key) is str and len(key) > 0 and (len(key) <= 1024 or len(key.encode()) <= KEY_BYTES_MAX)


# ------------------------------------------------------------------- parts


def _key(request: dict[str, Any], name: str = "`key`") -> str:
    key: Any = request.get("key")
    _check_key_size(key, name)
    if not key:
        raise BadRequest(f"{name} must not be empty.")
    return str(key)


def _check_key_size(key: Any, name: str, bytes_max: int = KEY_BYTES_MAX) -> None:
    if type(key) is not str:
        raise BadRequest(f"{name} must be a string, not {_shown(key)}.")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds an unpaired surrogate.") from None
    if size > bytes_max:
        raise TooLarge(f"{name} has {size} bytes, where {bytes_max} are allowed.")


def _refuse_lease(request: dict[str, Any]) -> None:
    if request.get("lease") is not None:
        raise BadRequest("Only a put takes a `lease`.")


def _refuse_condition(request: dict[str, Any], op: str) -> None:
    if request.get("if") is not None:
        raise BadRequest(f"The op {op} takes no `if`; put it into a txn, whose `if` guards it.")


def _shown(value: Any) -> str:
    """`value` as a sentence can show it: as JSON, and short."""
    if value is None:
        return "null or nothing"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = encode(value).decode() if not isinstance(value, str) else encode_string(value[:60]).decode()
    return text if len(text) <= 60 else text[:57] + "…"


def _listed(names: list[str], word: str = "and") -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def _prepared_read(request: dict[str, Any]) -> Prepared:
    if request.get("op") == "get" and "rev" in request:
        raise BadRequest("A get within a transaction sees what is there now; ask for a `rev` outside of it.")
    command = prepare_read(request)
    return encode(command), command


_PREPARE: Final[dict[str, Callable[[dict[str, Any]], Prepared]]] = {
    "put": _put,
    "delete": _delete,
    "incr": _incr,
    "txn": _txn,
    "session_open": _session_open,
    "session_close": _session_close,
    "lease_grant": _lease_grant,
    "lease_revoke": _lease_revoke,
}
_FORWARDED: Final = WRITES | {"once"}
_IN_TXN: Final[dict[str, Callable[[dict[str, Any]], Prepared]]] = {
    "put": _put,
    "delete": _delete,
    "incr": _incr,
    "get": _prepared_read,
    "scan": _prepared_read,
    "count": _prepared_read,
}
