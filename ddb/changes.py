"""What has changed, page by page: for commands that go on from where something was read.

Laws: a page never ends in the middle of a revision, so what is behind it begins at the next one; a node that keeps
no more is not the last to be asked, for others may keep more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ddb.client import Client
from ddb.errors import Compacted, DdbError

PAGE_CHANGES: Final = 1000
Page = dict[str, Any]
"""A reply to `history` (docs/protocol.md)."""


def pages(
    client: Client,
    first: int,
    last: int | None = None,
    *,
    prefix: str | None = None,
    key: str | None = None,
    limit: int = PAGE_CHANGES,
    timeout_s: float | None = None,
) -> Iterator[Page]:
    """The changes from revision `first` on (to `last`, where it is given) of a `key`, of the keys that begin with
    `prefix`, or of all; at least one page of about `limit` of them. Raises Compacted where no node keeps them."""
    request: dict[str, Any] = {"op": "history", "limit": limit}
    request.update({} if last is None else {"to": last})
    request.update({} if prefix is None else {"prefix": prefix})
    request.update({} if key is None else {"key": key})
    while True:
        page = ask(client, {**request, "from": first}, timeout_s)
        yield page
        if not page["more"]:
            return
        first = page["changes"][-1]["rev"] + 1


def ask(client: Client, request: dict[str, Any], timeout_s: float | None = None) -> Page:
    """The reply to a request about the past, from any node that keeps it. Raises a DdbError."""
    try:
        return client.call(request, timeout_s=timeout_s)
    except Compacted:
        for address in client.servers:
            try:
                return client.call(request, at=address, timeout_s=timeout_s)
            except DdbError:
                continue
        raise
