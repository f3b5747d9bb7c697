"""ddb: a replicated key/value database in pure standard-library Python.

    import ddb

    with ddb.connect("127.0.0.1:8050") as db:
        db.put("city", "Oslo")

`connect` and `Client` are described in ddb/client.py, the errors in ddb/errors.py. Both are loaded when they are first
asked for, so that `import ddb` alone costs nothing: every server and tool in this package passes through here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "4.0.0"
__all__ = ["Client", "DdbError", "OutcomeUnknown", "__version__", "connect"]

if TYPE_CHECKING:
    from ddb.client import Client, connect
    from ddb.errors import DdbError, OutcomeUnknown

_HOMES = {"connect": "client", "Client": "client", "DdbError": "errors", "OutcomeUnknown": "errors"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ddb.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ddb' has no attribute {name!r}")
