"""What stands at which path: HTTP requests as native ones, replies as responses.

The table at the end of docs/protocol.md, in code. Each handler looks at one request and says what to ask the
service, and how to show the answer. The choices that the table leaves open:

* A stored string is shown as text, any other value as JSON; with `Accept: application/json` all is JSON.
* `ETag` is the key's revision. `If-Match` and `If-None-Match` become the condition of the write, so they are
  judged where the log orders it, not by a look beforehand.
* A failure has the native reply as its body. `no_leader`, `timeout`, `overloaded`, `read_only` and `shutting_down` are
  503 with `Retry-After`; `not_leader` (only after `forward=false`) is 307 to the leader, where it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ddb.errors import BadRequest
from ddb.http import (
    EVENTS_TYPE,
    JSON_TYPE,
    TEXT_TYPE,
    Ask,
    Handler,
    HttpError,
    NotFound,
    Request,
    Response,
    Route,
    failed,
    key_of,
    refusal,
    status_of,
)
from ddb.wire import decode, decode_trusted, decode_value, encode

Show = Callable[[bytes], Response]
_FLAGS: Final = {"": True, "1": True, "true": True, "0": False, "false": False}


# ------------------------------------------------------------------- tables


def node_routes() -> tuple[Route, ...]:
    """What a node serves."""
    return (
        Route("/kv", {"GET": scan}),
        Route("/kv/", {"GET": get, "PUT": put, "DELETE": delete}),
        Route("/watch", {"GET": watch}),
        Route("/history", {"GET": history}),
        Route("/members", {"GET": operation("members")}),
        *_common_routes(),
    )


def registry_routes() -> tuple[Route, ...]:
    """What the registry serves."""
    return (Route("/nodes", {"GET": operation("nodes")}), *_common_routes())


def _common_routes() -> tuple[Route, ...]:
    return (
        Route("/rpc", {"POST": rpc}),
        Route("/status", {"GET": operation("status")}),
        Route("/healthz", {"GET": healthz}),
        Route("/readyz", {"GET": operation("ready")}),
    )


# ----------------------------------------------------------- whole requests


def operation(op: str) -> Handler:
    """The handler that asks for `op`, without fields."""
    return lambda request: Ask({"op": op}, show_json(request))


def rpc(request: Request) -> Ask:
    """Any native request, as the body."""
    return Ask(decode(request.body), show_json(request))


def healthz(request: Request) -> Response:
    """The process is up: it has just answered."""
    return Response(200, b'{"ok":true}')


def show_json(request: Request) -> Show:
    """Show a reply as it is, with the status that fits."""
    return lambda reply: Response(200, reply) if _is_ok(reply) else _show_failure(request, reply)


def _is_ok(reply: bytes) -> bool:
    return reply.startswith(b'{"ok":true')


def _show_failure(request: Request, reply: bytes) -> Response:
    content = decode_trusted(reply)
    leader = content.get("leader")
    location = f"http://{leader}{request.target}" if isinstance(leader, str) else None
    return failed(status_of(content["error"]), reply, location)


# ----------------------------------------------------------------- the keys


def get(request: Request) -> Ask:
    """The value itself; 304 where the client has it, 412 where `If-Match` wants another."""

    def show(reply: bytes) -> Response:
        if not _is_ok(reply):
            return _show_failure(request, reply)
        content = decode_trusted(reply)
        if not content["found"]:
            return refusal(NotFound(f"No key {key!r} is here.") if not request.headers.get("if-match") else _not_met())
        headers = (_etag(content), ("Cache-Control", "no-cache"), ("X-Ddb-Version", str(content["version"])))
        if not _matches(request.headers.get("if-match", "*"), content["rev"]):
            return refusal(_not_met())
        if _matches(request.headers.get("if-none-match", ""), content["rev"]):
            return Response(304, headers=headers)
        value = content["value"]
        if isinstance(value, str) and JSON_TYPE not in request.headers.get("accept", ""):
            return Response(200, value.encode(), TEXT_TYPE, headers)
        return Response(200, encode(value), JSON_TYPE, headers)

    key = key_of(request, "/kv/")
    content = {"op": "get", "key": key, **_read_options(request)}
    if "rev" in request.query:
        content["rev"] = _number(request.query["rev"], "rev", int)
    return Ask(content, show)


def put(request: Request) -> Ask | Response:
    """Store the body. 201 where that created the key, else 200; 412 where the condition does not hold."""

    def show(reply: bytes) -> Response:
        if not _is_ok(reply):
            return _show_failure(request, reply)
        content = decode_trusted(reply)
        if content.get("applied") is False:
            return Response(412, reply)
        return Response(201 if content.get("version") == 1 else 200, reply, headers=(_etag(content),))

    return _write(request, {"op": "put", "key": key_of(request, "/kv/"), "value": _value(request)}, show)


def delete(request: Request) -> Ask | Response:
    """Remove the key: 204, or 404 where there was none."""

    def show(reply: bytes) -> Response:
        if not _is_ok(reply):
            return _show_failure(request, reply)
        content = decode_trusted(reply)
        if content.get("applied") is False:
            return Response(412, reply)
        return Response(204) if content["deleted"] else refusal(NotFound(f"No key {key!r} is here."))

    key = key_of(request, "/kv/")
    return _write(request, {"op": "delete", "key": key}, show)


def scan(request: Request) -> Ask:
    """The keys that begin with `prefix`, or from `start` up to `end`."""
    query = request.query
    content: dict[str, Any] = {"op": "scan", **_read_options(request)}
    content.update({name: query[name] for name in ("prefix", "start", "end") if name in query})
    content.update({name: _flag(query[name], name) for name in ("reverse", "keys_only") if name in query})
    if "limit" in query:
        content["limit"] = _number(query["limit"], "limit", int)
    return Ask(content, show_json(request))


def watch(request: Request) -> Ask | Response:
    """The changes of a `key`, or of the keys that begin with `prefix`, as server-sent events; `from` a revision on, or behind
    the one that `Last-Event-ID` names, which is what a browser sends that connects again."""
    if request.method == "HEAD":
        return Response(200, b"", EVENTS_TYPE)
    content = {"op": "watch", **_what(request), **_write_options(request)}
    if "key" not in content:
        content.setdefault("prefix", "")
    last = request.headers.get("last-event-id")
    if last:
        content["from"] = _number(last, "Last-Event-ID", int) + 1
    return Ask(content, show_json(request))


def history(request: Request) -> Ask:
    """What has changed: of a `key`, of the keys that begin with `prefix`, or of all."""
    content: dict[str, Any] = {"op": "history", **_what(request), **_read_options(request)}
    content.update({name: _number(request.query[name], name, int) for name in ("to", "limit") if name in request.query})
    if "reverse" in request.query:
        content["reverse"] = _flag(request.query["reverse"], "reverse")
    return Ask(content, show_json(request))


def _what(request: Request) -> dict[str, Any]:
    """Whose changes, and from where on."""
    query = request.query
    content: dict[str, Any] = {name: query[name] for name in ("key", "prefix") if name in query}
    if "from" in query:
        content["from"] = _number(query["from"], "from", int)
    return content


def _write(request: Request, content: dict[str, Any], show: Show) -> Ask | Response:
    conditions: list[dict[str, Any]] = []
    for header, on_equal in (("if-match", True), ("if-none-match", False)):
        tags = request.headers.get(header)
        if tags is None:
            continue
        if tags == "*":
            conditions.append({"exists": on_equal})
            continue
        revisions = _revisions(tags)
        if on_equal and len(revisions) > 1:
            raise BadRequest("If-Match takes one ETag here.")
        if on_equal and not revisions:
            return refusal(_not_met())  # an ETag that is not ours can't match
        conditions += [{"rev": rev, "op": "=" if on_equal else "!="} for rev in revisions]
    if conditions:
        content["if"] = conditions
    for name in ("client", "seq", "lease"):
        if name in request.query:
            content[name] = _number(request.query[name], name, int)
    return Ask({**content, **_write_options(request)}, show)


def _value(request: Request) -> Any:
    """The value in the body: JSON where the client says so, else text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON_TYPE or kind.endswith("+json"):
        return decode_value(request.body)
    try:
        return request.body.decode()
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8; send text, or JSON with Content-Type: application/json.") from None


