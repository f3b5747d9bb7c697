"""ddb: a replicated key/value database in pure standard-library Python.

    import ddb

    with ddb.connect("127.0.0.1:8050") as db:
        db.put("city", "Oslo")

`connect` and `Client` are described in ddb/client.py, `aio.connect` and its client for asyncio in ddb/aio.py, the errors
in ddb/errors.py. All are loaded when they are first asked for, so that `import ddb` alone costs nothing: every server
and tool in this package passes through here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "4.0.0"
__all__ = [
    "Client", "Compacted", "Conflict", "DdbError", "LockLost", "NotInTime", "OutcomeUnknown", "SessionExpired",
    "__version__", "aio", "connect",
]  # fmt: skip

if TYPE_CHECKING:
    from ddb import aio
    from ddb.client import Client, connect
    from ddb.errors import Compacted, Conflict, DdbError, LockLost, NotInTime, OutcomeUnknown, SessionExpired

_ERRORS = ("Compacted", "Conflict", "DdbError", "LockLost", "NotInTime", "OutcomeUnknown", "SessionExpired")
_HOMES = {"connect": "client", "Client": "client", **dict.fromkeys(_ERRORS, "errors")}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ddb.{_HOMES[name]}"), name)
    if name == "aio":
        return importlib.import_module("ddb.aio")
    raise AttributeError(f"module 'ddb' has no attribute {name!r}")
