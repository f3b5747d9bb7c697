"""The ledger: what the state machine remembers beside the rows.

Laws:

* A record changes only when an entry of the log is applied, so every node has the same ones.
* A record counts in the machine's digest just as a row does: two nodes that remember different things disagree.
* All of it is in memory. Each kind of record is bounded by who writes it (sessions.py, leasebook.py).

Theory. A *record* is a short text in compact JSON under a name that begins with its kind:

    session/12       [LAST REVISION THAT USED IT, HIGHEST SEQ WHOSE REPLY IS FORGOTTEN]
    session/12/5     the reply to the write 5 of session 12
    lease/14         its time to live in milliseconds
    leased/KEY       the lease that KEY is attached to

One small record for each fact, rather than a large one for each owner: what a write costs here doesn't depend on
how many replies a session keeps, or on how many keys a lease has. A checkpoint writes the records that have changed
since the last one, in one transaction with the rows (store.py).
"""

from __future__ import annotations

from zlib import crc32

__all__ = ["Ledger", "record_checksum"]

Records = dict[str, bytes | None]


def record_checksum(name: str, value: bytes) -> int:
    """The CRC-32 that a record carries: of the name, LF and the value. Compact JSON holds no line feed."""
    return crc32(b"%b\n%b" % (name.encode(), value))


class Ledger:
    """Named records. `growth` is what the changes since it was last set to 0 add to the digest; it may be negative."""

    __slots__ = ("_changed", "growth", "records")

    def __init__(self, records: dict[str, bytes] | None = None) -> None:
        self.records: dict[str, bytes] = records or {}
        self.growth = 0
        self._changed: Records = {}

    def __repr__(self) -> str:
        return f"ledger records={len(self.records)} changed={len(self._changed)}"

    def set(self, name: str, value: bytes | None) -> None:
        """Make `value`, which is compact JSON, the record under `name`; None removes it."""
        old = self.records.get(name)
        if old is not None:
            crc = record_checksum(name, old)
            self.growth -= crc * crc
        if value is not None:
            crc = record_checksum(name, value)
            self.growth += crc * crc
            self.records[name] = value
        elif old is not None:
            del self.records[name]
        self._changed[name] = value

    def take_changes(self) -> Records:
        """What has changed since the last call (None: removed), for a checkpoint to write."""
        changes, self._changed = self._changed, {}
        return changes

    def give_back(self, changes: Records) -> None:
        """`changes`, which `take_changes` returned, were not written after all: the next call returns them, too."""
        self._changed = {**changes, **self._changed}