# ------------------------------------------------------- headers and queries


def _etag(content: dict[str, Any]) -> tuple[str, str]:
    return ("ETag", f'"{content["rev"]}"')


def _revisions(tags: str) -> list[int]:
    """The revisions that a list of ETags names. Others, and weak ones, are not ours, and match nothing."""
    found = [tag.strip().strip('"') for tag in tags.split(",") if tag.strip()[:1] == '"']
    return [int(tag) for tag in found if tag.isascii() and tag.isdigit() and len(tag) < 20]


def _matches(tags: str, rev: int) -> bool:
    return tags.strip() == "*" or rev in _revisions(tags.replace("W/", ""))


def _not_met() -> HttpError:
    return HttpError(412, "The key has another revision than If-Match asks for; read it again.")


def _write_options(request: Request) -> dict[str, Any]:
    """The fields of any request that a query may carry."""
    options: dict[str, Any] = {}
    if "timeout" in request.query:
        options["timeout"] = _number(request.query["timeout"], "timeout", float)
    if "forward" in request.query:
        options["forward"] = _flag(request.query["forward"], "forward")
    return options


def _read_options(request: Request) -> dict[str, Any]:
    options = _write_options(request)
    if "read" in request.query:
        options["read"] = request.query["read"]
    if "max_lag" in request.query:
        options["max_lag"] = _number(request.query["max_lag"], "max_lag", float)
    return options


def _number(text: str, name: str, kind: type[int] | type[float]) -> int | float:
    try:
        if not text.isascii() or "_" in text or len(text) > 30:
            raise ValueError
        number = kind(text)
        if number - number != 0:  # NaN and Infinity
            raise ValueError
        return number
    except ValueError:
        raise BadRequest(f"`{name}` must be a number.") from None


def _flag(text: str, name: str) -> bool:
    try:
        return _FLAGS[text.lower()]
    except KeyError:
        raise BadRequest(f"`{name}` must be true or false.") from None
