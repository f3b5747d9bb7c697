"""What a client may ask of the past, and of what is to come: `history`, `get` at a revision, `watch`; checked, and in its
normal form.

Laws: what is wrong is refused before anybody is asked (see commands.py, whose rules for keys and prefixes hold here too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ddb.commands import prepare_read
from ddb.errors import BadRequest
from ddb.messages import Command

HISTORY_LIMIT: Final = 100  # changes, when the request doesn't say
HISTORY_LIMIT_MAX: Final = 1000
REVISION_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a watcher wants: the changes of the key `name`, or with `is_prefix` of all keys that begin so, from the revision
    `first` on (None: from now on)."""

    name: str
    is_prefix: bool
    first: int | None

    def includes(self, key: str) -> bool:
        """Whether the changes of `key` are wanted."""
        return key.startswith(self.name) if self.is_prefix else key == self.name


def prepare(request: dict[str, Any]) -> Command:
    """Judge a `history`, or a `get` with a `rev`; the returned command is to be answered by `Chronicle.answer`. Raises
    BadRequest and TooLarge."""
    if request.get("op") == "get":
        rev = _revision(request, "rev")
        return ["get_at", prepare_read({"op": "get", "key": request.get("key")})[1], rev]
    limit = request.get("limit", HISTORY_LIMIT)
    if type(limit) is not int or not 1 <= limit <= HISTORY_LIMIT_MAX:
        raise BadRequest(f"`limit` must be a whole number from 1 to {HISTORY_LIMIT_MAX}.")
    reverse = request.get("reverse", False)
    if type(reverse) is not bool:
        raise BadRequest("`reverse` must be true or false.")
    first, last = (_revision(request, name) if request.get(name) is not None else None for name in ("from", "to"))
    return ["history", {**_range(request), "from": first, "to": last, "limit": limit, "reverse": reverse}]


def prepare_watch(request: dict[str, Any]) -> Wanted:
    """Judge a `watch`. Raises BadRequest and TooLarge."""
    first = _revision(request, "from") if request.get("from") is not None else None
    key, prefix = request.get("key"), request.get("prefix")
    if (key is None) is (prefix is None):
        raise BadRequest('Say what to watch: either a `key`, or a `prefix` ("" for all keys).')
    name: str = _range(request)["start"]
    return Wanted(name, key is None, first)


def _range(request: dict[str, Any]) -> dict[str, Any]:
    """The range of the keys meant by `key`, or by `prefix`, or by neither."""
    key, prefix = request.get("key"), request.get("prefix")
    if key is None:
        range: dict[str, Any] = prepare_read({"op": "count", "prefix": prefix})[1]
        return range
    if prefix is not None:
        raise BadRequest("Give either a `key` or a `prefix`, not both.")
    key = prepare_read({"op": "get", "key": key})[1]
    return {"start": key, "end": key + "\0"}


def _revision(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if type(value) is not int or not 0 <= value <= REVISION_MAX:
        raise BadRequest(f"`{name}` is a revision: a whole number from 0 on.")
    return value
